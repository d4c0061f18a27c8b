"""MME, whole and its hallucination subset, as benchmarks of a run; the published rules are in `scoring.py`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np

from ...hooks.errors import UnknownName
from ..answers import PARSERS, Reading, parse
from ..benchmark import Benchmark, Data, Item, Request, Tally, View
from ..run_folder import Record
from ..scores import Counted, Score
from ..sources import DataError, sample
from ..stats import Array, Metric
from .scoring import HALLUCINATION, SUBTASKS, TOTALS, load_mme

_QUESTIONS, _RIGHT, _IMAGES, _BOTH_RIGHT, _YES = range(5)
_WIDTH = 5  # columns of a subtask


def _defined(above: Array, below: Array) -> Array:
    """A ratio, not defined where nothing was asked."""
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def _share(place: int, above: int, below: int) -> Metric:
    first, second = place * _WIDTH + above, place * _WIDTH + below
    return lambda sums: _defined(sums[..., first], sums[..., second])


def _points(place: int) -> Metric:
    accuracy, plus = _share(place, _RIGHT, _QUESTIONS), _share(place, _BOTH_RIGHT, _IMAGES)
    return lambda sums: 100 * (accuracy(sums) + plus(sums))


def _total(places: Sequence[int]) -> Metric:
    parts = [_points(place) for place in places]
    return lambda sums: np.sum([part(sums) for part in parts], axis=0)


def _yes_ratio(sums: Array) -> Array:
    return _defined(sums[..., _YES::_WIDTH].sum(axis=-1), sums[..., _QUESTIONS::_WIDTH].sum(axis=-1))


class MME(Benchmark):
    """Two questions an image in fourteen subtasks."""

    name = "mme"
    title = "MME"
    headline: ClassVar[tuple[str, ...]] = ("perception", "cognition")
    subtasks: ClassVar[tuple[str, ...]] = SUBTASKS

    def settle(self, scoring: Mapping[str, Any]) -> dict[str, Any]:
        """Which parser."""
        parser = scoring.get("mme_parser") or "mme"
        if parser not in PARSERS:
            raise UnknownName("answer parser", parser, PARSERS)
        return {"mme_parser": parser}

    def load(self, request: Request) -> Data:
        """The questions on all images, or on some of them, drawn without regard to the subtask."""
        sources = request.sources
        questions = load_mme(sources.root or sources.images, sources.images, self.subtasks)
        images = dict.fromkeys(question.image for question in questions)
        if request.wanted is not None:
            images = {image: None for image in images if _is_wanted(image, request.wanted)}
            if not images:
                raise DataError(
                    f"none of the images in {sources.names} is one of MME's: name them by their path in the folder of "
                    f"images, such as {questions[0].image}, one per line"
                )
        kept = set(sample(images, request.items, f"{request.seed}/{self.name}"))
        return {"questions": [asdict(question) for question in questions if question.image in kept]}

    def items(self, data: Data) -> list[Item]:
        """One item a question."""
        items = []
        numbers: dict[str, int] = {}
        for row in data["questions"]:
            image = row["image"]
            numbers[image] = numbers.get(image, 0) + 1
            facts = {"subtask": row["subtask"], "label": row["label"], "question": row["text"]}
            items.append(Item(f"{image}/{numbers[image]}", image, row["text"], facts))
        return items

    def scores(self, data: Data) -> list[Score]:
        """Totals, the yes ratio, then each subtask; a total is not defined unless all its subtasks were asked."""
        scores = []
        for name, subtasks in TOTALS.items():
            if set(subtasks) <= set(self.subtasks):
                metric = _total([self.subtasks.index(subtask) for subtask in subtasks])
                scores.append(Score(name, f"{name}, of {200 * len(subtasks)}", metric, percent=False))
        scores.append(Score("yes_ratio", "yes ratio", _yes_ratio, better=0))
        for place, name in enumerate(self.subtasks):
            accuracy, plus = _share(place, _RIGHT, _QUESTIONS), _share(place, _BOTH_RIGHT, _IMAGES)
            main = name in HALLUCINATION
            scores += [
                Score(f"{name}.score", f"{name}, of 200", _points(place), percent=False, main=main),
                Score(f"{name}.accuracy", f"accuracy, {name}", accuracy, main=False),
                Score(f"{name}.accuracy_plus", f"accuracy+, {name}", plus, main=False),
            ]
        return scores

    def plotted(self, data: Data) -> list[str]:
        """Accuracy and accuracy+ of the subtasks that were asked, which are shares."""
        asked = {row["subtask"] for row in data["questions"]}
        names = [name for name in self.subtasks if name in asked]
        return [f"{name}.{kind}" for name in names for kind in ("accuracy", "accuracy_plus")]

    def tally(self, record: Record, data: Data, scoring: Mapping[str, Any]) -> Tally:
        """One question; what both questions of an image make is added by `count`."""
        said = _said(record, scoring)
        right = said == record["label"]
        counts = np.zeros((len(self.subtasks), _WIDTH))
        counts[self.subtasks.index(record["subtask"]), [_QUESTIONS, _RIGHT, _YES]] = 1, right, said == "yes"
        return Tally(counts.ravel().tolist(), right, {"unclear": int(said == "other")})

    def count(self, records: Iterable[Record], data: Data, scoring: Mapping[str, Any]) -> Counted:
        """One row a question; the second question of an image also has the image's own counts."""
        counted = super().count(records, data, scoring)
        first: dict[str, int] = {}
        for row, image in enumerate(counted.images):
            if image not in first:
                first[image] = row
                continue
            subtask = int(np.argmax(counted.counts[row, _QUESTIONS::_WIDTH])) * _WIDTH
            counted.counts[row, subtask + _IMAGES] = 1
            counted.counts[row, subtask + _BOTH_RIGHT] = counted.right[row] and counted.right[first[image]]
        return counted

    def view(self, record: Record, data: Data, scoring: Mapping[str, Any]) -> View:
        """Right or wrong."""
        return View(_said(record, scoring) == record["label"], record["label"])

    def reading(self, scoring: Mapping[str, Any]) -> str:
        """Which parser, and what the figures are."""
        return (
            f"Answers are read by the {scoring.get('mme_parser') or 'mme'} parser; what is neither yes nor no is "
            "wrong. A subtask's score is accuracy times 100 plus accuracy+ times 100; accuracy+ is the share of images "
            "with both answers right."
        )


class MMEHallucination(MME):
    """The four subtasks of MME that are asked for hallucination."""

    name = "mme_hallucination"
    title = "MME, hallucination subset"
    headline = ("hallucination",)
    subtasks = HALLUCINATION


def _said(record: Record, scoring: Mapping[str, Any]) -> Reading:
    return parse(record["answer"], scoring.get("mme_parser") or "mme", record["label"])


def _is_wanted(image: str, wanted: Sequence[str]) -> bool:
    """Whether a path, or the end of one, is asked for: subtasks share file names, so a bare name takes all of them."""
    return any(image == name or image.endswith(f"/{name}") for name in wanted)
