"""What `measure` and `correct` put beside each score."""

import tracemalloc

import numpy as np
import pytest

from regard.evals import stats
from regard.evals.power import holm, needed
from regard.evals.scores import Counted, chair_scores, correct, measure, pope_scores

SPLITS = ["random", "popular", "adversarial"]


def answers(seed, images=40, each=6, splits=SPLITS, wrong=0.2):
    """POPE counts of made-up answers; the questions are the same for every seed."""
    number = images * each
    places = np.arange(number)
    yes = places % 2 == 0
    right = np.random.default_rng(seed).random(number) >= wrong
    counts = np.zeros((number, 5 * len(splits)))
    column = np.select([yes & right, ~yes & ~right, ~yes & right], [0, 1, 2], 3)
    counts[places, 5 * (places // 2 % len(splits)) + column] = 1
    names = [f"{place // each:06d}.jpg" for place in places]
    return Counted([str(place) for place in places], names, counts, right, {"unclear": 0})


def test_measure_gives_the_figures_of_the_single_functions():
    before, after = answers(0), answers(1, wrong=0.1)
    scores = pope_scores(SPLITS)
    found = measure(after, scores, before)
    assert found["items"] == 240
    assert found["images"] == 40
    assert list(found["scores"]) == [score.key for score in scores]
    for score in scores:
        entry = dict(found["scores"][score.key])
        change = dict(entry.pop("difference"))
        power = change.pop("power")
        alone = stats.interval(score.metric, after.counts, after.images, proportion=True)
        assert entry == alone._asdict()
        assert change == stats.difference(score.metric, before.counts, after.counts, after.images)._asdict()
        pair = stats.Pair.of(before.counts, after.counts, after.images)
        assert power == needed(pair.variance(score.metric), pair.changed(score.metric), 40, 240)._asdict()
    assert found["mcnemar"] == stats.mcnemar(before.right, after.right)._asdict()


def test_a_baseline_stands_alone():
    found = measure(answers(0), pope_scores(SPLITS))
    assert "mcnemar" not in found
    assert all(set(entry) == {"value", "low", "high"} for entry in found["scores"].values())
    paired = measure(answers(0), pope_scores(SPLITS), answers(1))
    for key, entry in found["scores"].items():
        assert {part: paired["scores"][key][part] for part in entry} == entry  # the same draws


def test_power_is_for_shares_that_change():
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 9, (2, 30, 10)).astype(float)
    counts[:, :, [0]] = 1
    counts[1, :, 2:4] = counts[0, :, 2:4]  # mentions stay as they are
    names = [str(place) for place in range(30)]
    before, after = (Counted(names, names, own, own[:, 1] == 0, {}) for own in counts)
    found = measure(after, chair_scores(), before)["scores"]
    assert found["chair_i"]["difference"]["power"] is None
    assert found["length"]["difference"]["power"] is None
    assert found["recall"]["difference"]["power"]["images"] > 30


def test_nothing_can_be_seen_on_a_handful_of_images():
    before, after = answers(0, images=4, splits=["random"]), answers(1, images=4, splits=["random"])
    power = measure(after, pope_scores(["random"]), before)["scores"]["random.f1"]["difference"]["power"]
    assert power["detectable"] is None
    assert power["images"] > 100


def test_the_baseline_must_have_the_same_items():
    scores = pope_scores(SPLITS)
    with pytest.raises(ValueError, match="same items: 240 against 120"):
        measure(answers(0, images=20), scores, answers(0))
    moved = answers(1)
    moved.ids[3], moved.ids[4] = moved.ids[4], moved.ids[3]
    with pytest.raises(ValueError, match=r"same order: item 3 is \('3', '000000.jpg'\) in the baseline"):
        measure(moved, scores, answers(0))


def test_recipes_are_corrected_together():
    scores = pope_scores(SPLITS)
    base = answers(0)
    recipes = {"none": measure(base, scores)}
    for place, wrong in enumerate((0.05, 0.15, 0.2)):
        recipes[f"r{place}"] = measure(answers(place + 1, wrong=wrong), scores, base)
    recipes["same"] = measure(base, scores, base)
    recipes["r1"]["scores"]["mean_f1"]["difference"]["p"] = None
    correct(recipes)
    assert "difference" not in recipes["none"]["scores"]["mean_f1"]
    others = [found for name, found in recipes.items() if name != "none"]
    tests = [found["mcnemar"] for found in others]
    assert [test["p_holm"] for test in tests] == holm([test["p"] for test in tests])
    assert tests[0]["p_holm"] == pytest.approx(4 * tests[0]["p"])
    for score in scores:
        tests = [found["scores"][score.key]["difference"] for found in others]
        assert [test["p_holm"] for test in tests] == holm([test["p"] for test in tests])
    assert recipes["r1"]["scores"]["mean_f1"]["difference"]["p_holm"] is None
    best = recipes["r0"]["scores"]["mean_f1"]["difference"]
    assert best["p_holm"] == pytest.approx(3 * best["p"])  # None is no test
    before = {name: found["mcnemar"].copy() for name, found in recipes.items() if "mcnemar" in found}
    correct(recipes)
    assert {name: found["mcnemar"] for name, found in recipes.items() if "mcnemar" in found} == before


def test_a_hundred_thousand_images_need_little_memory():
    """Weights of 2,000 resamples at once would take 1.6 GB."""
    before, after = (answers(seed, images=100_000, each=1, splits=["all"]) for seed in (0, 1))
    tracemalloc.start()
    try:
        found = measure(after, pope_scores(["all"]), before)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found["images"] == 100_000
    assert peak < 150e6
    change = found["scores"]["all.accuracy"]["difference"]
    share = np.mean(before.right != after.right)
    assert change["high"] - change["low"] == pytest.approx(2 * 1.96 * (share / 1e5) ** 0.5, rel=0.1)
    assert change["power"]["images"] == pytest.approx(78489 * share, rel=0.1)
