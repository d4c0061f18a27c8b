"""Which group each key belongs to, and how the keys of a group lie in memory.

The kernels work on spans: runs of keys of one group. A few keys that stick out of a span (an attention
sink inside an image) do not break it up; they are kept apart as columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SHORT = 16  # a shorter run costs less as single columns than as a span of its own
ROOM = 256  # keys by which a window grows ahead


class Span(NamedTuple):
    """Keys `start` to `stop` (excluded), all of one group but for the columns among them."""

    start: int
    stop: int
    group: int


class Layout(NamedTuple):
    """The keys of one sample: spans that cover them in order, and the columns cut out of these."""

    spans: tuple[Span, ...]
    columns: tuple[int, ...]


@dataclass(frozen=True)
class Groups:
    """A group for every key.

    Args:
        ids: (B, K) or (1, K) integers from 0 to `count` - 1; one row serves every sample.
        count: number of groups G. A group may be empty.

    Raises:
        ValueError: ids of another shape or dtype, or out of range (on a GPU: once the layout is read).
    """

    ids: Tensor
    count: int

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.is_floating_point() or self.ids.is_complex():
            raise ValueError(
                f"ids must be integers of shape (B, K), not {self.ids.dtype} of {tuple(self.ids.shape)}"
            )
        if self.ids.device.type == "cpu":  # elsewhere a look at the values would wait for the device
            self._check_range(self.ids)

    def _check_range(self, ids: Tensor) -> None:
        if ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < self.count):
            raise ValueError(
                f"ids run from {int(ids.min())} to {int(ids.max())}, but there are {self.count} groups, from 0"
            )

    @staticmethod
    def _derived(ids: Tensor, count: int, **known: Any) -> Groups:
        """Groups whose ids are known to be right, with what else is known of them."""
        groups = object.__new__(Groups)
        groups.__dict__.update(ids=ids, count=count, **known)
        return groups

    @property
    def keys(self) -> int:
        """K."""
        return self.ids.shape[1]

    @cached_property
    def member(self) -> Tensor:
        """(B|1, 1, K, G) fp32, 1 where a key belongs to a group."""
        return F.one_hot(self.ids.long(), self.count).float()[:, None]

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """One layout a sample, or one for all where the samples are alike. Reads `ids` on the host, once."""
        source = self.__dict__.get("_source")
        if source is not None:
            groups, start, stop = source
            return tuple(_window(layout, start, stop, groups.keys) for layout in groups.layouts)
        ids = self.ids.cpu()
        self._check_range(ids)
        return tuple(_layout(row) for row in ids.numpy())

    @property
    def aligned(self) -> bool:
        """Whether all samples have the same spans (their columns may differ)."""
        return len({layout.spans for layout in self.layouts}) == 1

    @cached_property
    def columns(self) -> Tensor:
        """(B|1, n) key indices of the columns, filled up with -1."""
        longest = max(len(layout.columns) for layout in self.layouts)
        rows = [[*layout.columns, *[-1] * (longest - len(layout.columns))] for layout in self.layouts]
        return torch.tensor(rows, dtype=torch.long, device=self.ids.device).reshape(len(rows), longest)

    def sample(self, index: int) -> Groups:
        """The groups of one sample."""
        index = index if self.ids.shape[0] > 1 else 0
        return Groups._derived(self.ids[index : index + 1], self.count, layouts=(self.layouts[index],))

    def window(self, start: int, stop: int) -> Groups:
        """Keys `start` to `stop`. Keys beyond those known (tokens since generated) belong to group 0."""
        if (start, stop) == (0, self.keys):
            return self
        room = self._with_room(stop)
        ids, member = room.ids[:, start:stop], room.member[:, :, start:stop]
        return Groups._derived(ids, self.count, member=member, _source=(self, start, stop))

    def _with_room(self, stop: int) -> Groups:
        """These groups with keys of group 0 behind them, for at least `stop` keys; made anew at times only."""
        room = self.__dict__.get("_room", self)
        if room.keys < stop:
            ids = F.pad(self.ids, (0, stop + ROOM - self.keys))
            room = self.__dict__["_room"] = Groups._derived(ids, self.count)
        return room

    @staticmethod
    def product(parts: Sequence[Groups]) -> tuple[Groups, tuple[Tensor, ...]]:
        """The common refinement of several partitions of the same keys.

        Returns the refined groups G, and for each part the (G, G_i) matrix with a 1 where a refined group
        belongs to the part's group.
        """
        ids, total = parts[0].ids.long(), parts[0].count
        for part in parts[1:]:
            ids, total = ids * part.count + part.ids, total * part.count
        every, of, inner = torch.arange(total, device=ids.device), [], total
        for part in parts:
            inner //= part.count
            of.append(F.one_hot(every // inner % part.count, part.count).float())
        return (parts[0] if len(parts) == 1 else Groups._derived(ids, total)), tuple(of)


def _layout(ids: np.ndarray) -> Layout:
    """Long runs become spans; short ones become columns of the span around or before them."""
    if not len(ids):
        return Layout((), ())
    edges = np.flatnonzero(np.diff(ids)) + 1
    starts, stops = [0, *edges.tolist()], [*edges.tolist(), len(ids)]
    columns: list[int] = []
    spans: list[Span] = []
    for start, stop in zip(starts, stops, strict=True):
        group = int(ids[start])
        if spans and spans[-1].group == group:  # the runs between were short
            spans[-1] = Span(spans[-1].start, stop, group)
        elif stop - start < SHORT:
            columns += range(start, stop)
        else:
            spans.append(Span(spans[-1].stop if spans else 0, stop, group))
    if not spans:
        return Layout((), tuple(range(len(ids))))
    return Layout(_closed(spans, len(ids)), _outside(columns, ids, spans))


def _closed(spans: list[Span], keys: int) -> tuple[Span, ...]:
    """The spans with the last one drawn out to the end."""
    return (*spans[:-1], spans[-1]._replace(stop=keys))


def _outside(columns: list[int], ids: np.ndarray, spans: list[Span]) -> tuple[int, ...]:
    """The columns whose group is not that of the span that they lie in."""
    spread = np.repeat(
        [span.group for span in spans],
        np.diff([0, *[span.stop for span in spans[:-1]], len(ids)]),
    )
    return tuple(column for column in columns if ids[column] != spread[column])


def _window(layout: Layout, start: int, stop: int, keys: int) -> Layout:
    spans = list(layout.spans)
    if stop > keys and spans and spans[-1].group == 0:
        spans[-1] = spans[-1]._replace(stop=stop)
    elif stop > keys:
        spans.append(Span(keys, stop, 0))
    shifted = (
        Span(max(span.start, start) - start, min(span.stop, stop) - start, span.group) for span in spans
    )
    kept = tuple(span for span in shifted if span.stop > span.start)
    return Layout(kept, tuple(column - start for column in layout.columns if start <= column < stop))
