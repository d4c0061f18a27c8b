"""Recipes by name, and the front door to the engine."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from ..hooks import run as runs
from ..hooks.anatomy import anatomy, base_of
from ..hooks.edits import Edit
from ..hooks.errors import UnknownName
from ..hooks.run import Intervention, Run
from .agla import AGLA
from .damro import DAMRO
from .dola import DoLa
from .dyvte import DyVTE
from .icd import ICD
from .m3id import M3ID
from .method import Method
from .mma import MMA
from .none import Null
from .opera import OPERA
from .pai import PAI
from .paint import PAINT
from .plausible import Plausible
from .sink_removal import DropSinks
from .var import VAR
from .vcd import VCD
from .vhr import VHR

METHODS: tuple[type[Method], ...] = (
    Null,
    VHR,
    VAR,
    DAMRO,
    PAINT,
    DyVTE,
    Plausible,
    VCD,
    M3ID,
    ICD,
    DoLa,
    PAI,
    DropSinks,
    OPERA,
    AGLA,
    MMA,
)
T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """One line of `regard.recipes`: where a method comes from and what it costs.

    `models` are the families that the paper or its code has defaults for; it runs on others too.
    """

    name: str
    paper: str
    arxiv: str
    kind: str
    cost: str
    models: tuple[str, ...]
    summary: str


def recipes(pattern: str = "*") -> list[Recipe]:
    """Recipes whose name matches a shell pattern."""
    return [
        Recipe(m.name, m.paper, m.arxiv, m.kind, m.cost, m.models, (m.__doc__ or "").splitlines()[0])
        for m in METHODS
        if fnmatch.fnmatch(m.name, pattern.lower())
    ]


def recipe(name: str, model: Any) -> Method:
    """The method of that name with the paper's defaults for this model.

    Raises:
        UnknownName: no such recipe; the message has the nearest names.
    """
    for method in METHODS:
        if method.name == name.lower():
            return method.for_model(anatomy(base_of(model)))
    raise UnknownName("recipe", name, [method.name for method in METHODS])


def resolve(
    model: Any, items: Sequence[str | Intervention | Edit], processor: Any = None
) -> list[Intervention | Edit]:
    """Names made objects, and methods given what they need of the processor."""
    if processor is None and not isinstance(model, nn.Module):
        processor = getattr(model, "processor", None)  # a transformers pipeline has one
    found = [recipe(item, model) if isinstance(item, str) else item for item in items]
    if processor is None:
        return found
    return [item.with_processor(processor) if isinstance(item, Method) else item for item in found]


def apply(model: Any, *interventions: str | Intervention | Edit, processor: Any = None) -> Run:
    """Edit a model for the length of a `with` statement.

        with regard.apply(model, "vhr", regard.VAR(transfer=0.6)) as run:
            ids = model.generate(**inputs)
            with run.off():
                base = model.generate(**inputs)

    Args:
        model: a transformers model, a PEFT model, or a transformers pipeline.
        interventions: recipe names, interventions or single edits; they act in the order given.
        processor: the model's processor, for the recipes that read or write text or pixels (AGLA, ICD, MMA);
            a pipeline brings its own.

    Raises:
        UnknownName, CannotEdit, OutOfRange: before anything is changed.
    """
    return Run(model, resolve(model, interventions, processor))


def wrap(model: T, *interventions: str | Intervention | Edit, processor: Any = None) -> T:
    """Edit a model or pipeline until `unwrap`; returns the same object. Errors are those of `apply`."""
    return runs.wrap(model, resolve(model, interventions, processor))


def unwrap(model: T) -> T:
    """Take off all that `wrap` attached; the model is bit-exactly as before."""
    return runs.unwrap(model)
