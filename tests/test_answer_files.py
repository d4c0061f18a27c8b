"""Every form of answer files, through an imported run; names of images; what is no form."""

import csv
import importlib.util
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from elsewhere import (
    as_llava,
    as_lmms,
    as_old_lmms,
    as_vlmeval,
    ask,
    check_scores,
    flat,
    said,
    share,
    value,
    write_lines,
)
from PIL import Image

from regard.evals.harnesses.answer_files import FORMS, read_answer_file
from regard.evals.harnesses.importer import import_answers
from regard.evals.harnesses.pairing import image_names
from regard.evals.pope import Question
from regard.evals.sources import DataError
from regard.hooks.errors import UnknownName


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, list[Question]]:
    """POPE on a few images, with question files in the data folder."""
    return ask(tmp_path / "data")


@pytest.mark.parametrize(
    "form", ["llava", "lmms", "lmms with docs", "lmms logs", "vlmeval", "image and question"]
)
def test_one_file_for_three_splits(asked: dict[str, list[Question]], tmp_path: Path, form: str) -> None:
    rows = {
        "llava": as_llava(asked),
        "lmms": [as_lmms(q, n) for n, q in enumerate(flat(asked))],
        "lmms with docs": [as_old_lmms(q, n) for n, q in enumerate(flat(asked))],
        "lmms logs": [as_old_lmms(q, n) for n, q in enumerate(flat(asked))],
        "vlmeval": as_vlmeval(asked),
        "image and question": [
            {"image": q.image, "question": q.text, "answer": said(q)} for q in flat(asked)
        ],
    }[form]
    random.Random(7).shuffle(rows)
    file = write_lines(tmp_path / "answers.jsonl", rows)
    if form == "lmms logs":
        file.write_text(json.dumps({"args": {}, "logs": rows}))
    results = import_answers("pope", {"none": file}, tmp_path / "data", tmp_path / "run")
    check_scores(results, asked)
    names = {"image and question": "pope", "lmms with docs": "lmms", "lmms logs": "lmms"}
    assert results.config["recipes"]["none"][0]["form"] == names.get(form, form)


@pytest.mark.parametrize(
    "names", [("random", "popular", "adversarial"), ("pope_random", "pope_pop", "pope_adv")]
)
def test_a_file_for_each_split_is_told_by_its_name(
    asked: dict[str, list[Question]], tmp_path: Path, names: Sequence[str]
) -> None:
    files = []
    for name, rows in zip(names, asked.values(), strict=True):
        given = [{"question_id": q.question_id, "text": said(q)} for q in rows[::-1]]
        files.append(write_lines(tmp_path / f"2025_samples_{name}.jsonl", given))
    check_scores(import_answers("pope", {"none": files}, tmp_path / "data", tmp_path / "run"), asked)
    one = tmp_path / "data" / "coco_pope_popular.json"
    alone = import_answers("pope", {"none": files[1]}, one, tmp_path / "popular")
    assert alone.metrics["pope"]["none"]["items"] == len(asked["popular"])
    assert value(alone, "mean_accuracy") == pytest.approx(share(asked["popular"]))


@pytest.mark.parametrize("ending", [".tsv", ".csv", ".json", ".xlsx"])
def test_vlmevalkits_files(asked: dict[str, list[Question]], tmp_path: Path, ending: str) -> None:
    rows = as_vlmeval(asked)
    rows[0]["prediction"] = 'Yes,\tit "is"\nthere'
    file = tmp_path / f"model_POPE{ending}"
    if ending == ".json":
        file.write_text(json.dumps(rows))
    elif ending == ".xlsx":
        book = pytest.importorskip("openpyxl").Workbook()
        for line in (list(rows[0]), *(list(row.values()) for row in rows)):
            book.active.append(line)
        book.save(file)
    else:
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, list(rows[0]), delimiter="\t" if ending == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    results = import_answers("pope", {"none": file}, tmp_path / "data", tmp_path / "run", parser="vlmeval")
    assert results.config["recipes"]["none"][0]["paired_by"] == "image and question"
    texts = [record["answer"] for record in results.items("pope").values()]
    assert texts.count('Yes,\tit "is"\nthere') == len(rows[0]["category"].split(","))
    assert results.metrics["pope"]["none"]["items"] == len(flat(asked))


def test_excel_without_openpyxl_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model_POPE.xlsx"
    file.write_bytes(b"PK")
    if importlib.util.find_spec("openpyxl") is not None:
        monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(DataError, match=r"pip install openpyxl, or export it as \.tsv"):
        read_answer_file(file)


def test_vlmevalkit_without_image_names_is_refused(asked: dict[str, list[Question]], tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "image_path"} for row in as_vlmeval(asked)]
    file = write_lines(tmp_path / "model_POPE.jsonl", rows)
    with pytest.raises(DataError, match=r"\(read as vlmeval\) has rows with neither ids nor images"):
        import_answers("pope", {"none": file}, tmp_path / "data", tmp_path / "run")


def test_items_of_another_run_are_a_form(asked: dict[str, list[Question]], tmp_path: Path) -> None:
    file = write_lines(tmp_path / "answers.jsonl", as_llava(asked))
    first = import_answers("pope", {"none": file}, tmp_path / "data", tmp_path / "run")
    again = tmp_path / "run" / "items" / "pope-none.jsonl"
    second = import_answers("pope", {"none": again}, tmp_path / "data", tmp_path / "second")
    assert second.config["recipes"]["none"][0]["form"] == "regard"
    assert second.metrics == first.metrics


