"""What every method carries beside its symbols: where it was published, and what it costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..hooks.anatomy import Anatomy
from ..hooks.denoiser import Denoiser
from ..hooks.edits import Edit
from ..hooks.latent_edits import LatentEdit


@dataclass(frozen=True)
class Published:
    """Where a method was published, and what it costs; on the command line it is called `name`."""

    name: ClassVar[str]
    paper: ClassVar[str]
    arxiv: ClassVar[str]
    kind: ClassVar[str]
    cost: ClassVar[str]
    models: ClassVar[tuple[str, ...]]


@dataclass(frozen=True)
class Method(Published, ABC):
    """Base of the frozen dataclasses for language models. Subclasses fill the class variables and `edits`."""

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


@dataclass(frozen=True)
class LatentMethod(Published, ABC):
    """Base of the frozen dataclasses for diffusers pipelines."""

    @abstractmethod
    def edits(self, denoiser: Denoiser) -> Sequence[LatentEdit]:
        """The edits it asks for on this denoiser."""


@dataclass(frozen=True)
class ConceptMethod(LatentMethod):
    """Base of those that are told what the prompt is about."""

    concepts: Sequence[Any] = ()

    def __post_init__(self) -> None:
        if (
            isinstance(self.concepts, str)
            or not self.concepts
            or any(not concept for concept in self.concepts)
        ):
            raise ValueError(
                f"concepts is {self.concepts!r}: give at least one word of the prompt, as in concepts=['cat', 'dog']"
            )


def schedule(scale: float, until: float, step: int, steps: int) -> float:
    """Attend-and-Excite's step size, `scale * sqrt(r)` with r falling from 1 to 0.5; 0 after the share `until`."""
    if step >= round(until * steps):
        return 0.0
    share: float = (1 - 0.5 * step / max(1, steps - 1)) ** 0.5
    return scale * share
