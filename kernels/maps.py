"""Attention maps without the attention matrix: chosen columns of the probs, and their flow through the layers.

The probs are formed by blocks of some heads and rows, so that memory is bounded whatever the number of keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .look import Indices, Look, indices_of, look_at

BLOCK = 1 << 20  # probs formed at a time: 4 MiB in fp32, measured as fast as all at once or faster
KEPT = 1 << 23  # probs kept for a backward pass; more are formed again in it, 1.4 to 1.8 times as slow

Pair: TypeAlias = tuple[Tensor, Tensor]
Layer: TypeAlias = Tensor | Pair | Callable[[], Tensor | Pair]


def concept_maps(
    query: Tensor,
    key: Tensor,
    tokens: Indices,
    *,
    scale: float | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    rows: Indices | None = None,
    reduce: Literal["mean"] | None = "mean",
) -> Tensor:
    """How strongly query rows look at a few keys: columns of `softmax(query @ key.T * scale)`. Differentiable.

    For cross-attention the rows are image latents and the columns text tokens (the maps of Prompt-to-Prompt,
    arXiv 2208.01626, and Attend-and-Excite, arXiv 2301.13826, before any aggregation over layers). For a
    language model the rows are text tokens and the columns image tokens.

    Without gradients no more than `BLOCK` probs are formed at a time (but at least one row of the heads that
    share a key-value head). With gradients all are kept where they are few, else formed again in the backward.

    Args:
        query: (B, H, Q, D).
        key: (B, H_kv, K, D), H a multiple of H_kv.
        tokens: (T,) or (B, T) key indices; -1 fills up a sample that has fewer, and its map is zero.
        scale: factor of the scores, default D ** -0.5.
        causal: query row i sees the keys up to K - Q + i (aligned at the lower right).
        mask: (B|1, H|1, Q|1, K), bool (True is seen) or added to the scores.
        rows: (R,) or (B, R) indices of the query rows wanted, -1 for fill (zero); None is all. `causal` and `mask`
            go by a row's place in `query`.
        reduce: "mean" over the heads, or None for a map a head.

    Returns:
        Probs (B, R, T), or (B, H, R, T) for `reduce=None`; fp32, fp64 for fp64. A row that sees no key is zero.

    Raises:
        ValueError: shapes that do not fit, an index out of range, another `reduce`.
    """
    if reduce not in ("mean", None):
        raise ValueError(f"reduce is {reduce!r}; give 'mean', or None for a map a head")
    look = look_at(query, key, scale, causal, mask, rows)
    columns = indices_of("tokens", tokens, look.keys, query)
    if not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)):
        return _columns(look, columns, reduce == "mean", BLOCK)
    few = look.query.shape[:3].numel() * look.keys <= KEPT
    return _columns(look, columns, reduce == "mean", KEPT if few else BLOCK, again=not few)


@torch.no_grad()
def head_weights(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """How sharply each head looks: `W = mean_i max_j probs[i, j]` (VL-SAM, arXiv 2410.05963). No gradient.

    The mean is over the rows that see any key. Padding on the left drops out of itself, as such rows see nothing;
    rows padded on the right must be hidden by the mask.

    Args:
        query: (B, H, Q, D).
        key: (B, H_kv, K, D), H a multiple of H_kv.
        scale: factor of the scores, default D ** -0.5.
        causal: query row i sees the keys up to K - Q + i.
        mask: (B|1, H|1, Q|1, K), bool (True is seen) or added to the scores.

    Returns:
        (B, H) in [0, 1], fp32 (fp64 for fp64); 0 for a sample of which no row sees a key.

    Raises:
        ValueError: shapes that do not fit.
    """
    look = look_at(query, key, scale, causal, mask)
    parts = []
    blocks, strips = look.blocks(BLOCK)
    for heads in blocks:
        sharp = _Sharpness()
        for rows in strips:
            sharp.add(look.probs(heads, rows))
        parts.append(sharp.mean())
    return torch.cat(parts, 1)


@torch.no_grad()
def layer_map(
    query: Tensor,
    key: Tensor,
    weights: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """The map of a layer, `mean_h(probs_h * W_h)` (VL-SAM, arXiv 2410.05963). No gradient.

    One Q x K map a sample is held, and a block of probs; never those of all heads. `attention_flow` can do
    without the map: give it the queries and keys.

    Args:
        query: (B, H, Q, D).
        key: (B, H_kv, K, D), H a multiple of H_kv.
        weights: (B, H) from `head_weights`, not normalised; None is the plain mean.
        scale: factor of the scores, default D ** -0.5.
        causal: query row i sees the keys up to K - Q + i.
        mask: (B|1, H|1, Q|1, K), bool (True is seen) or added to the scores.

    Returns:
        (B, Q, K) fp32 (fp64 for fp64). A row that sees no key is zero.

    Raises:
        ValueError: shapes that do not fit.
    """
    look = look_at(query, key, scale, causal, mask)
    batch, heads, count, _ = query.shape
    if weights is None:
        weights = torch.ones(batch, heads, dtype=look.wide, device=query.device)
    if weights.shape != (batch, heads):
        raise ValueError(f"weights must have the shape (B, H) = {(batch, heads)}, not {tuple(weights.shape)}")
    share = weights.to(look.wide)[:, :, None, None] / heads
    out = torch.zeros(batch, count, look.keys, dtype=look.wide, device=query.device)
    blocks, strips = look.blocks(BLOCK)
    for own in blocks:
        for rows in strips:
            out[:, rows] += look.probs(own, rows).mul_(share[:, own]).sum(1)
    return out


def causal_ramp(keys: int, real: Tensor | None = None, *, device: torch.device | None = None) -> Tensor:
    """Column weights against the collapse of a causal flow onto the first tokens (VL-SAM, arXiv 2410.05963).

    `1 - (L0 - 1) / L`, with L0 the rows that see a column and L the length: (j + 1) / N for column j of N. Of a
    padded sample only the real tokens count, so it gets the weights that it would have alone, and 0 for padding.

    Args:
        keys: N.
        real: (B|1, N) bool, False for padding; None is no padding.
        device: of the result where `real` is None.

    Returns:
        (B|1, N) fp64.

    Raises:
        ValueError: `real` of another shape or dtype.
    """
    if real is None:
        real = torch.ones(1, keys, dtype=torch.bool, device=device)
    if real.dtype != torch.bool or real.ndim != 2 or real.shape[1] != keys:
        raise ValueError(f"real must be bool of shape (B, {keys}), not {real.dtype} of {tuple(real.shape)}")
    rank = real.double().cumsum(1)
    return (rank / rank[:, -1:].clamp_min(1)).masked_fill(~real, 0)


@torch.no_grad()
def attention_flow(
    layers: Iterable[Layer],
    start: Tensor,
    *,
    regularise: bool = False,
    real: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """Chosen rows of the attention flow through all layers (VL-SAM, arXiv 2410.05963). No gradient.

    The flow is `F_l = (I + S_l)(I + F_{l-1})` with F_0 = 0 (the paper leaves the start open). Rows of F_L need
    no product of N x N matrices: from the last layer down, `v <- v + v @ S_l` and `F <- F + v`. A row holds `start`
    itself once a layer. It grows at most twofold a layer, which fp32 bears for 120 layers.

    Args:
        layers: the LAST layer first. Each is a map (B, N, N) as of `layer_map`; or its (query, key), of which the
            map with the weights of `head_weights` is used block by block and never held; or a function that
            returns either, called when its turn comes. From a generator only one layer is alive at a time.
        start: (B, T, N), one-hot at the tokens whose rows are wanted, or a mean over the pieces of a word.
        regularise: weight the columns of each S_l by `causal_ramp`.
        real: (B|1, N) bool, False for padding, for `regularise`.
        scale: factor of the scores, default D ** -0.5; for layers given as (query, key), like the next two.
        causal: row i sees the keys up to i.
        mask: (B|1, H|1, N|1, N), bool (True is seen) or added to the scores.

    Returns:
        (B, T, N) in the dtype of `start`. Zero without layers.

    Raises:
        ValueError: shapes that do not fit.
    """
    if start.ndim != 3 or not start.is_floating_point():
        raise ValueError(f"start must be floats (B, T, N), not {start.dtype} of {tuple(start.shape)}")
    if real is not None and not regularise:
        raise ValueError(
            "real only counts in the column weights; pass regularise=True, and hide padding by mask"
        )
    ramp = causal_ramp(start.shape[2], real, device=start.device)[:, None].to(start) if regularise else None
    flow, total = start, torch.zeros_like(start)
    for layer in layers:
        given = layer() if callable(layer) else layer
        if isinstance(given, Tensor):
            _square("a map", given.shape[1:], start)
            moved = flow @ given.to(start)
        else:
            _square("a layer of rows and keys", (given[0].shape[2], given[1].shape[2]), start)
            moved = _moved(look_at(*given, scale, causal, mask), flow)
        flow = flow + (moved if ramp is None else moved * ramp)
        total += flow
        del layer, given, moved  # or two layers would be alive while the next one is made
    return total


class _Sharpness:
    """The mean of the largest prob of a row, over the rows that see anything."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.seen: Tensor | int = 0

    def add(self, probs: Tensor) -> None:
        """Rows (B, h, r, K)."""
        peak = probs.amax(-1)
        self.total = self.total + peak.sum(-1)
        self.seen = self.seen + (peak > 0).sum(-1)

    def mean(self) -> Tensor:
        """(B, h)."""
        return torch.as_tensor(self.total / torch.as_tensor(self.seen).clamp_min(1))


