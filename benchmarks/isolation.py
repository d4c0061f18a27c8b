"""What IR-Diffusion's attention of a scene costs beside plain attention over the same keys, time and memory.

    python -m benchmarks.isolation --rounds 5 --out benchmarks/results/isolation-cpu.json

Shapes of SDXL's finer level: two rows (guidance), 10 heads of 64, 4,096 tokens; four subjects, each in an ellipse of a
tenth of the scene and of its portrait. Sides: `sdpa`, plain attention over the chosen keys of the references and the
scene's; `regard`, in which each query sees its own; `masked`, as the release does it: all 5 x 4,096 keys under a mask,
with the library's attention. Each side begins by joining its keys. Each ratio is the median of rounds in which the
sides take turns; peaks are those of a process a side, with and without the inputs.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.reweighted import _alone, resident
from regard.kernels.isolation import chosen_tokens, reference_regions

SUBJECTS, ROWS, HEADS, DIM = 4, 2, 10, 64
SIDES = ("sdpa", "regard", "isolation alone", "masked")


def ellipses(side: int) -> Tensor:
    """(4, N) bool, one in each quarter of the picture."""
    line = (torch.arange(side) + 0.5) / side
    down, across = line[:, None], line[None]
    places = [(0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75)]
    return torch.stack(
        [((down - y) / 0.2) ** 2 + ((across - x) / 0.16) ** 2 <= 1 for y, x in places]
    ).flatten(1)


def sides(side: int) -> dict[str, Callable[[], Tensor]]:
    """What is timed, on random inputs."""
    torch.manual_seed(0)
    cells, masks = side * side, ellipses(side)
    query, key, value = torch.randn(3, ROWS, HEADS, cells, DIM)
    keys, values = torch.randn(2, ROWS, SUBJECTS, HEADS, cells, DIM)
    chosen = [mask.nonzero()[:, 0] for mask in masks]
    regions = reference_regions(masks, masks.nonzero()[:, 0])
    alone = reference_regions(masks, masks.nonzero()[:0, 0])

    def joined(references: Tensor, own: Tensor) -> Tensor:
        return torch.cat([chosen_tokens(references, chosen), own], 2)

    def plain() -> Tensor:
        return F.scaled_dot_product_attention(query, joined(keys, key), joined(values, value))

    def regard() -> Tensor:
        return regions.attend(query, joined(keys, key), joined(values, value))

    def masked() -> Tensor:
        """Every key of every portrait, and a mask."""
        inside = torch.ones(cells, cells, dtype=torch.bool)
        for one in range(SUBJECTS):
            for two in range(SUBJECTS):
                if one != two:
                    inside &= ~(masks[one][:, None] & masks[two])
        allow = torch.cat([*(mask[:, None] & mask for mask in masks), inside], 1)
        every = [torch.cat([*own.unbind(1), mine], 2) for own, mine in ((keys, key), (values, value))]
        return F.scaled_dot_product_attention(query, every[0], every[1], attn_mask=allow)

    return {
        "sdpa": plain,
        "regard": regard,
        "isolation alone": lambda: alone.attend(query, key, value),
        "masked": masked,
    }


def growth(name: str) -> tuple[float, float]:
    """MiB by which a process's resident memory peaks above its inputs, after a smaller run; and the peak with them."""
    sides(24)[name]()
    bare = resident("VmRSS")
    run = sides(64)[name]
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before, resident("VmHWM") - bare


def peaks() -> dict[str, list[float]]:
    """Each side in a process of its own, whose freed memory goes back at once."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    found = {}
    for name in SIDES:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_alone) as pool:
            found[name] = [round(each, 1) for each in pool.submit(growth, name).result()]
    return found


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    _alone()
    timed = sides(64)
    torch.testing.assert_close(timed["regard"](), timed["masked"](), atol=1e-4, rtol=1e-4)
    taken: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(options.rounds):
        for name, call in timed.items():
            begun = time.process_time()
            call()
            taken[name].append(time.process_time() - begun)
    ratios = {}
    for name in SIDES[1:]:
        each = sorted(a / b for a, b in zip(taken[name], taken["sdpa"], strict=True))
        ratios[name] = {"median": statistics.median(each), "low": each[0], "high": each[-1]}
        print(f"{name} / sdpa: {statistics.median(each):.2f} ({each[0]:.2f} to {each[-1]:.2f})")
    memory = peaks() if Path("/proc/self/clear_refs").exists() else {}
    print(f"memory peaks in MiB, above the inputs and with them: {memory}")
    if options.out:
        record: dict[str, Any] = {
            "command": f"python -m benchmarks.isolation --rounds {options.rounds}",
            "torch": torch.__version__,
            "threads": 1,
            "seconds": {name: statistics.median(each) for name, each in taken.items()},
            "ratios_to_sdpa": ratios,
            "peak_mib_without_and_with_inputs": memory,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
