"""What every run shares: on and off for the length of a `with` statement, or from `wrap` until `unwrap`."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

from .errors import CannotEdit


class Switched(Protocol):
    """Something that a run can rest."""

    on: bool


class Attaching(Protocol):
    """The engine of a model or a pipeline."""

    def add(self, contributions: Any) -> None:
        """Let a run act."""

    def remove(self, contributions: Any) -> None:
        """Take a run off."""

    def watch(self) -> None:
        """Take note that a contribution was switched."""


E = TypeVar("E", bound=Attaching)
C = TypeVar("C", bound=Switched)
R = TypeVar("R", bound="Attached[Any, Any]")


class Attached(Generic[E, C]):
    """A run of some contributions on the engine of one model; the subclasses know which."""

    def __init__(self, engine: E, name: str, contributions: Sequence[C]) -> None:
        self._engine_ref = weakref.ref(engine)  # a report that is kept must not keep the weights
        self._model_name, self._contributions, self._on = name, contributions, False

    @property
    def _engine(self) -> E:
        engine = self._engine_ref()
        if engine is None:
            raise CannotEdit(f"the {self._model_name} of this run is gone: keep a reference to it")
        return engine

    def __enter__(self: R) -> R:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Attach. Nothing is changed when this raises."""
        if self._on:
            raise RuntimeError("this run is on already; make a new one with regard.apply")
        self._engine.add(self._contributions)
        self._on = True

    def stop(self) -> None:
        """Detach. With the last run gone the model is bit-exactly as before."""
        engine = self._engine_ref()
        if self._on and engine is not None:
            engine.remove(self._contributions)
        self._on = False

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within this block the run's edits rest (in every thread): the baseline from the same engine."""
        before = [c.on for c in self._contributions]
        self._switch([False] * len(before))
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, states: Sequence[bool]) -> None:
        for contribution, state in zip(self._contributions, states, strict=True):
            contribution.on = state
        if self._on:
            self._engine.watch()


_wrapped: weakref.WeakKeyDictionary[Any, list[Attached[Any, Any]]] = weakref.WeakKeyDictionary()


def keep(owner: Any, run: Attached[Any, Any]) -> None:
    """Attach a run until `release`."""
    run.start()
    _wrapped.setdefault(owner, []).append(run)


def release(owner: Any) -> None:
    """Take off all that `keep` attached, newest first. An owner without runs is left alone."""
    for run in reversed(_wrapped.pop(owner, [])):
        run.stop()
