"""Where subjects are in a picture: masks or boxes of the user, or what the attention to their words says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..hooks.denoiser import Grid
from ..hooks.latent_edits import TextMaps
from .word_maps import binarized, check_masks, fitted, heat_of, minmax


def check_places(given: Any, what: str, disjoint: bool) -> Tensor:
    """Masks (S, H, W) or boxes (S, 4) as a tensor.

    Boxes are left, top, right, bottom as shares of the width and height. `what` names them in messages.

    Raises:
        ValueError: another shape, none at all, an empty mask or box, or two that overlap where they must not.
    """
    places = torch.as_tensor(given).float()
    if places.ndim not in (2, 3) or not len(places) or (places.ndim == 2 and places.shape[1] != 4):
        raise ValueError(
            f"{what} has the shape {tuple(places.shape)}: give masks (subjects, height, width) or boxes (subjects, 4)"
        )
    if places.ndim == 3:
        try:
            return check_masks(places, len(places), disjoint=disjoint)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
    for index, (left, top, right, bottom) in enumerate(places.tolist()):
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(
                f"{what}: box {index} is {(left, top, right, bottom)}: give left < right and top < bottom from 0 to 1"
            )
        for other in range(index if disjoint else 0):
            low, high = (
                torch.maximum(places[index, :2], places[other, :2]),
                torch.minimum(places[index, 2:], places[other, 2:]),
            )
            if (low < high).all():
                raise ValueError(f"{what}: boxes {other} and {index} overlap: make them disjoint")
    return places


def places_at(places: Tensor, grid: Grid) -> Tensor:
    """(S, h, w) bool: the cells of each subject; at least one each.

    Raises:
        ValueError: masks of another aspect ratio.
    """
    if places.ndim == 3:
        return fitted(places, grid).bool()
    down = (torch.arange(grid[0]) + 0.5) / grid[0]
    across = (torch.arange(grid[1]) + 0.5) / grid[1]
    left, top, right, bottom = places.cpu()[:, :, None].unbind(1)
    rows, columns = (down >= top) & (down < bottom), (across >= left) & (across < right)
    # a box between the centres of cells has the cell that is nearest to its own centre
    rows = rows | (~rows.any(1, keepdim=True) & _nearest(down, (top + bottom) / 2))
    columns = columns | (~columns.any(1, keepdim=True) & _nearest(across, (left + right) / 2))
    return rows[:, :, None] & columns[:, None]


def _nearest(line: Tensor, at: Tensor) -> Tensor:
    return F.one_hot((line - at).abs().argmin(1), line.shape[0]).bool()


def masks_of(heat: Tensor) -> Tensor:
    """(C, h, w) heat to (C, h, w) bool masks: Otsu's threshold each, a shared cell to the concept hottest there.

    They are disjoint, but that a concept which is left without a cell has its hottest one all the same.
    """
    scaled = minmax(heat)
    best = F.one_hot(scaled.argmax(0), len(heat)).permute(2, 0, 1).bool()
    masks = binarized(heat, "otsu").bool() & best
    peaks = F.one_hot(heat.flatten(1).argmax(1), heat[0].numel()).bool().view_as(masks)
    return torch.where(masks.any((1, 2), keepdim=True), masks, peaks)


class Observed:
    """Masks from the attention to the concepts, as a run has shown it up to now; a `Watch` feeds it."""

    def __init__(self) -> None:
        self._heat: list[Tensor] = []
        self._last = 0
        self._masks: dict[Grid, list[Tensor]] = {}

    def see(self, maps: TextMaps) -> None:
        """Add one step's maps at one resolution, the finest first; those of a new run start anew."""
        if maps.step < self._last:
            self._heat = []
        shape = self._heat[0].shape[1:] if self._heat else maps.probs.shape[1:3]
        new = [each * maps.layers for each in heat_of(maps, (shape[0], shape[1]), "bilinear")]
        old = self._heat or [torch.zeros_like(each) for each in new]
        self._heat = [before + own for before, own in zip(old, new, strict=True)]
        self._last = maps.step
        self._masks.clear()

    def finest(self) -> list[Tensor]:
        """The (C, h, w) heat of each image, summed over steps and layers."""
        return self._heat

    def at(self, grid: Grid) -> list[Tensor]:
        """The (C, h, w) bool masks of each image."""
        if grid not in self._masks:
            finest = [masks_of(heat) for heat in self._heat]
            self._masks[grid] = [fitted(masks.float(), grid).bool() for masks in finest]
        return self._masks[grid]


def region_of(masks: Sequence[Tensor]) -> Tensor:
    """(B, N) the subject of each cell, -1 where there is none, the first of several."""
    rows = []
    for own in masks:
        flat = own.flatten(1)
        rows.append(torch.where(flat.any(0), flat.float().argmax(0), -1))
    return torch.stack(rows)
