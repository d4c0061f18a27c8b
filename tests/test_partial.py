"""Partials against the softmax and log-sum-exp of their scores, and any split put together again."""

from __future__ import annotations

import itertools

import pytest
import torch
from problems import inputs_of, seeded
from torch import Tensor
from torch.nn import functional as F

from regard.kernels import partial as module
from regard.kernels.partial import group_masses, log_total, merge_partials, partial, share_of

NEAR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def scores_of(query: Tensor, key: Tensor, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.double() @ key.double().transpose(2, 3) * scale
    scores = scores if mask is None else scores + mask.double()
    hidden = ~torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(hidden, -torch.inf) if causal else scores


def masks(batch: int, heads: int, rows: int, keys: int) -> dict[str, Tensor | None]:
    rng = seeded(rows, keys)
    bias = torch.randn(batch, heads, rows, keys, generator=rng).mul(8).round() / 8  # exact in every dtype
    blind = bias.masked_fill(torch.rand(bias.shape, generator=rng) < 0.4, -torch.inf)
    blind[:, :, rows // 2] = -torch.inf
    keys_of_samples = torch.zeros(batch, 1, 1, keys)
    keys_of_samples[0, ..., : keys // 2 + 1] = -torch.inf
    return {"none": None, "bias": bias[:1, :1], "heads": bias, "blind": blind, "keys": keys_of_samples}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", NEAR)
def test_a_partial_is_softmax_and_log_sum_exp(dtype: torch.dtype, causal: bool) -> None:
    for heads, rows, keys, wide in itertools.product(((4, 4), (4, 2)), (1, 5, 40), (1, 3, 33, 70), (8, 5)):
        inputs = inputs_of(seeded(heads, rows, keys), heads, rows, keys, batch=2, wide=wide)
        query, key, value = (x.to(dtype) for x in inputs)
        for kind, mask in masks(2, 4, rows, keys).items():
            case = (heads, rows, keys, wide, kind)
            added = None if mask is None else mask.to(torch.promote_types(dtype, torch.float32))
            out, lse = partial(query, key, value, 0.4, causal, added)
            scores = scores_of(query, key, 0.4, causal, mask if mask is None else added.to(dtype))
            many = value.double().repeat_interleave(4 // heads[1], 1)
            want = scores.softmax(-1).nan_to_num(0) @ many
            assert (out.dtype, lse.dtype) == (dtype, torch.promote_types(dtype, torch.float32)), case
            assert (out.double() - want).abs().max() < NEAR[dtype], case
            total = scores.logsumexp(-1)
            assert torch.equal(lse == -torch.inf, total == -torch.inf), case
            near = max(2 * NEAR[dtype] if dtype in (torch.float64, torch.float32) else 1e-3, 1e-12)
            assert (lse.double() - total).nan_to_num(0).abs().max() < near, case


def test_blocks_of_rows_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where scores are formed, a few rows at a time: forward and backward."""
    for causal in (False, True):
        query, key, value = inputs_of(seeded(causal), (4, 2), 13, 17, batch=2, wide=5)
        mask = masks(2, 4, 13, 17)["blind"].double()
        found = []
        for chunk in (1 << 22, 300):
            monkeypatch.setattr(module, "CHUNK", chunk)
            wanted = [x.clone().requires_grad_() for x in (query, key, value)]
            out, lse = partial(*wanted, 0.5, causal, mask)
            grads = torch.autograd.grad(out.sin().sum() + lse.exp().sum(), wanted)
            found.append((out, lse, *grads))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("wide", [3, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_take_the_log_sum_exp_into_account(causal: bool, wide: int) -> None:
    query, key, value = inputs_of(seeded(wide), (2, 1), 4, 6, batch=2, width=3, wide=wide)
    for kind, mask in masks(2, 2, 4, 6).items():
        mask = None if mask is None else mask.double()

        def call(*inputs: Tensor, mask: Tensor | None = mask) -> tuple[Tensor, Tensor]:
            out, lse = partial(*inputs, 0.7, causal, mask)
            return out, lse.exp()

        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        assert torch.autograd.gradcheck(call, inputs), kind


def split(keys: int, *at: int) -> list[slice]:
    return [slice(start, stop) for start, stop in itertools.pairwise((0, *at, keys))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [(), (1,), (5, 6), (3, 9, 20, 28)])
def test_any_split_merges_to_plain_attention(at: tuple[int, ...], dtype: torch.dtype) -> None:
    query, key, value = (x.to(dtype) for x in inputs_of(seeded(at), (4, 2), 7, 29, batch=2))
    parts = [partial(query, key[:, :, own], value[:, :, own], 0.6) for own in split(29, *at)]
    outs, lses = zip(*parts, strict=True)
    wide = (x.double() for x in (query, key, value))
    want = F.scaled_dot_product_attention(*wide, scale=0.6, enable_gqa=True)
    merged = merge_partials(outs, lses)
    assert merged.dtype == lses[0].dtype
    assert (merged.double() - want).abs().max() < NEAR[dtype]
    scores = scores_of(query, key, 0.6, False, None)
    near = max(NEAR[dtype] if dtype != torch.bfloat16 else 1e-4, 1e-12)
    assert (log_total(lses).double() - scores.logsumexp(-1)).abs().max() < 2 * near
    groups = [index % 2 for index in range(len(outs))]
    masses = group_masses(lses, groups, 3)
    shares = [scores.softmax(-1)[..., own].sum(-1) for own in split(29, *at)]
    for group in range(3):
        own = [share for share, g in zip(shares, groups, strict=True) if g == group]
        total = sum(own, torch.zeros_like(shares[0]))
        assert (masses[..., group] - total).abs().max() < near


def test_coefficients_multiply_groups_and_short_partials_are_the_last_rows() -> None:
    query, key, value = inputs_of(seeded("merge"), (2, 2), 6, 20)
    lower, upper = (key[:, :, :12], value[:, :, :12]), (key[:, :, 12:], value[:, :, 12:])
    first, last = partial(query, *lower, 0.6), partial(query[:, :, 4:], *upper, 0.6)
    lses = [first[1], torch.cat([torch.full((1, 2, 4), -torch.inf).double(), last[1]], 2)]
    gain = torch.rand(1, 2, 6, 2, generator=seeded("gain")).double()
    found = merge_partials([first[0], last[0]], lses, [1, 0], gain)
    scores = query @ key.transpose(2, 3) * 0.6
    scores[:, :, :4, 12:] = -torch.inf
    spread = torch.cat([gain[..., 1:].expand(-1, -1, -1, 12), gain[..., :1].expand(-1, -1, -1, 8)], -1)
    torch.testing.assert_close(found, (scores.softmax(-1) * spread) @ value, atol=1e-12, rtol=1e-12)


def test_nothing_seen_is_nothing() -> None:
    nothing = torch.full((1, 2, 3), -torch.inf)
    assert not share_of(nothing, log_total([nothing, nothing])).any()
    assert not merge_partials([torch.ones(1, 2, 3, 4)] * 2, [nothing] * 2).any()
    assert not group_masses([nothing], [1], 2).any()
    with pytest.raises(ValueError, match="no partials to merge"):
        merge_partials([], [])
