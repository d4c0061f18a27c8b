"""Many rows: one library call a span of keys, put together by their log-sum-exp. No score matrix is formed.

The keys of a span that belong to another group (its columns: sinks) are masked out there and served by one
matmul of all rows with just these few keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .partial import group_masses, log_total, logsumexp, partial, share_of, weighted_sum
from .problem import Problem, Rows


class Piece(NamedTuple):
    """Keys `start` to `stop` of one group, seen by the rows from `first` on; `causal` row by row from there."""

    start: int
    stop: int
    group: int
    first: int
    causal: bool


class Parts(NamedTuple):
    """Partials of one problem before the policy: of spans, and the bare scores (B, H, R, n) of its columns."""

    outs: list[Tensor]
    lses: list[Tensor]
    groups: list[int]
    columns: Tensor | None


def rows(problem: Problem) -> Rows:
    """Edited rows from partials; samples with other spans are worked on one by one."""
    count = problem.shape[0]
    if problem.groups.aligned or count == 1:
        problems = [problem]
    else:
        problems = [problem.sample(index) for index in range(count)]
    every = [_parts(one) for one in problems]
    summed = [_masses(one, parts) for one, parts in zip(problems, every, strict=True)]
    masses = summed[0][0] if len(summed) == 1 else torch.cat([own for own, _ in summed])
    coefficients = problem.coefficients(masses)
    split = coefficients.split([one.shape[0] for one in problems])
    merged = zip(problems, every, summed, split, strict=True)
    outs = [_merge(one, parts, total, own) for one, parts, (_, total), own in merged]
    return Rows(outs[0] if len(outs) == 1 else torch.cat(outs), masses)


def pieces(problem: Problem) -> list[Piece]:
    """The spans, cut where the first row stands: before it every row sees all, after it causality holds."""
    _, _, count, keys = problem.shape
    border = keys - count if problem.causal and count > 1 else keys
    layouts = problem.groups.layouts
    shared = set(layouts[0].columns).intersection(*(layout.columns for layout in layouts))
    found = []
    for start, stop, group in layouts[0].spans:
        while start < stop and start in shared:  # a column at an end needs no mask
            start += 1
        while start < stop and stop - 1 in shared:
            stop -= 1
        if start < min(stop, border):
            found.append(Piece(start, min(stop, border), group, 0, False))
        if max(start, border) < stop:
            begin = max(start, border)
            found.append(Piece(begin, stop, group, begin - border, True))
    return found


def _parts(problem: Problem) -> Parts:
    outs, lses, groups = [], [], []
    batch, heads, _, _ = problem.shape
    for piece in pieces(problem):
        span = slice(piece.start, piece.stop)
        out, lse = partial(
            problem.query[:, :, piece.first :],
            problem.key[:, :, span],
            problem.value[:, :, span],
            problem.scale,
            piece.causal,
            _sum(_mask(problem, piece), _without_columns(problem, piece)),
        )
        if piece.first:
            lse = torch.cat([lse.new_full((batch, heads, piece.first), -torch.inf), lse], 2)
        outs.append(out)
        lses.append(_shifted(problem, lse, piece.group))
        groups.append(piece.group)
    return Parts(outs, lses, groups, _column_scores(problem))


def _mask(problem: Problem, piece: Piece) -> Tensor | None:
    mask = problem.mask
    if mask is None:
        return None
    rows = slice(None) if mask.shape[2] == 1 else slice(piece.first, None)
    return mask[:, :, rows, piece.start : piece.stop]


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one + other


def _without_columns(problem: Problem, piece: Piece) -> Tensor | None:
    """(B|1, 1, 1, keys of the piece), -inf at the columns; None where it has none."""
    start, stop = piece.start, piece.stop
    if not any(start <= column < stop for layout in problem.groups.layouts for column in layout.columns):
        return None
    columns = problem.groups.columns - start
    columns = columns.masked_fill((columns < 0) | (columns >= stop - start), -1)
    hidden = torch.zeros(columns.shape[0], stop - start + 1, dtype=problem.wide, device=columns.device)
    hidden.scatter_(1, columns + 1, -torch.inf)  # those elsewhere fall on a place of their own
    return hidden[:, None, None, 1:]


def _shifted(problem: Problem, lse: Tensor, group: int) -> Tensor:
    """A partial's lse after what acts on its whole group."""
    if problem.group_bias is not None:
        lse = lse + problem.group_bias.to(lse)[None, :, group, None]
    if problem.allow is not None:
        lse = lse.masked_fill(~problem.allow[:, None, :, group], -torch.inf)
    return lse


