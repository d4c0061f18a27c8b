"""POPE: the official files, the published LLaVA figures, the six parsers, and the rules of construction."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from regard.evals.chair import GroundTruth, load_ground_truth
from regard.evals.pope import (
    PARSERS,
    SPLITS,
    Answer,
    Question,
    build_pope,
    load_answers,
    load_pope,
    parse,
    pope_items,
    pope_version,
    score_pope,
)
from regard.evals.pope.questions import same_question


@pytest.fixture(scope="module")
def truth(shared_data: Path) -> GroundTruth:
    return load_ground_truth(shared_data / "chair" / "chair_gt_trainval2014_pattern_singularize.json.gz")


VERSIONS = ["e3e3926", "edebdda", "head_109985c", "orig_7ef3026", "aokvqa_seem", "gqa_seem"]

# answer, official, OPERA, VCD with label yes, VCD with label no, lmms-eval, VLMEvalKit, MME
READINGS = [
    ("yes.", "yes", "yes", "yes", "yes", "other", "yes", "yes"),
    ("NO", "yes", "no", "no", "no", "no", "no", "no"),
    ("There isn't a dog.", "yes", "no", "no", "yes", "other", "other", "other"),
    ("Not really", "yes", "yes", "no", "no", "other", "other", "no"),
    ("no\n", "yes", "yes", "no", "no", "no", "no", "no"),
    ("No!", "yes", "yes", "no", "no", "other", "no", "no"),
    ("", "yes", "yes", "no", "yes", "other", "other", "other"),
    ("I cannot tell.", "yes", "yes", "no", "no", "other", "other", "other"),
    ("Yes. No dog though.", "yes", "no", "yes", "no", "other", "other", "yes"),
    ("The image does show a dog, and no cat.", "no", "no", "no", "no", "other", "no", "other"),
    ("Yes and no", "no", "no", "yes", "no", "other", "other", "yes"),
    ("There is another dog.", "yes", "yes", "no", "no", "other", "other", "other"),
    ("**No**", "yes", "yes", "no", "no", "other", "no", "no"),
]


@pytest.mark.parametrize("row", READINGS, ids=[repr(row[0]) for row in READINGS])
def test_parsers_read_as_their_harness_does(row: tuple[str, ...]) -> None:
    answer, official, opera, vcd_yes, vcd_no, lmms, vlmeval, mme = row
    assert parse(answer) == parse(answer, "official") == official
    assert parse(answer, "opera") == opera
    assert parse(answer, "vcd", label="yes") == vcd_yes
    assert parse(answer, "vcd", label="no") == vcd_no
    assert parse(answer, "lmms") == lmms
    assert parse(answer, "vlmeval") == vlmeval
    assert parse(answer, "mme") == mme


def test_parser_names_are_checked() -> None:
    with pytest.raises(ValueError, match="did you mean 'official'"):
        parse("yes", "oficial")
    with pytest.raises(ValueError, match="give label='yes' or 'no'"):
        parse("yes", "vcd")


@pytest.mark.parametrize("version", VERSIONS)
def test_official_files_load_and_are_recognised(shared_data: Path, version: str) -> None:
    questions = load_pope(shared_data / "pope" / version)
    assert list(questions) == list(SPLITS)
    assert pope_version(questions) == version
    sizes = [len(rows) for rows in questions.values()]
    assert sizes == ([2910, 3000, 3000] if version == "e3e3926" else [3000] * 3)
    for rows in questions.values():
        assert len({q.image for q in rows}) == 500
        assert Counter(q.label for q in rows)["yes"] == 1500
        assert all(q.object for q in rows)
    one_file = next((shared_data / "pope" / version).glob("*adversarial.json"))
    assert pope_version(load_pope(one_file)) == version


def test_versions_of_single_and_mixed_files(shared_data: Path) -> None:
    pope = shared_data / "pope"
    shared = load_pope(pope / "edebdda" / "coco_pope_random.json")
    assert list(shared) == ["random"]
    assert pope_version(shared) == "edebdda or head_109985c"
    mixed = shared | load_pope(pope / "e3e3926" / "coco_pope_popular.json")
    assert pope_version(mixed) == "random: edebdda or head_109985c, popular: e3e3926"
    assert pope_version(shared["random"][:-1]) == "own"


@pytest.mark.parametrize("version", ["e3e3926", "edebdda", "head_109985c", "orig_7ef3026"])
def test_labels_agree_with_the_chair_ground_truth(
    shared_data: Path, truth: GroundTruth, version: str
) -> None:
    for rows in load_pope(shared_data / "pope" / version).values():
        for q in rows:
            assert (q.label == "yes") == (q.object in truth[q.image]), q


def test_published_llava_figures(shared_data: Path) -> None:
    expected = json.loads((shared_data / "expected_scores.json").read_text())["pope"]
    questions = load_pope(shared_data / "pope" / "e3e3926")
    score = score_pope(questions, load_answers(shared_data / expected["file"]))
    for split, figures in expected["scores"].items():
        got = score.splits[split]
        assert (got.n, got.tp, got.fp, got.tn, got.fn) == tuple(
            figures[k] for k in ("n", "TP", "FP", "TN", "FN")
        )
        for ours, theirs in {"accuracy": "acc"}.items():
            assert round(getattr(got, ours), 4) == figures[theirs]
        for name in ("precision", "recall", "f1", "yes_ratio"):
            assert round(getattr(got, name), 4) == figures[name]
    assert round(score.mean_f1, 4) == expected["mean_f1"] == 0.8595
    assert score.version == "e3e3926"
    assert score.parser == "official"
    assert score.unclear == 0
    assert score.n == 8910
    # These answers are the bare words, so every parser must give the same counts.
    for parser in PARSERS:
        assert (
            score_pope(questions, load_answers(shared_data / expected["file"]), parser).splits == score.splits
        )


def test_answers_to_another_version_are_refused(shared_data: Path) -> None:
    answers = load_answers(shared_data / "outputs/llava_official/pope_answers_llava-v1.5-13b.jsonl")
    with pytest.raises(ValueError, match=r"2910 answers for 3000 questions; .*2910 rows \(version e3e3926\)"):
        score_pope(load_pope(shared_data / "pope" / "edebdda"), answers)
    other = load_pope(shared_data / "pope" / "orig_7ef3026" / "coco_pope_popular.json")
    popular = [a for a in answers if (a.question_id or 0) > 20_000_000]
    with pytest.raises(ValueError, match="another POPE version"):
        score_pope(other, popular)


def _questions(labels: str) -> list[Question]:
    names = {"y": "yes", "n": "no"}
    return [
        Question(i, f"{i // 2}.jpg", "Is there a dog in the image?", names[x], "random", "dog")
        for i, x in enumerate(labels, start=1)
    ]


def test_figures_of_unreadable_answers() -> None:
    questions = _questions("yynn")
    answers = ["yes", "perhaps", "no", "perhaps"]
    official, lmms, vlmeval = (
        score_pope(questions, answers, p).pooled for p in ("official", "lmms", "vlmeval")
    )
    assert (official.accuracy, official.other, official.unclear) == (0.75, 0, 2)
    assert (lmms.accuracy, lmms.precision, lmms.recall, lmms.other) == (0.5, 1.0, 1.0, 2)
    assert (vlmeval.accuracy, vlmeval.precision, vlmeval.recall, vlmeval.fn) == (0.5, 1.0, 0.5, 1)
    assert lmms.yes_ratio == 0.25  # of the predictions; of the labels it is 0.5


def test_no_division_by_zero() -> None:
    score = score_pope(_questions("yn"), ["no", "no"])
    assert (score.pooled.precision, score.pooled.recall, score.pooled.f1) == (0.0, 0.0, 0.0)
    assert score.mean_accuracy == 0.5
    assert json.loads(json.dumps(score.to_dict()))["splits"]["random"]["n"] == 2


def test_pairing() -> None:
    questions = _questions("ynyn")
    texts = ["yes", "no", "no", "no"]
    by_order = pope_items(questions, texts)
    shuffled = [Answer(t, q.question_id) for t, q in zip(texts, questions, strict=True)][::-1]
    as_dict = {q.question_id: t for t, q in zip(texts, questions, strict=True)}
    for answers in (shuffled, as_dict, {"random": texts}):
        assert pope_items(questions, answers).correct.tolist() == by_order.correct.tolist() == [1, 1, 0, 1]
    assert by_order.ids == ["random/1", "random/2", "random/3", "random/4"]
    assert by_order.images == ["0.jpg", "1.jpg", "1.jpg", "2.jpg"]
    assert by_order.predictions == texts


@pytest.mark.parametrize(
    ("answers", "error", "message"),
    [
        (["yes"], ValueError, "1 answers for 2 questions"),
        ("yes", TypeError, "one string"),
        (["yes", None], TypeError, "None .* not a string"),
        ([Answer("yes", 1), Answer("no", 1)], ValueError, r"no answer to question_id \[2\]"),
        ([Answer("yes", 1), Answer("no", 7)], ValueError, r"no answer to question_id \[2\]"),
        (
            {"popular": ["yes", "no"]},
            ValueError,
            r"answers are for \['popular'\], questions for \['random'\]",
        ),
        ([Answer("yes", 1, "Is there a cat?"), Answer("no", 2)], ValueError, "was given to 'Is there a cat"),
        ([Answer("yes"), Answer("no", 2)], ValueError, "answer 1 has no question_id"),
    ],
)
def test_bad_answers(answers: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        score_pope(_questions("yn"), answers)


def test_answers_of_files_are_never_paired_by_order_unless_asked(tmp_path: Path) -> None:
    """POPE's own form {question, answer}: shuffled lines would score, and wrongly."""
    objects = {f"{i}.jpg": [["dog", "cat", "car"][i % 3], "bus"] for i in range(4)}
    questions = build_pope(objects, per_image=1)["popular"]
    file = tmp_path / "answers.json"
    rows = [{"question": q.text, "answer": q.label} for q in questions]
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"no question_id, and a question's text stands for many images"):
        score_pope(questions, load_answers(file))
    assert score_pope(questions, load_answers(file), by_order=True).mean_f1 == 1.0
    file.write_text("\n".join(map(json.dumps, rows[::-1])))
    with pytest.raises(ValueError, match="its answer was given to 'Is there a"):
        score_pope(questions, load_answers(file), by_order=True)
    file.write_text("\n".join(json.dumps({"answer": q.label}) for q in questions))
    with pytest.raises(ValueError, match="neither question_id nor its question"):
        score_pope(questions, load_answers(file), by_order=True)
    mixed = [Answer("yes", 1), *(Answer("no", None, q.text) for q in questions[1:])]
    with pytest.raises(ValueError, match=f"{len(questions) - 1} of {len(questions)} answers have no"):
        score_pope(questions, mixed, by_order=True)


