"""AttenCraft's masks: which part of a picture is which word's, from the attention to the text and to the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..hooks.denoiser import Denoiser, Grid, denoiser_of, is_pipeline
from ..hooks.errors import CannotEdit
from ..hooks.latent_edits import Attend, AttentionCall, TextMaps, Watch
from ..kernels.maps import layer_map
from .noised import show_pictures
from .recipes import apply

FLAT = 1e-5  # a map that varies by a smaller share of its greatest value is constant, the rest is rounding


@dataclass(frozen=True)
class WordMasks:
    """Where C words are in B pictures, in cells (h, w) of the self-attention.

    Attributes:
        images: B pictures, as generated or as given.
        words: C words or phrases; of a batch with words of its own for each prompt, the first prompt's.
        maps: (B, C + 1, h, w) from 0 to 1, the background's map last.
        threshold: a cell belongs to a map that exceeds all others there by more than this.
    """

    images: Any
    words: tuple[Any, ...]
    maps: Tensor
    threshold: float

    @property
    def masks(self) -> Tensor:
        """(B, C, h, w) bool, disjoint. `masks[0]` is what isolation and other methods take, if none is empty."""
        return regions_of(self.maps, self.threshold)[:, :-1]

    @property
    def background(self) -> Tensor:
        """(B, h, w) bool: the cells of the background."""
        return regions_of(self.maps, self.threshold)[:, -1]

    @property
    def unassigned(self) -> Tensor:
        """(B, h, w) bool: cells that are no word's and not the background's."""
        return ~regions_of(self.maps, self.threshold).any(1)

    @property
    def missing(self) -> tuple[tuple[int, ...], ...]:
        """For each picture, which words (from 0) have no cell."""
        empty = ~self.masks.flatten(2).any(2)
        return tuple(tuple(own.nonzero()[:, 0].tolist()) for own in empty)


def word_masks(
    pipe: Any,
    prompt: str | list[str],
    words: Sequence[Any],
    image: Any = None,
    *,
    threshold: float = 0.1,
    power: int = 4,
    timesteps: tuple[int, int] = (0, 300),
    samples: int = 3,
    resolutions: tuple[Grid, Grid] | None = None,
    background: Any = (0,),
    **options: Any,
) -> WordMasks:
    """Find the cells of each word in a picture that is generated, or in a given one (AttenCraft, arXiv 2405.17965).

        found = regard.word_masks(pipe, "a dog and an apple", ["dog", "apple"])            # as it is generated
        found = regard.word_masks(pipe, "a dog and an apple", ["dog", "apple"], picture)   # in a Pillow picture
        regard.apply(pipe, "isolation", masks=found.masks[0])

    With S the attention of the image to itself, C_c that to word c (means over heads, layers at one resolution, and
    steps), `M_c = minmax(minmax(S)^4 @ minmax(C_c^2))`. A cell is c's where M_c exceeds every other map by more than
    0.1, else nobody's. The background is one more map, of the start token. Nothing is changed: pictures are as they
    would be, and attention stays SDPA.

    Reference: https://github.com/junjie-shentu/AttenCraft/blob/5c5a4fdb504ccfaa88622414175e71309525e194/train.py (no
    licence). There masks are made while two concepts are trained; here of any pipeline. The differences:

    - any number of words; the release has two, found between the token ids of "of" and "and".
    - the release draws one timestep below 300. Here a given picture is noised `samples` times, evenly over `timesteps`
      (50, 150 and 250), and of a generated one all steps in that range count (of none, the nearest); attention is
      averaged. A given picture's latents are the mean of the VAE's distribution, not a draw.
    - C_c is brought to S's resolution as there (bicubic), but not below zero: the release squares negative overshoot.
    - a constant map is zero, not NaN.
    - S^4 is not formed, four products with C_c^2 are; its own min-max falls out of M's and is left out.
    - the release names regions by `argmax_c sum(M_c in the region)`. In a region that is not empty this is the region's
      own word, by its definition. So what it raises as a clash is an empty region, which here is in `missing`.
    - 16x16 and 32x32 are a quarter and a half of the latents' side, and so here at every size, but 16x16 at least.

    On the miniature this works worse than leaving S out: its words are not looked at where their objects are, and S^4
    blurs what there is. IoU with the drawn objects over 40 composed pictures of two, in percent
    (`benchmarks/word_masks.py`): 10.5 (95 % interval 7.8 to 13.5), with 32 of 80 objects not found; 15.5 for `power=0`
    (ours less that: -5.0, -7.9 to -2.1); 12.8 for Otsu's threshold on the same attention to the words (-2.2, -5.0 to
    0.6); 8.8 for the whole picture. It says nothing of Stable Diffusion at 32x32, which was not run.

    Args:
        pipe: a diffusers pipeline with a U-Net (Stable Diffusion 1, 2, XL); edits that are on it stay on.
        prompt: one or several prompts. For a given picture, what it shows.
        words: words or phrases of the prompt, or tuples of token indices; or a list of lists, one a prompt, of equal
            lengths. A word of several tokens has the maximum of their maps, as in the release.
        image: a Pillow picture, or a list of them of one size, for one prompt or one each. None generates pictures.
        threshold: by how much a map must exceed all others, from 0 to below 1.
        power: of S; 0 leaves the attention to the text as it is.
        timesteps: the range [first, last) of the noise, of the training's 1000, at which attention is read.
        samples: how many timesteps of it a given picture is noised to, all in one batch.
        resolutions: (h, w) of the attention to the text, and to the image.
        background: the background's word or token indices.
        options: of the pipeline's call. For a given picture: generator (of the noise), height and width (default: the
            picture's shape at the pipeline's usual area).

    Raises:
        CannotEdit: no diffusers pipeline with a U-Net; no attention at these resolutions, or an edit that took its
            place; a U-Net or scheduler that cannot noise a picture.
        NoObjectWords: a word is not in the prompt.
        ValueError: an option out of range; pictures of several sizes, or not as many as prompts.
    """
    denoiser = _denoiser(pipe)
    each = _words(words)
    _check(pipe, threshold, power, timesteps, samples)

    def wanted(step: int) -> bool:
        return image is not None or _within(timesteps, pipe.scheduler.timesteps.tolist(), step)

    reader = _Reader(denoiser, wanted, resolutions)
    concepts: list[Any] = [[*own, background] for own in each]
    watch = Watch(tuple(concepts), reader.see)
    with apply(pipe, watch, Attend(reader.attend, lambda site: site.kind == "self")):
        handle = denoiser.module.register_forward_pre_hook(reader.begin, with_kwargs=True)
        try:
            if image is None:
                images = pipe(prompt, **options).images
            else:
                images = list(image) if isinstance(image, (list, tuple)) else [image]
                width = (timesteps[1] - timesteps[0]) / samples
                times = [int(timesteps[0] + (place + 0.5) * width) for place in range(samples)]
                show_pictures(pipe, prompt, images, times, **options)
        finally:
            handle.remove()
    to_image, to_text = reader.means(1 if image is None else samples)
    return WordMasks(images, tuple(each[0]), refined(to_image, to_text, reader.grids[1], power), threshold)


# ---- the equations ------------------------------------------------------------------------------


def refined(to_image: Tensor, to_text: Tensor, grid: Grid, power: int = 4) -> Tensor:
    """The maps M: the attention to each word, passed along the attention of the image to itself.

    Args:
        to_image: (B, N, N) probs, rows are queries.
        to_text: (B, C, h', w') probs.
        grid: (h, w) of the N cells.
        power: of `to_image`.

    Returns:
        (B, C, h, w) from 0 to 1; a constant map is zero.
    """
    if tuple(to_text.shape[2:]) != grid:
        to_text = F.interpolate(to_text, grid, mode="bicubic").clamp_min(0)
    flow, affinity = _unit(to_text.square()).flatten(2).mT, _unit(to_image)
    for _ in range(power):
        flow = affinity @ flow
    return _unit(flow.mT.unflatten(2, grid))


def regions_of(maps: Tensor, threshold: float) -> Tensor:
    """(B, C, h, w) bool: where each map exceeds all others by more than `threshold`. Regions are disjoint."""
    best = maps.topk(2, 1)
    clear = best.values[:, :1] - best.values[:, 1:] > threshold
    return torch.zeros_like(maps, dtype=torch.bool).scatter_(1, best.indices[:, :1], clear)


def _unit(maps: Tensor) -> Tensor:
    """(..., h, w) to [0, 1] at any scale; a constant map to zero."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    flat = high - low <= FLAT * high
    return ((maps - low) / (high - low).masked_fill(flat, 1)).masked_fill(flat, 0)


