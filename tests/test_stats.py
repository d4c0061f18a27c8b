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
    assert stats.difference(mean, columns(one), columns(two), image) == first
    assert stats.difference(mean, columns(one), columns(two), image, seed=1) != first


@pytest.mark.parametrize(("cells", "counted"), [(1 << 21, 1 << 16), (700, 250), (1, 1)])
def test_draws_in_parts_equal_draws_at_once(monkeypatch, cells, counted):
    monkeypatch.setattr(stats, "_CELLS", cells)
    monkeypatch.setattr(stats, "_COUNTED", counted)
    generator = np.random.default_rng(7)
    before, after = generator.integers(0, 9, (2, 240, 5))
    image = np.repeat(np.arange(60), 4)
    pair = stats.Pair.of(before, after, image, resamples=101, seed=3)

    first, second = (counts.reshape(60, 4, 5).sum(axis=1) for counts in (before, after))
    places = np.random.default_rng(3).integers(0, 60, (101, 60))
    np.testing.assert_array_equal(pair.before.drawn, first[places].sum(axis=1))
    np.testing.assert_array_equal(pair.after.drawn, second[places].sum(axis=1))
    bits = np.frombuffer(np.random.default_rng((3, 1)).bytes(101 * 8), np.uint8).reshape(101, 8)
    swap = np.unpackbits(bits, axis=1)[:, :60, None].astype(bool)
    np.testing.assert_array_equal(pair.swapped[0], np.where(swap, second, first).sum(axis=1))
    np.testing.assert_array_equal(pair.swapped[1], np.where(swap, first, second).sum(axis=1))
    assert not pair.complete


def test_every_cluster_is_drawn_and_swapped_alike():
    weights = np.concatenate(list(stats._draws(40, 20_000, 0)))
    assert set(weights.sum(axis=1)) == {40}
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.04)
    np.testing.assert_allclose(weights.var(axis=0), 1 - 1 / 40, atol=0.06)
    swaps = np.concatenate(list(stats._swaps(40, 20_000, 0)))
    np.testing.assert_allclose(swaps.mean(axis=0), 0.5, atol=0.02)
    np.testing.assert_allclose(np.corrcoef(swaps.T), np.eye(40), atol=0.05)


def test_few_changes_among_many_clusters_have_an_exact_p():
    before, after = np.zeros(3000), np.zeros(3000)
    after[[5, 70, 900, 1200, 2400, 2900]] = 1
    assert stats.difference(mean, columns(before), columns(after), np.arange(3000)).p == 2 / 2**6
    before[3] = 1  # 7 change, one of them the other way: 8 of 64 ways on each side
    assert stats.difference(mean, columns(before), columns(after), np.arange(3000)).p == 16 / 2**7


def test_ties_are_found_at_any_size_of_the_score():
    """A mean of two splits rounds either way; the sum of their whole numbers does not, and has the same p."""
    generator = np.random.default_rng(12)
    before, after = (generator.random((2, 300, 2)) < 0.7).astype(float)
    before, after = (np.concatenate([right, np.ones((300, 2))], axis=1) for right in (before, after))
    exact = stats.difference(lambda sums: sums[..., 0] + sums[..., 1], before, after, np.arange(300))
    for factor in (1, 1e-9, 2000 / 3, 1e7):

        def score(sums, factor=factor):
            return factor * (sums[..., 0] / sums[..., 2] + sums[..., 1] / sums[..., 3]) / 2

        found = stats.difference(score, before, after, np.arange(300))
        assert found.p == exact.p
        assert found.low == pytest.approx(exact.low * factor / 600)


def test_a_share_of_one_counts_only_clusters_that_have_it():
    """Precision 1 of three predictions among 50 images is as sure as three trials."""
    counts = np.zeros((50, 3))
    counts[:, 2] = 1
    counts[:3, 0] = 1

    def precision(sums):
        return sums[..., 0] / np.maximum(sums[..., 0] + sums[..., 1], 1e-9)

    found = stats.interval(precision, counts, np.arange(50), proportion=True)
    low, high = scipy_stats.binomtest(3, 3).proportion_ci()
    assert found == pytest.approx((1.0, low, high))


def test_one_event_is_not_surer_than_none():
    none, one = np.zeros(500), np.zeros(500)
    one[0] = 1
    intervals = [
        stats.interval(mean, columns(values), np.arange(500), proportion=True)
        for values in (none, one, 1 - none, 1 - one)
    ]
    assert intervals[1].high >= intervals[0].high > 0
    assert intervals[3].low <= intervals[2].low < 1
    assert intervals[1].low == 0
    assert intervals[3].high == 1


def test_one_cluster_tells_nothing_about_the_others():
    values = np.array([1.0, 0, 1, 1])
    found = stats.interval(mean, columns(values), np.zeros(4), proportion=True)
    assert found == pytest.approx((0.75, 0.025, 0.975))
    found = stats.interval(mean, columns(values), np.zeros(4))
    assert found.value == 0.75
    assert np.isnan(found.low)
    assert np.isnan(found.high)


def test_variance_of_a_mean_is_the_textbook_one():
    generator = np.random.default_rng(9)
    one, two = generator.normal(size=(2, 12))
    pair = stats.Pair.of(columns(one), columns(two), np.arange(12), resamples=40_000)
    assert pair.variance(mean) == pytest.approx((two - one).var(ddof=1) / 12, rel=0.03)
    assert pair.changed(mean) == 12


def test_changed_clusters_are_those_that_the_score_reads():
    before, after = np.ones((20, 4)), np.ones((20, 4))
    after[:5, 0] = 0
    after[3:9, 2] = 0
    pair = stats.Pair.of(before, after, np.arange(20), resamples=10)
    assert pair.changed(mean) == 5
    assert pair.changed(lambda sums: sums[..., 2] / sums[..., 3]) == 6
    assert pair.changed(lambda sums: sums.mean(axis=-1)) == 9
    assert pair.changed(lambda sums: np.zeros(sums.shape[:-1])) == 9  # reads nothing that can be seen


def test_bad_values():
    with pytest.raises(ValueError, match=r"item 2 has \[nan, 1.0\]"):
        stats.interval(mean, [[1, 1], [1, 1], [np.nan, 1]], np.arange(3))
    with pytest.raises(ValueError, match="resamples must be at least 1, not 0"):
        stats.interval(mean, np.ones((3, 2)), np.arange(3), resamples=0)
    with pytest.raises(ValueError, match=r"level must lie between 0 and 1, such as .*, not 95"):
        stats.difference(mean, np.ones((3, 2)), np.ones((3, 2)), np.arange(3), level=95)
