"""Attention whose probs are rescaled by coefficients of group masses: the readable path.

Every probability of the given rows is formed, so the cost grows with Q * K: call it on the rows
that a policy edits, and leave the others to the library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Reweighting(NamedTuple):
    """One policy over one split of the keys.

    Attributes:
        member: (B, K, G), 1 where key k belongs to group g, else 0.
        policy: masses (B, H, Q, G) -> coefficients of the same shape.
    """

    member: Tensor
    policy: Callable[[Tensor], Tensor]


class Reweighted(NamedTuple):
    """`out` (B, Q, H, D) in the inputs' dtype. Per policy: `masses` (B, H, Q, G), fp32 or wider, and
    `changed` (B, H, Q) bool, the rows in which some coefficient is not 1.
    """

    out: Tensor
    masses: list[Tensor]
    changed: list[Tensor]


def reweighted_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    reweightings: Sequence[Reweighting],
) -> Reweighted:
    """Attention rows with `probs_k <- probs_k * c_group(k)`; each policy sees what the one before it left.

    Args:
        query: (B, H, Q, D).
        key: (B, H_kv, K, D); H is a multiple of H_kv and heads are not repeated.
        value: (B, H_kv, K, D_v).
        mask: broadcasts to (B, H, Q, K); bool (True is seen) or added to the scores.
        scale: factor of the scores.
        reweightings: policies in the order in which they apply.
    """
    batch, heads, count, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).reshape(batch, kv_heads, -1, query.shape[-1])
    scores = (grouped @ key.to(wide).transpose(2, 3)).reshape(batch, heads, count, keys) * scale
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(
                ~mask, torch.finfo(wide).min
            )  # not -inf: an empty row must stay finite
        else:
            scores = scores + mask.to(wide)
    probs = scores.softmax(-1)
    masses, changed = [], []
    for member, policy in reweightings:
        member = member.to(wide)[:, None]
        mass = probs @ member
        coefficients = policy(mass).to(wide)
        probs = probs * (coefficients @ member.transpose(2, 3))
        changed.append((coefficients != 1).any(-1))
        masses.append(mass)
    out = probs.reshape(batch, kv_heads, -1, keys) @ value.to(wide)
    out = out.reshape(batch, heads, count, value.shape[-1]).transpose(1, 2)
    return Reweighted(out.to(query.dtype).contiguous(), masses, changed)
