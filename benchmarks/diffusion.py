"""What capture and guidance cost on a U-Net: ratios of commands that take turns in one run.

    python -m benchmarks.diffusion --rounds 7 --out benchmarks/results/diffusion-cpu.json

The U-Net has Stable Diffusion 1.5's blocks at half its width, random weights and 64x64 latents, so that cross-attention
at 16x16 has 256 queries as there. Each ratio is the median over the rounds of two commands timed one after the other.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

import regard
from tests.pipelines import PROMPT, build

WORDS = ("dog", "apple")


def make(width: int) -> Any:
    """A pipeline round such a U-Net."""
    pipe = build("sd")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=16,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        attention_head_dim=8,
    )
    pipe.register_modules(unet=unet.eval(), scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seconds(call: Callable[[], Any]) -> float:
    """Time of one call."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def commands(pipe: Any) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    text, empty = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    both, latents = torch.cat([empty, text]), torch.randn(1, 4, 64, 64)
    pipe.scheduler.set_timesteps(50)
    moment = pipe.scheduler.timesteps[0]
    watch = regard.Watch(WORDS, lambda maps: None, resolution=(16, 16))
    method = regard.ASTAR(concepts=WORDS)

    @torch.no_grad()
    def plain() -> Any:
        pipe.encode_prompt(PROMPT, "cpu", 1, True)
        return pipe.unet(torch.cat([latents] * 2), moment, encoder_hidden_states=both).sample

    def with_edits(*edits: Any) -> Any:
        pipe._guidance_scale = 7.5
        with regard.apply(pipe, *edits):
            return plain()

    def eager() -> Any:
        pipe.unet.set_attn_processor(AttnProcessor())
        try:
            return plain()
        finally:
            pipe.unet.set_attn_processor(AttnProcessor2_0())

    def by_hand() -> Any:
        """A forward with backward of the conditional row to the latents, then the forward of both rows."""
        pipe.unet.requires_grad_(False)
        own = latents.clone().requires_grad_(True)
        out = pipe.unet(own, moment, encoder_hidden_states=text).sample
        torch.autograd.grad(out.sum(), own)
        pipe.unet.requires_grad_(True)
        return plain()

    return {
        "plain forward": plain,
        "16x16 maps captured": lambda: with_edits(watch),
        "eager attention everywhere": eager,
        "forward and backward, then forward, by hand": by_hand,
        "A-STAR step": lambda: with_edits(method),
    }


RATIOS = (
    ("16x16 maps captured", "plain forward"),
    ("eager attention everywhere", "plain forward"),
    ("A-STAR step", "forward and backward, then forward, by hand"),
    ("A-STAR step", "plain forward"),
)


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=int, default=160, help="channels of the first block; SD 1.5 has 320")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    timed = commands(make(options.width))
    for call in timed.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(options.rounds):
        for name, call in timed.items():
            taken[name].append(seconds(call))
    ratios = {}
    for one, two in RATIOS:
        each = sorted(a / b for a, b in zip(taken[one], taken[two], strict=True))
        ratios[f"{one} / {two}"] = {"median": statistics.median(each), "low": each[0], "high": each[-1]}
        print(f"{one} / {two}: {statistics.median(each):.2f} ({each[0]:.2f} to {each[-1]:.2f})")
    if options.out:
        record = {
            "command": f"python -m benchmarks.diffusion --rounds {options.rounds} --width {options.width}",
            "threads": options.threads,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "seconds": {name: statistics.median(each) for name, each in taken.items()},
            "ratios": ratios,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
