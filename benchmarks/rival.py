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
from regard.evals.generation import Reply, generate, make_prompt
from regard.evals.miniature import load_miniature
from regard.evals.runner import CAPTION_PROMPT

SAME = ("vcd", "icd", "m3id", "pai")
LIMIT = 96


def scenes(items: int, folder: Path) -> dict[str, Any]:
    """Prompt, pictures and truth."""
    _, processor = load_miniature("lvlm")
    found = load_data("miniature", ["chair"], items, 1, folder, "regard")
    return {"prompt": make_prompt(processor, CAPTION_PROMPT), "files": found.files, "truth": found.truth}


def ours(name: str, data: dict[str, Any]) -> dict[str, str]:
    """Captions with a recipe."""
    model, processor = load_miniature("lvlm")
    found: dict[str, str] = {}
    with regard.apply(model, name, processor=processor):
        for image, file in track(data["files"].items(), f"regard {name}"):
            reply: Reply = generate(
                model, processor, [data["prompt"]], [Image.open(file).convert("RGB")], LIMIT
            )[0]
            found[image] = reply.text
    return found


def theirs(name: str, data: dict[str, Any]) -> dict[str, str]:
    """Captions with mitigv's method of that name."""
    model, processor = load_miniature("lvlm")
    if name == "pai":
        model.set_attn_implementation("eager")
    method = mitigv.build_mitigator(name, model=model, processor=processor)
    found: dict[str, str] = {}
    torch.manual_seed(0)
    for image, file in track(data["files"].items(), f"mitigv {name}"):
        text = method.generate(Image.open(file).convert("RGB"), data["prompt"], max_new_tokens=LIMIT)
        found[image] = text if isinstance(text, str) else text[0]
    return found


def row(label: str, captions: dict[str, str], data: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Scores in percent, words and seconds of a caption."""
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
                start = time.process_time()
                captions = side(name, data)
                rows.append(row(f"{label} {name}", captions, data, time.process_time() - start))
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
