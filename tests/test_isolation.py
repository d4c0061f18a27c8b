"""Attention between regions, against loops over the definition in float64."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from regard.kernels import isolation
from regard.kernels.isolation import (
    Isolation,
    allow_groups,
    isolated_attention,
    reference_regions,
    subject_keys,
)
from regard.kernels.policies import identity
from regard.kernels.reweighted import reweighted_attention

CLOSE = {"atol": 1e-12, "rtol": 1e-12}


def randn(*shape: int, **kw: Any) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, **kw)


def formula(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float | None = None) -> Tensor:
    """Attention where query i of sample b sees the keys of `seen` (B, Q, K), one row at a time."""
    batch, heads, rows, width = query.shape
    together = heads // key.shape[1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    out = torch.zeros(batch, heads, rows, value.shape[-1], dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in (batch, heads, rows))).tolist():
        few = [j for j, sees in enumerate(seen[b, i].tolist()) if sees]
        scores = [float(query[b, h, i] @ key[b, h // together, j]) * scale for j in few]
        weights = [math.exp(score - max(scores)) for score in scores]
        for j, weight in zip(few, weights, strict=True):
            out[b, h, i] += weight / sum(weights) * value[b, h // together, j]
    return out


def seen_by(query_region: Tensor, key_region: Tensor, allow: Tensor, batch: int) -> Tensor:
    """(B, Q, K), pair by pair."""
    queries, keys = query_region.expand(batch, -1), key_region.expand(batch, -1)
    seen = torch.zeros(batch, queries.shape[1], keys.shape[1], dtype=torch.bool)
    for b in range(batch):
        for i, r in enumerate(queries[b].tolist()):
            for j, s in enumerate(keys[b].tolist()):
                seen[b, i, j] = r >= 0 and s >= 0 and bool(allow[r, s])
    return seen


CASES = {  # B, H, H_kv, Q, K, regions of the queries, of the keys, rows of query regions, of key regions
    "shared": (2, 4, 4, 9, 7, 3, 4, 1, 1),
    "each its own": (3, 4, 2, 5, 11, 2, 3, 3, 3),
    "keys of each": (2, 2, 1, 6, 6, 4, 2, 1, 2),
    "queries of each": (2, 2, 2, 1, 8, 1, 5, 2, 1),
    "one token": (1, 1, 1, 1, 1, 1, 1, 1, 1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("round_", range(6))
def test_rows_are_the_definition(case: tuple[int, ...], round_: int) -> None:
    torch.manual_seed(round_)
    batch, heads, kv, rows, keys, of_queries, of_keys, many, more = case
    query, key, value = randn(batch, heads, rows, 3), randn(batch, kv, keys, 3), randn(batch, kv, keys, 5)
    regions = {
        "query_region": torch.randint(-1, of_queries, (many, rows)),
        "key_region": torch.randint(-1, of_keys, (more, keys)),
        "allow": torch.rand(of_queries, of_keys) > 0.5,
    }
    wanted = formula(query, key, value, seen_by(*regions.values(), batch), 0.6)
    got = isolated_attention(query, key, value, **regions, scale=0.6, enable_gqa=True)
    torch.testing.assert_close(got, wanted, **CLOSE)


def test_alike_samples_go_together_and_hidden_keys_are_never_given(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = randn(3, 2, 6, 4), randn(3, 2, 8, 4), randn(3, 2, 8, 4)
    queries = torch.tensor([[0, 0, 1, 1, 2, -1], [1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 2, -1]])
    keys = torch.tensor([[0, 0, 0, 1, 1, 2, -1, 0]])
    allow = torch.tensor([[True, False, False], [False, True, True], [True, False, False]])
    regions = Isolation(queries, keys, allow)
    calls: list[tuple[int, ...]] = []
    attention = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **kw: Any) -> Tensor:
        assert kw.get("attn_mask") is None
        calls.append((len(q), q.shape[2], k.shape[2]))
        return attention(q, k, v, **kw)

    monkeypatch.setattr(isolation.F, "scaled_dot_product_attention", spy)
    for _ in range(2):
        calls.clear()
        got = regions.attend(query, key, value)
        assert sorted(calls) == [(1, 6, 3), (2, 2, 3), (2, 3, 4)]  # samples, rows, keys
    torch.testing.assert_close(got, formula(query, key, value, seen_by(queries, keys, allow, 3)), **CLOSE)
    assert not got[[0, 2], :, 5].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_region_is_plain_attention_bit_for_bit(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, n, m, 8).to(dtype) for n, m in ((4, 33), (2, 47), (2, 47)))
    plain = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    zeros = torch.zeros(1, 33, dtype=torch.long), torch.zeros(2, 47, dtype=torch.long)
    # of two key regions one is empty: it splits nothing
    for allow in (torch.tensor([[True]]), torch.tensor([[True, True], [True, False]])):
        queries = torch.arange(33)[None] % len(allow)
        got = isolated_attention(
            query, key, value, query_region=queries, key_region=zeros[1], allow=allow, enable_gqa=True
        )
        assert torch.equal(got, plain)
        assert got.dtype == dtype
    cut = isolated_attention(
        query,
        key,
        value,
        query_region=zeros[0],
        key_region=torch.arange(47)[None] % 2,
        allow=torch.tensor([[True, False]]),
        enable_gqa=True,
    )
    assert not torch.allclose(cut, plain, atol=0.05)


def test_gradient() -> None:
    query, key, value = (randn(2, n, m, 2, requires_grad=True) for n, m in ((2, 4), (1, 5), (1, 5)))
    for queries in (torch.tensor([[0, 1, -1, 0]]), torch.tensor([[0, 1, -1, 0], [1, 1, 2, 2]])):

        def attended(query: Tensor, key: Tensor, value: Tensor, queries: Tensor = queries) -> Tensor:
            return isolated_attention(
                query,
                key,
                value,
                query_region=queries,
                key_region=torch.tensor([[0, 1, 1, 0, -1]]),
                allow=torch.tensor([[True, False], [True, True], [False, False]]),
                enable_gqa=True,
            )

        assert torch.autograd.gradcheck(attended, (query, key, value))


def test_nothing_is_seen() -> None:
    query, key, value = randn(2, 2, 3, 4), randn(2, 2, 5, 4) * torch.nan, randn(2, 2, 5, 6)
    zeros = torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 5, dtype=torch.long)
    closed, open_ = torch.zeros(1, 1, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)
    for queries, keys, allow in (
        (*zeros, closed),
        (zeros[0] - 1, zeros[1], open_),
        (zeros[0], zeros[1] - 1, open_),
    ):
        out = isolated_attention(query, key, value, query_region=queries, key_region=keys, allow=allow)
        assert torch.equal(out, torch.zeros(2, 2, 3, 6).double())
    none = torch.zeros(1, 0, dtype=torch.long)
    out = isolated_attention(
        query, key[:, :, :0], value[:, :, :0], query_region=zeros[0], key_region=none, allow=open_
    )
    assert torch.equal(out, torch.zeros(2, 2, 3, 6).double())


@pytest.mark.parametrize("samples", [1, 2])
def test_the_same_as_groups_of_the_reweighted_kernel(samples: int) -> None:
    query, key, value = randn(2, 4, 40, 8), randn(2, 2, 90, 8), randn(2, 2, 90, 8)
    regions = Isolation(
        torch.randint(-1, 3, (samples, 40)),
        torch.randint(-1, 4, (1, 90)).sort().values,
        torch.rand(3, 4) > 0.4,
    )
    groups, allow = allow_groups(regions)
    assert groups.count == 5
    got = reweighted_attention(query, key, value, groups, identity, allow=allow, enable_gqa=True)
    wanted = regions.attend(query, key, value, enable_gqa=True)
    torch.testing.assert_close(got.out, wanted, **CLOSE)
    assert got.masses is not None
    assert not got.masses[..., 4].any()
    seen = (regions.query_region >= 0).expand(2, -1)[:, None] & wanted.any(-1)
    torch.testing.assert_close(got.masses.sum(-1), seen.double(), **CLOSE)


def scene(targets: Tensor, kept: Tensor, subjects: list[int]) -> Tensor:
    """(N, n + N) what a scene's position sees, by the words of the method."""
    count, size = targets.shape
    seen = torch.zeros(size, len(subjects) + size, dtype=torch.bool)
    for p in range(size):
        for at, i in enumerate(subjects):
            seen[p, at] = kept[i, p]
        for q in range(size):
            cut = any(targets[i, p] and targets[j, q] for i in range(count) for j in range(count) if i != j)
            seen[p, len(subjects) + q] = not cut
    return seen


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_scene_with_references(count: int) -> None:
    size, batch = 12, 2
    masks = torch.rand(count, size) > 0.6
    masks[1:2] = False  # a subject that is nowhere in its reference
    targets = torch.rand(count, size) > 0.6  # they overlap
    kept = targets & (torch.rand(count, size) > 0.5)
    references = [randn(batch, count, 2, size, 3) for _ in range(2)]
    query, *own = randn(batch, 4, size, 3), randn(batch, 2, size, 3), randn(batch, 2, size, 3)
    key, value, subjects = subject_keys(*references, masks)
    pairs = [(s, p) for s in range(count) for p in range(size) if masks[s, p]]
    assert subjects.tolist() == [s for s, _ in pairs]
    assert key.shape == (batch, 2, len(pairs), 3)
    for at, (s, p) in enumerate(pairs):
        assert torch.equal(key[:, :, at], references[0][:, s, :, p])
        assert torch.equal(value[:, :, at], references[1][:, s, :, p])
    joined = torch.cat([key, own[0]], 2), torch.cat([value, own[1]], 2)
    for dropped in (None, kept):
        regions = reference_regions(targets, subjects, dropped)
        seen = scene(targets, targets if dropped is None else kept, subjects.tolist())
        got = regions.attend(query, *joined, enable_gqa=True)
        torch.testing.assert_close(got, formula(query, *joined, seen.expand(batch, -1, -1)), **CLOSE)
    alone = reference_regions(targets, subjects[:0]).attend(query, *own, enable_gqa=True)
    seen = scene(targets, targets, [])
    torch.testing.assert_close(alone, formula(query, *own, seen.expand(batch, -1, -1)), **CLOSE)


