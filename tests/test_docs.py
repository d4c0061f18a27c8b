"""The site builds without a warning, has a page for each recipe and a line for each public name, and its code runs."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import typer
import yaml

import regard
from tests import chromium, markdown_code

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
HEADINGS = [
    "The idea",
    "The equation",
    "What the paper reports",
    "What the release does differently",
    "What we measured",
    "When it hurts",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "WARNING" not in built.stdout + built.stderr
    return folder


def in_nav(entry: Any) -> Iterator[str]:
    """The pages of `nav`, in order."""
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from in_nav(part)


def test_each_recipe_has_its_page(site: Path) -> None:
    listed = re.search(r"^nav:\n(?:(?: .*|)\n)+", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert listed is not None
    nav = set(in_nav(yaml.safe_load(listed[0])["nav"]))
    index = (DOCS / "recipes" / "index.md").read_text()
    for recipe in regard.recipes("*"):
        page = f"recipes/{recipe.name}.md"
        assert (DOCS / page).is_file(), f"docs/{page} is missing"
        assert page in nav, f"mkdocs.yml's nav has no {page}"
        assert f"]({recipe.name}.md)" in index, f"docs/recipes/index.md has no {page}"
        found = re.findall(r"^## (.+)$", (DOCS / page).read_text(), re.M)
        assert found == (HEADINGS[:1] if recipe.name == "none" else HEADINGS), page
        assert recipe.arxiv in (DOCS / page).read_text()
        assert (site / page).with_suffix(".html").is_file()


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    entries = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode().splitlines()
    kinds = {name: kind for name, kind, *_ in map(str.split, entries)}
    for name in regard.__all__:
        thing = getattr(regard, name)
        kind = "class" if inspect.isclass(thing) else "function" if inspect.isroutine(thing) else None
        kind = kind or ("module" if inspect.ismodule(thing) else "data")
        assert kinds.get(f"regard.{name}") == f"py:{kind}", (
            f"regard.{name} is no {kind} in docs/reference/*.md: add it there"
        )


def test_every_equation_is_mathml(site: Path) -> None:
    blocks = 0
    for page in sorted((DOCS / "recipes").glob("*.md")):
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
        built = (site / "recipes" / page.name).with_suffix(".html").read_text()
        assert built.count('display="block"') == text.count("\n$$\n") / 2, page.name
        assert not re.search(r"arithmatex|\$\$|\\\(", built), page.name
        blocks += text.count("\n$$\n") // 2
    assert blocks >= 20


def test_an_equation_that_cannot_be_read_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    spec = importlib.util.spec_from_file_location("pages", DOCS / "extensions" / "pages.py")
    assert spec is not None
    assert spec.loader is not None
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    page = type("Page", (), {"file": type("File", (), {"src_uri": "x.md"})})
    line = '<p><span class="arithmatex">\\({}\\)</span></p>'
    for latex, problem in (
        (r"\frac{a}{b} \lt c", ""),
        (r"\nosuch a", "unknown"),
        ("a_b_c", "cannot be read"),
        (r"\frac{a", "brace"),
    ):
        caplog.clear()
        made = pages.on_page_content(line.format(latex), page)
        assert [record.levelname for record in caplog.records] == (["WARNING"] if problem else []), latex
        assert problem in caplog.text
        assert problem or made.startswith("<p><math")


def test_the_tutorial_prints_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = 0
    for block, shown, seen in markdown_code.runs((DOCS / "tutorial.md").read_text()):
        assert markdown_code.same(shown, seen), f"{block[0]}\nprints\n{seen}"
        blocks += 1
    assert blocks >= 9
    for picture in re.findall(r"\(pictures/(.+?)\)", (DOCS / "tutorial.md").read_text()):
        assert (tmp_path / picture).is_file(), f"no code on the page draws {picture}"


def python_blocks(page: Path) -> Iterator[ast.Module]:
    for found in re.finditer(r"^```python.*?\n(.*?)^```$", page.read_text(), re.M | re.S):
        yield ast.parse(dedent(found[1]), f"{page.name}: {found[1].splitlines()[0]}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_on_pages_calls_what_there_is(page: Path) -> None:
    """Names of regard exist, and so do the keywords that they are called with, those of recipes included."""
    recipes = {
        method.name: {field.name for field in fields(method)}
        for method in sys.modules[regard.recipe.__module__].METHODS
    }
    for tree in python_blocks(page):
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "regard":
                assert hasattr(regard, node.attr), ast.unparse(node)
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if not isinstance(call.func, ast.Attribute) or getattr(call.func.value, "id", "") != "regard":
                continue
            given = {keyword.arg: None for keyword in call.keywords if keyword.arg}
            function = getattr(regard, call.func.attr)
            inspect.signature(function).bind_partial(**given)
            names = [getattr(argument, "value", None) for argument in call.args]
            if function in (regard.apply, regard.wrap, regard.recipe):
                for name in (name for name in names if isinstance(name, str)):
                    unknown = set(given) - recipes.get(name, {"boost", "factor"}) - {"processor"}
                    assert not unknown, f"{ast.unparse(call)}: {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_on_pages_are_commands(page: Path) -> None:
    from regard.cli import app

    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"^\$ regard (.+)$", text, re.M):
        parse(typer.main.get_command(app), shlex.split(line, comments=True))


def parse(command: Any, words: list[str]) -> None:
    while hasattr(command, "commands"):
        assert words[0] in command.commands, words
        command, words = command.commands[words[0]], words[1:]
        if not words:
            return
    command.make_context(command.name, words)


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    """Links may lead out; scripts, styles, pictures, fonts and prefetches do not."""
    pages = sorted(site.rglob("*.html"))
    assert len(pages) >= len(regard.recipes("*")) + 25
    for page in pages:
        loads = re.findall(
            r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=\"?([^\s\">]+)", page.read_text()
        )
        assert loads
        assert [url for url in loads if "//" in url] == [], page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", style.read_text()), style.name


@pytest.mark.skipif(chromium.find() is None, reason=f"no browser is installed: {', '.join(chromium.NAMES)}")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pages_open_from_the_disk_and_search_finds(site: Path, dark: bool) -> None:
    pages = ["index", "tutorial", "reference/edits", "measured", "recipes/opera"]
    drawn = "[...document.querySelectorAll('math')].every(e => e.getBoundingClientRect().height > 5)"
    with chromium.Browser() as browser:
        browser.shape(375, 800, dark)
        for page in pages[-1:] if dark else pages:
            browser.open(site / f"{page}.html", ready="true")
            assert browser.run("document.documentElement.scrollWidth") <= 375, page
            assert browser.run(drawn), page
        assert browser.run("document.body.dataset.mdColorScheme") == ("slate" if dark else "default")
        browser.shape(1280, 900, dark)
        browser.run("document.querySelector('.md-search__input').focus()")
        browser.call("Input.insertText", text="over-trust")
        browser.wait("document.querySelectorAll('.md-search-result__item').length > 0")
        assert "opera" in browser.run("document.querySelector('.md-search-result__list').innerText")
        assert [
            url for url in browser.requests if not url.startswith(("file:", "data:", "about:", "blob:"))
        ] == []
        assert browser.errors == []
