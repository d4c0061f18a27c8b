"""Many recipes, few images: Holm's correction, and how many images a difference of one point would need."""

from collections.abc import Sequence
from math import ceil, isnan, log2, sqrt
from statistics import NormalDist
from typing import NamedTuple

POINT = 0.01


class Power(NamedTuple):
    """What it takes to see a difference.

    Attributes:
        images: clusters needed.
        items: items needed, at as many an image as now.
        detectable: the smallest true difference that the present size sees, with the same power and level;
            None where it sees none, however large.
    """

    images: int
    items: int
    detectable: float | None


def needed(
    variance: float,
    changed: int,
    clusters: int,
    items: int,
    *,
    delta: float = POINT,
    power: float = 0.8,
    alpha: float = 0.05,
) -> Power | None:
    """How many images a true difference of `delta` needs to be seen by a two-sided paired test.

    The variance of a paired difference falls as 1 / images, so with z = z(1 - alpha / 2) + z(power)

        images = clusters * z^2 * variance / delta^2.

    That takes for granted that the systems go on to differ as often as they did, and systems that hardly
    differ cannot be `delta` apart: by Cauchy and Schwarz, `changed` clusters of that variance make a
    difference of at most m = sqrt(changed * variance), when all of them point one way. Where delta > m, more
    must change than did, and the variance grows by delta / m with it. The largest such difference that needs
    no more than the present size is `detectable`, by the same rule.

    Fewer than log2(2 / alpha) images (6 at 0.05) can be swapped in too few ways for p to fall below alpha.
    The figure is as good as the variance: from a handful of changed images it is a guess.

    Args:
        variance: of the difference at the present size, as `Pair.variance` gives it.
        changed: clusters on which the systems differ.
        clusters: clusters of the present size.
        items: items of the present size.
        delta: the true difference, in the unit of the score.
        power: chance to see it.
        alpha: two-sided level of the test.

    Returns:
        None where the systems never differ or the variance is not known (NaN).

    Raises:
        ValueError: a size is not positive, delta is not, or power or alpha is not inside (0, 1).
    """
    if clusters < 1 or items < clusters or not 0 <= changed <= clusters:
        raise ValueError(
            f"sizes must be 0 <= changed <= clusters <= items, not {changed}, {clusters} and {items}"
        )
    if delta <= 0 or not (0 < power < 1 and 0 < alpha < 1):
        raise ValueError(f"delta must be positive, power and alpha inside (0, 1): {delta}, {power}, {alpha}")
    if isnan(variance) or variance <= 0 or not changed:
        return None
    z = NormalDist().inv_cdf(1 - alpha / 2) + NormalDist().inv_cdf(power)
    most = sqrt(changed * variance)
    least = ceil(log2(2 / alpha))
    images = max(least, clusters * z**2 * variance / delta**2 * max(1.0, delta / most))
    detectable = z * sqrt(variance) * max(1.0, z / sqrt(changed)) if clusters >= least else None
    return Power(ceil(images), ceil(images * items / clusters), detectable)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p-values by Holm's step-down procedure (Scandinavian Journal of Statistics 6, 1979, 65-70).

    With the m known values in rising order, the i-th becomes max over j <= i of min(1, (m - j + 1) p_j).
    Rejecting where it is below 0.05 keeps the chance of any false rejection below 0.05, whatever the
    dependence between the tests.

    Args:
        p_values: of the tests of one family; None or NaN where there is none: it stays and does not count.

    Returns:
        As many, in the same order.

    Raises:
        ValueError: a value is not in [0, 1].
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None and not isnan(p))
    wrong = [p for p, _ in known if not 0 <= p <= 1]
    if wrong:
        raise ValueError(f"p-values must lie in [0, 1], not {wrong[0]}")
    adjusted = list(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[place] = largest
    return adjusted
