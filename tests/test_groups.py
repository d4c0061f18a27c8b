"""Layouts: spans and columns say the same as ids, through windows, samples and products."""

from __future__ import annotations

import itertools

import pytest
import torch
from problems import seeded
from torch import Tensor

from regard.kernels.groups import SHORT, Groups, Layout


def below(rng: torch.Generator, top: int) -> int:
    return int(torch.randint(0, top, (1,), generator=rng))


def random_ids(seed: int, keys: int, count: int, longest: int) -> Tensor:
    """(K,) in runs of up to `longest` keys."""
    rng, runs, total = seeded(seed, keys, count, longest), [], 0
    while total < keys:
        runs.append(torch.full((1 + below(rng, longest),), below(rng, count)))
        total += len(runs[-1])
    return torch.cat(runs)[:keys]


def assert_says(layout: Layout, ids: list[int], strict: bool = True) -> None:
    """Spans are in order without gaps, and a key's group is its span's but for columns, which are ids themselves.

    With `strict`, they cover all keys, and columns are only those that must be. Without: keys outside of spans
    are columns.
    """
    spans, columns = layout
    assert list(columns) == sorted(set(columns))
    group: dict[int, int] = {}
    end = spans[0].start if spans else len(ids)
    for span in spans:
        assert span.start == end
        assert span.stop > span.start
        group.update(dict.fromkeys(range(span.start, span.stop), span.group))
        end = span.stop
    assert end == len(ids)
    assert set(columns) == {k for k, g in enumerate(ids) if group.get(k) != g}
    if strict and spans:
        assert spans[0].start == 0
    assert all(one.group != other.group for one, other in itertools.pairwise(spans))


