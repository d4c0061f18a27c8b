"""A few rows over many keys (decoding): matmuls per key-value head, keys and values never repeated."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Problem, Rows

WIDENED = 1 << 18  # elements of keys that are widened at a time: 1 MiB


def rows(problem: Problem) -> Rows:
    """The rows of a problem with all their scores in memory, (B, H, R, K), worked on in place."""
    batch, heads, count, keys = problem.shape
    wide, kv_heads = problem.wide, problem.key.shape[1]
    query = problem.query.reshape(batch, kv_heads, heads // kv_heads * count, -1)
    scores = _scores(query, problem.key, wide).reshape(batch, heads, count, keys)
    scores = scores.mul_(problem.scale)
    if problem.score_mod is not None:
        scores = problem.score_mod(scores, problem.groups.ids)
    member = problem.groups.member[:, 0].to(wide)
    bias = _bias(problem, member)
    if bias is not None:
        scores = scores + bias
    visible = problem.visible()
    if visible is not None:
        scores[..., -count:].masked_fill_(~visible[:, -count:], -torch.inf)  # the keys before are seen by all
    top = scores.detach().amax(-1, keepdim=True)
    weights = scores.sub_(top.masked_fill_(top == -torch.inf, 0)).exp_().reshape(batch, heads * count, keys)
    sums = weights @ member  # all heads in one matmul: the groups are theirs alike
    total = sums.sum(-1, keepdim=True)
    total = total.masked_fill(total == 0, 1)  # a row that sees nothing
    masses = (sums / total).reshape(batch, heads, count, -1)
    coefficients = problem.coefficients(masses).reshape(batch, heads * count, -1) / total
    spread = coefficients @ member.transpose(1, 2)
    weights = weights * spread if weights.requires_grad else weights.mul_(spread)
    out = (
        weights.to(problem.value.dtype).reshape(batch, kv_heads, heads // kv_heads * count, keys)
        @ problem.value
    )
    return Rows(out.reshape(batch, heads, count, -1).to(problem.query.dtype), masses)


def _scores(query: Tensor, key: Tensor, wide: torch.dtype) -> Tensor:
    """(B, H_kv, rows, K) in the wide dtype: a matmul in half precision would round a sink's score by percents.

    Keys in half precision are widened some at a time, so that they stay in cache.
    """
    if key.dtype == wide or key.requires_grad or query.requires_grad or key.device.type != "cpu":
        return query.to(wide) @ key.to(wide).transpose(2, 3)
    batch, heads, keys, width = key.shape
    scores = torch.empty(batch, heads, query.shape[2], keys, dtype=wide)
    query = query.to(wide)
    some = max(1, WIDENED // (batch * keys * width))
    for start in range(0, heads, some):
        own = slice(start, start + some)
        for first in range(0, keys, WIDENED // width):
            part = slice(first, first + WIDENED // width)
            scores[:, own, :, part] = query[:, own] @ key[:, own, part].to(wide).transpose(2, 3)
    return scores


def _bias(problem: Problem, member: Tensor) -> Tensor | None:
    """Everything that is added to the scores, broadcasting to (B, H, R, K)."""
    terms = [] if problem.mask is None else [problem.mask]
    if problem.group_bias is not None:
        terms.append((problem.group_bias.to(member) @ member.transpose(1, 2))[:, :, None])
    if problem.allow is not None:
        seen = (problem.allow.to(member) @ member.transpose(1, 2))[:, None]
        terms.append(torch.zeros_like(seen).masked_fill(seen == 0, -torch.inf))
    if not terms:
        return None
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
