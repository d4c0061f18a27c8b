"""Edits of the newest row alone: beside other edits, with padding on either side, and with the prompt in chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import regard
from regard.hooks.session import Call
from tests.families import Family, Inputs, build

SPECS: list[dict[str, Any]] = [{"text": 5, "seed": 1}, {"text": 9, "seed": 2, "images": 1}]
CLOSE = {"atol": 2e-4, "rtol": 1e-3}


def raised(call: Call) -> Tensor:
    """The newest rows only; `Call.scores` is held against the definition on the way."""
    key = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
    scores = torch.einsum("bhqd,bhkd->bhqk", call.query, key) * call.scale
    assert torch.allclose(call.scores(), scores, atol=1e-5)
    return 0.9 * scores.abs() * call.image[:, None, None]


def raised_of_all(call: Call) -> Tensor:
    """The same for every row, with zeros on all but the newest of each sample."""
    key = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
    scores = torch.einsum("bhqd,bhkd->bhqk", call.query, key) * call.scale
    bias = 0.9 * scores.abs() * call.image[:, None, None]
    session = call.session
    if not session.prefill:
        return bias
    padding = session.padding if session.padding is not None else torch.zeros_like(session.image)
    end = torch.where(padding, -1, torch.arange(session.prompt)).amax(1)
    return bias * (call.positions[None] == end[:, None])[:, None, :, None]


def policy(layers: tuple[int, ...]) -> regard.MassPolicy:
    def coefficients(masses: Tensor) -> Tensor:
        return torch.stack([1 - 0.5 * masses[..., 1], 1 + masses[..., 0]], -1)

    return regard.MassPolicy(layers, lambda call: call.session.image.long(), coefficients, ("text", "image"))


def generate(family: Family, inputs: Inputs, *edits: Any, **settings: Any) -> Tensor:
    settings |= {
        "do_sample": False,
        "max_new_tokens": 4,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with regard.apply(family.model, *edits):
        return torch.stack(family.model.generate(**inputs, **settings).logits, 1)


def right_padded(family: Family) -> Inputs:
    short, long = (family.inputs(text=count, seed=seed) for count, seed in ((5, 1), (9, 2)))
    missing = long["input_ids"].shape[1] - short["input_ids"].shape[1]
    ids = torch.cat([F.pad(short["input_ids"], (0, missing)), long["input_ids"]])
    ones = torch.ones_like(short["input_ids"])
    mask = torch.cat([F.pad(ones, (0, missing)), torch.ones_like(long["input_ids"])])
    pixels = torch.cat([short["pixel_values"], long["pixel_values"]])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "with a mass policy"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "paligemma", "instructblip"])
def test_newest_rows_equal_a_bias_of_all_rows_with_zeros(name: str, beside: bool) -> None:
    family = build(name)
    layers = tuple(range(min(3, len(family.attentions))))
    inputs, others = family.batch(SPECS), [policy(layers)] if beside else []
    found = generate(family, inputs, regard.Bias(layers, raised, rows="last"), *others)
    expected = generate(family, inputs, regard.Bias(layers, raised_of_all), *others)
    assert torch.allclose(found, expected, **CLOSE)
    assert (found - generate(family, inputs, *others)).abs().max() > 1e-2


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "with a mass policy"])
def test_padding_on_the_right(beside: bool) -> None:
    family, layers = build("llava"), (1, 2)
    inputs, others = right_padded(family), [policy(layers)] if beside else []

    def forward(*edits: Any) -> Tensor:
        with regard.apply(family.model, *edits), torch.no_grad():
            return family.model(**inputs).logits

    found = forward(regard.Bias(layers, raised, rows="last"), *others)
    assert torch.allclose(found, forward(regard.Bias(layers, raised_of_all), *others), **CLOSE)
    assert (found - forward(*others)).abs().max() > 1e-3


@pytest.mark.parametrize("chunk", [3, 4, 19])
def test_a_prompt_in_chunks(chunk: int) -> None:
    family = build("llava")
    inputs = family.batch(SPECS)
    for edit in (
        regard.Bias((1, 2), raised, rows="last"),
        regard.PAI(alpha=0.9, gamma=1.0, layers=(1, 2)),
    ):
        whole = generate(family, inputs, edit)
        assert torch.allclose(generate(family, inputs, edit, prefill_chunk_size=chunk), whole, **CLOSE)
        assert (whole - generate(family, inputs)).abs().max() > 1e-3


def test_released_pai_leaves_the_prompts_row_alone_under_contrast() -> None:
    family = build("llava")
    inputs = family.batch(SPECS)

    def pai(**settings: Any) -> Tensor:
        return generate(family, inputs, regard.PAI(layers=(1, 2), **settings))

    released, unraised = pai(alpha=0.9, gamma=1.5, variant="released"), pai(alpha=0.0, gamma=1.5)
    finite = ~unraised[:, 0].isinf()
    assert torch.equal(finite, ~released[:, 0].isinf())
    assert torch.allclose(released[:, 0][finite], unraised[:, 0][finite], **CLOSE)
    paper = pai(alpha=0.9, gamma=1.5)
    both = finite & ~paper[:, 0].isinf()
    assert (released[:, 0] - paper[:, 0])[both].abs().max() > 1e-3
    assert torch.equal(pai(alpha=0.9, gamma=1.0, variant="released"), pai(alpha=0.9, gamma=1.0))


def test_pai_starts_at_the_third_layer() -> None:
    family = build("llava")
    inputs = family.batch(SPECS)
    layers = tuple(range(2, len(family.attentions)))
    whole = generate(family, inputs, regard.PAI(alpha=0.9, gamma=1.0))
    assert torch.equal(whole, generate(family, inputs, regard.PAI(alpha=0.9, gamma=1.0, layers=layers)))
    assert not torch.equal(whole, generate(family, inputs))


def test_mma_without_layers_changes_nothing() -> None:
    family = build("llava")
    inputs = family.batch(SPECS)
    assert torch.equal(generate(family, inputs, regard.MMA(layers=())), generate(family, inputs))
    assert not torch.equal(generate(family, inputs, regard.MMA()), generate(family, inputs))
