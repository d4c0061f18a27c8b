r"""Pay attention to image (PAI).

Liu et al., "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs",
ECCV 2024, arXiv 2407.21771. Reference: https://github.com/LALBJ/PAI

In decoder layers from the third on, every head, before the softmax, on the keys j of image tokens:

    s_j <- s_j + alpha |s_j|
    l   <- gamma (l - l') + l',   kept where l >= log(beta) + max l

with l the log-probs, and l' those of the prompt without its image, which are never boosted.

Which rows: the last row of the prompt and every generated one.

A negative score shrinks to (1 - alpha) of itself and a positive one grows, so this is no factor on probs.
Defaults are those of the release's README. Its argument parser has gamma 2. With contrast on, the release
leaves the prompt's own forward unboosted, for a flag is flipped only afterwards: `variant="released"` does so too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..hooks.anatomy import Anatomy
from ..hooks.edits import Bias, Branch, Edit, Logits, without_image
from ..hooks.session import Call
from ..hooks.step import Step
from .contrast import check_strengths, keep_plausible
from .method import Method
from .vhr import TEXT_ONLY


@dataclass(frozen=True)
class PAI(Method):
    """Raise the scores of image tokens, and contrast with the prompt without its image.

    Args:
        alpha: how far a score is raised, as a share of its size.
        gamma: strength of the contrast; 1 leaves it out, and the second stream with it.
        beta: least probability of a token, as a share of the largest one; 0.1 as released.
        layers: decoder blocks from 0; None means from 2 on.
        variant: "paper", or "released", which does not boost the prompt's own forward when gamma is not 1.
    """

    alpha: float = 0.2
    gamma: float = 1.1
    beta: float = 0.1
    layers: tuple[int, ...] | None = None
    variant: Literal["paper", "released"] = "paper"

    name = "pai"
    paper = "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs"
    arxiv = "2407.21771"
    kind = "score bias, contrastive"
    cost = "a second stream without the image"
    models = ("llava",)

    def __post_init__(self) -> None:
        if self.variant not in ("paper", "released"):
            raise ValueError(f"variant must be 'paper' or 'released', got {self.variant!r}")
        check_strengths(self.alpha, self.beta)
        if not (self.gamma >= 0 and math.isfinite(self.gamma)):
            raise ValueError(f"gamma is a strength of 0 or more (1 is no contrast), got {self.gamma}")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))

    def chosen_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        """The blocks whose scores are raised; cross-attention blocks see nothing but the image."""
        if self.layers is not None:
            return self.layers
        return tuple(layer for layer in anatomy.self_layers if layer >= 2)

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        """A bias of the newest rows; and unless gamma is 1 a branch without the image with the contrast."""
        edits: list[Edit] = []
        if self.alpha:
            edits.append(Bias(self.chosen_layers(anatomy), self.boost, rows="last"))
        if self.gamma != 1:
            edits.append(Branch(TEXT_ONLY, without_image, every_step=True))
            edits.append(Logits(self.fuse, (TEXT_ONLY,), needs_image=True))
        return edits

    def boost(self, call: Call) -> Tensor | None:
        """alpha |s| on image keys, (B, H, Q, K)."""
        session = call.session
        at_prompt = session.seen + session.rows == session.prompt
        if self.variant == "released" and self.gamma != 1 and at_prompt:
            return None
        return self.alpha * call.scores().abs() * call.image[:, None, None, :]

    def fuse(self, logits: Tensor, step: Step) -> Tensor:
        """Log-probs (B, V), contrasted; prompts without an image stay as they are."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        given, without = logits.to(wide).log_softmax(-1), step.branch(TEXT_ONLY).to(wide).log_softmax(-1)
        fused = keep_plausible(self.gamma * (given - without) + without, given, self.beta)
        fused = torch.where(step.session.has_image.to(logits.device)[:, None], fused, given)
        return fused.to(logits.dtype)