def test_ids_that_stand_in_several_splits_need_their_names() -> None:
    objects = {f"{i}.jpg": [["dog", "cat", "car"][i % 3], "bus"] for i in range(4)}
    questions = build_pope(objects, per_image=1)
    answers = {split: [Answer(q.label, q.question_id) for q in rows] for split, rows in questions.items()}
    with pytest.raises(ValueError, match=r"question_id 1 stands in random, popular, adversarial: give"):
        score_pope(questions, [a for rows in answers.values() for a in rows])
    assert score_pope(questions, {k: rows[::-1] for k, rows in answers.items()}).mean_accuracy == 1.0
    numbered = {
        split: [replace(q, question_id=q.question_id + 100 * place) for q in rows]
        for place, (split, rows) in enumerate(questions.items())
    }
    flat = [Answer(q.label, q.question_id) for rows in numbered.values() for q in rows]
    assert score_pope(numbered, flat[::-1]).mean_accuracy == 1.0
    with pytest.raises(ValueError, match="question_id 999 is no question's"):
        score_pope(numbered, [replace(flat[0], question_id=999), *flat[1:]])


@pytest.mark.parametrize(
    ("prompt", "same"),
    [
        ("USER: <image>\nIs there a hot dog in the image? Please answer yes or no. ASSISTANT:", True),
        ("Is there a hot dog in the imange?\nAnswer the question using a single word or phrase.", True),
        ("Do you see a Hot dog here?", True),
        ("Is there a dog in the image?", False),
        ("Do you see hot dogs here?", False),
        ("Is there a hot dog stand in the image?", False),
    ],
)
def test_the_same_question_in_other_words(prompt: str, same: bool) -> None:
    assert same_question("Is there a hot dog in the image?", prompt) is same


