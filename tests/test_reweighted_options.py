"""The readable backend by one formula per output element, for every option; the torch paths by the readable one."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from problems import (
    G,
    Inputs,
    Largest,
    bend,
    force,
    formula,
    ids_of,
    inputs_of,
    louder,
    louder_score,
    plant,
    run,
    seeded,
    seen_of,
)
from torch import Tensor

from regard.kernels.groups import Groups
from regard.kernels.policies import Drop, HeadScale, InTurn, Redistribute, Scale, identity
from regard.kernels.problem import Unsupported

CLOSE = {"atol": 1e-12, "rtol": 1e-12}
ROWS, KEYS, BATCH, HEADS = 5, 23, 2, 4


def masks(rows: int = ROWS, keys: int = KEYS) -> dict[str, Tensor]:
    """Left padding as a bool and as numbers, a bias, and a mask of its own for each head."""
    seen = (torch.arange(keys) >= torch.tensor([[4], [0]]))[:, None, None].expand(2, 1, rows, keys)
    lowest, number = torch.finfo(torch.float64).min, torch.zeros(2, 1, rows, keys)
    own = torch.rand(2, 4, 1, keys, generator=seeded("mask")) > 0.2
    return {
        "bool": seen,
        "double": number.double().masked_fill(~seen, lowest),
        "single": number.masked_fill(~seen, torch.finfo(torch.float32).min),
        "half": number.half().masked_fill(~seen, torch.finfo(torch.float16).min),
        "infinite": number.double().masked_fill(~seen, -torch.inf),
        "bias": torch.linspace(-3, 3, keys, dtype=torch.float64)[None, None, None],
        "flat": torch.linspace(2, -2, keys, dtype=torch.float64),
        "rows": torch.randn(1, 1, rows, keys, generator=seeded("rows")).double(),
        "heads": own.index_fill(3, torch.tensor([5]), True),
        "blind": seen.clone().index_fill(2, torch.tensor([1, 4]), False),
    }


def options() -> dict[str, dict[str, Any]]:
    """Each option alone, and several at once. `allow` leaves row 3 nothing to see."""
    rng = seeded("options")
    allow = torch.rand(ROWS, G, generator=rng) > 0.3
    allow[3], allow[4] = False, True
    bias = torch.randn(HEADS, G, generator=rng).double()
    each = {f"mask {kind}": {"mask": mask} for kind, mask in masks().items()}
    return {
        **each,
        "nothing": {},
        "causal": {"causal": True},
        "scale": {"scale": 0.7},
        "bias": {"group_bias": bias[0]},
        "bias of heads": {"group_bias": bias},
        "score": {"score_mod": louder},
        "allow": {"allow": allow},
        "allow of samples": {"allow": torch.stack([allow, ~allow])},
        "rows": {"rows_from": 2, "causal": True, "mask": masks()["rows"]},
        "last row": {"rows_from": 4, "causal": True, "mask": masks()["heads"], "allow": allow[4:]},
        "all": {
            "causal": True,
            "mask": masks()["bool"],
            "scale": 0.3,
            "group_bias": bias,
            "allow": torch.stack([allow, allow.flip(1)])[:, 1:],
            "rows_from": 1,
        },
        "all and score": {"causal": True, "mask": masks()["blind"], "score_mod": louder, "group_bias": bias},
    }


def problem(kv: int = 2, wide: int = 6, kind: str = "ragged", keys: int = KEYS) -> tuple[Inputs, Tensor]:
    rng = seeded(kv, wide, kind, keys)
    inputs = inputs_of(rng, (HEADS, kv), ROWS, keys, batch=BATCH, width=7, wide=wide)
    return inputs, ids_of(kind, rng, BATCH, keys)


POLICIES = {
    "identity": identity,
    "smooth": bend,
    "redistribute": Redistribute(0.5, 0.1, 0.05),
    "drop": Drop((0, 2)),
    "heads of samples": HeadScale(torch.linspace(0.2, 1.8, HEADS * BATCH).reshape(BATCH, HEADS)),
    "sequence": [bend, Redistribute(0.5, 0.1, 0.05), Drop((3,))],
    "in turn": InTurn((Drop((0,)), bend), (torch.eye(G)[[0, 1, 1, 0]][:, :2], torch.eye(G))),
}


@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("name", options())
def test_readable_backend_equals_the_formula(name: str, kv: int) -> None:
    inputs, ids = problem(kv)
    given = options()[name]
    mod = {"score_mod": louder_score} if "score_mod" in given else {}
    for policy_name in ("smooth", "redistribute"):
        policy = POLICIES[policy_name]
        out, masses = formula(inputs, ids, policy, **{**given, **mod})
        found = run(inputs, ids, policy, backend="naive", **given)
        first = given.get("rows_from", 0)
        torch.testing.assert_close(found.out[:, :, first:], out, **CLOSE)
        torch.testing.assert_close(found.masses, masses, **CLOSE)
    if name != "nothing":
        plain = run(inputs, ids, policy, backend="naive", **{"rows_from": given.get("rows_from", 0)})
        assert not torch.allclose(plain.masses, found.masses), "the option must do something"


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_equals_the_formula(name: str) -> None:
    for kind in ("ragged", "scattered", "no sinks", "one"):
        inputs, ids = problem(kind=kind)
        out, masses = formula(inputs, ids, POLICIES[name], causal=True)
        found = run(inputs, ids, POLICIES[name], backend="naive", causal=True)
        torch.testing.assert_close(found.out, out, **CLOSE)
        torch.testing.assert_close(found.masses, masses, **CLOSE)


def test_second_policy_sees_what_the_first_left() -> None:
    inputs, ids = problem()
    steps = [Drop((1,), renormalise=False), bend]
    found, swapped = (run(inputs, ids, order, backend="naive") for order in (steps, steps[::-1]))
    assert not torch.allclose(found.out, swapped.out, atol=1e-3)
    left = found.masses.clone()
    left[..., 1] = 0
    gain = bend(left) * torch.tensor([1.0, 0, 1, 1])
    want = run(inputs, ids, lambda _: gain, backend="naive").out
    torch.testing.assert_close(found.out, want, **CLOSE)


@pytest.mark.parametrize("path", ["dense", "segments"])
@pytest.mark.parametrize("name", options())
def test_paths_take_every_option(name: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, with few and with many keys: with and without spans."""
    force(monkeypatch, "dense" if "score" in name else path)
    for keys, kind in ((23, "ragged"), (23, "scattered"), (90, "ragged"), (90, "aligned"), (90, "runs")):
        given = options()[name]
        if "mask" in given and keys != KEYS:
            given["mask"] = torch.cat([given["mask"].expand(*given["mask"].shape[:-1], KEYS)] * 4, -1)[
                ..., :keys
            ]
        for kv, wide in ((4, 7), (2, 7), (1, 9)) if keys == 90 else ((2, 7),):
            inputs, ids = problem(kv, wide, kind, keys)
            for policy in (bend, Drop((2, 3)), POLICIES["sequence"]):
                want = run(inputs, ids, policy, backend="naive", **given)
                found = run(inputs, ids, policy, **given)
                case = (name, path, keys, kind, kv, policy)
                first = given.get("rows_from", 0)
                error = (found.out - want.out)[:, :, first:].abs().max().nan_to_num(1)
                assert error < 1e-10, (case, error)
                assert (found.masses - want.masses).abs().max() < 1e-11, case


