"""Score answers that were made elsewhere: the run folder that files of answers make, for all tables, tests and pages.

Nothing of a model is known here but the files: tokens and seconds are 0, which stands for unknown, and the page's
setup names the files with their SHA-256 instead of a model.
"""

import hashlib
import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any, TypeAlias

from ..benchmark import Benchmark, Data, Item, Request
from ..benchmarks import BENCHMARKS
from ..chair.truth import GroundTruth, load_ground_truth
from ..protocol import settle
from ..results import Results, build_results
from ..run_folder import EvalError, Record, RunFolder, slug
from ..settings import BASELINE
from ..sources import DataError, ImageIndex, Sources, find_sources, is_question_file, read_names
from .answer_files import AnswerFile, read_answer_file
from .captioned import by_truth, renamed
from .pairing import Paired, check_whole, pair

Files: TypeAlias = str | Path | Sequence[str | Path]
_PARSER_CHOICES = ("parser", "mme_parser", "amber_parser")


@dataclass(frozen=True)
class _Asked:
    """Where the items come from.

    Attributes:
        kind: the benchmark.
        name: of the data, for messages and the page.
        sources: its files; None when there is a ground-truth file only.
        truth: objects of images, for captions.
        images: where image files may be.
        scoring: as in `config.json`.
    """

    kind: Benchmark
    name: str
    sources: Sources | None
    truth: GroundTruth | None
    images: Path | None
    scoring: Mapping[str, Any]

    def data(self, captioned: Sequence[str], only_images: Sequence[str] | None = None) -> Data:
        """What is asked. CHAIR has no list of its own: without an `images.txt` it is the images with a caption."""
        listed = read_names(self.sources.names) if self.sources and self.sources.names else None
        wanted = only_images if only_images is not None else listed
        if self.truth is not None:
            return by_truth(wanted or captioned, self.truth)
        if self.sources is None:
            raise DataError(f"{self.kind.name} needs --data: the folder of what was asked")
        if self.kind.name == "chair" and wanted is None:
            wanted = captioned
        return self.kind.load(
            Request(self.name, self.sources, wanted, sys.maxsize, 0, self.scoring, need_images=False)
        )


def import_answers(
    benchmark: str,
    files: Mapping[str, Files],
    data: str | Path | Sources | None = None,
    out: str | Path = "runs/imported",
    *,
    form: str = "auto",
    truth: str | Path | None = None,
    images: str | Path | None = None,
    parser: str | None = None,
    chair: str | None = None,
    drop_unfinished: bool = False,
    scoring: Mapping[str, Any] | None = None,
    allow_missing: bool = False,
    allow_extra: bool = False,
    by_order: bool = False,
    model: str | None = None,
    command: str | None = None,
) -> Results:
    """Score files of answers like a run; several are recipes of one run, compared item by item with the first.

    Rows are paired with items by id, by image and question, or by image (see `pairing.pair`), and never by order
    unless it is asked for. The same call again goes on; more files may be added to a run in a later call.

    Args:
        benchmark: a name of `BENCHMARKS`.
        files: {label: file, or several such as one a split}. The one called "none" is the baseline, else the first.
        data: the benchmark's data folder, `Sources`, or one file of POPE questions. Images may be absent.
        out: folder of the run.
        form: one of `answer_files.FORMS`; "auto" finds it.
        truth: for chair, a file of ground truth (see `load_ground_truth`) in place of annotations in `data`.
        images: folder of images for the page, where it is not the data folder.
        parser: how yes/no answers are read: one of `answers.PARSERS`, or for amber_d of `amber.AMBER_PARSERS`; None is
            the benchmark's own.
        chair: how CHAIR reads words: a name of `chair.CONFIGURATIONS`. A file of ground truth brings its own.
        drop_unfinished: as for `evaluate`.
        scoring: as for `evaluate`.
        allow_missing: score the items that all files answer.
        allow_extra: leave aside answers to other questions.
        by_order: pair rows without ids in the order of the items, each with its question checked.
        model: name of the model; None takes it from the files that tell it.
        command: noted in the run.

    Raises:
        UnknownName: no benchmark, form or parser has that name.
        DataError: files and data do not fit; nothing was written then.
        RunFolderError: `out` holds another run, or the same run with other files.
    """
    choices = {**dict.fromkeys(_PARSER_CHOICES, parser), "chair": chair, "drop_unfinished": drop_unfinished}
    settled = settle([benchmark], {**choices, **(scoring or {})})
    kind = BENCHMARKS[benchmark]
    _check_labels(files)
    read: dict[str, list[AnswerFile]] = {}
    for label, paths in _baseline_first(files).items():
        read[label] = [read_answer_file(path, form) for path in paths]
    asked = _asked(kind, data, truth, images, settled)
    if benchmark == "chair" and asked.sources is not None and asked.truth is None:
        read = renamed(read, BASELINE, asked.sources.instances)
    captioned = [row.image or row.id or "" for file in read[BASELINE] for row in file.rows]
    content = asked.data(captioned)
    if not (items := kind.items(content)):
        raise DataError(f"{asked.name} asks nothing")
    version = kind.describe(content)["version"] if benchmark == "pope" else None
    paired = {label: pair(items, group, by_order, version) for label, group in read.items()}
    check_whole(paired, items, allow_missing, allow_extra, version)
    if any(found.missing for found in paired.values()):
        content = _common(asked, content, items, paired)
        items = kind.items(content)
    config = _config(asked, content, items, read, paired, model, command)
    config["recipes"] = {
        label: _sources(read[label], found, _called(files, label)) for label, found in paired.items()
    }
    folder = RunFolder.create(out, config)
    try:
        folder.write_json(f"data/{benchmark}.json", content)
        for label, found in paired.items():
            _write(folder, benchmark, label, items, found)
        results = build_results(folder)
        results.write(_pictures(asked, items))
    finally:
        folder.close()
    return results


