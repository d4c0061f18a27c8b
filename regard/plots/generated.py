"""Pictures of diffusion: where words acted, step by step, and masks of subjects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..interventions.places import check_places, places_at
from .look import CATEGORIES, HATCHES, HEAT, drawn, picked, titled, values
from .panels import Panels
from .pictures import Seen

if TYPE_CHECKING:
    from ..interventions.daam import WordHeat


@drawn
def word_maps(
    heat: WordHeat,
    *,
    image: int = 0,
    steps: Sequence[int] | None = None,
    words: Sequence[Any] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """The picture, and where each word acted in it, over the steps and in the mean of all (DAAM, arXiv 2210.04885).

    Args:
        heat: of `regard.word_heat`.
        image: which of the pictures.
        steps: denoising steps from 0; None takes six, evenly spaced, or all where there are fewer.
        words: some of `heat.words`; None takes all.
        ax: axis to draw on; None makes a figure.

    Raises:
        ValueError: no such picture, step or word.
    """
    by_step = values("by_step", heat.by_step, 5, "(B, steps, words, h, w)")
    own = by_step[picked("picture", image, len(by_step))]
    seen = Seen.of(heat.images[image])
    count = len(own)
    if steps is None:
        steps = np.linspace(0, count - 1, min(count, 6)).round().astype(int).tolist()
    steps = [picked("step", step, count) for step in steps]
    chosen = heat.words if words is None else tuple(words)
    missing = [word for word in chosen if word not in heat.words]
    if missing or not chosen:
        raise ValueError(f"{missing} are not among the words {list(heat.words)}: give some of them")
    rows = [heat.words.index(word) for word in chosen]
    fields = [(f"step {step}", own[step]) for step in steps] + [("mean", own.mean(0))]
    top = max(float(field[rows].max()) for _, field in fields) or 1.0
    side = 0.78
    widths = [1 + (len(rows) > 1), 0.12, *[1.0] * len(fields)]  # the second is room for the words
    size = side, side * seen.ratio
    panels = Panels(ax, (len(rows), len(widths)), size, widths, (0.08, 0.08), pictures=True)
    seen.show(panels.at(0, 0, len(rows)), "picture")
    panels.axes[0].set_anchor("N")
    for line, (row, word) in enumerate(zip(rows, chosen, strict=True)):
        for column, (name, field) in enumerate(fields, start=2):
            axes = panels.at(line, column)
            drawn = axes.imshow(
                field[row], cmap=HEAT, vmin=0, vmax=top, extent=seen.extent, interpolation="nearest"
            )
            axes.set(xticks=[], yticks=[])
            if not line:
                titled(axes, name)
            if column == 2:
                axes.set_ylabel(str(word), fontweight="bold")
    panels.bar(drawn, "probability")
    return panels.done()


@drawn
def masks(picture: Any, masks: Any, names: Sequence[str] | None = None, *, ax: Axes | None = None) -> Figure:
    """Regions of a picture with their names, as isolation keeps them apart: in colours, hatched and outlined.

    Args:
        picture: PIL, array or tensor.
        masks: (S, h, w) above 0.5 where subject s is, over the whole picture at any resolution; those of
            `regard.rehearse`, or `masks[0]` of `regard.word_masks`; or (S, 4) boxes: left, top, right, bottom as
            shares of the width and height. The title names subjects without a place.
        names: of the S subjects; None counts them.
        ax: axis to draw on; None makes a figure.

    Raises:
        ValueError: masks of another shape, all of them empty, or another number of names.
    """
    seen = Seen.of(picture)
    given = torch.as_tensor(masks)
    if given.ndim == 2 and given.shape[1] == 4:
        high, wide = seen.pixels.shape[:2]
        given = places_at(check_places(given, "masks", disjoint=False), (high, wide))
    chosen = values("masks", given, 3, "(subjects, height, width)") > 0.5
    names = [f"subject {number}" for number in range(len(chosen))] if names is None else list(names)
    if len(names) != len(chosen):
        raise ValueError(f"there are {len(chosen)} masks and {len(names)} names: give one each")
    empty = [str(name) for name, mask in zip(names, chosen, strict=True) if not mask.any()]
    if len(empty) == len(chosen):
        raise ValueError(f"all masks are empty, of {', '.join(empty)}: there is nothing to draw")
    panels = Panels(ax, (1, 1), (3, 3 * seen.ratio), right=0, pictures=True)
    axes = panels.at()
    seen.show(axes, f"nowhere: {', '.join(empty)}" if empty else "")
    for number, (mask, name) in enumerate(zip(chosen, names, strict=True)):
        colour = CATEGORIES[number % len(CATEGORIES)]
        hatch = HATCHES[(number + number // len(CATEGORIES)) % len(HATCHES)]
        if mask.any():
            seen.region(axes, mask, str(name), colour, hatch)
    return panels.done()
