"""AMBER: its files, its rules against a slow reading of them, its figures by hand, bad input."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regard.evals.amber import (
    amber_score,
    load_amber,
    load_amber_answers,
    parse_amber,
    read_caption,
    score_amber,
)
from regard.evals.amber.benchmark import amber_scoring
from regard.evals.amber.data import Amber
from regard.evals.amber.words import noun_reader
from regard.evals.run_folder import EvalError

Alike = Callable[[str, str], float]


@pytest.fixture(scope="module")
def amber(shared_data: Path) -> Amber:
    return load_amber(shared_data / "amber")


# ------------------------------------------------------------------------------------------------- the files


def test_the_published_files(amber: Amber, shared_data: Path) -> None:
    assert [image.number for image in amber.images] == list(range(1, 1005))
    assert [q.number for q in amber.questions] == list(range(1005, 15221))
    assert Counter((q.dimension, q.label) for q in amber.questions) == {
        ("existence", "no"): 4924,
        ("state", "yes"): 2382,
        ("state", "no"): 2382,
        ("number", "yes"): 1036,
        ("number", "no"): 1036,
        ("action", "yes"): 396,
        ("action", "no"): 396,
        ("relation", "yes"): 975,
        ("relation", "no"): 689,
    }
    assert len(amber.relation) == 340
    assert len(set(amber.relation).union(*amber.relation.values())) == 418
    assert amber.safe_words == "orange snack line camera light shoe sign range individual".split()
    first = amber.questions[0]
    assert (first.text, first.image, first.label) == ("Is the sky sunny in this image?", "AMBER_1.jpg", "yes")


# ---------------------------------------------------------------------------------------- figures by hand

# AMBER_1: sky, forest (tree), grass, person (man), lake, mountain, road (path); likely: cloud, sun, bird, dog, flower.
# Nouns: man path lake tree *dog* *cloud* *bird* light(safe) sky: 3 of 9 wrong; 5 of 7 objects; 3 of 5 likely ones.
FIRST = "A man is on a path by a lake with trees, a dog and clouds. There is a bird and a light in the sky."
# AMBER_2: sky, man, ship, ship, forest, bridge, mountain, cloud, lake, building; likely: plane, bird, sun, paddle,
# ground. Nouns: boat ship cloud *oar* *floor* *dog*: ships cover the first ship only, oar is the paddle, floor the
# ground, a dog is no likely one. 3 of 6 wrong; 2 of 10 objects; 2 of 5.
SECOND = "There is a boat, two ships and clouds. There is an oar on the floor beside a dog. Leaves and men."


@pytest.mark.parametrize("reader", ["regard", "official"])
def test_captions_by_hand(amber: Amber, reader: str, request: Any) -> None:
    if reader == "official":
        request.getfixturevalue("nltk_here")
    score = score_amber({1: FIRST, 2: SECOND, 3: "Nothing."}, amber, reader, "exact").generative
    third = len(amber.images[2].truth), len(amber.images[2].hallu)
    assert score is not None
    assert (score.n, score.nouns) == (3, 15)
    assert score.chair == pytest.approx(6 / 15)
    assert score.hal == pytest.approx(2 / 3)
    assert score.cover == pytest.approx(7 / (17 + third[0]))
    assert score.cog == pytest.approx(5 / (10 + third[1]))
    saved = score_amber({2: SECOND}, amber, reader, lambda a, b: 0.81 * ({a, b} == {"dog", "man"}))
    assert saved.generative is not None
    assert (saved.generative.chair, saved.generative.cover) == (pytest.approx(2 / 6), pytest.approx(3 / 10))
    assert saved.similarity == "callable"
    edge = score_amber({2: SECOND}, amber, reader, lambda a, b: 0.8)  # has to be above
    assert edge.generative is not None
    assert edge.generative.chair == pytest.approx(3 / 6)


def test_a_word_names_the_first_object_that_it_stands_for(amber: Amber) -> None:
    def covered(caption: str, truth: list[str]) -> set[int]:
        read = read_caption(caption, truth, [], amber.relation, amber.safe_words, noun_reader("regard"))
        return set(read.covered)

    assert covered("a tree", ["tree", "forest"]) == {1}  # a forest's tree comes before the tree itself
    assert covered("a tree in a forest", ["tree", "forest"]) == {0, 1}
    assert covered("an orange", ["orange"]) == set()  # a safe word covers nothing, true or not
    assert covered("a dog, Dogs, TV, tv", ["dog", "dog", "television"]) == {0, 2}


# ------------------------------------------------------------------------------- a slow reading of the rules


def _slow_caption(
    nouns: list[str], truth: list[str], hallu: list[str], amber: Amber, alike: Alike
) -> list[int]:
    """Wrong nouns, objects covered, likely ones named: each noun is held against one entry after the other."""

    def entries(objects: list[str]) -> list[tuple[str, int]]:
        loose = [(word, place) for place, name in enumerate(objects) for word in amber.relation[name]]
        return loose + [(name, place) for place, name in enumerate(objects)]

    there, guessed, wrong = [0] * len(truth), [0] * len(hallu), 0
    for noun in nouns:
        if noun in amber.safe_words:
            continue
        equal = [place for word, place in entries(truth) if word == noun]
        if equal:
            there[equal[0]] = 1
            continue
        for hits in (
            [place for word, place in entries(hallu) if word == noun],
            [place for word, place in entries(hallu) if alike(noun, word) > 0.8],
        ):
            if hits:
                guessed[hits[0]] = 1
        close = [place for word, place in entries(truth) if alike(noun, word) > 0.8]
        if close:
            there[close[0]] = 1
        else:
            wrong += 1
    return [wrong, sum(there), sum(guessed)]


PLURAL = set(
    "apple bird boat bottle building car cat chair cloud cup dog door flower hat lake mountain road table".split()
)


def _random_answers(amber: Amber, seed: int, count: int) -> dict[int, tuple[str, list[str]]]:
    """Id -> caption and its nouns: true, likely, safe and other listed words, plurals, words that are not listed."""
    draw = random.Random(seed)
    listed = sorted(set(amber.relation).union(*amber.relation.values()) - {"can", "hot"})
    answers = {}
    for image in draw.sample(amber.images, count):
        objects = image.truth + image.hallu
        pool = objects * 3 + [word for name in objects for word in amber.relation[name]]
        pool += [*amber.safe_words, *draw.sample(listed, 6), "unicorn", "gate"]
        named = draw.choices(pool, k=draw.randrange(12))
        written = [f"{word}s" if word in PLURAL and draw.random() < 0.5 else word for word in named]
        nouns = [
            word for word in named if word in listed and word not in ("sunglasses", "earrings", "slippers")
        ]
        answers[image.number] = (
            f"Here one sees: {', '.join(written)}.",
            [n for n in nouns if n != "chopsticks"],
        )
    return answers


def _alike(first: str, second: str) -> float:
    return (
        1.0
        if first == second
        else random.Random(f"{min(first, second)}|{max(first, second)}").random() * 0.83
    )


@pytest.mark.parametrize("similarity", ["exact", _alike])
def test_random_captions_by_a_slow_reading(amber: Amber, similarity: Any) -> None:
    answers = _random_answers(amber, 5, 200)
    images = {image.number: image for image in amber.images}
    alike = similarity if callable(similarity) else lambda a, b: float(a == b)
    sums = np.zeros(3)
    hallucinated = 0
    for number, (_, nouns) in answers.items():
        image = images[number]
        row = _slow_caption(nouns, image.truth, image.hallu, amber, alike)
        sums += row
        hallucinated += row[0] > 0
    total = sum(len(nouns) for _, nouns in answers.values())
    objects = sum(len(images[number].truth) for number in answers)
    likely = sum(len(images[number].hallu) for number in answers)
    texts = {number: caption for number, (caption, _) in answers.items()}
    score = score_amber(texts, amber, "regard", similarity).generative
    assert score is not None
    assert score.nouns == total > 800
    expected = [sums[0] / total, sums[1] / objects, hallucinated / 200, sums[2] / likely]
    assert [score.chair, score.cover, score.hal, score.cog] == pytest.approx(expected)
    assert 0.1 < score.chair < 0.9
    released = score_amber(texts, amber, "regard", similarity, variant="released").generative
    assert released is not None
    shares = [(sums[0], total), (sums[1], objects), (sums[2], likely)]
    chair, cover, cog = (round(above / (0.001 + below) * 100, 1) for above, below in shares)
    hal = round(100 - (200 - hallucinated) / 200.001 * 100, 1)
    found = [released.chair, released.cover, released.hal, released.cog]
    assert [100 * x for x in found] == pytest.approx([chair, cover, hal, cog])


def _slow_answers(
    amber: Amber, answers: dict[int, str], dimensions: set[str], start: float, added: float
) -> list[float]:
    """Accuracy, precision, recall and F1 in percent, as the script counts and rounds them."""
    asked = right = no = found_no = said = rightly_said = start
    right = found_no = rightly_said = 0.0
    for q in amber.questions:
        if q.dimension not in dimensions or q.number not in answers:
            continue
        asked += 1
        answer = {"Yes": "yes", "No": "no"}.get(answers[q.number])
        right += answer == q.label
        if q.label == "no":
            no += 1
            found_no += answer == "no"
        if answer == "no":
            said += 1
            rightly_said += q.label == "no"
    accuracy, precision, recall = (
        round(a / b * 100, 1) if start else a / max(b, 1) * 100
        for a, b in ((right, asked), (rightly_said, said), (found_no, no))
    )
    both = precision / 100 + recall / 100 + added
    f1 = 2 * precision / 100 * recall / 100 / both * 100 if both else 0.0
    return [accuracy, precision, recall, round(f1, 1) if start else f1]


PARTS = {
    "all": {"existence", "state", "number", "action", "relation"},
    "existence": {"existence"},
    "attribute": {"state", "number", "action"},
    "state": {"state"},
    "number": {"number"},
    "action": {"action"},
    "relation": {"relation"},
}


@pytest.mark.parametrize("count", [7000, 20])  # with few, the script's counters show
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_random_answers_by_a_slow_reading(amber: Amber, variant: Any, count: int) -> None:
    draw = random.Random(8)
    numbers = [
        1005,
        1013,
        1017,
        *(q.number for q in draw.sample(amber.questions[20:], count)),
    ]  # all attributes
    answers = {number: draw.choice(["Yes", "No", "No", "no", "Maybe", "Yes."]) for number in numbers}
    score = score_amber(answers, amber, "regard", "exact", "official", variant)
    assert score.generative is None
    assert score.amber is None
    assert list(score.discriminative) == list(PARTS)
    assert {q.dimension for q in amber.questions if q.number in answers} == PARTS["all"]
    for part, dimensions in PARTS.items():
        start = 0.0 if variant == "paper" else 0.003 if part == "attribute" else 0.001
        added = 0.0 if variant == "paper" else 0.001 if part == "existence" else 0.0001
        found = score.discriminative[part]
        figures = [100 * x for x in (found.accuracy, found.precision, found.recall, found.f1)]
        assert figures == pytest.approx(_slow_answers(amber, answers, dimensions, start, added)), part
        assert found.unclear == sum(
            answers.get(q.number) in ("no", "Maybe", "Yes.")
            for q in amber.questions
            if q.dimension in dimensions
        )
    loose = score_amber(answers, amber, "regard", "exact").discriminative["all"]
    assert loose.unclear == sum(answer == "Maybe" for answer in answers.values())


def test_the_amber_score(amber: Amber) -> None:
    score = score_amber({1: FIRST, 1005: "Yes", 1006: "No", 1008: "Yes"}, amber, "regard", "exact")
    assert [q.label for q in amber.questions[:4]] == ["yes", "no", "yes", "no"]
    assert score.discriminative["all"].f1 == pytest.approx(2 / 3)  # one of two found, none wrongly said
    assert score.amber == pytest.approx((1 - 3 / 9 + 2 / 3) / 2)
    assert amber_score(0.078, 0.747) == pytest.approx(0.8345)
    one = score_amber({1006: "No"}, amber, "regard", "exact", variant="released").discriminative
    shares = {part: score.accuracy for part, score in one.items()}
    assert shares == pytest.approx(
        {"all": 0.999, "attribute": 0.997, "state": 0.999}
    )  # three counters were added up
    assert json.loads(json.dumps(score.to_dict()))["amber"] == pytest.approx(score.amber)


@pytest.mark.parametrize(
    ("answer", "first_word", "official"),
    [
        ("Yes", "yes", "yes"),
        ("No", "no", "no"),
        ("yes", "yes", "other"),
        ("No, there is not.", "no", "other"),
        ("**No**", "no", "other"),
        ("Nobody", "other", "other"),
        ("There is no dog", "other", "other"),
        ("", "other", "other"),
    ],
)
def test_parsers(answer: str, first_word: str, official: str) -> None:
    assert (parse_amber(answer), parse_amber(answer, "official")) == (first_word, official)


# ------------------------------------------------------------------------------------------------ bad input


def test_bad_answers(amber: Amber, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no answers"):
        score_amber({}, amber)
    with pytest.raises(ValueError, match=r"1 of 2 answers have an id .*\[15221\]"):
        score_amber({1: "", 15221: "Yes"}, amber, "regard")
    with pytest.raises(TypeError, match="answer to id 1 is None"):
        score_amber({1: None}, amber, "regard")  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="unknown variant"):
        score_amber({1: "a dog"}, amber, variant="official")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="choose one of first_word, official"):
        score_amber({1005: "Yes"}, amber, "regard", "exact", parser="mme")
    with pytest.raises(EvalError, match=r"unknown AMBER words 'offical'.*did you mean 'official'"):
        amber_scoring({"amber_words": "offical"})
    with pytest.raises(EvalError, match="unknown similarity 'cosine'"):
        amber_scoring({"similarity": "cosine"})
    with pytest.raises(EvalError, match="unknown AMBER parser"):
        amber_scoring({"amber_parser": "yes"})
    settled = amber_scoring({})
    assert settled["amber_parser"] == "first_word"
    assert settled["amber_words"] in ("official", "regard")
    file = tmp_path / "answers.json"
    file.write_text('[{"id": 1, "response": "a dog"}, {"id": 1005, "response": "Yes"}]')
    assert load_amber_answers(file) == {1: "a dog", 1005: "Yes"}
    file.write_text('[{"id": 1, "response": "a"}, {"id": 1, "response": "b"}]')
    with pytest.raises(ValueError, match="row 2: id 1 is answered twice"):
        load_amber_answers(file)
    file.write_text('{"id": 1, "text": "a"}')
    with pytest.raises(ValueError, match="row 1: no number 'id'"):
        load_amber_answers(file)
