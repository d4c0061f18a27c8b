"""What a page of 10,000 items weighs, how long it takes to write, and how soon a browser shows it.

    python -m benchmarks.report_page --out benchmarks/results/report-page-cpu.json

The run is written by hand: POPE's three splits and CHAIR on as many images as are asked for, three recipes, pictures
of COCO's size with noise. The browser is headless, and its processor is the one that the rest runs on. Needs chromium.
"""

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from regard.evals.pope import Question
from regard.evals.report import write_report
from regard.evals.results import Results
from regard.evals.run_folder import RunFolder
from tests.chromium import Browser

RECIPES = ("none", "vhr", "var")
SPLITS = ("random", "popular", "adversarial")
THINGS = ("dog", "cat", "bench", "person", "car", "bottle", "chair", "cup", "clock", "bird")
FILLER = "there is also some light on the wall behind and the floor is made of old wood".split()
SHOWN = "document.querySelector('#count').textContent"


def config(images: int) -> dict[str, Any]:
    """What a run of this kind notes."""
    names = ("pope", "chair")
    return {
        "benchmarks": names,
        "source": "by hand",
        "items": images,
        "seed": 0,
        "model_name": "no model",
        "model": {
            "class": "none",
            "processor": "none",
            "dtype": "float16",
            "parameters": 1,
            "sha256_of_samples": "",
        },
        "data": {name: {"images": images, "images_sha256": "0" * 64} for name in names},
        "prompts": {"pope": "{question}", "chair": "Please describe this image in detail."},
        "generation": {name: {"max_new_tokens": 512, "do_sample": False, "num_beams": 1} for name in names},
        "recipes": {recipe: [] for recipe in RECIPES},
        "scoring": {"parser": "official", "words": "regard", "drop_unfinished": False},
        "versions": {},
        "sessions": [{"started": "", "command": None, "batch_size": 1, "device": "cpu", "python": ""}],
    }


def write_run(path: Path, questions: int, captions: int) -> list[str]:
    """A run with answers of the usual lengths; the names of its images."""
    chance = random.Random(0)
    images = [f"COCO_val2014_{number:012d}.jpg" for number in range(max(captions, questions // 18))]
    folder = RunFolder.create(path, config(len(images)))
    truth = {image: chance.sample(THINGS, 3) for image in images[:captions]}
    asked: dict[str, list[Question]] = {split: [] for split in SPLITS}
    for number in range(questions):
        split, image = SPLITS[number % 3], images[number // 18]
        text = f"Is there a {chance.choice(THINGS)} in the image?"
        asked[split].append(Question(number, image, text, chance.choice(("yes", "no")), split))
    folder.write_json("data/pope.json", {split: [asdict(q) for q in rows] for split, rows in asked.items()})
    folder.write_json("data/chair.json", truth)
    for recipe in RECIPES:
        common = {"recipe": recipe, "prompt": "p", "tokens": 9, "cut": False, "seconds": 0.5}
        for split, rows in asked.items():
            answers = [
                {
                    **common,
                    "id": f"{split}/{q.question_id}",
                    "image": q.image,
                    "label": q.label,
                    "split": split,
                    "question": q.text,
                    "answer": q.label if chance.random() < 0.85 else "yes",
                }
                for q in rows
            ]
            folder.append("pope", recipe, answers)
        captions_said = [
            {**common, "id": image, "image": image, "answer": caption(chance, things)}
            for image, things in truth.items()
        ]
        folder.append("chair", recipe, captions_said)
    folder.close()
    return images


def caption(chance: random.Random, things: list[str]) -> str:
    """About 90 words, some of them objects."""
    sentences = [f"There is a {thing} here, {' '.join(chance.sample(FILLER, 14))}." for thing in things]
    return " ".join(
        [*sentences, f"I also see a {chance.choice(THINGS)}, {' '.join(chance.sample(FILLER, 16))}."]
    )


def draw(path: Path, names: list[str]) -> dict[str, Path]:
    """Image files of 640 by 480: soft shapes with noise, which compress about as photographs do."""
    generator = np.random.default_rng(0)
    files = {}
    for name in names:
        coarse = Image.fromarray(generator.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = np.clip(smooth + generator.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
        files[name] = path / name
        Image.fromarray(noisy).save(files[name], quality=90)
    return files


def written(path: Path, files: dict[str, Path]) -> dict[str, float]:
    """Seconds to score the run, and to write its page with and without the copies of the images; its megabytes."""
    begun = time.perf_counter()
    results = Results.load(path)
    scored = time.perf_counter()
    write_report(results, files)
    first = time.perf_counter()
    write_report(results)
    again = time.perf_counter()
    return {
        "score_seconds": scored - begun,
        "write_first_seconds": first - scored,
        "write_again_seconds": again - first,
        "page_megabytes": results.page.stat().st_size / 1e6,
    }


def seen(page: Path, key: str, rounds: int) -> dict[str, float]:
    """Milliseconds until the page paints, until the browser of items stands, and of one filter, search and step."""
    rows: list[dict[str, float]] = []
    for _ in range(rounds):
        with Browser() as browser:
            ready = browser.open(page, f"#set={key}&show=all") * 1000
            paint = "performance.getEntriesByName('first-contentful-paint')[0]"
            browser.wait(f"{paint} !== undefined")
            row = {"first_paint": browser.run(f"{paint}.startTime"), "ready": ready}
            for name, action in {
                "filter": "document.querySelector('#show input[value=fixed]').click()",
                "back_to_all": "document.querySelector('#show input[value=all]').click()",
                "step": "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'j', bubbles: true}))",
                "scroll": "document.querySelector('#list').scrollTop = 200000",
                "search_first": SEARCH,
                "search_again": SEARCH.replace("cup", "clock"),
            }.items():
                row[name] = browser.run(TIMED % action)
            row["rows_in_page"] = browser.run("document.querySelectorAll('.row').length")
            rows.append(row)
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


SEARCH = (
    "(document.querySelector('#query').value = 'cup', "
    "document.querySelector('#query').dispatchEvent(new Event('input')), new Promise(r => setTimeout(r, 120)))"
)
TIMED = """(async () => {
  const begun = performance.now();
  await (%s);
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)));
  return performance.now() - begun;
})()"""


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=9_000)
    parser.add_argument("--captions", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        names = write_run(run, given.questions, given.captions)
        files = draw(Path(place), names)
        found: dict[str, Any] = {
            "questions": given.questions,
            "captions": given.captions,
            "recipes": len(RECIPES),
            "images": len(names),
            "machine": platform.machine(),
            **written(run, files),
            "milliseconds": {
                name: seen(run / "report.html", f"0-{name}", given.rounds) for name in ("pope", "chair")
            },
        }
    text = json.dumps(found, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