def test_two_apart_subjects_cost_three_calls() -> None:
    targets = torch.zeros(2, 10, dtype=torch.bool)
    targets[0, :3] = targets[1, 6:] = True
    subjects = torch.tensor([0, 0, 1])
    (part,) = reference_regions(targets, subjects).parts
    calls = [(torch.arange(10)[call.rows], torch.arange(13)[call.keys]) for call in part.calls]
    sizes = sorted((len(rows), len(keys)) for rows, keys in calls)
    assert sizes == [(3, 2 + 6), (3, 10), (4, 1 + 7)]
    rows = torch.cat([rows for rows, _ in calls]).sort().values
    assert all(b - a == 1 for a, b in pairwise(rows.tolist()))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"query_region": torch.full((1, 3), 2)}, "query_region runs from 2 to 2, but allow of shape"),
        ({"key_region": torch.full((1, 5), -2)}, "key_region runs from -2"),
        ({"key_region": torch.zeros(1, 5)}, "key_region must be integers"),
        ({"query_region": torch.zeros(3).long()}, "query_region must be integers"),
        ({"allow": torch.ones(2, 2)}, "allow must be bool"),
        ({"query_region": torch.zeros(1, 4).long()}, "query_region of shape"),
        ({"key_region": torch.zeros(3, 5).long()}, "key_region of shape"),
        ({"value": torch.zeros(2, 2, 4, 4)}, "do not fit"),
        ({"query": torch.zeros(2, 2, 3, 3)}, "do not fit"),
    ],
)
def test_bad_input_is_told(change: dict[str, Any], told: str) -> None:
    given: dict[str, Any] = {
        "query": torch.zeros(2, 2, 3, 4),
        "key": torch.zeros(2, 2, 5, 4),
        "value": torch.zeros(2, 2, 5, 4),
        "query_region": torch.zeros(1, 3, dtype=torch.long),
        "key_region": torch.zeros(1, 5, dtype=torch.long),
        "allow": torch.ones(2, 2, dtype=torch.bool),
    }
    with pytest.raises(ValueError, match=told):
        isolated_attention(**(given | change))


def test_bad_references_are_told() -> None:
    key, masks = torch.zeros(1, 2, 3, 4, 5), torch.ones(2, 4, dtype=torch.bool)
    for bad in (masks[0], masks[:1], masks[:, :3], masks.long()):
        with pytest.raises(ValueError, match="do not fit"):
            subject_keys(key, key, bad)
    with pytest.raises(ValueError, match="targets and kept"):
        reference_regions(masks, torch.zeros(3).long(), masks[:, :2])
    with pytest.raises(ValueError, match="subjects must"):
        reference_regions(masks, torch.zeros(1, 3).long())
    with pytest.raises(ValueError, match="2 samples, key_region 3"):
        Isolation(torch.zeros(2, 3).long(), torch.zeros(3, 5).long(), torch.ones(1, 1, dtype=torch.bool))
