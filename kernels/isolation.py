"""Isolation of regions: queries of one region see the keys of some regions only, without any mask.

Hidden keys are left out instead of masked: for each distinct set of visible regions the query rows and the keys
are gathered and given to the library's attention, which stays on its fastest path and does no work for hidden keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .groups import Groups


class _Call(NamedTuple):
    """One library call: row and key indices; None is all of them, a slice is a view of neighbours."""

    rows: Tensor | slice | None
    keys: Tensor | slice | None


class _Part(NamedTuple):
    """Samples whose regions are alike, None for all, and their calls."""

    samples: Tensor | None
    calls: tuple[_Call, ...]


@dataclass(frozen=True)
class Isolation:
    """Which region queries and keys belong to, and which regions see which. Made once, used for many layers.

    Args:
        query_region: (B, Q) or (1, Q) integers from 0 to R_q - 1, or -1: such a query sees nothing.
        key_region: (B, K) or (1, K) integers from 0 to R_k - 1, or -1: such a key is seen by nothing.
        allow: (R_q, R_k) bool, whether queries of region r see keys of region s.

    Raises:
        ValueError: another shape or dtype, or (when first used) a region out of range.
    """

    query_region: Tensor
    key_region: Tensor
    allow: Tensor

    def __post_init__(self) -> None:
        for name, ids in (("query_region", self.query_region), ("key_region", self.key_region)):
            if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
                raise ValueError(
                    f"{name} must be integers of shape (B, n) or (1, n), not {ids.dtype} of {tuple(ids.shape)}"
                )
        if self.allow.ndim != 2 or self.allow.dtype != torch.bool:
            raise ValueError(
                f"allow must be bool of shape (R_q, R_k), not {self.allow.dtype} of {tuple(self.allow.shape)}"
            )
        batches = {self.query_region.shape[0], self.key_region.shape[0]} - {1}
        if len(batches) > 1:
            raise ValueError(
                f"query_region has {self.query_region.shape[0]} samples, key_region {self.key_region.shape[0]}"
            )

    @property
    def batch(self) -> int:
        """The number of samples, 1 where one row of regions serves every sample."""
        return max(self.query_region.shape[0], self.key_region.shape[0])

    @cached_property
    def parts(self) -> tuple[_Part, ...]:
        """The library calls. Reads the regions on the host, once."""
        queries, keys, allow = (t.cpu() for t in (self.query_region, self.key_region, self.allow))
        for name, ids, count in (("query", queries, allow.shape[0]), ("key", keys, allow.shape[1])):
            if ids.numel() and not (-1 <= int(ids.min()) and int(ids.max()) < count):
                raise ValueError(
                    f"{name}_region runs from {ids.min()} to {ids.max()}, but allow of shape "
                    f"{tuple(allow.shape)} has {count} regions of {name} tokens; give 0 to {count - 1}, or -1"
                )
        lines = torch.cat([ids.long().expand(self.batch, -1) for ids in (queries, keys)], 1)
        kinds, kind = torch.unique(lines, dim=0, return_inverse=True)
        parts = []
        for index, line in enumerate(kinds):
            calls = _calls(line[: queries.shape[1]], line[queries.shape[1] :], allow)
            samples = None if len(kinds) == 1 else (kind == index).nonzero()[:, 0]
            parts.append(_Part(samples, tuple(_Call(*(self._here(t) for t in call)) for call in calls)))
        return tuple(part._replace(samples=self._here(part.samples)) for part in parts)

    def _here(self, index: Any) -> Any:
        return index.to(self.query_region.device) if isinstance(index, Tensor) else index

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As `isolated_attention`."""
        _check(self, query, key, value)
        out = None
        for part in self.parts:
            if part.samples is None:
                return _attended(part.calls, query, key, value, scale, enable_gqa)
            few, keys, values = (t.index_select(0, part.samples) for t in (query, key, value))
            own = _attended(part.calls, few, keys, values, scale, enable_gqa)
            out = own.new_zeros(query.shape[0], *own.shape[1:]) if out is None else out
            out = out.index_copy_(0, part.samples, own)
        return query.new_zeros(*query.shape[:3], value.shape[3]) if out is None else out


