"""`reweighted_attention` on a GPU: first against float64, then its time beside SDPA and eager attention.

Correctness: the cases of benchmarks/gpu_check.py. A failure is printed, and the exit code is 1.
Speed: every round times all sides in a shuffled order, each some times with the L2 cache flushed between, by CUDA
events (process time on a CPU); ratios are taken within a round. "graph of": a replayed CUDA graph, without the host's
time. "unnamed policy": any function, so the merge runs twice; a model's layers call it so. "no policy": the same kernel
over one group, plain attention in Triton.

Run: python benchmarks/gpu_kernels.py [--minutes 8] [--only WORD] [--out FILE]; to try it: --device cpu --size tiny
"""

from __future__ import annotations

import contextlib
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import gpu_check
import torch
from gpu_common import Results, device_of, options
from reweighted import VAR, Case, decode, label, prefill, ratio
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from regard.kernels.groups import Groups
from regard.kernels.policies import Policy, Scale, identity
from regard.kernels.reweighted import reweighted_attention

FP16, BF16 = gpu_check.FP16, gpu_check.BF16
HALVED = Scale((1.0, 0.5, 1.0, 1.0), renormalise=True)
LIBRARY = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
FLUSH = 256 << 20  # bytes written before each run: several times the L2 cache
Side = tuple[Callable[[], Any], Callable[[], Any]]  # what to enter around the runs, and one run


def extended(references: int, tokens: int = 4096, heads: int = 10) -> Case:
    """SDXL's self-attention at 1024 pixels with the keys of some references behind its own, their weight halved."""
    name, keys = f"self-attention, {tokens} tokens, {references} references", tokens * (references + 1)
    return Case(name, FP16, heads, heads, 64, tokens, keys, 0, (tokens, keys), 1.1, 2)


def cases(size: str) -> tuple[Case, ...]:
    if size == "tiny":
        return decode(4, 2, 640, BF16, 1.2), prefill(4, 2, 32, 192, 29, BF16, 1.25), extended(1, 256, 2)
    many = [decode(32, 32, keys, BF16, 1.2)._replace(batch=8) for keys in (640, 2048)]
    return (
        *[decode(28, 4, keys, BF16, 1.2) for keys in (2048, 4096, 8192, 16384)],
        *[decode(32, 32, keys, BF16, 1.2) for keys in (640, 2048)],
        *[case._replace(name=f"{case.name}, batch 8") for case in many],
        prefill(32, 32, 128, 640, 29, BF16, 1.25),
        prefill(32, 32, 128, 2048, 285, BF16, 1.1),
        *[prefill(28, 4, 128, keys, 128, BF16, 1.1) for keys in (2048, 4096, 16384)],
        *[extended(references) for references in (0, 1, 4)],
    )


def inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Groups]:
    """Query as a slice of its projection, key and value as a cache keeps them; ten image sinks and BOS."""
    torch.manual_seed(0)

    def make(rows: int, heads: int) -> Tensor:
        flat = torch.randn(case.batch, rows, heads * case.width, dtype=case.dtype, device=device)
        return flat.unflatten(-1, (heads, case.width)).transpose(1, 2)

    query = make(case.rows, case.heads)
    key, value = (make(case.keys, case.kv_heads).contiguous() for _ in "kv")
    start, stop = case.image
    ids = torch.zeros(1, case.keys, dtype=torch.long)
    ids[:, start:stop] = 1
    if not case.name.startswith("self"):
        ids[:, torch.linspace(start + 3, stop - 5, 10).long()] = 2
        ids[:, 0] = 3
    return query, key, value, Groups(ids.to(device), 4)


def eager(
    case: Case, parts: Any, mask: Tensor | None, policy: Policy | None = None, whole: bool = True
) -> Tensor:
    """As transformers has it; with the policy on the whole matrix of probs, or on the edited rows in place."""
    query, key, value, groups = parts
    repeat = case.heads // case.kv_heads
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = query @ key.mT * case.width**-0.5
    probs = (scores if mask is None else scores + mask).softmax(-1, dtype=torch.float32)
    if policy is not None:
        edited = probs if whole else probs[:, :, case.first :]
        gain = policy(edited @ groups.member) @ groups.member.mT
        if whole:
            after = torch.arange(case.rows, device=query.device)[:, None] >= case.first
            probs = torch.where(after, probs * gain, probs)
        else:
            edited.mul_(gain)
    return probs.to(query.dtype) @ value


