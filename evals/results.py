"""The results of a run: scores, intervals, tests; as a table, a page, a folder."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

from .benchmark import Data
from .benchmarks import BENCHMARKS
from .data import MINIATURE
from .run_folder import Record, RunFolder, RunFolderError, slug
from .scores import Counted, Score, correct, measure
from .settings import BASELINE

MINIATURE_NOTE = (
    "The miniature is a small model trained on drawn scenes: its figures show that the tools work, and they prove "
    "nothing about a 7B model."
)


@dataclass
class Results:
    """What a run found.

    Attributes:
        folder: the run on disk.
        metrics: {benchmark: {recipe: {"items", "images", "scores": {key: {"value", "low", "high",
            "difference": {"value", "low", "high", "p", "p_holm", "power"}}}, "mcnemar", ...}}}. Shares are
            fractions of 1; "p_holm" is corrected over the recipes of the run.
        unfinished: {"benchmark recipe": (done, all)} of what a stopped run has not done; it is not scored.
    """

    folder: RunFolder
    metrics: dict[str, dict[str, Any]]
    unfinished: dict[str, tuple[int, int]] = field(default_factory=dict)
    _temporary: Any = field(
        default=None, repr=False
    )  # keeps a run without `out` alive as long as its results

    @property
    def config(self) -> Record:
        """What was run: `config.json`."""
        return self.folder.config

    @property
    def path(self) -> Path:
        """The folder of the run."""
        return self.folder.path

    @property
    def page(self) -> Path:
        """The HTML page."""
        return self.path / "report.html"

    @property
    def miniature(self) -> bool:
        """Whether the run is on the embedded scenes, or of the embedded model."""
        config = self.config
        return bool(config["source"] == MINIATURE or config["model_name"].startswith(MINIATURE + " "))

    def items(self, benchmark: str, recipe: str = BASELINE) -> dict[str, Record]:
        """The items of one benchmark and recipe by id: prompt, answer, tokens, seconds."""
        return self.folder.read_items(benchmark, recipe)

    def scores(self, benchmark: str) -> list[Score]:
        """The scores of a benchmark, in the order of the page."""
        return BENCHMARKS[benchmark].scores(self.data(benchmark))

    def data(self, benchmark: str) -> Data:
        """What the benchmark asked, and what scores it."""
        return run_data(self.folder, benchmark)

    def to_dict(self) -> dict[str, Any]:
        """Configuration, metrics and unfinished parts, ready for JSON."""
        return {"config": self.config, "metrics": self.metrics, "unfinished": self.unfinished}

    def table(self, full: bool = False) -> str:
        """The scores as text: value, 95 % interval, paired change against "none" and its p.

        Args:
            full: with accuracy, precision, recall and yes ratio of each of POPE's splits.
        """
        from rich.console import Console

        console = Console(file=StringIO(), width=100, no_color=True, legacy_windows=False)
        for part in self.rich(full):
            console.print(part)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())

    def rich(self, full: bool = False) -> list[Any]:
        """The tables and remarks as rich renderables, for a terminal."""
        from .report.tables import tables

        return tables(self, full)

    def write(self, files: Mapping[str, Path] | None = None) -> Path:
        """Write `metrics.json`, the tables and the page into the run's folder.

        Args:
            files: image files, of which small copies are kept in the run; without them the page shows the
                copies that are already there.
        """
        from .report.page import write_report

        self.folder.write_json("metrics.json", {"metrics": self.metrics, "unfinished": self.unfinished})
        return write_report(self, files)

    def save(self, folder: str | Path) -> Path:
        """Copy the run into a new or empty folder, and return that folder.

        Raises:
            RunFolderError: the folder holds something.
        """
        target = Path(folder)
        if target.resolve() == self.path.resolve():
            return target
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise RunFolderError(f"{target} is not empty: choose another folder to save in")
        shutil.copytree(self.path, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
        return target

    @classmethod
    def load(cls, folder: str | Path) -> "Results":
        """Read a run from its folder and score it afresh.

        Raises:
            RunFolderError: there is no run, or one of its files cannot be read.
        """
        return build_results(RunFolder.load(folder))

    def __repr__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        from .report.page import html_tables

        return html_tables(self)


def build_results(folder: RunFolder, temporary: Any = None) -> Results:
    """Score what is finished in a run.

    Raises:
        RunFolderError: nothing is finished, or a file of the run is missing.
    """
    results = Results(folder, {}, {}, temporary)
    for benchmark in folder.config["benchmarks"]:
        wanted = [item.id for item in BENCHMARKS[benchmark].items(run_data(folder, benchmark))]
        baseline: Counted | None = None
        found: dict[str, Any] = {}
        for recipe in folder.config["recipes"]:
            places = folder.places(benchmark, recipe)
            missing = [item for item in wanted if item not in places]
            if missing:
                results.unfinished[f"{benchmark} {recipe}"] = (len(wanted) - len(missing), len(wanted))
                if recipe == BASELINE:
                    break  # nothing to compare with
                continue
            counted = count(folder, benchmark, recipe, [places[item] for item in wanted])
            found[recipe] = measure(counted, results.scores(benchmark), baseline)
            baseline = baseline or counted
        if found:
            correct(found)
            results.metrics[benchmark] = found
    if not results.metrics:
        state = "; ".join(f"{part}: {done} of {total}" for part, (done, total) in results.unfinished.items())
        raise RunFolderError(
            f"{folder.path}: no benchmark is finished yet ({state}); start the run again to go on"
        )
    return results


def count(folder: RunFolder, benchmark: str, recipe: str, places: list[int]) -> Counted:
    """Finished items as numbers, by the published definitions; one item is in memory at a time."""
    cost = _Cost()
    records = cost.watch(folder.stream(benchmark, recipe, places))
    counted = BENCHMARKS[benchmark].count(records, run_data(folder, benchmark), folder.config["scoring"])
    report = folder.read_json(f"reports/{benchmark}-{slug(recipe)}.json") or {}
    counted.facts.update(peak_memory=report.get("peak_memory"), **cost.facts())
    return counted


class _Cost:
    """Tokens and seconds of the answers that pass."""

    def __init__(self) -> None:
        self.tokens, self.cut = 0, 0
        self.seconds: list[float] = []

    def watch(self, records: Iterator[Record]) -> Iterator[Record]:
        """The records, noted as they pass; one that shares another's answer costs nothing."""
        for record in records:
            self.cut += bool(record["cut"])
            if "same_as" not in record:
                self.tokens += record["tokens"]
                self.seconds.append(record["seconds"])
            yield record

    def facts(self) -> dict[str, Any]:
        """The median leaves out the slow first batch. Answers made elsewhere come without tokens: nothing is known."""
        if not self.tokens:
            return {"cut": None, "tokens": None, "seconds": None, "median_seconds": None}
        return {
            "cut": self.cut,
            "tokens": self.tokens,
            "seconds": round(sum(self.seconds), 3),
            "median_seconds": median(self.seconds),
        }


def run_data(folder: RunFolder, benchmark: str) -> Data:
    """What a benchmark of a run asked.

    Raises:
        RunFolderError: its file is missing.
    """
    file = folder.path / "data" / f"{benchmark}.json"
    if not file.is_file():
        raise RunFolderError(f"{file} is missing: start the run again to restore it")
    return _read_data(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _read_data(file: Path, changed: int) -> Data:
    data: Data = json.loads(file.read_text(encoding="utf-8"))
    return data
