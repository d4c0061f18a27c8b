"""Heads of vision towers: how much each matters, how far it looks, which patterns there are.

Li et al., "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt", TVCG 2023, arXiv 2303.13731,
asks three questions of each head: importance by pruning it, attention between patches by their spatial distance, and
attention patterns. There is no public code. Only the abstract and the caption of the overview were read for this file,
so the formulas here are not the paper's. Differences that are known: no autoencoder is trained to find patterns, heads
are clustered by their attention over relative offsets; one head is pruned at a time, never a part of one.

Mean attention distance is that of Dosovitskiy et al., arXiv 2010.11929, appendix D.7, as its author explains it in
https://github.com/google-research/vision_transformer/issues/162 and Raghu et al., arXiv 2108.08810, use it: Euclidean
distance on the grid of patches, weighted by the probs, the mean over queries and images.

CLS and register tokens have no place. Their rows and columns are left out and the probs of the others divided by
their sum, in every figure here; `outside` tells how much that left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..hooks.anatomy import base_of
from ..hooks.errors import CannotEdit, OutOfRange
from ..hooks.tower import find_tower, has_cls, heads_of, output_projection, patch_grid, readable_layers
from .tower_patterns import HeadClusters, OffsetReader, cluster_heads, hop_masses, mean_distance

Measure = Callable[[Any, slice], Tensor]


@dataclass(frozen=True)
class TowerHeads:
    """L layers with H heads each over h x w patches, means over images; fp32 (fp64 of fp64), on the CPU.

    Attributes:
        importance: (L, H) what pruning a head changes, see `tower_heads`; None where that was not asked for.
        offsets: (L, H, 2h - 1, 2w - 1) probs by where the key is from the query; place (h - 1 + dy, w - 1 + dx) is dy
            rows below and dx columns right. Each map sums to 1. There are fewer pairs of patches far apart: even
            attention gives a pyramid, not a plane.
        outside: (L, H) probs that patches put on CLS and register tokens, which all else leaves out.
        grid: (h, w).
        patch: height and width of a patch in pixels of the tower's input.
    """

    importance: Tensor | None
    offsets: Tensor
    outside: Tensor
    grid: tuple[int, int]
    patch: tuple[int, int]

    @property
    def distance(self) -> Tensor:
        """Mean attention distance in patches, (L, H)."""
        return mean_distance(self.offsets)

    @property
    def pixel_distance(self) -> Tensor:
        """Mean attention distance in pixels of the tower's input, (L, H)."""
        return mean_distance(self.offsets, self.patch)

    @property
    def hops(self) -> Tensor:
        """Probs by hop, (L, H, K): the patch itself, its 8 neighbours, the 16 around them ...; K = max(h, w)."""
        return hop_masses(self.offsets)

    def clusters(self, count: int = 6) -> HeadClusters:
        """Kinds of attention among the heads, from the nearest to the farthest; the same at every call.

        Args:
            count: how many kinds, k.

        Raises:
            ValueError: `count` is not from 1 to L H.
        """
        return cluster_heads(self.offsets, count)


