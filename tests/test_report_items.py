"""What the page holds of items, pictures and tables; several runs on one page."""

import csv
import json
import re

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from regard.cli import app
from regard.evals import report
from regard.evals.benchmark import Item
from regard.evals.benchmarks import BENCHMARKS
from regard.evals.report import items as report_items
from regard.evals.report.export import markdown_table
from regard.evals.report.items import PageItems, facets
from regard.evals.report.pictures import keep_pictures, kept_file, side
from regard.evals.results import Results
from regard.evals.run_folder import RunFolder, RunFolderError
from tests.hand_run import IMAGES, blocks, parsed, record


@pytest.fixture
def results(tmp_path):
    record(tmp_path / "run")
    file = tmp_path / "picture.jpg"
    Image.fromarray(np.full((480, 640, 3), 128, np.uint8)).save(file)
    found = Results.load(tmp_path / "run")
    found.write(dict.fromkeys(IMAGES, file))
    return found


def test_examples_favour_no_recipe(results):
    items = PageItems({"run": results}, ["none", "vhr"])
    pope, chair = items.sets
    assert [example["image"] for example in chair.examples] == IMAGES[:5]
    differ = [
        IMAGES[place] for place in (0, 1, 2, 4, 6)
    ]  # "none" says yes to all, and item 1 is the odd answer
    assert [example["image"] for example in pope.examples] == differ


def test_items_hold_what_every_recipe_said(results):
    data = blocks(results.page.read_text())
    pope = data["items-0-pope"]
    assert pope["head"]["recipes"] == [["none", 0, "●"], ["vhr", 1, "■"]]
    assert pope["head"]["facets"] == {"label": ["no", "yes"]}
    assert pope["rows"][0] == [
        "random/0",
        0,
        "Is there a dog in the image?",
        "no",
        [0],
        [[0, 0, "Yes"], [1, 1, "No"]],
    ]
    assert pope["rows"][1][5][1] == [0, 1, "no <script>alert(1)</script>"]
    chair = data["items-0-chair"]
    answers = chair["rows"][3][5]
    assert answers[0][:3] == [0, 0, "A dog, a cat & a bench."]
    assert [2, 5, 1, "dog"] in answers[0][3]
    assert [9, 12, 0, "cat"] in answers[0][3]
    assert answers[1][:2] == [1, 1]
    names = data["image-index"]["names"][0]
    assert [names[row[1]] for row in chair["rows"]] == IMAGES


def test_names_with_folders_keep_apart(tmp_path):
    files = {}
    for folder, shade in (("a", 10), ("b", 200)):
        files[f"{folder}/0020.png"] = tmp_path / f"{folder}.png"
        Image.fromarray(np.full((300, 600, 3), shade, np.uint8)).save(tmp_path / f"{folder}.png")
    keep_pictures(tmp_path, files, files)
    shades = [Image.open(kept_file(tmp_path, name)).getpixel((5, 5))[0] for name in files]
    assert shades == [10, 200]
    assert Image.open(kept_file(tmp_path, "a/0020.png")).size == (256, 128)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "a.png")
    keep_pictures(tmp_path, files, files)
    assert Image.open(kept_file(tmp_path, "a/0020.png")).size == (256, 128)  # what is there stays


def test_an_image_that_cannot_be_read_is_counted(tmp_path):
    record(tmp_path / "run")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    results = Results.load(tmp_path / "run")
    results.write(dict.fromkeys(IMAGES, broken))
    assert "8 images have no copy" in results.page.read_text()


def test_many_images_are_small():
    assert [side(images) for images in (1, 1_000, 1_001, 2_001, 100_000)] == [256, 256, 192, 128, 128]