def test_answers_of_splits_one_after_the_other() -> None:
    objects = {f"{i}.jpg": [["dog", "cat", "car"][i % 3], "bus"] for i in range(4)}
    questions = build_pope(objects, per_image=1)
    flat = [q.label for rows in questions.values() for q in rows]
    assert score_pope(questions, flat).mean_f1 == 1.0
    assert score_pope([q for rows in questions.values() for q in rows], flat).mean_f1 == 1.0
    with pytest.raises(ValueError, match="23 answers for 24 questions"):
        score_pope(questions, flat[1:])


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no POPE file or folder"):
        load_pope(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"it holds: notes.txt"):
        load_pope(tmp_path)
    file = tmp_path / "my_pope_random.json"
    file.write_text('{"image": "a.jpg", "text": "Is there a cat in the image?", "label": "maybe"}\n')
    with pytest.raises(ValueError, match="row 1: label 'maybe'"):
        load_pope(tmp_path)
    file.write_text('{"image": "a.jpg", "text": "Is there a cat in the image?"}\n')
    with pytest.raises(ValueError, match="row 1: no label"):
        load_pope(file)
    file.write_text("not json")
    with pytest.raises(ValueError, match="neither JSON lines nor a JSON array"):
        load_pope(file)
    (tmp_path / "coco_pope_random.json").write_text("[]")
    with pytest.raises(ValueError, match="2 files for split random"):
        load_pope(tmp_path)
    file.write_text('{"question": "Is there a cat?", "reply": "yes"}\n')
    with pytest.raises(ValueError, match="its keys are"):
        load_answers(file)
    file.write_text('{"question": "Is there a cat?", "answer": "yes"}\n')
    assert load_answers(file) == [Answer("yes", None, "Is there a cat?")]


