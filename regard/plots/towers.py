"""Vision towers: the patches that CLS looks at, and the importance, distance and pattern of each head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .look import BLUE, HEAT, RED, drawn, numbered, picked, titled, values
from .panels import Panels, head_axes
from .pictures import Seen, beside

if TYPE_CHECKING:
    from ..interventions.tower_heads import TowerHeads
    from ..interventions.tower_patterns import HeadClusters


@drawn
def outliers(
    picture: Any, found: Any, *, image: int = 0, processor: Any = None, ax: Axes | None = None
) -> Figure:
    """DAMRO's outlier patches (arXiv 2410.04514) on the picture, beside the attention of the tower's CLS token.

    Args:
        picture: the one that the processor was given: PIL, array or tensor.
        found: of `regard.cls_outliers`.
        image: of several images or crops.
        processor: the model's, to lay the map where a processor cuts the picture's middle out.
        ax: axis to draw on; None makes a figure.

    Raises:
        ValueError: no such image; a picture of another shape.
    """
    seen = Seen.of(picture, processor)
    field = values(
        "probs", found.probs[picked("image", image, len(found.probs))], 2, "(images, height, width)"
    )
    chosen = found.chosen[image].cpu().numpy()
    panels = beside(seen, 2, ax)
    shown = panels.at(0, 0)
    seen.show(shown, f"{chosen.sum()} outlier patches of {chosen.size}")
    seen.outline(shown, chosen)
    axes = panels.at(0, 1)
    title = f"attention of CLS, tower layer {found.layer}\n{field[chosen].sum():.1%} on outliers"
    drawn = seen.heat(axes, field, float(field.max()) or 1.0, title)
    seen.outline(axes, chosen, width=0.8)
    panels.bar(drawn, "probability\n(mean over heads)")
    return panels.done()


@drawn
def importance(heads: TowerHeads, *, ax: Axes | None = None) -> Figure:
    """What pruning each head of a vision tower changes, layers x heads.

    Args:
        heads: of `regard.tower_heads`, with importance.
        ax: axis to draw on; None makes a figure.

    Raises:
        ValueError: importance was not asked for.
    """
    if heads.importance is None:
        raise ValueError("importance was not read: call regard.tower_heads with importance=True")
    field = values("importance", heads.importance, 2, "(layers, heads)")
    panels, axes = head_axes(ax, field.shape, range(len(field)))
    low = min(0.0, float(field.min()))  # pruning may also help
    image = axes.imshow(field, cmap=HEAT, vmin=low, vmax=float(field.max()) or 1.0, aspect="auto")
    titled(axes, "importance of heads")
    panels.bar(image, "change when pruned")
    return panels.done()


@drawn
def distance(heads: TowerHeads, *, pixels: bool = False, ax: Axes | None = None) -> Figure:
    """Mean attention distance of each head by layer (arXiv 2010.11929, appendix D.7), and the mean of the layer.

    Args:
        heads: of `regard.tower_heads`.
        pixels: in pixels of the tower's input; else in patches.
        ax: axis to draw on; None makes a figure.
    """
    found = values("distance", heads.pixel_distance if pixels else heads.distance, 2, "(layers, heads)")
    layers, count = found.shape
    panels = Panels(ax, (1, 1), (min(max(0.16 * layers, 2.6), 6) + 0.7, 2.6))
    axes = panels.at()
    across = np.repeat(np.arange(layers), count)
    axes.plot(
        across, found.flatten(), "o", color=BLUE, markersize=3.2, alpha=0.6, markeredgewidth=0, label="head"
    )
    axes.plot(
        range(layers), found.mean(1), "-D", color=RED, markersize=3, linewidth=1.2, label="mean of the layer"
    )
    axes.set_xlim(-0.5, layers - 0.5)
    axes.set_ylim(0, 1.08 * float(found.max()) or 1.0)
    numbered(axes.xaxis, range(layers), "layer")
    axes.set_ylabel(f"mean attention distance ({'pixels' if pixels else 'patches'})")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)
    return panels.done()


@drawn
def patterns(clusters: HeadClusters, *, ax: Axes | None = None) -> Figure:
    """The kind of attention of each head, layers x heads, and the mean attention of each kind by offset.

    Kinds are numbered from the nearest to the farthest; the colours of each offset map reach to its own largest value.

    Args:
        clusters: of `TowerHeads.clusters`.
        ax: axis to draw on; None makes a figure.
    """
    labels, maps = clusters.labels.cpu().numpy(), values("maps", clusters.maps, 3, "(k, 2h - 1, 2w - 1)")
    count = len(maps)
    columns = -(-count // 2) if count > 1 else 1
    rows = 2 if count > 1 else 1
    wide = min(max(0.16 * labels.shape[1], 1.8), 5)
    size = wide + 1.35 * columns + 0.5, max(min(max(0.16 * labels.shape[0], 1.6), 5) + 0.7, 1.8 * rows)
    panels = Panels(ax, (rows, 1 + columns), size, [wide, *[1.25] * columns], (0.35, 0.5), right=0)
    axes = panels.at(0, 0, rows)
    axes.imshow(labels, cmap=HEAT, vmin=0, vmax=max(count - 1, 1), aspect="auto")
    _numbers(axes, labels, count)
    numbered(axes.xaxis, range(labels.shape[1]), "head")
    numbered(axes.yaxis, range(labels.shape[0]), "layer")
    titled(axes, "kind of each head")
    high, across = (side // 2 for side in maps.shape[1:])
    for kind, field in enumerate(maps):
        axes = panels.at(kind // columns, 1 + kind % columns)
        axes.imshow(field, cmap=HEAT, vmin=0, extent=(-across - 0.5, across + 0.5, high + 0.5, -high - 0.5))
        heads = int(clusters.sizes[kind])
        name = f"kind {kind}: {heads} {'head' if heads == 1 else 'heads'}"
        axes.set_title(f"{name}\n{float(clusters.distance[kind]):.1f} patches away")
        if kind % columns == 0:
            axes.set_ylabel("down (patches)")
        if kind + columns >= count:
            axes.set_xlabel("right (patches)")
    return panels.done()


def _numbers(axes: Axes, labels: np.ndarray, count: int) -> None:
    """The number of its kind in each cell, in ink that shows on its colour."""
    colours = colormaps[HEAT](np.linspace(0, 1, max(count, 2)))
    light = colours[:, :3] @ (0.299, 0.587, 0.114) > 0.5
    for (row, column), kind in np.ndenumerate(labels):
        ink = "black" if light[kind] else "white"
        axes.text(column, row, str(kind), ha="center", va="center", color=ink, fontsize=6.5)
