"""The Triton backend in its interpreter, against all probs formed in float64. Run by test_triton.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from regard.kernels import naive, triton_split
from regard.kernels.groups import Groups
from regard.kernels.policies import Drop, HeadScale, InTurn, Policy, Redistribute, Scale, identity
from regard.kernels.problem import Problem, Rows, Unsupported, additive
from regard.kernels.reweighted import reweighted_attention
from regard.kernels.triton_plan import Config, Tile

SMALL = Config(Tile(16, 32), Tile(32, 32), least=32)  # several splits a span, two sizes of tile
CLOSE = {torch.float32: 2e-6, torch.float16: 1e-3}
SINK = 30


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors are full of NaN, so that an element that is not written is seen."""
    plain = torch.Tensor.new_empty

    def new_empty(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        new = plain(self, *args, **kwargs)
        return new.fill_(torch.nan) if new.is_floating_point() else new

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(triton_split, "PROGRAMS", 8)  # the interpreter takes its time for each


def curve(masses: Tensor) -> Tensor:
    """A policy with no name: smooth, and across heads."""
    return 1 + masses.square() - 0.5 * masses.mean(1, keepdim=True)


EYE, PAIRS = torch.eye(4), torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 0]])
POLICIES: dict[str, Policy] = {
    "redistribute": Redistribute(rho=0.0, min_visual=0.1),
    "drop": Drop((2,)),
    "drop-two": Drop((0, 3)),
    "drop-bare": Drop((1,), renormalise=False),
    "scale": Scale((1.0, 1.5, 0.25, 0.5)),
    "scale-to-one": Scale((1.0, 1.5, 0.25, 0.5), renormalise=True),
    "head-scale": HeadScale(torch.tensor([0.5, 2.0, 1.0, 0.0])),
    "head-scale-batch": HeadScale(torch.linspace(-1, 2, 8).reshape(2, 4)),
    "callable": curve,
    "in-turn": InTurn((Redistribute(rho=0.0, min_visual=0.1), Scale((0.5, 2.0))), (EYE, PAIRS)),
}


def layout(keys: int) -> Tensor:
    """Text sink, text, image with two sinks, text."""
    ids = torch.zeros(1, keys, dtype=torch.long)
    ids[:, 20 : keys - 20], ids[:, SINK], ids[:, keys - 30], ids[:, 0] = 1, 2, 2, 3
    return ids


def case(
    rows: int = 1,
    keys: int = 90,
    heads: tuple[int, int] = (4, 2),
    width: int = 32,
    depth: int = 32,
    dtype: torch.dtype = torch.float32,
    policy: Policy = POLICIES["redistribute"],
    ids: Tensor | None = None,
    count: int = 4,
    batch: int = 1,
    **given: Any,
) -> Problem:
    query = torch.randn(batch, heads[0], rows, width).to(dtype)
    key = torch.randn(batch, heads[1], keys, width).to(dtype)
    value = torch.randn(batch, heads[1], keys, depth).to(dtype)
    ids = layout(keys) if ids is None else ids
    return Problem(query, key, value, Groups(ids, count), policy, width**-0.5, **given)


def doubled(problem: Problem) -> Problem:
    mask = None if problem.mask is None else problem.mask.double()
    return replace(
        problem,
        query=problem.query.double(),
        key=problem.key.double(),
        value=problem.value.double(),
        mask=mask,
    )


def assert_equal(problem: Problem, changes: bool = True, config: Config = SMALL) -> Rows:
    """As the oracle says, and (unless told) other than plain attention."""
    assert triton_split.reason_against(problem) is None
    got, want = triton_split.rows(problem, config), naive.rows(doubled(problem))
    near = CLOSE[problem.query.dtype]
    assert got.out.dtype == problem.query.dtype
    assert got.masses.dtype == torch.float32
    bound = near * problem.policy(want.masses).abs().amax(-1, keepdim=True).clamp_min(1)  # 1 / what is kept
    miss = (got.out - want.out).abs() - bound * (1 + want.out.abs())
    assert (miss <= 0).all(), f"out is off by {(got.out - want.out).abs().max():.1e}"
    torch.testing.assert_close(got.masses.double(), want.masses, atol=2e-6, rtol=0)
    if changes:
        plain = naive.rows(doubled(replace(problem, policy=identity))).out
        assert (got.out - plain).abs().max() > 20 * near, "the policy changed nothing"
    return got


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(
    ("rows", "causal", "dtype"),
    [(1, False, torch.float32), (5, True, torch.float32), (9, True, torch.float16)],
)
def test_policies(name: str, rows: int, causal: bool, dtype: torch.dtype) -> None:
    batch = 2 if "batch" in name else 1
    assert_equal(case(rows, batch=batch, policy=POLICIES[name], dtype=dtype, causal=causal))


