"""What every recipe costs over plain greedy generation, on a random LLaVA (31 M parameters, 144 image tokens).

64 new tokens, one image, batch 1, one thread. Process time, with the processor and with attaching. A round times every
method once, in another order each time; a ratio is taken within its round. Peak memory: one call in a forked child,
the largest resident set over what the child started with. OPERA is held against plain search with 5 beams. AGLA's
matching model is left out: a stand-in gives a map at once. `--rival` times mitigv 0.1.7 (`pip install -e .[dev]`)
on the same model, picture and prompt.

Run: python benchmarks/methods.py --rival --out benchmarks/results/methods.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

import regard
from regard.hooks.engine import engine_of
from regard.interventions.matching import Match

TOKENS, BEAMS, SIDE = 64, 5, 168
APART = {"m3id, streams apart": "m3id", "vcd, streams apart": "vcd"}
RIVALS = ("vcd", "icd", "pai", "m3id", "agla")
Call = Callable[[], Any]


def build() -> tuple[Any, Any]:
    """Llama of hidden 512, 8 layers, 8 heads, vocabulary 2000; CLIP of width 256, 4 layers; a tokenizer of words."""
    torch.manual_seed(0)
    text = {"model_type": "llama", "vocab_size": 2000, "hidden_size": 512, "intermediate_size": 1376}
    text |= {"num_hidden_layers": 8, "num_attention_heads": 8, "max_position_embeddings": 1024}
    vision = {"model_type": "clip_vision_model", "hidden_size": 256, "intermediate_size": 1024}
    vision |= {"num_hidden_layers": 4, "num_attention_heads": 4, "image_size": SIDE, "patch_size": 14}
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    names = ["<pad>", "<s>", "<unk>", "<image>", *(f"w{number}" for number in range(1996))]
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    square = {"height": SIDE, "width": SIDE}
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square)
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return model, processor


def question() -> tuple[Image.Image, str]:
    """A picture of noise and a prompt of twenty words."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    return picture, "<s> <image> " + " ".join(f"w{17 * number}" for number in range(1, 21))


def at_once(images: Any, texts: Any) -> Match:
    """A relevance map that costs nothing."""
    return Match(torch.arange(36.0).view(1, 6, 6).expand(len(images), 6, 6), torch.ones(len(images)))


def methods(model: Any) -> dict[str, Any]:
    """Every recipe as it is for this model; those that need the sinks of a model get tokens that count as sinks."""
    sinks: dict[str, Any] = {"sink_dims": (3, 7), "tau": 2.5}
    own = {
        "var": regard.VAR(**sinks, min_visual=0.0, rho=0.0),
        "drop_sinks": regard.DropSinks(**sinks),
        "agla": regard.AGLA(matcher=at_once),
    }
    lines = [line for line in regard.recipes() if line.on == "transformers"]
    return {line.name: own.get(line.name) or regard.recipe(line.name, model) for line in lines}


def ours(model: Any, processor: Any) -> dict[str, Call]:
    """One call for each row of the table."""
    picture, prompt = question()

    def call(method: Any = None, beams: int = 1, joins: bool = True) -> None:
        inputs = processor(images=[picture], text=prompt, add_special_tokens=False, return_tensors="pt")
        edits: Any = contextlib.nullcontext()
        if method is not None:
            edits = regard.apply(model, method, processor=processor)
            engine_of(model).joins = joins
        with edits:
            model.generate(**inputs, num_beams=beams, do_sample=False, max_new_tokens=TOKENS)

    found = methods(model)
    calls: dict[str, Call] = {"plain": call, "plain, 5 beams": partial(call, beams=BEAMS)}
    for name, method in found.items():
        calls[name] = partial(call, method, BEAMS if name == "opera" else 1)
    for row, name in APART.items():
        calls[row] = partial(call, found[name], joins=False)
    return calls


def rivals(model: Any, processor: Any) -> dict[str, Call]:
    """mitigv's methods of the same name."""
    import mitigv

    picture, prompt = question()
    calls: dict[str, Call] = {}
    for name in (*RIVALS, "opera"):
        wrapped = mitigv.build_mitigator(name, model=model, processor=processor)
        calls[f"mitigv {name}"] = partial(wrapped.generate, picture, prompt, max_new_tokens=TOKENS)
    return calls


def timed(call: Call) -> float:
    """Process time in seconds."""
    start = time.process_time()
    with torch.inference_mode():
        call()
    return time.process_time() - start


def resident(what: str) -> float:
    """VmRSS or VmHWM of this process, in MB."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def peak(call: Call) -> float:
    """MB that one call takes above what the process had before, in a forked child."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        start = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        timed(call)
        os.write(writer, str(resident("VmHWM") - start).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as result:
        return float(result.read())


def baseline(name: str) -> str:
    """What a row is compared with."""
    return "plain, 5 beams" if name.endswith("opera") else "plain"


def measure(calls: dict[str, Call], rounds: int) -> list[dict[str, Any]]:
    """Ratios with quartiles, tokens a second and peak memory of each row; mitigv's opera is timed in one round."""
    order, draw = list(calls), random.Random(0)
    for call in (call for name, call in calls.items() if name != "mitigv opera"):
        timed(call)
    peaks = {name: peak(call) for name, call in track(calls.items(), "peak memory")}
    taken: list[dict[str, float]] = []
    for number in track(range(rounds), "rounds"):
        draw.shuffle(order)
        now = [name for name in order if number == 0 or name != "mitigv opera"]
        taken.append({name: timed(calls[name]) for name in now})
    rows = []
    for name in calls:
        seconds = [times[name] for times in taken if name in times]
        ratios = [times[name] / times[baseline(name)] for times in taken if name in times]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        row = {"method": name, "ratio": round(statistics.median(ratios), 3), "rounds": len(ratios)}
        row |= {"quartiles": [round(low, 3), round(high, 3)], "baseline": baseline(name)}
        row |= {
            "tokens_per_second": round(TOKENS / statistics.median(seconds), 1),
            "peak_mb": round(peaks[name], 1),
        }
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{TOKENS} new tokens, one thread")
    for title in ("method", "time", "quartiles", "tokens/s", "peak memory, MB"):
        table.add_column(title, justify="left" if title == "method" else "right")
    for row in rows:
        low, high = row["quartiles"]
        cells = (f"{row['ratio']:.2f}x", f"{low:.2f} to {high:.2f}", str(row["tokens_per_second"]))
        table.add_row(row["method"], *cells, f"+{row['peak_mb']:.0f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rival", action="store_true", help="time mitigv too")
    parser.add_argument("--only", default="", help="rows, separated by semicolons; plain always runs")
    parser.add_argument("--out", help="JSON file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = build()
    calls = ours(model, processor) | (rivals(model, processor) if given.rival else {})
    if given.only:
        chosen = {"plain", "plain, 5 beams", *(name.strip() for name in given.only.split(";"))}
        calls = {name: call for name, call in calls.items() if name in chosen}
    rows = measure(calls, given.rounds)
    show(rows)
    if given.out:
        facts: dict[str, Any] = {"command": f"python benchmarks/methods.py --rounds {given.rounds}"}
        facts["command"] += " --rival" if given.rival else ""
        facts["machine"] = f"{platform.machine()}, one thread, process time, shared machine"
        facts |= {"torch": torch.__version__, "transformers": transformers.__version__, "rows": rows}
        Path(given.out).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
