"""MME: both layouts, figures by hand and by a slow reading, pairing of real answers, bad input."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from regard.evals.benchmark import Request
from regard.evals.mme import (
    COGNITION,
    HALLUCINATION,
    PERCEPTION,
    SUBTASKS,
    MmeAnswer,
    MmeQuestion,
    load_mme,
    load_mme_answers,
    score_mme,
)
from regard.evals.mme.benchmark import MME, MMEHallucination
from regard.evals.scores import measure
from regard.evals.sources import DataError, ImageIndex, Sources, find_sources

IN_FOLDERS = ("posters", "celebrity", "scene", "landmark", "artwork")  # the published layout has both forms
ENDING = "Please answer yes or no."


def _make(
    root: Path, images: int = 3, subtasks: tuple[str, ...] = SUBTASKS, folders: Any = IN_FOLDERS
) -> Path:
    """A synthetic MME: file names repeat from subtask to subtask, as in the real one."""
    for subtask in subtasks:
        home = root / "MME_Benchmark_release_version" / subtask
        pictures, texts = home, home
        if subtask in folders:
            pictures, texts = home / "images", home / "questions_answers_YN"
        for place in (pictures, texts):
            place.mkdir(parents=True, exist_ok=True)
        ending = ".png" if subtask == "code_reasoning" else ".jpg"
        for number in range(1, images + 1):
            (pictures / f"{number:04}{ending}").touch()
            lines = f"Is it {subtask} {number}? {ENDING}\tYes\nIs it a hat?  {ENDING}\tNo\n"
            (texts / f"{number:04}.txt").write_text(lines)
    return root


def _answers(questions: list[MmeQuestion], said: Any) -> list[MmeAnswer]:
    return [MmeAnswer(f"{q.subtask}/{Path(q.image).name}", q.text, said(q)) for q in questions]


@pytest.mark.parametrize("folders", [(), IN_FOLDERS, SUBTASKS])
def test_both_layouts(tmp_path: Path, folders: Any) -> None:
    _make(tmp_path, folders=folders)
    (tmp_path / "eval_tool" / "LaVIN").mkdir(parents=True)  # comes with the benchmark, and has no questions
    (tmp_path / "eval_tool" / "LaVIN" / "existence.txt").write_text("0001.jpg\tIs it?\tYes\tno\n")
    questions = load_mme(tmp_path)
    assert Counter(q.subtask for q in questions) == dict.fromkeys(SUBTASKS, 6)
    inside = "images/" if "existence" in folders else ""
    first = MmeQuestion(
        "existence",
        f"MME_Benchmark_release_version/existence/{inside}0001.jpg",
        f"Is it existence 1? {ENDING}",
        "yes",
    )
    assert questions[0] == first
    assert questions[1].label == "no"
    assert len({q.image for q in questions}) == 14 * 3
    release = tmp_path / "MME_Benchmark_release_version"
    assert load_mme(release)[0].image == f"existence/{inside}0001.jpg"
    assert load_mme(release / "color", subtasks=["color"])[0].image.endswith("0001.jpg")
    assert load_mme(tmp_path, subtasks=HALLUCINATION) == questions[: 4 * 6]


def test_questions_and_images_in_two_places(tmp_path: Path) -> None:
    _make(tmp_path / "data", folders=SUBTASKS)
    _make(tmp_path / "pictures", folders=())
    for file in [*(tmp_path / "data").rglob("*.jpg"), *(tmp_path / "pictures").rglob("*.txt")]:
        file.unlink()
    questions = load_mme(tmp_path / "data", tmp_path / "pictures", HALLUCINATION)
    assert questions[0].image == "MME_Benchmark_release_version/existence/0001.jpg"


# ------------------------------------------------------------------------------------------------- figures


def test_figures_by_hand() -> None:
    questions = [
        MmeQuestion("color", f"color/{name}.jpg", f"Is it {word}? {ENDING}", label)
        for name in "abcd"
        for word, label in (("red", "yes"), ("blue", "no"))
    ]
    said = iter(["Yes", "No", "yes.", "Yes", "The hat is red", "no", " No", "Not at all"])
    answers = _answers(questions, lambda q: next(said))
    random.Random(0).shuffle(answers)  # the order of lines means nothing
    score = score_mme(questions, answers)
    # Right: both of a; the first of b; the second of c, whose first is neither; the second of d.
    color = score.subtasks["color"]
    assert (color.accuracy, color.accuracy_plus, color.score) == (5 / 8, 1 / 4, 87.5)
    assert (color.n, color.images, color.unclear) == (8, 4, 1)
    assert (score.yes_ratio, score.unclear, score.parser) == (3 / 8, 1, "mme")
    assert (score.perception, score.cognition, score.hallucination) == (None, None, None)
    assert json.loads(json.dumps(score.to_dict()))["subtasks"]["color"]["score"] == 87.5


def test_totals_of_perfect_and_of_constant_answers(tmp_path: Path) -> None:
    questions = load_mme(_make(tmp_path))
    perfect = score_mme(questions, _answers(questions, lambda q: q.label.capitalize()))
    assert (perfect.perception, perfect.cognition, perfect.hallucination) == (2000, 800, 800)
    always = score_mme(questions, _answers(questions, lambda q: "Yes"))
    assert (always.perception, always.cognition, always.yes_ratio) == (500, 200, 1.0)


def _run_scores(benchmark: MME, data: Any, said: dict[str, str], scoring: Any) -> tuple[dict[str, Any], Any]:
    records = [
        {"id": item.id, "image": item.image, "answer": said[item.id], **item.facts}
        for item in benchmark.items(data)
    ]
    counted = benchmark.count(records, data, scoring)
    return measure(counted, benchmark.scores(data), counted), counted


@pytest.mark.parametrize("benchmark", [MME(), MMEHallucination()], ids=lambda b: b.name)
def test_a_run_scores_as_a_slow_reading_and_as_the_plain_function(tmp_path: Path, benchmark: MME) -> None:
    root = _make(tmp_path, images=9)
    data = benchmark.load(Request("MME", find_sources(root), None, 600, 0, {}))
    assert json.loads(json.dumps(data)) == data
    draw = random.Random(3)
    items = benchmark.items(data)
    assert len({item.id for item in items}) == len(items) == 18 * len(benchmark.subtasks)
    said = {item.id: draw.choice(["Yes", "Yes", "no, it is not", "Maybe"]) for item in items}
    draw.shuffle(data["questions"])  # the questions of an image need not be neighbours
    said = {item.id: said[item.id] for item in benchmark.items(data)}
    metrics, counted = _run_scores(benchmark, data, said, {})
    values = {key: entry["value"] for key, entry in metrics["scores"].items()}

    points = {}
    right = {
        item.id: {"Y": "yes", "n": "no", "M": "other"}[said[item.id][0]] == item.facts["label"]
        for item in benchmark.items(data)
    }
    for subtask in benchmark.subtasks:
        mine = [item for item in benchmark.items(data) if item.facts["subtask"] == subtask]
        both = [
            right[one.id] and right[two.id]
            for one in mine
            for two in mine
            if one.image == two.image and one.id < two.id
        ]
        assert len(both) == 9
        points[subtask] = 100 * sum(right[item.id] for item in mine) / 18 + 100 * sum(both) / 9
        assert values[f"{subtask}.score"] == pytest.approx(points[subtask])
        assert values[f"{subtask}.accuracy_plus"] == pytest.approx(sum(both) / 9)
    assert values["hallucination"] == pytest.approx(sum(points[name] for name in HALLUCINATION))
    assert set(benchmark.plotted(data)) | set(benchmark.headline) <= set(values)
    assert metrics["unclear"] == sum(answer == "Maybe" for answer in said.values()) > 0
    assert metrics["items"] == len(items)
    assert counted.right.tolist() == [right[one] for one in counted.ids]
    entry = metrics["scores"]["hallucination"]
    assert entry["low"] < entry["value"] < entry["high"]
    assert entry["difference"]["value"] == 0.0

    questions = [MmeQuestion(**row) for row in data["questions"]]
    texts = {(item.image, item.text): said[item.id] for item in benchmark.items(data)}
    plain = score_mme(questions, _answers(questions, lambda q: texts[q.image, q.text]))
    assert plain.hallucination == pytest.approx(values["hallucination"])
    assert plain.yes_ratio == pytest.approx(values["yes_ratio"])
    assert plain.unclear == metrics["unclear"]
    if benchmark.name == "mme":
        assert values["perception"] == pytest.approx(sum(points[name] for name in PERCEPTION))
        assert (
            values["cognition"] == pytest.approx(plain.cognition) == sum(points[name] for name in COGNITION)
        )


def test_a_draw_that_misses_a_subtask_has_no_total(tmp_path: Path) -> None:
    root, benchmark = _make(tmp_path), MME()
    data = benchmark.load(Request("MME", find_sources(root), None, 5, 0, {}))
    items = benchmark.items(data)
    assert len(items) == 10
    assert Counter(item.image for item in items) == dict.fromkeys({item.image for item in items}, 2)
    metrics, _ = _run_scores(benchmark, data, {item.id: "Yes" for item in items}, {"mme_parser": "official"})
    scores = metrics["scores"]
    assert scores["perception"]["value"] is scores["cognition"]["value"] is None
    seen = items[0].facts["subtask"]
    assert scores[f"{seen}.score"]["value"] == 50
    assert "official parser" in benchmark.reading({"mme_parser": "official"})
    again = benchmark.load(Request("MME", find_sources(root), None, 5, 0, {}))
    other = benchmark.load(Request("MME", find_sources(root), None, 5, 1, {}))
    assert again == data != other


def test_wanted_images_and_their_files(tmp_path: Path) -> None:
    sources, benchmark = find_sources(_make(tmp_path)), MMEHallucination()
    one = benchmark.load(Request("MME", sources, ["color/0002.jpg"], 600, 0, {}))
    assert [row["image"] for row in one["questions"]] == ["MME_Benchmark_release_version/color/0002.jpg"] * 2
    bare = benchmark.load(Request("MME", sources, ["0002.jpg"], 600, 0, {}))
    assert {row["subtask"] for row in bare["questions"]} == set(HALLUCINATION)
    names = {item.image for item in benchmark.items(bare)}
    files = ImageIndex(sources.images).require(sorted(names), "")
    assert len(set(files.values())) == len(names) == 4  # not one file for four names
    with pytest.raises(
        DataError, match=r"none of the images .* such as MME_Benchmark_release_version/existence/0001\.jpg"
    ):
        benchmark.load(Request("MME", sources, ["dog.jpg"], 600, 0, {}))


# -------------------------------------------------------------------------------------------- real answers


def test_real_answers_are_read_and_paired(shared_data: Path, tmp_path: Path) -> None:
    """The questions are made from the file itself and their labels mean nothing: this tests the pairing."""
    answers = load_mme_answers(
        shared_data / "outputs" / "llava_official" / "mme_answers_llava-v1.5-13b.jsonl"
    )
    assert len(answers) == 2374
    ending = "\nAnswer the question using a single word or phrase."
    assert all(answer.question.endswith(ending) for answer in answers)
    questions = [
        MmeQuestion(
            answer.image.split("/")[0],
            f"anywhere/{answer.image}",
            answer.question.replace(ending, f"  {ENDING}"),
            "yes" if place % 2 else "no",
        )
        for place, answer in enumerate(answers)
    ]
    score = score_mme(questions, list(reversed(answers)))
    sizes = {name: (part.images, part.n) for name, part in score.subtasks.items()}
    assert sizes["landmark"] == (200, 400)
    assert sizes["posters"] == (147, 294)
    assert sizes["existence"] == (30, 60)
    assert sum(images for images, _ in sizes.values()) == 1187
    assert (score.unclear, score.yes_ratio) == (11, 1188 / 2374)  # "Church", "Portrait" and the like
    expected = Counter(
        question.subtask
        for question, answer in zip(questions, answers, strict=True)
        if answer.text.lower() == question.label
    )
    assert {name: round(part.accuracy * part.n) for name, part in score.subtasks.items()} == expected
    folder = tmp_path / "results"  # the same in the reference's own form
    folder.mkdir()
    for answer in answers:
        subtask, name = answer.image.split("/")[0], Path(answer.image).name
        wording = answer.question.replace(ending, f" {ENDING}")
        with (folder / f"{subtask}.txt").open("a", encoding="utf-8") as file:
            file.write(f"{name}\t{wording}\tYes\t{answer.text}\n")
    assert score_mme(questions, load_mme_answers(folder)) == score


# ----------------------------------------------------------------------------------------------- bad input


def test_missing_data_says_what_to_get(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no questions of existence, .*found: no subtask\).*GitHub.*questions_answers_YN"
    ):
        MME().load(Request("MME", Sources(images=tmp_path, root=tmp_path), None, 9, 0, {}))
    with pytest.raises(DataError, match="there is no folder"):
        load_mme(tmp_path / "nowhere")
    root = _make(tmp_path / "four", subtasks=HALLUCINATION)
    with pytest.raises(DataError, match=r"no questions of posters, .*mme_hallucination asks only"):
        MME().load(Request("MME", find_sources(root), None, 9, 0, {}))
    assert len(MMEHallucination().load(Request("MME", find_sources(root), None, 9, 0, {}))["questions"]) == 18
    home = root / "MME_Benchmark_release_version" / "color"
    (home / "0001.jpg").rename(home / "0001.gif")
    with pytest.raises(DataError, match=r"1 images of MME are missing under .*\(color/0001\)"):
        load_mme(root, subtasks=HALLUCINATION)
    (home / "0001.png").touch()
    (home / "0001.webp").touch()
    with pytest.raises(DataError, match=r"0001\.txt has several images"):
        load_mme(root, subtasks=HALLUCINATION)
    shutil.copytree(home, root / "again" / "color")
    with pytest.raises(DataError, match="holds color in 2 folders"):
        load_mme(root, subtasks=HALLUCINATION)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Is it?\tYes\n", "has 1 lines"),
        ("Is it?\tYes\nIs it? Please answer yes or no.\tNo\n", "two different questions"),
        ("Is it?\tYes\nIs it not?\tMaybe\n", "is no question, tab, Yes or No"),
        ("Is it? Yes\nIs it not?\tNo\n", "is no question, tab, Yes or No"),
    ],
)
def test_bad_question_files(tmp_path: Path, text: str, message: str) -> None:
    root = _make(tmp_path, subtasks=HALLUCINATION)
    (root / "MME_Benchmark_release_version" / "count" / "0002.txt").write_text(text)
    with pytest.raises(DataError, match=rf"0002\.txt.*{message}"):
        load_mme(root, subtasks=HALLUCINATION)


def test_bad_answers(tmp_path: Path) -> None:
    questions = load_mme(_make(tmp_path / "data"), subtasks=["color", "count"])
    answers = _answers(questions, lambda q: "Yes")
    with pytest.raises(
        ValueError, match=r"1 of 12 questions have no answer, such as 'Is it color 1\?' on color/0001"
    ):
        score_mme(questions, answers[1:])
    with pytest.raises(ValueError, match=r"two answers to 'Is it color 1\?'"):
        score_mme(questions, [*answers, answers[0]])
    with pytest.raises(ValueError, match="has no question 'Is it a cup'"):
        score_mme(questions, [*answers, MmeAnswer("color/0001.jpg", "Is it a cup", "Yes")])
    score_mme(
        questions, [*answers, MmeAnswer("OCR/0001.jpg", "Is it a cup", "Yes")]
    )  # a subtask that is not asked
    with pytest.raises(ValueError, match=r"color/0001\.jpg has 1 questions"):
        score_mme(questions[1:], answers[1:])
    with pytest.raises(ValueError, match="no questions"):
        score_mme([], answers)
    with pytest.raises(ValueError, match="unknown answer parser"):
        score_mme(questions, answers, "amber")
    file = tmp_path / "answers.jsonl"
    file.write_text('{"question_id": 7, "prompt": "Is it?", "text": "Yes"}\n')
    with pytest.raises(ValueError, match="row 1: 'question_id', 'prompt' and 'text' must be strings"):
        load_mme_answers(file)
    with pytest.raises(ValueError, match="holds no result file"):
        load_mme_answers(tmp_path)
    (tmp_path / "color.txt").write_text("0001.jpg\tIs it?\tYes\n")
    with pytest.raises(ValueError, match=r"color.txt, line 1: 3 parts"):
        load_mme_answers(tmp_path)
