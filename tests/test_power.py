"""Needed sizes against simulated tests, Holm's correction against its definition."""

import numpy as np
import pytest

from regard.evals import stats
from regard.evals.power import holm, needed


def mean(sums):
    return sums[..., 0] / sums[..., 1]


def paired(generator, images, up=0.25, down=0.1, questions=6):
    """Answers of two systems: half the questions of some images become right, of others wrong; 0.05 in all.

    Returns two (N, 2) counts and the image of each.
    """
    base = generator.random((images, questions)) < 0.5
    turn = generator.choice([1, -1, 0], size=(images, 1), p=[up, down, 1 - up - down])
    moved = generator.random((images, questions)) < 2 / 3
    after = np.where(moved & (turn != 0), turn > 0, base)
    image = np.repeat(np.arange(images), questions)
    return [np.stack([x.ravel().astype(float), np.ones(x.size)], axis=1) for x in (base, after)], image


def rejected(draw, repeats=300):
    ps = []
    for _ in range(repeats):
        (one, two), image = draw()
        ps.append(stats.difference(mean, one, two, image, resamples=200).p)
    return np.mean(np.array(ps) < 0.05)


def size(one, two, image, delta):
    pair = stats.Pair.of(one, two, image)
    return needed(pair.variance(mean), pair.changed(mean), len(pair.before.sums), len(one), delta=delta)


def test_the_needed_images_give_the_power():
    generator = np.random.default_rng(0)
    (one, two), image = paired(generator, 3000)
    true = (0.25 - 0.1) * 2 / 3 / 2
    found = size(one, two, image, true)
    assert found.items == pytest.approx(6 * found.images, abs=6)
    assert 0.7 < rejected(lambda: paired(generator, found.images)) < 0.9
    alone = size(one, two, np.arange(len(one)), true)  # what ignoring the images would have asked for
    assert rejected(lambda: paired(generator, round(alone.images / 6))) < 0.6


def test_systems_that_hardly_differ_are_given_no_more_power_than_they_can_have():
    """Four changes among 2,000 images: a variance so small that 40 images would do, were they able to be 0.02 apart."""
    generator = np.random.default_rng(1)

    def one_way(images, rate):
        after = (generator.random(images) < rate).astype(float)
        counts = [np.stack([x, np.ones(images)], axis=1) for x in (np.zeros(images), after)]
        return counts, np.arange(images)

    before, after = np.zeros((2000, 2)), np.zeros((2000, 2))
    before[:, 1] = after[:, 1] = 1
    after[[3, 500, 900, 1500], 0] = 1
    found = size(before, after, np.arange(2000), 0.02)
    assert 350 < found.images < 430
    assert 0.7 < rejected(lambda: one_way(found.images, 0.02)) < 0.9


@pytest.mark.parametrize("changed", [1, 7, 8, 9, 60, 400])
def test_detectable_is_the_difference_that_needs_the_present_size(changed):
    found = needed(2e-4, changed, 400, 2400)
    again = needed(2e-4, changed, 400, 2400, delta=found.detectable)
    assert again.images == pytest.approx(400, abs=1)
    assert again.items == pytest.approx(2400, abs=6)


def test_needed_by_hand():
    found = needed(1e-4, 500, 1000, 6000)
    assert found.images == 7849  # (1.959964 + 0.841621) ** 2 = 7.848880
    assert found.items == 47094
    assert found.detectable == pytest.approx(0.0280159, abs=1e-7)
    assert needed(1e-4, 500, 1000, 6000, power=0.9).images > found.images
    assert needed(1e-4, 500, 1000, 6000, alpha=0.01).images > found.images


def test_few_images_cannot_reach_the_level():
    found = needed(1e-8, 5, 5, 500)
    assert found.images == 6
    assert found.detectable is None
    assert stats.difference(mean, np.array([[0, 1]] * 6), np.ones((6, 2)), np.arange(6)).p < 0.05
    assert stats.difference(mean, np.array([[0, 1]] * 5), np.ones((5, 2)), np.arange(5)).p > 0.05


def test_nothing_to_go_by():
    assert needed(0.0, 0, 100, 100) is None
    assert needed(float("nan"), 3, 100, 100) is None
    for sizes in [(101, 100, 100), (1, 0, 0), (1, 100, 99)]:
        with pytest.raises(ValueError, match="sizes must be"):
            needed(0.1, *sizes)
    for wrong in [{"delta": 0.0}, {"power": 1.0}, {"alpha": 5}]:
        with pytest.raises(ValueError, match="delta must be positive"):
            needed(0.1, 1, 10, 10, **wrong)


def step_down(ps, alpha):
    """Which are rejected: from the smallest on, as long as the i-th of m is at most alpha / (m - i + 1)."""
    left = list(range(len(ps)))
    gone = set()
    while left:
        place = min(left, key=lambda i: ps[i])
        if ps[place] * len(left) > alpha:
            break
        gone.add(place)
        left.remove(place)
    return gone


def test_holm_rejects_what_its_definition_rejects():
    generator = np.random.default_rng(2)
    for _ in range(300):
        ps = (generator.random(generator.integers(1, 9)) ** 3).round(2).tolist()  # with ties
        adjusted = holm(ps)
        for alpha in [0.0, *generator.random(20).tolist(), *(a for a in adjusted if a < 1)]:
            assert {i for i, p in enumerate(adjusted) if p <= alpha} == step_down(ps, alpha)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, None, 0.9, float("nan"), 0.02])[:3] == [1.0, None, 1.0]
    assert np.isnan(holm([0.02, float("nan")])[1])
    assert holm([0.02, float("nan"), None])[0] == 0.02
    assert holm([]) == []
    with pytest.raises(ValueError, match=r"p-values must lie in \[0, 1\], not 1.5"):
        holm([0.1, 1.5])
