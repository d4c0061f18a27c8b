"""What reweighting costs: `reweighted_attention` under VAR over plain SDPA, and eager attention with VAR over it.

Two eager sides: VAR on the edited rows of the probs, in place, and on the whole matrix, as vectorised code would.

Every round times all sides once, in a shuffled order, as process time of one thread; a ratio is taken within its
round, and the median over rounds is printed with its quartiles. Then the peak memory of a process a side.
Run: python benchmarks/reweighted.py [--only WORD] [--rounds 15] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from regard.kernels.groups import Groups
from regard.kernels.policies import Drop, Redistribute
from regard.kernels.reweighted import reweighted_attention

FP32, BF16 = torch.float32, torch.bfloat16
VAR = Redistribute(transfer=0.6, rho=0.0, min_visual=0.0)  # every row is edited


class Case(NamedTuple):
    """One shape: rows from `first` are edited, keys `image` (start, stop) are the image."""

    name: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    width: int
    rows: int
    keys: int
    first: int
    image: tuple[int, int]
    aim: float
    batch: int = 1


def prefill(heads: int, kv: int, width: int, keys: int, tail: int, dtype: torch.dtype, aim: float) -> Case:
    name = f"prefill {heads}/{kv} heads, d {width}, {keys} tokens"
    first = keys - tail
    return Case(name, dtype, heads, kv, width, keys, keys, first, (first - min(576, first - 35), first), aim)


def decode(heads: int, kv: int, keys: int, dtype: torch.dtype, aim: float) -> Case:
    return Case(
        f"decode {heads}/{kv} heads, d 128, {keys} keys", dtype, heads, kv, 128, 1, keys, 0, (35, 611), aim
    )


CASES = (
    *[
        prefill(32, 32, 128, keys, tail, t, 1.15)
        for keys, tail in ((640, 29), (2048, 285))
        for t in (FP32, BF16)
    ],
    *[prefill(28, 4, 128, 2048, 128, t, 1.15) for t in (FP32, BF16)],
    *[prefill(8, 8, 64, 640, 29, t, 1.30) for t in (FP32, BF16)],
    *[decode(28, 4, keys, t, 0.5) for keys in (2048, 8192) for t in (FP32, BF16)],
    *[decode(32, 32, keys, FP32, 1.4) for keys in (640, 2048)],
    Case("self-attention with 4 references, all rows", FP32, 10, 10, 64, 4096, 20480, 0, (0, 16384), 1.1),
)


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Groups]:
    """Query as a slice of its projection, key and value as a cache keeps them; ten image sinks and BOS."""
    rng = torch.Generator().manual_seed(0)

    def make(rows: int, heads: int) -> Tensor:
        flat = torch.randn(case.batch, rows, heads * case.width, generator=rng).to(case.dtype)
        return flat.unflatten(-1, (heads, case.width)).transpose(1, 2)

    query = make(case.rows, case.heads)
    key, value = (make(case.keys, case.kv_heads).contiguous() for _ in range(2))
    start, stop = case.image
    ids = torch.zeros(1, case.keys, dtype=torch.long)
    ids[:, start:stop] = 1
    if case.rows != 4096:
        ids[:, torch.linspace(start + 3, stop - 5, 10).long()] = 2
        ids[:, 0] = 3
    return query, key, value, Groups(ids, 4)


def policy_of(case: Case) -> Any:
    return Drop((2,), renormalise=True) if case.rows == 4096 else VAR


def eager(
    case: Case, query: Tensor, key: Tensor, value: Tensor, groups: Groups, policy: Any, whole: bool
) -> Tensor:
    """As transformers' eager attention, with the policy on the probs of the edited rows in place, or on the whole."""
    repeat = case.heads // case.kv_heads
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = query @ key.transpose(2, 3) * case.width**-0.5
    if 1 < case.rows == case.keys:
        lowest = torch.finfo(case.dtype).min
        scores = scores + torch.full((case.rows, case.keys), lowest, dtype=case.dtype).triu(1)
    probs = scores.softmax(-1, dtype=torch.float32)
    edited = probs if whole else probs[:, :, case.first :]
    member = groups.member
    gain = policy(edited @ member) @ member.transpose(2, 3)
    if whole:
        after = torch.arange(case.rows)[:, None] >= case.first
        probs = torch.where(after, probs * gain, probs)
    else:
        edited.mul_(gain)
    return probs.to(query.dtype) @ value


