"""How long CHAIR takes to score N captions, by word configuration, on one thread, and how much memory.

Captions are real ones of several models with their sentences in a new order, every other one with a word of its own, so
that none comes twice as a whole. Each row is a process of its own, which reads captions one at a time and keeps none.
Time is process time; what is loaded before the first caption (WordNet, the tagger) is a column of its own. "plain" is
the published way, every token of every caption through nltk's word_tokenize, one tagger and WordNetLemmatizer, on a
sample; its time for N is that of the sample times N over the sample. On the sample it is also checked that "wordnet"
finds the same objects and lengths.

Run: python benchmarks/scoring.py --captions ../shared/data/outputs/opera --nltk-data ../shared/data/nltk_data \\
         --out benchmarks/results/scoring.json  (after pip install -e .[dev])
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from regard.evals.chair import GroundTruth, chair_objects, score_chair
from regard.evals.chair.pieces import lower
from regard.evals.chair.words import chair_words, merge_pairs, node_words, pairs

WORDS = ("wordnet", "regard", "pattern")
Found = tuple[int, list[tuple[str, int]]]


def read_captions(folder: Path) -> list[str]:
    """The captions of each .json or .jsonl file with one row a line."""
    captions = []
    for file in sorted(folder.rglob("*.json*")):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        captions += [row.get("caption") or row.get("text") or "" for row in rows if "image_id" in row]
    if not any(captions):
        raise SystemExit(f"{folder} has no rows with an image_id and a caption or text")
    return [caption for caption in captions if caption]


def varied(real: list[str], count: int, shortest: int) -> Iterator[tuple[str, str]]:
    """Image and caption, ``count`` times; only captions of ``shortest`` words or more."""
    rng = random.Random(0)
    real = [caption for caption in real if len(caption.split()) >= shortest]
    images = sorted(node_words())
    for i in range(count):
        text = real[i % len(real)]
        sentences = [sentence for sentence in text.removesuffix(".").split(". ") if sentence]
        rng.shuffle(sentences)
        caption = ". ".join(sentences) + "." * text.endswith(".")
        if i % 2:
            words = caption.split(" ")
            words.insert(rng.randrange(len(words) + 1), f"w{rng.getrandbits(40):x}")
            caption = " ".join(words)
        yield images[i % len(images)], caption


def plain_pipeline() -> Callable[[str], Found]:
    """The published way: tokens after pairs are joined, category and position of each mention."""
    from nltk import word_tokenize
    from nltk.stem import WordNetLemmatizer
    from nltk.tag import PerceptronTagger

    tagger, lemmatizer, nodes = PerceptronTagger(), WordNetLemmatizer(), node_words()

    def find(caption: str) -> Found:
        parts = {"J": "a", "V": "v", "R": "r"}
        tagged = tagger.tag(word_tokenize(lower(caption)))
        lemmas = [lemmatizer.lemmatize(word, parts.get(tag[0], "n")) for word, tag in tagged]
        merged, i = [], 0
        while i < len(lemmas):
            pair = pairs().get((lemmas[i], lemmas[i + 1])) if i + 1 < len(lemmas) else None
            merged.append((pair or lemmas[i], i))
            i += 2 if pair else 1
        skipped = {"seat"} if {"toilet", "seat"} <= {word for word, _ in merged} else set()
        return len(merged), [(nodes[word], i) for word, i in merged if word in nodes and word not in skipped]

    return find


def measure(find: Callable[[], Any], load: Callable[[], Any]) -> dict[str, Any]:
    """Seconds before and of the work, and the peak of the process in MB."""
    start = time.process_time()
    load()
    loaded = time.process_time()
    found = find()
    took = time.process_time() - loaded
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"load": round(loaded - start, 2), "seconds": took, "peak_mb": round(peak), "found": found}


def one(name: str, count: int, shortest: int, folder: Path) -> dict[str, Any]:
    """One row, in a process of its own."""
    real = read_captions(folder)
    truth = GroundTruth(dict.fromkeys(node_words(), frozenset({"person", "dining table", "car"})))
    if name == "plain":
        find = plain_pipeline()
        captions = [caption for _, caption in varied(real, count, shortest)]
        row = measure(lambda: [find(caption) for caption in captions], lambda: find("A dog runs."))
        theirs = row.pop("found")
        row["same"] = sum(
            (length, objects)
            == (ours(caption), [(m.node, m.position) for m in chair_objects(caption, "wordnet")])
            for caption, (length, objects) in zip(captions, theirs, strict=True)
        )
        return row
    source = varied(real, count, shortest)
    row = measure(
        lambda: score_chair(source, truth, name, keep_captions=False),
        lambda: chair_objects("Two dogs run.", name),
    )
    score = row.pop("found")
    # The captions are made on the way; that is not scoring.
    start = time.process_time()
    made = sum(1 for _ in varied(real, count, shortest))
    row["seconds"] -= time.process_time() - start
    assert made == score.n == count
    return {**row, "words_per_caption": round(score.words_per_caption, 1), "mentions": score.mentions}


def ours(caption: str) -> int:
    """Length of a caption in tokens, by the words under test."""
    return merge_pairs(chair_words("wordnet").reduce(caption)).tokens


def rows(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every row, each from a process of its own."""
    runs = [(name, count) for name in WORDS for count in (given.n // 10, given.n)] + [("plain", given.sample)]
    for shortest in (0, 70):
        for name, count in runs:
            command = [
                sys.executable,
                __file__,
                "--one",
                name,
                "--n",
                str(count),
                "--shortest",
                str(shortest),
            ]
            command += ["--captions", given.captions] + (
                ["--nltk-data", given.nltk_data] if given.nltk_data else []
            )
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            each = found["seconds"] / count
            found |= {"seconds": round(found["seconds"], 2), "per_caption_us": round(each * 1e6)}
            if name == "plain":
                found["extrapolated_seconds"] = round(each * given.n)
            yield {"words": name, "captions": count, "shortest": shortest, **found}


def show(found: list[dict[str, Any]]) -> None:
    """The rows as a table."""
    columns = (
        "words",
        "captions",
        "shortest",
        "words_per_caption",
        "load",
        "seconds",
        "per_caption_us",
        "peak_mb",
    )
    columns += ("extrapolated_seconds", "same")
    table = Table(*columns, title="CHAIR, one thread, process time")
    for row in found:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--captions", required=True, help="folder of caption files, a row a line")
    parser.add_argument("--nltk-data", help="folder of nltk's data, unless nltk finds them by itself")
    parser.add_argument("--n", type=int, default=100_000, help="captions of each configuration")
    parser.add_argument("--sample", type=int, default=2000, help="captions of the plain pipeline")
    parser.add_argument("--shortest", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--one", choices=(*WORDS, "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--out", help="JSON file")
    given = parser.parse_args()
    if given.nltk_data:
        import nltk

        nltk.data.path.insert(0, str(Path(given.nltk_data).resolve()))
    if given.one:
        print(json.dumps(one(given.one, given.n, given.shortest, Path(given.captions))))
        return
    found = list(rows(given))
    show(found)
    if given.out:
        facts: dict[str, Any] = {
            "command": f"python benchmarks/scoring.py --captions FOLDER --n {given.n} --sample {given.sample}"
        }
        facts |= {"machine": f"{platform.machine()}, one thread, process time, shared machine"}
        facts |= {"python": platform.python_version()}
        facts |= {name: version(name) for name in ("nltk", "numpy")} | {"rows": found}
        Path(given.out).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