def test_a_row_that_sees_nothing_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, ids = problem()
    allow = torch.ones(ROWS, G, dtype=torch.bool)
    allow[3] = False
    blind = {"mask": masks()["blind"]}, {"allow": allow}, {"allow": allow, "mask": masks()["single"]}
    for path in ("naive", "dense", "segments"):
        with monkeypatch.context() as patch:
            if path != "naive":
                force(patch, path)
            for given in blind:
                found = run(inputs, ids, bend, backend="naive" if path == "naive" else "torch", **given)
                rows = [3] if "allow" in given else [1, 4]
                others = [row for row in range(ROWS) if row not in rows]
                assert not found.out[:, :, rows].any(), (path, given)
                assert not found.masses[:, :, rows].any(), (path, given)
                assert found.out[:, :, others].abs().amax(-1).min() > 0


@pytest.mark.parametrize("path", ["dense", "segments"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_scores_do_not_overflow(dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library keeps products of queries and keys in fp32; in fp16 these would be infinite."""
    force(monkeypatch, path)
    inputs, ids = problem(wide=7)
    q, k, v = (x.to(dtype) for x in inputs)
    found = run((q * 300, k * 300, v), ids, Scale((0.5, 2.0, 0.1, 0.3)))
    assert torch.isfinite(found.out).all()
    torch.testing.assert_close(found.masses.sum(-1), torch.ones(BATCH, HEADS, ROWS))


def test_a_policy_gets_all_samples_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    for path in ("naive", "dense", "segments"):
        with monkeypatch.context() as patch:
            if path != "naive":
                force(patch, path)
            inputs, ids = problem(keys=90)
            spy = lambda masses: (seen.append(tuple(masses.shape)), bend(masses))[1]  # noqa: E731
            run(inputs, ids, spy, 7, rows_from=1, backend="naive" if path == "naive" else "torch")
    assert seen == [(BATCH, HEADS, ROWS - 1, 7)] * 3


def test_masses_are_given_only_when_asked_for() -> None:
    inputs, ids = problem()
    found = run(inputs, ids, bend, return_masses=False)
    assert found.masses is None
    assert torch.equal(found.out, run(inputs, ids, bend).out)


def test_planted_masses_are_found() -> None:
    for mass in (0.3, 0.9, 0.9999):
        inputs, ids = problem(kind="image", keys=60)
        inputs = plant(inputs, 9, mass, seen_of(ROWS, 60, True), 0.5)
        ids[:] = 0
        ids[:, 9] = 2
        for backend in ("naive", "torch"):
            found = run(inputs, ids, bend, causal=True, scale=0.5, backend=backend)
            assert (found.masses[..., 2] - mass).abs().max() < 1e-12


def wrong() -> dict[str, tuple[dict[str, Any], str]]:
    """Changes to a good call, and a part of the message."""
    (q, k, v), ids = problem()
    return {
        "dimensions": ({"query": q[0]}, "must have 4 dimensions"),
        "width": ({"query": q[..., :-1]}, "do not fit"),
        "batch": ({"key": k[:1], "value": v[:1]}, "do not fit"),
        "values": ({"value": v[:, :, :-1]}, "do not fit"),
        "value heads": ({"value": v[:, :1]}, "do not fit"),
        "heads": ({"query": q[:, :3]}, "3 query heads for 2 key-value heads"),
        "grouped": ({"enable_gqa": False}, "enable_gqa=True"),
        "keys of ids": ({"groups": Groups(ids[:, :-1], G)}, "group ids of shape"),
        "samples of ids": ({"groups": Groups(ids[[0, 1, 0]], G)}, "group ids of shape"),
        "rows": ({"rows_from": ROWS + 1}, "rows_from is 6"),
        "negative rows": ({"rows_from": -1}, "rows_from is -1"),
        "mask": ({"mask": torch.ones(ROWS, KEYS - 1, dtype=torch.bool)}, "does not broadcast"),
        "mask heads": ({"mask": torch.ones(1, 3, 1, KEYS, dtype=torch.bool)}, "does not broadcast"),
        "mask dims": ({"mask": torch.ones(1, 1, 1, 1, KEYS, dtype=torch.bool)}, "does not broadcast"),
        "allow": ({"allow": torch.ones(ROWS, G + 1, dtype=torch.bool)}, "allow must be bool"),
        "allow rows": ({"allow": torch.ones(ROWS - 1, G, dtype=torch.bool)}, "allow must be bool"),
        "allow numbers": ({"allow": torch.ones(ROWS, G)}, "allow must be bool"),
        "allow samples": ({"allow": torch.ones(3, ROWS, G, dtype=torch.bool)}, "allow must be bool"),
        "bias": ({"group_bias": torch.ones(G - 1)}, "group_bias"),
        "bias heads": ({"group_bias": torch.ones(3, G)}, "group_bias"),
        "bias dims": ({"group_bias": torch.ones(2, 2, G)}, "group_bias"),
        "backend": ({"backend": "fast"}, "backend is 'fast'"),
    }


@pytest.mark.parametrize("name", wrong())
def test_what_does_not_fit_is_refused(name: str) -> None:
    from regard.kernels.reweighted import reweighted_attention

    (query, key, value), ids = problem()
    good = {"query": query, "key": key, "value": value, "groups": Groups(ids, G), "policy": bend}
    good["enable_gqa"] = True
    reweighted_attention(**good)
    changes, message = wrong()[name]
    with pytest.raises(ValueError, match=message):
        reweighted_attention(**{**good, **changes})


@pytest.mark.parametrize("samples", [1, 2])
def test_mixed_groups_are_sorted_not_spread_out(samples: int) -> None:
    """Every key of another group than the one before: no more scores than a span's few columns are formed."""
    rng = torch.Generator().manual_seed(samples)
    query, key, value = (
        torch.randn(2, heads, n, 8, generator=rng, dtype=torch.float64)
        for heads, n in ((4, 300), (2, 500), (2, 500))
    )
    ids = torch.randint(0, G, (samples, 500), generator=rng)
    mask = torch.rand(2, 1, 300, 500, generator=rng) > 0.3
    with Largest() as largest:
        found = run((query, key, value), ids, bend, mask=mask)
    want = run((query, key, value), ids, bend, mask=mask, backend="naive")
    torch.testing.assert_close(found.out, want.out, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(found.masses, want.masses, atol=1e-12, rtol=1e-12)
    assert found.path == "torch spans"
    assert largest.size < 2 * 4 * 300 * 500 / 2


@pytest.mark.skipif(
    importlib.util.find_spec("regard.kernels.triton_split") is None or torch.cuda.is_available(),
    reason="for a machine without a GPU",
)
def test_triton_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs, ids = problem()
    with pytest.raises(Unsupported, match=r"backend 'triton' .*backend='auto'"):
        run(inputs, ids, bend, backend="triton")
    assert issubclass(Unsupported, NotImplementedError)
    assert run(inputs, ids, bend, backend="auto").path
