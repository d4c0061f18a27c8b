"""What is said of a text-to-image model's word maps in several papers: their normalisation, smoothing and masks."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from ..hooks.latent_edits import TextMaps

Normalize: TypeAlias = Literal["ae", "words", "minmax", "none"]


def word_maps(maps: TextMaps, normalize: Normalize, smooth: bool = False) -> list[Tensor]:
    """The (C, h, w) maps of each image's concepts; a concept of several tokens has their mean.

    normalize: "ae" is Attend-and-Excite's softmax of 100 times the probs over the text without its first and last
    token; "words" the same over the prompt's own tokens; "minmax" maps each concept to [0, 1].
    smooth: Attend-and-Excite's 3x3 filter over the normalised maps, reflecting at the border.
    """
    found = []
    for probs, concepts, content in zip(maps.probs, maps.concepts, maps.content, strict=True):
        if normalize in ("ae", "words"):
            own = {index for few in concepts for index in few}
            kept = range(1, probs.shape[-1] - 1) if normalize == "ae" else sorted({*content, *own})
            kept = sorted({*kept, *own})  # an index that the user gave counts even at the edge
            shares = (100 * probs[..., kept]).softmax(-1)
            place = {index: number for number, index in enumerate(kept)}
            each = [shares[..., [place[index] for index in few]].mean(-1) for few in concepts]
        else:
            each = [probs[..., list(few)].mean(-1) for few in concepts]
        stacked = torch.stack(each)
        if normalize == "minmax":
            stacked = minmax(stacked)
        found.append(smoothed(stacked) if smooth else stacked)
    return found


def heat_of(maps: TextMaps, grid: tuple[int, int], mode: Literal["bilinear", "bicubic"]) -> list[Tensor]:
    """The (C, h, w) probs of each image's concepts, brought to another resolution; not below zero."""
    each = word_maps(maps, "none")
    if tuple(maps.probs.shape[1:3]) == grid:
        return each
    return [F.interpolate(own[None], grid, mode=mode)[0].clamp_min(0) for own in each]


def minmax(maps: Tensor) -> Tensor:
    """(..., h, w) to [0, 1]; a constant map to zero."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp_min(1e-12)


def smoothed(maps: Tensor) -> Tensor:
    """(C, h, w) filtered as in Attend-and-Excite: exp(-((x - mu) / (2 sigma))^2) with sigma 0.5, no true Gaussian."""
    line = torch.exp(-torch.arange(-1.0, 2.0, device=maps.device, dtype=maps.dtype).square())
    kernel = torch.outer(line, line)
    kernel = (kernel / kernel.sum())[None, None]
    return F.conv2d(F.pad(maps[:, None], (1, 1, 1, 1), mode="reflect"), kernel)[:, 0]


def binarized(maps: Tensor, threshold: float | Literal["otsu"]) -> Tensor:
    """(C, h, w) to 0 and 1: after min-max, above the threshold, or above Otsu's."""
    scaled = minmax(maps.detach())
    if threshold != "otsu":
        return (scaled > threshold).to(maps.dtype)
    return torch.stack([(each > otsu(each)).to(maps.dtype) for each in scaled])


def otsu(values: Tensor) -> float:
    """The threshold that parts the values so that the variance between the two classes is largest."""
    ordered = values.flatten().double().sort().values
    count = torch.arange(1, ordered.numel(), device=values.device)
    low = ordered.cumsum(0)[:-1]
    mean = low / count
    other = (ordered.sum() - low) / (ordered.numel() - count)
    between = count * (ordered.numel() - count) * (mean - other).square()
    best = int(between.argmax())
    return float((ordered[best] + ordered[best + 1]) / 2)


def check_masks(masks: Any, concepts: int, disjoint: bool = True) -> Tensor:
    """User masks as (C, H, W) of 0 and 1.

    Raises:
        ValueError: not one mask a concept, an empty mask, or two that overlap (where they must be disjoint).
    """
    given = torch.as_tensor(masks).float()
    if given.ndim != 3 or given.shape[0] != concepts:
        raise ValueError(
            f"masks of shape {tuple(given.shape)} for {concepts} concepts: give (concepts, height, width), any size"
        )
    binary = (given > 0.5).float()
    for index, mask in enumerate(binary):
        if not mask.any():
            raise ValueError(f"mask {index} is empty: give each concept at least one pixel above 0.5")
        for other in range(index if disjoint else 0):
            shared = int((mask * binary[other]).sum())
            if shared:
                raise ValueError(f"masks {other} and {index} overlap in {shared} pixels: make them disjoint")
    return binary


def fitted(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """(C, H, W) masks at another resolution: a cell belongs to a mask that covers half of it, or its best cell.

    Raises:
        ValueError: masks of another aspect ratio.
    """
    height, width = masks.shape[1:]
    if abs(height * grid[1] - width * grid[0]) > max(height, width):
        raise ValueError(
            f"masks of {height}x{width} do not have the aspect ratio of the image ({grid[0]}x{grid[1]})"
        )
    shares = F.adaptive_avg_pool2d(masks[None], grid)[0]
    best = shares == shares.amax((-2, -1), keepdim=True)
    return ((shares >= 0.5) | ((shares.amax((-2, -1), keepdim=True) < 0.5) & best)).float()
