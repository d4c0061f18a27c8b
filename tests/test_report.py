"""The page: whole, self-contained, honest about what it shows."""

import base64
import csv
import hashlib
import html
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from regard.cli import app
from regard.evals import plots, report, report_items
from regard.evals.benchmark import Item
from regard.evals.pope import Question
from regard.evals.report_items import PageItems, facets
from regard.evals.report_pictures import keep_pictures, kept_file, side
from regard.evals.report_tables import markdown_table
from regard.evals.results import Results
from regard.evals.run_folder import RunFolder, RunFolderError
from regard.evals.scores import Score
from regard.evals.tables import number, p_value, power_line, shown_p, verdict

IMAGES = [f"{number:012d}.jpg" for number in range(8)]


def record(run, source="somewhere", recipes=("none", "vhr"), done=8):
    """A run written by hand: the second recipe says less of what is not there, and less altogether."""
    config = {
        "benchmarks": ["pope", "chair"],
        "source": source,
        "items": 8,
        "seed": 0,
        "model_name": "some/model",
        "model": {
            "class": "Llava",
            "processor": "P",
            "dtype": "float16",
            "parameters": 7_000_000,
            "sha256_of_samples": "0",
        },
        "data": {name: {"images": 8, "images_sha256": "0" * 64} for name in ("pope", "chair")},
        "prompts": {"pope": "USER: <image> {question}", "chair": "USER: <image> describe"},
        "generation": {
            name: {"max_new_tokens": 512, "do_sample": False, "num_beams": 1} for name in ("pope", "chair")
        },
        "recipes": {
            recipe: [] if recipe == "none" else [{"class": "VHR", "alpha": 2.0}] for recipe in recipes
        },
        "scoring": {"parser": "official", "words": "regard", "drop_unfinished": False},
        "versions": {"regard": "0", "torch": "0", "transformers": "0"},
        "sessions": [
            {"started": "now", "command": "regard bench", "batch_size": 1, "device": "cpu", "python": "3"}
        ],
    }
    folder = RunFolder.create(run, config)
    questions = [
        Question(n, image, "Is there a dog in the image?", "yes" if n % 2 else "no", "random")
        for n, image in enumerate(IMAGES)
    ]
    folder.write_json("data/pope.json", {"random": [asdict(q) for q in questions]})
    folder.write_json("data/chair.json", {image: ["dog", "bench"] for image in IMAGES})
    for recipe in recipes:
        common = {"recipe": recipe, "prompt": "p", "tokens": 9, "cut": False, "seconds": 0.5}
        kept = IMAGES if recipe == "none" else IMAGES[:done]
        answers = []
        for q in questions:
            answer = "Yes" if recipe == "none" else q.label.title()
            answer = "no <script>alert(1)</script>" if recipe != "none" and q.question_id == 1 else answer
            asked = {"image": q.image, "label": q.label, "split": "random", "question": q.text}
            answers.append({"id": f"random/{q.question_id}", **asked, "answer": answer, **common})
        folder.append("pope", recipe, answers)
        text = "A dog, a cat & a bench." if recipe == "none" else "A dog <b>."
        folder.append(
            "chair", recipe, [{"id": image, "image": image, "answer": text, **common} for image in kept]
        )
    folder.close()
    return folder


@pytest.fixture
def results(tmp_path):
    record(tmp_path / "run")
    file = tmp_path / "picture.jpg"
    Image.fromarray(np.full((480, 640, 3), 128, np.uint8)).save(file)
    found = Results.load(tmp_path / "run")
    found.write(dict.fromkeys(IMAGES, file))
    return found


