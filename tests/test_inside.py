"""`regard show`: what the page holds is what was read, and a browser shows it."""

import base64
import json
import re

import chromium
import numpy as np
import pytest
import torch
from PIL import Image

import regard
from regard.evals.generation import make_inputs, make_prompt
from regard.evals.miniature.scenes import make_scene
from regard.inside.board import Board, Overlay, Piece
from regard.interventions import sinks
from regard.interventions.spoken import by_word, words_of


@pytest.fixture(scope="module")
def miniature():
    return regard.load_miniature("lvlm")


@pytest.fixture(scope="module")
def page(miniature):
    scene = make_scene(4, split="test")
    model, processor = miniature
    return regard.show(
        model, processor, scene.image, objects=scene.categories, max_new_tokens=64, importance=False
    )


@pytest.fixture(scope="module")
def drawn():
    pipe = regard.load_miniature("t2i")
    pipe.set_progress_bar_config(disable=True)
    return regard.show_drawn(pipe, "a dog and an apple", words=["apple", "dog"], steps=2)


def unpacked(page, place=0):
    """The maps (W, S, h, w) of an overlay as the page's script reads them."""
    text = re.search(r'<script type="application/json" id="maps">(.*?)</script>', page.html(), re.DOTALL)
    overlay = json.loads(text.group(1))["overlays"][place]
    levels = np.frombuffer(base64.b64decode(overlay["levels"]), np.uint8)
    peak = torch.tensor(overlay["peak"])
    return overlay, torch.tensor(levels / 255.0).view(*peak.shape, *overlay["grid"]) * peak[..., None, None]


def test_the_page_holds_the_attention_of_each_word(page, miniature):
    model, processor = miniature
    scene = make_scene(4, split="test")
    inputs = make_inputs(
        model,
        processor,
        [make_prompt(processor, "Please describe this image in detail.")],
        [scene.image],
    )
    want = regard.attention(model, inputs, 64)
    text, words = words_of(want.tokens, processor)
    assert "".join(piece.text for piece in page.board.pieces) == text
    overlay, maps = unpacked(page)
    expected = by_word(want.maps[0], words)
    close = {"atol": float(expected.max()) / 250, "rtol": 0.0}
    torch.testing.assert_close(maps[:, 1:].float(), expected, **close)
    torch.testing.assert_close(maps[:, 0].float(), expected.mean(1), **close)
    shares = torch.tensor(overlay["total"])
    torch.testing.assert_close(shares[:, 1:], expected.sum((2, 3)), atol=1e-4, rtol=1e-3)
    edited, with_var = unpacked(page, 1)
    assert edited["name"] == "attention with var"
    assert (with_var - maps).abs().max() > 0.01
    flow, maps = unpacked(page, 2)
    assert flow["slices"] == ["all layers"]
    assert len(maps) == len(words)


def test_objects_that_are_not_there_are_marked(page):
    marked = [piece.text for piece in page.board.pieces if piece.wrong]
    named = {piece.text for piece in page.board.pieces}
    assert marked == ["kite"]
    assert "dog" in named
    label, pieces, _ = page.others[0]
    assert label == "var"
    assert any(piece.wrong and piece.text == "kite" for piece in pieces)


def test_every_section_has_its_figures(page):
    figures = {section.title: len(section.drawings) for section in page.sections}
    assert figures == {
        "Which heads look at the image": 2,
        "Where the attention goes": 1,
        "Visual attention sinks": 1,
        "Attention flow": 4,
        "Outliers of the vision tower": 1,
        "Heads of the vision tower": 2,
    }
    assert not any(section.missing for section in page.sections)


def test_what_is_undefined_on_a_model_says_so(monkeypatch, miniature):
    """A part or a recipe that is not for a model leaves its place empty, with the reason, and the rest stands."""
    model, processor = miniature
    monkeypatch.setattr(model.config, "model_type", "other")  # damro knows it not
    monkeypatch.setattr(sinks, "_TABLE", {})  # and VAR not, so that sinks are looked for
    page = regard.show(
        model, processor, make_scene(4).image, recipes="dyvte,vhr", max_new_tokens=3, importance=False
    )
    missing = {section.title: section.missing for section in page.sections if section.missing}
    assert list(missing) == ["Outliers of the vision tower"]
    assert "damro is defined where" in page.html()
    remarks = {label: remark for label, _, remark in page.others}
    assert "lets tokens leave" in remarks["dyvte"]
    assert remarks["vhr"] == ""
    assert [overlay.name for overlay in page.board.overlays][:2] == ["attention", "attention with vhr"]


