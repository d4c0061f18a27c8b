r"""OPERA: a beam search that distrusts candidates which lean on one summary token, and goes back.

Huang et al., "OPERA: Alleviating Hallucination in Multi-Modal Large Language Models via Over-Trust Penalty
and Retrospection-Allocation", CVPR 2024, arXiv 2311.17911.
Reference: https://github.com/shikiw/OPERA/tree/5fc3aa4ea1645d0b7dadd6e6434fe6a0a229c33a (transformers 4.29.2)

Before a token is chosen, each beam's N most probable candidates are looked ahead. With w_{i,j} the last
layer's attention of token i to token j, the largest over heads and normalised over all keys, and columns
j of the response only, counted from 0, t the candidate:

    phi = max_j c prod_{i=j..t} sigma w_{i,j}       c = 1e-7
    p(x_t) = softmax(z - alpha phi)_{x_t},   x_t among the N candidates

While the response (candidate included) has at most 10 tokens, phi is minus the candidate's attention to
the image. Retrospection: the column of the maximum is noted at every step, for each beam the most
frequent one of its candidates. When one column s >= 10 was noted more than r times by every beam, the
search goes back to the state after s, and the tokens chosen there are forbidden. After N returns to one
place it goes back one token further, once that is used up too it goes on.

Which rows: attention is read, never edited; the candidates' scores are, at every step.

Where this differs from the release:
- its product is stored in fp16, where 1e-7 and small factors underflow to 0 and the column becomes 0; here
  it is a sum of logs in fp32. phi is at most 1e4, so that scores stay finite;
- it normalises over the N candidates, so that a penalty all of them share changes nothing; the paper, and
  the default here, over the vocabulary. After a return it chooses among all tokens, unpenalised; here among
  the N best that are left, penalised. `variant="released"` does both as released;
- forbidden tokens get a score of -inf, not the row's smallest; those of later places are forgotten at a
  return, which the release tries to do and clears the wrong entries;
- logits processors act before candidates are taken, so that a token that they forbid is never one;
- columns older than `window` are not looked at (the release bounds its history only). Beams whose caches
  are gone are read again from the prompt's cache, not from the image.
One forward a step: the candidates are rows at the same position, which see the past and themselves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..hooks.anatomy import Anatomy
from ..hooks.edits import Decoding, Edit, HeadGain
from ..hooks.errors import CannotEdit
from ..hooks.joint import can_join
from .method import Method
from .opera_search import Reader, opera_search

CEILING = 1e4


def attention_rows(query: Tensor, key: Tensor, scaling: float, visible: Tensor) -> Tensor:
    """The largest probs over heads, normalised over keys.

    Args:
        query: (B, H, Q, D); key: (B, H_kv, K, D).
        visible: keys that each row sees, (B|1, 1, Q, K) bool.

    Returns:
        (B, Q, K) in fp32 or wider; rows sum to 1.
    """
    batch, heads, rows, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width)  # query heads of one key head are neighbours
    scores = (grouped @ key.transpose(-1, -2)).reshape(batch, heads, rows, -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scaling
    largest = scores.masked_fill(~visible, -math.inf).softmax(-1).amax(1)
    return largest / largest.sum(-1, keepdim=True)


def over_trust(sums: Tensor, factor: float, window: int) -> tuple[Tensor, Tensor]:
    """phi and its column, both (B, N), from the logs of the columns' products, (B, N, t + 1)."""
    first = max(0, sums.shape[-1] - window)
    largest, column = sums[..., first:].max(-1)
    return (largest + math.log(factor)).exp().clamp_max(CEILING), column + first


