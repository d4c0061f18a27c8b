"""Intervals and paired tests for scores that are functions of summed counts.

Every score here (accuracy, F1, CHAIR_I, mean caption length ...) depends on a run only through sums over
its items: so many true positives, so many mentions. An item is therefore a row of K counts, a score is a
function of the summed row, and a resample is one matrix product.

The unit that is drawn is the **image**, not the item: POPE asks six questions on one image in each split
(eighteen in all), their answers are not independent, and an interval that treats them so is too narrow.
All functions are deterministic for a given seed.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]
Metric: TypeAlias = Callable[[Array], Array]
"""Sums (..., K) -> score (...); NaN where the score is not defined (nothing was predicted yes)."""

RESAMPLES = 2000


class Interval(NamedTuple):
    """A score with its confidence interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """A paired difference (second system minus first), its confidence interval, and the p of "no difference"."""

    value: float
    low: float
    high: float
    p: float


class McNemar(NamedTuple):
    """Items that only the second system got right, that only the first did, and the exact two-sided p."""

    gained: int
    lost: int
    p: float


def cluster_sums(counts: npt.ArrayLike, clusters: npt.ArrayLike) -> Array:
    """Add up the rows of one cluster.

    Args:
        counts: (N, K) counts of each item.
        clusters: (N,) the cluster (image) of each item, of any hashable, sortable type.

    Returns:
        (C, K) sums, clusters in sorted order.

    Raises:
        ValueError: the two do not have the same length, or there are no items.
    """
    rows = np.asarray(counts, dtype=np.float64)
    names = np.asarray(clusters)
    if rows.ndim != 2 or names.shape != rows.shape[:1]:
        raise ValueError(f"counts must be (N, K) and clusters (N,), not {rows.shape} and {names.shape}")
    if not len(rows):
        raise ValueError("no items: there is nothing to draw from")
    _, index = np.unique(names, return_inverse=True)
    sums = np.zeros((int(index.max()) + 1, rows.shape[1]))
    np.add.at(sums, index, rows)
    return sums


@lru_cache(maxsize=4)
def _draws(clusters: int, resamples: int, seed: int) -> Array:
    """(resamples, clusters): how often each cluster is drawn in each resample."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples).astype(np.float64)


@lru_cache(maxsize=4)
def _swaps(clusters: int, permutations: int, seed: int) -> tuple[Array, bool]:
    """(P, clusters) of 0 or 1, and whether these are all the ways to swap (few clusters) or a sample."""
    if 2**clusters <= permutations:
        numbers = np.arange(2**clusters)[:, None]
        return ((numbers >> np.arange(clusters)) & 1).astype(np.float64), True
    generator = np.random.default_rng(seed)
    return generator.integers(0, 2, size=(permutations, clusters)).astype(np.float64), False


def interval(
    metric: Metric,
    counts: npt.ArrayLike,
    clusters: npt.ArrayLike,
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
    proportion: bool = False,
) -> Interval:
    """Percentile bootstrap interval of a score, clusters drawn with replacement.

    Args:
        metric: sums (..., K) -> score (...).
        counts: (N, K) counts of each item.
        clusters: (N,) cluster of each item.
        resamples: number of bootstrap resamples.
        level: coverage, 0.95 for a 95 % interval.
        seed: of the draws.
        proportion: the score is a share in [0, 1]. A share of exactly 0 or 1 is the same on every resample,
            and a width of nought would claim a certainty that is not there: the exact binomial bound with one
            trial per cluster is given in its place.

    Returns:
        The score on all items with its interval; NaN bounds where the score is not defined. Resamples in
        which it is not defined are left out.
    """
    sums = cluster_sums(counts, clusters)
    value = float(metric(sums.sum(axis=0)))
    low, high = _bounds(metric(_draws(len(sums), resamples, seed) @ sums), level)
    if proportion and value in (0.0, 1.0):
        # Clopper-Pearson at x = 0 of n, mirrored for x = n.
        bound = 1 - ((1 - level) / 2) ** (1 / len(sums))
        low, high = (0.0, bound) if value == 0.0 else (1 - bound, 1.0)
    return Interval(value, low, high)


def difference(
    metric: Metric,
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    clusters: npt.ArrayLike,
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Paired difference of a score between two systems on the same items.

    The interval is a cluster bootstrap that draws the same images for both systems. The p-value is from a
    permutation test: when the second system changes nothing, the two sets of answers on one image could be
    swapped, so p is the share of random swaps (whole images at a time) with a difference at least as large.

    Args:
        metric: sums (..., K) -> score (...).
        before: (N, K) counts of the first system.
        after: (N, K) counts of the second system, item by item in the same order.
        clusters: (N,) cluster of each item.
        resamples: number of bootstrap resamples, and of swaps (all of them when there are fewer).
        level: coverage of the interval.
        seed: of the draws.

    Raises:
        ValueError: the two systems do not have the same number of items.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired systems need the same items: {len(first)} rows against {len(second)}")
    sums_1, sums_2 = cluster_sums(first, clusters), cluster_sums(second, clusters)
    value = float(metric(sums_2.sum(axis=0)) - metric(sums_1.sum(axis=0)))
    draws = _draws(len(sums_1), resamples, seed)
    low, high = _bounds(metric(draws @ sums_2) - metric(draws @ sums_1), level)
    return Difference(value, low, high, _permutation_p(metric, sums_1, sums_2, value, resamples, seed))


def _permutation_p(metric: Metric, first: Array, second: Array, value: float, count: int, seed: int) -> float:
    if np.isnan(value):
        return float("nan")
    swaps, complete = _swaps(len(first), count, seed)
    moved = swaps @ (first - second)
    swapped = metric(second.sum(axis=0) + moved) - metric(first.sum(axis=0) - moved)
    swapped = swapped[~np.isnan(swapped)]
    extreme = int(np.sum(np.abs(swapped) >= abs(value) - 1e-12))
    if complete:
        return extreme / len(swapped)
    return (extreme + 1) / (len(swapped) + 1)  # the observed order is one of the permutations


def _bounds(resampled: Array, level: float) -> tuple[float, float]:
    defined = resampled[~np.isnan(resampled)]
    if not len(defined):
        return float("nan"), float("nan")
    tail = (1 - level) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)


def mcnemar(before: npt.ArrayLike, after: npt.ArrayLike) -> McNemar:
    """Exact McNemar test of paired right/wrong answers.

    It looks only at the items on which the two systems differ, and treats items as independent: beside it,
    :func:`difference` of the accuracy keeps the questions of one image together.

    Args:
        before: (N,) whether the first system is right.
        after: (N,) whether the second system is right, in the same order.

    Raises:
        ValueError: the two do not have the same length.
    """
    first, second = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    if first.shape != second.shape:
        raise ValueError(f"paired systems need the same items: {len(first)} answers against {len(second)}")
    gained, lost = int(np.sum(~first & second)), int(np.sum(first & ~second))
    if gained + lost == 0:
        return McNemar(0, 0, 1.0)
    from scipy.stats import binomtest  # here: `regard --help` should not wait for scipy

    result: Any = binomtest(gained, gained + lost, 0.5)
    return McNemar(gained, lost, float(result.pvalue))
