"""Both torch paths against the readable backend in float64, with sinks of any mass, and plain rows bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from problems import KINDS, G, Inputs, bend, force, ids_of, inputs_of, plant, run, seeded, seen_of
from torch import Tensor
from torch.nn import functional as F

from regard.kernels.policies import Drop, HeadScale, InTurn, Redistribute, Scale, identity, in_turn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NEAR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# scores of halves may themselves be rounded to halves
NEAR_MASS = {torch.float32: 2e-6, torch.float16: 3e-5, torch.bfloat16: 3e-5}
STEEP = ("smooth", "sequence", "in turn")  # here coefficients depend on masses, and add their own rounding
MASSES = (0.0, 0.3, 0.7, 0.9, 0.99, 0.999, 0.9999)
MARGIN = 1e-4  # rows whose masses are nearer to a gate than this may fall on either side of it
HEADS = ((4, 4), (6, 2), (4, 1))


class Case(NamedTuple):
    """All that a draw depends on."""

    policy: str
    kind: str
    causal: bool
    mass: float
    heads: tuple[int, int]
    batch: int
    rows: int
    keys: int
    first: str
    padded: bool


def policies(heads: int, batch: int) -> dict[str, Any]:
    """Every named policy, and one that has no name."""
    coarse = torch.eye(G)[[0, 1, 1, 0]][:, :2]  # text and image, sinks among them
    return {
        "identity": identity,
        "redistribute": Redistribute(),
        "redistribute freely": Redistribute(0.9, 0.0, 0.0),
        "drop": Drop((2, 3)),
        "drop bare": Drop((2,), renormalise=False),
        "drop image": Drop((1, 2)),
        "scale": Scale((0.5, 1.5, 0.1, 2.0)),
        "scale to one": Scale((1.0, 3.0, 0.01, 0.2), renormalise=True),
        "heads": HeadScale(torch.linspace(0.2, 1.8, heads)),
        "heads of samples": HeadScale(torch.linspace(0.2, 1.8, heads * batch).reshape(batch, heads)),
        "sequence": [Redistribute(0.5, 0.1, 0.05), Scale((1.0, 2.0, 0.3, 0.7), renormalise=True), bend],
        "in turn": InTurn((Drop((0,)), bend), (coarse, torch.eye(G))),
        "smooth": bend,
    }


def cases(draws: int) -> Iterator[Case]:
    """Each policy with each layout and causality, the rest drawn."""
    for draw in range(draws):
        for policy in policies(4, 2):
            for kind in KINDS:
                for causal in (False, True):
                    rng = seeded(draw, policy, kind, causal)
                    pick = lambda options: options[  # noqa: E731
                        int(torch.randint(0, len(options), (1,), generator=rng))  # noqa: B023
                    ]
                    keys = pick((1, 2, 17, 33, 50, 97, 130))
                    rows = pick((1, 3, keys // 2 + 1, keys, keys))
                    yield Case(
                        policy,
                        kind,
                        causal,
                        pick(MASSES),
                        pick(HEADS),
                        pick((1, 2, 3)),
                        min(rows, keys),
                        keys,
                        pick(("all", "middle", "last")),
                        pick((False, False, True)),
                    )


def build(case: Case) -> tuple[Inputs, Tensor, dict[str, Any]]:
    """Float64 inputs, ids and options of a case."""
    rng = seeded(*case)
    inputs = inputs_of(rng, case.heads, case.rows, case.keys, batch=case.batch)
    ids = ids_of(case.kind, rng, case.batch, case.keys)
    mask, pads = None, 0
    if case.padded:  # on the left, another number for each sample
        pads = case.keys // 4
        start = torch.randint(0, pads + 1, (case.batch, 1, 1, 1), generator=rng)
        mask = torch.arange(case.keys) >= start
    if case.mass:
        sink = min(pads + int(torch.randint(0, case.keys // 3 + 1, (1,), generator=rng)), case.keys - 1)
        seen = seen_of(case.rows, case.keys, case.causal, mask)
        inputs = plant(inputs, sink, case.mass, seen, 0.4)
        if case.kind != "no sinks":
            ids[:, sink] = 2 + sink % 2
    rows_from = {"all": 0, "middle": case.rows // 2, "last": case.rows - 1}[case.first]
    return inputs, ids, {"causal": case.causal, "scale": 0.4, "mask": mask, "rows_from": rows_from}


def settled(policy: Any, masses: Tensor) -> Tensor:
    """(B, H, R): rows whose masses are away from the gates of `Redistribute`."""
    steps = policy if isinstance(policy, list) else [policy]
    clear = torch.ones(masses.shape[:-1], dtype=torch.bool)
    for step in steps[:1]:  # in "sequence" it comes first
        if isinstance(step, Redistribute):
            image, visual = masses[..., 1], masses[..., 1] + masses[..., 2]
            clear &= (visual - step.min_visual).abs() > MARGIN * (step.min_visual > 0)
            clear &= (image - step.rho * visual).abs() > MARGIN * (step.rho > 0) * (visual > 0)
            clear |= masses[..., 2] == 0  # no sink: nothing to decide
    return clear


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch hands out unset holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    assert torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("path", ["dense", "segments"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_paths_equal_the_readable_backend(
    dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, path)
    compared = skipped = changed = 0
    for case in cases(4 if dtype == torch.float32 else 2):
        inputs, ids, options = build(case)
        policy = policies(case.heads[0], case.batch)[case.policy]
        rounded = tuple(x.to(dtype) for x in inputs)
        want = run(tuple(x.double() for x in rounded), ids, policy, backend="naive", **options)
        found = run(rounded, ids, policy, **options)
        assert (found.out.dtype, found.masses.dtype) == (dtype, torch.float32), case
        clear = settled(policy, want.masses)
        compared, skipped = compared + int(clear.sum()), skipped + int((~clear).sum())
        error = error_of(found.out, want, policy, options["rows_from"])
        worst = float(torch.where(clear, error, 0).max())
        assert worst < NEAR[dtype] * (2 if case.policy in STEEP else 1), (case, worst)
        worst = float((found.masses - want.masses).abs().max())
        assert worst < NEAR_MASS[dtype], (case, worst)
        plain = run(rounded, ids, identity, **options)
        changed += float(error_of(plain.out, want, identity, options["rows_from"]).max()) > 10 * NEAR[dtype]
    assert skipped < 0.02 * compared
    assert changed > 200, "most policies must do something"


def error_of(out: Tensor, want: Any, policy: Any, first: int) -> Tensor:
    """(B, H, R): a row's largest error, in units of its largest coefficient: it multiplies what was rounded."""
    largest = in_turn(policy, G)(want.masses).amax(-1).clamp_min(1)
    error = (out.double() - want.out)[:, :, first:].abs().amax(-1) / largest
    return error.nan_to_num(torch.inf)


