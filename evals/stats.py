"""Intervals and paired tests for scores that are functions of summed counts.

Every score here (accuracy, F1, CHAIR_I, mean caption length ...) depends on a run only through sums over
its items: so many true positives, so many mentions. An item is therefore a row of K counts, a score is a
function of the summed row, and a resample is one matrix product.

The unit that is drawn is the **image**, not the item: POPE asks six questions on one image in each split
(eighteen in all), their answers are not independent, and an interval that treats them so is too narrow.

Resamples are drawn a few at a time and only their K sums are kept, so 100,000 images need no more than
their own counts; :class:`Sample` and :class:`Pair` draw once for any number of scores. All functions are
deterministic for a given seed, and the same number of clusters gets the same draws.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]
Metric: TypeAlias = Callable[[Array], Array]
"""Sums (..., K) -> score (...); NaN where the score is not defined (nothing was predicted yes)."""

RESAMPLES = 2000
LEVEL = 0.95
_CELLS = 1 << 21  # weights held at once, 16 MB of floats
_COUNTED = 1 << 16  # draws counted at once: they stay in the processor's cache


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
        ValueError: the two do not have the same length, there are no items, or a count is not finite.
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
    if not np.isfinite(sums).all():
        place = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
        raise ValueError(f"counts must be finite numbers: item {place} has {rows[place].tolist()}")
    return sums


def _parts(clusters: int, rows: int) -> Iterator[int]:
    """Split `rows` into parts whose (part, clusters) weights fit `_CELLS`."""
    size = max(1, _CELLS // clusters)
    for start in range(0, rows, size):
        yield min(size, rows - start)


def _draws(clusters: int, resamples: int, seed: int) -> Iterator[Array]:
    """Parts (r, clusters) of how often each cluster is drawn in each resample; the parts' r add up."""
    generator = np.random.default_rng(seed)
    group = max(1, _COUNTED // clusters)
    for rows in _parts(clusters, resamples):
        weights = np.empty((rows, clusters))
        for start in range(0, rows, group):
            some = weights[start : start + group]
            drawn = generator.integers(0, clusters, some.shape)
            drawn += clusters * np.arange(len(some))[:, None]
            some[:] = np.bincount(drawn.ravel(), minlength=some.size).reshape(some.shape)
        yield weights


def _swaps(clusters: int, permutations: int, seed: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Parts (r, clusters) of 0 or 1: whether a cluster's two systems change places."""
    generator = np.random.default_rng((seed, 1))
    width = 4 * -(-clusters // 32)  # the generator gives bytes by fours
    for rows in _parts(clusters, permutations):
        bits = np.frombuffer(generator.bytes(rows * width), np.uint8).reshape(rows, width)
        yield np.unpackbits(bits, axis=1, count=clusters)


def _resampled(systems: Sequence[Array], resamples: int, seed: int) -> list[Array]:
    """(R, K) sums of each system over the same drawn clusters; each system is (C, K)."""
    parts = [[weights @ sums for sums in systems] for weights in _draws(len(systems[0]), resamples, seed)]
    return [np.concatenate(own) for own in zip(*parts, strict=True)]


def _swapped(first: Array, second: Array, permutations: int, seed: int) -> tuple[Array, Array, bool]:
    """(P, K) sums of both systems after swaps, and whether these are all the ways to swap.

    Only clusters on which the systems differ matter, so a few of those are enumerated, however many others
    there are.
    """
    rows = np.flatnonzero((first != second).any(axis=1))
    change = first[rows] - second[rows]
    complete = len(rows) < permutations.bit_length()  # 2 ** rows <= permutations
    if complete:
        chosen = (np.arange(2 ** len(rows))[:, None] >> np.arange(len(rows))) & 1
        moved = chosen.astype(np.float64) @ change
    else:
        parts = _swaps(len(first), permutations, seed)
        moved = np.concatenate([part[:, rows].astype(np.float64) @ change for part in parts])
    return first.sum(axis=0) - moved, second.sum(axis=0) + moved, complete


def _columns_read(metric: Metric, width: int) -> npt.NDArray[np.bool_]:
    """(K,) which columns the score depends on, found by raising each at two points where all are positive.

    All of them where the score depends on none there.
    """
    read = np.zeros(width, dtype=bool)
    for point in (np.linspace(1, 2, width), np.linspace(2, 1, width)):
        found = metric(point + np.concatenate([np.zeros((1, width)), np.eye(width)]))
        read |= ~np.isclose(found[1:], found[0], rtol=1e-9, atol=0, equal_nan=True)
    return read if read.any() else ~read


@dataclass(frozen=True)
class Sample:
    """One system's counts, resampled once for every score.

    Attributes:
        sums: (C, K) counts of each cluster.
        drawn: (R, K) sums over the clusters of each resample.
    """

    sums: Array
    drawn: Array

    @classmethod
    def of(
        cls, counts: npt.ArrayLike, clusters: npt.ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0
    ) -> "Sample":
        """Sum and resample; arguments and errors are those of :func:`interval`."""
        _check_resamples(resamples)
        sums = cluster_sums(counts, clusters)
        return cls(sums, *_resampled([sums], resamples, seed))

    def value(self, metric: Metric) -> float:
        """The score on all items."""
        return float(metric(self.sums.sum(axis=0)))

    def interval(self, metric: Metric, *, level: float = LEVEL, proportion: bool = False) -> Interval:
        """A score with its interval: see :func:`interval`."""
        _check_level(level)
        value = self.value(metric)
        if np.isnan(value):
            return Interval(value, value, value)
        low, high = _bounds(metric(self.drawn), level)
        if proportion:
            low, high = self._not_certain(metric, Interval(value, low, high), level)
        elif len(self.sums) == 1:
            low = high = float("nan")
        return Interval(value, low, high)

    def _not_certain(self, metric: Metric, found: Interval, level: float) -> tuple[float, float]:
        """The bounds of a share, made exact where it is 0 or 1, and no narrower than that where they touch it."""
        trials = int(self.sums[:, _columns_read(metric, self.sums.shape[1])].any(axis=1).sum())
        # Clopper-Pearson at x = 0 of n, mirrored for x = n.
        bound = 1 - ((1 - level) / 2) ** (1 / max(trials, 1))
        if found.value in (0.0, 1.0):
            return (0.0, bound) if found.value == 0.0 else (1 - bound, 1.0)
        single = len(self.sums) == 1
        return (
            min(found.low, 1 - bound) if found.high == 1 or single else found.low,
            max(found.high, bound) if found.low == 0 or single else found.high,
        )


@dataclass(frozen=True)
class Pair:
    """Two systems on the same items: the same clusters are drawn for both, once for every score.

    Attributes:
        before: the first system.
        after: the second.
        swapped: (P, K) sums of the first and of the second after random swaps of whole clusters.
        complete: the swaps are all there are.
    """

    before: Sample
    after: Sample
    swapped: tuple[Array, Array]
    complete: bool

    @classmethod
    def of(
        cls,
        before: npt.ArrayLike,
        after: npt.ArrayLike,
        clusters: npt.ArrayLike,
        *,
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> "Pair":
        """Sum, resample and swap; arguments and errors are those of :func:`difference`."""
        _check_resamples(resamples)
        first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
        if first.shape != second.shape:
            raise ValueError(f"paired systems need the same items: {len(first)} rows against {len(second)}")
        sums = cluster_sums(first, clusters), cluster_sums(second, clusters)
        samples = list(map(Sample, sums, _resampled(sums, resamples, seed)))
        one, other, complete = _swapped(*sums, resamples, seed)
        return cls(samples[0], samples[1], (one, other), complete)

    def difference(self, metric: Metric, *, level: float = LEVEL) -> Difference:
        """A paired difference with its interval and p: see :func:`difference`."""
        _check_level(level)
        value = self.after.value(metric) - self.before.value(metric)
        if np.isnan(value):
            return Difference(value, value, value, value)
        low, high = _bounds(self._drawn(metric), level)
        return Difference(value, low, high, self._p(metric, value))

    def variance(self, metric: Metric) -> float:
        """Bootstrap variance of the difference (of the figure itself, not of one item); NaN where not defined.

        The factor C / (C - 1) makes it unbiased for a mean, as a bootstrap of C clusters is not.
        """
        clusters = len(self.before.sums)
        drawn = self._drawn(metric)
        drawn = drawn[~np.isnan(drawn)]
        if clusters < 2 or not len(drawn):
            return float("nan")
        return float(drawn.var()) * clusters / (clusters - 1)

    def changed(self, metric: Metric) -> int:
        """Number of clusters on which the two systems differ in what the score reads."""
        read = _columns_read(metric, self.before.sums.shape[1])
        return int((self.before.sums[:, read] != self.after.sums[:, read]).any(axis=1).sum())

    def _drawn(self, metric: Metric) -> Array:
        return metric(self.after.drawn) - metric(self.before.drawn)

    def _p(self, metric: Metric, value: float) -> float:
        first, second = self.swapped
        swapped = metric(second) - metric(first)
        swapped = swapped[~np.isnan(swapped)]
        size = max(abs(self.before.value(metric)), abs(self.after.value(metric)))
        # Sums of the same numbers in another order: a tie may be off by a rounding of the two scores.
        extreme = int(np.sum(np.abs(swapped) >= abs(value) - 1e-12 * size))
        if self.complete:
            return extreme / len(swapped)
        return (extreme + 1) / (len(swapped) + 1)  # the observed order is one of the permutations


def interval(
    metric: Metric,
    counts: npt.ArrayLike,
    clusters: npt.ArrayLike,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
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
            and a width of nought would claim a certainty that is not there: the exact binomial bound is given
            in its place, with one trial for each cluster that has anything in the columns the score reads.
            A few events more must not make the interval narrower, so whenever it reaches 0 (or 1) its other
            end is at least that bound.

    Returns:
        The score on all items with its interval; NaN bounds where the score is not defined. Resamples in
        which it is not defined are left out. A single cluster tells nothing about the others: its bounds are
        NaN, and for a share the exact bound of one trial.

    Raises:
        ValueError: see :func:`cluster_sums`; or resamples is not positive, or level not inside (0, 1).
    """
    sample = Sample.of(counts, clusters, resamples=resamples, seed=seed)
    return sample.interval(metric, level=level, proportion=proportion)


def difference(
    metric: Metric,
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    clusters: npt.ArrayLike,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Difference:
    """Paired difference of a score between two systems on the same items.

    The interval is a cluster bootstrap that draws the same images for both systems. The p-value is from a
    permutation test: when the second system changes nothing, the two sets of answers on one image could be
    swapped, so p is the share of random swaps (whole images at a time) with a difference at least as large.

    Two systems that never differ get the interval 0 to 0 and p = 1: nothing here tells how seldom they might.

    Args:
        metric: sums (..., K) -> score (...).
        before: (N, K) counts of the first system.
        after: (N, K) counts of the second system, item by item in the same order.
        clusters: (N,) cluster of each item.
        resamples: number of bootstrap resamples, and of swaps. When the clusters that differ can be swapped
            in fewer ways, all of them are taken and p is exact; else p is at least 1 / (resamples + 1).
        level: coverage of the interval.
        seed: of the draws.

    Raises:
        ValueError: the two systems do not have the same number of items; see also :func:`interval`.
    """
    return Pair.of(before, after, clusters, resamples=resamples, seed=seed).difference(metric, level=level)


def _check_resamples(resamples: int) -> None:
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, not {resamples}")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, such as 0.95, not {level}")


def _bounds(resampled: Array, level: float) -> tuple[float, float]:
    defined = resampled[~np.isnan(resampled)]
    if not len(defined):
        return float("nan"), float("nan")
    tail = (1 - level) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)


def mcnemar(before: npt.ArrayLike, after: npt.ArrayLike) -> McNemar:
    """Exact McNemar test of paired right/wrong answers, on items.

    It looks only at the items on which the two systems differ, and treats items as independent, which six
    questions on one image are not: beside it, :func:`difference` of the accuracy keeps them together.

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
