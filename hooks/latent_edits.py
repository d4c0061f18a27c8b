"""The edits that an intervention may ask for on a diffusers pipeline: frozen statements, as in `edits`.

Notation: B images, H heads, Q image tokens in a grid (h, w), T text tokens, n denoising steps counted from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from .denoiser import AttentionSite, Grid

Concept: TypeAlias = str | tuple[int, ...]


@dataclass(frozen=True)
class TextMaps:
    """How the image attends to the text at one step, conditional rows only.

    Attributes:
        probs: (B, h, w, T), mean over the heads and the layers at this resolution; fp32.
        concepts: for each image, the token indices of each concept.
        content: for each image, the indices of the prompt's own tokens, without start, end and padding.
        step: denoising step from 0. steps: how many there are.
        layers: how many layers the mean is over.
    """

    probs: Tensor
    concepts: tuple[tuple[tuple[int, ...], ...], ...]
    content: tuple[tuple[int, ...], ...]
    step: int
    steps: int
    layers: int = 1


@dataclass(frozen=True)
class Guidance:
    """Move the latents down the gradient of a loss on the attention to the text, before each denoising step.

    `z' = z - step_size * d loss / d z` in fp32, once a step; where `refine` names the step, first as often as it
    takes to bring the loss under its threshold. Only the conditional rows run. The step then goes on from z'.

    Args:
        concepts: words or phrases of the prompt, or tuples of token indices.
        loss: maps and what `remember` kept of the step before (None at first) -> (B,) losses.
        step_size: (step, steps) -> factor of the gradient; 0 leaves the step alone.
        resolution: (h, w) of the maps; None is the grid whose side is nearest to 16.
        remember: maps of the step as it was denoised (z' included) -> what the next step's loss gets.
        refine: step -> the loss to reach by up to `refinements` further updates.
        refinements: most updates where `refine` asks for them.
        refine_size: as `step_size`, for those updates; None is `step_size`.
        overshoot: one more update after the threshold is met.
    """

    concepts: tuple[Concept, ...]
    loss: Callable[[TextMaps, Any], Tensor]
    step_size: Callable[[int, int], float]
    resolution: Grid | None = None
    remember: Callable[[TextMaps], Any] | None = None
    refine: Mapping[int, float] = field(default_factory=dict)
    refinements: int = 20
    refine_size: Callable[[int, int], float] | None = None
    overshoot: bool = False


@dataclass(frozen=True)
class AttentionCall:
    """One attention of the denoiser: query (B, H, Q, D), key and value (B, H, K, D), the mask or None.

    `rows` are the conditional rows of the batch, `grid` the (h, w) of the image tokens, `image` and `text` where
    image and text tokens lie among the queries and keys.
    """

    site: AttentionSite
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float | None
    rows: slice
    grid: Grid
    image: slice
    text: slice
    step: int
    steps: int
    attend: Callable[..., Tensor]


@dataclass(frozen=True)
class Attend:
    """Replace what chosen attention modules give: `call` to output (B, H, Q, D), or None to leave it alone.

    Args:
        sites: which modules; None is all.
        attend: `call.attend(query, key, value)` is the stock attention, for those that change its arguments only.
    """

    attend: Callable[[AttentionCall], Tensor | None]
    sites: Callable[[AttentionSite], bool] | None = None


@dataclass(frozen=True)
class Watch:
    """Show the maps of every step to `see`, as they are in the pipeline's own forward. Nothing is changed.

    Args:
        concepts: words or phrases of the prompt, or tuples of token indices.
        see: called once a step and resolution, without gradient.
        resolution: (h, w) of the maps; None is every resolution there is.
    """

    concepts: tuple[Concept, ...]
    see: Callable[[TextMaps], Any]
    resolution: Grid | None = None


LatentEdit: TypeAlias = Guidance | Attend | Watch