@torch.no_grad()
def tower_heads(
    model: nn.Module,
    pixel_values: Tensor,
    *,
    importance: bool = True,
    measure: Measure | None = None,
    batch: int = 8,
) -> TowerHeads:
    """Read every head of a vision tower, and prune each once to see what changes.

        heads = regard.tower_heads(model, processor(images=images, return_tensors="pt").pixel_values)
        heads.importance, heads.distance, heads.clusters(5).labels  # each (L, H)

        def right(output, rows):  # the probability of the true class
            return output.logits.softmax(-1).gather(1, truth[rows, None])[:, 0]
        heads = regard.tower_heads(classifier, pixels, measure=right)

    Probs are made from the queries and keys that the tower's own projections give, layer by layer, a few heads at a
    time; the tower goes on with its own attention. That they explain the output of each layer's heads is checked on the
    first image, so towers that do more to queries and keys (rotary positions, masks, windows) are refused.
    Importance costs L H forwards for each batch. What is compared:

    - A classifier: the drop in the probability of the class that the unpruned model finds most probable.
    - CLIP, SigLIP, ViT, DINOv2: 1 - cosine of the image's embedding or pooled output, else of the last CLS state, else
      of the mean over the patches.
    - The tower in a vision-language model: 1 - cosine of each token that the model reads from its tower, mean over
      tokens. Heads behind the layer that it reads change nothing, and have 0.

    Args:
        model: a transformers vision model, a model of images and text with a tower, or a wrapper of one; in eval mode.
        pixel_values: (N, C, height, width) as the processor makes them; (N, T, C, height, width) of models with crops
            or several images: each crop counts as an image, and crops of zeros (padding) are left out.
        importance: False reads patterns only, in one forward.
        measure: a function of the model's output (of its tower's, in a vision-language model) for the images `rows` and
            of that slice, giving (n,) values. Importance is then the mean drop of the value.
        batch: images that are run together.

    Raises:
        CannotEdit: no vision tower, or one whose attention cannot be read.
        ValueError: pixel_values of another shape; a measure that gives anything but (n,) values; batch below 1.
    """
    model = base_of(model)
    tower, layers = _tower_of(model)
    pixels = _images(tower, pixel_values)
    if batch < 1:
        raise ValueError(f"batch counts the images that are run together, at least 1, got {batch}")
    grid, patch = patch_grid(tower, pixels)
    reader, run = OffsetReader(tower, layers, grid), _forward(model, tower)
    total = torch.zeros_like(reader.outside)
    for start in range(0, len(pixels), batch):
        rows = slice(start, min(start + batch, len(pixels)))
        with _hooks(reader.attach):
            output = run(pixels[rows])
        if importance:
            read, change = _comparison(model, tower, output, measure, rows)
            plain = read(output)
            for layer, head in _all_heads(layers):
                with _hooks(partial(_prune, layers[layer], (head,))):
                    total[layer, head] += change(plain, read(run(pixels[rows]))).sum().to(total)
    offsets, outside, total = (sums / len(pixels) for sums in (reader.offsets, reader.outside, total))
    return TowerHeads(total if importance else None, offsets, outside, grid, patch)


@contextmanager
def without_heads(model: nn.Module, heads: Iterable[tuple[int, int]]) -> Iterator[None]:
    """Prune heads of the vision tower while the block lasts: their outputs are zero before the output projection.

        with regard.without_heads(model, [(11, 3), (11, 7)]):
            model.generate(**inputs)

    This equals columns of zeros in the projection's weight; no weight is touched.

    Args:
        model: any that `tower_heads` reads.
        heads: pairs of layer and head, each from 0.

    Raises:
        CannotEdit: no vision tower, or one whose heads cannot be told apart.
        OutOfRange: the tower has no such layer or head.
    """
    _, layers = _tower_of(base_of(model))
    known, chosen = set(_all_heads(layers)), set(heads)
    if not chosen <= known:
        raise OutOfRange(
            f"no heads {sorted(chosen - known)} in the tower: it has layers 0 to {len(layers) - 1} "
            f"with heads 0 to {heads_of(layers[0]) - 1}"
        )

    def attach() -> Iterator[Any]:
        for layer in {layer for layer, _ in chosen}:
            yield from _prune(layers[layer], [head for at, head in chosen if at == layer])

    with _hooks(attach):
        yield


# ------------------------------------------------------------------------------------------ the model's parts