def test_refusals(miniature, drawn):
    model, processor = miniature
    with pytest.raises(regard.UnknownName, match=r"unknown object 'dgo'.*'dog'"):
        regard.show(model, processor, make_scene(4).image, objects=["dgo"])
    with pytest.raises(regard.NoObjectWords, match="no word to map"):
        regard.show_drawn(None, "a the")


def test_words_of_a_prompt_over_its_picture(drawn):
    assert [(piece.text, piece.row) for piece in drawn.board.pieces] == [
        ("a ", None),
        ("dog", 1),
        (" and an ", None),
        ("apple", 0),
        ("", None),
    ]
    overlay, maps = unpacked(drawn)
    assert overlay["slices"] == ["mean of the steps", "step 0", "step 1"]
    torch.testing.assert_close(maps[:, 0], maps[:, 1:].mean(1), atol=float(maps.max()) / 200, rtol=0)
    assert (maps[0] - maps[1]).abs().max() > 1e-3
    assert [len(section.drawings) for section in drawn.sections] == [1, 1]
    assert "no cell is clearly of apple, dog" in drawn.sections[1].text  # two steps draw neither


def test_text_cannot_break_out_of_the_page():
    hostile = "</script><script>alert(1)</script>"
    from regard.inside.page import Page

    maps = torch.rand(1, 1, 2, 2)
    board = Board(Image.new("RGB", (8, 4)), [Piece(hostile, 0)], [Overlay(hostile, maps, ("all",), "x")])
    html = Page(hostile, [("prompt", hostile)], board, [("var", [Piece(hostile)], hostile)], []).html()
    assert hostile not in html
    assert html.count("<script") == 2


@pytest.mark.skipif(chromium.find() is None, reason="no Chromium on this machine")
class TestBrowser:
    """The page in a headless browser."""

    ready = "document.querySelector('#board[data-ready]') !== null"

    def colours(self, browser):
        return browser.run(
            "(() => { const c = document.getElementById('heat'); return [...c.getContext('2d')"
            ".getImageData(0, 0, c.width, c.height).data]; })()"
        )

    def test_pointing_at_a_word_shows_where_it_looked(self, page, tmp_path):
        from matplotlib import colormaps

        file = page.write(tmp_path / "show.html")
        _, maps = unpacked(page)
        with chromium.Browser() as browser:
            browser.open(file, ready=self.ready)
            assert browser.run("getComputedStyle(document.getElementById('heat')).opacity") == "0"
            where = browser.run(
                "(() => { const box = document.querySelectorAll('.word')[7].getBoundingClientRect();"
                "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
            )
            browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=where[0], y=where[1])
            browser.wait("document.querySelector('.stage').classList.contains('lit')")
            shown = np.array(self.colours(browser)).reshape(8, 8, 4)[..., :3]
            levels = (maps[7, 0] / maps[7, 0].max() * 255).round().int().numpy()
            assert np.abs(shown - colormaps["viridis"](levels)[..., :3] * 255).max() <= 1
            assert "of the attention is on the picture" in browser.run(
                "document.getElementById('line').textContent"
            )
            browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
            browser.wait("!document.querySelector('.stage').classList.contains('lit')")
            assert browser.errors == []
            assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []

    def test_keys_layers_and_recipes(self, page, tmp_path):
        file = page.write(tmp_path / "show.html")
        with chromium.Browser() as browser:
            browser.open(file, ready=self.ready)
            browser.run("document.querySelector('.word').focus()")
            browser.press("ArrowRight", "ArrowRight", "Enter")
            assert browser.run("document.getElementById('heat').dataset.row") == "2"
            assert browser.run("document.querySelector('.word[aria-pressed=true]').dataset.row") == "2"
            mean = self.colours(browser)
            browser.run(
                "(() => { const s = document.getElementById('slice'); s.value = 3;"
                "s.dispatchEvent(new Event('input')); })()"
            )
            assert browser.run("document.getElementById('slicename').textContent") == "layer 2"
            layer = self.colours(browser)
            browser.run("document.querySelectorAll('#overlays input')[1].click()")
            edited = self.colours(browser)
            assert mean != layer != edited
            browser.run("document.querySelectorAll('#overlays input')[2].click()")
            assert browser.run("document.getElementById('slice').disabled")
            browser.press("Escape")
            assert browser.run("document.querySelector('.word[aria-pressed=true]')") is None
            wrong = browser.run("getComputedStyle(document.querySelector('.word.wrong')).textDecorationLine")
            assert wrong == "underline"
