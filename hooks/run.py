"""Put interventions on a model and take them off: the object behind `apply` and `wrap`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from .anatomy import Anatomy, base_of
from .attached import Attached
from .edits import Edit
from .engine import Engine, engine_of
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


class Run(Attached[Engine, Contribution]):
    """Interventions on one model. Use it in a `with` statement; it restores the model on any exit."""

    def __init__(self, model: Any, interventions: Sequence[Intervention | Edit]) -> None:
        base = base_of(model)
        engine = engine_of(base)
        contributions = [_contribution(item, engine.anatomy) for item in interventions]
        super().__init__(engine, type(base).__name__, contributions)
        self._stock = engine.stock

    def start(self) -> None:
        """Attach. Nothing is changed when this raises."""
        super().start()
        self._stock = self._engine.stock

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
