"""The page: whole, self-contained, honest about what it shows."""

import base64
import hashlib
import html
import json
import re

import numpy as np
import pytest
from PIL import Image

from regard.evals import report
from regard.evals.report import plots
from regard.evals.report.tables import number, p_value, power_line, shown_p, verdict
from regard.evals.results import Results
from regard.evals.scores import Score
from tests.hand_run import IMAGES, parsed, record


@pytest.fixture
def results(tmp_path):
    record(tmp_path / "run")
    file = tmp_path / "picture.jpg"
    Image.fromarray(np.full((480, 640, 3), 128, np.uint8)).save(file)
    found = Results.load(tmp_path / "run")
    found.write(dict.fromkeys(IMAGES, file))
    return found


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
