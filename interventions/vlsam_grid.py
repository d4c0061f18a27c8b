"""Which place of which image each image token of a prompt stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..hooks.anatomy import Anatomy
from ..hooks.errors import CannotEdit, NoImageTokens


@dataclass(frozen=True)
class Patch:
    """One image of a prompt: the positions of its tokens (h * w,), row by row, and (h, w).

    Of an image in tiles these are the tokens of the first tile, the whole image.
    """

    tokens: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class _Size:
    """An image has `tokens` tokens, of which the first h * w are a grid."""

    tokens: int
    grid: tuple[int, int]


def image_patches(
    model: nn.Module, parts: Anatomy, inputs: Mapping[str, Any], grid: tuple[int, int] | None = None
) -> list[list[Patch]]:
    """The images of each sample, in their order.

    Tiles that a model takes as images of their own (InternVL, Idefics) are images here too.

    Args:
        model: the transformers model.
        parts: its anatomy.
        inputs: what the processor made.
        grid: (h, w) of every image where it cannot be found out.

    Raises:
        NoImageTokens: no prompt has an image token.
        CannotEdit: the tokens are no grid, or their number does not fit the images.
    """
    name = type(model).__name__
    config: Any = model.config
    resampler = next((key for key in ("qformer_config", "perceiver_config") if hasattr(config, key)), None)
    if resampler or parts.cross_layers or parts.image_token is None:
        reason = "reads images by cross-attention" if parts.cross_layers else f"has a {resampler}"
        raise CannotEdit(
            f"{name} {reason if resampler or parts.cross_layers else 'has no image_token_id'}, so its image tokens "
            "are not places of the image: take a model whose image tokens are patches, such as LLaVA or Qwen2-VL"
        )
    image = inputs["input_ids"] == parts.image_token
    if not bool(image.any()):
        raise NoImageTokens(
            f"maps need an image, but none of the {len(image)} prompts (length {image.shape[1]}) holds the image "
            f"token {parts.image_token}: put the processor's image token into the text and pass the image"
        )
    sizes = _sizes(config, inputs, image, grid)
    found: list[list[Patch]] = []
    for sample, row in enumerate(image):
        places, images = row.nonzero()[:, 0], []
        while len(places) and sizes and sizes[0].tokens <= len(places):
            size = sizes.pop(0)
            images.append(Patch(places[: math.prod(size.grid)], size.grid))
            places = places[size.tokens :]
        if len(places):
            raise _unfit(f"{len(places)} image tokens of sample {sample} belong to no image")
        found.append(images)
    if sizes:
        raise _unfit(f"{len(sizes)} images have no tokens in the prompts")
    return found


def _sizes(
    config: Any, inputs: Mapping[str, Any], image: Tensor, grid: tuple[int, int] | None
) -> list[_Size]:
    """The images of the batch, in the order of their tokens."""
    total = int(image.sum())
    if grid is not None:
        if min(grid) < 1 or total % math.prod(grid):
            raise _unfit(f"{total} image tokens are no images of grid {grid}")
        return [_Size(math.prod(grid), grid)] * (total // math.prod(grid))
    pixels, vision = inputs.get("pixel_values"), getattr(config, "vision_config", None)
    if "image_grid_thw" in inputs:
        merge = int(getattr(vision, "spatial_merge_size", 1))
        shapes = [(t * h // merge, w // merge) for t, h, w in inputs["image_grid_thw"].tolist()]
        return [_Size(math.prod(shape), shape) for shape in shapes]
    if isinstance(pixels, Tensor) and pixels.ndim == 5 and "image_sizes" in inputs:
        return _first_tiles(config, vision, image, len(pixels))
    if "image_sizes" in inputs:
        raise CannotEdit(
            "images of several sizes without a layout that is known here: pass grid=(h, w) of the image tokens, one "
            "sample at a time"
        )
    runs = _runs(image)
    count = len(runs)
    if isinstance(pixels, Tensor) and pixels.ndim in (4, 5):
        flat = pixels.flatten(0, pixels.ndim - 4)
        # Idefics fills a sample that has fewer images with images of zeros
        count = len(flat) if pixels.ndim == 4 else int(flat.flatten(1).ne(0).any(1).sum())
    if not count or total % count:
        raise _unfit(f"{total} image tokens do not share out among {count} images")
    return [_Size(total // count, _square(total // count))] * count


def _first_tiles(config: Any, vision: Any, image: Tensor, count: int) -> list[_Size]:
    """Images in tiles: as many tokens as stand together, of which the first tile is the whole image."""
    side = int(vision.image_size) // int(vision.patch_size)
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    if strategy == "full" and "clip" in str(vision.model_type) and "siglip" not in str(vision.model_type):
        raise CannotEdit(
            "with vision_feature_select_strategy='full' a tile has a CLS token, which is no place: use 'default'"
        )
    runs = _runs(image)
    if len(runs) != count:
        raise _unfit(
            f"{count} images in tiles, but their tokens stand in {len(runs)} groups: put text between two images"
        )
    return [_Size(run, (side, side)) for run in runs]


def _runs(image: Tensor) -> list[int]:
    """Lengths of the groups of neighbouring image tokens, sample by sample."""
    lengths: list[int] = []
    for row in image:
        places = row.nonzero()[:, 0].tolist()
        for at, place in enumerate(places):
            if at and place == places[at - 1] + 1:
                lengths[-1] += 1
            else:
                lengths.append(1)
    return lengths


def _square(tokens: int) -> tuple[int, int]:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise CannotEdit(
            f"an image has {tokens} tokens, which is no square: pass grid=(h, w) if they are a grid, row by row"
        )
    return side, side


def _unfit(what: str) -> CannotEdit:
    return CannotEdit(f"{what}: pass the inputs as the processor made them, or the right grid=(h, w)")
