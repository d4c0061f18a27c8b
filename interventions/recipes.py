"""Recipes by name, and the front door to the engine."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar, cast, overload

from torch import nn

from ..hooks import attached
from ..hooks.anatomy import anatomy, base_of
from ..hooks.denoiser import is_pipeline
from ..hooks.edits import Edit
from ..hooks.errors import CannotEdit, UnknownName
from ..hooks.latent_edits import Attend, Guidance, LatentEdit, Watch
from ..hooks.pipeline_run import PipelineRun
from ..hooks.run import Intervention, Run
from .agla import AGLA
from .astar import ASTAR
from .attend_excite import AttendExcite
from .damro import DAMRO
from .dola import DoLa
from .dyvte import DyVTE
from .icd import ICD
from .ir_diffusion import IRDiffusion, IsolationAttention
from .m3id import M3ID
from .method import LatentMethod, Method, Published
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

METHODS: tuple[type[Published], ...] = (
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
    ASTAR,
    AttendExcite,
    IsolationAttention,
    IRDiffusion,
)
T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """One line of `regard.recipes`: where a method comes from and what it costs.

    `models` are the families that the paper or its code has defaults for; it runs on others too. `on` is the library
    whose models it edits.
    """

    name: str
    paper: str
    arxiv: str
    kind: str
    cost: str
    models: tuple[str, ...]
    summary: str
    on: Literal["transformers", "diffusers"] = "transformers"


def recipes(pattern: str = "*") -> list[Recipe]:
    """Recipes whose name matches a shell pattern."""
    return [
        Recipe(
            m.name,
            m.paper,
            m.arxiv,
            m.kind,
            m.cost,
            m.models,
            (m.__doc__ or "").splitlines()[0],
            "diffusers" if issubclass(m, LatentMethod) else "transformers",
        )
        for m in METHODS
        if fnmatch.fnmatch(m.name, pattern.lower())
    ]


def recipe(name: str, model: Any, **options: Any) -> Method | LatentMethod:
    """The method of that name with the paper's defaults for this model, and with the options given.

    Raises:
        UnknownName: no such recipe; the message has the nearest names.
        CannotEdit: a recipe for language models on a diffusers pipeline, or the other way round.
        TypeError: an option that the recipe does not have.
    """
    method = next((method for method in METHODS if method.name == name.lower()), None)
    if method is None:
        raise UnknownName("recipe", name, [method.name for method in METHODS])
    if issubclass(method, LatentMethod) != is_pipeline(model):
        needs = "a diffusers pipeline" if issubclass(method, LatentMethod) else "a transformers model"
        raise CannotEdit(f"{name!r} edits {needs}, not {type(model).__name__}")
    known = [entry.name for entry in fields(method)]
    for option in options:
        if option not in known:
            raise TypeError(f"{name!r} has no option {option!r}; it has {', '.join(known)}")
    if issubclass(method, LatentMethod):
        return cast(LatentMethod, method(**options))
    found = cast(type[Method], method).for_model(anatomy(base_of(model)))
    return replace(found, **options) if options else found


def resolve(
    model: Any, items: Sequence[Any], processor: Any = None, options: dict[str, Any] | None = None
) -> list[Any]:
    """Names made objects, and methods given what they need of the processor.

    Raises:
        TypeError: options without a single recipe name that they are for.
    """
    options = options or {}
    names = [item for item in items if isinstance(item, str)]
    if options and len(names) != 1:
        raise TypeError(
            f"the options {', '.join(options)} need one recipe name to go with, not {len(names)}: "
            "make the interventions themselves, as in regard.VAR(transfer=0.6)"
        )
    if processor is None and not isinstance(model, nn.Module):
        processor = getattr(model, "processor", None)  # a transformers pipeline has one
    found = [recipe(item, model, **options) if isinstance(item, str) else item for item in items]
    if is_pipeline(model):
        return [_for_pipeline(item, model) for item in found]
    if wrong := next(
        (item for item in found if isinstance(item, (LatentMethod, Attend, Guidance, Watch))), None
    ):
        raise CannotEdit(f"{type(wrong).__name__} edits a diffusers pipeline, not {type(model).__name__}")
    if processor is None:
        return found
    return [item.with_processor(processor) if isinstance(item, Method) else item for item in found]


def _for_pipeline(item: Any, pipe: Any) -> LatentMethod | LatentEdit:
    if not isinstance(item, (LatentMethod, Attend, Guidance, Watch)):
        raise CannotEdit(f"{type(item).__name__} does not edit a diffusers pipeline ({type(pipe).__name__})")
    return item


@overload
def apply(model: nn.Module, *interventions: Any, processor: Any = None, **options: Any) -> Run: ...
@overload
def apply(model: Any, *interventions: Any, processor: Any = None, **options: Any) -> Any: ...
def apply(model: Any, *interventions: Any, processor: Any = None, **options: Any) -> Run | PipelineRun:
    """Edit a model or a diffusers pipeline for the length of a `with` statement.

        with regard.apply(model, "vhr", regard.VAR(transfer=0.6)) as run:
            ids = model.generate(**inputs)
            with run.off():
                base = model.generate(**inputs)

    Args:
        model: a transformers model, a PEFT model, a transformers pipeline, nnsight's wrapper of a model, or a diffusers
            pipeline.
        interventions: recipe names, interventions or single edits; they act in the order given.
        processor: the model's processor, for the recipes that read or write text or pixels (AGLA, ICD, MMA);
            a pipeline brings its own.
        options: of the one recipe that is given by name, as in `apply(pipe, "astar", concepts=["cat", "dog"])`.

    Raises:
        UnknownName, CannotEdit, OutOfRange: before anything is changed.
    """
    found = resolve(model, interventions, processor, options)
    return PipelineRun(model, found) if is_pipeline(model) else Run(model, found)


def wrap(
    model: T,
    *interventions: str | Intervention | Edit | LatentMethod | LatentEdit,
    processor: Any = None,
    **options: Any,
) -> T:
    """Edit a model or pipeline until `unwrap`; returns the same object. Errors are those of `apply`."""
    attached.keep(_owner(model), apply(model, *interventions, processor=processor, **options))
    return model


def unwrap(model: T) -> T:
    """Take off all that `wrap` attached; the model is bit-exactly as before."""
    attached.release(_owner(model))
    return model


def _owner(model: Any) -> Any:
    return model if is_pipeline(model) else base_of(model)
