"""Errors that users meet. Each says what was wrong, what was seen, and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RegardError(Exception):
    """Base of every error that regard raises on purpose."""


class UnknownName(RegardError, ValueError):
    """A recipe, benchmark or model name that nobody registered."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
        super().__init__(f"unknown {kind} {name!r}: {hint}")
        self.nearest = near


class CannotEdit(RegardError, RuntimeError):
    """The model, or the way it is run, leaves the engine nothing that it can edit."""


class NoImageTokens(RegardError, ValueError):
    """The prompt holds no image token, but an edit needs to know where the image is."""


class NoObjectWords(RegardError, ValueError):
    """None of the words that maps were asked for is in the text."""


class OutOfRange(RegardError, IndexError):
    """A layer or head that the model does not have."""
