"""Attention problems with planted sinks, and their results by one formula per output element."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from regard.kernels import dense, reweighted, segments
from regard.kernels.groups import Groups
from regard.kernels.policies import Drop, HeadScale, InTurn, Redistribute, Scale, identity

Gain = Callable[[list[float], int, int], list[float]]
Inputs = tuple[Tensor, Tensor, Tensor]
G = 4  # text, image, image sink, text sink


def bend(masses: Tensor) -> Tensor:
    """A smooth policy, neither linear nor keeping the sum."""
    return 1 + masses.square() - 0.5 * masses.roll(1, -1).sin()


def louder(scores: Tensor, ids: Tensor) -> Tensor:
    """PAI: image scores grow by half of their size."""
    return scores + 0.5 * scores.abs() * (ids == 1)[:, None, None]


def louder_score(score: float, group: int) -> float:
    return score + 0.5 * abs(score) if group == 1 else score


def gains(policy: Any, masses: list[float], sample: int, head: int) -> list[float]:
    """The coefficients of one row by the definition of each policy, in plain floats."""
    if isinstance(policy, Sequence):
        total = [1.0] * len(masses)
        for one in policy:
            left = [m * t for m, t in zip(masses, total, strict=True)]
            total = [t * g for t, g in zip(total, gains(one, left, sample, head), strict=True)]
        return total
    if policy is identity:
        return [1.0] * len(masses)
    if policy is bend:
        return [1 + m * m - 0.5 * math.sin(masses[i - 1]) for i, m in enumerate(masses)]
    return _gains[type(policy)](policy, masses, sample, head)


def _redistribute(policy: Redistribute, masses: list[float], *_: int) -> list[float]:
    _, image, image_sink, text_sink = masses
    if image_sink <= 0 or image <= 0 or image + image_sink < policy.min_visual:
        return [1.0] * 4
    if image / (image + image_sink) < policy.rho:
        return [1.0] * 4
    keep = 1 - policy.transfer
    return [1.0, 1 + policy.transfer * (image_sink + text_sink) / image, keep, keep]


def _drop(policy: Drop, masses: list[float], *_: int) -> list[float]:
    left = sum(m for g, m in enumerate(masses) if g not in policy.groups)
    each = 1.0 if not policy.renormalise else 1 / left if left else 0.0
    return [0.0 if g in policy.groups else each for g in range(len(masses))]


def _scale(policy: Scale, masses: list[float], *_: int) -> list[float]:
    total = sum(m * f for m, f in zip(masses, policy.factors, strict=True))
    if not policy.renormalise:
        return list(policy.factors)
    return [f / total if total else 0.0 for f in policy.factors]


def _head_scale(policy: HeadScale, masses: list[float], sample: int, head: int) -> list[float]:
    factors = policy.factors[sample] if policy.factors.ndim == 2 else policy.factors
    return [float(factors[head])] * len(masses)


def _in_turn(policy: InTurn, masses: list[float], sample: int, head: int) -> list[float]:
    total = [1.0] * len(masses)
    for one, of in zip(policy.policies, policy.of, strict=True):
        belongs = of.argmax(1).tolist()
        coarse = [0.0] * of.shape[1]
        for g, part in enumerate(belongs):
            coarse[part] += masses[g] * total[g]
        gain = gains(one, coarse, sample, head)
        total = [t * gain[part] for t, part in zip(total, belongs, strict=True)]
    return total


_gains: dict[type, Callable[..., list[float]]] = {
    Redistribute: _redistribute,
    Drop: _drop,
    Scale: _scale,
    HeadScale: _head_scale,
    InTurn: _in_turn,
}


def formula(
    inputs: Inputs, ids: Tensor, policy: Any, count: int = G, **options: Any
) -> tuple[Tensor, Tensor]:
    """Out (B, H, R, D_v) and masses (B, H, R, G) of the edited rows, one (sample, head, row) at a time.

    `options` are those of `reweighted_attention`, but that `score_mod` takes one score and its group.
    """
    query, key, value = inputs
    batch, heads, rows, _ = query.shape
    first = options.get("rows_from", 0)
    out = torch.zeros(batch, heads, rows - first, value.shape[-1], dtype=torch.float64)
    masses = torch.zeros(batch, heads, rows - first, count, dtype=torch.float64)
    for b, h, row in itertools.product(range(batch), range(heads), range(first, rows)):
        group = ids[b % ids.shape[0]].tolist()
        shared = h // (heads // key.shape[1])
        scores = [_score(inputs, (b, h, row, k), group[k], **options) for k in range(key.shape[2])]
        top = max(scores)
        weights = [0.0 if top == -math.inf else math.exp(s - top) for s in scores]
        probs = [w / (sum(weights) or 1.0) for w in weights]
        own = [sum(p for p, g in zip(probs, group, strict=True) if g == wanted) for wanted in range(count)]
        gain = gains(policy, own, b, h)
        masses[b, h, row - first] = torch.tensor(own, dtype=torch.float64)
        for p, g, v in zip(probs, group, value[b, shared].tolist(), strict=True):
            out[b, h, row - first] += gain[g] * p * torch.tensor(v, dtype=torch.float64)
    return out, masses


def _score(inputs: Inputs, at: tuple[int, ...], group: int, **options: Any) -> float:
    """The score of one key for one row, -inf where it is not seen."""
    query, key, _ = inputs
    b, h, row, k = at
    shared = h // (query.shape[1] // key.shape[1])
    one, other = query[b, h, row].tolist(), key[b, shared, k].tolist()
    score = sum(x * y for x, y in zip(one, other, strict=True)) * options.get("scale", len(one) ** -0.5)
    if options.get("score_mod"):
        score = options["score_mod"](score, group)
    bias, mask, allow = (options.get(name) for name in ("group_bias", "mask", "allow"))
    if bias is not None:
        score += float(bias[group] if bias.ndim == 1 else bias[h, group])
    if options.get("causal") and k > key.shape[2] - query.shape[2] + row:
        return -math.inf
    if allow is not None:
        row -= options.get("rows_from", 0)
        if not (allow[row, group] if allow.ndim == 2 else allow[b, row, group]):
            return -math.inf
        row += options.get("rows_from", 0)
    if mask is None:
        return score
    added = mask.expand(*query.shape[:3], key.shape[2])[b, h, row, k]
    if mask.dtype == torch.bool:
        return score if added else -math.inf
    return -math.inf if added <= torch.finfo(mask.dtype).min else score + float(added)


def seeded(*case: object) -> torch.Generator:
    """A generator seeded by a case, so that a failure can be repeated from its message."""
    return torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))


def inputs_of(rng: torch.Generator, heads: tuple[int, int], rows: int, keys: int, **sizes: int) -> Inputs:
    """Float64 query, key and value, these within 1, so that errors are in units of the values."""
    batch, width = sizes.get("batch", 1), sizes.get("width", 8)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    query, key = normal(batch, heads[0], rows, width), normal(batch, heads[1], keys, width)
    return query, key, normal(batch, heads[1], keys, sizes.get("wide", width)).tanh()


def plant(inputs: Inputs, sink: int, mass: float, seen: Tensor | None, scale: float) -> Inputs:
    """Change queries and keys so that every row that sees key `sink` gives it that mass.

    The sink is the unit vector of the first dimension, where all other keys are zero: what a query has
    there moves the score of the sink alone.
    """
    query, key, value = (x.clone() for x in inputs)
    key[..., 0] = 0
    key[:, :, sink] = 0
    query[..., 0] = 0
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(2, 3) * scale
    scores[..., sink] = -torch.inf
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    level = scores.logsumexp(-1) + math.log(mass / (1 - mass))
    query[..., 0] = level.masked_fill(level == -torch.inf, 0) / scale
    key[:, :, sink, 0] = 1
    return query, key, value


def seen_of(rows: int, keys: int, causal: bool, mask: Tensor | None = None) -> Tensor:
    """(B|1, H|1, Q, K) bool of causality and a bool mask."""
    seen = torch.ones(rows, keys, dtype=torch.bool)
    seen = seen.tril(keys - rows) if causal else seen
    return seen[None, None] if mask is None else seen & mask


def image_ids(keys: int, start: int, stop: int, sinks: Sequence[int]) -> Tensor:
    """(K,): a text sink, text, an image with sinks from `start` to `stop`, text."""
    ids = torch.zeros(keys, dtype=torch.long)
    ids[start:stop] = 1
    ids[[sink for sink in sinks if start <= sink < stop]] = 2
    ids[0] = 3
    return ids


def ids_of(kind: str, rng: torch.Generator, batch: int, keys: int) -> Tensor:
    """(B|1, K) ids of a kind of layout."""

    def below(top: int) -> int:
        return int(torch.randint(0, max(1, top), (1,), generator=rng))

    def image() -> Tensor:
        start = below(keys // 3)
        return image_ids(keys, start, start + keys // 2 + 1, [start + below(keys // 2) for _ in range(4)])

    if kind == "image":
        return image()[None]
    if kind == "ragged":
        return torch.stack([image() for _ in range(batch)])
    if kind == "aligned":  # the same spans, but other sinks in each sample, and more in one than in another
        start, stop, some = keys // 6, keys - keys // 6, [below(keys) for _ in range(3)]
        return torch.stack([image_ids(keys, start, stop, some[: b + 1]) for b in range(batch)])
    if kind == "no sinks":
        return image()[None] % 2
    if kind == "one":
        return torch.full((1, keys), 1)
    if kind == "scattered":  # no run is long enough for a span
        return torch.randint(0, G, (batch, keys), generator=rng)
    runs = [(torch.full((1 + below(40),), below(G))) for _ in range(keys)]
    return torch.cat(runs)[:keys][None]


KINDS = ("image", "ragged", "aligned", "no sinks", "one", "scattered", "runs")


def force(monkeypatch: Any, path: str) -> None:
    """Make the backend "torch" take this path, whatever the size; the other one raises."""

    def unwanted(_: object) -> None:
        raise AssertionError(f"not the path {path}")

    monkeypatch.setattr(reweighted, "FEW", 1 << 60 if path == "dense" else -1)
    monkeypatch.setattr(segments if path == "dense" else dense, "rows", unwanted)


def run(inputs: Inputs, ids: Tensor, policy: Any, count: int = G, **options: Any) -> Any:
    """`reweighted_attention` with grouped heads allowed."""
    options.setdefault("backend", "torch")
    groups = ids if isinstance(ids, Groups) else Groups(ids, count)
    return reweighted.reweighted_attention(*inputs, groups, policy, enable_gqa=True, **options)


class Largest(TorchDispatchMode):
    """Notes the most elements that any operation gave back."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel())
        return out