def _columns(look: Look, columns: Tensor, mean: bool, most: int, again: bool = False) -> Tensor:
    """Blocks of rows one below the other; within one, blocks of heads summed or side by side.

    With `again` a block's probs are not kept for the backward pass but formed again in it.
    """
    heads, rows = look.blocks(most)
    widths, heights = ([part.stop - part.start for part in parts] for parts in (heads, rows))
    keys = look.key.split([width // look.together for width in widths], 1)

    def block(query: Tensor, key: Tensor, part: Look) -> Tensor:
        probs = replace(part, query=query, key=key).probs()
        picked = (
            probs.index_select(3, columns.clamp_min(0)[0]) if len(columns) == 1 else _gathered(probs, columns)
        )
        return picked.sum(1) if mean else picked

    strips = []
    # split, as the gradient of a slice is as large as the whole
    for own, strip in zip(rows, look.query.split(heights, 2), strict=True):
        parts = []
        for some, query, key in zip(heads, strip.split(widths, 1), keys, strict=True):
            given = query, key, look.part(some, own)
            parts.append(
                checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)
                if again
                else block(*given)
            )
        strips.append(sum(parts[1:], parts[0]) if mean else torch.cat(parts, 1))
    maps = torch.cat(strips, -2) / (look.query.shape[1] if mean else 1)
    absent = (columns < 0)[:, None] if mean else (columns < 0)[:, None, None]
    return maps.masked_fill(absent, 0)


def _gathered(probs: Tensor, columns: Tensor) -> Tensor:
    """(B, h, r, T): each sample its own columns."""
    index = columns.clamp_min(0)[:, None, None]
    return probs.gather(3, index.expand(*probs.shape[:3], -1))


def _moved(look: Look, flow: Tensor) -> Tensor:
    """`flow @ mean_h(probs_h * W_h)`, (B, T, K), in one pass over the probs: W_h is known at its end."""
    out = torch.zeros_like(flow)
    wide = flow.to(look.wide)[:, None]
    blocks, strips = look.blocks(BLOCK)
    for heads in blocks:
        sharp = _Sharpness()
        moved = look.query.new_zeros((), dtype=look.wide)
        for rows in strips:
            probs = look.probs(heads, rows)
            sharp.add(probs)
            moved = moved + wide[..., rows] @ probs
        out += (moved * sharp.mean()[:, :, None, None]).sum(1).to(out) / look.query.shape[1]
    return out


def _square(what: str, shape: Sequence[int], start: Tensor) -> None:
    if tuple(shape) != (start.shape[2], start.shape[2]):
        raise ValueError(
            f"{what} of shape {tuple(shape)} does not fit start (B, T, N) of {tuple(start.shape)}"
        )