def test_identity_is_plain_attention() -> None:
    problem = case(5, policy=identity)
    got = assert_equal(problem, changes=False)
    want = torch.nn.functional.scaled_dot_product_attention(
        problem.query, problem.key, problem.value, enable_gqa=True
    )
    torch.testing.assert_close(got.out, want, atol=2e-6, rtol=2e-6)


def planted(problem: Problem, mass: float) -> Problem:
    """Key SINK gets that mass in each row."""
    query, key = problem.query.double(), problem.key.double()
    key[..., 0], key[:, :, SINK] = 0, 0
    rest = naive.scores_of(replace(doubled(problem), key=key))
    rest[..., SINK] = -torch.inf
    query[..., 0] = (rest.logsumexp(-1) + math.log(mass / (1 - mass))) / problem.scale
    key[:, :, SINK, 0] = 1
    return replace(problem, query=query.to(problem.query), key=key.to(problem.key))


@pytest.mark.parametrize(("mass", "dtype"), [(0.9, torch.float16), (0.9999, torch.float32)])
@pytest.mark.parametrize("name", ["redistribute", "drop", "scale", "callable"])
def test_a_planted_sink(mass: float, dtype: torch.dtype, name: str) -> None:
    policy = POLICIES[name] if name != "redistribute" else Redistribute(rho=0.0)
    problem = planted(case(3, keys=70, policy=policy, dtype=dtype, causal=True), mass)
    got = assert_equal(problem)
    assert (got.masses[..., 2] - mass).abs().max() < 0.02 + 0.2 * (1 - mass)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize(("width", "depth"), [(40, 24), (7, 80)])
def test_heads_and_widths(causal: bool, heads: tuple[int, int], width: int, depth: int) -> None:
    assert_equal(case(7, 67, heads, width, depth, causal=causal))


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_samples_that_differ(rows: int, dtype: torch.dtype) -> None:
    """Other spans and other columns in each, left padding in one."""
    ids = torch.cat([layout(101), layout(101).roll(11, 1)])
    ids[1, :11] = 0
    mask = torch.ones(2, 1, 1, 101, dtype=torch.bool)
    mask[1, ..., :11] = False
    assert_equal(
        case(rows, 101, batch=2, ids=ids, dtype=dtype, causal=True, mask=additive(mask, torch.float32))
    )


@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_groups_that_are_empty_or_few(count: int) -> None:
    ids = torch.zeros(1, 64, dtype=torch.uint8)
    if count > 1:
        ids[:, 30:] = 1
    factors = tuple(0.5 + group for group in range(count))
    got = assert_equal(case(2, 64, ids=ids, count=count, policy=Scale(factors)))
    assert not got.masses[..., 2:].any()


def test_no_sinks() -> None:
    ids = torch.zeros(1, 80, dtype=torch.long)
    ids[:, 20:60] = 1
    assert_equal(case(4, 80, ids=ids, causal=True), changes=False)
    assert_equal(case(4, 80, ids=ids, causal=True, policy=Drop((1,))))


@pytest.mark.parametrize("runs", [1, 17])
def test_scattered_groups(runs: int) -> None:
    """Keys that change group at once, and more spans than get splits of their own."""
    ids = (torch.arange(150 if runs == 1 else 17 * 40) // runs % 4)[None]
    assert_equal(
        case(3, ids.shape[1], ids=ids, causal=True, policy=Drop((1,))), config=replace(SMALL, least=256)
    )


@pytest.mark.parametrize("shape", [(2, 4, 6, 75), (1, 4, 1, 75), (2, 1, 6, 75), (1, 1, 1, 75)])
@pytest.mark.parametrize("causal", [False, True])
def test_masks(shape: tuple[int, ...], causal: bool) -> None:
    mask = torch.randn(shape).masked_fill(torch.rand(shape) < 0.3, -torch.inf)
    assert_equal(case(6, 75, batch=shape[0], mask=mask, causal=causal))


def test_a_mask_with_steps_of_its_own() -> None:
    mask = torch.randn(1, 4, 150, 6)[:, :, ::2].transpose(2, 3)
    assert_equal(case(6, 75, mask=mask))


@pytest.mark.parametrize("shared", [1, 4])
def test_group_bias(shared: int) -> None:
    assert_equal(case(3, group_bias=torch.randn(shared, 4), causal=True))


@pytest.mark.parametrize("batch", [1, 2])
def test_allow_and_rows_that_see_nothing(batch: int) -> None:
    allow = torch.rand(batch, 8, 4) < 0.6
    allow[:, 2], allow[:, 3], allow[:, 4] = False, torch.tensor([False, True, False, False]), True
    for name in ("redistribute", "scale-to-one"):
        got = assert_equal(case(8, batch=2, allow=allow, policy=POLICIES[name]))
        assert not got.out[:, :, 2].any()
        assert not got.masses[:, :, 2].any()


def test_a_mask_that_hides_everything() -> None:
    mask = torch.zeros(2, 1, 4, 90)
    mask[1, :, 1:3] = -torch.inf
    got = assert_equal(case(4, batch=2, mask=mask))
    assert not got.out[1, :, 1:3].any()


def test_more_rows_than_keys() -> None:
    got = assert_equal(
        case(12, 9, ids=torch.arange(9)[None] % 4, causal=True, policy=Scale((0.5, 2.0, 1.0, 1.0)))
    )
    assert not got.out[:, :, :3].any()


def test_inputs_with_steps_of_their_own() -> None:
    """(B, K, H, D) as models have them, and rows cut from a longer query."""
    problem = case(6)
    swap: Callable[[Tensor], Tensor] = lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)  # noqa: E731
    query = torch.cat([torch.randn(1, 4, 3, 32), problem.query], 2)[:, :, 3:]
    turned = replace(problem, query=query, key=swap(problem.key), value=problem.value.mT.contiguous().mT)
    torch.testing.assert_close(assert_equal(turned).out, triton_split.rows(problem, SMALL).out)


