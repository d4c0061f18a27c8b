"""Gradients of every path by finite differences, and with respect to the readable backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import G, Inputs, bend, force, ids_of, inputs_of, run, seeded
from torch import Tensor

from regard.kernels import groups, segments
from regard.kernels.policies import Drop, Redistribute
from regard.kernels.reweighted import reweighted_attention

ROWS, KEYS = 3, 11
POLICIES = {
    "smooth": bend,
    "redistribute": Redistribute(0.6, 0.0, 0.0),  # its gates are open wherever there is a sink
    "drop": Drop((2, 3)),
    "sequence": [bend, Drop((0,))],
}


def options() -> dict[str, dict[str, Any]]:
    allow = torch.ones(ROWS, G, dtype=torch.bool)
    allow[1], allow[2, 1] = False, False
    padded = (torch.arange(KEYS) >= torch.tensor([[4], [0]]))[:, None, None].expand(2, 1, ROWS, KEYS).clone()
    padded[0, :, 1] = False
    return {
        "nothing": {},
        "causal": {"causal": True},
        "padded, a row blind": {"mask": padded},
        "padded and causal": {
            "mask": padded[:, :, :1].index_fill(3, torch.tensor([9]), True),
            "causal": True,
        },
        "a row allowed nothing": {"allow": allow, "causal": True},
        "rows": {"rows_from": 1, "causal": True, "allow": allow[:2]},
        "bias": {"group_bias": torch.tensor([0.3, -0.4, 1.0, 0.2]).double()},
    }


def problem(kv: int, kind: str, keys: int = KEYS, wide: int = 3) -> tuple[Inputs, Tensor]:
    rng = seeded(kv, kind, keys)
    inputs = inputs_of(rng, (2, kv), ROWS, keys, batch=2, width=3, wide=wide)
    ids = ids_of("scattered" if kind == "scattered" else "aligned", rng, 2, keys)
    if kind == "ragged":
        ids[1] = ids[1].roll(2)
    return inputs, ids


@pytest.mark.parametrize("path", ["naive", "dense", "segments"])
@pytest.mark.parametrize("name", options())
def test_gradients_are_those_of_finite_differences(
    name: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of out and masses; short runs count as spans here, so that few keys have spans, pieces and columns."""
    monkeypatch.setattr(groups, "SHORT", 2)
    if path != "naive":
        force(monkeypatch, path)
    given = {**options()[name], "backend": "naive" if path == "naive" else "torch"}
    for kind, kv, policy in (
        ("aligned", 1, "smooth"),
        ("aligned", 2, "redistribute"),
        ("ragged", 1, "drop"),
        ("scattered", 1, "sequence"),
    ):
        inputs, ids = problem(kv, kind)

        def call(*inputs: Tensor, ids: Tensor = ids, policy: str = policy) -> tuple[Tensor, Tensor]:
            found = run(inputs, ids, POLICIES[policy], **given)
            return found.out, found.masses

        wanted = [x.clone().requires_grad_() for x in inputs]
        grads = torch.autograd.grad(sum(x.sin().sum() for x in call(*wanted)), wanted)
        assert all(grad.isfinite().all() and grad.any() for grad in grads), (name, path, kind)
        assert torch.autograd.gradcheck(call, wanted, fast_mode=True), (name, path, kind, policy)


def gradients(inputs: Inputs, ids: Tensor, policy: Any, **given: Any) -> list[Tensor]:
    wanted = [x.detach().clone().requires_grad_() for x in inputs]
    found = run(wanted, ids, policy, **given)
    weight = torch.linspace(-1, 1, found.out.numel(), dtype=torch.float64).reshape(found.out.shape)
    extra = torch.linspace(1, -1, found.masses.numel(), dtype=torch.float64).reshape(found.masses.shape)
    total = (found.out.double() * weight).sum() + (found.masses.double() * extra).sum()
    return [grad.double() for grad in torch.autograd.grad(total, wanted)]


def relative(found: list[Tensor], want: list[Tensor]) -> float:
    return max(float((f - w).norm() / w.norm()) for f, w in zip(found, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["dense", "segments"])
def test_gradients_equal_the_readable_backend(
    path: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, path)
    near = 1e-5 if dtype == torch.float32 else 3e-2
    for rows, kind, heads in ((40, "ragged", (4, 2)), (97, "image", (4, 4)), (7, "runs", (4, 1))):
        inputs = inputs_of(seeded(rows, kind), heads, rows, 97, batch=2, width=16)
        ids = ids_of(kind, seeded(kind), 2, 97)
        inputs = tuple(x.to(dtype) for x in inputs)
        given = {"causal": True, "rows_from": rows // 3}
        wide = tuple(x.double() for x in inputs)
        for policy in (bend, Drop((0,))):
            want = gradients(wide, ids, policy, backend="naive", **given)
            error = relative(gradients(inputs, ids, policy, **given), want)
            assert error < near, (path, dtype, rows, kind, policy, error)


def test_gradients_need_those_of_the_log_sum_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    """A partial whose log-sum-exp gives no gradient (as the library's backward has it) is wrong by percents."""
    force(monkeypatch, "segments")
    inputs = tuple(x.float() for x in inputs_of(seeded("lse"), (4, 2), 40, 97, batch=2, width=16))
    ids = ids_of("image", seeded("lse"), 2, 97)
    want = gradients(tuple(x.double() for x in inputs), ids, bend, backend="naive", causal=True)
    assert relative(gradients(inputs, ids, bend, causal=True), want) < 1e-5
    whole = segments.partial

    def without(*args: Any) -> tuple[Tensor, Tensor]:
        out, lse = whole(*args)
        return out, lse.detach()

    monkeypatch.setattr(segments, "partial", without)
    assert relative(gradients(inputs, ids, bend, causal=True), want) > 0.01


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_one_gradient_alone(wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one input asks for a gradient, the others are constants; rows before the first edited one have theirs."""
    for path in ("dense", "segments"):
        with monkeypatch.context() as patch:
            force(patch, path)
            (q, k, v), ids = problem(1, "ragged", 60)
            want = gradients((q, k, v), ids, bend, backend="naive", causal=True, rows_from=1)[wanted]
            inputs = [q, k, v]
            inputs[wanted] = inputs[wanted].clone().requires_grad_()
            found = reweighted_attention(
                *inputs, groups.Groups(ids, G), bend, causal=True, rows_from=1, enable_gqa=True
            )
            shape = found.out.shape
            weight = torch.linspace(-1, 1, found.out.numel(), dtype=torch.float64).reshape(shape)
            extra = torch.linspace(1, -1, found.masses.numel(), dtype=torch.float64)
            total = (found.out * weight).sum() + (found.masses * extra.reshape(found.masses.shape)).sum()
            total.backward()
            torch.testing.assert_close(inputs[wanted].grad, want, atol=1e-10, rtol=1e-8)