def _check_rules(objects: dict[str, list[str]], questions: dict[str, list[Question]], per_image: int) -> None:
    asked = {q.image for q in questions["random"]}
    frequency = Counter(thing for image in asked for thing in objects[image])
    for split, rows in questions.items():
        assert [q.question_id for q in rows] == list(range(1, len(rows) + 1))
        by_image: dict[str, list[Question]] = {}
        for q in rows:
            by_image.setdefault(q.image, []).append(q)
            assert (q.label == "yes") == (q.object in objects[q.image])
        for image, of_image in by_image.items():
            things = [str(q.object) for q in of_image]
            assert len(set(things)) == len(things) == 2 * per_image
            assert [q.label for q in of_image] == ["yes", "no"] * per_image
            for i in range(1, len(things), 2):
                absent = [t for t in frequency if t not in objects[image] and t not in things[:i]]
                if split == "popular":
                    assert frequency[things[i]] == max(frequency[t] for t in absent)
                if split == "adversarial":
                    together = Counter(
                        t for other in asked if things[i - 1] in objects[other] for t in objects[other]
                    )
                    assert together[things[i]] == max(together[t] for t in absent)


def test_construction_rules_on_official_objects(truth: GroundTruth) -> None:
    images = list(truth)[:3000]
    objects = {image: sorted(truth[image]) for image in images}
    questions = build_pope(objects, images=200, seed=5)
    assert {split: len(rows) for split, rows in questions.items()} == dict.fromkeys(SPLITS, 1200)
    _check_rules(objects, questions, 3)
    assert build_pope(objects, images=200, seed=5) == questions
    assert build_pope(objects, images=200, seed=6) != questions
    assert pope_version(questions) == "own"


def test_official_popular_and_adversarial_negatives_come_out_again(
    shared_data: Path, truth: GroundTruth
) -> None:
    """Given the official images in their order, only ties among equally frequent companions are open."""
    folder = shared_data / "pope"
    official = load_pope(folder / "head_109985c")
    met_first = list(json.loads((folder / "orig_7ef3026" / "coco_ground_truth_objects.json").read_text()))
    objects: dict[str, list[str]] = {}
    for q in official["popular"]:
        if q.label == "yes":
            objects.setdefault(q.image, []).append(str(q.object))
    for image, positives in objects.items():
        rest = truth[image] - set(positives)
        objects[image] = positives + sorted(rest, key=met_first.index)
    built = build_pope(objects)
    assert [(q.image, q.text, q.label) for q in built["popular"]] == [
        (q.image, q.text, q.label) for q in official["popular"]
    ]
    same = sum(a.text == b.text for a, b in zip(built["adversarial"], official["adversarial"], strict=True))
    assert same >= 2996


def test_construction_details() -> None:
    objects = {"a": ["umbrella", "dog"], "b": ["orange", "dog", "dog"], "c": ["hot dog"], "d": ["dog", "cat"]}
    questions = build_pope(objects, per_image=2)
    texts = {q.text for rows in questions.values() for q in rows}
    assert "Is there an umbrella in the image?" in texts
    assert "Is there an orange in the image?" in texts
    assert "c" not in {q.image for q in questions["random"]}
    with pytest.raises(ValueError, match="only 3 of 4 have as many"):
        build_pope(objects, images=4, per_image=2)
    with pytest.raises(ValueError, match="too few are left"):
        build_pope({"a": ["cat", "dog"], "b": ["dog", "cat"]}, per_image=2)
    with pytest.raises(ValueError, match="must be at least 1"):
        build_pope(objects, images=0)