@pytest.mark.parametrize("keys", [1, 2, SHORT - 1, SHORT, SHORT + 1, 100, 333])
def test_layouts_say_what_ids_say(keys: int) -> None:
    for seed in range(40):
        for count, longest in ((1, 9), (2, SHORT), (4, 3 * SHORT), (4, 2), (3, SHORT // 2)):
            ids = random_ids(seed, keys, count, longest)
            (layout,) = Groups(ids[None], count).layouts
            assert_says(layout, ids.tolist())


def test_long_runs_are_spans_and_short_ones_columns() -> None:
    text, image, sink = torch.zeros(SHORT), torch.ones(SHORT), torch.full((1,), 2.0)
    ids = torch.cat([sink, text, image, sink, image[:3], text[:-1]]).long()[None]
    (layout,) = Groups(ids, 3).layouts
    assert [(span.stop, span.group) for span in layout.spans] == [(SHORT + 1, 0), (ids.shape[1], 1)]
    assert layout.columns == (0, 2 * SHORT + 1, *range(2 * SHORT + 5, 3 * SHORT + 4))
    assert Groups(torch.zeros(1, SHORT - 1).long(), 1).layouts == (Layout((), tuple(range(SHORT - 1))),)
    (whole,) = Groups(torch.full((1, SHORT), 3), 4).layouts
    assert (len(whole.spans), whole.columns) == (1, ())


def test_no_keys() -> None:
    groups = Groups(torch.zeros(2, 0, dtype=torch.long), 3)
    assert groups.layouts == (Layout((), ()),) * 2
    assert groups.member.shape == (2, 1, 0, 3)
    assert groups.columns.shape == (2, 0)


@pytest.mark.parametrize("known", [False, True])
def test_windows_are_those_of_the_ids(known: bool) -> None:
    """Beyond the keys that are known all belong to group 0; whether the layout was read before or not."""
    for seed in range(60):
        rng = seeded(seed, known)
        keys = 1 + below(rng, 120)
        ids = torch.stack([random_ids(seed + 1000 * b, keys, 3, 2 * SHORT + 2) for b in range(2)])
        groups = Groups(ids, 3)
        if known:
            assert len(groups.layouts) == 2
        for _ in range(4):
            start = below(rng, keys)
            stop = start + 1 + below(rng, keys + 40 - start)
            padded = torch.cat([ids, torch.zeros(2, 600, dtype=torch.long)], 1)[:, start:stop]
            window = groups.window(start, stop)
            assert torch.equal(window.ids.long(), padded), (seed, start, stop)
            assert torch.equal(window.member, Groups(padded, 3).member)
            assert (window.keys, window.count) == (stop - start, 3)
            for layout, own in zip(window.layouts, padded.tolist(), strict=True):
                assert_says(layout, own, strict=False)
            for layout, own in zip(window.window(1, stop - start + 9).layouts, padded.tolist(), strict=True):
                assert_says(layout, [*own[1:], *[0] * 9], strict=False)
        assert groups.window(0, keys) is groups


def test_windows_of_growing_caches() -> None:
    """Step by step, as in decoding; an earlier window keeps what it was."""
    ids = random_ids(3, 50, 3, 30)[None]
    groups = Groups(ids, 3)
    windows = [groups.window(0, stop) for stop in range(51, 700)]
    for stop, window in zip(range(51, 700), windows, strict=True):
        assert window.ids.shape == (1, stop)
        assert torch.equal(window.ids[:, :50], ids)
        assert not window.ids[:, 50:].any()
    assert_says(windows[-1].layouts[0], windows[-1].ids[0].tolist(), strict=False)


def test_samples_and_whether_they_are_aligned() -> None:
    first = torch.cat([torch.zeros(20), torch.ones(30), torch.zeros(20)]).long()
    other = first.clone()
    other[[30, 33]] = 2
    same, moved = Groups(torch.stack([first, other]), 3), Groups(torch.stack([first, other.roll(4)]), 3)
    assert same.aligned
    assert not moved.aligned
    assert same.columns.tolist() == [[-1, -1], [30, 33]]
    for groups in (same, moved):
        for index in range(2):
            sample = groups.sample(index)
            assert torch.equal(sample.ids, groups.ids[index : index + 1])
            assert sample.layouts == (groups.layouts[index],)
            assert sample.count == 3
    shared = Groups(other[None], 3)
    assert shared.aligned
    assert shared.sample(1).layouts == shared.layouts
    assert torch.equal(shared.sample(7).ids, shared.ids)


def test_products_refine_every_part() -> None:
    counts = (3, 2, 5)
    parts = [
        Groups(random_ids(7, 60, count, 9)[None].expand(1 + index % 2, -1).to(dtype), count)
        for index, (count, dtype) in enumerate(
            zip(counts, (torch.uint8, torch.long, torch.int32), strict=True)
        )
    ]
    refined, of = Groups.product(parts)
    assert refined.count == 30
    assert refined.ids.shape == (2, 60)
    for part, matrix in zip(parts, of, strict=True):
        assert matrix.shape == (30, part.count)
        assert matrix.sum(1).eq(1).all()
        belongs = matrix.argmax(1)[refined.ids]
        assert torch.equal(belongs, part.ids.long().expand(2, -1))
        assert torch.equal(refined.member @ matrix, part.member.expand(2, -1, -1, -1))
    alone, (matrix,) = Groups.product(parts[:1])
    assert alone is parts[0]
    assert torch.equal(matrix, torch.eye(3))


def test_member_is_one_where_a_key_belongs() -> None:
    ids = torch.tensor([[0, 2, 1], [3, 3, 0]], dtype=torch.uint8)
    member = Groups(ids, 5).member
    assert (member.shape, member.dtype) == ((2, 1, 3, 5), torch.float32)
    want = [[[float(g == own) for g in range(5)] for own in row] for row in ids.tolist()]
    assert member[:, 0].tolist() == want


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 3), r"ids must be integers of shape \(B, K\), not torch.float32 of \(1, 3\)"),
        (torch.zeros(3).long(), r"ids must be integers .* of \(3,\)"),
        (torch.zeros(1, 2, 3).long(), r"ids must be integers .* of \(1, 2, 3\)"),
        (torch.zeros(1, 3, dtype=torch.complex64), "not torch.complex64"),
        (torch.tensor([[0, -1, 1]]), "ids run from -1 to 1"),
        (torch.tensor([[0, 1, 2]]), "ids run from 0 to 2, but there are 2 groups"),
    ],
)
def test_ids_that_cannot_be_groups(ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Groups(ids, 2)
