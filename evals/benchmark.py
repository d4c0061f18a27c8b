"""What a benchmark is: where its items come from, what is asked, and how answers become counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from .run_folder import Record
from .scores import Counted, Score
from .sources import Sources

Data = dict[str, Any]
"""What a benchmark asks and scores with, ready for JSON: a run keeps it as `data/<benchmark>.json`."""


@dataclass(frozen=True)
class Request:
    """What of a data set a run asks for.

    Attributes:
        name: of the data, as the user gave it, for messages.
        sources: its files.
        wanted: only these images; None is all.
        items: most images.
        seed: of the draw of images and of questions that are built.
        scoring: as in `config.json`.
        need_images: whether the files of the images must be there; scoring answers made elsewhere does without.
    """

    name: str
    sources: Sources
    wanted: Sequence[str] | None
    items: int
    seed: int
    scoring: Mapping[str, Any]
    need_images: bool = True


@dataclass(frozen=True)
class Item:
    """One question on one image.

    Attributes:
        id: unique in its benchmark.
        image: name of the image.
        text: the question; "" where all images are asked the same.
        facts: written beside the answer, such as the label.
    """

    id: str
    image: str
    text: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tally:
    """One answer as numbers.

    Attributes:
        counts: one number a column; scores are functions of their sums.
        right: whether the answer is right; of a caption, whether it names nothing that is not there.
        facts: counted over all items and told beside the scores, such as {"unclear": 1}.
    """

    counts: Sequence[float]
    right: bool
    facts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """One answer as the page shows it.

    Attributes:
        right: as in `Tally`.
        marks: (start, end, right, object) of the words of the answer that count.
        truth: what would be right: "yes", or the objects of the image.
    """

    right: bool
    truth: str
    marks: Sequence[tuple[int, int, bool, str]] = ()


class Benchmark(ABC):
    """A benchmark. Nothing here runs a model: items go out, answers come in.

    Attributes:
        name: on the command line and of its files.
        title: on the page.
        units: what its items are.
        prompt: what is asked, with `{question}` for an item's own text.
        max_new_tokens: its usual limit of an answer.
        became: what an item does that only the recipe got right, and one that only the baseline did.
        headline: keys of the scores that the page's first sentences tell.
        verdicts: what a right item is called, and a wrong one.
        tradeoff: pairs of keys of scores that are drawn against each other: (across, up).
    """

    name: ClassVar[str]
    title: ClassVar[str]
    units: ClassVar[str] = "questions"
    prompt: ClassVar[str] = "{question}"
    max_new_tokens: ClassVar[int] = 16
    became: ClassVar[tuple[str, str]] = ("became right", "became wrong")
    headline: ClassVar[tuple[str, ...]] = ()
    verdicts: ClassVar[tuple[str, str]] = ("right", "wrong")
    tradeoff: ClassVar[tuple[tuple[str, str], ...]] = ()

    @abstractmethod
    def load(self, request: Request) -> Data:
        """Collect what is asked and what scores it.

        Raises:
            DataError: something is missing; the message says what, and what to do.
        """

    @abstractmethod
    def items(self, data: Data) -> list[Item]:
        """The items, in the order of the data."""

    @abstractmethod
    def scores(self, data: Data) -> list[Score]:
        """The scores, in the order of the page."""

    @abstractmethod
    def tally(self, record: Record, data: Data, scoring: Mapping[str, Any]) -> Tally:
        """One answered item (its facts, with "answer") as numbers, by the published rules."""

    @abstractmethod
    def view(self, record: Record, data: Data, scoring: Mapping[str, Any]) -> View:
        """One answered item as the page shows it."""

    def settle(self, scoring: Mapping[str, Any]) -> dict[str, Any]:
        """What of these choices reads its answers, with names in place of what was left open.

        Raises:
            UnknownName, EvalError: a name that nobody knows, or what it needs is not installed.
        """
        return {}

    def keep(self, data: Data, ids: Collection[str]) -> Data | None:
        """The part of the data with these item ids; None where an image's items cannot be parted."""
        return None

    def describe(self, data: Data) -> dict[str, Any]:
        """What identifies the items beside their number and images, for `config.json`."""
        return {}

    def reading(self, scoring: Mapping[str, Any]) -> str:
        """A sentence or two on how answers are read."""
        return ""

    def together(self, metrics: Mapping[str, Mapping[str, Any]]) -> str:
        """A sentence on a figure that takes in another benchmark of the run; "" where there is none.

        Args:
            metrics: {benchmark: {recipe: metrics}}, as in `metrics.json`.
        """
        return ""

    def plotted(self, data: Data) -> list[str]:
        """Keys of the scores whose change against the baseline is drawn."""
        return [score.key for score in self.scores(data) if score.main]

    def count(self, records: Iterable[Record], data: Data, scoring: Mapping[str, Any]) -> Counted:
        """Answered items as numbers, one after the other: texts are not kept."""
        ids, images, rows, right, facts = [], [], [], [], Counter[str]()
        for record in records:
            tally = self.tally(record, data, scoring)
            ids.append(record["id"])
            images.append(record["image"])
            rows.append(np.asarray(tally.counts, dtype=np.float64))
            right.append(tally.right)
            facts.update(tally.facts)
        return Counted(ids, images, np.array(rows), np.array(right, dtype=bool), dict(facts))
