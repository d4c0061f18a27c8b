"""POPE as a benchmark of a run; the published rules are in `scoring.py` and `questions.py`."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ...hooks.errors import UnknownName
from ..answers import PARSERS, parse
from ..benchmark import Benchmark, Data, Item, Request, Tally, View
from ..chair.coco import objects_by_image, settle_words
from ..run_folder import Record
from ..scores import Score, pope_counts, pope_scores
from ..sources import DataError, only, sample
from .scoring import Question, build_pope, load_pope, pope_version

_POSITIVES = 3  # POPE asks for three objects that are there, so an image needs as many


class Pope(Benchmark):
    """Is there a dog in the image?"""

    name = "pope"
    title = "POPE"
    headline = ("mean_f1",)

    def load(self, request: Request) -> Data:
        """The published questions of the data folder, or questions built from its annotations."""
        sources = request.sources
        if sources.questions is None:
            splits = build_questions(request.name, objects_by_image(request), request.items, request.seed)
        else:
            published = load_pope(sources.questions)
            images = only(dict.fromkeys(q.image for rows in published.values() for q in rows), request.wanted)
            if not images:
                raise DataError(
                    f"none of the images in {sources.names} has a question in {sources.questions}"
                )
            kept = set(sample(dict.fromkeys(images), request.items, f"{request.seed}/pope"))
            splits = {split: [q for q in rows if q.image in kept] for split, rows in published.items()}
        return {split: [asdict(question) for question in rows] for split, rows in splits.items()}

    def settle(self, scoring: Mapping[str, Any]) -> dict[str, Any]:
        """Which parser, and the words of questions that are built."""
        parser = scoring.get("parser") or PARSERS[0]
        if parser not in PARSERS:
            raise UnknownName("answer parser", parser, PARSERS)
        return {"parser": parser, **settle_words(scoring)}

    def items(self, data: Data) -> list[Item]:
        """One item a question and split."""
        return [
            Item(
                f"{split}/{row['question_id']}",
                row["image"],
                row["text"],
                {"split": split, "label": row["label"], "question": row["text"]},
            )
            for split, rows in data.items()
            for row in rows
        ]

    def keep(self, data: Data, ids: Collection[str]) -> Data | None:
        """The questions with these item ids; a split that loses all of its own goes too."""
        kept = {
            split: [row for row in rows if f"{split}/{row['question_id']}" in ids]
            for split, rows in data.items()
        }
        return {split: rows for split, rows in kept.items() if rows}

    def describe(self, data: Data) -> dict[str, Any]:
        """The version of the questions."""
        return {"version": pope_version(pope_questions(data))}

    def scores(self, data: Data) -> list[Score]:
        """Means over the splits, then each split."""
        return pope_scores(list(data))

    def plotted(self, data: Data) -> list[str]:
        """F1 of each split, and the means."""
        return ["mean_f1", *(f"{split}.f1" for split in data), "mean_accuracy", "mean_yes_ratio"]

    def tally(self, record: Record, data: Data, scoring: Mapping[str, Any]) -> Tally:
        """A single 1 in the columns of its split."""
        parser, label = scoring["parser"], record["label"]
        said = parse(record["answer"], parser, label)
        counts = pope_counts([record["split"]], [label], [said], list(data), parser)[0]
        unclear = int(parse(record["answer"], "vlmeval") == "other")
        return Tally(counts, said == label, {"unclear": unclear})

    def view(self, record: Record, data: Data, scoring: Mapping[str, Any]) -> View:
        """Right or wrong."""
        said = parse(record["answer"], scoring["parser"], record["label"])
        return View(said == record["label"], record["label"])

    def reading(self, scoring: Mapping[str, Any]) -> str:
        """Which parser."""
        return f"Answers are read by the {scoring['parser']} parser. Means are over the splits."


def pope_questions(data: Data) -> dict[str, list[Question]]:
    """The questions of a run by split, as `score_pope` takes them."""
    return {split: [Question(**row) for row in rows] for split, rows in data.items()}


def build_questions(
    name: str, objects: Mapping[str, Sequence[str]], items: int, seed: int
) -> dict[str, list[Question]]:
    """POPE questions by the published rules for at most `items` of these images.

    Raises:
        DataError: no image has enough objects.
    """
    usable = sum(len(set(things)) >= _POSITIVES for things in objects.values())
    if not usable:
        raise DataError(
            f"none of the {len(objects)} images of {name} has {_POSITIVES} annotated objects, which POPE needs"
        )
    return build_pope(objects, images=min(items, usable), seed=seed)