def _tower_of(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """The tower and its attention modules; a vision model is its own tower."""
    try:
        path, tower = find_tower(model)
    except CannotEdit:
        if not _takes(model, "pixel_values"):
            raise
        inner = getattr(model, "base_model", model)
        path, tower = type(model).__name__, inner if _takes(inner, "pixel_values") else model
    if not _takes(tower, "pixel_values"):
        raise CannotEdit(
            f"{path} ({type(tower).__name__}) takes packed patches of images of any size, not pixel_values (N, C, "
            "height, width): its patches are on no fixed grid"
        )
    return tower, readable_layers(path, tower)


def _takes(module: nn.Module, name: str) -> bool:
    return name in inspect.signature(module.forward).parameters


def _all_heads(layers: list[nn.Module]) -> list[tuple[int, int]]:
    return [(layer, head) for layer, attention in enumerate(layers) for head in range(heads_of(attention))]


def _images(tower: Any, pixel_values: Tensor) -> Tensor:
    """(N, C, height, width), of the tower's dtype and on its device."""
    channels = getattr(tower.config, "num_channels", 3)
    if not isinstance(pixel_values, Tensor):
        raise ValueError(
            f"pixel_values must be a tensor (N, {channels}, height, width), got {type(pixel_values).__name__}: "
            'call the processor with return_tensors="pt"'
        )
    shape = tuple(pixel_values.shape)
    if len(shape) == 5:
        pixel_values = pixel_values.flatten(0, 1)
        pixel_values = pixel_values[(pixel_values != 0).flatten(1).any(1)]
    if pixel_values.ndim != 4 or shape[-3] != channels or not len(pixel_values):
        raise ValueError(
            f"pixel_values must be (N, {channels}, height, width), or (N, T, {channels}, height, width) of crops, "
            f"got {shape}" + (" of zeros" if len(shape) == 5 and not len(pixel_values) else "")
        )
    return pixel_values.to(tower.device, tower.dtype)


def _forward(model: Any, tower: nn.Module) -> Callable[[Tensor], Any]:
    """What is run on (n, C, height, width): as much of the model as needs nothing else."""
    if _in_language_model(model):
        more = {} if _feature_layers(model) is None else {"output_hidden_states": True}
        return lambda pixels: tower(pixels, **more)
    pair = _takes(model, "input_ids") or not _takes(model, "pixel_values")
    whole = model.get_image_features if pair else model
    return lambda pixels: whole(pixel_values=pixels)


def _in_language_model(model: nn.Module) -> bool:
    """Whether a language model reads the tower: no lone tower, and no pair of encoders like CLIP."""
    return _takes(model, "input_ids") and not hasattr(model, "logit_scale")


def _feature_layers(model: Any) -> list[int] | None:
    """Which hidden states of the tower the model reads, where its config tells."""
    layers = getattr(model.config, "vision_feature_layer", None)
    return [layers] if isinstance(layers, int) else layers


@contextmanager
def _hooks(attach: Callable[[], Iterable[Any]]) -> Iterator[None]:
    """Hooks that are removed at any exit."""
    handles: list[Any] = []
    try:
        for handle in attach():
            handles.append(handle)
        yield
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------ importance


def _prune(attention: nn.Module, heads: Iterable[int]) -> Iterator[Any]:
    """A hook that has some heads give zeros."""
    count, gone = heads_of(attention), list(heads)

    def drop(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        outputs = args[0].unflatten(-1, (count, -1)).clone()
        outputs[..., gone, :] = 0
        return (outputs.flatten(-2), *args[1:])

    yield output_projection(attention).register_forward_pre_hook(drop)


def _comparison(
    model: Any, tower: nn.Module, output: Any, measure: Measure | None, rows: slice
) -> tuple[Callable[[Any], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """What to read of an output, and how much it changed between the plain and the pruned one, (n,)."""
    if measure is not None:
        return partial(_measured, measure, rows), torch.sub
    if _in_language_model(model):
        return partial(_tokens, model), _turned
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape[1] > 1:
        return lambda output: _wide(output.logits).softmax(-1), _lost
    return partial(_embedding, has_cls(tower)), _turned


def _measured(measure: Measure, rows: slice, output: Any) -> Tensor:
    values, count = measure(output, rows), rows.stop - rows.start
    if not isinstance(values, Tensor) or values.shape != (count,):
        seen = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"measure must give one value for each of {count} images, ({count},), got {seen}")
    return values


def _tokens(model: Any, output: Any) -> Tensor:
    """The states (n, T, C) that the projector or Q-Former reads."""
    layers = _feature_layers(model)
    if layers is None:
        return output.last_hidden_state
    states = torch.cat([output.hidden_states[layer] for layer in layers], -1)
    strategy = getattr(model.config, "vision_feature_select_strategy", None)
    return states[:, 1:] if strategy == "default" else states


def _embedding(cls: bool, output: Any) -> Tensor:
    """One vector for each image, (n, C)."""
    if isinstance(output, Tensor):
        return output
    for name in ("image_embeds", "pooler_output"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    states = getattr(output, "last_hidden_state", None)
    if states is None:
        raise CannotEdit(
            f"{type(output).__name__} has no logits, pooled output or last state to compare: give a measure"
        )
    return states[:, 0] if cls else states.mean(1)


def _turned(plain: Tensor, pruned: Tensor) -> Tensor:
    """1 - cosine of (n, ..., C), mean over all but n; by the difference, so that small turns are exact."""
    apart = F.normalize(_wide(plain), dim=-1) - F.normalize(_wide(pruned), dim=-1)
    return apart.square().sum(-1).view(len(plain), -1).mean(1) / 2


def _lost(plain: Tensor, pruned: Tensor) -> Tensor:
    """Drop of the probability of the plain output's class: probs (n, classes) -> (n,)."""
    first = plain.argmax(-1, keepdim=True)
    return (plain - pruned).gather(1, first)[:, 0]


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
