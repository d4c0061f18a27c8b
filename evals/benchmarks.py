"""The benchmarks that a run knows."""

from .benchmark import Benchmark
from .chair_benchmark import Chair
from .pope_benchmark import Pope

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in (Pope(), Chair())}
