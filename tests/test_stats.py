"""Intervals and paired tests against known cases."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from regard.evals import stats


def mean(sums):
    return sums[..., 0] / sums[..., 1]


def columns(values):
    return np.stack([values, np.ones_like(values)], axis=1)


def test_unclustered_interval_equals_scipy():
    values = np.random.default_rng(3).normal(size=400)
    ours = stats.interval(mean, columns(values), np.arange(400), resamples=9999)
    theirs = scipy_stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=9999, random_state=1
    ).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.006)
    assert ours.high == pytest.approx(theirs.high, abs=0.006)


def clustered(generator, images=60, questions=18, effect=0.0):
    """Right answers whose probability is one number per image."""
    ability = generator.beta(2, 1, size=images)
    right = generator.random((images, questions)) < np.clip(ability + effect, 0, 1)[:, None]
    return right.ravel().astype(float), np.repeat(np.arange(images), questions)


def test_coverage_on_clustered_data():
    generator = np.random.default_rng(0)
    hits, naive_hits, repeats = 0, 0, 300
    for _ in range(repeats):
        right, image = clustered(generator)
        found = stats.interval(mean, columns(right), image, resamples=500)
        naive = stats.interval(mean, columns(right), np.arange(len(right)), resamples=200)
        hits += found.low <= 2 / 3 <= found.high
        naive_hits += naive.low <= 2 / 3 <= naive.high
    assert 0.91 <= hits / repeats <= 0.98
    assert naive_hits / repeats < 0.75  # what ignoring the images would have claimed to be 95 %


def test_permutation_p_is_uniform_without_an_effect():
    generator = np.random.default_rng(1)
    ps = []
    for _ in range(300):
        image = np.repeat(np.arange(40), 6)
        base = generator.random(40).repeat(6)
        one = (generator.random(240) < base).astype(float)
        two = (generator.random(240) < base).astype(float)
        ps.append(stats.difference(mean, columns(one), columns(two), image, resamples=400).p)
    assert 0.02 <= np.mean(np.array(ps) < 0.05) <= 0.09


def test_identical_systems():
    right, image = clustered(np.random.default_rng(2))
    found = stats.difference(mean, columns(right), columns(right), image)
    assert found == (0.0, 0.0, 0.0, 1.0)
    assert stats.mcnemar(right, right) == (0, 0, 1.0)


def test_a_real_difference_is_found_and_pairing_narrows_it():
    generator = np.random.default_rng(4)
    right, image = clustered(generator, images=200)
    better = right.copy()
    wrong = np.flatnonzero(right == 0)
    better[generator.choice(wrong, size=len(wrong) // 4, replace=False)] = 1
    found = stats.difference(mean, columns(right), columns(better), image)
    single = stats.interval(mean, columns(right), image)
    assert found.low > 0
    assert found.p < 0.001
    assert found.high - found.low < single.high - single.low


def test_few_clusters_use_every_swap():
    before, after = columns(np.zeros(4)), columns(np.ones(4))
    assert stats.difference(mean, before, after, np.arange(4)).p == 2 / 16


def test_permutation_agrees_with_scipy():
    generator = np.random.default_rng(5)
    one = generator.normal(size=30)
    two = one + generator.normal(0.3, 1, size=30)
    theirs = scipy_stats.permutation_test(
        (one, two), lambda x, y, axis: np.mean(y - x, axis=axis), permutation_type="samples", rng=1,
        n_resamples=19_999, vectorized=True,
    ).pvalue  # fmt: skip
    ours = stats.difference(mean, columns(one), columns(two), np.arange(30), resamples=19_999).p
    assert ours == pytest.approx(theirs, abs=0.01)


def test_mcnemar_is_the_exact_binomial():
    before = np.array([True] * 20 + [False] * 12 + [True] * 3)
    after = np.array([True] * 20 + [True] * 12 + [False] * 3)
    expected = scipy_stats.binomtest(12, 15).pvalue
    assert stats.mcnemar(before, after) == (12, 3, expected)


def test_share_of_nought_has_no_certainty():
    found = stats.interval(mean, columns(np.zeros(50)), np.arange(50), proportion=True)
    low, high = scipy_stats.binomtest(0, 50).proportion_ci()
    assert found == pytest.approx((0.0, low, high))
    found = stats.interval(mean, columns(np.ones(50)), np.arange(50), proportion=True)
    assert found.low == pytest.approx(1 - high)


def test_undefined_scores_are_nan_not_an_error():
    def precision(sums):
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums[..., 0] / sums[..., 1]

    found = stats.interval(precision, np.zeros((5, 2)), np.arange(5))
    assert all(np.isnan(part) for part in found)
    found = stats.difference(precision, np.zeros((5, 2)), np.ones((5, 2)), np.arange(5))
    assert np.isnan(found.p)


def test_bad_shapes():
    with pytest.raises(ValueError, match="same items: 3 rows against 4"):
        stats.difference(mean, np.ones((3, 2)), np.ones((4, 2)), np.arange(3))
    with pytest.raises(ValueError, match="clusters"):
        stats.interval(mean, np.ones((3, 2)), np.arange(4))
    with pytest.raises(ValueError, match="no items"):
        stats.interval(mean, np.ones((0, 2)), np.arange(0))
    with pytest.raises(ValueError, match="3 answers against 2"):
        stats.mcnemar([True] * 3, [True] * 2)


def test_same_seed_same_figures():
    generator = np.random.default_rng(6)
    one, image = clustered(generator, images=500)
    two, _ = clustered(generator, images=500)
    first = stats.difference(mean, columns(one), columns(two), image)
    stats._draws.cache_clear()
    stats._swaps.cache_clear()
    assert stats.difference(mean, columns(one), columns(two), image) == first
