"""OPERA's parts by themselves: rows of attention, where a search returns to, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import build

import regard
from regard.hooks.errors import CannotEdit
from regard.interventions.opera import OPERA, attention_rows, over_trust
from regard.interventions.opera_search import Search

PLAIN = OPERA(penalty_weight=0, threshold=None)


def test_attention_rows_of_grouped_heads() -> None:
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 6, 8)
    visible = torch.ones(2, 1, 3, 6, dtype=torch.bool)
    visible[:, :, :, 3:] = torch.eye(3, dtype=torch.bool)
    found = attention_rows(query, key, 0.3, visible)
    for b in range(2):
        for q in range(3):
            keys = [0, 1, 2, 3 + q]
            rows = [(query[b, h, q] @ key[b, h // 2, keys].T * 0.3).softmax(-1) for h in range(4)]
            row = torch.stack(rows).amax(0)
            torch.testing.assert_close(found[b, q, keys], row / row.sum())
    assert float(found[0, 0, 4]) == 0


def test_long_products_neither_underflow_nor_overflow() -> None:
    sums = torch.tensor([[[-500.0, -90.0, -100.0], [3.0, 400.0, 1.0]]])
    phi, column = over_trust(sums, 1e-7, 512)
    assert column.tolist() == [[1, 1]]
    assert phi.tolist() == [[0.0, 1e4]]
    assert over_trust(sums, 1e-7, 1)[1].tolist() == [[2, 2]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 1}, "num_beams=5"),
        ({}, "num_beams=5"),
        ({"num_beams": 3, "do_sample": True}, "do_sample"),
        ({"num_beams": 3, "use_cache": False}, "use_cache=True"),
        ({"num_beams": 3, "cache_implementation": "static"}, "cache_implementation"),
        ({"num_beams": 3, "output_attentions": True}, "output_attentions"),
        ({"num_beams": 3, "guidance_scale": 1.5}, "guidance_scale"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_runs(options: dict[str, Any], words: str) -> None:
    family, ran = build("llava"), []
    handle = family.decoder.register_forward_hook(lambda *_: ran.append(1))
    with regard.apply(family.model, "opera"), pytest.raises(CannotEdit, match=words):
        family.model.generate(**family.item(), max_new_tokens=4, **options)
    with regard.apply(family.model, "opera"), pytest.raises(CannotEdit, match="2 prompts"):
        family.model.generate(**family.inputs(2), max_new_tokens=4, num_beams=2, do_sample=False)
    handle.remove()
    assert not ran


@pytest.mark.parametrize("name", ["gemma3", "mllama", "blip2", "paligemma"])
def test_decoders_whose_rows_cannot_be_placed_are_refused(name: str) -> None:
    family = build(name)
    with pytest.raises(CannotEdit, match="one position"), regard.apply(family.model, "opera"):
        pass


@pytest.mark.parametrize(
    "edit",
    [
        regard.Logits(lambda logits, step: logits),
        regard.Bias((0,), lambda call: None, rows="last", needs_image=False),
        regard.Exit((0,)),
    ],
)
def test_edits_of_the_newest_row_are_refused_beside_it(edit: Any) -> None:
    family = build("llava")
    with pytest.raises(CannotEdit, match="opera looks ahead"), regard.apply(family.model, "opera", edit):
        pass


def test_edits_of_all_rows_act_in_it_as_in_stock_beam_search() -> None:
    family, options = build("llava"), {"num_beams": 5, "max_new_tokens": 8, "do_sample": False}
    edits = regard.VHR(layers=(0, 1)), regard.Bias((1,), lambda call: 2.0 * call.image[:, None, None])
    inputs = family.item(seed=1)
    with regard.apply(family.model, *edits):
        want = family.model.generate(**inputs, **options)
    with regard.apply(family.model, *edits, PLAIN):
        assert torch.equal(family.model.generate(**inputs, **options), want)
    assert not torch.equal(family.model.generate(**inputs, **options), want)


def test_a_place_is_returned_to_once_per_candidate_then_the_one_before() -> None:
    search = Search.__new__(Search)
    search.opera, search.noted, search.returns = OPERA(candidates=2, threshold=2, warmup=3), [], {}
    search.states = search.chosen = {step: [] for step in range(9)}  # type: ignore[assignment]
    for step in range(3):
        assert search._place_to_return_to([[2, 2, 4], [2, 2, 4]], step) is None  # columns before the warmup
    found = [search._place_to_return_to([[4, 4, 5], [6, 4, 4]], 8) for _ in range(8)]
    assert found == [None, None, 5, 5, 4, 4, None, None]
    search.returns.clear()
    assert search._place_to_return_to([[4, 4], [4, 4]], 5) is None  # nothing was chosen there yet
    assert search._place_to_return_to([[4, 4], [7, 7]], 8) == 5  # the beams' history counts, and ties go low


def test_a_return_forgets_what_came_later_and_forbids_what_was_chosen_there() -> None:
    search: Any = Search.__new__(Search)
    search.cache, search.cached, search.first = SimpleNamespace(layers=[]), 0, torch.zeros(2, 4)
    search.noted = [[step] for step in range(6)]
    search.states = {step: f"state {step}" for step in range(5)}
    search.chosen = {step: [(0, 10 + step), (1, 20 + step)] for step in range(5)}
    search.forbidden = {0: [(1, 3)], 4: [(0, 5)]}
    state, logits = search._go_back(0)
    assert (state, logits is search.first) == ("state 0", True)
    assert search.noted == [[0]]  # of the step that is chosen anew the column stays noted
    assert search.forbidden == {0: [(1, 3), (0, 10), (1, 20)]}
    assert search.chosen == search.states == {}


@pytest.mark.parametrize(
    "bad",
    [
        {"variant": "mine"},
        {"candidates": 1},
        {"penalty_weight": -1},
        {"scale": 0},
        {"threshold": -1},
        {"window": 0},
    ],
)
def test_bad_values_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        OPERA(**bad)
