"""What a run compares: recipes by name, by name with settings, as objects, or several at once."""

import ast
import copy
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

from ..hooks.errors import UnknownName
from .data import MINIATURE
from .provenance import model_name
from .run_folder import EvalError, slug

BASELINE = "none"

Recipe: TypeAlias = str | Any | Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One column of a results table: what to apply, and under which label."""

    label: str
    interventions: tuple[Any, ...]
    note: str = ""

    @property
    def is_baseline(self) -> bool:
        """Whether this is "none", by name or as an object."""
        return all(part == BASELINE or getattr(part, "name", "") == BASELINE for part in self.interventions)

    def describe(self) -> list[dict[str, Any]]:
        """The class and all fields of each intervention, for `config.json`; empty for the baseline."""
        return [
            {
                "class": type(part).__name__,
                **{f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.repr},
            }
            | ({"note": self.note} if self.note else {})
            for part in self.interventions
            if not isinstance(part, str)
        ]

    def with_processor(self, processor: Any) -> "Setting":
        """With what its methods need of the processor."""
        parts = tuple(
            part.with_processor(processor) if hasattr(part, "with_processor") else part
            for part in self.interventions
        )
        return dataclasses.replace(self, interventions=parts)

    def attach(self, model: Any) -> AbstractContextManager[Any]:
        """The engine on this model, with this setting. The baseline is the engine with a null edit."""
        from ..interventions import apply

        return apply(model, *self.interventions)


def make_settings(
    recipes: Sequence[Recipe] | Mapping[str, Recipe] | str, model: Any, processor: Any = None
) -> list[Setting]:
    """Resolve recipes; the baseline "none" comes first whether or not it is listed.

    Methods that need something of the processor take it here.

    A recipe is a name ("vhr"), a name with settings ("var:transfer=0.3:rho=0.6"), several that act together
    ("vhr+var"), an intervention object, or a list of these. A mapping gives labels of one's own.

    Raises:
        UnknownName: no recipe, or no setting of a recipe, has that name.
        EvalError: two recipes would have the same label or file name.
    """
    if isinstance(recipes, str):
        commas = r",(?![^(\[]*[)\]])"  # not those inside brackets: var:layers=(0,1)
        recipes = [name.strip() for name in re.split(commas, recipes) if name.strip()]
    if isinstance(recipes, Mapping):
        settings = [_setting(recipe, model, label) for label, recipe in recipes.items()]
    else:
        settings = [_setting(recipe, model) for recipe in recipes]
    settings = [setting for setting in settings if not setting.is_baseline]
    if processor is not None:
        settings = [setting.with_processor(processor) for setting in settings]
    settings.insert(0, Setting(BASELINE, (BASELINE,)))
    files: dict[str, str] = {}
    for setting in settings:
        file = slug(setting.label).lower()
        if file in files:
            raise EvalError(
                f"two recipes would be called {setting.label!r}: give them labels of your own, "
                "recipes={'label': recipe, ...}"
            )
        files[file] = setting.label
    return settings


def with_controls(settings: Sequence[Setting]) -> list[Setting]:
    """The settings, and behind the baseline the plausibility mask alone for every mask that a recipe contrasts under.

    Under sampling this mask does most of what contrastive methods are praised for (arXiv 2504.10020).
    """
    from ..interventions import Plausible

    masks = {
        part.beta: None
        for setting in settings
        for part in setting.interventions
        if "contrast" in getattr(part, "kind", "") and part.beta
    }
    there = {
        part.beta for setting in settings for part in setting.interventions if isinstance(part, Plausible)
    }
    controls = []
    for beta in masks:
        if beta not in there:
            label = "plausible" if beta == Plausible().beta else f"plausible:beta={beta}"
            controls.append(Setting(label, (Plausible(beta=beta),)))
    return [*settings[:1], *controls, *settings[1:]]


def fill_matchers(settings: Sequence[Setting], model: Any, processor: Any) -> list[Setting]:
    """Give AGLA a matcher on the miniature, whose scenes no public matching model knows: its own attention."""
    from ..interventions.matching import AttentionMatcher

    def lacks(part: Any) -> bool:
        return getattr(part, "matcher", part) is None

    if not any(lacks(part) for setting in settings for part in setting.interventions):
        return list(settings)
    if not model_name(model).startswith(MINIATURE + " "):
        return list(settings)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    matcher = AttentionMatcher(eager, processor)
    return [
        dataclasses.replace(
            setting,
            interventions=tuple(
                dataclasses.replace(part, matcher=matcher) if lacks(part) else part
                for part in setting.interventions
            ),
        )
        for setting in settings
    ]


def find_sinks(
    settings: Sequence[Setting], model: Any, inputs: Callable[[], Mapping[str, Any]]
) -> list[Setting]:
    """Give VAR the sink dimensions of a model for which nobody has published them.

    Args:
        settings: what will be run.
        model: a model that the engine can attach to.
        inputs: makes a prompt with images for `regard.sink_dimensions`; called only when it is needed.

    Raises:
        EvalError: no dimension stands out.
    """
    from ..hooks.anatomy import anatomy, base_of
    from ..interventions.sinks import known_sinks, sink_dimensions

    def lacks(part: Any) -> bool:
        return getattr(part, "sink_dims", ()) is None

    if not any(lacks(part) for setting in settings for part in setting.interventions):
        return list(settings)
    if known_sinks(anatomy(base_of(model))) is not None:
        return list(settings)
    found = sink_dimensions(model, inputs())
    if not found.dims:
        raise EvalError(
            "VAR needs the model's sink dimensions, none are published for it, and none stand out on the first "
            "images: leave VAR out, or give them, var:sink_dims=(1415,2533)"
        )
    filled = []
    for setting in settings:
        parts = tuple(
            dataclasses.replace(part, sink_dims=found.dims, tau=round(found.tau, 3)) if lacks(part) else part
            for part in setting.interventions
        )
        note = (
            "sink dimensions and tau found on the first images of the data"
            if parts != setting.interventions
            else ""
        )
        filled.append(dataclasses.replace(setting, interventions=parts, note=note))
    return filled


def _setting(recipe: Recipe, model: Any, label: str | None = None) -> Setting:
    if isinstance(recipe, str):
        parts = tuple(_named(part.strip(), model) for part in recipe.split("+"))
        name = recipe.replace(" ", "")
    elif isinstance(recipe, (list, tuple)):
        inner = [_setting(part, model) for part in recipe]
        parts = tuple(part for setting in inner for part in setting.interventions)
        name = "+".join(setting.label for setting in inner)
    else:
        parts, name = (recipe,), _label(recipe)
    if len(parts) > 1 and any(part == BASELINE for part in parts):
        raise EvalError(f'{name!r}: "none" changes nothing, so it cannot be combined with another recipe')
    if not parts:
        raise EvalError('an empty list is no recipe; the baseline is called "none"')
    return Setting(label or name, parts)


def _named(text: str, model: Any) -> Any:
    from ..interventions import recipe as find

    name, changes = parse_options(text)
    if name == BASELINE:
        return BASELINE
    found = find(name, model)
    known = [field.name for field in dataclasses.fields(found)]
    if wrong := next((key for key in changes if key not in known), None):
        raise UnknownName(f"setting of {name}", wrong, known)
    return dataclasses.replace(found, **changes) if changes else found


def parse_options(text: str) -> tuple[str, dict[str, Any]]:
    """`astar:scale=40:until=0.5` as its name and its settings.

    Raises:
        EvalError: a part without "=".
    """
    name, *settings = text.split(":")
    found = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise EvalError(f"{text!r}: {setting!r} is no setting; write {name}:NAME=VALUE")
        found[key] = _value(value)
    return name, found


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _label(recipe: Any) -> str:
    """`var`, or `var:transfer=0.3` where an object differs from its class's defaults."""
    if not dataclasses.is_dataclass(recipe):
        raise EvalError(f"{recipe!r} is no recipe: give a name, or an intervention such as regard.VAR()")
    name = str(getattr(recipe, "name", type(recipe).__name__)).lower()
    changed = [
        f"{field.name}={getattr(recipe, field.name)}"
        for field in dataclasses.fields(recipe)
        if getattr(recipe, field.name) != field.default and field.default is not dataclasses.MISSING
    ]
    return ":".join([name, *changed])
