"""The items of a page: what every recipe answered, for the browser and for the examples that need no script."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..benchmark import Item, View
from ..benchmarks import BENCHMARKS
from ..results import Results
from ..run_folder import Record
from .file import script_text
from .pictures import PAGE_BYTES, Pictures, kept_file
from .plots import style

TEXT_BYTES = PAGE_BYTES // 2
"""What the texts of the items may have; beyond, those with the same verdict from all recipes are left out first."""
EXAMPLES = 10  # on the whole page, shared by its sets
_MOST_VALUES = 40  # a fact with more is no filter
_CHUNK = 100  # pictures that the page reads at once


@dataclass
class ItemSet:
    """The items of one benchmark in one run.

    Attributes:
        key: unique on the page.
        run: place of the run.
        title: of the choice of sets.
        head: what the browser knows beside the items.
        rows: one JSON text an item: [id, image, question, truth, facets, answers], an answer being [right, differs,
            text, marks, cut] without its empty end. `image` is a place in the run's images.
        differ: for each row, whether a recipe differs from the baseline in its verdict or its wrong objects.
        examples: some items, ready for the template.
        total: how many items there are, on the page or not.
        marked: whether words of the answers are marked.
    """

    key: str
    run: int
    title: str
    head: dict[str, Any]
    rows: list[str] = field(default_factory=list)
    differ: list[bool] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    total: int = 0
    marked: bool = False

    def trim(self, room: int) -> None:
        """Leave out rows, those without a difference first, until the rest fits."""
        order = sorted(range(len(self.rows)), key=lambda place: not self.differ[place])
        kept = []
        for place in order:
            room -= len(self.rows[place].encode())
            if room < 0:
                break
            kept.append(place)
        self.rows = [self.rows[place] for place in sorted(kept)]
        self.differ = [self.differ[place] for place in sorted(kept)]

    def json(self) -> str:
        """Head and rows as one JSON text that can stand in a script element."""
        return script_text(f'{{"head":{_dumps(self.head)},"rows":[{",".join(self.rows)}]}}')


class PageItems:
    """All sets of a page and their pictures.

    Attributes:
        sets: one for each run and benchmark.
        pictures: what is embedded.
    """

    def __init__(self, runs: Mapping[str, Results], series: Sequence[str]) -> None:
        """Read every item of the runs; `series` are the recipes in the order of their colours."""
        parts = [(place, name, b) for place, name in enumerate(runs) for b in runs[name].metrics]
        self.sets: list[ItemSet] = []
        self._images: list[dict[str, int]] = [{} for _ in runs]
        self._first: list[set[str]] = [set() for _ in runs]
        each = max(1, EXAMPLES // len(parts))
        for place, name, benchmark in parts:
            run = name if len(runs) > 1 else ""
            collected = _Collector(
                runs[name], benchmark, self._images[place], self._first[place], series, each
            )
            self.sets.append(collected.read(place, run))
        sizes = [sum(len(row.encode()) for row in part.rows) for part in self.sets]
        if sum(sizes) > TEXT_BYTES:
            for part, size in zip(self.sets, sizes, strict=True):
                part.trim(TEXT_BYTES * size // sum(sizes))
        self.pictures = Pictures(PAGE_BYTES - min(sum(sizes), TEXT_BYTES))
        self._numbers = self._embed(list(runs.values()))

    def _embed(self, runs: Sequence[Results]) -> list[list[int]]:
        """Numbers of the pictures by run and image; images of items that differ come first."""
        numbers = [[-1] * len(images) for images in self._images]
        for first in (True, False):
            for place, results in enumerate(runs):
                for image, number in self._images[place].items():
                    if (image in self._first[place]) is first:
                        numbers[place][number] = self.pictures.add(kept_file(results.path, image))
        return numbers

    @property
    def marked(self) -> bool:
        """Whether words of some answers are marked."""
        return any(part.marked for part in self.sets)

    def examples(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """(title of the set, its examples); a picture that is not yet in an example has "uri"."""
        shown: set[int] = set()
        for part in self.sets:
            for example in part.examples:
                number = self._numbers[part.run][self._images[part.run][example["image"]]]
                example["picture"] = number
                example["uri"] = self.pictures.uris[number] if number >= 0 and number not in shown else None
                shown.add(number)
        return [(part.title, part.examples) for part in self.sets]

    def scripts(self) -> list[tuple[str, str]]:
        """(id, JSON) of the data blocks; pictures that are in the examples are null."""
        shown = {example["picture"] for _, rows in self.examples() for example in rows}
        index = {
            "names": [list(images) for images in self._images],
            "pictures": self._numbers,
            "chunk": _CHUNK,
        }
        uris = [None if number in shown else uri for number, uri in enumerate(self.pictures.uris)]
        return [
            ("image-index", script_text(_dumps(index))),
            *((f"items-{part.key}", part.json()) for part in self.sets),
            *(
                (f"pictures-{place // _CHUNK}", _dumps(uris[place : place + _CHUNK]))
                for place in range(0, len(uris), _CHUNK)
            ),
        ]

    def notes(self) -> list[str]:
        """What is not on the page."""
        notes = [
            f"{part.title}: {len(part.rows)} of {part.total} items are on the page; those that differ went first."
            for part in self.sets
            if len(part.rows) < part.total
        ]
        return [*notes, *filter(None, [self.pictures.note()])]


class _Collector:
    """Reads one benchmark of one run, item by item."""

    def __init__(
        self,
        results: Results,
        benchmark: str,
        images: dict[str, int],
        differing: set[str],
        series: Sequence[str],
        examples: int,
    ) -> None:
        self.results, self.benchmark = results, benchmark
        self.kind, self.data = BENCHMARKS[benchmark], results.data(benchmark)
        self.recipes = list(results.metrics[benchmark])
        self.items = self.kind.items(self.data)
        self.facets = facets(self.items)
        self.images, self.differing, self.series = images, differing, series
        self._wanted = examples
        self._examples: list[list[dict[str, Any]]] = [[], [], []]

    def read(self, run: int, name: str) -> ItemSet:
        """All items of it."""
        key = f"{run}-{self.benchmark}"
        title = f"{name}: {self.kind.title}" if name else self.kind.title
        found = ItemSet(key, run, title, self._head(key, run), total=len(self.items))
        for item, records in self._records():
            views = [self.kind.view(r, self.data, self.results.config["scoring"]) for r in records]
            differs = [_read(view) != _read(views[0]) for view in views]
            number = self.images.setdefault(item.image, len(self.images))
            answers = [_answer(*parts) for parts in zip(views, differs, records, strict=True)]
            values = [self.facets[fact].index(str(item.facts.get(fact, ""))) for fact in self.facets]
            row = _dumps([item.id, number, item.text, views[0].truth, values, answers])
            found.rows.append(row)
            found.differ.append(any(differs))
            found.marked = found.marked or any(view.marks for view in views)
            if any(differs):
                self.differing.add(item.image)
            self._note_example(item, records, views, any(differs))
        found.examples = self._chosen()
        return found

    def _head(self, key: str, run: int) -> dict[str, Any]:
        recipes = [[recipe, *style(self.series.index(recipe))] for recipe in self.recipes]
        return {
            "key": key,
            "run": run,
            "units": self.kind.units,
            "prompt": self.results.config["prompts"].get(self.benchmark, self.kind.prompt),
            "recipes": recipes,
            "verdicts": self.kind.verdicts,
            "became": self.kind.became,
            "facets": self.facets,
        }

    def _records(self) -> Iterator[tuple[Item, list[Record]]]:
        folder = self.results.folder
        streams = []
        for recipe in self.recipes:
            places = folder.places(self.benchmark, recipe)
            streams.append(folder.stream(self.benchmark, recipe, [places[item.id] for item in self.items]))
        for item, *records in zip(self.items, *streams, strict=True):
            yield item, records

    def _note_example(self, item: Item, records: list[Record], views: list[View], differs: bool) -> None:
        """Keep the first that differ, the first with something wrong, and the first of all; one of each image."""
        rank = 0 if differs else 1 if not all(view.right for view in views) else 2
        kept = self._examples[rank]
        if len(kept) < self._wanted and all(example["image"] != item.image for example in kept):
            kept.append(self._example(item, records, views))

    def _example(self, item: Item, records: list[Record], views: list[View]) -> dict[str, Any]:
        answers = [
            {
                "recipe": recipe,
                "style": style(self.series.index(recipe)),
                "right": view.right,
                "verdict": self.kind.verdicts[0 if view.right else 1],
                "parts": marked(record["answer"], view.marks),
            }
            for recipe, record, view in zip(self.recipes, records, views, strict=True)
        ]
        return {
            "id": item.id,
            "image": item.image,
            "text": item.text,
            "truth": views[0].truth,
            "answers": answers,
        }

    def _chosen(self) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for rank in self._examples:
            for example in rank:
                found.setdefault(example["image"], example)
        return list(found.values())[: self._wanted]


def facets(items: Sequence[Item]) -> dict[str, list[str]]:
    """Facts of the items that can filter them, with their values: those with some values, but not many."""
    found: dict[str, dict[str, None]] = {}
    for item in items:
        for fact, value in item.facts.items():
            if value != item.text:
                found.setdefault(fact, {})[str(value)] = None
    for fact, values in found.items():
        if any(fact not in item.facts for item in items):
            values[""] = None
    return {fact: list(values) for fact, values in found.items() if 2 <= len(values) <= _MOST_VALUES}


def marked(text: str, marks: Iterable[tuple[int, int, bool, str]]) -> list[tuple[str, str, str]]:
    """(text, kind, object) pieces of an answer: kind is "right", "wrong", or "" for other words."""
    pieces, place = [], 0
    for start, end, right, thing in sorted(marks):
        if start < place:
            continue
        pieces += [(text[place:start], "", ""), (text[start:end], "right" if right else "wrong", thing)]
        place = end
    return [*pieces, (text[place:], "", "")]


def _read(view: View) -> tuple[bool, frozenset[str]]:
    """What of an answer counts as a difference."""
    return view.right, frozenset(thing for _, _, right, thing in view.marks if not right)


def _answer(view: View, differs: bool, record: Record) -> list[Any]:
    marks = [[start, end, int(right), thing] for start, end, right, thing in view.marks]
    row: list[Any] = [int(view.right), int(differs), record["answer"], marks, int(record["cut"])]
    while not row[-1] and len(row) > 3:
        row.pop()
    return row


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
