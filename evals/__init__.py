"""Benchmarks, metrics, statistics and reports."""
