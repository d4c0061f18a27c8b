"""How the Triton backend cuts the keys into splits, each of one group, and the arguments that follow. Host side."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .groups import Groups, Layout, Span
from .problem import Problem

MANY = 32  # spans of a sample from which on all but the last are served key by key


class Plan(NamedTuple):
    """The splits of a problem, on its device.

    Attributes:
        table: (B|1, n, 4) int32: start, stop, group, and 1 where start and stop count in `columns`.
        columns: (B|1, m) int32 key indices, filled up with -1; None where every key lies in a span of its group.
    """

    table: Tensor
    columns: Tensor | None


@dataclass(frozen=True)
class Tile:
    """Query rows and keys that a program works on at a time, and how it is compiled."""

    rows: int
    keys: int
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Config:
    """Choices that change speed, not results.

    Attributes:
        few: tile where all query rows of a key-value head fit into it (decoding).
        many: tile for more rows.
        least: the fewest keys for which a split is worth a program.
        waves: programs wanted for each multiprocessor.
    """

    few: Tile
    many: Tile
    least: int = 256
    waves: int = 2


class Launch(NamedTuple):
    """One kernel launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    def run(self) -> None:
        """Do it."""
        self.kernel[self.grid](**self.arguments, **self.options)


def config_for(dtype: torch.dtype, width: int) -> Config:
    """The choice for inputs of a dtype and the wider of D and D_v."""
    if dtype == torch.float32:  # no tensor cores: the products go through registers
        return Config(Tile(16, 16, 4, 2), Tile(32, 16, 8, 2))
    if width > 128:
        return Config(Tile(16, 32, 4, 2), Tile(64, 32, 8, 2))
    return Config(Tile(16, 64), Tile(64, 64, 8))


def split_size(keys: int, abreast: int, wanted: int, least: int) -> int:
    """Keys of a split so that about `wanted` programs run where each split has `abreast` of them.

    It is `least` times a power of 2, and so stays the same over most steps of decoding.
    """
    splits, size = max(1, wanted // max(1, abreast)), least
    while size * splits < keys:
        size *= 2
    return size


def plan(groups: Groups, size: int, device: torch.device) -> Plan:
    """The splits of some groups. The last one has an open end, so that the plan outlives many decoded tokens."""
    layouts = tuple(_open(layout, size) for layout in groups.layouts)
    if len(set(layouts)) == 1:
        layouts = layouts[:1]
    return _built(layouts, groups.count, size, device)


def _open(layout: Layout, size: int) -> Layout:
    """The last span, which ends where the keys end, drawn out to whole splits."""
    if not layout.spans:
        return layout
    *spans, (start, stop, group) = layout.spans
    return Layout((*spans, Span(start, start - (start - stop) // size * size, group)), layout.columns)


@lru_cache(maxsize=512)  # layers have sinks of their own, and so plans of their own
def _built(layouts: tuple[Layout, ...], count: int, size: int, device: torch.device) -> Plan:
    layouts = tuple(_thinned(layout) for layout in layouts)
    longest = max((len(layout.columns) for layout in layouts), default=0)
    # Which group a column has is known on the device alone: each group looks through all columns.
    gathered = [(start, stop, group, 1) for group in range(count) for start, stop in _cut(0, longest, size)]
    every = [[*_splits(layout, size), *gathered] for layout in layouts]
    most = max(1, *(len(splits) for splits in every), 1)
    nothing = (0, 0, 0, 0)
    table = [splits + [nothing] * (most - len(splits)) for splits in every]
    columns = [[*layout.columns, *[-1] * (longest - len(layout.columns))] for layout in layouts]
    return Plan(
        torch.tensor(table, dtype=torch.int32, device=device),
        torch.tensor(columns, dtype=torch.int32, device=device) if longest else None,
    )


def _thinned(layout: Layout) -> Layout:
    """Very many spans as columns, so that the splits stay few."""
    if len(layout.spans) <= MANY:
        return layout
    border = layout.spans[-1].start
    return Layout(
        layout.spans[-1:], (*range(border), *(column for column in layout.columns if column >= border))
    )


def _splits(layout: Layout, size: int) -> list[tuple[int, int, int, int]]:
    return [
        (first, last, group, 0)
        for start, stop, group in layout.spans
        for first, last in _cut(start, stop, size)
    ]


def _cut(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    return [(first, min(first + size, stop)) for first in range(start, stop, size)]


def members(problem: Problem, found: Plan) -> dict[str, Any]:
    """Arguments that say which key belongs to which split."""
    ids = problem.groups.ids
    ids = ids.view(torch.uint8) if ids.dtype == torch.bool else ids
    ids = ids if ids.stride(1) == 1 else ids.contiguous()
    columns = found.table if found.columns is None else found.columns
    return {
        "ids": ids,
        "table": found.table,
        "columns": columns,
        "CUT": found.columns is not None,
        **steps("ids", ids, "batch"),
        **steps("table", found.table, "batch"),
        **steps("columns", columns, "batch"),
    }


def score_terms(problem: Problem) -> dict[str, Any]:
    """Arguments for what is added to the scores. What is not there gets a pointer that is never read."""
    mask, bias, allow = problem.mask, problem.group_bias, problem.allow
    kind = 0 if mask is None else 1 if mask.shape[1:3] == (1, 1) else 2
    none = problem.query.new_empty(1, 1, 1, 1)
    mask = none if mask is None else rowwise(mask)
    given = none if bias is None else bias.to(problem.query.device, torch.float32).contiguous()
    allowed = none if allow is None else rowwise(allow).view(torch.uint8)
    return {
        "mask": mask,
        "bias": given,
        "allow": allowed,
        "MASK": kind,
        "BIAS": bias is not None,
        "ALLOW": allow is not None,
        **steps("mask", mask, "batch", "head", "row"),
        **steps("bias", given, "head"),
        **steps("allow", allowed, "batch", "row"),
    }


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def rowwise(tensor: Tensor) -> Tensor:
    """Last dimension dense."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def steps(name: str, tensor: Tensor, *dimensions: str) -> dict[str, int]:
    """Strides of the leading dimensions; 0 where one entry serves all."""
    leading = zip(dimensions, tensor.stride(), tensor.shape, strict=False)
    return {f"{name}_{of}": 0 if size == 1 else stride for of, stride, size in leading}


@lru_cache(maxsize=64)
def numbers_on(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Some numbers as (1, 1, 1, n)."""
    return torch.tensor(numbers, dtype=torch.float32, device=device).reshape(1, 1, 1, -1)
