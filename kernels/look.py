"""Probs of some heads and rows at a time, without values: what the maps are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from .problem import additive, fitting

Indices: TypeAlias = Tensor | Sequence[int]


@dataclass(frozen=True)
class Look:
    """Rows that look at keys, checked: `last` (B|1, R) is the last key that each sees, None where all see all."""

    query: Tensor
    key: Tensor
    scale: float
    mask: Tensor | None
    last: Tensor | None

    @property
    def keys(self) -> int:
        """K."""
        return self.key.shape[2]

    @property
    def wide(self) -> torch.dtype:
        """The dtype of scores and probs."""
        return torch.promote_types(self.query.dtype, torch.float32)

    @property
    def together(self) -> int:
        """How many query heads share a key-value head."""
        return self.query.shape[1] // self.key.shape[1]

    def blocks(self, most: int) -> tuple[list[slice], list[slice]]:
        """Blocks of heads (whole groups of those that share keys) and of rows, with at most `most` probs a pair.

        Rows are only split where those of one group are too many; a block has one row at least.
        """
        batch, heads, count, _ = self.query.shape
        a_row = max(1, batch * self.together * self.keys)
        wide, high = max(1, most // (a_row * max(1, count))) * self.together, max(1, most // a_row)
        return _cut(heads, wide), _cut(count, high) or [slice(0, 0)]

    def part(self, heads: slice, rows: slice) -> Look:
        """The same for some heads and rows."""
        shared = slice(heads.start // self.together, -(-heads.stop // self.together))
        mask = self.mask
        if mask is not None:
            mask = mask if mask.shape[1] == 1 else mask[:, heads]
            mask = mask if mask.shape[2] == 1 else mask[:, :, rows]
        last = None if self.last is None else self.last[:, rows]
        return Look(self.query[:, heads, rows], self.key[:, shared], self.scale, mask, last)

    def probs(self, heads: slice | None = None, rows: slice | None = None) -> Tensor:
        """(B, h, r, K) probs of some heads and rows, or of all. A row that sees nothing is zero."""
        if heads is not None and rows is not None:
            return self.part(heads, rows).probs()
        batch, count, length, _ = self.query.shape
        folded = (self.query.to(self.wide) * self.scale).reshape(
            batch, self.key.shape[1], -1, self.key.shape[3]
        )
        scores = (folded @ self.key.to(self.wide).transpose(2, 3)).reshape(batch, count, length, self.keys)
        blind = None
        if self.mask is not None:
            scores = scores + additive(self.mask, self.wide)
        if self.last is not None:
            beyond = torch.arange(self.keys, device=scores.device) > self.last[:, None, :, None]
            fill = scores.masked_fill if scores.requires_grad else scores.masked_fill_
            scores = fill(beyond, -torch.inf)
            blind = self.last[:, None, :, None] < 0
        if self.mask is not None:
            blind = scores.amax(-1, keepdim=True) == -torch.inf
        if blind is None or not blind.any():
            return scores.softmax(-1)
        return scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)


def _cut(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def look_at(
    query: Tensor,
    key: Tensor,
    scale: float | None,
    causal: bool,
    mask: Tensor | None,
    rows: Indices | None = None,
) -> Look:
    """Check what the maps are asked for (their arguments say what each is) and bring it to one form.

    Raises:
        ValueError: shapes that do not fit, a row out of range.
    """
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}"
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(f"query (B, H, Q, D) and key (B, H_kv, K, D) must have 4 dimensions, not {shapes}")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3] or not all(key.shape):
        raise ValueError(
            f"query (B, H, Q, D) and key (B, H_kv, K, D), none of them empty, do not fit: {shapes}"
        )
    if query.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads for {key.shape[1]} key-value heads: {shapes}")
    batch, heads, count, width = query.shape
    keys = key.shape[2]
    if mask is not None:
        mask = fitting(mask, (batch, heads, count, keys))
    last = None
    if causal and count > 1:
        last = torch.arange(keys - count, keys, device=query.device)[None]
    scale = width**-0.5 if scale is None else scale
    look = Look(query, key, scale, mask, last)
    return look if rows is None else _chosen(look, indices_of("rows", rows, count, query))


def _chosen(look: Look, rows: Tensor) -> Look:
    """Some rows (B|1, R); those of index -1 see nothing."""
    at = rows.clamp_min(0)
    last = torch.full_like(at, look.keys - 1) if look.last is None else look.last[0, at]
    last = last.masked_fill(rows < 0, -1)
    mask = look.mask
    if mask is not None and mask.shape[2] > 1:
        mask = torch.take_along_dim(mask, at[:, None, :, None], 2)
    query = torch.take_along_dim(look.query, at[:, None, :, None], 2)
    return replace(look, query=query, mask=mask, last=last)


def indices_of(name: str, given: Indices, size: int, query: Tensor) -> Tensor:
    """(B|1, n) long indices from -1 to `size` - 1 on the device of `query`."""
    index = torch.as_tensor(given)
    if index.numel() == 0:
        index = index.long()
    if index.is_floating_point() or index.dtype == torch.bool or index.ndim not in (1, 2):
        raise ValueError(f"{name} must be integers (n,) or (B, n), not {index.dtype} of {tuple(index.shape)}")
    index = index if index.ndim == 2 else index[None]
    if index.shape[0] not in (1, query.shape[0]):
        raise ValueError(f"{name} has {index.shape[0]} samples, but query has {query.shape[0]}")
    if index.numel() and not (-1 <= int(index.min()) and int(index.max()) < size):
        raise ValueError(
            f"{name} run from {index.min()} to {index.max()}; give 0 to {size - 1}, or -1 for fill"
        )
    return index.to(query.device, torch.long)
