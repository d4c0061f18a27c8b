r"""The control of every contrastive method: its plausibility mask, without the contrast.

The mask alone explains most of what contrastive decoding gains under sampling (Yin et al., "The Mirage of
Performance Gains: Why Contrastive Decoding Fails to Mitigate Object Hallucinations in MLLMs?", arXiv 2504.10020):

    z_v <- -inf  where  z_v < log(beta) + max_v z_v

Under greedy decoding it changes nothing. Reference: https://github.com/ustc-hyin/cd_rethink
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..hooks.anatomy import Anatomy
from ..hooks.edits import Edit, Logits
from ..hooks.step import Step
from .contrast import check_strengths, keep_plausible
from .method import Method


@dataclass(frozen=True)
class Plausible(Method):
    """Keep the plausible tokens and contrast nothing: the control of contrastive methods.

    Args:
        beta: least probability of a token, as a share of the largest one. 0 keeps all.
    """

    beta: float = 0.1

    name = "plausible"
    paper = (
        "The Mirage of Performance Gains: Why Contrastive Decoding Fails to Mitigate Object Hallucinations"
    )
    arxiv = "2504.10020"
    kind = "logits"
    cost = "none"
    models = ("llava",)

    def __post_init__(self) -> None:
        check_strengths(beta=self.beta)

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        """One edit of the logits; none for beta 0."""
        return (Logits(self.cut),) if self.beta else ()

    def cut(self, logits: Tensor, step: Step) -> Tensor:
        """Logits (B, V) with the implausible ones at -inf."""
        return keep_plausible(logits, logits, self.beta)
