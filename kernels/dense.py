"""A few rows over many keys (decoding): matmuls per key-value head, keys and values never repeated."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Problem, Rows

WIDENED = 1 << 18  # elements of keys that are widened at a time: 1 MiB


def rows(problem: Problem) -> Rows:
    """The rows of a problem with all their probs in memory, (B, H, R, K), worked on in place."""
    batch, heads, count, keys = problem.shape
    wide, kv_heads = problem.wide, problem.key.shape[1]
    query = problem.query.reshape(batch, kv_heads, heads // kv_heads * count, -1).to(wide) * problem.scale
    scores = _scores(query, problem.key).reshape(batch, heads, count, keys)
    probs, member = _probs(problem, scores), problem.groups.member[:, 0].to(wide)
    flat = probs.reshape(batch, heads * count, keys)
    masses = (flat @ member).reshape(batch, heads, count, -1)  # one matmul: the groups are all heads' alike
    coefficients = problem.coefficients(masses).reshape(batch, heads * count, -1)
    spread = coefficients @ member.transpose(1, 2)
    weights = flat * spread if flat.requires_grad else flat.mul_(spread)
    out = (
        weights.to(problem.value.dtype).reshape(batch, kv_heads, heads // kv_heads * count, keys)
        @ problem.value
    )
    return Rows(out.reshape(batch, heads, count, -1).to(problem.query.dtype), masses)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """(B, H_kv, rows, K) in the query's dtype: a matmul in half precision would round a sink's score by percents.

    Keys in half precision are widened some at a time, so that they stay in cache.
    """
    if key.dtype == query.dtype or key.requires_grad or query.requires_grad or key.device.type != "cpu":
        return query @ key.to(query).transpose(2, 3)
    batch, heads, keys, width = key.shape
    scores = query.new_empty(batch, heads, query.shape[2], keys)
    some = max(1, WIDENED // (batch * keys * width))
    for start in range(0, heads, some):
        own = slice(start, start + some)
        for first in range(0, keys, WIDENED // width):
            part = slice(first, first + WIDENED // width)
            scores[:, own, :, part] = query[:, own] @ key[:, own, part].to(query).transpose(2, 3)
    return scores


def _probs(problem: Problem, scores: Tensor) -> Tensor:
    """(B, H, R, K) with everything that acts before the softmax. A row that sees nothing is zero."""
    if problem.score_mod is not None:
        scores = problem.score_mod(scores, problem.groups.ids)
    bias, visible = _bias(problem), problem.visible()
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        rows = visible.shape[0]
        scores[..., -rows:].masked_fill_(~visible[:, -rows:], -torch.inf)  # all see the keys before
    if bias is None and problem.score_mod is None:  # no row is blind
        return scores.softmax(-1) if scores.requires_grad else torch.softmax(scores, -1, out=scores)
    blind = scores.detach().amax(-1, keepdim=True) == -torch.inf
    if not blind.any():
        return scores.softmax(-1)
    return scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)


def _bias(problem: Problem) -> Tensor | None:
    """Everything that is added to the scores, broadcasting to (B, H, R, K)."""
    if problem.mask is problem.group_bias is problem.allow is None:
        return None
    member = problem.groups.member[:, 0].to(problem.wide)
    terms = [] if problem.mask is None else [problem.mask]
    if problem.group_bias is not None:
        terms.append((problem.group_bias.to(member) @ member.transpose(1, 2))[:, :, None])
    if problem.allow is not None:
        seen = (problem.allow.to(member) @ member.transpose(1, 2))[:, None]
        terms.append(torch.zeros_like(seen).masked_fill(seen == 0, -torch.inf))
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
