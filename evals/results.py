"""The results of a run: scores, intervals, tests; as a table, a page, a folder."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

from .chair import CaptionRecord, score_chair
from .data import MINIATURE
from .pope import Question, pope_items
from .run_folder import Record, RunFolder, RunFolderError, slug
from .scores import Counted, Score, chair_counts, chair_scores, measure, pope_counts, pope_scores
from .settings import BASELINE

TITLES = {"pope": "POPE", "chair": "CHAIR"}
ITEMS = {"pope": "questions", "chair": "captions"}
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
            "difference": {"value", "low", "high", "p"}}}, "mcnemar", ...}}}. Shares are fractions of 1.
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
        return chair_scores() if benchmark == "chair" else pope_scores(list(_questions(self.folder)))

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
        from .tables import tables

        return tables(self, full)

    def write(self, files: Mapping[str, Path] | None = None) -> Path:
        """Write `metrics.json` and the page into the run's folder.

        Args:
            files: image files, of which the page's examples are copied (small) into the run; without them
                the page shows the images that are already there.
        """
        from .report import write_report

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
        from .report import html_tables

        return html_tables(self)


def build_results(folder: RunFolder, temporary: Any = None) -> Results:
    """Score what is finished in a run.

    Raises:
        RunFolderError: nothing is finished, or a file of the run is missing.
    """
    results = Results(folder, {}, {}, temporary)
    for benchmark in folder.config["benchmarks"]:
        wanted = expected_ids(folder, benchmark)
        baseline: Counted | None = None
        found: dict[str, Any] = {}
        for recipe in folder.config["recipes"]:
            items = folder.read_items(benchmark, recipe)
            missing = [item for item in wanted if item not in items]
            if missing:
                results.unfinished[f"{benchmark} {recipe}"] = (len(wanted) - len(missing), len(wanted))
                if recipe == BASELINE:
                    break  # nothing to compare with
                continue
            counted = count(folder, benchmark, recipe, {item: items[item] for item in wanted})
            found[recipe] = measure(counted, results.scores(benchmark), baseline)
            baseline = baseline or counted
        if found:
            results.metrics[benchmark] = found
    if not results.metrics:
        state = "; ".join(f"{part}: {done} of {total}" for part, (done, total) in results.unfinished.items())
        raise RunFolderError(
            f"{folder.path}: no benchmark is finished yet ({state}); start the run again to go on"
        )
    return results


def expected_ids(folder: RunFolder, benchmark: str) -> list[str]:
    """The ids of all items of a benchmark."""
    if benchmark == "chair":
        return list(_truth(folder))
    return [f"{split}/{q.question_id}" for split, rows in _questions(folder).items() for q in rows]


def count(folder: RunFolder, benchmark: str, recipe: str, items: Mapping[str, Record]) -> Counted:
    """Finished items as numbers, by the published definitions."""
    counted = _count_chair(folder, items) if benchmark == "chair" else _count_pope(folder, items)
    generated = [item for item in items.values() if "same_as" not in item]
    report = folder.read_json(f"reports/{benchmark}-{slug(recipe)}.json") or {}
    counted.facts.update(
        peak_memory=report.get("peak_memory"),
        cut=sum(bool(item["cut"]) for item in items.values()),
        tokens=sum(item["tokens"] for item in generated),
        seconds=round(sum(item["seconds"] for item in generated), 3),
        # The median leaves out the slow first batch.
        median_seconds=median(item["seconds"] for item in generated),
    )
    return counted


def _count_pope(folder: RunFolder, items: Mapping[str, Record]) -> Counted:
    questions = _questions(folder)
    parser = folder.config["scoring"]["parser"]
    found = pope_items(questions, [item["answer"] for item in items.values()], parser)
    counts = pope_counts(found.splits, found.labels, found.predictions, list(questions), parser)
    facts = {"unclear": sum(found.unclear), "parser": parser}
    return Counted(found.ids, found.images, counts, found.correct.astype(bool), facts)


def _count_chair(folder: RunFolder, items: Mapping[str, Record]) -> Counted:
    counts = chair_counts(chair_rows(folder, items))
    images = list(items)
    return Counted(images, images, counts, counts[:, 1] == 0, {"words": folder.config["scoring"]["words"]})


def chair_rows(folder: RunFolder, items: Mapping[str, Record]) -> list[Record]:
    """One row for each caption: its counts, its text, and its objects as (start, end, right, object) marks."""
    scoring = folder.config["scoring"]
    captions = {item["image"]: item["answer"] for item in items.values()}
    truth = {image: things for image, things in _truth(folder).items() if image in captions}
    scored = score_chair(captions, truth, scoring["words"], scoring["drop_unfinished"])
    return [_chair_row(record) for record in scored.captions]


def _chair_row(record: CaptionRecord) -> Record:
    truth = set(record.truth)
    words = record.caption.lower().split()
    runs = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return {
        "image": record.image,
        "caption": record.caption,
        "truth": record.truth,
        "marks": [(m.start, m.end, m.node in truth, m.node) for m in record.mentions],
        "captions": 1,
        "hallucinated_captions": int(bool(record.hallucinated)),
        "mentions": len(record.mentions),
        "hallucinated_mentions": len(record.hallucinated),
        "right_objects": len(record.right),
        "named_objects": len({m.node for m in record.mentions}),
        "true_objects": len(record.truth),
        "length": record.words,
        "runs": len(runs),
        "repeated_runs": len(runs) - len(set(runs)),
    }


def _questions(folder: RunFolder) -> dict[str, list[Question]]:
    found = folder.read_json("data/questions.json")
    if found is None:
        raise RunFolderError(
            f"{folder.path / 'data' / 'questions.json'} is missing: start the run again to restore it"
        )
    return {split: [Question(**row) for row in rows] for split, rows in found.items()}


def _truth(folder: RunFolder) -> dict[str, list[str]]:
    found = folder.read_json("data/truth.json")
    if found is None:
        raise RunFolderError(
            f"{folder.path / 'data' / 'truth.json'} is missing: start the run again to restore it"
        )
    return dict(found)
