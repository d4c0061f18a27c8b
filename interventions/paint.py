r"""PAINT: raise the newest token's scores at two sets of image tokens.

Arif et al., "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model"
(PAINT in its third version), arXiv 2501.12206. Reference: https://github.com/hasanar1f/PAINT (HEAD 2a9e8f8).

The vision tower's CLS token chooses, with p its probs summed over heads:

    T: the top quarter of the patches by p in the tower's first layer (local tokens), without B
    B: patches whose p in its second-to-last layer is above Q3 + 1.5 (Q3 - Q1) (summary tokens)
    z <- z + alpha |z| on T,  z <- z + beta |z| on B     (scores before the softmax)

in decoder layers [2, L), all heads. Which rows: the last row of the prompt and every generated one.

A negative score is made smaller in size, so this does not scale probs by a factor. Beyond the paper's
strengths text degenerates: by its own tables captions grow from 97 to 180 words at alpha 0.7, and break at 0.8.

Points of the release: `variant="released"` is its command line's beta of 0.3, the paper's best is 0.4. The
first version's "head-specific modulation" is in no commit: `heads` is all unless some are named. The third
("spatial") stream sums softmax rows over their keys, which is 1 for every token, and its shipped share is 0: it
is left out. The release takes the sets of image 0 for a whole batch, and percentiles in half precision; here
every image has its own, in fp32. LLaVA-NeXT is not in the paper: the whole-image crop is boosted, tiles are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..hooks import tower
from ..hooks.anatomy import Anatomy
from ..hooks.edits import Bias, Edit, Tower
from ..hooks.errors import CannotEdit
from ..hooks.session import Call
from .method import Method

FIRST, SECOND_TO_LAST = 0, -2  # layers of the vision tower


def _summed(scores: Tensor) -> Tensor:
    """CLS scores (N, H, 1 + P) -> probs of the patches, summed over heads, (N, P)."""
    return scores.softmax(-1)[:, :, 1:].sum(1)


def local_tokens(scores: Tensor, share: float) -> Tensor:
    """The patches that CLS attends to most: scores (N, H, 1 + P) -> (N, P) bool, int(P * share) of each image."""
    seen = _summed(scores)
    chosen = seen.topk(int(seen.shape[1] * share), -1).indices
    return torch.zeros_like(seen, dtype=torch.bool).scatter(1, chosen, True)


def summary_tokens(scores: Tensor) -> Tensor:
    """The patches whose attention from CLS is an outlier by the quartile rule: (N, H, 1 + P) -> (N, P) bool."""
    seen = _summed(scores)
    low, high = torch.quantile(seen, torch.tensor([0.25, 0.75], dtype=seen.dtype, device=seen.device), dim=1)
    return seen > (high + 1.5 * (high - low))[:, None]


@dataclass(frozen=True)
class PAINT(Method):
    """Boost the newest token's scores at local and summary image tokens.

    Args:
        alpha: boost of local tokens.
        beta: boost of summary tokens; None takes the variant's, 0.4 ("paper") or 0.3 ("released").
        local_share: the local tokens' share of an image.
        layers: decoder blocks; None takes all from the third on.
        heads: query heads; None takes all, as released.
        variant: "paper" or "released".
    """

    alpha: float = 0.7
    beta: float | None = None
    local_share: float = 0.25
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    variant: Literal["paper", "released"] = "paper"

    name = "paint"
    paper = "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model"
    arxiv = "2501.12206"
    kind = "bias"
    cost = "one more row of scores a layer"
    models = ("llava",)

    def __post_init__(self) -> None:
        if self.variant not in ("paper", "released"):
            raise ValueError(f"variant must be 'paper' or 'released', got {self.variant!r}")
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} is a boost of 0 or more, got {value}")
        if not 0 <= self.local_share <= 1:
            raise ValueError(f"local_share is a fraction from 0 to 1, got {self.local_share}")
        for name in ("layers", "heads"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(sorted(set(value))))

    @property
    def summary_boost(self) -> float:
        """The boost of summary tokens that is in force."""
        return self.beta if self.beta is not None else 0.3 if self.variant == "released" else 0.4

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        """Readers of two tower layers, and a bias of the newest row.

        Raises:
            CannotEdit: the model's image tokens are no patches of a tower.
        """
        if anatomy.model_type not in tower.PATCHWISE:
            raise CannotEdit(
                "paint is defined where image tokens are single patches of a tower with a CLS token "
                f"({', '.join(tower.PATCHWISE)}); this is {anatomy.model_type}"
            )
        if self.alpha == 0 and self.summary_boost == 0:
            return ()
        layers = self.layers
        if layers is None:
            layers = tuple(layer for layer in anatomy.self_layers if layer >= 2)
        return Tower(FIRST), Tower(SECOND_TO_LAST), Bias(layers, self.boost, self.heads, rows="last")

    def factors(self, call: Call) -> Tensor:
        """What |z| is multiplied by at each prompt token, (B, S); found once a prompt."""
        session = call.session

        def find() -> Tensor:
            first = tower.scores_of(session, FIRST, self.name)
            summary = summary_tokens(tower.scores_of(session, SECOND_TO_LAST, self.name))
            local = local_tokens(first, self.local_share)  # a token of both sets is a summary token
            boosts = torch.where(summary, self.summary_boost, torch.where(local, self.alpha, 0.0))
            return tower.patches_of(session, first, self.name).spread(boosts)

        found: Tensor = session._once(repr(self), find)
        return found

    def boost(self, call: Call) -> Tensor:
        """The bias of the newest rows, (B, H, Q, K)."""
        factors = call.session.over_keys(self.factors(call).to(call.key.device), call.key.shape[2])
        scores = call.scores()
        return factors[:, None, None].to(scores.dtype) * scores.abs()
