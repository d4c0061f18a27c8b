"""What OPERA costs over the plain 5-beam search of the same random LLaVA (31 M parameters, 144 image tokens).

Process time: every round times both sides once; a ratio is taken within its round. Peak memory: each side in
a forked child, the largest resident set over what the child started with. Run: python benchmarks/opera.py
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from typing import Any

import torch
import transformers

import regard

SIDES = ("beam", "opera")


def build() -> tuple[Any, dict[str, Any]]:
    """Llama of hidden 512, 8 layers, 8 heads, vocabulary 2000; CLIP of width 256, 4 layers, 168 px."""
    torch.manual_seed(0)
    text = {"model_type": "llama", "vocab_size": 2000, "hidden_size": 512, "intermediate_size": 1376}
    text |= {"num_hidden_layers": 8, "num_attention_heads": 8, "max_position_embeddings": 1024}
    vision = {"model_type": "clip_vision_model", "hidden_size": 256, "intermediate_size": 1024}
    vision |= {"num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 168, "patch_size": 14}
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    ids = torch.cat([torch.tensor([1]), torch.full((144,), 3), torch.randint(10, 2000, (20,))])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model, inputs | {"pixel_values": torch.randn(1, 3, 168, 168)}


def generate(model: Any, inputs: dict[str, Any], side: str, tokens: int) -> float:
    """Process time of one call."""
    edits = regard.apply(model, "opera") if side == "opera" else contextlib.nullcontext()
    start = time.process_time()
    with edits:
        model.generate(**inputs, num_beams=5, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
    return time.process_time() - start


def resident(what: str) -> float:
    """VmRSS or VmHWM of this process, in MB."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def peak(model: Any, inputs: dict[str, Any], side: str, tokens: int) -> float:
    """MB that one call takes above what the process had before, in a forked child."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        start = resident("VmRSS")
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")
        generate(model, inputs, side, tokens)
        os.write(writer, str(resident("VmHWM") - start).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as result:
        return float(result.read())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, inputs = build()
    for side in SIDES:
        generate(model, inputs, side, 4)
    peaks = {side: peak(model, inputs, side, given.tokens) for side in SIDES}
    took = [
        {side: generate(model, inputs, side, given.tokens) for side in SIDES} for _ in range(given.rounds)
    ]
    ratios = [seconds["opera"] / seconds["beam"] for seconds in took]
    middle = {side: statistics.median(seconds[side] for seconds in took) for side in SIDES}
    print(f"{given.tokens} tokens, 5 beams: plain {middle['beam']:.2f} s, opera {middle['opera']:.2f} s")
    print(f"ratio {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
    print(f"peak memory: plain +{peaks['beam']:.0f} MB, opera +{peaks['opera']:.0f} MB")


if __name__ == "__main__":
    main()