class Balance(HTMLParser):
    """Checks that every element is closed, and collects what the page would fetch."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "path", "use"})

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.ids, self.classes = [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset"):
                self.fetched.append(value)
            if name == "id":
                self.ids.append(value)
            if name == "class":
                self.classes.append(value)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def parsed(text):
    page = Balance()
    page.feed(text)
    assert page.open == []
    return page


def test_the_page_is_whole_and_fetches_nothing(results):
    text = results.page.read_text()
    page = parsed(text)
    assert all(link.startswith(("data:image/", "#")) for link in page.fetched)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"url\((?!#)|@import|<link", text)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert text.count("<svg") == 5
    assert len(text) < 400_000
    assert len(re.findall("data:image/jpeg;base64", text)) == 1  # eight equal pictures, once
    kept = Image.open(results.path / "data" / "images" / IMAGES[0])
    assert max(kept.size) == 256


def test_the_policy_lets_only_the_page_s_own_script_run(results):
    text = results.page.read_text()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src &#39;none&#39;; img-src data:;")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"sha256-{html.escape(digest)}" in policy


def test_captions_are_marked(results):
    text = results.page.read_text()
    assert '<mark class="wrong" title="cat: not in the image">cat</mark>' in text
    assert '<mark class="right" title="dog: in the image">dog</mark>' in text
    assert "A dog" not in text.split("Items</h2>")[0]


def test_text_of_the_model_is_escaped(results):
    text = results.page.read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&lt;b&gt;" in text
    assert "\\u003cscript>alert(1)\\u003c/script>" in text
    assert "<script>alert" not in text
    assert len(re.findall("<script", text)) == len(re.findall("</script>", text))
    assert "cat</mark> &amp; a" in text


def test_headline_and_setup(results):
    text = " ".join(report.headline(results))
    assert "8 POPE questions on 8 images and 8 CHAIR captions on 8 images, without and with vhr" in text
    assert "CHAIR_S is 100.0 without, where less is better; 0.0 with vhr (−100.0, better)" in text
    page = results.page.read_text()
    for part in ("regard bench", "USER: &lt;image&gt; describe", "VHR, alpha=2.0", "seed 0", "float16"):
        assert part in page
    assert "prove nothing" not in page


def test_the_miniature_is_named_for_what_it_is(tmp_path):
    record(tmp_path / "run", source="miniature")
    results = Results.load(tmp_path / "run")
    results.write()
    assert "they prove nothing about a 7B model" in results.page.read_text()
    assert "they prove nothing about a 7B model" in results.table().replace("\n", " ")


def test_a_stopped_run_says_so(tmp_path):
    record(tmp_path / "run", done=5)
    results = Results.load(tmp_path / "run")
    results.write()
    assert "Not finished: chair vhr, 5 of 8 items" in results.page.read_text()
    assert list(results.metrics["chair"]) == ["none"]
    parsed(results.page.read_text())


def test_the_baseline_alone_makes_a_page(tmp_path):
    record(tmp_path / "run", recipes=("none",))
    results = Results.load(tmp_path / "run")
    results.write()
    parsed(results.page.read_text())
    assert "without any recipe" in results.page.read_text()


def test_the_same_run_makes_the_same_page(results):
    before = results.page.read_bytes()
    Results.load(results.path).write()
    assert results.page.read_bytes() == before


def test_notebook(results):
    html = results._repr_html_()
    parsed(html)
    assert "CHAIR_S" in html
    assert repr(results) == results.table()
    assert max(map(len, results.table(full=True).splitlines())) <= 100
    assert "precision, random" in results.table(full=True)


def test_to_dict_is_json(results):
    found = json.loads(json.dumps(results.to_dict()))
    score = found["metrics"]["chair"]["vhr"]["scores"]["chair_s"]
    assert score["value"] == 0
    assert score["difference"]["value"] == -1
    assert score["difference"]["p"] == 2 / 2**8
    test = found["metrics"]["chair"]["vhr"]["mcnemar"]
    assert (test["gained"], test["lost"], test["p"]) == (8, 0, 2 / 2**8)


def blocks(text):
    """The data of a page by the ids of their elements."""
    found = re.findall(r'<script type="application/json" id="([^"]*)">(.*?)</script>', text, re.DOTALL)
    return {name: json.loads(part) for name, part in found}


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


def test_p_is_holm_s_where_there_is_one():
    share = Score("a", "a", None)
    change = {"value": 0.1, "low": 0.05, "high": 0.2, "p": 0.03}
    assert verdict({"difference": change}, share) == "better"
    assert verdict({"difference": {**change, "p_holm": 0.06}}, share) == ""
    assert verdict({"difference": {**change, "p_holm": None}}, share) == "better"
    assert shown_p({**change, "p_holm": 0.06}) == 0.06


def test_power_is_told(results):
    recipes = {"none": {"images": 500, "scores": {"chair_i": {}}}}
    score = next(score for score in results.scores("chair") if score.key == "chair_i")
    assert power_line("chair", recipes, score) == ""
    power = {"images": 2500, "items": 2500, "detectable": 0.0224}
    recipes["vhr"] = {"images": 500, "scores": {"chair_i": {"difference": {"power": power}}}}
    assert power_line("chair", recipes, score) == (
        "To see a change of 1 point in CHAIR_I with 80 % power, about 2\u202f500 (vhr) images would be needed "
        "(this run: 500, enough for a change of 2.2 (vhr) points)."
    )


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


def test_numbers():
    share, words = Score("a", "a", None), Score("b", "b", None, better=-1, percent=False)
    assert number(0.12345, share) == "12.3"
    assert number(-0.0004, share, sign=True) == "0.0"
    assert number(-0.02, share, sign=True) == "−2.0"
    assert number(88.8, words) == "88.8"
    assert number(None, share) == "–"
    assert p_value(0.0004) == "<0.001"
    sure = {"difference": {"value": 0.1, "low": 0.05, "high": 0.2, "p": 0.01}}
    assert verdict(sure, share) == "better"
    assert verdict(sure, words) == "worse"
    assert verdict({"difference": {**sure["difference"], "p": 0.2}}, share) == ""
    assert verdict({"difference": {**sure["difference"], "low": -0.1}}, share) == ""


def test_plots_use_the_colours_of_the_page():
    dots = [plots.Dot(series, 1.0, 0.5, 2.0) for series in range(9)]
    text = plots.intervals("a & b", [("row", dots)], "points", zero=True, name="one")
    assert 'aria-label="a &amp; b"' in text
    assert not re.search(r"#[0-9a-f]{6}\b(?!\")", re.sub(r"url\([^)]*\)|href=\"[^\"]*\"", "", text))
    assert "var(--r7)" in text


def test_no_two_recipes_look_alike():
    assert len({plots.style(place) for place in range(64)}) == 64


def test_a_recipe_without_one_of_two_scores_is_not_drawn():
    across, up = ([plots.Dot(n, 1.0, 0.5, 2.0) for n in series] for series in ([0, 1, 3], [0, 2, 3]))
    assert [pair[0].series for pair in plots.joined(across, up)] == [0, 3]
    text = plots.against("t", [("", plots.joined(across, up))], ("words", "percent"), name="two")
    assert "words" in text
    assert "var(--r3)" in text
    assert "var(--r1)" not in text