# ---- reading ------------------------------------------------------------------------------------


class _Reader:
    """Sums the attention of the forwards whose step is wanted, at two resolutions."""

    def __init__(
        self, denoiser: Denoiser, wanted: Callable[[int], bool], given: tuple[Grid, Grid] | None
    ) -> None:
        self._denoiser, self._wanted, self._given = denoiser, wanted, given
        self._sums: list[Tensor] = []
        self._count = 0

    def begin(self, module: Any, args: Any, kwargs: Any) -> None:
        """A forward begins: choose the grids, and forget what a forward left that no maps came of."""
        inputs = self._denoiser.bind(args, kwargs)
        levels = self._denoiser.text_grids(inputs)
        if self._given is None:
            area = inputs[self._denoiser.latent].shape[-2:].numel()
            goals = [max(area / share**2, 256) for share in (4, 2)]
            near = [min(levels, key=lambda grid: abs(log(grid[0] * grid[1] / goal))) for goal in goals]
            self.grids: tuple[Grid, Grid] = (near[0], near[1])
        else:
            self.grids = self._given
            if wrong := [grid for grid in self._given if tuple(grid) not in levels]:
                raise CannotEdit(
                    f"no attention at resolution {wrong[0]}: there is {', '.join(map(str, levels))} at this image size"
                )
        self._layers: list[Tensor] = []
        self._reached = False

    def attend(self, call: AttentionCall) -> None:
        """Keep the mean over the heads; the attention stays what it is."""
        if call.grid != self.grids[1]:
            return
        self._reached = True
        if self._wanted(call.step):
            rows, mask = call.rows, call.mask
            mask = mask[rows] if mask is not None and len(mask) > 1 else mask
            self._layers.append(
                layer_map(call.query[rows], call.key[rows], scale=call.scale, causal=False, mask=mask)
            )

    def see(self, maps: TextMaps) -> None:
        """Add a forward, now that it is done."""
        if tuple(maps.probs.shape[1:3]) != self.grids[0]:
            return
        if not self._reached:
            raise CannotEdit(
                f"no attention of the image to itself was read at {self.grids[1]}: an edit on the pipeline took its "
                "place, or the denoiser has none; take that edit off, or give other resolutions"
            )
        if not self._wanted(maps.step):
            return
        each = zip(maps.probs, maps.concepts, strict=True)
        text = [torch.stack([probs[..., list(few)].amax(-1) for few in concepts]) for probs, concepts in each]
        new = [torch.stack(self._layers).mean(0), torch.stack(text)]
        self._sums = [old + own for old, own in zip(self._sums, new, strict=True)] if self._sums else new
        self._count += 1

    def means(self, group: int) -> tuple[Tensor, Tensor]:
        """(B, N, N) and (B, C + 1, h, w): means over the forwards, and over `group` rows for each picture."""
        if not self._sums:
            raise CannotEdit("no attention was read: the pipeline left out every step that was wanted")
        own, text = (sums.unflatten(0, (-1, group)).mean(1) / self._count for sums in self._sums)
        return own, text


