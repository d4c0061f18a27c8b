"""Which group each key belongs to, and how the keys of a group lie in memory.

The kernels work on spans: runs of keys of one group. A few keys that stick out of a span (an attention
sink inside an image) do not break it up; they are kept apart as columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SHORT = 16  # a shorter run costs less as single columns than as a span of its own


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
        ValueError: ids of another shape or dtype, or out of range.
    """

    ids: Tensor
    count: int
    _known: tuple[Layout, ...] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.is_floating_point() or self.ids.is_complex():
            raise ValueError(
                f"ids must be integers of shape (B, K), not {self.ids.dtype} of {tuple(self.ids.shape)}"
            )

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
        if self._known is not None:
            return self._known
        rows = self.ids.cpu().numpy()
        if rows.size and not (0 <= rows.min() and rows.max() < self.count):
            raise ValueError(f"ids run from {rows.min()} to {rows.max()}, but there are {self.count} groups")
        return tuple(_layout(row) for row in rows)

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
        return Groups(self.ids[index : index + 1], self.count, (self.layouts[index],))

    def window(self, start: int, stop: int) -> Groups:
        """Keys `start` to `stop`. Keys beyond those known (tokens since generated) belong to group 0."""
        if (start, stop) == (0, self.keys):
            return self
        ids = F.pad(self.ids, (0, max(0, stop - self.keys)))[:, start:stop]
        known = None
        if "layouts" in self.__dict__ or self._known is not None:
            known = tuple(_window(layout, start, stop, self.keys) for layout in self.layouts)
        return Groups(ids, self.count, known)

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
        return (parts[0] if len(parts) == 1 else Groups(ids, total)), tuple(of)


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
