"""Answers as other harnesses write them, to POPE's questions on a few images."""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import regard
from regard.evals.pope import Question, build_pope

THINGS = ["dog", "cat", "car", "bus", "cup", "bed", "tv", "hot dog"]


def write_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def value(results: regard.Results, key: str, recipe: str = "none") -> float:
    (benchmark,) = results.metrics
    found: float = results.metrics[benchmark][recipe]["scores"][key]["value"]
    return found


def ask(folder: Path) -> dict[str, list[Question]]:
    """POPE on 12 images, and its question files in this folder."""
    draw = random.Random(3)
    objects = {f"COCO_val2014_{n:012d}.jpg": draw.sample(THINGS, 3) for n in range(100, 112)}
    questions = build_pope(objects, seed=1)
    for split, rows in questions.items():
        lines = ({k: getattr(q, k) for k in ("question_id", "image", "text", "label")} for q in rows)
        write_lines(folder / f"coco_pope_{split}.json", lines)
    return questions


def flat(asked: Mapping[str, Sequence[Question]]) -> list[Question]:
    return [q for rows in asked.values() for q in rows]


def said(q: Question) -> str:
    """An answer that is wrong for every fifth question, and the same for twins."""
    right = sum(map(ord, q.image + q.text)) % 5 != 0
    return q.label.title() if right else {"yes": "No", "no": "Yes"}[q.label]


def share(rows: Sequence[Question]) -> float:
    return sum(said(q).lower() == q.label for q in rows) / len(rows)


def as_llava(asked: Mapping[str, Sequence[Question]]) -> list[dict[str, Any]]:
    """One file for three splits, told apart by the offset of the ids."""
    order = ["adversarial", "random", "popular"]
    return [
        {
            "question_id": place * 10_000_000 + q.question_id,
            "prompt": f"{q.text}\nIn a word.",
            "text": said(q),
        }
        for place, split in enumerate(order)
        for q in asked[split]
    ]


def as_lmms(q: Question, number: int) -> dict[str, Any]:
    """As lmms-eval 0.7.3 writes it: without the doc."""
    metric = {"question_id": str(q.question_id), "score": 1.0, "prediction": "yes", "ground_truth": q.label}
    return {
        "doc_id": number,
        "target": q.label,
        "filtered_resps": said(q),
        "token_counts": [{"output_tokens": 2}],
        "doc_hash": "74234e98",
        "pope_accuracy": metric,
        "pope_f1_score": metric,
        "input": f"{q.text}\nAnswer the question using a single word or phrase.",
    }


def as_old_lmms(q: Question, number: int) -> dict[str, Any]:
    """As earlier versions wrote it: with the doc of lmms-lab/POPE, whose images have no ending."""
    doc = {
        "id": str(number),
        "question_id": str(q.question_id),
        "question": q.text,
        "answer": q.label,
        "image_source": Path(q.image).stem,
        "category": q.split,
    }
    return {
        "doc_id": number,
        "doc": doc,
        "target": q.label,
        "resps": [[said(q)]],
        "filtered_resps": [said(q)],
    }


def as_vlmeval(asked: Mapping[str, Sequence[Question]]) -> list[dict[str, Any]]:
    """One row a distinct question, its splits in the category; the index is no id of POPE."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for q in flat(asked):
        row = rows.setdefault(
            (q.image, q.text),
            {
                "index": len(rows),
                "image_path": q.image,
                "question": q.text,
                "answer": q.label.title(),
                "category": [],
                "prediction": said(q),
            },
        )
        row["category"].append(q.split)
    return [{**row, "category": ",".join(row["category"])} for row in rows.values()]


def check_scores(results: regard.Results, asked: Mapping[str, Sequence[Question]]) -> None:
    assert results.metrics["pope"]["none"]["items"] == len(flat(asked))
    for split, rows in asked.items():
        assert value(results, f"{split}.accuracy") == pytest.approx(share(rows))
    for split, rows in asked.items():
        for q in rows:
            record = results.items("pope")[f"{split}/{q.question_id}"]
            assert (record["answer"], record["label"]) == (said(q), q.label)
