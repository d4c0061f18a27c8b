"""The group-mass kernel against one formula per output element, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from regard.kernels.reweighted import Reweighted, Reweighting, reweighted_rows

CLOSE = {"atol": 1e-12, "rtol": 1e-12}
Policy = Callable[[Tensor], Tensor]


def formula(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, steps: list[Reweighting]
) -> tuple[Tensor, list[Tensor]]:
    """Out (B, Q, H, D) and masses (B, H, Q, G), one (sample, head, row) at a time."""
    batch, heads, rows, _ = query.shape
    out = torch.zeros(batch, rows, heads, value.shape[-1], dtype=torch.float64)
    masses = [torch.zeros(batch, heads, rows, s.member.shape[-1], dtype=torch.float64) for s in steps]
    for b in range(batch):
        for h in range(heads):
            shared = h // (heads // key.shape[1])
            for q in range(rows):
                scores = (key[b, shared].double() @ query[b, h, q].double() * scale).tolist()
                if mask is not None:
                    allowed = mask.expand(batch, heads, rows, len(scores))[b, h, q].tolist()
                    added = [0.0 if x is True else -math.inf if x is False else x for x in allowed]
                    scores = [s + a for s, a in zip(scores, added, strict=True)]
                top = max(scores)
                weights = [math.exp(s - top) for s in scores]
                probs = [w / sum(weights) for w in weights]
                for kept, step in zip(masses, steps, strict=True):
                    group = step.member[b].argmax(-1).tolist()
                    for k, g in enumerate(group):
                        kept[b, h, q, g] += probs[k]
                    gain = step.policy(kept[b, h, q])
                    probs = [p * float(gain[g]) for p, g in zip(probs, group, strict=True)]
                for k, p in enumerate(probs):
                    out[b, q, h] += p * value[b, shared, k].double()
    return out, masses


def identity(masses: Tensor) -> Tensor:
    return torch.ones_like(masses)


def move(masses: Tensor) -> Tensor:
    """0.6 of the mass of groups 2 and 3 to group 1, where 1 and 2 together have a fifth."""
    image, sinks = masses[..., 1], masses[..., 2] + masses[..., 3]
    chosen = (image + masses[..., 2] >= 0.2) & (image > 0)
    gain = torch.where(chosen, 1 + 0.6 * sinks / image.clamp_min(1e-300), 1.0)
    keep = torch.where(chosen, 0.4, 1.0).to(masses)
    return torch.stack([torch.ones_like(image), gain, keep, keep], -1)


def bend(masses: Tensor) -> Tensor:
    """Smooth, nonlinear and not mass-preserving."""
    return 1 + masses.square() - 0.5 * masses.roll(1, -1).sin()


def member(groups: Tensor, count: int = 4) -> Tensor:
    return torch.nn.functional.one_hot(groups, count).float()


def problem(batch: int, heads: int, kv: int, rows: int, keys: int, width: int, wide: int) -> tuple[Any, ...]:
    rng = torch.Generator().manual_seed(rows * 100 + keys)
    make = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    groups = torch.randint(0, 4, (batch, keys), generator=rng)
    return make(batch, heads, rows, width), make(batch, kv, keys, width), make(batch, kv, keys, wide), groups


def assert_formula(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, steps: list[Reweighting], **close: Any
) -> Reweighted:
    found = reweighted_rows(q, k, v, mask, scale, steps)
    out, masses = formula(q, k, v, mask, scale, steps)
    torch.testing.assert_close(found.out.double(), out, **(close or CLOSE))
    for got, want in zip(found.masses, masses, strict=True):
        torch.testing.assert_close(got.double(), want, **(close or CLOSE))
    return found


# batch, heads, kv heads, rows, keys, width, width of values
SHAPES = [
    (1, 1, 1, 1, 1, 4, 4),
    (1, 4, 4, 1, 17, 8, 8),
    (2, 6, 3, 5, 13, 7, 5),
    (3, 8, 2, 3, 31, 16, 16),
    (2, 4, 1, 2, 33, 9, 9),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", [identity, move, bend])
def test_equals_the_formula(shape: tuple[int, ...], policy: Policy) -> None:
    q, k, v, groups = problem(*shape)
    found = assert_formula(q, k, v, None, 0.37, [Reweighting(member(groups), policy)])
    assert found.out.shape == (shape[0], shape[3], shape[1], shape[6])
    plain = reweighted_rows(q, k, v, None, 0.37, []).out
    assert torch.allclose(found.out, plain) == (policy is identity or (policy is move and shape[4] == 1))


def test_no_policy_is_plain_attention() -> None:
    q, k, v, _ = problem(2, 6, 3, 5, 13, 8, 8)
    found = reweighted_rows(q, k, v, None, 0.3, [])
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found.out, want.transpose(1, 2), **CLOSE)
    assert found.masses == []
    assert found.out.is_contiguous()


@pytest.mark.parametrize("mass", [0.3, 0.7, 0.9, 0.999, 0.9999])
def test_a_planted_sink_of_any_mass(mass: float) -> None:
    """Key 2 gets that mass in each row; the rest of the row is small beside it."""
    q, k, v, groups = problem(1, 2, 2, 4, 11, 4, 4)
    q[..., 0], k[..., 0] = 1.0, 0.0
    rest = torch.cat([q[..., 1:] @ k[..., 1:].transpose(2, 3)], -1)
    rest[..., 2] = -torch.inf
    level = rest.logsumexp(-1) + math.log(mass / (1 - mass))
    k[:, :, 2] = 0.0
    k[:, :, 2, 0] = 1.0
    q[..., 0] = level
    groups[:, 2] = 2
    groups[:, 3:6] = 1
    found = assert_formula(q, k, v, None, 1.0, [Reweighting(member(groups), move)])
    assert found.masses[0][..., 2].min() >= mass - 1e-9
    probs = (q @ k.transpose(2, 3)).softmax(-1)
    torch.testing.assert_close(probs[..., 2], torch.full_like(probs[..., 2], mass))
    single = reweighted_rows(q.float(), k.float(), v.float(), None, 1.0, [Reweighting(member(groups), move)])
    torch.testing.assert_close(single.out.double(), found.out, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("only", [0, 1, 2, 3])
def test_all_mass_on_one_group_and_none_on_the_others(only: int) -> None:
    q, k, v, _ = problem(2, 4, 2, 3, 9, 8, 8)
    groups = torch.full((2, 9), only)
    for policy in (move, bend):
        found = assert_formula(q, k, v, None, 0.5, [Reweighting(member(groups), policy)])
        want = torch.nn.functional.one_hot(torch.tensor(only), 4).double().expand_as(found.masses[0])
        torch.testing.assert_close(found.masses[0], want, **CLOSE)


@pytest.mark.parametrize("empty", [0, 1, 2, 3])
def test_an_empty_group(empty: int) -> None:
    q, k, v, groups = problem(2, 4, 2, 3, 9, 8, 8)
    groups[groups == empty] = (empty + 1) % 4
    found = assert_formula(q, k, v, None, 0.5, [Reweighting(member(groups), move)])
    assert found.masses[0][..., empty].eq(0).all()
    assert torch.isfinite(found.out).all()


def masks(rows: int, keys: int) -> dict[str, Tensor]:
    """Left padding with causality, (B, 1, Q, K) of bools or numbers; a bias; one mask per head."""
    causal = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    padded = causal & (torch.arange(keys) >= torch.tensor([[4], [0]]))[:, None, None]
    lowest = torch.finfo(torch.float64).min
    return {
        "bool": padded,
        "float": torch.zeros(2, 1, rows, keys, dtype=torch.float64).masked_fill(~padded, lowest),
        "float32": torch.zeros(2, 1, rows, keys).masked_fill(~padded, torch.finfo(torch.float32).min),
        "infinite": torch.zeros(2, 1, rows, keys, dtype=torch.float64).masked_fill(~padded, -torch.inf),
        "bias": torch.linspace(-3, 3, keys, dtype=torch.float64)[None, None, None],
        "heads": padded & (torch.rand(2, 4, 1, keys) > 0.2).index_fill(3, torch.tensor([5]), True),
    }


@pytest.mark.parametrize("kind", masks(5, 11))
def test_masks(kind: str) -> None:
    q, k, v, groups = problem(2, 4, 2, 5, 11, 8, 8)
    mask = masks(5, 11)[kind]
    found = assert_formula(q, k, v, mask, 0.5, [Reweighting(member(groups), move)])
    torch.testing.assert_close(found.masses[0].sum(-1), torch.ones(2, 4, 5, dtype=torch.float64))
    if kind != "bias":  # what is masked has no part in it
        changed = reweighted_rows(
            q,
            k.clone().index_fill(2, torch.tensor([10]), 99.0),
            v,
            mask,
            0.5,
            [Reweighting(member(groups), move)],
        )
        torch.testing.assert_close(changed.out[:, :-1], found.out[:, :-1], **CLOSE)


def test_bools_and_numbers_mask_alike() -> None:
    q, k, v, groups = problem(2, 4, 2, 5, 11, 8, 8)
    every = masks(5, 11)
    outs = [
        reweighted_rows(q, k, v, every[kind], 0.5, [Reweighting(member(groups), bend)]).out
        for kind in ("bool", "float", "float32", "infinite")
    ]
    for other in outs[1:]:
        torch.testing.assert_close(other, outs[0], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_row_that_sees_nothing_stays_finite(dtype: torch.dtype) -> None:
    """Padding rows are computed and thrown away; a NaN among them would spread through the next layers."""
    q, k, v, groups = (x.to(dtype) if x.is_floating_point() else x for x in problem(2, 4, 2, 5, 11, 8, 8))
    seen = masks(5, 11)["bool"].clone()
    seen[0, :, :2] = False
    lowest = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    for mask in (seen, lowest):
        found = reweighted_rows(q, k, v, mask, 0.5, [Reweighting(member(groups), move)])
        assert torch.isfinite(found.out).all()
        assert found.out.dtype == dtype
        assert found.masses[0].dtype == torch.float32
        want, _ = formula(q, k, v, masks(5, 11)["bool"], 0.5, [Reweighting(member(groups), move)])
        error = (found.out.double() - want)[0, 2:].abs().max() / want.abs().max()
        assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("policies", [(move, bend), (bend, move), (move, move)])
def test_the_second_policy_sees_what_the_first_left(policies: tuple[Policy, Policy]) -> None:
    q, k, v, groups = problem(2, 6, 3, 4, 19, 8, 8)
    mask = masks(4, 19)["bool"]
    other = (groups + torch.arange(19)) % 3
    steps = [Reweighting(member(groups), policies[0]), Reweighting(member(other, 5), policies[1])]
    if policies[1] is move:
        steps[1] = Reweighting(member(other), move)
    found = assert_formula(q, k, v, mask, 0.6, steps)
    swapped = reweighted_rows(q, k, v, mask, 0.6, steps[::-1])
    assert not torch.allclose(found.out, swapped.out)
    blind = reweighted_rows(q, k, v, mask, 0.6, steps[1:])
    assert not torch.allclose(found.masses[1], blind.masses[0])


def test_a_policy_gets_every_row_and_head_with_its_groups() -> None:
    seen: list[tuple[int, ...]] = []
    q, k, v, groups = problem(2, 6, 3, 4, 19, 8, 8)
    spy = lambda masses: (seen.append(tuple(masses.shape)), identity(masses))[1]  # noqa: E731
    reweighted_rows(q, k, v, None, 1.0, [Reweighting(member(groups, 7), spy)])
    assert seen == [(2, 6, 4, 7)]


def test_large_scores_do_not_overflow() -> None:
    q, k, v, groups = problem(1, 2, 1, 3, 9, 4, 4)
    assert_formula(q * 1e3, k, v, None, 1.0, [Reweighting(member(groups), move)])
    half = reweighted_rows(
        q.half() * 300, k.half() * 300, v.half(), None, 1.0, [Reweighting(member(groups), move)]
    )
    assert torch.isfinite(half.out).all()


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_gradients(mask: str | None) -> None:
    q, k, v, groups = problem(2, 4, 2, 3, 7, 4, 3)
    seen = None if mask is None else masks(3, 7)[mask]
    steps = [Reweighting(member(groups), bend), Reweighting(member(groups.flip(1)), bend)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        found = reweighted_rows(q, k, v, seen, 0.4, steps)
        return found.out, *found.masses

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in (q, k, v)])