def sides(case: Case, device: torch.device) -> dict[str, Side]:
    parts = query, key, value, groups = inputs(case, device)
    causal, gqa = case.name.startswith("prefill"), case.heads != case.kv_heads
    policy: Policy = HALVED if case.name.startswith("self") else VAR
    mask = query.new_full((case.rows, case.keys), -torch.inf).triu(1) if causal else None
    plain = partial(F.scaled_dot_product_attention, query, key, value, is_causal=causal, enable_gqa=gqa)
    given: dict[str, Any] = {"causal": causal, "enable_gqa": gqa, "rows_from": case.first}
    ours = partial(reweighted_attention, query, key, value, groups, policy, **given)
    unnamed = partial(reweighted_attention, query, key, value, groups, lambda masses: policy(masses), **given)
    single = Groups(torch.zeros_like(groups.ids), 1)
    runs: dict[str, Any] = {
        "sdpa": plain,
        "ours": ours,
        "ours, unnamed policy": unnamed,
        "ours, no policy": partial(reweighted_attention, query, key, value, single, identity, **given),
        "eager": partial(eager, case, parts, mask),
        "eager + policy": partial(eager, case, parts, mask, policy),
        "eager + policy, edited rows": partial(eager, case, parts, mask, policy, whole=False),
    }
    found: dict[str, Side] = {name: (contextlib.nullcontext, run) for name, run in runs.items()}
    if device.type == "cuda":
        found |= {f"sdpa {name}": (partial(sdpa_kernel, kind), plain) for name, kind in LIBRARY.items()}
        found["ours by torch"] = contextlib.nullcontext, partial(ours, backend="torch")
        for name in ("sdpa", "ours"):
            found[f"graph of {name}"] = contextlib.nullcontext, captured(runs[name])
    return found


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """Replays a CUDA graph of one run, which is recorded at the first call."""
    graphs: list[torch.cuda.CUDAGraph] = []

    def replay() -> None:
        if not graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            graphs.append(graph)
        graphs[0].replay()

    return replay


def milliseconds(side: Side, repeats: int, cache: Tensor) -> float:
    """Median of some runs with a cold cache."""
    around, run = side
    taken = []
    with around():
        for _ in range(repeats):
            cache.zero_()
            if cache.is_cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
                start.record()
                run()
                end.record()
                taken.append((start, end))
            else:
                begin = time.process_time()
                run()
                taken.append(1e3 * (time.process_time() - begin))
    if cache.is_cuda:
        torch.cuda.synchronize()
        taken = [start.elapsed_time(end) for start, end in taken]
    return statistics.median(taken)


def warmed(case: Case, device: torch.device) -> tuple[dict[str, Side], dict[str, str], dict[str, float]]:
    """The sides that run, why the others do not, and the MiB that each takes above its inputs."""
    runs, failed, peaks = sides(case, device), {}, {}
    for name, (around, run) in list(runs.items()):
        try:
            with around():
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                    peaks[name] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
        except (RuntimeError, NotImplementedError) as error:
            failed[name] = str(error).strip().splitlines()[0][:200]
            del runs[name]
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return runs, failed, peaks


def measure(case: Case, device: torch.device, rounds: int, repeats: int) -> dict[str, Any]:
    """Ratios with quartiles: ours over SDPA's, the others over ours."""
    runs, failed, peaks = warmed(case, device)
    cache = torch.empty(FLUSH if device.type == "cuda" else 1, dtype=torch.int8, device=device)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            taken[name].append(milliseconds(runs[name], repeats, cache))
    pairs = [
        (name, "sdpa" if "ours" in name else "ours")
        for name in runs
        if not name.startswith(("graph", "sdpa"))
    ]
    pairs += [("ours", name) for name in runs if name.startswith("sdpa ")] + [
        ("graph of ours", "graph of sdpa")
    ]
    ratios = {
        f"{over} / {under}": ratio(taken[over], taken[under])
        for over, under in pairs
        if {over, under} <= taken.keys()
    }
    middle = {name: round(statistics.median(times), 4) for name, times in taken.items()}
    found = {"case": label(case), "aim_over_sdpa": case.aim, "quartiles": ratios, "ms": middle}
    return found | {"peak_mib": peaks, "not_run": failed}


def main() -> None:
    parser = options(__doc__, 8, 15)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--repeats", type=int, default=20, help="runs of a side in a round")
    parser.add_argument("--only", default="", help="cases with this word in their name, or: correctness")
    parser.add_argument("--no-check", action="store_true", help="speed alone")
    given = parser.parse_args()
    device = device_of(given.device)
    results = Results("kernels", given, device)
    failed = 0
    if not given.no_check:
        lines = gpu_check.check(device)
        bad = [line for line in lines if not line["passed"]]
        failed, worst = len(bad), sorted(lines, key=lambda line: -line.get("out", 0))[:5]
        results.add("correctness", {"checked": len(lines), "failed": bad, "nearest_to_the_bound": worst})
        results.last = time.monotonic()  # a check is no case
    with torch.inference_mode():
        for case in cases(given.size):
            name = label(case)
            if given.only in name and results.room(name):
                found = measure(case, device, given.rounds, given.repeats)
                failed += "ours" in found["not_run"]  # other sides may be missing here, ours may not
                results.add("cases", found)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
