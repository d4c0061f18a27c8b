"""Generate time of a whole model under VAR: a LLaVA-shaped model of random weights, 625 image tokens, one thread.

Sides: stock sdpa; `regard.apply(model, VAR)`; eager attention as transformers has it; eager attention with VAR on the
whole matrix of probs, as the paper's code does it (but all heads at once). Every round times all sides, in a shuffled
order, as process time; ratios are taken within a round.
Run: python benchmarks/end_to_end.py [--size 379M] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration as Llava
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

import regard
from regard.interventions.sinks import sink_strength
from regard.kernels.policies import Redistribute

SIDES = ("sdpa", "regard", "eager", "eager + VAR")
IMAGE_TOKEN, BEFORE, IMAGE, AFTER = 31_999, 35, 625, 40
DIMS, TAU = (7, 11), 2.6
VAR = regard.VAR(sink_dims=DIMS, tau=TAU, rho=0.1, min_visual=0.1)


SIZES = {  # decoder widths; the second is TinyLlama's
    "379M": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "1.1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}


def build(size: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=32_000, **SIZES[size])
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=350,
        patch_size=14,
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN)
    return Llava(config).eval().to(dtype)


def prompt(dtype: torch.dtype) -> dict[str, Tensor]:
    words = torch.randint(3, 31_000, (1, BEFORE + AFTER), generator=torch.Generator().manual_seed(0))
    image = torch.full((1, IMAGE), IMAGE_TOKEN)
    ids = torch.cat([words[:, :BEFORE], image, words[:, BEFORE:]], 1)
    pixels = torch.randn(1, 3, 350, 350, generator=torch.Generator().manual_seed(1)).to(dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


class EagerVar:
    """VAR on the whole matrix of probs: eager attention that also keeps it, with the sinks of each layer."""

    def __init__(self, model: Any) -> None:
        self.layers = model.model.language_model.layers
        self.sinks: dict[int, Tensor] = {}
        self.policy = Redistribute(VAR.transfer, VAR.rho, VAR.min_visual)

    def read(self, layer: int, hidden: Tensor) -> None:
        if hidden.shape[1] > 1:
            self.sinks[layer] = sink_strength(hidden, DIMS) >= TAU

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Any:
        out, probs = eager_attention_forward(module, query, key, value, mask, **kwargs)
        layer = module.layer_idx
        if not 2 <= layer < len(self.layers) - 1:
            return out, probs
        sinks, keys = self.sinks[layer], key.shape[2]
        image = torch.zeros_like(sinks)
        image[:, BEFORE : BEFORE + IMAGE] = True
        ids = torch.nn.functional.pad(
            torch.where(image, 1 + sinks.long(), 3 * sinks), (0, keys - sinks.shape[1])
        )
        member = torch.nn.functional.one_hot(ids, 4).to(probs)[:, None]
        first = BEFORE + IMAGE if query.shape[2] > 1 else 0
        edited = probs[:, :, first:]
        gain = self.policy((edited @ member).float()).to(probs) @ member.transpose(2, 3)
        probs = torch.cat([probs[:, :, :first], edited * gain], 2)
        value = value.repeat_interleave(module.num_key_value_groups, 1)
        return (probs @ value).transpose(1, 2).contiguous(), probs


@contextlib.contextmanager
def attached(model: Any, side: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if side == "regard":
            stack.enter_context(regard.apply(model, VAR))
        elif side.startswith("eager"):
            name = "eager" if side == "eager" else "eager_var"
            if side == "eager + VAR":
                var = EagerVar(model)
                AttentionInterface.register(name, var.attend)
                AttentionMaskInterface.register(name, eager_mask)
                for number, layer in enumerate(var.layers):
                    hook = layer.register_forward_pre_hook(
                        lambda _, args, number=number: var.read(number, args[0])  # type: ignore[misc]
                    )
                    stack.callback(hook.remove)
            model.model.language_model.set_attn_implementation(name)
            stack.callback(model.model.language_model.set_attn_implementation, "sdpa")
        yield


def seconds(model: Any, inputs: dict[str, Tensor], side: str, tokens: int) -> float:
    with attached(model, side):
        start = time.process_time()
        ids = model.generate(**inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
        took = time.process_time() - start
    assert ids.shape[1] == inputs["input_ids"].shape[1] + tokens
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--size", choices=tuple(SIZES), default="379M", help="parameters")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    random.seed(0)
    torch.set_num_threads(1)
    dtype = getattr(torch, given.dtype)
    model, inputs = build(given.size, dtype), prompt(dtype)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters, {given.dtype}")
    with regard.apply(model, VAR) as run:
        model.generate(**inputs, do_sample=False, max_new_tokens=4)
    print(run.report())
    took: dict[str, list[float]] = {side: [] for side in SIDES}
    order = list(SIDES)
    for _ in range(given.rounds):
        random.shuffle(order)
        for side in order:
            took[side].append(seconds(model, inputs, side, given.tokens))
    table = []
    for side in SIDES:
        ratios = np.array(took[side]) / np.array(took["sdpa"])
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).round(3).tolist()
        median = round(float(np.median(took[side])), 2)
        table.append({"side": side, "over_sdpa": middle, "quartiles": [low, high], "seconds": median})
        print(f"{side:>12}: {middle:.3f}x sdpa [{low:.3f}, {high:.3f}], {median} s")
    if given.json:
        about = {
            "command": "python benchmarks/end_to_end.py "
            f"--size {given.size} --dtype {given.dtype} --rounds {given.rounds}",
            "machine": f"{platform.machine()}, one thread, process time",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "report": str(run.report()),
        }
        given.json.write_text(json.dumps(about | {"sides": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