def _gathered(problem: Problem, tensor: Tensor) -> Tensor:
    """Keys or values (B, H_kv, K, D) at the columns: (B, H_kv, n, D)."""
    columns = problem.groups.columns.clamp_min(0)
    if columns.shape[0] == 1:
        return tensor[:, :, columns[0]]
    index = columns[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
    return tensor.gather(2, index)


def _member(problem: Problem) -> Tensor:
    """(B|1, 1, n, G), 1 where a column belongs to a group. What the fill has does not matter: it is not seen."""
    groups = problem.groups
    columns = groups.columns
    member = groups.member.to(problem.wide).expand(columns.shape[0], -1, -1, -1)
    index = columns.clamp_min(0)[:, None, :, None].expand(-1, 1, -1, groups.count)
    return member.gather(2, index)


def _column_scores(problem: Problem) -> Tensor | None:
    columns = problem.groups.columns
    if not columns.shape[1]:
        return None
    _, _, count, keys = problem.shape
    scores = _few_scores(problem.query, _gathered(problem, problem.key).to(problem.wide)).mul_(problem.scale)
    member = _member(problem)
    unseen = (columns < 0)[:, None, None]
    if problem.causal and count > 1:
        positions = torch.arange(keys - count, keys, device=columns.device)
        unseen = unseen | (columns[:, None, None] > positions[:, None])
    if problem.allow is not None:
        unseen = unseen | (problem.allow.to(member)[:, None] @ member.transpose(2, 3) == 0)
    if problem.group_bias is not None:
        scores = scores + problem.group_bias.to(member)[None, :, None] @ member.transpose(2, 3)
    if problem.mask is not None:
        index = columns.clamp_min(0)[:, None, None]
        mask = problem.mask.expand(max(problem.mask.shape[0], columns.shape[0]), -1, -1, -1)
        scores = scores + mask.gather(3, index.expand(mask.shape[0], *mask.shape[1:3], -1))
    return scores.masked_fill(unseen, -torch.inf)


def _few_scores(query: Tensor, key: Tensor) -> Tensor:
    """(B, H, R, n) in the dtype of `key`: a rounded score of a sink would be felt. Some heads at a time."""
    batch, heads, count, width = query.shape
    repeat = heads // key.shape[1]
    step = max(1, (1 << 18) // max(1, batch * repeat * count * width))
    found = []
    for start in range(0, key.shape[1], step):
        own = query[:, start * repeat : (start + step) * repeat].to(key)
        few = key[:, start : start + step]
        scores = own.reshape(batch, few.shape[1], repeat * count, width) @ few.transpose(2, 3)
        found.append(scores.reshape(batch, -1, count, few.shape[2]))
    return torch.cat(found, 1)


def _masses(problem: Problem, parts: Parts) -> tuple[Tensor, Tensor]:
    """Masses (B, H, R, G) and the lse (B, H, R) of all keys."""
    if parts.columns is None:
        total = log_total(parts.lses)
        return group_masses(parts.lses, parts.groups, problem.groups.count, total), total
    total = log_total([*parts.lses, logsumexp(parts.columns)])
    masses = group_masses(parts.lses, parts.groups, problem.groups.count, total)
    return masses + share_of(parts.columns, total[..., None]) @ _member(problem), total


def _merge(problem: Problem, parts: Parts, total: Tensor, coefficients: Tensor) -> Tensor:
    outs, weights = list(parts.outs), []
    for lse, group in zip(parts.lses, parts.groups, strict=True):
        weights.append(share_of(lse, total) * coefficients[..., group])
    if parts.columns is not None:
        batch, heads, count, _ = problem.shape
        value = _gathered(problem, problem.value)
        shares = share_of(parts.columns, total[..., None]) * (coefficients @ _member(problem).transpose(2, 3))
        few = shares.to(value).reshape(batch, value.shape[1], -1, value.shape[2]) @ value
        outs.append(few.reshape(batch, heads, count, -1))
        weights.append(torch.ones_like(total))
    return weighted_sum(outs, weights, problem.query.dtype)