def test_items_that_differ_go_first_where_room_is_short(tmp_path, monkeypatch):
    record(tmp_path / "run")
    results = Results.load(tmp_path / "run")
    for place, image in enumerate(IMAGES):
        kept = kept_file(results.path, image)
        kept.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), place * 30, np.uint8)).save(kept)
    whole = PageItems({"run": results}, ["none", "vhr"])
    pope = whole.sets[0]
    assert len(pope.rows) == 8
    assert sum(pope.differ) == 5  # the four of "no", and the one that is no answer
    assert whole.notes() == []
    monkeypatch.setattr(
        report_items, "TEXT_BYTES", sum(len(row) for part in whole.sets for row in part.rows) * 3 // 4
    )
    monkeypatch.setattr(
        report_items, "PAGE_BYTES", report_items.TEXT_BYTES + sum(map(len, whole.pictures.uris)) // 2
    )
    short = PageItems({"run": results}, ["none", "vhr"])
    pope = short.sets[0]
    assert 5 <= len(pope.rows) < 8
    assert sum(pope.differ) == 5
    assert any("of 8 items are on the page" in note for note in short.notes())
    assert any("too large" in note for note in short.notes())
    assert 0 < len(short.pictures.uris) < 8


def test_tables_are_exported(results):
    rows = list(csv.DictReader((results.path / "tables" / "chair.csv").open()))
    (row,) = [row for row in rows if row["recipe"] == "vhr" and row["score"] == "chair_s"]
    entry = results.metrics["chair"]["vhr"]["scores"]["chair_s"]
    assert float(row["difference"]) == entry["difference"]["value"] == -1
    assert float(row["p"]) == entry["difference"]["p"]
    assert (row["items"], row["images"], row["unit"]) == ("8", "8", "share of 1")
    keys = {row["score"] for row in rows}
    assert {score.key for score in results.scores("chair")} <= keys
    assert {"mcnemar_gained", "cut", "tokens", "median_seconds"} <= keys
    text = (results.path / "tables" / "chair.md").read_text()
    assert text.startswith("| CHAIR | none | vhr |\n| --- | --- | --- |\n")
    assert re.search(r"\| CHAIR_S \| 100.0 \(.*\) \| 0.0 \(.*\); −100.0 \(.*\), p 0.008, better \|", text)
    assert {line.count("|") for line in text.splitlines()} == {4}
    data = blocks(results.page.read_text())["exports"]
    assert data["0-chair"]["markdown"] == text
    assert data["0-chair"]["csv"] == (results.path / "tables" / "chair.csv").read_text()


def test_markdown_cells_cannot_break_the_table():
    text = markdown_table(
        ["a|b"],
        [
            [
                "<i>",
            ],
            ["two\nlines"],
        ],
    )
    assert text == "| a\\|b |\n| --- |\n| \\<i> |\n| two lines |\n"


def test_several_runs_on_one_page(tmp_path):
    record(tmp_path / "one")
    record(tmp_path / "two", recipes=("none", "vhr", "var"))
    runs = [Results.load(tmp_path / name) for name in ("one", "two")]
    out = report.write_report(runs, out=tmp_path / "pages" / "both.html")
    text = out.read_text()
    page = parsed(text)
    assert len(page.ids) == len(set(page.ids))
    assert not (tmp_path / "one" / "report.html").exists()
    assert not (tmp_path / "one" / "tables").exists()
    data = blocks(text)
    assert {"items-0-pope", "items-1-chair"} <= data.keys()
    rows = list(csv.DictReader(data["exports"]["all-chair"]["csv"].splitlines()))
    assert {(row["run"], row["recipe"]) for row in rows if row["score"] == "chair_i"} == {
        ("one", "none"), ("one", "vhr"), ("two", "none"), ("two", "vhr"), ("two", "var"),
    }  # fmt: skip
    assert text.count("change against each run&#39;s none") == 8
    assert "did not ask the same" not in text
    assert text.count("<tr") > 20


