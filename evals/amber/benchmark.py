"""AMBER's two tasks as benchmarks of a run; the published rules are in `scoring.py`."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from ..benchmark import Benchmark, Data, Item, Request, Tally, View
from ..run_folder import EvalError, Record
from ..scores import Score, ratio
from ..stats import Array, Metric
from .data import ATTRIBUTES, DIMENSIONS, data_folder, load_amber, wanted_images
from .scoring import (
    AMBER_PARSERS,
    CAPTION_COLUMNS,
    QUESTION_COLUMNS,
    AmberCaption,
    amber_score,
    caption_counts,
    parse_amber,
    question_counts,
    read_caption,
)
from .words import noun_reader, similarity_named


def amber_scoring(scoring: Mapping[str, Any]) -> dict[str, Any]:
    """How AMBER reads answers, with names in place of what was left open, so that a run can keep them.

    Args:
        scoring: may have "amber_words" ("official" or "regard"), "similarity" ("exact", "spacy" or "spacy:MODEL")
            and "amber_parser" ("first_word" or "official"); what is missing or None is chosen by what is
            installed, and by the paper.

    Raises:
        EvalError: an unknown name, or nltk, spaCy or their data are not here.
    """
    try:
        words = noun_reader(scoring.get("amber_words")).name
        similarity, _ = similarity_named(scoring.get("similarity"))
    except (ValueError, ImportError, LookupError, OSError) as error:
        raise EvalError(f"AMBER: {error}") from error
    parser = scoring.get("amber_parser") or AMBER_PARSERS[0]
    if parser not in AMBER_PARSERS:
        raise EvalError(f"unknown AMBER parser {parser!r}, choose one of {', '.join(AMBER_PARSERS)}")
    return {"amber_words": words, "similarity": similarity, "amber_parser": parser}


# ------------------------------------------------------------------------------------------- descriptions


def _caption_share(above: str, below: str) -> Metric:
    first, second = CAPTION_COLUMNS.index(above), CAPTION_COLUMNS.index(below)
    return lambda sums: ratio(sums[..., first], sums[..., second])


class AmberGenerative(Benchmark):
    """Which objects does a description name, and which of them are not there?"""

    name = "amber_g"
    title = "AMBER, generative"
    units = "captions"
    prompt = "Describe this image."
    max_new_tokens = 512
    became = ("became clean", "ceased to be clean")
    headline = ("chair", "hal")
    verdicts = ("clean", "not clean")
    tradeoff = (("cover", "chair"), ("length", "chair"))

    def settle(self, scoring: Mapping[str, Any]) -> dict[str, Any]:
        """Which nouns, similarity and parser."""
        return amber_scoring(scoring)

    def load(self, request: Request) -> Data:
        """The annotations of the images, and the listed words."""
        amber = load_amber(data_folder(request))
        kept = set(wanted_images(request, amber, (image.image for image in amber.images)))
        return {
            "images": {image.image: asdict(image) for image in amber.images if image.image in kept},
            "relation": amber.relation,
            "safe_words": amber.safe_words,
        }

    def items(self, data: Data) -> list[Item]:
        """One item an image; its id is AMBER's."""
        return [Item(str(row["number"]), image) for image, row in data["images"].items()]

    def scores(self, data: Data) -> list[Score]:
        """AMBER's four, with the length beside them: saying less lowers three of them."""
        return [
            Score("chair", "CHAIR", _caption_share("wrong", "nouns"), better=-1),
            Score("cover", "Cover", _caption_share("covered", "objects")),
            Score("hal", "Hal", _caption_share("hallucinated", "captions"), better=-1),
            Score("cog", "Cog", _caption_share("likely_named", "likely"), better=-1),
            Score("length", "length, words", _caption_share("length", "captions"), better=0, percent=False),
        ]

    def together(self, metrics: Mapping[str, Mapping[str, Any]]) -> str:
        """The AMBER score, of the recipes that did both tasks."""
        found, other = metrics.get(self.name, {}), metrics.get(AmberDiscriminative.name, {})
        scores = []
        for recipe in (recipe for recipe in found if recipe in other):
            chair, f1 = found[recipe]["scores"]["chair"]["value"], other[recipe]["scores"]["f1"]["value"]
            if None not in (chair, f1):
                scores.append(f"{100 * amber_score(chair, f1):.1f} ({recipe})")
        return f"AMBER score, (100 - CHAIR + F1) / 2: {', '.join(scores)}." if scores else ""

    def plotted(self, data: Data) -> list[str]:
        """AMBER's four."""
        return ["chair", "cover", "hal", "cog"]

    def tally(self, record: Record, data: Data, scoring: Mapping[str, Any]) -> Tally:
        """The counts of one caption."""
        row, found = data["images"][record["image"]], _judged(record, data, scoring)
        counts = caption_counts(found, record["answer"], len(row["truth"]), len(row["hallu"]))
        return Tally(counts.tolist(), not any(found.wrong))

    def view(self, record: Record, data: Data, scoring: Mapping[str, Any]) -> View:
        """Its nouns, marked."""
        found = _judged(record, data, scoring)
        marks = [
            (noun.start, noun.end, not wrong, noun.text)
            for noun, wrong in zip(found.nouns, found.wrong, strict=True)
        ]
        truth = dict.fromkeys(data["images"][record["image"]]["truth"])
        return View(not any(found.wrong), ", ".join(truth), marks)

    def reading(self, scoring: Mapping[str, Any]) -> str:
        """Which words, and which similarity."""
        chosen = amber_scoring(scoring)
        return (
            "CHAIR is the share of nouns that are not in the image, Hal the share of captions with such a noun, Cover "
            "the share of annotated objects that are named, Cog the share of listed likely hallucinations that are. "
            f"Nouns: {chosen['amber_words']}. Similarity: {chosen['similarity']}; with 'exact' no near-synonym is "
            "saved, so CHAIR and Hal are higher than the published script's, which uses spaCy's word vectors."
        )


