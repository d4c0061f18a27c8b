"""A model's `pixel_values` read as images in 0..1, and parts of them made black.

Three layouts are known: (N, 3, H, W), one image or tile each; the patches of Qwen-VL models, (patches, C * T * P * P)
with `image_grid_thw`; (N, T, 3, h, w) of the tiled LLaVAs with `image_sizes`, whose first tile is the whole image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import CannotEdit


@dataclass(frozen=True)
class PixelFormat:
    """How a processor makes pixels: `mean` and `std` of the channels, and the sizes that its layout needs.

    `patch`, `temporal` and `merge` are those of Qwen-VL patches, `pinpoints` the (height, width) that a tiled
    LLaVA chooses from.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch: int = 14
    temporal: int = 2
    merge: int = 2
    pinpoints: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, processor: Any) -> PixelFormat:
        """Taken from a processor, or from its image processor.

        Raises:
            CannotEdit: it does not tell mean and std.
        """
        images = getattr(processor, "image_processor", processor)
        mean, std = getattr(images, "image_mean", None), getattr(images, "image_std", None)
        if mean is None or std is None or any(s == 0 for s in std):
            raise CannotEdit(
                f"{type(images).__name__} has image_mean={mean}, image_std={std}, so pixel_values cannot be read "
                "back as images: pass the processor of the model"
            )
        if getattr(images, "do_normalize", True) is False:
            mean, std = (0.0,) * len(mean), (1.0,) * len(std)
        patch = getattr(images, "patch_size", None)
        return cls(
            tuple(mean),
            tuple(std),
            patch if isinstance(patch, int) else 14,
            getattr(images, "temporal_patch_size", None) or 2,
            getattr(images, "merge_size", None) or 2,
            tuple((int(h), int(w)) for h, w in getattr(images, "image_grid_pinpoints", None) or ()),
        )

    def _channels(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.tensor(self.mean, dtype=like.dtype, device=like.device)[:, None, None]
        std = torch.tensor(self.std, dtype=like.dtype, device=like.device)[:, None, None]
        return mean, std

    def images(self, inputs: dict[str, Any]) -> list[Tensor]:
        """Each image as (3, H, W) fp32 in 0..1; of a tiled image the whole one, of a Qwen-VL image one frame.

        Raises:
            CannotEdit: no layout that is known here.
        """
        found = _whole_images(inputs, self)
        if not found:
            return []
        mean, std = self._channels(found[0].float())
        return [(image.float() * std + mean).clamp(0, 1) for image in found]

    def blackened(self, inputs: dict[str, Any], keeps: Sequence[Tensor]) -> Tensor:
        """`pixel_values` with black outside of `keeps`, one (H, W) bool for each of `images(inputs)`."""
        pixels: Tensor = inputs["pixel_values"]
        sizes = [tuple(image.shape[1:]) for image in _whole_images(inputs, self)]
        if [tuple(keep.shape) for keep in keeps] != sizes:
            raise ValueError(
                f"one mask for each image: images of {sizes}, masks of {[tuple(k.shape) for k in keeps]}"
            )
        mean, std = self._channels(pixels)
        black = -mean / std
        masks = [keep.to(pixels.device) for keep in keeps]
        if pixels.ndim == 4:
            return torch.where(torch.stack(masks)[:, None], pixels, black)
        if pixels.ndim == 2:
            parts = unfold_patches(pixels, inputs["image_grid_thw"], self)
            dark = [torch.where(m, part, black) for m, part in zip(masks, parts, strict=True)]
            return fold_patches(dark, self)
        out = pixels.clone()
        for i, keep in enumerate(masks):
            tiles = tile_masks(keep, inputs["image_sizes"][i].tolist(), self)
            if len(tiles) > pixels.shape[1]:
                raise CannotEdit(
                    f"an image of {inputs['image_sizes'][i].tolist()} has {len(tiles)} tiles by the pinpoints "
                    f"{self.pinpoints}, its pixel_values {tuple(pixels.shape)}: pass the model's own processor"
                )
            out[i, : len(tiles)] = torch.where(tiles[:, None], pixels[i, : len(tiles)], black)
        return out


def _whole_images(inputs: dict[str, Any], form: PixelFormat) -> list[Tensor]:
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, Tensor):
        raise CannotEdit(
            "the model got no pixel_values, so there is no image to change: pass the images of the prompt"
        )
    if pixels.ndim == 4 and pixels.shape[1] == len(form.mean):
        return list(pixels)
    if pixels.ndim == 2 and isinstance(inputs.get("image_grid_thw"), Tensor):
        return [frames[0] for frames in unfold_patches(pixels, inputs["image_grid_thw"], form)]
    if pixels.ndim == 5 and isinstance(inputs.get("image_sizes"), Tensor) and form.pinpoints:
        return list(pixels[:, 0])
    raise CannotEdit(
        f"pixel_values of shape {tuple(pixels.shape)} cannot be read as images here. What works: (N, 3, H, W); "
        "(patches, C) with image_grid_thw (Qwen-VL); (N, T, 3, h, w) with image_sizes and a processor that has "
        "image_grid_pinpoints (LLaVA-NeXT, LLaVA-OneVision)"
    )


