"""Attention by spatial offset: the histogram that tells distance, hops and patterns of a vision tower's heads.

An offset map is (2h - 1, 2w - 1) for a grid of h x w patches. Its place (h - 1 + dy, w - 1 + dx) holds the probs that
patches put dy rows below and dx columns right of themselves, the mean over all patches; it sums to 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..hooks.errors import CannotEdit
from ..hooks.tower import has_cls, heads_of, output_projection, projections

_AT_ONCE = 2**24  # scores that are held at a time: 64 MiB in fp32


def offset_maps(probs: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean over the queries of where each looks: probs (B, P, P) of P = h w patches -> (B, 2h - 1, 2w - 1)."""
    height, width = grid
    spread = (
        probs.unflatten(2, (height, width)).unflatten(1, (height, width)).transpose(2, 3)
    )  # qy, ky, qx, kx
    columns = _by_difference(spread).movedim(-1, 1)
    return _by_difference(columns).transpose(1, 2) / (height * width)


def _by_difference(values: Tensor) -> Tensor:
    """Sums over equal k - q, from 1 - n to n - 1: values (..., n, n) of q and k -> (..., 2n - 1)."""
    n = values.shape[-1]
    if n == 1:
        return values[..., 0]
    shifted = torch.nn.functional.pad(values.flip(-2), (0, n)).flatten(-2)[
        ..., :-n
    ]  # each row one place further
    return shifted.unflatten(-1, (n, 2 * n - 1)).sum(-2)


