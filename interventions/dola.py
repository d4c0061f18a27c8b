r"""Decoding by contrasting layers (DoLa).

Chuang et al., "DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models", ICLR 2024,
arXiv 2309.03883. Reference: https://github.com/voidism/DoLa

With q_N the probs of the last layer, and q_j those of the same head on the state h_j before block j, as it is,

    M = argmax_j JSD(q_N, q_j)   over the candidate layers j
    z <- log q_N - log q_M,      kept where q_N >= beta * max q_N

Which rows: the newest one, at every step; it takes no second forward.

transformers had this as `generate(dola_layers=...)`; since version 5 it is code on the hub, which is not run here.
"low" and "high" are the same layers as there. Where this differs: M is chosen for each sample by itself, there
for the mean of the batch. A repetition penalty, which both recommend (1.2), is `generate`'s own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..hooks.anatomy import Anatomy
from ..hooks.edits import Edit, Logits
from ..hooks.step import Step
from .contrast import check_strengths, keep_plausible
from .method import Method

_MOST = 20  # buckets of deeper models are the first or last 20 blocks


def bucket(part: str, blocks: int, tied: bool) -> tuple[int, ...]:
    """Every second layer of the lower or upper half. With tied embeddings layer 0 only repeats its token."""
    half = min(blocks // 2, _MOST)
    if part == "high":
        return tuple(range(blocks - max(half, 1) if blocks > 2 * _MOST else blocks // 2, blocks, 2))
    return tuple(range(2 if tied else 0, half, 2)) or (0,)


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of log-probs (..., V); (...)."""
    mean = torch.logaddexp(one, other) - torch.log(torch.tensor(2.0))
    return 0.5 * ((one.exp() * (one - mean)).sum(-1) + (other.exp() * (other - mean)).sum(-1))


@dataclass(frozen=True)
class DoLa(Method):
    """Contrast with what an earlier layer would say.

    Args:
        layers: candidates, as states before these blocks; "low" (for long answers) or "high" (for short ones).
        beta: least probability of a token, as a share of the largest one.
    """

    layers: tuple[int, ...] | Literal["low", "high"] = "low"
    beta: float = 0.1

    name = "dola"
    paper = "DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models"
    arxiv = "2309.03883"
    kind = "contrastive"
    cost = "the head on a few more rows"
    models = ()

    def __post_init__(self) -> None:
        check_strengths(beta=self.beta)
        if isinstance(self.layers, str):
            if self.layers not in ("low", "high"):
                raise ValueError(f"layers must be 'low', 'high' or numbers of blocks, got {self.layers!r}")
        elif not self.layers:
            raise ValueError("layers is empty: contrasting needs at least one earlier layer")
        else:
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))

    def candidates(self, anatomy: Anatomy) -> tuple[int, ...]:
        """The layers that are contrasted with."""
        if not isinstance(self.layers, str):
            return self.layers
        config: Any = anatomy.decoder.config
        blocks = len({site.layer for site in anatomy.sites})
        return bucket(self.layers, blocks, bool(getattr(config, "tie_word_embeddings", False)))

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        """One edit of the logits, which reads the earlier layers."""
        layers = self.candidates(anatomy)
        return (Logits(partial(self.fuse, layers), early=layers),)

    def fuse(self, layers: Sequence[int], logits: Tensor, step: Step) -> Tensor:
        """Differences of log-probs (B, V)."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        final = logits.to(wide).log_softmax(-1)
        early = torch.stack(
            [part.to(wide).log_softmax(-1) for part in map(step.early.__getitem__, layers)], 1
        )
        chosen = divergence(final[:, None].expand_as(early), early).argmax(1)
        contrast = final - early[torch.arange(len(early), device=early.device), chosen]
        return keep_plausible(contrast, final, self.beta).to(logits.dtype)
