"""Attention over a part of the keys, with the log-sum-exp that lets parts be put together again.

A partial is `out` (B, H, R, D_v), normalised over its own keys, and `lse` (B, H, R), the log of the sum of
its exponentiated scores; -inf (and a zero row) where a row sees none of the keys. Each partial has its own
maximum, so a group whose mass is small beside another's loses no digits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 22  # scores formed at a time where they must be: 16 MiB in fp32


def partial(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One partial: the library's flash attention where it gives the log-sum-exp, matmuls by blocks elsewhere.

    Its gradient takes the one of `lse` into account. The library's own backward pass leaves that out, which
    silently bends the gradients of query and key wherever partials are merged.

    Args:
        query: (B, H, R, D).
        key: (B, H_kv, K, D), H a multiple of H_kv.
        value: (B, H_kv, K, D_v).
        scale: factor of the scores.
        causal: row i sees keys 0 to i.
        mask: (B|1, H|1, R|1, K), added to the scores, -inf for unseen; it gets no gradient.

    Returns:
        out in the query's dtype, lse in fp32 (fp64 for fp64).
    """
    out, lse = _Partial.apply(query, key, value, scale, causal, mask)
    return out, lse


def log_total(lses: Sequence[Tensor]) -> Tensor:
    """The lse (B, H, R) of all partials together."""
    return logsumexp(torch.stack(list(lses), -1))


def logsumexp(scores: Tensor) -> Tensor:
    """torch.logsumexp over the last dimension; where all are -inf its gradient is zero instead of NaN."""
    if not scores.requires_grad:
        return scores.logsumexp(-1)
    blind = (scores == -torch.inf).all(-1)
    return scores.masked_fill(blind[..., None], 0).logsumexp(-1).masked_fill(blind, -torch.inf)


def group_masses(
    lses: Sequence[Tensor], groups: Sequence[int], count: int, total: Tensor | None = None
) -> Tensor:
    """Masses (B, H, R, G) of the groups that partials belong to, as shares of `total` (default: of their sum)."""
    total = log_total(lses) if total is None else total
    masses = total.new_zeros(*total.shape, count)
    for lse, group in zip(lses, groups, strict=True):
        masses[..., group] += share_of(lse, total)
    return masses


def share_of(lse: Tensor, total: Tensor) -> Tensor:
    """exp(lse - total), 0 where nothing is seen at all."""
    return (lse - total.masked_fill(total == -torch.inf, 0)).exp()


def merge_partials(
    outs: Sequence[Tensor],
    lses: Sequence[Tensor],
    groups: Sequence[int] | None = None,
    coefficients: Tensor | None = None,
) -> Tensor:
    """Put partials together: `sum_i c_g(i) * exp(lse_i - lse) * out_i`. Differentiable.

    Args:
        outs: each (B, H, R, D_v), or fewer rows: then it has the last ones.
        lses: each (B, H, R) with all rows.
        groups: the group of each partial.
        coefficients: (B, H, R, G); None is plain attention.

    Returns:
        (B, H, R, D_v) in the dtype of `lses`.

    Raises:
        ValueError: there are no partials, or not as many `lses` or `groups`.
    """
    if not outs:
        raise ValueError("no partials to merge")
    total = log_total(lses)
    weights = [share_of(lse, total) for lse in lses]
    if groups is not None and coefficients is not None:
        weights = [w * coefficients[..., group] for w, group in zip(weights, groups, strict=True)]
    return weighted_sum(outs, weights, total.dtype)