def parse_files(texts: Sequence[str]) -> dict[str, list[Path]]:
    """`none=a.jsonl` or `vhr=random.jsonl,popular.jsonl` as label -> files. Labels may hold "=" themselves.

    Raises:
        EvalError: no "=", a label twice, or a file that is not there.
    """
    found: dict[str, list[Path]] = {}
    for text in texts:
        places = [place for place, mark in enumerate(text) if mark == "="]
        parts = [(text[:place], [Path(name) for name in text[place + 1 :].split(",")]) for place in places]
        there = [part for part in parts if part[0] and all(path.is_file() for path in part[1])]
        if not there:
            wrong = [str(path) for _, paths in parts[:1] for path in paths if not path.is_file()]
            why = (
                f"there is no file {', '.join(wrong)}"
                if wrong
                else "write LABEL=FILE, such as none=answers.jsonl"
            )
            raise EvalError(f"{text!r}: {why}")
        label, paths = there[0]
        if label in found:
            raise EvalError(f"{label!r} is given twice: files of one recipe go together, {label}=FILE,FILE")
        found[label] = paths
    return found


# ------------------------------------------------------------------------------------------------------- files


def _check_labels(files: Mapping[str, Files]) -> None:
    if not files:
        raise EvalError("no file of answers is given: {'none': 'answers.jsonl', ...}")
    places = [slug(label).lower() for label in files]
    if len(set(places)) != len(places) or "" in places:
        raise EvalError(f"labels must differ in their letters and digits: {', '.join(map(repr, files))}")


def _baseline_first(files: Mapping[str, Files]) -> dict[str, list[str | Path]]:
    """Label -> files, with the baseline first and called "none"."""
    groups = {
        label: [paths] if isinstance(paths, (str, Path)) else list(paths) for label, paths in files.items()
    }
    baseline = BASELINE if BASELINE in groups else next(iter(groups))
    return {BASELINE: groups.pop(baseline), **groups}


def _called(files: Mapping[str, Files], label: str) -> str:
    """What the user called a recipe that goes by another name here, else ""."""
    return next(iter(files)) if label == BASELINE and BASELINE not in files else ""


def _sources(files: Sequence[AnswerFile], found: Paired, called: str) -> list[Record]:
    """What a recipe is, file by file, for `config.json`."""
    return [
        {
            "class": "imported answers",
            **({"note": f"called {called}"} if called else {}),
            "file": file.path.name,
            "form": file.form,
            "paired_by": way,
            "sha256": file.sha256,
        }
        for file, way in zip(files, found.ways, strict=True)
    ]


# -------------------------------------------------------------------------------------------------------- data


