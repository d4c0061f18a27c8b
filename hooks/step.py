"""What a `Logits` edit sees of one step."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .session import Session


class Step:
    """One forward, at its newest row. V is the vocabulary."""

    __slots__ = ("_branches", "session")

    def __init__(self, session: Session, branches: Mapping[str, Tensor]) -> None:
        self.session, self._branches = session, branches

    @property
    def generated(self) -> int:
        """Tokens generated before the one that these logits are for; 0 at the prompt."""
        return self.session.seen + self.session.rows - self.session.prompt

    def branch(self, name: str) -> Tensor:
        """Logits (B, V) of a branch, unedited."""
        return self._branches[name]