def test_decoding_keeps_its_plan() -> None:
    """Keys that come one by one belong to group 0; the table of splits is not built anew."""
    first = case(1, 90)
    assert first.groups.layouts
    tables = []
    for keys in (90, 91, 97):
        key, value = torch.randn(2, 1, 2, keys, 32)
        step = replace(first, key=key, value=value, groups=first.groups.window(0, keys))
        assert_equal(step)
        tables.append(triton_split.split_launch(step, SMALL)[1])
    assert tables[0] is tables[1] is tables[2]


def test_no_rows() -> None:
    got = triton_split.rows(case(0))
    assert got.out.shape == (1, 4, 0, 32)
    assert got.masses.shape == (1, 4, 0, 4)


def test_named_policies_run_in_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Redistribute, Drop, Scale, HeadScale):
        monkeypatch.setattr(kind, "__call__", None)
    for name in ("redistribute", "drop", "scale", "scale-to-one", "head-scale"):
        assert triton_split.rows(case(policy=POLICIES[name]), SMALL).out.isfinite().all()


def test_what_derives_from_a_named_policy_runs_as_itself() -> None:
    class Inverse(Scale):
        def __call__(self, masses: Tensor) -> Tensor:
            return 1 / super().__call__(masses)

    assert_equal(case(2, policy=Inverse((1.0, 4.0, 2.0, 1.0))))


def test_wrong_policies_say_what_they_say_elsewhere() -> None:
    with pytest.raises(ValueError, match="2 factors for 4 groups"):
        triton_split.rows(case(policy=Scale((1.0, 2.0))))
    with pytest.raises(IndexError):
        triton_split.rows(case(policy=Drop((4,))))


def test_through_the_front() -> None:
    problem = case(6, policy=POLICIES["drop"])
    parts = problem.query, problem.key, problem.value, problem.groups, problem.policy
    given: dict[str, Any] = {"causal": True, "enable_gqa": True, "rows_from": 2}
    got = reweighted_attention(*parts, **given, backend="triton")
    want = reweighted_attention(*parts, **given, backend="naive")
    assert "triton" in got.path
    torch.testing.assert_close(got.out, want.out, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(got.masses, want.masses, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (doubled(case()), "fp16, bf16 or fp32, not float64"),
        (case(score_mod=lambda scores, ids: scores), "score_mod"),
        (case(width=264), "up to 256, not 264 and 32"),
        (case(count=65), "64 groups, not 65"),
    ],
)
def test_what_it_cannot_do(problem: Problem, reason: str) -> None:
    assert reason in str(triton_split.reason_against(problem))


def test_gradients_are_refused() -> None:
    problem = case()
    problem.key.requires_grad_()
    assert "gradients" in str(triton_split.reason_against(problem))
    learned = case(policy=HeadScale(torch.ones(4, requires_grad=True)))
    assert "gradients" in str(triton_split.reason_against(learned))
    with torch.no_grad():
        assert triton_split.reason_against(problem) is None
    parts = problem.query, problem.key, problem.value, problem.groups, problem.policy
    with pytest.raises(Unsupported, match="backend 'triton' cannot give gradients"):
        reweighted_attention(*parts, enable_gqa=True, backend="triton")
