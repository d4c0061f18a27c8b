"""VHD of heads, and T-VHD along a caption (arXiv 2412.13949)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from ..interventions.vhr import sensitive_heads
from .captions import Caption
from .look import BLUE, HEAT, RED, drawn, picked, titled, values
from .panels import Panels, head_axes

if TYPE_CHECKING:
    from ..interventions.divergence import Divergence

_WORDS = 40
"""Most words on one line."""


@drawn
def vhd(
    divergence: Divergence,
    *,
    mark: Literal["median"] | None = "median",
    scale: Literal["raw", "layer"] = "raw",
    sample: int = 0,
    ax: Axes | None = None,
) -> Figure:
    """VHD of every head, layers x heads: the heads that the image moves.

    Args:
        divergence: of `regard.divergence`.
        mark: "median" sets a dot on the heads above the median of their layer, which VHR reinforces in the layers that
            it edits, before its outlier filter; None sets none.
        scale: "raw" is the squared distance; "layer" divides by the largest of the layer, as VHR compares in layers.
        sample: of a batch.
        ax: axis to draw on; None makes a figure.

    Raises:
        ValueError: no VHD, values that are not finite, no such sample, another mark or scale.
    """
    if mark not in ("median", None) or scale not in ("raw", "layer"):
        raise ValueError(
            f"mark is 'median' or None and scale is 'raw' or 'layer', got mark={mark!r}, scale={scale!r}"
        )
    found = _sample(divergence.vhd, sample, 3)
    field = values("vhd", found, 2, "(layers, heads)")
    if scale == "layer":
        field = field / np.maximum(field.max(1, keepdims=True), np.finfo(float).tiny)
    panels, axes = head_axes(ax, field.shape, divergence.layers)
    image = axes.imshow(field, cmap=HEAT, vmin=0, vmax=float(field.max()) or 1.0, aspect="auto")
    title = "VHD at the last prompt row"
    if mark:
        title += "\nwhite dots: above the median of the layer"
        _dots(axes, sensitive_heads(found.detach()).cpu())
    titled(axes, title)
    unit = "squared distance" if scale == "raw" else "squared distance\n/ largest of the layer"
    panels.bar(image, unit)
    return panels.done()


def _dots(axes: Axes, chosen: Tensor) -> None:
    """Dots that fit into the cells."""
    rows, columns = chosen.nonzero(as_tuple=True)
    box = axes.get_window_extent().transformed(axes.get_figure().dpi_scale_trans.inverted())  # type: ignore[union-attr]
    cell = 72 * min(box.width / chosen.shape[1], box.height / chosen.shape[0])
    size = min(max(0.45 * cell, 1.2), 5)
    style: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": size, "color": "white"}
    axes.plot(columns, rows, markeredgecolor="black", markeredgewidth=0.12 * size, **style)


@drawn
def t_vhd(
    divergence: Divergence,
    words: Any,
    *,
    hallucinated: Sequence[str] = (),
    sample: int = 0,
    ax: Axes | None = None,
) -> Figure:
    """T-VHD along a caption: how much the image had to do with each word.

    A word of several tokens has the largest T-VHD of them: the first piece mostly settles the others, and a sum would
    grow with the length of the word. Captions of more than 40 words go on below.

    Args:
        divergence: of `regard.divergence`, with tokens.
        words: the processor or tokenizer, which decodes the tokens; or a list of texts, one for each token.
        hallucinated: words and phrases that are not in the picture, in any case, also with s or es behind them.
        sample: of a batch.
        ax: axis to draw on; None makes a figure.

    Raises:
        NoObjectWords: a hallucinated word is not in the caption.
        ValueError: no tokens, values that are not finite, no such sample, another number of words.
    """
    if isinstance(hallucinated, str):
        raise ValueError(
            f"hallucinated is a list of words, got the text {hallucinated!r}: give [{hallucinated!r}]"
        )
    caption = Caption.of(_sample(divergence.tokens, sample, 2), words)
    moved = values("t_vhd", _sample(divergence.t_vhd, sample, 2), 1, "(T,)")
    if len(moved) < caption.words[-1].last:
        raise ValueError(f"t_vhd has {len(moved)} values and the caption more tokens: give one for each")
    heights = np.array([moved[word.first : word.last].max() for word in caption.words])
    wrong = {number for word in hallucinated for number in caption.find(word)}
    lines = math.ceil(len(heights) / _WORDS)
    each = math.ceil(len(heights) / lines)
    size = max(0.165 * each + 0.8, 2.8), 2.2 * lines
    panels = Panels(ax, (lines, 1), size, gap=(0, 0.75), right=0)
    for line in range(lines):
        places = range(line * each, min((line + 1) * each, len(heights)))
        axes = panels.at(line)
        _bars(axes, caption, heights, places, wrong)
        axes.set(xlim=(-0.6, each - 0.4), ylim=(0, 1.08 * float(heights.max()) or 1))
    axes = panels.axes[0]
    if wrong:
        shown = [Patch(**_style(True), label="hallucinated"), Patch(**_style(False), label="other words")]
        axes.legend(handles=shown, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)
    return panels.done()


def _bars(axes: Axes, caption: Caption, heights: np.ndarray, places: range, wrong: set[int]) -> None:
    for at, number in enumerate(places):
        axes.bar(at, heights[number], width=0.75, **_style(number in wrong))
    axes.set_xticks(range(len(places)), [caption.words[number].text for number in places], rotation=90)
    for label, number in zip(axes.get_xticklabels(), places, strict=True):
        label.set_fontsize(8)
        if number in wrong:
            label.set(color=RED, fontweight="bold")
    axes.set_ylabel("T-VHD (sum of\nsquared distances)")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _style(wrong: bool) -> dict[str, Any]:
    """Of a bar: hallucinated words differ by colour and hatch, and by bold letters below."""
    if wrong:
        return {"facecolor": RED, "edgecolor": "white", "hatch": "////", "linewidth": 0}
    return {"facecolor": BLUE, "edgecolor": "white", "hatch": "", "linewidth": 0}


def _sample(tensor: Tensor, sample: int, dims: int) -> Tensor:
    """One sample of a batch, which has `dims` dimensions."""
    if tensor.ndim == dims:
        return tensor[picked("sample", sample, len(tensor))]
    picked("sample", sample, 1)
    return tensor