# Around the library's blocks of rows (32, 64 and 256, by the number of rows) and its steps at 192 and 768 rows.
SIZES = [
    *((rows, first) for rows in (31, 32, 33) for first in (1, 16, rows - 1)),
    *((rows, first) for rows in (191, 192, 193) for first in (1, 32, 65, rows - 1)),
    *((rows, first) for rows in (767, 768, 769) for first in (64, 191, 257, rows - 1)),
    (800, 200),
    (900, 600),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_before_are_the_library_bit_for_bit(dtype: torch.dtype, masked: bool) -> None:
    """All rows are given to the library, and the first of its results must be ours."""
    for at, (rows, first) in enumerate(SIZES):
        rng = seeded(rows, first)
        batch, heads = ((1, (2, 2)), (1, (4, 2)), (2, (2, 1)))[at % 3]
        q, k, v = (x.to(dtype) for x in inputs_of(rng, heads, rows, rows, batch=batch, width=16))
        mask = None
        if masked:
            mask = (torch.arange(rows) >= torch.tensor([0, 3])[:batch, None, None, None]) if at % 2 else None
            mask = torch.randn(1, 1, rows, rows, generator=rng).to(dtype) if mask is None else mask
        assert_plain((q, k, v), first, masked or rows > 191, mask)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_heads_and_samples_are_joined_bit_for_bit(dtype: torch.dtype) -> None:
    """So many that the plain rows come in several calls, each for some heads."""
    for heads, batch, rows, width, masked in (
        ((48, 12), 3, 130, 64, False),
        ((35, 7), 3, 200, 64, True),
        ((40, 40), 1, 260, 128, False),
    ):
        inputs = inputs_of(seeded(heads), heads, rows, rows, batch=batch, width=width)
        mask = torch.randn(batch, heads[0], 1, rows).to(dtype) if masked else None
        assert_plain(tuple(x.to(dtype) for x in inputs), rows - 9, True, mask, whole=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_in_the_middle_of_the_keys_are_plain_bit_for_bit(dtype: torch.dtype) -> None:
    """Fewer queries than keys (a chunk of a prefill): causality is aligned at the lower right."""
    for rows, keys, first in ((33, 80, 7), (200, 333, 100), (300, 310, 299)):
        q, k, v = inputs_of(seeded(rows), (4, 2), keys, keys, batch=2, width=16)
        assert_plain(tuple(x.to(dtype) for x in (q[:, :, -rows:], k, v)), first, True, None)


def assert_plain(inputs: Inputs, first: int, causal: bool, mask: Tensor | None, whole: bool = True) -> None:
    """Rows before `first` equal the library's exactly; those after it do not, but equal the readable backend."""
    q, k, _ = inputs
    batch, _, rows, keys = *q.shape[:3], k.shape[2]
    ids = ids_of("image", seeded(rows), batch, keys)
    options = {"causal": causal, "mask": mask, "rows_from": first}
    found = run(inputs, ids, Scale((0.5, 2.0, 0.1, 0.3)), **options)
    case = q.dtype, tuple(q.shape), keys, first, causal, mask is None or mask.dtype
    given, square = mask, causal and mask is None and rows == keys
    if causal and not square:
        seen = seen_of(rows, keys, True)
        given = seen if mask is None else None
        given = seen & mask if given is None and mask.dtype == torch.bool else given
        given = mask.masked_fill(~seen, -torch.inf) if given is None else given
    plain = F.scaled_dot_product_attention(*inputs, attn_mask=given, is_causal=square, enable_gqa=True)
    assert torch.equal(found.out[:, :, :first], plain[:, :, :first]), case
    assert not torch.allclose(found.out[:, :, first:], plain[:, :, first:], atol=0.05), case
    if whole:
        last = slice(max(first, rows - 3), None)
        options.update(rows_from=0, mask=mask if mask is None or mask.shape[2] == 1 else mask[:, :, last])
        wide = q[:, :, last].double(), *(x.double() for x in inputs[1:])
        want = run(wide, ids, Scale((0.5, 2.0, 0.1, 0.3)), backend="naive", **options)
        torch.testing.assert_close(
            found.out[:, :, last].double(), want.out, atol=2 * NEAR[q.dtype], rtol=0, msg=str(case)
        )