def unfold_patches(pixels: Tensor, grid: Tensor, form: PixelFormat) -> list[Tensor]:
    """Qwen-VL patches as frames (T, 3, H, W), a list over images. `fold_patches` is the exact inverse."""
    side, merge, frames = form.patch, form.merge, form.temporal
    grids: list[list[int]] = grid.tolist()
    width = len(form.mean) * frames * side * side
    counts = [t * h * w for t, h, w in grids]
    odd = [g for g in grids if g[1] % merge or g[2] % merge]
    if pixels.shape[1] != width or sum(counts) != len(pixels) or odd:
        raise CannotEdit(
            f"pixel_values {tuple(pixels.shape)} with image_grid_thw {grids} are not patches of {side} x {side}, "
            f"{frames} frames, merged {merge} x {merge}: pass the processor that made them"
        )
    found: list[Tensor] = []
    for part, (t, h, w) in zip(pixels.split(counts), grids, strict=True):
        blocks = part.view(t, h // merge, w // merge, merge, merge, -1, frames, side, side)
        ordered = blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
        found.append(ordered.reshape(t * frames, -1, h * side, w * side))
    return found


def fold_patches(images: Sequence[Tensor], form: PixelFormat) -> Tensor:
    """Frames (T, 3, H, W) of each image as the patches that Qwen-VL models take."""
    side, merge, frames = form.patch, form.merge, form.temporal
    parts: list[Tensor] = []
    for image in images:
        t, c, h, w = image.shape
        step = merge * side
        blocks = image.view(t // frames, frames, c, h // step, merge, side, w // step, merge, side)
        parts.append(blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, c * frames * side * side))
    return torch.cat(parts)


def tile_masks(keep: Tensor, size: Sequence[int], form: PixelFormat) -> Tensor:
    """The mask (h, w) of a whole image on all of its tiles, (1 + tiles, h, w); `size` is the image's own (H, W).

    The processor scales the image into the best of its pinpoints, pads it around, and cuts tiles row by row.
    """
    from transformers.image_processing_utils import select_best_resolution

    height, width = select_best_resolution(tuple(size), list(form.pinpoints))
    scale_h, scale_w = height / size[0], width / size[1]
    if scale_w < scale_h:
        new = (min(-int(-size[0] * scale_w // 1), height), width)
    else:
        new = (height, min(-int(-size[1] * scale_h // 1), width))
    whole = F.interpolate(keep[None, None].float(), new, mode="nearest-exact")[0, 0] > 0
    top, left = (height - new[0]) // 2, (width - new[1]) // 2
    padded = F.pad(whole, (left, width - new[1] - left, top, height - new[0] - top), value=True)
    h, w = keep.shape
    tiles = padded.unfold(0, h, h).unfold(1, w, w).reshape(-1, h, w)
    return torch.cat([keep[None], tiles])
