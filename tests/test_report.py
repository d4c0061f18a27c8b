"""The page: whole, self-contained, honest about what it shows."""

import re
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from regard.evals import plots, report
from regard.evals.pope import Question
from regard.evals.results import Results
from regard.evals.run_folder import RunFolder
from regard.evals.scores import Score
from regard.evals.tables import number, p_value, verdict

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
        "data": {"chair": {"images": 8, "images_sha256": "0" * 64}},
        "prompts": {"chair": "USER: <image> describe"},
        "generation": {"chair": {"max_new_tokens": 512, "do_sample": False, "num_beams": 1}},
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
    assert not re.search(r"url\((?!#)|@import|<script|<link", text)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert text.count("<svg") == 4
    assert len(text) < 400_000
    pictures = [link for link in page.fetched if link.startswith("data:")]
    assert len(pictures) >= 5
    kept = Image.open(results.path / "data" / "images" / IMAGES[0])
    assert max(kept.size) == 360


def test_captions_are_marked(results):
    text = results.page.read_text()
    assert '<mark class="wrong" title="cat: not in the image">cat</mark>' in text
    assert '<mark class="right" title="dog: in the image">dog</mark>' in text
    assert "A dog" not in text.split("Captions side by side")[0]
    assert "8 of 8 images" in text


def test_text_of_the_model_is_escaped(results):
    text = results.page.read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&lt;b&gt;" in text
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
    import json

    found = json.loads(json.dumps(results.to_dict()))
    score = found["metrics"]["chair"]["vhr"]["scores"]["chair_s"]
    assert score["value"] == 0
    assert score["difference"]["value"] == -1
    assert score["difference"]["p"] == 2 / 2**8
    assert found["metrics"]["chair"]["vhr"]["mcnemar"] == {"gained": 8, "lost": 0, "p": 2 / 2**8}


def test_examples_favour_no_recipe(results):
    found = report.caption_examples(results)
    assert [row["image"] for row in found["rows"]] == IMAGES[: report.EXAMPLES]
    answers = report.pope_disagreements(results)
    assert answers["total"] == 8
    assert len({row["image"] for row in answers["rows"]}) == len(answers["rows"])


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
