"""Columns of the probs and their flow through layers, against loops over the definition in float64."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from problems import Largest
from torch import Tensor

from regard.kernels import maps
from regard.kernels.maps import attention_flow, causal_ramp, concept_maps, head_weights, layer_map

CLOSE = {"atol": 1e-12, "rtol": 1e-12}


def randn(*shape: int, **kw: Any) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, **kw)


def probs_of(
    query: Tensor, key: Tensor, scale: float | None = None, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """(B, H, Q, K) one prob at a time; rows that see nothing are zero."""
    batch, heads, rows, width = query.shape
    keys, together = key.shape[2], heads // key.shape[1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    out = torch.zeros(batch, heads, rows, keys, dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in (batch, heads, rows))).tolist():
        seen = {}
        for j in range(keys):
            told = True if mask is None else mask.expand(batch, heads, rows, keys)[b, h, i, j].item()
            told = 0.0 if told is True else -math.inf if told is False else told
            if told > -1e30 and not (causal and j > keys - rows + i):
                seen[j] = float(query[b, h, i].double() @ key[b, h // together, j].double()) * scale + told
        top = max(seen.values(), default=0.0)
        total = sum(math.exp(s - top) for s in seen.values())
        for j, score in seen.items():
            out[b, h, i, j] = math.exp(score - top) / total
    return out


def masks(batch: int, heads: int, rows: int, keys: int) -> Iterator[Tensor | None]:
    """None; left padding; a bool mask of each head with blind rows; a float one with the lowest numbers."""
    yield None
    yield (torch.arange(keys) >= torch.arange(batch)[:, None] * 2)[:, None, None]
    some = torch.rand(batch, heads, rows, keys) > 0.4
    some[0, 0, rows // 2] = False
    yield some
    added = randn(1, 1, rows, keys)
    added[..., rows - 1, :] = torch.finfo(torch.float64).min
    added[..., 0, 1:] = -math.inf
    yield added


SHAPES = [(1, 1, 1, 1, 1), (2, 4, 2, 5, 7), (2, 3, 3, 7, 5), (3, 6, 1, 1, 9)]  # B, H, H_kv, Q, K


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_columns_are_the_definition(
    shape: tuple[int, ...], causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, heads, kv, rows, keys = shape
    query, key = randn(batch, heads, rows, 3), randn(batch, kv, keys, 3)
    tokens = torch.randint(0, keys, (4,))
    for mask in masks(batch, heads, rows, keys):
        wanted = probs_of(query, key, 0.7, causal, mask)
        for block in (1, 2 * keys * batch, 1 << 20):  # one row at a time, a few, all
            monkeypatch.setattr(maps, "BLOCK", block)
            got = concept_maps(query, key, tokens, scale=0.7, causal=causal, mask=mask)
            torch.testing.assert_close(got, wanted.mean(1)[..., tokens], **CLOSE)
            each = concept_maps(query, key, tokens.tolist(), scale=0.7, causal=causal, mask=mask, reduce=None)
            torch.testing.assert_close(each, wanted[..., tokens], **CLOSE)


@pytest.mark.parametrize("causal", [False, True])
def test_ragged_tokens_and_rows(causal: bool) -> None:
    query, key = randn(2, 4, 6, 5), randn(2, 2, 9, 5)
    tokens, rows = torch.tensor([[0, 8, 3], [4, -1, -1]]), torch.tensor([[5, 2], [0, -1]])
    for mask in masks(2, 4, 6, 9):
        probs = probs_of(query, key, None, causal, mask)
        got = concept_maps(query, key, tokens, causal=causal, mask=mask, rows=rows, reduce=None)
        for b in range(2):
            for t, token in enumerate(tokens[b].tolist()):
                for r, row in enumerate(rows[b].tolist()):
                    absent = token < 0 or row < 0
                    wanted = torch.zeros(4).double() if absent else probs[b, :, row, token]
                    torch.testing.assert_close(got[b, :, r, t], wanted, **CLOSE)
        mean = concept_maps(query, key, tokens, causal=causal, mask=mask, rows=rows)
        torch.testing.assert_close(mean, got.mean(1), **CLOSE)
        shared = concept_maps(query, key, [1, 2], causal=causal, mask=mask, rows=[3])
        torch.testing.assert_close(shared, probs.mean(1)[:, 3:4, 1:3], **CLOSE)


def test_all_columns_sum_to_one_and_nothing_asked_gives_nothing() -> None:
    query, key = torch.randn(2, 4, 5, 8).bfloat16(), torch.randn(2, 4, 11, 8).bfloat16()
    whole = concept_maps(query, key, range(11))
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole.sum(-1), torch.ones(2, 5))
    assert concept_maps(query, key, []).shape == (2, 5, 0)
    assert concept_maps(query, key, [0], rows=[]).shape == (2, 0, 1)
    assert not concept_maps(query, key, [-1, -1]).any()


@pytest.mark.parametrize("kept", [1 << 23, 0])
@pytest.mark.parametrize("reduce", ["mean", None])
def test_the_gradient_of_both_paths(kept: int, reduce: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "KEPT", kept)
    monkeypatch.setattr(maps, "BLOCK", 16)  # split over heads and rows where not kept
    query, key = randn(2, 4, 3, 1, requires_grad=True), randn(2, 2, 5, 1, requires_grad=True)
    mask = torch.rand(2, 1, 3, 5) > 0.4
    mask[0, :, 1] = False
    for tokens in (torch.tensor([1, 4]), torch.tensor([[1, 4], [2, -1]])):

        def columns(query: Tensor, key: Tensor, tokens: Tensor = tokens) -> Tensor:
            return concept_maps(query, key, tokens, mask=mask, reduce=reduce, causal=True)

        assert torch.autograd.gradcheck(columns, (query, key))
        assert torch.autograd.gradgradcheck(columns, (query, key), fast_mode=True)
        with torch.no_grad():
            plain = columns(query, key)
        torch.testing.assert_close(columns(query, key), plain, **CLOSE)


def test_blind_rows_have_a_zero_gradient() -> None:
    query, key = randn(1, 2, 3, 4, requires_grad=True), randn(1, 2, 5, 4, requires_grad=True)
    out = concept_maps(query, key, [0, 1], mask=torch.zeros(5, dtype=torch.bool))
    grads = torch.autograd.grad(out.sum(), (query, key))
    assert not out.any()
    assert not any(grad.any() for grad in grads)
    early = concept_maps(randn(1, 2, 7, 4), key, [0, 1], causal=True)  # rows 0 and 1 come before every key
    assert not early[:, :2].any()
    assert (early[:, 2:, 0] > 0).all()


def test_the_probs_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, heads, rows, keys = 2, 8, 200, 300
    whole = batch * heads * rows * keys
    monkeypatch.setattr(maps, "BLOCK", whole // 40)
    monkeypatch.setattr(maps, "KEPT", whole // 40)
    query, key = torch.randn(batch, heads, rows, 4), torch.randn(batch, 2, keys, 4)
    with Largest() as largest:
        concept_maps(query, key, [1, 2], causal=True)
        head_weights(query, key)
    assert largest.size <= whole // 40
    with Largest() as largest:
        concept_maps(query.requires_grad_(), key.requires_grad_(), [1, 2], causal=True).sum().backward()
    assert largest.size <= whole // 40
    square, start = torch.randn(batch, heads, keys, 4), torch.randn(batch, 1, keys)
    with Largest() as largest:
        attention_flow([(square, key)] * 2, start)
    assert largest.size <= whole // 40
    with Largest() as largest:
        layer_map(square, key)
    assert largest.size == batch * keys * keys


def test_many_probs_are_not_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(1, 4, 64, 2, requires_grad=True), torch.randn(1, 4, 96, 2)
    whole, sizes = 4 * 64 * 96, []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    for kept in (whole, whole - 1):
        monkeypatch.setattr(maps, "KEPT", kept)
        monkeypatch.setattr(maps, "BLOCK", whole // 16)
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            concept_maps(query, key, [3])
        assert (sum(sizes) >= whole) == (kept == whole)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 4, 2, 6, 6), (2, 3, 1, 4, 9)])
@pytest.mark.parametrize("block", [1, 60, 1 << 20])
def test_head_weights_and_layer_map(
    shape: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps, "BLOCK", block)
    batch, heads, kv, rows, keys = shape
    query, key = randn(batch, heads, rows, 3) * 2, randn(batch, kv, keys, 3)
    for mask in masks(batch, heads, rows, keys):
        probs = probs_of(query, key, None, True, mask)
        weights = torch.zeros(batch, heads).double()
        for b in range(batch):
            for h in range(heads):
                peaks = [max(row) for row in probs[b, h].tolist() if sum(row)]
                weights[b, h] = sum(peaks) / len(peaks) if peaks else 0
        got = head_weights(query, key, mask=mask)
        torch.testing.assert_close(got, weights, **CLOSE)
        wanted = sum(probs[:, h] * weights[:, h, None, None] for h in range(heads)) / heads
        torch.testing.assert_close(layer_map(query, key, got, mask=mask), wanted, **CLOSE)
        torch.testing.assert_close(layer_map(query, key, mask=mask), probs.mean(1), **CLOSE)


def recursion(layers: list[Tensor]) -> Tensor:
    """F_L of `F_l = (I + S_l)(I + F_(l-1))`, F_0 = 0, from the first layer to the last."""
    one = torch.eye(layers[0].shape[-1], dtype=torch.float64)
    flow = torch.zeros_like(layers[0])
    for layer in layers:
        flow = (one + layer) @ (one + flow)
    return flow


@pytest.mark.parametrize("regularise", [False, True])
def test_rows_of_the_flow_are_those_of_the_recursion(regularise: bool) -> None:
    size, depth = 11, 6
    layers = [randn(2, size, size).abs().tril() / size for _ in range(depth)]
    sees = [size - j for j in range(size)]  # L0, how many rows see column j
    ramp = torch.tensor([1 - (count - 1) / size for count in sees], dtype=torch.float64)
    wanted = recursion([layer * ramp if regularise else layer for layer in layers])
    start = torch.zeros(2, 3, size).double()
    start[0, range(3), [10, 4, 0]] = start[1, range(3), [7, 7, 2]] = 1
    got = attention_flow(reversed(layers), start, regularise=regularise)
    whole = torch.stack([wanted[0, [10, 4, 0]], wanted[1, [7, 7, 2]]])
    torch.testing.assert_close(got, whole, **CLOSE)


def test_the_flow_of_queries_and_keys_is_that_of_their_maps() -> None:
    given = [(randn(2, 4, 8, 5), randn(2, 2, 8, 5)) for _ in range(3)]
    mask = torch.ones(2, 1, 1, 8, dtype=torch.bool)
    mask[1, ..., :3] = False
    start = torch.eye(8).double()[None, 5:].expand(2, -1, -1)
    layers = [layer_map(q, k, head_weights(q, k, mask=mask), mask=mask) for q, k in given]
    wanted = recursion(layers)[:, 5:]
    for form in (layers, given, [lambda pair=pair: pair for pair in given]):
        torch.testing.assert_close(attention_flow(form[::-1], start, mask=mask), wanted, **CLOSE)
    assert not torch.allclose(wanted, recursion(layers[::-1])[:, 5:])


def test_padding_does_not_change_a_samples_flow() -> None:
    pairs = [(randn(1, 2, 6, 4), randn(1, 2, 6, 4)) for _ in range(3)]
    start = torch.eye(6).double()[None, 4:]
    alone = attention_flow(pairs, start, regularise=True)
    padded = [tuple(torch.cat([randn(1, 2, 3, 4), part], 2) for part in pair) for pair in pairs]
    real = torch.arange(9)[None] >= 3
    wide = torch.cat([torch.zeros(1, 2, 3).double(), start], 2)
    got = attention_flow(padded, wide, regularise=True, real=real, mask=real[:, None, None])
    torch.testing.assert_close(got[..., 3:], alone, **CLOSE)
    assert not got[..., :3].any()
    assert causal_ramp(4).tolist() == [[0.25, 0.5, 0.75, 1.0]]
    assert causal_ramp(3, torch.zeros(1, 3, dtype=torch.bool)).tolist() == [[0, 0, 0]]


def test_only_one_layer_of_a_generator_is_alive() -> None:
    made: list[Any] = []

    def layers() -> Iterator[Tensor]:
        for _ in range(4):
            assert all(ref() is None for ref in made)
            layer = torch.rand(1, 3, 3)
            made.append(weakref.ref(layer))
            yield layer
            del layer

    attention_flow(layers(), torch.eye(3)[None])
    assert len(made) == 4


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tokens": [5]}, "run from 5 to 5; give 0 to 4"),
        ({"tokens": [-2]}, "run from -2"),
        ({"tokens": [0.5]}, "must be integers"),
        ({"tokens": torch.zeros(3, 1).long()}, "3 samples, but query has 2"),
        ({"rows": [7]}, "rows run from 7 to 7"),
        ({"reduce": "sum"}, "reduce is 'sum'"),
        ({"mask": torch.ones(4, 5)}, "does not broadcast"),
        ({"key": torch.zeros(2, 3, 5, 2)}, "4 query heads for 3"),
        ({"key": torch.zeros(2, 2, 0, 2)}, "none of them empty"),
        ({"key": torch.zeros(2, 5, 2)}, "4 dimensions"),
    ],
)
def test_bad_input_is_told(change: dict[str, Any], told: str) -> None:
    given: dict[str, Any] = {"query": torch.zeros(2, 4, 3, 2), "key": torch.zeros(2, 2, 5, 2), "tokens": [0]}
    with pytest.raises(ValueError, match=told):
        concept_maps(**(given | change))


def test_bad_flows_are_told() -> None:
    query, key = torch.zeros(1, 2, 3, 2), torch.zeros(1, 2, 5, 2)
    with pytest.raises(ValueError, match="weights must have the shape"):
        layer_map(query, key, torch.ones(2))
    with pytest.raises(ValueError, match="a layer of rows and keys"):
        attention_flow([(query, key)], torch.zeros(1, 1, 5))
    with pytest.raises(ValueError, match="a map of shape"):
        attention_flow([torch.zeros(1, 3, 3)], torch.zeros(1, 1, 5))
    with pytest.raises(ValueError, match="start must be floats"):
        attention_flow([], torch.zeros(1, 5))
    with pytest.raises(ValueError, match="regularise=True"):
        attention_flow([], torch.zeros(1, 1, 5), real=torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="real must be bool"):
        causal_ramp(5, torch.ones(1, 5))
