"""What a `Logits` edit sees of one step."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .session import Session


class Step:
    """One forward, at its newest row. V is the vocabulary. `early` has the logits (B, V) of earlier layers."""

    __slots__ = ("_branches", "early", "session")

    def __init__(self, session: Session, branches: Mapping[str, Tensor], early: Mapping[int, Tensor]) -> None:
        self.session, self._branches, self.early = session, branches, early

    @property
    def generated(self) -> int:
        """Tokens generated before the one that these logits are for; 0 at the prompt."""
        return self.session.seen + self.session.rows - self.session.prompt

    def branch(self, name: str) -> Tensor:
        """Logits (B, V) of a branch, unedited."""
        return self._branches[name]
