"""A board and its sections as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..evals.report.file import policy, script_text, template, write_page
from .board import Board, Section, picture_uri

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Page:
    """What `regard show` made.

    Attributes:
        title: the model and the prompt.
        facts: (name, value) of the run.
        board: picture, text and maps.
        others: (recipe, its text in pieces, a remark) of each recipe that was run besides.
        sections: figures.
        note: said above all, for models that prove nothing.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    board: Board
    others: Sequence[tuple[str, Sequence[object], str]]
    sections: Sequence[Section]
    note: str = ""

    def html(self) -> str:
        """The page; it asks nothing of the network."""
        script = (_HERE / "page.js").read_text(encoding="utf-8").strip()
        left, top, right, bottom = (100 * edge for edge in self.board.box)
        text: str = template("page.html.j2", _HERE).render(
            page=self,
            picture=picture_uri(self.board.picture),
            place=f"left:{left:.4g}%;top:{top:.4g}%;width:{right - left:.4g}%;height:{bottom - top:.4g}%",
            data=script_text(self.board.packed()),
            script=script,
            policy=policy([script]),
        )
        return text

    def write(self, out: str | Path) -> Path:
        """Write the page.

        Raises:
            RunFolderError: `out` is a folder or cannot be written.
        """
        return write_page(Path(out), self.html())
