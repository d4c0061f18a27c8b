"""The baseline: the engine attached, and nothing changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..hooks.anatomy import Anatomy
from ..hooks.edits import Edit
from .method import Method


@dataclass(frozen=True)
class Null(Method):
    """A null edit. Every figure of another recipe is paired with the figure of this one."""

    name = "none"
    paper = "the model as it is"
    arxiv = ""
    kind = "baseline"
    cost = "none"
    models = ("any",)

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        """No edit."""
        return ()
