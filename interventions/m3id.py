r"""Multi-modal mutual-information decoding (M3ID).

Favero et al., "Multi-Modal Hallucination Control by Visual Information Grounding", CVPR 2024, arXiv 2403.14003.
There is no code by the authors.

With l the log-probs given the image and l' those of the prompt without it, at the t-th generated token

    l <- l + 1[max_v l < log(alpha)] (1 - g_t) / g_t (l - l'),   g_t = exp(-lambda t)

so the longer the answer, the more the image counts; a token of which the model is sure is left alone.

Which rows: the newest one, at every step; t counts from 1. The first token's weight is exp(lambda) - 1 =
0.02, so a yes or no of POPE hardly changes.

`variant="avisc"` is the reimplementation in https://github.com/sangminwoo/AvisC: no gate, and a plausibility mask
of `beta`. A third one in circulation has a constant weight: that is VCD's formula without an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..hooks.anatomy import Anatomy
from ..hooks.edits import Branch, Edit, Logits, without_image
from ..hooks.step import Step
from .contrast import check_strengths, keep_plausible
from .method import Method
from .vhr import TEXT_ONLY


@dataclass(frozen=True)
class M3ID(Method):
    """Add what the image tells about the next token, more with every token.

    Args:
        decay: lambda, how fast the text without the image takes over.
        alpha: the gate; tokens are changed where the largest probability is below it. 1 changes all.
        beta: of the plausibility mask, "avisc" only.
        variant: "paper" or "avisc".
    """

    decay: float = 0.02
    alpha: float = 0.3
    beta: float = 0.1
    variant: Literal["paper", "avisc"] = "paper"

    name = "m3id"
    paper = "Multi-Modal Hallucination Control by Visual Information Grounding"
    arxiv = "2403.14003"
    kind = "contrastive"
    cost = "a second stream without the image"
    models = ("llava",)

    def __post_init__(self) -> None:
        if self.variant not in ("paper", "avisc"):
            raise ValueError(f"variant must be 'paper' or 'avisc', got {self.variant!r}")
        check_strengths(beta=self.beta)
        if not self.decay >= 0:
            raise ValueError(f"decay is 0 or more, got {self.decay}")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha is a probability above 0, got {self.alpha}")

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        """A branch without the image, and the weighted difference."""
        if not self.decay and (self.variant == "paper" or not self.beta):
            return ()
        branch = Branch(TEXT_ONLY, without_image, every_step=True)
        return branch, Logits(self.fuse, (TEXT_ONLY,), needs_image=True)

    def fuse(self, logits: Tensor, step: Step) -> Tensor:
        """Log-probs (B, V), moved away from those without the image. Prompts without one stay as they are."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        given, without = logits.to(wide).log_softmax(-1), step.branch(TEXT_ONLY).to(wide).log_softmax(-1)
        weight = math.expm1(self.decay * (step.generated + 1))
        fused = given + weight * (given - without)
        if self.variant == "avisc":
            fused = keep_plausible(fused, given, self.beta)
        else:
            unsure = given.amax(-1, keepdim=True) < math.log(self.alpha)
            fused = torch.where(unsure, fused, given)
        fused = torch.where(step.session.has_image.to(logits.device)[:, None], fused, given)
        return fused.to(logits.dtype)
