"""Put interventions on a model and take them off: the object behind `apply` and `wrap`."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from .anatomy import Anatomy, base_of
from .edits import Edit
from .engine import Engine, engine_of
from .errors import CannotEdit
from .plan import Contribution
from .report import Report


@runtime_checkable
class Intervention(Protocol):
    """A published method: a name, and the edits it asks for on a model of a given anatomy."""

    @property
    def name(self) -> str:
        """How it is called in reports and on the command line."""
        ...

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        """The edits it asks for."""
        ...


class Run:
    """Interventions on one model. Use it in a `with` statement; it restores the model on any exit."""

    def __init__(self, model: Any, interventions: Sequence[Intervention | Edit]) -> None:
        base = base_of(model)
        engine = engine_of(base)
        self._engine_of_model = weakref.ref(engine)  # a report that is kept must not keep the weights
        self._model_name, self._stock = type(base).__name__, engine.stock
        self._contributions = [_contribution(item, engine.anatomy) for item in interventions]
        self._on = False

    @property
    def _engine(self) -> Engine:
        engine = self._engine_of_model()
        if engine is None:
            raise CannotEdit(f"the {self._model_name} of this run is gone: keep a reference to it")
        return engine

    def __enter__(self) -> Run:
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
        engine = self._engine
        engine.add(self._contributions)
        self._on, self._stock = True, engine.stock

    def stop(self) -> None:
        """Detach. With the last run gone the model is bit-exactly as before."""
        engine = self._engine_of_model()
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

    def report(self) -> Report:
        """Which layers, heads and rows acted, how often, on which path."""
        tallies = [tally for contribution in self._contributions for tally in contribution.tallies]
        names = [contribution.name for contribution in self._contributions]
        return Report(self._model_name, self._stock, names, tallies)

    def read(self, name: str) -> dict[int, Tensor]:
        """What the `Hidden` edit of that name kept for the newest prompt, by layer."""
        session = self._engine.latest if self._on else None
        ours = {id(contribution) for contribution in self._contributions}
        found = {} if session is None else session.hidden
        return {
            layer: kept
            for (own_name, layer), by_owner in found.items()
            for owner, kept in by_owner.items()
            if own_name == name and owner in ours
        }


def _contribution(item: Intervention | Edit, anatomy: Anatomy) -> Contribution:
    if isinstance(item, Edit):
        return Contribution(type(item).__name__, (item,))
    if isinstance(item, Intervention) and not isinstance(item, type):
        return Contribution(item.name, tuple(item.edits(anatomy)))
    hint = f"; make one with {item.__name__}()" if isinstance(item, type) else ""
    raise TypeError(
        f"expected a recipe's name, an intervention or an edit, got {type(item).__name__}: {item!r}{hint}"
    )


_wrapped: weakref.WeakKeyDictionary[nn.Module, list[Run]] = weakref.WeakKeyDictionary()
T = TypeVar("T")


def wrap(model: T, interventions: Sequence[Intervention | Edit]) -> T:
    """Attach until `unwrap`. Takes a model or a transformers pipeline and returns the same object."""
    run = Run(model, interventions)
    run.start()
    _wrapped.setdefault(base_of(model), []).append(run)
    return model


def unwrap(model: T) -> T:
    """Take off all that `wrap` attached, newest first. A model that was never wrapped is left alone."""
    for run in reversed(_wrapped.pop(base_of(model), [])):
        run.stop()
    return model