def _asked(
    kind: Benchmark,
    data: str | Path | Sources | None,
    truth: str | Path | None,
    images: str | Path | None,
    scoring: Mapping[str, Any],
) -> _Asked:
    if truth is not None and kind.name != "chair":
        raise EvalError(f"a file of ground truth (--truth) is for chair; {kind.name} takes --data")
    if data is None and truth is None:
        raise EvalError(
            f"{kind.name} needs the data folder (--data){' or --truth' if kind.name == 'chair' else ''}"
        )
    sources = None
    if isinstance(data, Sources):
        sources = data
    elif data is not None and Path(data).is_file():
        file = Path(data)
        if kind.name != "pope" or not is_question_file(file):
            raise DataError(
                f"{file} is a file: give a folder, or one file of POPE questions such as coco_pope_random.json"
            )
        sources = Sources(file.parent, questions=file, root=file.parent)
    elif data is not None:
        sources = find_sources(data, images)
    if kind.name == "pope" and sources is not None and sources.questions is None:
        raise DataError(
            f"{data} holds no POPE questions, and answers need the very questions that they were given to: "
            "`regard pope build` makes files of them"
        )
    place = Path(images) if images is not None else sources.images if sources is not None else None
    loaded = load_ground_truth(truth) if truth is not None else None
    if loaded is not None:
        scoring = {**scoring, "truth_words": loaded.name}
    name = str(sources.questions or sources.root or sources.images) if sources is not None else str(truth)
    return _Asked(kind, name, sources, loaded, place, scoring)


def _common(asked: _Asked, data: Data, items: Sequence[Item], paired: Mapping[str, Paired]) -> Data:
    """The part of the data that all files answer."""
    answered = set.intersection(*(set(found.answers) for found in paired.values()))
    if not answered:
        raise DataError(f"no item is answered in all of {', '.join(paired)}")
    if (kept := asked.kind.keep(data, answered)) is not None:
        return kept
    torn = {item.image for item in items if item.id not in answered}
    whole = list(dict.fromkeys(item.image for item in items if item.image not in torn))
    if not whole:
        raise DataError("no image has an answer to each of its questions in all files")
    return asked.data(whole, whole)


def _pictures(asked: _Asked, items: Sequence[Item]) -> dict[str, Path]:
    """The image files that are there."""
    if asked.images is None or not asked.images.is_dir():
        return {}
    index = ImageIndex(asked.images)
    found = {image: index.find(image) for image in dict.fromkeys(item.image for item in items)}
    return {image: file for image, file in found.items() if file is not None}


# ------------------------------------------------------------------------------------------------------ folder


def _config(
    asked: _Asked,
    data: Data,
    items: Sequence[Item],
    read: Mapping[str, Sequence[AnswerFile]],
    paired: Mapping[str, Paired],
    model: str | None,
    command: str | None,
) -> Record:
    kind = asked.kind
    images = sorted({item.image for item in items})
    text = json.dumps(data, ensure_ascii=False)
    models = dict.fromkeys(
        Path(name).name for group in read.values() for file in group for name in file.models
    )
    described: Record = {
        "images": len(images),
        "images_sha256": hashlib.sha256("".join(f"{name}\n" for name in images).encode()).hexdigest(),
        "items": len(items),
        "items_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "left_out": {label: len(found.missing) for label, found in paired.items() if found.missing},
        "set_aside": {label: len(found.extra) for label, found in paired.items() if found.extra},
        **kind.describe(data),
    }
    return {
        "imported": True,
        "source": asked.name,
        "items": len(images),
        "seed": 0,
        "model_name": model or ", ".join(models) or "a model that the files do not name",
        "model": {"class": "answers made elsewhere", "dtype": "unknown", "parameters": 0},
        "data": {kind.name: described},
        "versions": {"regard": installed("regard")},
        "sessions": [
            {
                "started": time.strftime("%Y-%m-%d %H:%M:%S"),
                "command": command,
                "batch_size": "unknown",
                "processes": 1,
                "device": "answers made elsewhere",
                "python": platform.python_version(),
            }
        ],
        "benchmarks": [kind.name],
        "prompts": {},
        "generation": {},
        "scoring": dict(asked.scoring),
    }


def _write(folder: RunFolder, benchmark: str, label: str, items: Sequence[Item], found: Paired) -> None:
    """The records of one recipe that are not there yet."""
    folder.drop_torn_line(benchmark, label)
    done = folder.places(benchmark, label)
    records = []
    for item in items:
        if item.id not in done:
            answer = found.answers[item.id]
            record: Record = {"id": item.id, "image": item.image, "recipe": label, **item.facts}
            record |= {"prompt": answer.question or item.text, "answer": answer.text}
            records.append(record | {"tokens": 0, "cut": False, "seconds": 0.0})
    if records:
        folder.append(benchmark, label, records)
