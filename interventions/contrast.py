"""What contrastive methods share: two sets of logits become one, among tokens that the first finds plausible."""

from __future__ import annotations

import math

from torch import Tensor


def contrasted(logits: Tensor, negative: Tensor, alpha: float) -> Tensor:
    """(1 + alpha) * z - alpha * z', logits (B, V) of both streams."""
    return (1 + alpha) * logits - alpha * negative


def keep_plausible(fused: Tensor, logits: Tensor, beta: float) -> Tensor:
    """Set to -inf the tokens whose probability under `logits` is below beta times the largest; (B, V).

    The adaptive plausibility constraint of contrastive decoding (Li et al., arXiv 2210.15097). Raw logits
    and log-probs give the same set. With beta 0 nothing is cut, with beta 1 the most probable token is left.
    """
    if beta == 0:
        return fused
    cutoff = logits.amax(-1, keepdim=True) + math.log(beta)
    return fused.masked_fill(logits < cutoff, -math.inf)


def check_strengths(alpha: float | None = None, beta: float | None = None) -> None:
    """Raise ValueError unless alpha is at least 0 and beta a fraction."""
    if alpha is not None and not (alpha >= 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha is a strength of 0 or more, got {alpha}")
    if beta is not None and not 0 <= beta <= 1:
        raise ValueError(f"beta is a fraction from 0 to 1, got {beta}")
