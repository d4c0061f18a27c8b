"""The benchmarks that a run knows."""

from .amber.benchmark import AmberDiscriminative, AmberGenerative
from .benchmark import Benchmark
from .chair.benchmark import Chair
from .mme.benchmark import MME, MMEHallucination
from .pope.benchmark import Pope

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (Pope(), Chair(), AmberGenerative(), AmberDiscriminative(), MME(), MMEHallucination())
}
