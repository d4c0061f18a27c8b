"""Policies against their definitions in plain floats."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from problems import G, bend, gains, seeded
from torch import Tensor

from regard.kernels.groups import Groups
from regard.kernels.policies import Drop, HeadScale, InTurn, Redistribute, Scale, identity, in_turn

CLOSE = {"atol": 1e-12, "rtol": 1e-12}
SHAPE = (2, 3, 40)


def masses_of(seed: object, count: int = G) -> Tensor:
    """(B, H, Q, G) rows that sum to 1, some with empty groups, some all in one group, and one that saw nothing."""
    rng = seeded(seed)
    weights = torch.rand(*SHAPE, count, generator=rng, dtype=torch.float64)
    weights = weights * (torch.rand(*SHAPE, count, generator=rng) > 0.3)
    masses = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    masses[0, 0, :count] = torch.eye(count, dtype=torch.float64)
    masses[0, 0, count] = 0
    return masses


COARSE = torch.eye(G)[[0, 1, 1, 0]][:, :2]
POLICIES: dict[str, Any] = {
    "identity": identity,
    "redistribute": Redistribute(),
    "redistribute all": Redistribute(1.0, 0.3, 0.0),
    "redistribute freely": Redistribute(0.25, 0.0, 0.0),
    "drop": Drop((0,)),
    "drop two": Drop((2, 3)),
    "drop bare": Drop((1, 3), renormalise=False),
    "drop all": Drop((0, 1, 2, 3)),
    "drop nothing": Drop(()),
    "scale": Scale((0.5, 2.0, 0.0, 1.0)),
    "scale to one": Scale((0.5, 2.0, 0.0, 1.0), renormalise=True),
    "heads": HeadScale(torch.tensor([0.5, 1.0, -2.0])),
    "heads of samples": HeadScale(torch.linspace(-1, 2, 6).double().reshape(2, 3)),
    "smooth": bend,
    "in turn": InTurn((Drop((1,)), bend, Scale((2.0, 0.5))), (COARSE, torch.eye(G), COARSE)),
    "sequence": [Redistribute(0.5, 0.0, 0.0), bend, Drop((0,))],
    "sequence of one": [Drop((0,))],
    "no policy": [],
}


@pytest.mark.parametrize("name", POLICIES)
def test_policies_are_their_definitions(name: str) -> None:
    policy, masses = POLICIES[name], masses_of(name)
    found = in_turn(policy, G)(masses)
    assert (found.shape, found.dtype) == (masses.shape, torch.float64)
    for b, h, row in itertools.product(*(range(size) for size in SHAPE)):
        want = torch.tensor(gains(policy, masses[b, h, row].tolist(), b, h), dtype=torch.float64)
        torch.testing.assert_close(found[b, h, row], want, **CLOSE, msg=str((name, b, h, row)))
    changes = not torch.allclose(found, torch.ones_like(found))
    assert changes == (name not in ("identity", "no policy"))
    single = in_turn(policy, G)(masses.float())
    assert single.dtype == torch.float32
    assert torch.isfinite(single).all()


@pytest.mark.parametrize("name", ["redistribute", "redistribute all", "drop", "drop two", "scale to one"])
def test_mass_is_kept(name: str) -> None:
    """What is taken away is given to others, where there are others."""
    masses = masses_of(name)
    coefficients = POLICIES[name](masses)
    left = (masses * coefficients).sum(-1)
    weighed = {"drop": [1], "drop two": [0], "scale to one": [0]}
    kept = torch.ones(SHAPE, dtype=torch.bool)
    if name in weighed:
        keeps = coefficients.new_tensor([g not in getattr(POLICIES[name], "groups", (2,)) for g in range(G)])
        kept = (masses * keeps).sum(-1) > 0
    else:
        kept = masses.sum(-1) > 0
    torch.testing.assert_close(left, kept.double(), **CLOSE)
    assert not kept.all()


def row(*masses: float) -> Tensor:
    return torch.tensor(masses, dtype=torch.float64).reshape(1, 1, 1, -1)


def acts(policy: Redistribute, *masses: float) -> bool:
    return not torch.equal(policy(row(*masses)), torch.ones(1, 1, 1, 4, dtype=torch.float64))


def test_gates_of_redistribute_are_open_at_their_thresholds() -> None:
    """Powers of two, so that the masses and their sums are exact."""
    tiny = 2.0**-40
    least = Redistribute(0.5, 0.0, 0.25)
    assert acts(least, 0.75, 0.125, 0.125, 0.0)
    assert not acts(least, 0.75 + tiny, 0.125 - tiny, 0.125, 0.0)
    share = Redistribute(0.5, 0.5, 0.0)
    assert acts(share, 0.5, 0.25, 0.25, 0.0)
    assert not acts(share, 0.5, 0.25 - tiny, 0.25 + tiny, 0.0)
    freely = Redistribute(0.5, 0.0, 0.0)
    assert acts(freely, 0.5, tiny, 0.5, 0.0)
    assert not acts(freely, 0.5, 0.0, 0.5, 0.0), "nowhere to move mass to"
    assert not acts(freely, 0.25, 0.5, 0.0, 0.25), "no sink in the image"
    assert acts(freely, 0.25, 0.5, tiny, 0.25)


def test_redistribute_moves_both_kinds_of_sinks_to_the_image() -> None:
    found = Redistribute(0.6)(row(0.1, 0.4, 0.3, 0.2))
    torch.testing.assert_close(found, row(1.0, 1 + 0.6 * 0.5 / 0.4, 0.4, 0.4), **CLOSE)


def test_dropping_all_that_is_there_leaves_nothing() -> None:
    for policy in (Drop((0, 1, 2, 3)), Drop((1,)), Scale((1.0, 0.0, 1.0, 1.0), renormalise=True)):
        assert not (policy(row(0.0, 1.0, 0.0, 0.0)) * row(0.0, 1.0, 0.0, 0.0)).any()
        assert torch.isfinite(policy(row(0.0, 0.0, 0.0, 0.0))).all()


def test_a_factor_for_each_group_or_none() -> None:
    with pytest.raises(ValueError, match="3 factors for 4 groups"):
        Scale((1.0, 2.0, 3.0))(row(0.25, 0.25, 0.25, 0.25))


def test_policies_on_groupings_of_their_own() -> None:
    """The refined groups of two partitions: each policy sees its own masses, the second what the first left."""
    one, two = torch.tensor([[0, 0, 1, 1, 2, 2]]), torch.tensor([[0, 1, 0, 1, 0, 1]])
    refined, of = Groups.product([Groups(one, 3), Groups(two, 2)])
    probs = torch.tensor([0.05, 0.15, 0.1, 0.3, 0.25, 0.15], dtype=torch.float64)
    member = refined.member[0, 0].double()
    seen: list[Tensor] = []

    def spy(masses: Tensor) -> Tensor:
        seen.append(masses.flatten())
        return Scale((2.0, 0.5))(masses)

    found = InTurn((Drop((1,)), spy), of)((probs @ member).reshape(1, 1, 1, -1)).flatten()
    kept = torch.tensor([1, 1, 0, 0, 1, 1]).double() / 0.6
    left = probs * kept
    torch.testing.assert_close(seen[0], torch.stack([left[0::2].sum(), left[1::2].sum()]), **CLOSE)
    want = kept * torch.tensor([2, 0.5] * 3).double()
    torch.testing.assert_close(member @ found, want, atol=1e-6, rtol=0)


def test_gradients_of_policies_are_finite_at_empty_groups() -> None:
    for name, policy in POLICIES.items():
        masses = masses_of(name).requires_grad_()
        found = in_turn(policy, G)(masses)
        if found.requires_grad:
            (grad,) = torch.autograd.grad((found * masses).sum(), masses)
            assert torch.isfinite(grad).all(), name
