"""mitigv 0.1.7 and regard on the same pictures of the miniature: CHAIR, length and time of greedy captions, batch 1.

Both with their own defaults. mitigv returns text only, so its captions are scored here, by the same words. Its PAI is
right with eager attention only, and is run so. Time is process time, one thread, processor included.

Run: python benchmarks/rival.py --items 100 --out benchmarks/results/rival.json  (after pip install -e .[dev])
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mitigv
import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

import regard
from regard.evals.chair import score_chair
from regard.evals.data import load_data
from regard.evals.generation import generate, make_prompt
from regard.evals.miniature import load_miniature
from regard.evals.runner import CAPTION_PROMPT

Describe = Callable[[Image.Image], str]
SAME = ("vcd", "icd", "m3id", "pai")
LIMIT = 96


def scenes(items: int, folder: Path) -> dict[str, Any]:
    """Prompt, pictures and truth."""
    _, processor = load_miniature("lvlm")
    found = load_data("miniature", ["chair"], items, 1, folder, {"truth_words": "regard"})
    return {
        "prompt": make_prompt(processor, CAPTION_PROMPT),
        "files": found.files,
        "truth": found.parts["chair"],
    }


def ours(name: str, prompt: str) -> Describe:
    """A recipe on a model of its own."""
    model, processor = load_miniature("lvlm")

    def describe(picture: Image.Image) -> str:
        with regard.apply(model, name, processor=processor):
            return generate(model, processor, [prompt], [picture], LIMIT)[0].text

    return describe


def theirs(name: str, prompt: str) -> Describe:
    """mitigv's method of that name on a model of its own."""
    model, processor = load_miniature("lvlm")
    if name == "pai":
        model.set_attn_implementation("eager")
    method = mitigv.build_mitigator(name, model=model, processor=processor)

    def describe(picture: Image.Image) -> str:
        text = method.generate(picture, prompt, max_new_tokens=LIMIT)
        return text if isinstance(text, str) else str(text[0])

    return describe


def row(label: str, describe: Describe, data: dict[str, Any]) -> dict[str, Any]:
    """Scores in percent, words and seconds of a caption; the first one is made twice, and timed once."""
    pictures = {image: Image.open(file).convert("RGB") for image, file in data["files"].items()}
    describe(next(iter(pictures.values())))
    torch.manual_seed(0)
    start = time.process_time()
    captions = {image: describe(picture) for image, picture in track(pictures.items(), label)}
    seconds = time.process_time() - start
    score = score_chair(captions, data["truth"], "regard", False)
    return {
        "method": label,
        "chair_s": round(100 * score.chair_s, 1),
        "chair_i": round(100 * score.chair_i, 1),
        "recall": round(100 * score.recall, 1),
        "words": round(score.words_per_caption, 1),
        "seconds": round(seconds / len(captions), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--out", help="JSON file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = scenes(given.items, Path(folder))
        for name in ("none", *SAME):
            for label, side in (("regard", ours), ("mitigv", theirs)):
                if name == "none" and side is theirs:
                    continue
                rows.append(row(f"{label} {name}", side(name, data["prompt"]), data))
    table = Table(*rows[0], title=f"{given.items} captions of the miniature")
    for found in rows:
        table.add_row(*map(str, found.values()))
    Console().print(table)
    if given.out:
        facts: dict[str, Any] = {"command": f"python benchmarks/rival.py --items {given.items}"}
        facts |= {"machine": f"{platform.machine()}, one thread, process time, shared machine"}
        facts |= {"torch": torch.__version__, "transformers": transformers.__version__, "rows": rows}
        Path(given.out).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