def _within(timesteps: tuple[int, int], all_steps: list[float], step: int) -> bool:
    """Whether a step's timestep is in the range; where no step's is, whether it is the nearest step."""
    low, high = timesteps
    inside = [place for place, time in enumerate(all_steps) if low <= time < high]
    away = [abs(time - (low + high) / 2) for time in all_steps]
    return step in (inside or [away.index(min(away))])


# ---- what may be asked --------------------------------------------------------------------------


def _denoiser(pipe: Any) -> Denoiser:
    if not is_pipeline(pipe):
        raise CannotEdit(f"word_masks needs a diffusers pipeline, not {type(pipe).__name__}")
    denoiser = denoiser_of(pipe)
    if denoiser.family != "unet":
        raise CannotEdit(
            f"word_masks reads the self- and cross-attention of a U-Net; a {type(denoiser.module).__name__} has "
            "both in one softmax, and no start token for the background: use word_heat, or rehearse for masks"
        )
    return denoiser


def _words(words: Sequence[Any]) -> list[list[Any]]:
    """The words of each prompt, or one list for all."""
    each = [list(own) for own in words] if any(isinstance(item, list) for item in words) else [list(words)]
    if isinstance(words, str) or not each[0] or len({len(own) for own in each}) > 1:
        raise ValueError(
            f"words is {words!r}: give a list, as in ['cat', 'dog'], or lists of equal lengths, one a prompt"
        )
    return each


def _check(pipe: Any, threshold: float, power: int, timesteps: tuple[int, int], samples: int) -> None:
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold is {threshold}: give 0 to below 1")
    most = pipe.scheduler.config.get("num_train_timesteps", 1000)
    if not 0 <= timesteps[0] < timesteps[1] <= most:
        raise ValueError(f"timesteps is {timesteps}: give a range (first, last) from 0 to {most}")
    if power < 0 or samples < 1:
        raise ValueError(f"power is {power} and samples {samples}: give at least 0 and 1")
