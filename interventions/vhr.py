r"""Vision-aware head divergence (VHD) and reinforcement (VHR).

He et al., "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", ACL 2025,
arXiv 2412.13949. Reference: https://github.com/jinghan1he/VHR/tree/f0db54a7eae62b4b8d1d585636a446ed40799512

With A_{l,i} the output of head i in layer l at the last prompt row, before the output projection,

    VHD_{l,i} = d( A_{l,i}(with image), A_{l,i}(image tokens removed) )
    heads reinforced in layer l:  VHD_{l,i} > median_i VHD_{l,i},  A <- alpha * A  for all their rows

Layer by layer: the stream with the image is already reinforced below l, the stream without is never.
The heads chosen at the prompt stay fixed while tokens are generated.

Which rows: every row of the prefill, the last prompt row included, and every decode row.

Where this differs from the paper's text: d is the squared Euclidean distance, as released (the
median does not care, the outlier rule does). `variant="released"` also keeps the release's guard, which
filters outliers only where the standard deviation of VHD exceeds 1. A head that the image moves by no
more than rounding error (its window does not reach the image, say) has VHD 0 and is never chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..hooks.anatomy import Anatomy
from ..hooks.edits import Branch, Edit, HeadGain, without_image
from ..hooks.session import Call
from .method import Method

TEXT_ONLY = "without image"


def head_divergence(with_image: Tensor, without: Tensor) -> Tensor:
    """Squared Euclidean distance of head outputs (..., H, D) -> (..., H), in fp32 or wider.

    A distance within rounding error of the outputs' dtype counts as zero.
    """
    wide = torch.promote_types(with_image.dtype, torch.float32)
    distance = (with_image.to(wide) - without.to(wide)).square().sum(-1)
    relative = max(2 * torch.finfo(with_image.dtype).eps, 16 * torch.finfo(torch.float32).eps)
    return torch.where(distance > relative**2 * without.to(wide).square().sum(-1), distance, 0.0)


def drop_outliers(divergence: Tensor, without: Tensor, guard: float | None) -> Tensor:
    """Set to zero the heads that diverge a lot and are strong without the image too (Eq. 6).

    Args:
        divergence: VHD, (B, H).
        without: head outputs of the stream without the image, (B, H, D).
        guard: filter a sample only where the unbiased std of VHD is above this; None filters always.
    """
    strength = without.to(divergence.dtype).square().sum(-1)
    outlier = _above_spread(divergence) & _above_spread(strength)
    if guard is not None:
        outlier = outlier & (divergence.std(-1, keepdim=True) > guard)
    return divergence.masked_fill(outlier, 0.0)


def _above_spread(values: Tensor) -> Tensor:
    return values > values.mean(-1, keepdim=True) + values.std(-1, keepdim=True)


def sensitive_heads(divergence: Tensor) -> Tensor:
    """Heads above the lower median of their layer: (B, H) -> (B, H) bool, half of them without ties."""
    return divergence > divergence.median(-1, keepdim=True).values


@dataclass(frozen=True)
class VHR(Method):
    """Reinforce the heads whose output depends on the image.

    Args:
        alpha: factor of the chosen heads' outputs.
        layers: decoder blocks from 0; None takes the paper's: the second and the last 14 of 32, that is
            block 1 and the last 7/16 of any depth (InstructBLIP: the last 9/16, without block 1).
        outlier_filter: leave out heads that are strong without the image as well.
        variant: "paper", or "released" with its `std > 1` guard on the outlier filter.
    """

    alpha: float = 2.0
    layers: tuple[int, ...] | None = None
    outlier_filter: bool = True
    variant: Literal["paper", "released"] = "paper"

    name = "vhr"
    paper = "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence"
    arxiv = "2412.13949"
    kind = "head gain"
    cost = "one prefill without the image"
    models = ("llava", "llava_next", "instructblip")

    def __post_init__(self) -> None:
        if self.variant not in ("paper", "released"):
            raise ValueError(f"variant must be 'paper' or 'released', got {self.variant!r}")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))

    def chosen_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        """The blocks L_r; cross-attention blocks are left out, for the stream without image skips them."""
        if self.layers is not None:
            return tuple(sorted(set(self.layers)))
        instructblip = anatomy.model_type in ("instructblip", "instructblipvideo")
        last = max(1, round(anatomy.layers * (18 if instructblip else 14) / 32))
        chosen = set(range(anatomy.layers - last, anatomy.layers)) | (set() if instructblip else {1})
        return tuple(layer for layer in sorted(chosen) if layer in anatomy.self_layers)

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        """A text-only branch at the prompt, and a head gain that is decided there."""
        layers = self.chosen_layers(anatomy)
        return Branch(TEXT_ONLY, without_image, layers), HeadGain(layers, self.gain)

    def gain(self, call: Call) -> Tensor:
        """Factors (B, H): alpha for the chosen heads, 1 for the others and for samples without an image."""
        without = call.branch(TEXT_ONLY)
        divergence = head_divergence(call.newest_output(), without)
        if self.outlier_filter:
            divergence = drop_outliers(divergence, without, 1.0 if self.variant == "released" else None)
        chosen = sensitive_heads(divergence) & call.has_image[:, None]
        return torch.where(chosen, self.alpha, 1.0)