def test_mme_is_paired_by_image_and_wording(tmp_path: Path) -> None:
    """As LLaVA writes it: the id is the image's path, and the ending of the question is another."""
    rows, labels = [], []
    for subtask in ("existence", "count", "position", "color"):
        folder = tmp_path / "data" / subtask
        (folder / "images").mkdir(parents=True)
        (folder / "questions_answers_YN").mkdir()
        for name in ("0001", "0020"):
            Image.new("RGB", (8, 8)).save(folder / "images" / f"{name}.png")
            pair = [(f"Is there a {subtask} in the image?", "Yes"), ("Are there two? Or more?", "No")]
            text = "".join(f"{asked} Please answer yes or no.\t{label}\n" for asked, label in pair)
            (folder / "questions_answers_YN" / f"{name}.txt").write_text(text)
            for asked, label in pair:
                prompt = f"{asked}\nAnswer the question using a single word or phrase."
                rows.append({"question_id": f"{subtask}/{name}.png", "prompt": prompt, "text": label})
                labels.append(label)
    rows[0]["text"] = "No"
    random.Random(1).shuffle(rows)
    file = write_lines(tmp_path / "mme.jsonl", rows)
    results = import_answers("mme_hallucination", {"none": file}, tmp_path / "data", tmp_path / "run")
    assert results.config["recipes"]["none"][0]["paired_by"] == "id as image, and question"
    assert value(results, "hallucination") == 800 - 25 - 50
    assert value(results, "existence.score") == 75 + 50
    more = write_lines(tmp_path / "more.jsonl", [*rows, {**rows[0], "question_id": "scene/0001.png"}])
    with pytest.raises(
        DataError, match=r"1 of 17 answers are to none of the 16 items: row 17 \(scene/0001.png"
    ):
        import_answers("mme_hallucination", {"none": more}, tmp_path / "data", tmp_path / "other")
    aside = import_answers(
        "mme_hallucination", {"none": more}, tmp_path / "data", tmp_path / "other", allow_extra=True
    )
    assert value(aside, "hallucination") == value(results, "hallucination")
    fewer = write_lines(tmp_path / "fewer.jsonl", rows[1:])
    kept = import_answers(
        "mme_hallucination", {"none": fewer}, tmp_path / "data", tmp_path / "kept", allow_missing=True
    )
    assert (
        kept.metrics["mme_hallucination"]["none"]["items"] == 14
    )  # accuracy+ needs both questions of an image


def test_ambers_answers_are_paired_by_id(shared_data: Path, tmp_path: Path) -> None:
    annotated = json.loads((shared_data / "amber" / "annotations.json").read_text())
    rows = [
        {"id": row["id"], "response": row["truth"].title()}
        for row in annotated
        if row["type"] != "generative"
    ]
    file = tmp_path / "answers.json"
    file.write_text(json.dumps(rows[::-1]))
    one = tmp_path / "images" / "AMBER_1.jpg"
    one.parent.mkdir()
    Image.new("RGB", (8, 8)).save(one)
    for number in range(2, 1005):
        (one.parent / f"AMBER_{number}.jpg").write_bytes(one.read_bytes())
    results = import_answers(
        "amber_d", {"none": file}, shared_data / "amber", tmp_path / "run", images=one.parent
    )
    assert results.metrics["amber_d"]["none"]["items"] == 14216
    assert value(results, "accuracy") == 1.0


def test_forms_that_are_none(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"who": 1, "what": "yes"}])
    with pytest.raises(
        DataError, match=r"none of the known forms \(lmms, .*keys of its first row are 'who', 'what'"
    ):
        read_answer_file(file)
    with pytest.raises(UnknownName, match="did you mean 'llava'"):
        read_answer_file(file, "lava")
    with pytest.raises(DataError, match="row 1: no text under 'text' or 'answer'"):
        read_answer_file(file, "llava")
    for content, message in {
        "": "holds no rows",
        "[1, 2]": "holds no rows",
        "{not": "cannot be read as .json",
    }.items():
        bad = tmp_path / "bad.json"
        bad.write_text(content)
        with pytest.raises(DataError, match=message):
            read_answer_file(bad)
    pickle = tmp_path / "answers.pkl"
    pickle.write_bytes(b"x")
    with pytest.raises(DataError, match="pickle files are not read"):
        read_answer_file(pickle)
    with pytest.raises(DataError, match="there is no file of answers"):
        read_answer_file(tmp_path / "nowhere.jsonl")
    assert set(FORMS) == {"lmms", "vlmeval", "regard", "amber", "captions", "llava", "pope"}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("415672", "COCO_val2014_000000415672.jpg", True),
        ("000000415672.jpg", "COCO_val2014_000000415672", True),
        ("code_reasoning/0020.png", "MME/code_reasoning/images/0020.jpg", True),
        ("AMBER_1", "AMBER_1.jpg", True),
        ("AMBER_1", "AMBER_11.jpg", False),
    ],
)
def test_names_of_one_image(one: str, other: str, same: bool) -> None:
    assert bool(set(image_names(one)) & set(image_names(other))) is same