def weighted_sum(outs: Sequence[Tensor], weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """`sum_i weights_i * out_i`, (B, H, R, D_v) in `dtype`, summed in the dtype of the weights.

    Each out has R rows or the last few of them, each weight (B, H, R). A few heads at a time: sums stay in cache.
    """
    batch, heads, rows = weights[0].shape
    width = outs[0].shape[-1]
    step = max(1, (1 << 18) // max(1, batch * rows * width))
    merged = []
    for start in range(0, heads, step):
        own = slice(start, min(start + step, heads))
        total = weights[0].new_zeros(batch, own.stop - start, rows, width)
        for out, weight in zip(outs, weights, strict=True):
            if out.shape[2]:
                last = slice(rows - out.shape[2], None)
                total[:, :, last].addcmul_(out[:, own].to(total), weight[:, own, last, None])
        merged.append(total.to(dtype))
    return merged[0] if len(merged) == 1 else torch.cat(merged, 1)


class _Partial(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        causal: bool,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if query.device.type == "cpu" and value.shape[-1] == query.shape[-1]:
            out, lse = _library(query, key, value, scale, causal, mask)
        else:
            out, lse = _by_blocks(query, key, value, scale, causal, mask)
        if mask is not None:  # the library gives such rows an lse of 0
            seen = mask > -torch.inf
            if causal:
                seen = seen & _triangle(query.shape[2], key.shape[2], 0, query.device)
            blind = ~seen.any(-1)
            if blind.any():
                out, lse = out.masked_fill_(blind[..., None], 0), lse.masked_fill_(blind, -torch.inf)
        ctx.save_for_backward(query, key, value, out, lse, *([] if mask is None else [mask]))
        ctx.given = scale, causal
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, *mask = ctx.saved_tensors
        scale, causal = ctx.given
        wide, kv_heads, repeat = lse.dtype, key.shape[1], query.shape[1] // key.shape[1]
        grad_out, grad_lse = grads[0].to(wide), grads[1].to(wide)
        delta = (grad_out * out).sum(-1) - grad_lse  # the library's delta has no second term
        many_keys, many_values = (t.to(wide).repeat_interleave(repeat, 1) for t in (key, value))
        grad_query, grad_key, grad_value = (
            torch.zeros_like(t, dtype=wide) for t in (query, many_keys, many_values)
        )
        base = lse.masked_fill(lse == -torch.inf, torch.inf)
        for rows, scores in _blocks(query, many_keys, scale, causal, mask[0] if mask else None):
            probs = (scores - base[:, :, rows, None]).exp()
            above = grad_out[:, :, rows]
            grad_value += probs.transpose(2, 3) @ above
            slope = probs * (above @ many_values.transpose(2, 3) - delta[:, :, rows, None]) * scale
            grad_query[:, :, rows] = slope @ many_keys
            grad_key += slope.transpose(2, 3) @ query[:, :, rows].to(wide)
        folded = (t.unflatten(1, (kv_heads, repeat)).sum(2) for t in (grad_key, grad_value))
        grad_key, grad_value = folded
        return grad_query.to(query), grad_key.to(key), grad_value.to(value), None, None, None


def _library(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, width = query.shape
    if heads > key.shape[1] and not causal and (mask is None or mask.shape[1] == mask.shape[2] == 1):
        folded = query.reshape(
            batch, key.shape[1], -1, width
        )  # rows of one key-value head: its keys are read once
        out, lse = _library(folded, key, value, scale, causal, mask)
        return out.reshape(batch, heads, rows, -1), lse.reshape(batch, heads, rows)
    if mask is not None:
        mask = mask.to(query.dtype)
        mask = mask.expand(*mask.shape[:2], rows, key.shape[2])
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale
    )


def _by_blocks(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    wide, repeat = torch.promote_types(query.dtype, torch.float32), query.shape[1] // key.shape[1]
    key, value = (t.to(wide).repeat_interleave(repeat, 1) for t in (key, value))
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    lse = torch.empty(query.shape[:3], dtype=wide, device=query.device)
    for rows, scores in _blocks(query, key, scale, causal, mask):
        lse[:, :, rows] = scores.logsumexp(-1)
        out[:, :, rows] = (scores.softmax(-1) @ value).to(out)
    return out, lse


def _blocks(
    query: Tensor, key: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows with their scores (B, H, rows, K) in the dtype of `key`, which has H heads."""
    batch, heads, count, _ = query.shape
    step = max(1, CHUNK // max(1, batch * heads * key.shape[2]))
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        scores = query[:, :, rows].to(key) @ key.transpose(2, 3) * scale
        if mask is not None:
            scores = scores + (mask if mask.shape[2] == 1 else mask[:, :, rows])
        if causal:
            visible = _triangle(rows.stop - start, key.shape[2], start, query.device)
            scores = scores.masked_fill(~visible, -torch.inf)
        yield rows, scores


def _triangle(rows: int, keys: int, start: int, device: torch.device) -> Tensor:
    return torch.ones(rows, keys, dtype=torch.bool, device=device).tril(start)
