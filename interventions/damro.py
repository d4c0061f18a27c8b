r"""DAMRO: contrast with what the model says of a few high-attention patches only.

Gong et al., "DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination", EMNLP 2024,
arXiv 2410.04514. Reference: https://github.com/coder-gx/DAMRO (a modified transformers 4.43; its first
commit ed68d51 has the code of the paper's time, which differs).

The K patches to which the vision tower's CLS token pays most attention are outlier tokens. A second
stream sees the prompt with these K image tokens only; with z and z' the logits of both,

    a_j = sum_h s_h(CLS, j)   (scores of the layer whose output are the features; K largest)
    out = (1 + alpha) z - alpha z',   -inf where z < log beta + max z

Which rows: logits of the newest row, at the prompt and at every step. Rows of a batch that have no image
keep their logits.

Variants: "paper" and "released" take layer -2 and, on LLaVA, un-split queries and keys of all channels:
their softmax has the order of the sum over heads. On InstructBLIP both take the mean over heads of the
probs, and the Q-Former sees the K tokens only. "early" (ed68d51) takes the tower's last layer, after the
features. "medheval" is the port in https://github.com/Aofei-Chang/MedHEval: the last layer, the mean over heads
of the probs, and the other image tokens stay in the prompt with an embedding of zero (its alpha is 0.5). Both
are LLaVA's only.

Where this differs from the release: its InstructBLIP code takes the patch before each outlier, for CLS
is still in the features (kept with `variant="released"`). It runs the tower twice, we once. It ignores the
user's logits processors, temperature and top-p; here they act after the contrast. LLaVA-NeXT is as
released: K tokens of the whole-image crop and one newline. Prompts keep each image's K tokens apart.
`mode="filter"` is ours: the outliers are hidden from all other tokens of the main stream, no second stream.
The paper's text as quoted by others has other strengths by benchmark (LLaVA 0.5 for CHAIR); defaults are the code's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..hooks import tower
from ..hooks.anatomy import Anatomy
from ..hooks.edits import Bias, Branch, Edit, Logits, Tower
from ..hooks.errors import CannotEdit
from ..hooks.session import Call, Session
from ..hooks.step import Step
from .contrast import check_strengths, contrasted, keep_plausible
from .method import Method

OUTLIERS = "outlier tokens"
QFORMERS = ("instructblip", "blip2")
LAYERS = {"paper": -2, "released": -2, "early": -1, "medheval": -1}


def outliers(scores: Tensor, count: int, probs: bool = False) -> Tensor:
    """The patches that CLS attends to most: scores (N, H, 1 + P) -> (N, K), the strongest first.

    Args:
        scores: of the CLS token, column 0 itself.
        count: K; all patches where there are fewer.
        probs: order by the mean over heads of the probs; else by the sum over heads of the scores.
    """
    seen = scores.softmax(-1).mean(1) if probs else scores.sum(1)
    return seen[:, 1:].topk(min(count, scores.shape[2] - 1), -1).indices


def ranks(chosen: Tensor, patches: int) -> Tensor:
    """Place of each patch among the chosen (N, K), from 0; K where it is not among them. (N, P)"""
    count = chosen.shape[1]
    found = torch.full((chosen.shape[0], patches), count, dtype=torch.long, device=chosen.device)
    places = torch.arange(count, device=chosen.device).expand_as(chosen)
    return found.scatter(1, chosen, places)


@dataclass(frozen=True)
class DAMRO(Method):
    """Contrast with a stream that sees only the patches where the vision tower's CLS token looks.

    Args:
        alpha: strength of the contrast.
        beta: least probability of a token, as a share of the largest.
        tokens: K, the outlier tokens of each image.
        variant: "paper", "released", "early" or "medheval", see above.
        order: of the K tokens in the second prompt: by "attention", as released, or by "position".
        mode: "contrast"; "filter" hides the outliers from the main stream and does nothing else.
        extension: "received", ours, for towers without a CLS token (SigLIP): outliers are the patches that get most
            attention from all patches. The paper's method is not defined there.
    """

    alpha: float = 2.0
    beta: float = 0.1
    tokens: int = 10
    variant: Literal["paper", "released", "early", "medheval"] = "paper"
    order: Literal["attention", "position"] = "attention"
    mode: Literal["contrast", "filter"] = "contrast"
    extension: Literal["received"] | None = None

    name = "damro"
    paper = "DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination"
    arxiv = "2410.04514"
    kind = "contrastive"
    cost = "one prefill without most of the image, two streams"
    models = ("llava", "llava_next", "instructblip")

    def __post_init__(self) -> None:
        check_strengths(self.alpha, self.beta)
        if self.tokens < 1:
            raise ValueError(f"tokens counts the outlier tokens of an image, at least 1, got {self.tokens}")
        choices = {
            "variant": tuple(LAYERS),
            "order": ("attention", "position"),
            "mode": ("contrast", "filter"),
            "extension": (None, "received"),
        }
        for field, known in choices.items():
            if getattr(self, field) not in known:
                raise ValueError(
                    f"{field} must be one of {', '.join(map(repr, known))}, got {getattr(self, field)!r}"
                )

    @classmethod
    def for_model(cls, anatomy: Anatomy) -> DAMRO:
        """K 10 and alpha 2 on LLaVA, K 4 and alpha 0.5 (POPE's; 1.5 for CHAIR) on InstructBLIP."""
        return cls(alpha=0.5, tokens=4) if anatomy.model_type in QFORMERS else cls()

    @property
    def layer(self) -> int:
        """The tower's layer whose scores are read."""
        return LAYERS[self.variant]

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        """A reader in the tower; a second stream and a contrast, or a bias.

        Raises:
            CannotEdit: the model's image tokens have no known patches.
        """
        kind = anatomy.model_type
        self._check(kind)
        reader = Tower(self.layer, received=self.extension is not None)
        if self.mode == "filter":
            layers = anatomy.self_layers
            return reader, Bias(layers, self.hide)
        if self.alpha == 0:
            return () if self.beta == 0 else (Logits(self.plausible, needs_image=True),)
        if kind in QFORMERS:
            branch = Branch(OUTLIERS, every_step=True, view=_same, tower=self.gather)
        elif self.variant == "medheval":
            branch = Branch(OUTLIERS, _all, every_step=True, embeds=self.zero)
        else:
            branch = Branch(OUTLIERS, self.keep, every_step=True)
        return reader, branch, Logits(self.contrast, (OUTLIERS,), needs_image=True)

    def _check(self, kind: str) -> None:
        if self.extension and kind == "paligemma":
            return
        if kind not in (*tower.PATCHWISE, *QFORMERS):
            raise CannotEdit(
                f"damro is defined where image tokens are single patches of a tower with a CLS token, or where a "
                f"Q-Former reads such a tower ({', '.join((*tower.PATCHWISE, *QFORMERS))}); this is {kind}"
            )
        if kind in QFORMERS and self.mode == "filter":
            raise CannotEdit(
                f"damro cannot hide outliers on {kind}: its image tokens are queries, not patches"
            )
        if kind in QFORMERS and self.variant in ("early", "medheval"):
            raise CannotEdit(f"damro {self.variant!r} is LLaVA only, this is {kind}: use variant 'released'")

    # ---- LLaVA: image tokens are patches -----------------------------------------------------------

    def chosen(self, session: Session) -> tuple[tower.Patches, Tensor]:
        """Where the patches are, and each one's rank (N, P): below K for the outliers."""
        scores = tower.scores_of(session, self.layer, self.name)
        found = outliers(scores, self.tokens, probs=bool(self.extension) or self.variant == "medheval")
        return tower.patches_of(session, scores, self.name), ranks(found, scores.shape[2] - 1)

    def keep(self, session: Session) -> Tensor:
        """Tokens of the second prompt in its order: text, and K of each image. (B, T) indices, -1 for none."""
        patches, rank = self.chosen(session)
        image, place = session.image.to(rank.device), patches.spread(rank)
        outlier = self.are_outliers(patches, rank)
        kept = ~image | outlier | patches.newline
        if session.padding is not None:
            kept = kept & ~session.padding.to(kept.device)
        key = torch.arange(image.shape[1], device=kept.device).expand_as(image)
        if self.order == "attention":
            key = torch.where(outlier, patches.start + place, key)
        key = torch.where(kept, key, 2 * image.shape[1])
        order = key.argsort(dim=1, stable=True)
        return torch.where(kept.gather(1, order), order, -1)

    def are_outliers(self, patches: tower.Patches, rank: Tensor) -> Tensor:
        """The outliers among the prompt's tokens, (B, S) bool."""
        return (patches.patch >= 0) & (patches.spread(rank) < min(self.tokens, rank.shape[1]))

    def zero(self, embeds: Tensor, order: Tensor, session: Session) -> Tensor:
        """Embeddings (B, T, C) with those of the other image tokens zero."""
        image = session.image.to(order.device)
        blank = image & ~self.are_outliers(*self.chosen(session)).to(order.device)
        inside = (order >= 0) & (order < blank.shape[1])  # not padding, not generated
        blank = blank.gather(1, order.clamp(0, blank.shape[1] - 1)) & inside
        return embeds.masked_fill(blank[:, :, None], 0.0)

    def hide(self, call: Call) -> Tensor:
        """-inf at the outliers, (B, 1, Q, K); each still sees itself, so that no row is empty."""
        session = call.session

        find = functools.partial(self._found, session)
        hidden = session._once(repr(self), find).to(call.key.device)
        keys = call.key.shape[2]
        mask = session.over_keys(hidden, keys)[:, None, None, :]
        if call.prefill:
            first = session.seen + session.rows - keys
            columns = torch.arange(first, first + keys, device=mask.device)
            mask = mask & (columns != call.positions[:, None])
        return torch.zeros(mask.shape, device=mask.device).masked_fill(mask, -math.inf)

    def _found(self, session: Session) -> Tensor:
        return self.are_outliers(*self.chosen(session))

    # ---- InstructBLIP: the Q-Former sees the outliers only -----------------------------------------

    def gather(self, output: Any, session: Session) -> Any:
        """What the tower returns, with K of its tokens only."""
        scores = tower.scores_of(session, self.layer, self.name)
        states = output.last_hidden_state
        index = outliers(scores, self.tokens, probs=True).to(states.device)
        if self.variant != "released":
            index = index + 1  # CLS is in front
        index = index.repeat_interleave(states.shape[0] // index.shape[0], 0)  # beams
        if self.order == "position":
            index = index.sort(-1).values
        kept = torch.take_along_dim(states, index[:, :, None], 1)
        return type(output)(**{**output, "last_hidden_state": kept})

    # ---- logits ------------------------------------------------------------------------------------

    def contrast(self, logits: Tensor, step: Step) -> Tensor:
        """Logits (B, V) against those of the outlier stream."""
        fused = contrasted(logits, step.branch(OUTLIERS).to(logits.device), self.alpha)
        return _with_image(keep_plausible(fused, logits, self.beta), logits, step)

    def plausible(self, logits: Tensor, step: Step) -> Tensor:
        """The constraint alone, which is what alpha 0 leaves."""
        return _with_image(keep_plausible(logits, logits, self.beta), logits, step)


def _same(inputs: dict[str, Any], session: Session) -> dict[str, Any]:
    """The same prompt."""
    return {}


def _all(session: Session) -> Tensor:
    """Every token of the prompt, (B, S) bool."""
    return torch.ones_like(session.image)


def _with_image(changed: Tensor, logits: Tensor, step: Step) -> Tensor:
    return torch.where(step.session.has_image.to(logits.device)[:, None], changed, logits)