def isolated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_region: Tensor,
    key_region: Tensor,
    allow: Tensor,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention in which a query sees the keys of some regions only. Differentiable; no mask is formed.

    One library call for each distinct row of `allow` that occurs and for each set of samples with the same
    regions. Where every query sees every key this is the library's attention, bit for bit. The regions are read
    on the host; where they serve several layers, make an `Isolation` once and call its `attend`.

    Args:
        query: (B, H, Q, D).
        key: (B, H_kv, K, D).
        value: (B, H_kv, K, D_v).
        query_region: (B, Q) or (1, Q) integers from 0 to R_q - 1, or -1: such a query sees nothing.
        key_region: (B, K) or (1, K) integers from 0 to R_k - 1, or -1: such a key is seen by nothing.
        allow: (R_q, R_k) bool, whether queries of region r see keys of region s.
        scale: factor of the scores, default D ** -0.5.
        enable_gqa: allow H to be a multiple of H_kv.

    Returns:
        (B, H, Q, D_v) in the query's dtype. A row that sees no key is zero.

    Raises:
        ValueError: shapes that do not fit, a region out of range.
    """
    regions = Isolation(query_region, key_region, allow)
    return regions.attend(query, key, value, scale=scale, enable_gqa=enable_gqa)


def allow_groups(regions: Isolation) -> tuple[Groups, Tensor]:
    """The same isolation as the groups and the `allow` of `reweighted_attention`, which gives the masses too.

    Returns:
        Groups of the keys, one a key region and a last one, R_k, for keys of no region; and (B|1, Q, R_k + 1) bool,
        which groups a query sees.
    """
    _ = regions.parts  # its check of the range
    count = regions.allow.shape[1]
    ids = regions.key_region.long()
    table = F.pad(
        regions.allow.to(regions.query_region.device), (0, 1, 0, 1)
    )  # -1 is the last row: sees nothing
    return Groups(torch.where(ids < 0, count, ids), count + 1), table[regions.query_region.long()]


def subject_keys(key: Tensor, value: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The keys and values of several references where their subjects are, one after the other.

    So reference attention (IR-Diffusion, arXiv 2411.19261) has no more keys than the subjects have positions,
    instead of whole references behind a mask. Differentiable.

    Args:
        key: (B, S, H_kv, K, D), a reference for each of S subjects.
        value: (B, S, H_kv, K, D_v).
        masks: (S, K) bool, where subject s is in its reference. An empty mask gives no keys.

    Returns:
        key (B, H_kv, n, D), value (B, H_kv, n, D_v), and the subject (n,) of each key, in order.

    Raises:
        ValueError: shapes that do not fit.
    """
    subjects, keys = masks.shape if masks.ndim == 2 else (-1, -1)
    fits = all(t.ndim == 5 and (t.shape[1], t.shape[3]) == (subjects, keys) for t in (key, value))
    if not fits or masks.dtype != torch.bool:
        raise ValueError(
            f"masks (S, K) bool, key (B, S, H_kv, K, D) and value (B, S, H_kv, K, D_v) do not fit: "
            f"masks {masks.dtype} of {tuple(masks.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    chosen = [mask.nonzero()[:, 0] for mask in masks]
    return chosen_tokens(key, chosen), chosen_tokens(value, chosen), masks.nonzero()[:, 0]


def chosen_tokens(tokens: Tensor, chosen: Sequence[Tensor]) -> Tensor:
    """Keys (or values) of several references, one reference after the other. Differentiable.

    Args:
        tokens: (B, S, H_kv, K, D), a reference for each of S subjects; it is not copied whole.
        chosen: for each subject the positions (n_s,) in its reference, in any order and as often as wanted.

    Returns:
        (B, H_kv, n, D), n the sum of the n_s.
    """
    few = [tokens[:, subject].index_select(2, places) for subject, places in enumerate(chosen)]
    return torch.cat(few, 2) if few else tokens.new_zeros(len(tokens), *tokens.shape[2:3], 0, tokens.shape[4])


def reference_regions(
    targets: Tensor, subjects: Tensor, kept: Tensor | None = None, isolate: bool = True
) -> Isolation:
    """The regions of IR-Diffusion's self-attention of a scene (arXiv 2411.19261).

    Keys are those of `subject_keys`, then the scene's own. A position in the target of subject i sees the keys of
    reference i, and all of the scene but the positions in another subject's target; one in no target sees the
    whole scene and no reference. Targets may overlap: a pair of positions is cut off from each other where
    one is in target i and the other in j, i and j different.

    Args:
        targets: (S, N) bool, the scene's positions of each subject.
        subjects: (n,) the subject of each reference key, from `subject_keys`; empty for isolation alone.
        kept: (S, N) bool, the targets with dropout: the positions that see their reference. Default `targets`.
        isolate: False lets the scene see all of itself.

    Returns:
        Regions of N queries and n + N keys, the same for every sample.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    kept = targets if kept is None else kept
    if targets.ndim != 2 or kept.shape != targets.shape or {targets.dtype, kept.dtype} != {torch.bool}:
        raise ValueError(
            f"targets and kept must be bool of one shape (S, N), not {targets.dtype} of {tuple(targets.shape)} "
            f"and {kept.dtype} of {tuple(kept.shape)}"
        )
    if subjects.ndim != 1:
        raise ValueError(f"subjects must have the shape (n,), not {tuple(subjects.shape)}")
    count = targets.shape[0]
    every = targets.new_ones(1, targets.shape[1])  # unique needs a column even without subjects
    sets, region = torch.unique(torch.cat([targets, kept, every]).T, dim=0, return_inverse=True)
    inside, sees = sets[:, :count].double(), sets[:, count:-1]
    pairs = inside.sum(1)[:, None] * inside.sum(1) - inside @ inside.T  # of two different subjects
    allow = torch.cat([sees, (pairs == 0) | (not isolate)], 1)
    keys = torch.cat([subjects.to(region), region + count])
    return Isolation(region[None], keys[None], allow)


def _calls(queries: Tensor, keys: Tensor, allow: Tensor) -> list[_Call]:
    """The calls of one sample, by its regions (Q,) and (K,). Rows that see no key get none."""
    present = torch.isin(torch.arange(allow.shape[1]), keys)
    kinds, kind = torch.unique(F.pad(allow & present, (0, 1, 0, 1)), dim=0, return_inverse=True)
    of = kind[queries]  # a query of region -1 is of the last kind, which sees nothing
    calls = []
    for index, seen in enumerate(kinds):
        rows = of == index
        visible = seen[keys]
        if rows.any() and visible.any():
            calls.append(_Call(_index(rows), _index(visible)))
    return calls


def _index(chosen: Tensor) -> Tensor | slice | None:
    """The true places of (n,) bool."""
    places = chosen.nonzero()[:, 0]
    first, last = int(places[0]), int(places[-1])
    if len(places) == len(chosen):
        return None
    return slice(first, last + 1) if last - first + 1 == len(places) else places


def _some(tokens: Tensor, places: Tensor | slice | None) -> Tensor:
    if places is None:
        return tokens
    return tokens[:, :, places] if isinstance(places, slice) else tokens.index_select(2, places)


def _attended(
    calls: tuple[_Call, ...], query: Tensor, key: Tensor, value: Tensor, scale: float | None, enable_gqa: bool
) -> Tensor:
    out = query.new_zeros(*query.shape[:3], value.shape[3])

    def attend(call: _Call) -> Tensor:
        """In a function of its own, so that what it gathers is free before the next call gathers."""
        keys, values = _some(key, call.keys), _some(value, call.keys)
        rows = _some(query, call.rows)
        return F.scaled_dot_product_attention(rows, keys, values, scale=scale, enable_gqa=enable_gqa)

    for call in calls:
        if call.rows is None:
            return attend(call)
        if isinstance(call.rows, slice):
            out[:, :, call.rows] = attend(call)
        else:
            out = out.index_copy_(2, call.rows, attend(call))
    return out


def _check(regions: Isolation, query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.ndim == key.ndim == value.ndim == 4 or key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"query (B, H, Q, D), key (B, H_kv, K, D), value (B, H_kv, K, D_v) do not fit: {shapes}"
        )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"query (B, H, Q, D) and key (B, H_kv, K, D) do not fit: {shapes}")
    for name, ids, tokens in (("query", regions.query_region, query), ("key", regions.key_region, key)):
        if ids.shape[1] != tokens.shape[2] or ids.shape[0] not in (1, tokens.shape[0]):
            raise ValueError(f"{name}_region of shape {tuple(ids.shape)} does not fit {shapes}")
