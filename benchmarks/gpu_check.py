"""Small hostile cases of `reweighted_attention` on a device against float64; benchmarks/gpu_kernels.py runs them first.

Backends "triton" and "torch" in fp16, bf16 and fp32, held against the naive backend in float64 on the CPU, on the same
rounded inputs, and the torch backend's gradients in fp32.
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.kernels.groups import Groups
from regard.kernels.policies import Drop, Policy, Redistribute, identity
from regard.kernels.reweighted import reweighted_attention

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
CLOSE = {FP32: 1e-5, FP16: 1.5e-3, BF16: 1e-2}  # of the sum of |coefficient * prob * value|
NEAR_MASS = 5e-5
VAR = Redistribute(transfer=0.6, rho=0.0, min_visual=0.0)
POLICIES: dict[str, Policy] = {
    "redistribute": VAR,
    "drop": Drop((1,)),
    "unnamed": lambda masses: 1 + masses.square() - 0.5 * masses.mean(1, keepdim=True),
}


class Small(NamedTuple):
    """A small case: heads are (H, H_kv); sample 1 has `padding` hidden keys; `mass` is that of a sink."""

    name: str
    rows: int
    keys: int
    heads: tuple[int, int]
    width: int
    batch: int = 1
    causal: bool = True
    padding: int = 0
    ids: str = "image"
    mass: float = 0.0
    first: int = 0


SMALL = (
    Small("decode, GQA", 1, 700, (14, 2), 128, mass=0.5),
    Small("decode, sink with 0.9999 of the mass", 1, 300, (4, 4), 128, mass=0.9999),
    Small("prefill, sink with 0.9999 of the mass", 33, 300, (4, 2), 64, mass=0.9999),
    Small("odd sizes", 67, 131, (6, 2), 40),
    Small("left padding, samples that differ", 300, 300, (4, 2), 128, batch=2, padding=37),
    Small("a sample that sees nothing", 5, 90, (4, 2), 64, batch=2, causal=False, padding=90, mass=0.3),
    Small("two empty groups", 9, 200, (2, 2), 128, ids="two"),
    Small("groups key by key", 70, 300, (2, 1), 64, causal=False, ids="mixed"),
    Small("prompt, last rows edited", 640, 640, (4, 4), 128, mass=0.5, first=611),
)


def small(case: Small, dtype: torch.dtype) -> tuple[list[Tensor], Groups, dict[str, Any]]:
    """Query, key and value on the CPU in a dtype, the groups, and the other arguments."""
    rng = torch.Generator().manual_seed(case.keys + case.rows)
    heads, kv_heads = case.heads
    query = torch.randn(case.batch, heads, case.rows, case.width, generator=rng)
    key, value = (torch.randn(case.batch, kv_heads, case.keys, case.width, generator=rng) for _ in "kv")
    ids = torch.zeros(case.batch, case.keys, dtype=torch.long)
    ids[:, 20 : case.keys - 20] = 1
    if case.ids == "mixed":
        ids[:] = torch.arange(case.keys) % 4
    elif case.ids == "image":
        ids[:, 30], ids[:, case.keys - 40], ids[:, 0] = 2, 2, 3
        ids[1:] = ids[1:].roll(11, 1)
    if case.mass:  # key 30 alone has channel 0, and the query as much of it as gives that mass
        key[..., 0], key[:, :, 30], key[:, :, 30, 0] = 0, 0, 1
        rest = query @ key.repeat_interleave(heads // kv_heads, 1).mT * case.width**-0.5
        rest[..., 30] = -torch.inf
        query[..., 0] = (rest.logsumexp(-1) + math.log(case.mass / (1 - case.mass))) * case.width**0.5
    given: dict[str, Any] = {"causal": case.causal, "enable_gqa": True, "rows_from": case.first}
    if case.padding:
        mask = torch.ones(case.batch, 1, 1, case.keys, dtype=torch.bool)
        mask[1, ..., : case.padding] = False
        given["mask"] = mask
    return [tensor.to(dtype) for tensor in (query, key, value)], Groups(ids, 4), given


def moved(given: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: item.to(device) if isinstance(item, Tensor) else item for name, item in given.items()}


def share(off: Tensor, bound: Tensor) -> float:
    """The largest share of what is allowed; where nothing is, any difference is too much. NaN stays."""
    return (off.abs() / bound.clamp_min(1e-12)).max().item()


def compare(case: Small, dtype: torch.dtype, name: str, backend: Any, device: torch.device) -> dict[str, Any]:
    """How far out and masses are from float64, as shares of what is allowed; above 1 is a failure."""
    tensors, groups, given = small(case, dtype)
    exact = [tensor.double() for tensor in tensors]
    policy = POLICIES[name]
    by_definition = partial(reweighted_attention, groups=groups, **given, backend="naive")
    want = by_definition(*exact, policy=policy)
    plain = by_definition(*exact, policy=identity).out
    bound = CLOSE[dtype] * by_definition(*exact[:2], exact[2].abs(), policy=policy).out
    here = [tensor.to(device) for tensor in tensors], Groups(groups.ids.to(device), 4)
    got = reweighted_attention(*here[0], here[1], policy, **moved(given, device), backend=backend)
    assert want.masses is not None
    assert got.masses is not None
    out, changed = share(got.out.cpu() - want.out, bound), share(plain - want.out, bound)
    masses = ((got.masses.cpu() - want.masses).abs().max() / NEAR_MASS).item()
    seen = (
        changed > 1 or dtype != FP32 or (case.ids == "two" and name == "redistribute")
    )  # the identity would fail
    passed = out <= 1 and masses <= 1 and seen
    found = {"out": round(out, 3), "masses": round(masses, 3), "policy_moves": round(changed, 1)}
    return {"passed": passed, **found, "path": got.path}


def tried(case: Small, dtype: torch.dtype, name: str, backend: str, device: torch.device) -> dict[str, Any]:
    """A case by its name; a crash is a failure too."""
    line: dict[str, Any] = {"case": f"{backend}, {str(dtype).removeprefix('torch.')}, {name}: {case.name}"}
    try:
        return line | compare(case, dtype, name, backend, device)
    except Exception as error:  # whatever a compiler or a GPU may raise
        return line | {"passed": False, "error": f"{type(error).__name__}: {error}"[:300]}


def gradients(device: torch.device) -> dict[str, Any]:
    """The torch backend's backward in fp32 against the naive backend's in float64."""
    tensors, groups, given = small(SMALL[4], FP32)
    found = []
    for dtype, place, backend in ((torch.float64, torch.device("cpu"), "naive"), (FP32, device, "torch")):
        parts = [tensor.to(place, dtype).requires_grad_() for tensor in tensors]
        here = Groups(groups.ids.to(place), 4)
        result = reweighted_attention(*parts, here, VAR, **moved(given, place), backend=backend)  # type: ignore[arg-type]
        loss = result.out.square().sum() + result.masses.square().sum()  # type: ignore[union-attr]
        found.append([g.cpu().double() for g in torch.autograd.grad(loss, parts)])
    off = max(((got - want).norm() / want.norm()).item() for want, got in zip(*found, strict=True))
    return {"case": "torch, float32: gradients", "passed": off <= 1e-5, "relative": off}


def check(device: torch.device) -> list[dict[str, Any]]:
    """All small cases; tensors that a backend leaves unwritten are NaN."""
    lines = []
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for backend in ("triton", "torch") if device.type == "cuda" else ("torch",):
            for case in SMALL:
                for dtype in (FP32, FP16, BF16):
                    lines += [tried(case, dtype, name, backend, device) for name in POLICIES]
        lines.append(gradients(device))
    torch.use_deterministic_algorithms(False)
    return lines
