"""The code blocks of a Markdown page, run in order as a reader would, and what they print.

A `python` block shares its names with those before it; a `text` block right behind it is what it prints. A `console`
block holds one command of regard and its output. `python -m tests.markdown_code PAGE` writes what is printed into it.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

PYTHON = re.compile(
    r"(?P<code>^```python\n(?P<python>.*?)^```\n)(?:\n```text\n(?P<shown>.*?)^```\n)?", re.M | re.S
)
CONSOLE = re.compile(r"^```console\n\$ (?P<command>regard .*?[^\\])\n(?P<shown>.*?)^```\n", re.M | re.S)
BLOCK = re.compile(f"{PYTHON.pattern}|{CONSOLE.pattern.replace('shown', 'answer')}", re.M | re.S)
WIDTH = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}


def runs(page: str) -> Iterator[tuple[re.Match[str], str, str]]:
    """Each block in turn: its place in the page, the output that is shown, and the output that is seen."""
    names: dict[str, Any] = {}
    for block in BLOCK.finditer(page):
        if block["python"] is not None:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(
                    compile(block["python"], f"line {page[: block.start()].count(chr(10)) + 2}", "exec"),
                    names,
                )
            yield block, block["shown"] or "", out.getvalue()
        else:
            from regard.cli import app

            found = CliRunner().invoke(
                app, shlex.split(block["command"])[1:], env=WIDTH, catch_exceptions=False
            )
            yield block, block["answer"], found.stdout


def same(shown: str, seen: str) -> bool:
    """Whether they agree but for white space, and for what `...` leaves out."""
    return doctest.OutputChecker().check_output(shown, seen, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)


def written(page: str) -> str:
    """The page with what its blocks print now, where that is not what stands there."""
    parts, end = [], 0
    for block, shown, seen in runs(page):
        parts.append(page[end : block.start()])
        end = block.end()
        seen = "".join(f"{line.rstrip()}\n" for line in seen.splitlines())
        if same(shown, seen):
            parts.append(block[0])
        elif block["python"] is not None:
            parts.append(block["code"] + (f"\n```text\n{seen}```\n" if seen else ""))
        else:
            parts.append(f"```console\n$ {block['command']}\n{seen}```\n")
    return "".join([*parts, page[end:]])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(written(Path(name).read_text()))
