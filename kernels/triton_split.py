"""The Triton backend: a program a split of keys, and the policy in the merge of the splits.

A split holds keys of one group only, so that a program keeps one accumulator, as in plain flash attention,
and the log-sum-exps of the splits are all that the policy needs. Keys of another group inside a span are
masked out there and served by splits that gather them.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .policies import Drop, HeadScale, Policy, Redistribute, Scale, identity
from .problem import Problem, Rows
from .triton_plan import (
    Config,
    Launch,
    config_for,
    members,
    multiprocessors,
    numbers_on,
    plan,
    rowwise,
    score_terms,
    split_size,
    steps,
)

WIDEST = 256  # of D and D_v
MOST_GROUPS = 64
PROGRAMS = 256  # of the merge, before one of them takes several rows
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # where a running maximum starts; finite, so that no inf - inf comes up


@triton.jit
def _attend(
    query, key, value, ids, columns, mask, mask_rows, valid, last, start, stop, group, factor,
    key_step, value_step,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, CUT: tl.constexpr, GATHERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Flash attention of a tile of rows over one split: the sum, its weight and the maximum (of base 2)."""
    peak = tl.full([BM], LOWEST, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    place, width, depth = tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    if not GATHERED:
        key += start.to(tl.int64) * key_step
        value += start.to(tl.int64) * value_step
    for first in range(start, stop, BN):
        at = first + place
        inside = at < stop
        step = place
        if GATHERED:
            at = tl.load(columns + at, mask=inside, other=-1)
            inside = at >= 0
            step = at.to(tl.int64)
        keys = tl.load(
            key + step[:, None] * key_step + width[None, :],
            mask=inside[:, None] & (width < D)[None, :], other=0.0,
        )  # fmt: skip
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * factor
        if MASK == 1:
            scores += tl.load(mask + at, mask=inside, other=0.0)[None, :] * LOG2E
        if MASK == 2:
            there = valid[:, None] & inside[None, :]
            scores += LOG2E * tl.load(mask + mask_rows[:, None] + at[None, :], mask=there, other=0.0)
        if CUT:
            inside = inside & (tl.load(ids + at, mask=inside, other=0).to(tl.int32) == group)
        seen = inside[None, :]
        if CAUSAL:
            seen = seen & (at[None, :] <= last[:, None])
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        shrink = tl.exp2(peak - higher)
        probs = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(probs, 1)
        values = tl.load(
            value + step[:, None] * value_step + depth[None, :],
            mask=inside[:, None] & (depth < DV)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(probs.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
        peak = higher
        if not GATHERED:
            key += BN * key_step
            value += BN * value_step
    return acc, total, peak


@triton.jit(do_not_specialize=["keys", "rows", "mask_batch", "mask_head", "mask_row"])
def split_kernel(
    query, key, value, ids, table, columns, mask, bias, allow, part, lse,
    rows, keys, splits, kv_heads, repeat, factor,
    query_batch, query_head, query_row, key_batch, key_head, key_step, value_batch, value_head, value_step,
    ids_batch, table_batch, columns_batch, mask_batch, mask_head, mask_row, bias_head, allow_batch, allow_row,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, ALLOW: tl.constexpr, CUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One split for a tile of rows, heads that share keys side by side: `part`, normalised, and `lse`."""
    split, shared = tl.program_id(0), tl.program_id(2) % kv_heads
    sample = (tl.program_id(2) // kv_heads).to(tl.int64)
    packed = tl.program_id(1) * BM + tl.arange(0, BM)
    valid = packed < rows * repeat
    head, row = shared * repeat + packed // rows, packed % rows
    entry = table + sample * table_batch + split * 4
    start, stop, group = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    last = keys - rows + row
    width = tl.arange(0, BD)
    query += (
        sample * query_batch + head.to(tl.int64)[:, None] * query_head + row.to(tl.int64)[:, None] * query_row
    )
    tile = tl.load(query + width[None, :], mask=valid[:, None] & (width < D)[None, :], other=0.0)
    key += sample * key_batch + shared.to(tl.int64) * key_head
    value += sample * value_batch + shared.to(tl.int64) * value_head
    ids += sample * ids_batch
    columns += sample * columns_batch
    mask += sample * mask_batch
    mask_rows = head.to(tl.int64) * mask_head + row.to(tl.int64) * mask_row
    gathered = False
    if CUT:
        gathered = tl.load(entry + 3) != 0
    if gathered:
        acc, total, peak = _attend(
            tile, key, value, ids, columns, mask, mask_rows, valid, last, start, stop, group, factor,
            key_step, value_step, D, DV, BM, BN, BD, BDV, CAUSAL, MASK, CUT, True, PRECISION,
        )  # fmt: skip
    else:
        stop = tl.minimum(stop, keys)
        if CAUSAL:
            stop = tl.minimum(stop, tl.max(tl.where(valid, last, 0)) + 1)
        acc, total, peak = _attend(
            tile, key, value, ids, columns, mask, mask_rows, valid, last, start, stop, group, factor,
            key_step, value_step, D, DV, BM, BN, BD, BDV, CAUSAL, MASK, CUT, False, PRECISION,
        )  # fmt: skip
    some = tl.where(total > 0, total, 1.0)
    level = tl.where(total > 0, (peak + tl.log2(some)) * LN2, -float("inf"))
    if BIAS:
        level += tl.load(bias + head * bias_head + group, mask=valid, other=0.0)
    if ALLOW:
        allowed = tl.load(allow + sample * allow_batch + row * allow_row + group, mask=valid, other=0)
        level = tl.where(allowed != 0, level, -float("inf"))
    place = ((sample * kv_heads * repeat + head) * rows + row) * splits + split
    tl.store(lse + place, level, mask=valid)
    depth = tl.arange(0, BDV)
    tl.store(
        part + place[:, None] * DV + depth[None, :], acc / some[:, None],
        mask=valid[:, None] & (depth < DV)[None, :],
    )  # fmt: skip


@triton.jit
def as_given(masses, numbers, group, number_group, COUNT: tl.constexpr):
    """Coefficients that are known already."""
    return tl.load(numbers[:, None] + group[None, :] * number_group, mask=(group < COUNT)[None, :], other=0.0)


@triton.jit
def summing_to_one(masses, numbers, group, number_group, COUNT: tl.constexpr):
    """Known factors, then every row divided by what it sums to."""
    factors = as_given(masses, numbers, group, number_group, COUNT)
    total = tl.sum(masses * factors, 1)
    return factors * tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 0.0)[:, None]


@triton.jit
def redistribute(masses, numbers, group, number_group, COUNT: tl.constexpr):
    """`Redistribute`; the numbers are transfer, rho and min_visual."""
    transfer, rho = tl.load(numbers), tl.load(numbers + number_group)
    least = tl.load(numbers + 2 * number_group)
    image = tl.sum(tl.where(group == 1, masses, 0.0), 1)
    sink = tl.sum(tl.where(group == 2, masses, 0.0), 1)
    sinks = sink + tl.sum(tl.where(group == 3, masses, 0.0), 1)
    acts = (image + sink >= least) & (image >= rho * (image + sink)) & (image > 0) & (sink > 0)
    gain = 1 + transfer * sinks / tl.where(image > 0, image, 1.0)
    changed = tl.where(group == 1, gain[:, None], tl.where(group >= 2, 1 - transfer[:, None], 1.0))
    return tl.where(acts[:, None], changed, 1.0)


@triton.jit(do_not_specialize=["count", "rows"])
def merge_kernel(
    part, lse, table, numbers, out, masses,
    count, rows, heads, splits, table_batch, number_batch, number_head, number_row, number_group,
    DV: tl.constexpr, BDV: tl.constexpr, COUNT: tl.constexpr, GROUPS: tl.constexpr, SPLITS: tl.constexpr,
    STEP: tl.constexpr, BR: tl.constexpr, POLICY: tl.constexpr, MASSES: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """A few rows put together: the masses of their groups, the policy, and the sum of the parts."""
    flat = tl.program_id(0) * BR + tl.arange(0, BR)
    valid = flat < count
    flat = tl.minimum(flat, count - 1)  # so that no row reads beyond the end
    sample, head, row = flat // (heads * rows), flat // rows % heads, flat % rows
    flat = flat.to(tl.int64)
    table += sample * table_batch + 2
    split, group = tl.arange(0, SPLITS), tl.arange(0, GROUPS)
    there = valid[:, None] & (split < splits)[None, :]
    level = tl.load(lse + flat[:, None] * splits + split[None, :], mask=there, other=-float("inf"))
    peak = tl.max(level, 1)
    peak = tl.where(peak > -float("inf"), peak, 0.0)
    shares = tl.exp(level - peak[:, None])
    total = tl.sum(shares, 1)
    total = tl.where(total > 0, total, 1.0)
    of = tl.load(table[:, None] + split[None, :] * 4, mask=there, other=-1)
    own = of[:, :, None] == group[None, None, :]
    mass = tl.sum(tl.where(own, (shares / total[:, None])[:, :, None], 0.0), 1)
    if MASSES:
        tl.store(
            masses + flat[:, None] * COUNT + group[None, :], mass,
            mask=valid[:, None] & (group < COUNT)[None, :],
        )  # fmt: skip
    if OUT:
        numbers += sample.to(tl.int64) * number_batch + head * number_head + row.to(tl.int64) * number_row
        coefficients = POLICY(mass, numbers, group, number_group, COUNT)
        depth = tl.arange(0, BDV)
        merged = tl.zeros([BR, BDV], tl.float32)
        for first in range(0, splits, STEP):
            at = first + tl.arange(0, STEP)
            some = valid[:, None] & (at < splits)[None, :]
            place = flat[:, None] * splits + at[None, :]
            heights = tl.load(lse + place, mask=some, other=-float("inf"))
            kinds = tl.load(table[:, None] + at[None, :] * 4, mask=some, other=-1)
            chosen = kinds[:, :, None] == group[None, None, :]
            weights = tl.sum(tl.where(chosen, coefficients[:, None, :], 0.0), 2)
            weights *= tl.exp(heights - peak[:, None]) / total[:, None]
            parts = tl.load(
                part + place[:, :, None] * DV + depth[None, None, :],
                mask=some[:, :, None] & (depth < DV)[None, None, :], other=0.0,
            )  # fmt: skip
            merged += tl.sum(weights[:, :, None] * parts, 1)
        tl.store(
            out + flat[:, None] * DV + depth[None, :], merged.to(out.dtype.element_ty),
            mask=valid[:, None] & (depth < DV)[None, :],
        )  # fmt: skip


def reason_against(problem: Problem) -> str | None:
    """Why this backend cannot do a problem, as the end of a sentence that starts with its name; None where it can."""
    query, key, value, count = problem.query, problem.key, problem.value, problem.groups.count
    if not query.is_cuda and isinstance(split_kernel, triton.JITFunction):
        way = "set TRITON_INTERPRET=1 before Python starts to try it on small tensors without a GPU"
        return f"needs a CUDA tensor, not one on {query.device.type} ({way})"
    if query.is_cuda and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype:
        kinds = ", ".join(str(t.dtype).removeprefix("torch.") for t in (query, key, value))
        return f"needs query, key and value all in fp16, bf16 or fp32, not {kinds}"
    if problem.score_mod is not None:
        return "has no score_mod"
    if max(query.shape[3], value.shape[3]) > WIDEST:
        return f"needs D and D_v up to {WIDEST}, not {query.shape[3]} and {value.shape[3]}"
    if count > MOST_GROUPS:
        return f"has room for {MOST_GROUPS} groups, not {count}"
    policy = problem.policy
    learns = isinstance(policy, HeadScale) and policy.factors.requires_grad and torch.is_grad_enabled()
    if problem.differentiable or learns:
        return "cannot give gradients; call it under torch.no_grad()"
    return None


def rows(problem: Problem, config: Config | None = None) -> Rows:
    """The edited rows: a launch for the splits and one for the merge, or two around a policy that is not named."""
    batch, heads, count, _ = problem.shape
    query, value = problem.query, problem.value
    out = query.new_empty(batch, heads, count, value.shape[3])
    masses = query.new_empty(batch, heads, count, problem.groups.count, dtype=torch.float32)
    if not masses.numel():
        return Rows(out, masses)
    with torch.cuda.device_of(query):
        split, table = split_launch(
            problem, config or config_for(query.dtype, max(query.shape[3], value.shape[3]))
        )
        split.run()
        part, lse = split.arguments["part"], split.arguments["lse"]
        named = inside(problem.policy, masses)
        if named is None:
            merge_launch(part, lse, table, None, masses, (as_given, masses)).run()
            given = as_given, problem.coefficients(masses)
            merge_launch(part, lse, table, out, None, given).run()
        else:
            merge_launch(part, lse, table, out, masses, named).run()
    return Rows(out, masses)


def split_launch(problem: Problem, config: Config) -> tuple[Launch, Tensor]:
    """The launch of the split kernel, and its table of splits."""
    batch, heads, count, keys = problem.shape
    query, key, value = (rowwise(t) for t in (problem.query, problem.key, problem.value))
    kv_heads, width, depth = key.shape[1], key.shape[3], value.shape[3]
    packed = count * (heads // kv_heads)
    tile = config.few if packed <= config.few.rows else config.many
    blocks = triton.cdiv(packed, tile.rows)
    size = split_size(
        keys, batch * kv_heads * blocks, config.waves * multiprocessors(query.device), config.least
    )
    found = plan(problem.groups, size, query.device)
    splits = found.table.shape[1]
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "part": query.new_empty(batch, heads, count, splits, depth, dtype=torch.float32),
        "lse": query.new_empty(batch, heads, count, splits, dtype=torch.float32),
        "rows": count,
        "keys": keys,
        "splits": splits,
        "kv_heads": kv_heads,
        "repeat": heads // kv_heads,
        "factor": problem.scale * LOG2E.value,
        "D": width,
        "DV": depth,
        "BM": tile.rows,
        "BN": tile.keys,
        "BD": max(16, triton.next_power_of_2(width)),
        "BDV": max(16, triton.next_power_of_2(depth)),
        "CAUSAL": problem.causal and count > 1,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        **steps("query", query, "batch", "head", "row"),
        **steps("key", key, "batch", "head", "step"),
        **steps("value", value, "batch", "head", "step"),
        **members(problem, found),
        **score_terms(problem),
    }
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return Launch(split_kernel, (splits, blocks, batch * kv_heads), arguments, options), found.table


def merge_launch(
    part: Tensor,
    lse: Tensor,
    table: Tensor,
    out: Tensor | None,
    masses: Tensor | None,
    named: tuple[Any, Tensor],
) -> Launch:
    """The launch of the merge kernel; without `out` for the masses alone, without `masses` for the other."""
    policy, numbers = named
    batch, heads, count, splits, depth = part.shape
    groups = numbers.shape[3] if masses is None else masses.shape[3]
    wide, of = triton.next_power_of_2(depth), triton.next_power_of_2(groups)
    every = triton.next_power_of_2(splits)
    fits = min(16, 2048 // (every * of), batch * heads * count // PROGRAMS)
    together = 1 << max(1, fits).bit_length() - 1
    step = max(1, min(every, 4096 // (together * wide)))
    arguments = {
        "part": part,
        "lse": lse,
        "table": table,
        "numbers": numbers,
        "out": part if out is None else out,
        "masses": lse if masses is None else masses,
        "count": batch * heads * count,
        "rows": count,
        "heads": heads,
        "splits": splits,
        "DV": depth,
        "BDV": wide,
        "COUNT": groups,
        "GROUPS": of,
        "SPLITS": every,
        "STEP": step,
        "BR": together,
        "POLICY": policy,
        "MASSES": masses is not None,
        "OUT": out is not None,
        **steps("table", table, "batch"),
        **steps("number", numbers, "batch", "head", "row", "group"),
    }
    grid = (triton.cdiv(batch * heads * count, together),)
    return Launch(merge_kernel, grid, arguments, {"num_warps": 4, "num_stages": 2})


def inside(policy: Policy, masses: Tensor) -> tuple[Any, Tensor] | None:
    """A named policy as a function of the merge kernel and its numbers (B, H, R, n); None for any other."""
    batch, heads, count, groups = masses.shape
    if policy is identity:
        return as_given, numbers_on((1.0,), masses.device).expand(masses.shape)
    if type(policy) is Redistribute and groups == 4:
        given = (policy.transfer, policy.rho, policy.min_visual)
        return redistribute, numbers_on(given, masses.device).expand(batch, heads, count, 3)
    if type(policy) is Drop and all(0 <= group < groups for group in policy.groups):
        kept = tuple(float(group not in policy.groups) for group in range(groups))
        return _factors(kept, policy.renormalise, masses)
    if type(policy) is Scale and len(policy.factors) == groups:
        return _factors(policy.factors, policy.renormalise, masses)
    if type(policy) is HeadScale:
        return as_given, policy.factors.to(masses).reshape(-1, heads, 1, 1).expand(masses.shape)
    return None


def _factors(factors: tuple[float, ...], renormalise: bool, masses: Tensor) -> tuple[Any, Tensor]:
    numbers = numbers_on(factors, masses.device).expand(masses.shape)
    return (summing_to_one if renormalise else as_given), numbers
