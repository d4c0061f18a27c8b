"""What token exit saves: prefill time, decode time and K/V bytes of a LLaVA-shaped random model, over plain sdpa.

The prompt has 576 image tokens and 40 of text; the vision tower is small, so the decoder makes up the time. Prefill
is one forward; decode is `generate` after it, per token, by the difference of two calls. Every round times all sides
once, in a shuffled order; a ratio is taken within its round, and the median over rounds is printed with its
quartiles. "never" asks the attention criterion after every block and lets nothing leave: the cost of asking.
Run: python benchmarks/token_exit.py [--rounds 9] [--json FILE]
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

import regard
from regard.hooks.kv_cache import CACHE

IMAGE, TEXT, LAYERS = 576, 40, 8
SIDES: dict[str, Any] = {
    "plain": None,
    "after 2 of 8": regard.DyVTE(layer=1),
    "after 4 of 8": regard.DyVTE(layer=3),
    "default": regard.DyVTE(),
    "never": regard.DyVTE("attention", start=0, tau=0.0),
}


def model(hidden: int) -> Any:
    """A random LLaVA: 336 x 336 pixels in patches of 14, decoder of 8 layers."""
    torch.manual_seed(0)
    text = transformers.LlamaConfig(
        vocab_size=8000,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=LAYERS,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        eos_token_id=None,
        pad_token_id=0,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    net = transformers.LlavaForConditionalGeneration(config).eval()
    net.generation_config.update(eos_token_id=None, pad_token_id=0)
    return net


def prompt(batch: int) -> dict[str, torch.Tensor]:
    """BOS, the image, text: (B, 617) ids."""
    rng = torch.Generator().manual_seed(1)
    words = torch.randint(10, 8000, (batch, TEXT), generator=rng)
    ids = torch.cat([torch.ones(batch, 1, dtype=torch.long), torch.full((batch, IMAGE), 3), words], 1)
    pixels = torch.randn(batch, 3, 336, 336, generator=rng)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@torch.no_grad()
def seconds(net: Any, inputs: dict[str, torch.Tensor], side: str, tokens: int) -> tuple[float, float, int]:
    """Process time of the prefill, of each generated token after it, and K/V bytes after the prompt."""
    method = SIDES[side]
    with contextlib.nullcontext() if method is None else regard.apply(net, method):
        start = time.process_time()
        cache = getattr(net(**inputs, logits_to_keep=1), CACHE)
        prefill = time.process_time() - start
        took = []
        for count in (1, tokens + 1):
            start = time.process_time()
            net.generate(**inputs, do_sample=False, min_new_tokens=count, max_new_tokens=count)
            took.append(time.process_time() - start)
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return prefill, (took[1] - took[0]) / tokens, size


def measure(net: Any, batch: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """One record a side: median ratios to plain of prefill and decode with quartiles, and of K/V bytes."""
    inputs = prompt(batch)
    for side in SIDES:
        seconds(net, inputs, side, 2)
    order, found = list(SIDES), {side: ([], [], []) for side in SIDES}  # type: ignore[var-annotated]
    for _ in range(rounds):
        random.shuffle(order)
        took = {side: seconds(net, inputs, side, tokens) for side in order}
        for side, figures in took.items():
            for kept, figure, plain in zip(found[side], figures, took["plain"], strict=True):
                kept.append(figure / plain)
    records = []
    for side in list(SIDES)[1:]:
        record: dict[str, Any] = {"side": side, "batch": batch}
        for name, ratios in zip(("prefill", "decode"), found[side], strict=False):
            low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).round(3).tolist()
            record |= {name: middle, f"{name}_quartiles": [low, high]}
        records.append(record | {"kv_bytes": round(found[side][2][0], 3)})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    random.seed(0)
    torch.set_num_threads(1)
    net, table = model(given.hidden), []
    for batch in given.batches:
        for record in measure(net, batch, given.tokens, given.rounds):
            table.append(record)
            spans = []
            for name in ("prefill", "decode"):
                low, high = record[f"{name}_quartiles"]
                spans.append(f"{name} {record[name]:.3f} [{low:.3f}, {high:.3f}]")
            print(
                f"{record['side']:>12} / plain, batch {batch}: {', '.join(spans)}, K/V {record['kv_bytes']:.3f}"
            )
    if given.json:
        about = {
            "command": f"python benchmarks/token_exit.py --rounds {given.rounds} --tokens {given.tokens} "
            f"--hidden {given.hidden} --batches {' '.join(map(str, given.batches))}",
            "machine": f"{platform.machine()}, one thread, process time",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        given.json.write_text(json.dumps(about | {"ratios": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
