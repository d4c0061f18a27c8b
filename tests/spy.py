"""An edited layer computed again: what one layer was given in a real model, and its rows in float64 loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from regard.hooks.attend import attend


@dataclass
class Seen:
    """One forward of one layer: `first` is the position of its first row."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    causal: bool
    first: int
    out: Tensor
    stock: Tensor

    def visible(self, sample: int, head: int, row: int) -> Tensor:
        """(K,) what the mask adds to the scores: 0 or -inf, or the model's own float mask."""
        keys = self.key.shape[2]
        if self.mask is None:
            hidden = torch.arange(keys) > row if self.causal else torch.zeros(keys, dtype=torch.bool)
            return torch.zeros(keys, dtype=torch.float64).masked_fill(hidden, -torch.inf)
        mask = self.mask[min(sample, len(self.mask) - 1)]
        line = mask[min(head, len(mask) - 1), row]
        if line.dtype == torch.bool:
            return torch.zeros(keys, dtype=torch.float64).masked_fill(~line, -torch.inf)
        return line.double()

    def positions(self) -> Tensor:
        """Position of each key: a window ends at the newest row, a static buffer starts at 0."""
        total = self.first + self.query.shape[2]
        return torch.arange(self.key.shape[2]) + max(0, total - self.key.shape[2])


@dataclass
class Spy:
    """Stands in for the registered function and notes the calls of one layer."""

    layer: int
    seen: list[Seen] = field(default_factory=list)

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kw: Any
    ):
        out, weights = attend(module, query, key, value, attention_mask, **kw)
        if module.layer_idx == self.layer:
            stock, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kw)
            first = self.seen[-1].first + self.seen[-1].query.shape[2] if self.seen else 0
            causal = bool(getattr(module, "is_causal", True)) and query.shape[2] > 1
            scale = kw.get("scaling") or query.shape[-1] ** -0.5
            copies = (query.clone(), key.clone(), value.clone(), attention_mask, scale, causal, first)
            self.seen.append(Seen(*copies, out.clone(), stock))
        return out, weights


@dataclass
class Formula:
    """What the edits of one layer should do, by (sample, head, absolute row position) and key positions."""

    bias: Callable[[int, int, int, Tensor], Tensor] | None = None
    policies: Sequence[tuple[Callable[[int, Tensor], Tensor], Callable[[Tensor], Tensor], str]] = ()
    gain: Tensor | None = None  # (B, H)


def expected(seen: Seen, formula: Formula, sample: int, head: int, row: int, ends: Sequence[int]) -> Tensor:
    """One output row (D,) in float64."""
    group = seen.query.shape[1] // seen.key.shape[1]
    query, key = seen.query[sample, head, row].double(), seen.key[sample, head // group].double()
    scores = key @ query * seen.scale
    if formula.bias is not None:
        scores = scores + formula.bias(sample, head, seen.first + row, seen.positions())
    probs = (scores + seen.visible(sample, head, row)).softmax(-1)
    for groups, policy, rows in formula.policies:
        position, newest = seen.first + row, row == seen.query.shape[2] - 1
        if (
            rows == "all"
            or (rows == "last" and newest)
            or (rows == "after_image" and position >= ends[sample])
        ):
            of_key = groups(sample, seen.positions())
            masses = torch.stack([(probs * (of_key == g)).sum() for g in range(3)])
            probs = probs * policy(masses)[of_key]
    out = probs @ seen.value[sample, head // group].double()
    return out if formula.gain is None else out * formula.gain[sample, head].double()
