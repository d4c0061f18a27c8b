"""From a map to point prompts, and from points to masks with SAM (VL-SAM, arXiv 2410.05963; see `vlsam`).

Weak activations are dropped, the largest connected area is positive, all else negative; the prompt is the
strongest place of the positive area and the weakest of the rest. SAM's mask goes back to its decoder as a prompt,
and the points are drawn once more from the map inside of the mask; non-maximum suppression keeps the best of all.

Ours, as the paper does not say: the threshold (the 0.7 quantile of the map), places that touch at a corner are not
connected, a map is resampled by the share of each place that the mask covers, masks are ranked by the IoU that SAM
predicts, and of two masks that overlap by more than 0.7 (IoU) one stays. Points lie in the middle of places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from ..hooks.errors import CannotEdit

if TYPE_CHECKING:
    from .vlsam import ObjectMap

QUANTILE = 0.7  # ours
OVERLAP = 0.7  # ours


@dataclass(frozen=True)
class Points:
    """Point prompts: (x, y) in 0..1 of the image that the model saw, and the positive area (h, w) bool."""

    positive: tuple[float, float]
    negative: tuple[float, float]
    area: Tensor


@dataclass(frozen=True)
class ObjectMask:
    """A mask (H, W) bool of the whole image, the IoU that SAM predicts for it, and the points that gave it."""

    word: str
    mask: Tensor
    score: float
    points: Points


def points(field: Tensor, quantile: float = QUANTILE, rest: Tensor | None = None) -> Points:
    """One positive and one negative point of a map.

    Args:
        field: (h, w).
        quantile: places above this quantile of the map are strong, from 0 to below 1.
        rest: (h, w), where the negative point is sought instead: the weakest place of it outside of the area.

    Raises:
        ValueError: a map that is constant or not finite, another shape, a quantile out of range.
    """
    if not 0 <= quantile < 1:
        raise ValueError(f"quantile is from 0 to below 1, got {quantile}")
    if field.ndim != 2 or (rest is not None and rest.shape != field.shape):
        shapes = [tuple(some.shape) for some in (field, rest) if some is not None]
        raise ValueError(f"a map is (h, w), and rest has its shape, got {shapes}")
    values = field.detach().double().cpu()
    if not bool(values.isfinite().all()) or float(values.max()) == float(values.min()):
        raise ValueError(
            f"a map of shape {tuple(field.shape)} that is constant or not finite has no strongest place: take a "
            "word that the model reads behind the image"
        )
    strong = values > values.quantile(quantile)
    labels, count = ndimage.label(strong.numpy())
    areas = [torch.from_numpy(labels == number) for number in range(1, count + 1)]
    if not areas:
        raise ValueError(f"no place of the map lies above its quantile {quantile}: take a smaller one")
    area = max(areas, key=lambda some: (int(some.sum()), float(values[some].max())))
    outside = values if rest is None else rest.detach().double().cpu()
    best = values.masked_fill(~area, -torch.inf).argmax()
    worst = outside.masked_fill(area, torch.inf).argmin()
    return Points(_middle(int(best), field), _middle(int(worst), field), area)


def _middle(place: int, field: Tensor) -> tuple[float, float]:
    height, width = field.shape
    return (place % width + 0.5) / width, (place // width + 0.5) / height


def seen_box(processor: Any, width: int, height: int) -> tuple[float, float, float, float]:
    """The part (left, top, right, bottom) of an image that the model sees, in the image's pixels.

    CLIP's processor cuts the middle out of an image that is not square; others show the whole image.
    """
    images = getattr(processor, "image_processor", processor)
    size = getattr(images, "size", None) or {}
    crop = getattr(images, "crop_size", None) or {}
    short = size.get("shortest_edge") if hasattr(size, "get") else getattr(size, "shortest_edge", None)
    if not getattr(images, "do_center_crop", False) or not short or not crop:
        return 0.0, 0.0, float(width), float(height)
    scale = min(width, height) / short
    wide, high = (min(side, crop[key] * scale) for side, key in ((width, "width"), (height, "height")))
    left, top = (width - wide) / 2, (height - high) / 2
    return left, top, left + wide, top + high


@torch.no_grad()
def masks(
    sam: nn.Module,
    sam_processor: Any,
    image: Any,
    objects: Sequence[ObjectMap],
    *,
    which: int = 0,
    box: tuple[float, float, float, float] | None = None,
    quantile: float = QUANTILE,
    refine: bool = True,
    overlap: float = OVERLAP,
) -> list[ObjectMask]:
    """Masks of the objects of one image, best first, after suppression over all words.

    Args:
        sam: a SamModel of transformers.
        sam_processor: its SamProcessor or image processor; None takes `image` as SAM's own pixels.
        image: what the processor takes (PIL, array); pixels (3, S, S) or (1, 3, S, S) without a processor.
        objects: of `object_maps`; those of other images of a batch must be left out.
        which: the map of each object that belongs to this image.
        box: (left, top, right, bottom) of the image that the maps cover, in its pixels, see `seen_box`; None is all
            of it. With it, crops of an image can be mapped by themselves and their masks pooled by `suppressed`.
        quantile: see `points`.
        refine: feed the mask back, and draw the points once more inside of it; False takes SAM's first mask.
        overlap: see `suppressed`.

    Raises:
        CannotEdit: `sam` is no SamModel.
        ValueError: a constant map, pixels of another size, a box outside of the image.
    """
    if not hasattr(sam, "prompt_encoder") or not hasattr(sam, "get_image_embeddings"):
        raise CannotEdit(f"masks needs a SamModel of transformers, got {type(sam).__name__}: load SAM")
    prompted = _Prompted.of(sam, sam_processor, image, box)
    found = []
    for item in objects:
        field = item.maps[which]
        first = points(field, quantile)
        mask, score, logits = prompted(first)
        if not refine:
            found.append(ObjectMask(item.word, mask, score, first))
            continue
        mask, score, _ = prompted(first, logits)
        found.append(ObjectMask(item.word, mask, score, first))
        inside = field * prompted.share(mask, field)
        if bool(mask.any()) and float(inside.max()) > float(inside.min()):
            again = points(inside, quantile, rest=field)
            _, _, logits = prompted(again)
            mask, score, _ = prompted(again, logits)
            found.append(ObjectMask(item.word, mask, score, again))
    return suppressed(found, overlap)


def suppressed(found: Sequence[ObjectMask], overlap: float = OVERLAP) -> list[ObjectMask]:
    """Non-maximum suppression: best first; a mask that overlaps a better one by more than `overlap` (IoU) goes.

    Empty masks go too. The words play no part, as in the paper an object may be named twice.

    Raises:
        ValueError: masks of several shapes.
    """
    shapes = {tuple(item.mask.shape) for item in found}
    if len(shapes) > 1:
        raise ValueError(f"masks of one image have one shape, got {sorted(shapes)}")
    kept: list[ObjectMask] = []
    for item in sorted(found, key=lambda some: -some.score):
        if bool(item.mask.any()) and all(_iou(item.mask, other.mask) <= overlap for other in kept):
            kept.append(item)
    return kept


def _iou(one: Tensor, other: Tensor) -> float:
    return float((one & other).sum() / (one | other).sum().clamp_min(1))


@dataclass(frozen=True)
class _Prompted:
    """SAM with an image it has read. Sizes are (height, width): `original`, and `inner` where it lies in SAM's own."""

    sam: Any
    seen: Tensor
    original: tuple[int, int]
    inner: tuple[int, int]
    side: int
    box: tuple[float, float, float, float]

    @classmethod
    def of(
        cls, sam: Any, processor: Any, image: Any, box: tuple[float, float, float, float] | None
    ) -> _Prompted:
        """Read an image."""
        side = int(sam.config.vision_config.image_size)
        weight = next(sam.parameters())
        if processor is None:
            pixels = image[None] if image.ndim == 3 else image
            original = inner = (side, side)
        else:
            made = getattr(processor, "image_processor", processor)(images=image, return_tensors="pt")
            pixels = made["pixel_values"]
            original, inner = (
                (int(made[key][0][0]), int(made[key][0][1]))
                for key in ("original_sizes", "reshaped_input_sizes")
            )
        if tuple(pixels.shape) != (1, 3, side, side):
            raise ValueError(
                f"this SAM reads one image of pixels (1, 3, {side}, {side}), got {tuple(pixels.shape)}: pass its own "
                "processor, or without one pixels of that size"
            )
        height, width = original
        box = (0.0, 0.0, float(width), float(height)) if box is None else box
        if not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
            raise ValueError(f"box {box} does not lie in an image of width {width} and height {height}")
        seen = sam.get_image_embeddings(pixels.to(weight))
        return cls(sam, seen, original, inner, side, box)

    def __call__(self, prompt: Points, logits: Tensor | None = None) -> tuple[Tensor, float, Tensor]:
        """Mask (H, W) bool, predicted IoU, and the mask's logits (1, 1, m, m), a prompt for the next call.

        Without such a prompt the best of SAM's three masks is taken, as points are ambiguous.
        """
        places = self.seen.new_tensor([self._place(prompt.positive), self._place(prompt.negative)])
        labels = torch.tensor([[[1, 0]]], device=self.seen.device)
        out = self.sam(
            image_embeddings=self.seen,
            input_points=places[None, None],
            input_labels=labels,
            input_masks=logits,
            multimask_output=logits is None,
        )
        best = int(out.iou_scores[0, 0].argmax())
        low = out.pred_masks[:, 0, best : best + 1]
        large = F.interpolate(low.float(), (self.side, self.side), mode="bilinear", align_corners=False)
        large = large[..., : self.inner[0], : self.inner[1]]
        mask = F.interpolate(large, self.original, mode="bilinear", align_corners=False)[0, 0] > 0
        return mask, float(out.iou_scores[0, 0, best]), low

    def _place(self, point: tuple[float, float]) -> tuple[float, float]:
        """(x, y) in SAM's pixels, counted from the middle of the first one, as it adds half a pixel itself."""
        left, top, right, bottom = self.box
        x = (left + point[0] * (right - left)) * self.inner[1] / self.original[1]
        y = (top + point[1] * (bottom - top)) * self.inner[0] / self.original[0]
        return x - 0.5, y - 0.5

    def share(self, mask: Tensor, field: Tensor) -> Tensor:
        """The share of each place (h, w) of a map that a mask covers."""
        left, top, right, bottom = (round(edge) for edge in self.box)
        part = mask[top : max(bottom, top + 1), left : max(right, left + 1)]
        return F.adaptive_avg_pool2d(part[None, None].to(field), (field.shape[0], field.shape[1]))[0, 0].to(
            field.device
        )