def test_the_page_knows_no_benchmark_by_name(tmp_path):
    """MME: scores that are no shares, subtasks as a filter, base names that repeat."""
    record(tmp_path / "run")
    rows = [
        {
            "image": f"{task}/{n:04d}.png",
            "subtask": task,
            "text": f"Question {n}?",
            "label": "yes" if n % 2 else "no",
        }
        for task in ("existence", "count")
        for n in (1, 1, 2, 2, 3, 3)
    ]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["benchmarks"] = ["mme_hallucination"]
    for part in ("data", "prompts", "generation"):
        config[part] = {"mme_hallucination": config[part]["pope"]}
    folder = RunFolder.create(tmp_path / "mme", config)
    folder.write_json("data/mme_hallucination.json", {"questions": rows})
    for recipe in ("none", "vhr"):
        answers = []
        for item in BENCHMARKS["mme_hallucination"].items({"questions": rows}):
            common = {"recipe": recipe, "prompt": "p", "tokens": 1, "cut": False, "seconds": 0.1}
            said = "Yes" if recipe == "none" else item.facts["label"]
            answers.append({"id": item.id, "image": item.image, "answer": said, **common, **item.facts})
        folder.append("mme_hallucination", recipe, answers)
    folder.close()
    files = {}
    for place, row in enumerate(rows[::2]):
        files[row["image"]] = tmp_path / f"{place}.png"
        Image.fromarray(np.full((9, 9, 3), 40 * place, np.uint8)).save(files[row["image"]])
    results = Results.load(tmp_path / "mme")
    results.write(files)
    text = results.page.read_text()
    parsed(text)
    data = blocks(text)
    assert data["items-0-mme_hallucination"]["head"]["facets"]["subtask"] == ["existence", "count"]
    assert sorted(data["image-index"]["pictures"][0]) == list(range(6))
    axes = set(re.findall(r"<text[^>]*>([^<]*)</text>", text))
    assert {"percentage points", "percent", "of 200"} <= axes
    assert (results.path / "tables" / "mme_hallucination.csv").is_file()


def test_what_several_runs_need(tmp_path):
    record(tmp_path / "one")
    run = Results.load(tmp_path / "one")
    with pytest.raises(ValueError, match="give out="):
        report.write_report([run, run])
    with pytest.raises(ValueError, match="is given twice"):
        report.write_report([run, run], out=tmp_path / "page.html")
    with pytest.raises(ValueError, match="no run"):
        report.write_report([])
    with pytest.raises(RunFolderError, match="is a folder: give the name of a file"):
        report.write_report(run, out=tmp_path)


def test_runs_of_one_name_are_told_apart(tmp_path):
    for place in ("a", "b"):
        record(tmp_path / place / "run")
    runs = [Results.load(tmp_path / place / "run") for place in ("a", "b")]
    text = report.write_report(runs, out=tmp_path / "page.html").read_text()
    assert "<summary>a/run</summary>" in text
    assert str(tmp_path) not in text


def test_the_command_compares_runs(tmp_path, monkeypatch):
    for name in ("one", "two"):
        record(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, ["report", "one", "two"])
    assert found.exit_code == 0, found.output
    assert "Page: comparison.html" in found.output
    assert (tmp_path / "comparison.html").is_file()
    found = CliRunner().invoke(app, ["report", "one", "--out", "other.html"])
    assert found.exit_code == 0, found.output
    assert (tmp_path / "other.html").is_file()
    assert not (tmp_path / "one" / "report.html").exists()
    found = CliRunner().invoke(app, ["report", "one"])
    assert (tmp_path / "one" / "report.html").is_file()


def test_facets_are_facts_with_a_few_values():
    items = [
        Item(
            str(n),
            "i",
            f"text {n % 3}",
            {"question": f"text {n % 3}", "kind": n % 2, "number": n, "same": "x"},
        )
        for n in range(90)
    ]
    assert facets(items) == {"kind": ["0", "1"]}
    assert facets([*items, Item("last", "i")]) == {"kind": ["0", "1", ""], "same": ["x", ""]}