def offsets_of(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """dy (2h - 1, 1) and dx (1, 2w - 1) of the places of an offset map, in patches."""
    height, width = grid
    return torch.arange(1 - height, height)[:, None], torch.arange(1 - width, width)[None]


def mean_distance(maps: Tensor, patch: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Mean Euclidean distance between query and key: offset maps (..., 2h - 1, 2w - 1) -> (...), in units of `patch`.

    Args:
        maps: offset maps.
        patch: height and width of a patch; 1 and 1 give the distance in patches.
    """
    dy, dx = offsets_of(_grid(maps))
    length = ((dy * patch[0]).square() + (dx * patch[1]).square()).to(maps.dtype).sqrt()
    return (maps * length).sum((-2, -1))


def hop_masses(maps: Tensor) -> Tensor:
    """Probs by hop: offset maps (..., 2h - 1, 2w - 1) -> (..., K), K = max(h, w).

    Hop k is the square ring of the patches k steps of a king's move away: 0 is the patch itself, 1 its up to 8
    neighbours.
    """
    dy, dx = offsets_of(_grid(maps))
    ring = torch.maximum(dy.abs(), dx.abs()).flatten()
    return maps.flatten(-2) @ torch.nn.functional.one_hot(ring).to(maps.dtype)


def _grid(maps: Tensor) -> tuple[int, int]:
    return (maps.shape[-2] + 1) // 2, (maps.shape[-1] + 1) // 2


@dataclass(frozen=True)
class HeadClusters:
    """Kinds of attention among the heads of a tower; kind 0 looks nearest, the last one farthest.

    Attributes:
        labels: (L, H) kind of each head, from 0.
        maps: (k, 2h - 1, 2w - 1) mean offset map of each kind.
        distance: (k,) mean attention distance of each kind, in patches, ascending.
    """

    labels: Tensor
    maps: Tensor
    distance: Tensor

    @property
    def sizes(self) -> Tensor:
        """How many heads each kind has, (k,)."""
        return torch.bincount(self.labels.flatten(), minlength=len(self.distance))


def cluster_heads(maps: Tensor, count: int) -> HeadClusters:
    """Ward's clusters of offset maps (L, H, 2h - 1, 2w - 1), in the Hellinger distance.

    Ward's method joins what raises the variance within clusters least, the sum that k-means lowers; it has no random
    start. The distance is that of the square roots of the probs, else all diffuse heads are one kind.

    Raises:
        ValueError: `count` is not from 1 to the number of heads.
    """
    from scipy.cluster.hierarchy import cut_tree, linkage

    flat = maps.flatten(0, 1)
    if not 1 <= count <= len(flat):
        raise ValueError(f"clusters must be from 1 to the tower's {len(flat)} heads, got {count}")
    found = np.zeros(len(flat), dtype=np.int64)
    if count > 1:
        tree = linkage(flat.flatten(1).double().sqrt().numpy(), "ward")
        found = cut_tree(tree, n_clusters=count)[:, 0]
    labels = torch.as_tensor(found)
    means = torch.stack([flat[labels == kind].mean(0) for kind in range(count)])
    distance, order = mean_distance(means).sort(stable=True)
    return HeadClusters(order.argsort()[labels].view(maps.shape[:2]), means[order], distance)


class OffsetReader:
    """Adds up the offset maps of every layer, image by image."""

    def __init__(self, tower: Any, layers: list[nn.Module], grid: tuple[int, int]) -> None:
        self._layers, self._grid = layers, grid
        self._wide = torch.promote_types(tower.dtype, torch.float32)
        self._special = int(has_cls(tower)) + int(getattr(tower.config, "num_register_tokens", None) or 0)
        self._tolerance = 0.02 if tower.dtype == self._wide else 0.2  # half precision rounds scores and probs
        self._checked: set[int] = set()
        shape = (len(layers), heads_of(layers[0]))
        self.outside = torch.zeros(shape, dtype=self._wide)
        self.offsets = self.outside.new_zeros(*shape, 2 * grid[0] - 1, 2 * grid[1] - 1)

    def attach(self) -> Iterator[Any]:
        """Hooks where each layer makes queries, keys and values, and where it has the outputs of its heads."""
        for layer, attention in enumerate(self._layers):
            kept: dict[str, Tensor] = {}
            for name, module in projections(attention).items():
                yield module.register_forward_hook(partial(_keep, kept, name))
            hook = partial(self._read, layer, kept)
            yield output_projection(attention).register_forward_pre_hook(hook, prepend=True)

    def _read(self, layer: int, kept: dict[str, Tensor], module: nn.Module, args: tuple[Tensor, ...]) -> None:
        fused = kept.pop("fused", None)
        made = [kept.pop(name) for name in "qkv"] if fused is None else fused.chunk(3, -1)
        if args[0].ndim != 3 or any(part.shape != args[0].shape for part in made):
            raise CannotEdit(
                f"vision layer {layer} gives queries, keys, values and heads of the shapes "
                f"{[tuple(part.shape) for part in (*made, args[0])]}; they can be read where these are one (N, S, C)"
            )
        (height, width), heads, tokens = self._grid, heads_of(self._layers[layer]), args[0].shape[1]
        if tokens != height * width + self._special:
            raise CannotEdit(
                f"vision layer {layer} has {tokens} tokens, which are not {height} x {width} patches behind "
                f"{self._special} CLS and register tokens"
            )
        split = [
            part.to(self._wide)
            .unflatten(-1, (heads, -1))
            .transpose(1, 2)
            .flatten(0, 1)
            .split(_several(tokens))
            for part in (*made, args[0])
        ]
        read = [self._part(layer, *some) for some in zip(*split, strict=True)]
        maps, outside = (
            torch.cat(parts).unflatten(0, (-1, heads)).sum(0) for parts in zip(*read, strict=True)
        )
        self.offsets[layer] += maps.cpu()
        self.outside[layer] += outside.cpu()

    def _part(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Offset maps (B, 2h - 1, 2w - 1) and probs outside of the patches (B,) of B heads; all (B, S, D)."""
        scores = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
        if layer not in self._checked:
            self._check(layer, scores.softmax(-1) @ value, output)
        rows = scores[:, self._special :]
        inner = rows[..., self._special :]
        inside = (inner.logsumexp(-1) - rows.logsumexp(-1)).exp().mean(-1)
        return offset_maps(inner.softmax(-1), self._grid), 1 - inside

    def _check(self, layer: int, ours: Tensor, theirs: Tensor) -> None:
        """Refuse where the probs that were read are not those that gave the heads' outputs (B, S, D)."""
        error = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(torch.finfo(theirs.dtype).tiny)
        if not error < self._tolerance:
            raise CannotEdit(
                f"vision layer {layer} cannot be read: its queries, keys and values do not explain the outputs of its "
                f"heads (error {float(error):.0%}; rotary positions, a mask, windows?)"
            )
        self._checked.add(layer)


def _keep(kept: dict[str, Tensor], name: str, module: nn.Module, args: Any, out: Tensor) -> None:
    kept[name] = out


def _several(tokens: int) -> int:
    """How many heads with scores of tokens x tokens are held at a time."""
    return max(1, _AT_ONCE // tokens**2)
