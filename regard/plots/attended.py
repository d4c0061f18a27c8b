"""Where a model looks: rows of attention over the picture, its sinks, and the groups of tokens over the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .captions import Caption, tokenizer_of
from .look import BLUE, GREEN, PURPLE, RED, SKY, YELLOW, drawn, numbered, picked, titled, values
from .panels import Panels
from .pictures import Seen, beside

if TYPE_CHECKING:
    from ..interventions.attention import Attention
    from ..interventions.vlsam import ObjectMap

GROUPS = {
    "text sink": (BLUE, "xx"),
    "first token": (BLUE, "xx"),
    "prompt": (SKY, ""),
    "image sink": (RED, "//"),
    "image": (YELLOW, ".."),
    "answer": (GREEN, "\\\\"),
}
"""Colour and hatch of each group of tokens."""


@drawn
def attention(
    picture: Any,
    attention: Attention,
    *,
    token: int | str | None = None,
    layer: int | None = None,
    image: int = 0,
    processor: Any = None,
    ax: Axes | None = None,
) -> Figure:
    """The picture, and the attention of the row that chose a token over it.

    Args:
        picture: the one that the processor was given: PIL, array or tensor.
        attention: of `regard.attention`.
        token: number of the generated token, or a word of the answer, whose first token counts (needs `processor`);
            None takes the mean over all rows.
        layer: decoder block; None takes the mean over all.
        image: of several images of the prompt.
        processor: the model's, to read the words, and to lay the map where a processor cuts the picture's middle out.
        ax: axis to draw on; None makes a figure.

    Raises:
        NoObjectWords: the word is not in the answer.
        ValueError: no such token, layer or image; a picture of another shape.
    """
    seen = Seen.of(picture, processor)
    row, said = _row(attention, token, processor)
    field, _ = _map(attention, row, layer, image)
    panels = beside(seen, 2, ax)
    seen.show(panels.at(0, 0), "picture")
    top = float(field.max()) or 1.0
    title = f"{_depth(attention, layer)}\n{field.sum():.1%} of attention on picture"
    drawn = seen.heat(panels.at(0, 1), field, top, title)
    panels.axes[1].set_xlabel(said)
    panels.bar(drawn, "probability\n(mean over heads)")
    return panels.done()


@drawn
def sinks(
    picture: Any,
    plain: Attention,
    edited: Attention | None = None,
    *,
    token: int | str | None = None,
    layer: int | None = None,
    image: int = 0,
    processor: Any = None,
    names: tuple[str, str] = ("without VAR", "with VAR"),
    ax: Axes | None = None,
) -> Figure:
    """Visual sinks (arXiv 2503.03321) on the picture, beside the attention of a row without and with VAR.

    The colours reach as far as the attention to places that are no sinks; sinks beyond have the last colour. Shares
    are those of this picture's places; they and the outlines are of the layer, or of all: a place is outlined that is
    a sink in one of them.

    Args:
        picture: the one that the processor was given: PIL, array or tensor.
        plain: of `regard.attention`, with sink dimensions known or given.
        edited: the same with a recipe on the model, best with `output=plain.tokens`; None leaves its panel out.
        token: see `attention`, like the next three.
        layer: None takes the mean over all.
        image: of several images of the prompt.
        processor: the model's, to lay the maps right and to name words.
        ax: axis to divide; None makes a figure.
        names: of the two panels.

    Raises:
        NoObjectWords: the word is not in the answer.
        ValueError: sinks that are unknown; other images, layers or tokens in `edited`; and as `attention`.
    """
    seen = Seen.of(picture, processor)
    runs = [plain] if edited is None else [plain, edited]
    row, said = _row(plain, token, processor)
    _alike(plain, edited, row if token is not None else None)
    maps = [_map(run, row if token is not None else slice(None), layer, image) for run in runs]
    found = [_sinks(run, layer, image) for run in runs]
    others = [field[~own.any(0)] for (field, _), own in zip(maps, found, strict=True)]
    top = max((float(few.max()) for few in others if few.size), default=0.0)
    highest = max(float(field.max()) for field, _ in maps)
    panels = beside(seen, 1 + len(runs), ax)
    shown = panels.at(0, 0)
    count = int(found[0].any(0).sum())
    seen.show(shown, f"{count} visual {'sink' if count == 1 else 'sinks'}\n{_depth(plain, layer)}")
    seen.outline(shown, found[0].max(0))
    for column, ((field, each), own, name) in enumerate(zip(maps, found, names, strict=False), start=1):
        axes = panels.at(0, column)
        share = (each * own).sum((1, 2)).mean()
        title = f"{name}\n{field.sum():.1%} on picture, {share:.1%} on sinks"
        drawn = seen.heat(axes, field, top or highest or 1.0, title)
        seen.outline(axes, own.max(0), width=0.8)
    panels.axes[1].set_xlabel(said)
    panels.bar(drawn, "probability\n(mean over heads)", clipped=0 < top < highest)
    return panels.done()


@drawn
def flow(
    picture: Any,
    object_map: ObjectMap,
    *,
    image: int = 0,
    processor: Any = None,
    ax: Axes | None = None,
) -> Figure:
    """The picture, and VL-SAM's attention flow (arXiv 2410.05963) of a word over it.

    Args:
        picture: the one that the processor was given: PIL, array or tensor.
        object_map: one of `regard.object_maps(...).objects`.
        image: of several images of the prompt.
        processor: the model's, to lay the map where a processor cuts the picture's middle out.
        ax: axis to draw on; None makes a figure.

    Raises:
        ValueError: no such image, or one behind the word, which the word cannot have looked at.
    """
    seen = Seen.of(picture, processor)
    chosen = object_map.maps[picked("image", image, len(object_map.maps))]
    field = values("map", chosen, 2, "(h, w)")
    if not field.any():
        raise ValueError(
            f"the map of {object_map.word!r} over image {image} is zero: the image comes behind the word"
        )
    panels = beside(seen, 2, ax)
    seen.show(panels.at(0, 0), "picture")
    drawn = seen.heat(panels.at(0, 1), field, float(field.max()), f"flow of “{object_map.word}”")
    panels.bar(drawn, "attention flow (not normalised)")
    return panels.done()


@drawn
def masses(
    attention: Attention,
    edited: Attention | None = None,
    *,
    token: int | str | None = None,
    processor: Any = None,
    names: tuple[str, str] = ("plain", "edited"),
    ax: Axes | None = None,
) -> Figure:
    """The share of attention that each group of tokens has, over the layers, mean over heads.

    Args:
        attention: of `regard.attention`.
        edited: the same with a recipe on the model, beside it.
        token: number of the generated token, or a word of the answer (needs `processor`), whose row is taken; None
            takes the mean over all rows.
        processor: the model's, to find a word.
        names: of the two panels.
        ax: axis to draw on; None makes a figure.

    Raises:
        NoObjectWords: the word is not in the answer.
        ValueError: no such token; other groups, layers or tokens in `edited`.
    """
    row, said = _row(attention, token, processor)
    _alike(attention, edited, row if token is not None else None)
    runs = [attention] if edited is None else [attention, edited]
    wide = min(max(0.11 * len(attention.layers), 1.6), 4)
    panels = Panels(ax, (1, len(runs)), (wide * len(runs) + 1.5, 2.5), right=1.1)
    for column, run in enumerate(runs):
        shares = values("masses", run.masses, 4, "(N, L, H, G)")[row if token is not None else slice(None)]
        axes = panels.at(0, column)
        _stack(axes, run, shares.mean((0, 2)))
        titled(axes, f"{names[column]}, {said}" if edited else said)
        if column:
            axes.tick_params(labelleft=False)
    panels.axes[0].set_ylabel("share of attention")
    top = max(axes.get_ylim()[1] for axes in panels.axes)
    for axes in panels.axes:
        axes.set_ylim(0, top)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), reverse=True, handleheight=1.6, handlelength=2)
    return panels.done()


def _stack(axes: Axes, run: Attention, shares: np.ndarray) -> None:
    """Bars of (L, G) shares on each other."""
    floor = np.zeros(len(shares))
    for number, group in enumerate(run.groups):
        colour, hatch = GROUPS.get(group, (PURPLE, "--"))
        how: dict[str, Any] = {"facecolor": colour, "hatch": hatch, "edgecolor": "black", "linewidth": 0}
        axes.bar(range(len(shares)), shares[:, number], 0.9, floor, label=group, **how)
        floor = floor + shares[:, number]
    axes.set(xlim=(-0.5, len(shares) - 0.5), ylim=(0, max(1.0, float(floor.max()))))
    numbered(axes.xaxis, run.layers, "layer")


def _row(found: Attention, token: int | str | None, processor: Any) -> tuple[slice, str]:
    """Which rows are meant, and how to call them."""
    count, spoken = len(found.masses), len(found.tokens)
    if isinstance(token, str):
        if tokenizer_of(processor) is None:
            raise ValueError(
                f"to find the word {token!r} the processor is needed: pass processor=, or a number"
            )
        caption = Caption.of(found.tokens, processor)
        first = caption.words[caption.find(token)[0]].first
        return slice(first, first + 1), f"row that chose “{token}”"
    if token is not None:
        token = picked("token", token, count)
    if not spoken:
        return slice(0, 1), "last row of the prompt"
    if token is None:
        return slice(0, count), f"mean of {count} rows" if count > 1 else "row of the only token"
    tokenizer = tokenizer_of(processor)
    name = f"“{tokenizer.decode([int(found.tokens[token])]).strip()}”" if tokenizer else f"token {token}"
    return slice(token, token + 1), f"row that chose {name}"


def _layers(found: Attention, layer: int | None) -> slice:
    if layer is None:
        return slice(None)
    if layer not in found.layers:
        raise ValueError(f"there is no layer {layer}: the layers are {', '.join(map(str, found.layers))}")
    at = found.layers.index(layer)
    return slice(at, at + 1)


def _depth(found: Attention, layer: int | None) -> str:
    if layer is not None or len(found.layers) == 1:
        return f"layer {found.layers[0] if layer is None else layer}"
    return f"mean over {len(found.layers)} layers"


def _map(found: Attention, row: slice, layer: int | None, image: int) -> tuple[np.ndarray, np.ndarray]:
    """The map (h, w) of some rows, and those of its layers (l, h, w)."""
    maps = values(
        "a map", found.maps[picked("image", image, len(found.maps))], 4, "(rows, layers, height, width)"
    )
    each: np.ndarray = maps[row, _layers(found, layer)].mean(0)
    return each.mean(0), each


def _sinks(found: Attention, layer: int | None, image: int) -> np.ndarray:
    """(l, h, w) bool."""
    if found.sinks is None:
        raise ValueError(
            "the sinks are unknown: pass sink_dims= and tau= to regard.attention, as "
            "regard.sink_dimensions(model, inputs) finds them"
        )
    own: Sequence[Tensor] = found.sinks
    return own[image][_layers(found, layer)].cpu().numpy()


def _alike(plain: Attention, edited: Attention | None, row: slice | None) -> None:
    """Raise where two runs cannot be compared: at one row, or over the mean of all."""
    if edited is None:
        return
    for what in ("groups", "layers"):
        if getattr(plain, what) != getattr(edited, what):
            raise ValueError(
                f"the {what} differ, {getattr(plain, what)} and {getattr(edited, what)}: read one model and prompt"
            )
    shapes = [[tuple(own.shape[2:]) for own in run.maps] for run in (plain, edited)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the maps differ in shape, {shapes[0]} and {shapes[1]}: read one prompt")
    if row is not None and (
        plain.tokens[row].tolist() != edited.tokens[row].tolist()
        or not plain.tokens[: row.start].equal(edited.tokens[: row.start])
    ):
        raise ValueError(
            f"the two answers differ up to token {row.start}: read the second with output=plain.tokens"
        )
