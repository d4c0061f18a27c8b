"""Attend-and-Excite: latents moved until every concept holds some place strongly."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..hooks.latent_edits import Guidance, LatentEdit, TextMaps
from .method import ConceptMethod, schedule
from .word_maps import Normalize, word_maps


@dataclass(frozen=True)
class AttendExcite(ConceptMethod):
    """Attend-and-Excite: raise the strongest attention of the most neglected concept (training-free).

    Before each of the first `alter` steps `z' = z - alpha_t * grad_z max_c (1 - max A_c)`, A being the smoothed maps
    at the resolution nearest to 16x16, alpha_t as in A-STAR. At the steps of `thresholds` the update repeats, up to
    20 times, until every concept's maximum is above the threshold.

    Reference: https://github.com/yuval-alaluf/Attend-and-Excite/tree/163efdf (MIT), and diffusers'
    `StableDiffusionAttendAndExcitePipeline`. The differences:

    - latents are scaled for the denoiser as the scheduler asks; the reference forgets it (wrong for Euler, LMS, Heun).
    - a batch runs at once; the reference goes image by image.
    - `variant="released"`: where a threshold is met, the reference updates once more before it stops.
    - a concept of several tokens has the mean of their maps; the reference takes one token.

    Args:
        concepts: words or phrases as they stand in the prompt, or tuples of token indices; or a list of lists, one
            a prompt.
        scale: factor of the gradient in latent units; 0 is the stock pipeline.
        alter: the number of altered steps, from the first (the paper's 25 are of 50).
        thresholds: step to the least maximum of a map.
        variant: "paper" or "released".
        normalize: see `word_maps`; "words" for SD 2.
        resolution: (h, w) of the maps.

    Raises:
        ValueError: no concept, or another variant.
    """

    name: ClassVar[str] = "attend_excite"
    paper: ClassVar[str] = "Attend-and-Excite: Attention-Based Semantic Guidance (SIGGRAPH 2023)"
    arxiv: ClassVar[str] = "2301.13826"
    kind: ClassVar[str] = "latent guidance"
    cost: ClassVar[str] = (
        "a forward and backward of the conditional rows a step for half of the steps, and up to 60 more"
    )
    models: ClassVar[tuple[str, ...]] = ("stable-diffusion",)

    concepts: Sequence[Any] = ()
    scale: float = 20.0
    alter: int = 25
    thresholds: Mapping[int, float] = field(default_factory=lambda: {0: 0.05, 10: 0.5, 20: 0.8})
    variant: Literal["paper", "released"] = "paper"
    normalize: Normalize = "ae"
    resolution: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("paper", "released"):
            raise ValueError(f"variant is {self.variant!r}: give 'paper' or 'released'")

    def edits(self, denoiser: Any) -> Sequence[LatentEdit]:
        """One guidance."""
        return (
            Guidance(
                concepts=tuple(self.concepts),
                loss=self.loss,
                step_size=self._step_size,
                resolution=self.resolution,
                refine={step: 1 - least for step, least in self.thresholds.items()} if self.scale else {},
                refine_size=functools.partial(schedule, self.scale, 1.0),
                overshoot=self.variant == "released",
            ),
        )

    def _step_size(self, step: int, steps: int) -> float:
        return schedule(self.scale, 1.0, step, steps) if step < self.alter else 0.0

    def loss(self, maps: TextMaps, kept: None) -> Tensor:
        """(B,) losses in [0, 1]."""
        each = word_maps(maps, self.normalize, smooth=True)
        return torch.stack([(1 - own.amax((-2, -1))).clamp_min(0).max() for own in each])