def _judged(record: Record, data: Data, scoring: Mapping[str, Any]) -> AmberCaption:
    row = data["images"][record["image"]]
    return read_caption(
        record["answer"],
        row["truth"],
        row["hallu"],
        data["relation"],
        data["safe_words"],
        noun_reader(scoring.get("amber_words")),
        similarity_named(scoring.get("similarity"))[1],
    )


# ---------------------------------------------------------------------------------------------- questions


def _columns(dimensions: tuple[str, ...], name: str) -> list[int]:
    width, place = len(QUESTION_COLUMNS), QUESTION_COLUMNS.index(name)
    return [DIMENSIONS.index(dimension) * width + place for dimension in dimensions]


def _sum(dimensions: tuple[str, ...], *names: str) -> Metric:
    columns = [column for name in names for column in _columns(dimensions, name)]
    return lambda sums: sums[..., columns].sum(axis=-1)


def _share(dimensions: tuple[str, ...], above: str, below: tuple[str, ...], times: int = 1) -> Metric:
    """A ratio of sums; not defined where no question was asked."""
    first, second, asked = _sum(dimensions, above), _sum(dimensions, *below), _sum(dimensions, "questions")

    def metric(sums: Array) -> Array:
        return np.where(asked(sums) > 0, ratio(times * first(sums), second(sums)), np.nan)

    return metric


# Precision and recall are right_no / said_no and right_no / asked_no, so F1 is twice that over their sum.
_FIGURES: list[tuple[str, str, Callable[[tuple[str, ...]], Metric]]] = [
    ("f1", "F1", lambda d: _share(d, "right_no", ("said_no", "asked_no"), times=2)),
    ("accuracy", "accuracy", lambda d: _share(d, "right", ("questions",))),
    ("precision", "precision", lambda d: _share(d, "right_no", ("said_no",))),
    ("recall", "recall", lambda d: _share(d, "right_no", ("asked_no",))),
]
_PARTS: dict[str, tuple[str, ...]] = {
    "existence": ("existence",),
    "attribute": ATTRIBUTES,
    **{name: (name,) for name in ATTRIBUTES},
    "relation": ("relation",),
}


class AmberDiscriminative(Benchmark):
    """Questions on existence, attributes and relations; "no" is the positive class."""

    name = "amber_d"
    title = "AMBER, discriminative"
    headline = ("f1", "accuracy")

    def settle(self, scoring: Mapping[str, Any]) -> dict[str, Any]:
        """Which parser."""
        return {"amber_parser": amber_scoring(scoring)["amber_parser"]}

    def load(self, request: Request) -> Data:
        """The questions on the images."""
        amber = load_amber(data_folder(request))
        kept = set(wanted_images(request, amber, (question.image for question in amber.questions)))
        return {"questions": [asdict(row) for row in amber.questions if row.image in kept]}

    def items(self, data: Data) -> list[Item]:
        """One item a question; its id is AMBER's."""
        return [
            Item(
                str(row["number"]),
                row["image"],
                row["text"],
                {"dimension": row["dimension"], "label": row["label"], "question": row["text"]},
            )
            for row in data["questions"]
        ]

    def scores(self, data: Data) -> list[Score]:
        """F1, accuracy, precision and recall of all questions, then by dimension."""
        scores = [Score(key, title, figure(DIMENSIONS), main=True) for key, title, figure in _FIGURES]
        said = _share(DIMENSIONS, "said_yes", ("questions",))
        scores.append(Score("yes_ratio", "yes ratio", said, better=0))
        for part, dimensions in _PARTS.items():
            for key, title, figure in _FIGURES:
                main = key == "f1" and part not in ATTRIBUTES
                scores.append(Score(f"{part}.{key}", f"{title}, {part}", figure(dimensions), main=main))
        return scores

    def plotted(self, data: Data) -> list[str]:
        """F1 of each dimension, overall figures, and the yes ratio."""
        return ["f1", *(f"{part}.f1" for part in _PARTS), "accuracy", "yes_ratio"]

    def tally(self, record: Record, data: Data, scoring: Mapping[str, Any]) -> Tally:
        """A question of its dimension."""
        said = parse_amber(record["answer"], scoring.get("amber_parser") or AMBER_PARSERS[0])
        counts = question_counts(record["dimension"], record["label"], said)
        return Tally(counts.tolist(), said == record["label"], {"unclear": int(said == "other")})

    def view(self, record: Record, data: Data, scoring: Mapping[str, Any]) -> View:
        """Right or wrong."""
        said = parse_amber(record["answer"], scoring.get("amber_parser") or AMBER_PARSERS[0])
        return View(said == record["label"], record["label"])

    def reading(self, scoring: Mapping[str, Any]) -> str:
        """Which parser, and the positive class."""
        parser = scoring.get("amber_parser") or AMBER_PARSERS[0]
        return (
            f"Answers are read by AMBER's {parser} parser; what is neither yes nor no is wrong. Precision, recall and "
            "F1 are those of the answer no. Existence questions are all to be answered no, so their accuracy is their "
            "recall."
        )
