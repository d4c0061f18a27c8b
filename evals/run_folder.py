"""A run is a folder: its configuration, its data, one JSON line per finished item, its scores and its page.

    config.json                     what was asked for, with which versions, prompts and recipes
    data/<benchmark>.json           what was asked, and what scores it
    data/images/                    small copies of the images for the page; "/" in a name is "__"
    items/<benchmark>-<recipe>.jsonl
    items/rank-<n>/...              what process n of several has done; joined to the above when all have finished
    reports/<benchmark>-<recipe>.json   what the engine did
    metrics.json   report.html      tables/<benchmark>.csv, .md

Lines are appended as soon as a batch is done. A line that was cut off when the process was killed is dropped
when the folder is opened again, and its item is done again; no finished line is ever rewritten.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ..hooks.errors import RegardError

Record = dict[str, Any]

# What two sessions of one run must share for their answers to belong together.
COMPARED = ("seed", "items", "prompts", "generation", "recipes", "model", "versions", "data")
GROWING = ("data", "prompts", "generation", "recipes")


class EvalError(RegardError, ValueError):
    """A benchmark cannot be run as asked; the message says why and what to do."""


class RunFolderError(EvalError):
    """A folder cannot be used as the folder of this run."""


class RunFolder:
    """One run on disk. Use :meth:`create` to start or go on, :meth:`load` to read a run that is there."""

    def __init__(self, path: Path, config: Record) -> None:
        self.path = path
        self.config = config
        self._lock: IO[bytes] | None = None

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any]) -> "RunFolder":
        """Start a run in a new or empty folder, or go on with the run that is there.

        The new session may add recipes and benchmarks; everything else that decides an answer must be equal.

        Raises:
            RunFolderError: the folder holds other things, a run with another configuration, or a run that
                another process is working on.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"{path} is a file, and a run is a folder: choose another --out")
        known = (path / "config.json").is_file()
        # A run that was killed at its very start leaves the first two.
        foreign = sorted(set(os.listdir(path)) - {".lock", "config.json.part"}) if path.is_dir() else []
        if foreign and not known:
            inside = ", ".join(foreign[:5])
            raise RunFolderError(
                f"{path} exists and is no run folder (no config.json; it holds {inside}): "
                "choose another --out, or empty it"
            )
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path, _plain(config))
        run._take_lock()
        if known:
            run.config = _merged(path, _read_json(path / "config.json"), run.config)
        run.write_json("config.json", run.config)
        return run

    @classmethod
    def load(cls, path: str | Path) -> "RunFolder":
        """Open a run for reading.

        Raises:
            RunFolderError: there is no run at that path.
        """
        path = Path(path)
        if not (path / "config.json").is_file():
            what = "is not there" if not path.exists() else "is no run folder: it has no config.json"
            raise RunFolderError(f"{path} {what}; `regard bench ... --out {path}` makes one")
        return cls(path, _read_json(path / "config.json"))

    def items_file(self, benchmark: str, recipe: str) -> Path:
        """Where the finished items of one recipe lie."""
        return self.path / "items" / f"{benchmark}-{slug(recipe)}.jsonl"

    def read_items(self, benchmark: str, recipe: str) -> dict[str, Record]:
        """The finished items by id, in the order in which they were done. A cut-off last line is left out.

        Raises:
            RunFolderError: a line other than the last cannot be read.
        """
        return {record["id"]: record for record, *_ in _records(self.items_file(benchmark, recipe))}

    def places(self, benchmark: str, recipe: str) -> dict[str, int]:
        """Where in its file each finished item begins, in bytes; for `stream`."""
        return {record["id"]: at for record, at, _ in _records(self.items_file(benchmark, recipe))}

    def stream(self, benchmark: str, recipe: str, places: Iterable[int]) -> Iterator[Record]:
        """Items from these places one after the other, so that memory does not grow with their number."""
        file = self.items_file(benchmark, recipe)
        if file.is_file():
            with file.open("rb") as lines:
                for at in places:
                    lines.seek(at)
                    yield json.loads(lines.readline())

    def join(self, benchmark: str, recipe: str, order: Iterable[str]) -> None:
        """Move what several processes have done into one file, in the order of one process, each item once.

        A kill in between loses nothing: the parts go when all is on the disk.
        """
        parts = sorted(self.path.glob(f"items/rank-*/{self.items_file(benchmark, recipe).name}"))
        if not parts:
            return
        self.drop_torn_line(benchmark, recipe)
        done = self.places(benchmark, recipe)
        found = {record["id"]: line for part in parts for record, _, line in _records(part)}
        lines = [found[item] for item in order if item in found and item not in done]
        self._write_lines(self.items_file(benchmark, recipe), lines)
        for part in parts:
            part.unlink()

    def drop_torn_line(self, benchmark: str, recipe: str) -> None:
        """Cut the file back to its last whole line."""
        file = self.items_file(benchmark, recipe)
        if file.is_file():
            os.truncate(file, _whole_size(file))

    def append(self, benchmark: str, recipe: str, records: Iterable[Record], rank: int | None = None) -> None:
        """Add finished items: one write, on the disk before this returns.

        Args:
            benchmark, recipe: whose items.
            records: the items.
            rank: of this process among several, which do not write into one file.

        Raises:
            RunFolderError: the disk is full, or the file cannot be written. What was there before stays.
        """
        file = self.items_file(benchmark, recipe)
        if rank is not None:
            file = file.with_name(f"rank-{rank}") / file.name
        self._write_lines(file, [json.dumps(record, ensure_ascii=False).encode() for record in records])

    def _write_lines(self, file: Path, lines: Iterable[bytes]) -> None:
        content = b"".join(line + b"\n" for line in lines)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("ab") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise RunFolderError(
                f"{file} cannot be written ({error.strerror or error}): what was finished before is kept. Make "
                "room, and start the same command again"
            ) from error

    def write_json(self, name: str, value: Any) -> None:
        """Replace a JSON file in one step, so that a kill leaves the old one or the new one."""
        self.write_text(name, json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Replace a text file in one step."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + ".part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, file)

    def read_json(self, name: str, default: Any = None) -> Any:
        """A JSON file of the run, or the default when it is not there."""
        file = self.path / name
        return _read_json(file) if file.is_file() else default

    def close(self) -> None:
        """Let other processes use the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows has no flock; two processes in one folder are then the user's care
            return
        self._lock = (self.path / ".lock").open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise RunFolderError(
                f"another process is working on {self.path}: wait for it, or choose another --out"
            ) from error


def slug(label: str) -> str:
    """A file name for a recipe's label."""
    return re.sub(r"[^\w.=+-]+", "_", label).strip("_")