def sides(case: Case) -> dict[str, Callable[[], Any]]:
    query, key, value, groups = inputs(case)
    policy, causal = policy_of(case), 1 < case.rows == case.keys
    gqa = case.heads != case.kv_heads
    plain = lambda: F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=gqa)  # noqa: E731
    ours = lambda: reweighted_attention(  # noqa: E731
        query, key, value, groups, policy, causal=causal, enable_gqa=gqa, rows_from=case.first
    )
    given = case, query, key, value, groups, policy
    return {
        "sdpa": plain,
        "regard": ours,
        "eager": lambda: eager(*given, whole=False),
        "eager, whole": lambda: eager(*given, whole=True),
    }


def measure(case: Case, rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, one per round, after one round that does not count."""
    runs = sides(case)
    took: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for number in range(rounds + 1):
        random.shuffle(order)
        for name in order:
            repeats = 10 if case.rows == 1 else 1
            start = time.process_time()
            for _ in range(repeats):
                runs[name]()
            if number:
                took[name].append((time.process_time() - start) / repeats)
    return took


def growth(index: int, side: str) -> float:
    """MiB by which a process's resident memory peaks above its inputs when one side runs, after a smaller run."""
    small = CASES[index]._replace(rows=640, keys=640, first=500, image=(35, 400))
    sides(small)[side]()
    run = sides(CASES[index])[side]
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def memory() -> list[dict[str, Any]]:
    """Peaks in the prefill cases of 2,048 tokens, each side in a process of its own."""
    table = []
    for index, case in enumerate(CASES):
        if case.rows != 2048:
            continue
        found = {}
        for side in ("sdpa", "regard", "eager"):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_alone) as pool:
                found[side] = round(pool.submit(growth, index, side).result(), 1)
        print(f"{label(case)}: memory peaks above the inputs by {found} MiB")
        table.append({"case": label(case), "growth_mib": found})
    return table


def _alone() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


def label(case: Case) -> str:
    return f"{case.name}, {str(case.dtype).removeprefix('torch.')}"


def ratio(over: list[float], under: list[float]) -> list[float]:
    """Quartiles of the ratios of the rounds."""
    return np.quantile(np.array(over) / np.array(under), (0.25, 0.5, 0.75)).round(3).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="cases with this word in their name, or: memory")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    random.seed(0)
    _alone()
    table = []
    for case in CASES:
        name = label(case)
        if given.only not in name:
            continue
        took = measure(case, given.rounds)
        low, middle, high = ratio(took["regard"], took["sdpa"])
        gains = [ratio(took[side], took["regard"])[1] for side in ("eager", "eager, whole")]
        plain = round(1e3 * float(np.median(took["sdpa"])), 3)
        line = {"case": name, "aim": case.aim, "over_sdpa": middle, "quartiles": [low, high]}
        eagers = {"eager_over_regard": gains[0], "eager_whole_over_regard": gains[1]}
        table.append(line | eagers | {"sdpa_ms": plain})
        print(
            f"{name}: {middle:.3f}x sdpa [{low:.3f}, {high:.3f}] (aim {case.aim}), sdpa {plain} ms; "
            f"eager with the policy takes {gains[0]:.2f}x as long as regard, on the whole matrix {gains[1]:.2f}x"
        )
    peaks = memory() if given.only in ("", "memory") and Path("/proc/self/clear_refs").exists() else []
    if given.json:
        only = f"--only {given.only}" if given.only else ""
        about = {
            "command": f"python benchmarks/reweighted.py --rounds {given.rounds} {only}".strip(),
            "machine": f"{platform.machine()}, one thread, process time",
            "torch": torch.__version__,
        }
        given.json.write_text(json.dumps(about | {"cases": table, "memory": peaks}, indent=1) + "\n")


if __name__ == "__main__":
    main()
