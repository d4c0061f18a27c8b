"""The benchmarks that a run knows."""

from .amber_benchmark import AmberDiscriminative, AmberGenerative
from .benchmark import Benchmark
from .chair_benchmark import Chair
from .mme_benchmark import MME, MMEHallucination
from .pope_benchmark import Pope

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (Pope(), Chair(), AmberGenerative(), AmberDiscriminative(), MME(), MMEHallucination())
}