@dataclass(frozen=True)
class OPERA(Method):
    """Beam search with a penalty on over-trust in summary tokens, and with returns to them.

    Use it with `generate(num_beams=5)`, one prompt at a time.

    Args:
        scale: sigma, by which attention is multiplied.
        threshold: r, a column noted more often than this sends the search back; None never goes back.
        candidates: N, tokens of each beam that are looked ahead, at least 2.
        penalty_weight: alpha.
        variant: "paper", or "released" (see the module's docstring).
        warmup: response tokens for which attention to the image is rewarded, and first column to go back to.
        window: newest response tokens that are looked at.
        factor: c of the product.
    """

    scale: float = 50.0
    threshold: int | None = 15
    candidates: int = 5
    penalty_weight: float = 1.0
    variant: Literal["paper", "released"] = "paper"
    warmup: int = 10
    window: int = 512
    factor: float = 1e-7

    name = "opera"
    paper = (
        "OPERA: Alleviating Hallucination in Multi-Modal Large Language Models via Over-Trust Penalty and "
        "Retrospection-Allocation"
    )
    arxiv = "2311.17911"
    kind = "decoding"
    cost = "beam search with `candidates` rows a step"
    models = ("llava", "instructblip")

    def __post_init__(self) -> None:
        if self.variant not in ("paper", "released"):
            raise ValueError(f"variant must be 'paper' or 'released', got {self.variant!r}")
        if self.candidates < 2:
            raise ValueError(f"candidates must be 2 or more, for beams to part, got {self.candidates}")
        if not (self.penalty_weight >= 0 and math.isfinite(self.penalty_weight)):
            raise ValueError(f"penalty_weight is a strength of 0 or more, got {self.penalty_weight}")
        for name in ("scale", "factor", "window"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("threshold", "warmup"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        """A decoding loop, and a reader in the last layer.

        Raises:
            CannotEdit: the decoder is not one whose rows can be placed freely.
        """
        last = anatomy.layers - 1
        if not can_join(anatomy) or anatomy.model_type == "paligemma":
            raise CannotEdit(
                f"{self.name} lays several candidates at one position, which needs rotary positions, full causal "
                f"attention in every layer and no cross-attention; {anatomy.model_type} has something else"
            )
        module = next(site.module for site in anatomy.sites if site.layer == last)
        scaling = float(getattr(module, "scaling", anatomy.head_width**-0.5))
        reader = Reader(functools.partial(attention_rows, scaling=scaling))
        loop = functools.partial(opera_search, self, reader, anatomy.image_token)
        return HeadGain((last,), reader.read, hold=False, needs_image=False), Decoding(loop, check_config)

    def penalty(self, sums: Tensor, to_image: Tensor) -> tuple[Tensor, Tensor]:
        """What is taken off the candidates' logits over alpha, and the column of the maximum; both (B, N).

        Args:
            sums: logs of the columns' products, (B, N, t + 1).
            to_image: attention to the image, (B, N).
        """
        phi, column = over_trust(sums, self.factor, self.window)
        return (-to_image if sums.shape[-1] <= self.warmup else phi), column


REFUSED = {
    "do_sample": "sampling",
    "constraints": "constraints",
    "force_words_ids": "forced words",
    "penalty_alpha": "contrastive search",
    "dola_layers": "DoLa",
    "prompt_lookup_num_tokens": "prompt lookup",
    "low_memory": "low_memory",
    "output_attentions": "output_attentions",
    "output_hidden_states": "output_hidden_states",
    "output_scores": "output_scores",
    "output_logits": "output_logits",
}


def check_config(config: Any) -> None:
    """Raise CannotEdit for a generation config that this beam search cannot serve."""
    beams = getattr(config, "num_beams", None) or 1
    if beams < 2:
        raise CannotEdit(f"opera is a beam search and got num_beams={beams}: call generate(num_beams=5)")
    if (getattr(config, "num_beam_groups", None) or 1) > 1:
        raise CannotEdit("opera knows one group of beams: call generate without num_beam_groups")
    for name, what in REFUSED.items():
        if getattr(config, name, None):
            raise CannotEdit(f"opera cannot serve {what}: call generate without {name}")
    if (getattr(config, "guidance_scale", None) or 1) != 1:
        raise CannotEdit("opera goes back, and classifier-free guidance cannot: leave guidance_scale at 1")
    if getattr(config, "use_cache", None) is False:
        raise CannotEdit(
            "opera keeps the keys of the candidates that it chooses: call generate with use_cache=True"
        )
    if getattr(config, "cache_implementation", None) not in (None, "dynamic"):
        raise CannotEdit(
            f"opera drops rows from the cache, and cache_implementation={config.cache_implementation!r} cannot: "
            "leave it at the default"
        )
