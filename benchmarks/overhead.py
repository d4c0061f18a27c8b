"""What attaching costs: generate time of the miniature LVLM under each recipe, over stock sdpa.

Every round times all sides once, in a shuffled order; a ratio is taken within its round, and the median
over rounds is printed with its quartiles. Run: python benchmarks/overhead.py [--rounds 15] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

import regard

SIDES = ("stock", "none", "vhr", "var")
PROMPT = "USER: <image>\nPlease describe this image in detail. ASSISTANT:"


def seconds(model: Any, inputs: dict[str, Any], side: str, tokens: int) -> float:
    """Process time of one generate call, attaching and detaching included."""
    edits = contextlib.nullcontext() if side == "stock" else regard.apply(model, side)
    start = time.process_time()
    with edits:
        model.generate(**inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
    return time.process_time() - start


def measure(batch: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Ratios to stock of each side, one per round."""
    model, processor = regard.load_miniature("lvlm")
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(batch)]
    inputs = processor(images=images, text=[PROMPT] * batch, return_tensors="pt")
    for side in SIDES:
        seconds(model, inputs, side, 4)
    ratios: dict[str, list[float]] = {side: [] for side in SIDES[1:]}
    order = list(SIDES)
    for _ in range(rounds):
        random.shuffle(order)
        took = {side: seconds(model, inputs, side, tokens) for side in order}
        for side in ratios:
            ratios[side].append(took[side] / took["stock"])
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    random.seed(0)
    torch.set_num_threads(1)
    table = []
    for batch in (1, 8):
        for side, ratios in measure(batch, given.tokens, given.rounds).items():
            low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).round(3).tolist()
            table.append({"recipe": side, "batch": batch, "ratio": middle, "quartiles": [low, high]})
            print(
                f"{side:>5} / stock, batch {batch}, {given.tokens} tokens: {middle:.3f} [{low:.3f}, {high:.3f}]"
            )
    if given.json:
        about = {
            "command": f"python benchmarks/overhead.py --rounds {given.rounds} --tokens {given.tokens}",
            "machine": f"{platform.machine()}, one thread, process time",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        given.json.write_text(json.dumps(about | {"ratios": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
