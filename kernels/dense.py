"""A few rows over many keys (decoding): matmuls per key-value head, keys and values never repeated."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Problem, Rows


def rows(problem: Problem) -> Rows:
    """The rows of a problem with all their probs in memory: (B, H, R, K)."""
    batch, heads, count, keys = problem.shape
    wide, kv_heads = problem.wide, problem.key.shape[1]
    query = problem.query.to(wide).reshape(batch, kv_heads, -1, problem.query.shape[-1]) * problem.scale
    scores = (query @ problem.key.to(wide).transpose(2, 3)).reshape(batch, heads, count, keys)
    if problem.score_mod is not None:
        scores = problem.score_mod(scores, problem.groups.ids)
    member = problem.groups.member.to(wide)
    bias = _bias(problem, member)
    if bias is not None:
        scores = scores + bias
    probs = scores.softmax(-1)
    if bias is not None:
        probs = probs.nan_to_num(0)  # rows that see nothing
    masses = probs @ member
    probs = probs * (problem.policy(masses).to(wide) @ member.transpose(2, 3))
    out = probs.reshape(batch, kv_heads, -1, keys) @ problem.value.to(wide)
    return Rows(out.reshape(batch, heads, count, -1).to(problem.query.dtype), masses)


def _bias(problem: Problem, member: Tensor) -> Tensor | None:
    """Everything that is added to the scores, broadcasting to (B, H, R, K)."""
    terms = [] if problem.mask is None else [problem.mask]
    if problem.group_bias is not None:
        terms.append(problem.group_bias.to(member)[None, :, None] @ member.transpose(2, 3))
    if problem.allow is not None:
        seen = problem.allow.to(member)[:, None] @ member.transpose(2, 3)
        terms.append(torch.zeros_like(seen).masked_fill(seen == 0, -torch.inf))
    visible = problem.visible()
    if visible is not None:
        terms.append(
            torch.zeros(visible.shape, dtype=member.dtype, device=member.device).masked_fill(
                ~visible, -torch.inf
            )
        )
    if not terms:
        return None
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
