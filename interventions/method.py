"""What every method carries beside its symbols: where it was published, and what it costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..hooks.anatomy import Anatomy
from ..hooks.edits import Edit


@dataclass(frozen=True)
class Method(ABC):
    """Base of the frozen dataclasses in this folder. Subclasses fill the class variables and `edits`."""

    name: ClassVar[str]
    paper: ClassVar[str]
    arxiv: ClassVar[str]
    kind: ClassVar[str]
    cost: ClassVar[str]
    models: ClassVar[tuple[str, ...]]

    @classmethod
    def for_model(cls, anatomy: Anatomy) -> Method:
        """The method with the paper's defaults for this model."""
        return cls()

    def with_processor(self, processor: Any) -> Method:
        """The method with what it needs of the model's processor (token ids, image statistics) filled in."""
        return self

    @abstractmethod
    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        """The edits it asks for on a model of this anatomy."""