def _records(file: Path) -> Iterator[tuple[Record, int, bytes]]:
    """(record, where its line begins, its line) of a file; a last line without its end is what a kill left."""
    if not file.is_file():
        return
    at = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.endswith(b"\n") and line.strip():
                try:
                    record = json.loads(line)
                    record["id"]
                except (ValueError, KeyError, TypeError) as error:
                    raise RunFolderError(
                        f"{file}, line {number} is no item ({error}): delete that line and start again, "
                        "then only its item is done again"
                    ) from error
                yield record, at, line[:-1]
            at += len(line)


def _whole_size(file: Path) -> int:
    """Size of a file up to the end of its last whole line."""
    with file.open("rb") as stream:
        return sum(len(line) for line in stream if line.endswith(b"\n"))


def _merged(path: Path, old: Record, new: Record) -> Record:
    """The configuration of a run that goes on.

    Raises:
        RunFolderError: something that decides the answers is not the same.
    """
    for key in COMPARED:
        before, after = old.get(key, {}), new.get(key, {})
        if key in GROWING:  # what only one session asks for is no difference
            before = {name: part for name, part in before.items() if name in after}
            after = {name: part for name, part in after.items() if name in before}
        for inner, was, is_now in _differences(key, before, after):
            raise RunFolderError(
                f"{path} holds a run with another {inner}: it has {_short(was)}, now {_short(is_now)} is asked "
                "for; ask for the same again, or choose another --out (nothing there was touched)"
            )
    joined = {**old, **new}
    for key in GROWING:
        joined[key] = {**old[key], **new[key]}
    joined["scoring"] = {**old.get("scoring", {}), **new.get("scoring", {})}
    joined["benchmarks"] = list(dict.fromkeys([*old.get("benchmarks", []), *new["benchmarks"]]))
    joined["sessions"] = [*old.get("sessions", []), *new.get("sessions", [])]
    return joined


def _differences(name: str, old: Any, new: Any) -> Iterable[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(f"{name}.{key}", old.get(key), new.get(key))
    elif old != new:
        yield name, old, new


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(
            f"{file} is no JSON ({error}): choose another --out, or delete that file"
        ) from error


def _plain(value: Any) -> Any:
    """What JSON can hold: tuples as lists, NaN as null, paths and other objects as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(part) for part in value)
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)
