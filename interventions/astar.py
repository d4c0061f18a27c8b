"""A-STAR: latents moved so that the concepts' attention maps part from each other and stay where they were."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..hooks.latent_edits import Guidance, LatentEdit, TextMaps
from .method import ConceptMethod, schedule
from .word_maps import Normalize, binarized, check_masks, fitted, word_maps


def segregation_loss(maps: Tensor) -> Tensor:
    """`L_seg = sum_{m > n} sum min(A_m, A_n) / sum (A_m + A_n)` of maps (C, h, w); equation 2.

    Each pair is in [0, 1/2].
    """
    pairs = [_shared(one, two) for one, two in combinations(maps, 2)]
    return torch.stack(pairs).sum() if pairs else maps.sum() * 0


def retention_loss(maps: Tensor, masks: Tensor) -> Tensor:
    """`L_ret = sum_m 1 - sum min(A_m, B_m) / sum (A_m + B_m)` of maps and masks (C, h, w); equation 3."""
    return sum((1 - _shared(one, mask) for one, mask in zip(maps, masks, strict=True)), maps.sum() * 0)


def _shared(one: Tensor, two: Tensor) -> Tensor:
    return torch.minimum(one, two).sum() / (one + two).sum().clamp_min(1e-12)


@dataclass(frozen=True)
class ASTAR(ConceptMethod):
    """A-STAR: segregate the concepts' cross-attention, and retain it from step to step (training-free).

    Before each denoising step `z' = z - alpha_t * grad_z (L_seg + L_ret)`, with the losses of equations 2 and 3 on the
    maps A (h, w) of the concepts and the masks B of the step before. No code was released. What the paper leaves
    open, and what is taken here:

    - the maps: mean over all heads and all cross-attention layers at the resolution nearest to 16x16, conditional
      rows only, as in Attend-and-Excite.
    - their normalisation, which L_ret depends on: Attend-and-Excite's ("ae"); "words", "minmax", "none".
    - the mask: min-max, then above `threshold` (or "otsu"); of the map as the step was denoised, without gradient.
    - alpha_t: `scale * sqrt(r)`, r falling from 1 to 0.5 over the steps, as in Attend-and-Excite.
    - a concept of several tokens has the mean of their maps.

    Args:
        concepts: words or phrases as they stand in the prompt, or tuples of token indices; or a list of lists, one
            a prompt.
        scale: factor of the gradient in latent units; 0 is the stock pipeline.
        until: share of the steps that are altered.
        segregation: weight of the loss by which maps overlap.
        retention: weight of the loss by which a map leaves what it covered.
        threshold: of the mask, in (0, 1), or "otsu".
        normalize: see `word_maps`.
        smooth: see `word_maps`.
        masks: layout control: (C, H, W), one mask a concept in place of B, at any size of the image's shape.
        resolution: (h, w) of the maps.

    Raises:
        ValueError: no concept, an option out of range, masks that do not fit.
    """

    name: ClassVar[str] = "astar"
    paper: ClassVar[str] = "A-STAR: Test-time Attention Segregation and Retention (ICCV 2023)"
    arxiv: ClassVar[str] = "2306.14544"
    kind: ClassVar[str] = "latent guidance"
    cost: ClassVar[str] = "a forward and backward of the conditional rows a step"
    models: ClassVar[tuple[str, ...]] = ("stable-diffusion",)

    concepts: Sequence[Any] = ()
    scale: float = 20.0
    until: float = 1.0
    segregation: float = 1.0
    retention: float = 1.0
    threshold: float | Literal["otsu"] = 0.5
    normalize: Normalize = "ae"
    smooth: bool = False
    masks: Any = field(default=None, compare=False)
    resolution: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold != "otsu" and not 0 < self.threshold < 1:
            raise ValueError(f"threshold is {self.threshold!r}: give a number between 0 and 1, or 'otsu'")
        if self.masks is not None:
            object.__setattr__(self, "masks", check_masks(self.masks, len(self.concepts)))

    def edits(self, denoiser: Any) -> Sequence[LatentEdit]:
        """One guidance."""
        return (
            Guidance(
                concepts=tuple(self.concepts),
                loss=self.loss,
                step_size=functools.partial(schedule, self.scale, self.until),
                resolution=self.resolution,
                remember=None if self.masks is not None or not self.retention else self.mask,
            ),
        )

    def mask(self, maps: TextMaps) -> list[Tensor]:
        """B: where each concept is, for the next step."""
        return [binarized(each, self.threshold) for each in word_maps(maps, self.normalize, self.smooth)]

    def loss(self, maps: TextMaps, kept: list[Tensor] | None) -> Tensor:
        """(B,) losses: equation 4; without masks, at the first step, segregation alone."""
        each = word_maps(maps, self.normalize, self.smooth)
        if self.masks is not None:
            layout = fitted(self.masks, (maps.probs.shape[1], maps.probs.shape[2])).to(maps.probs)
            kept = [layout] * len(each)
        losses = [self.segregation * segregation_loss(own) for own in each]
        if kept is not None and self.retention:
            pairs = zip(losses, each, kept, strict=True)
            losses = [loss + self.retention * retention_loss(own, mask) for loss, own, mask in pairs]
        return torch.stack(losses)
