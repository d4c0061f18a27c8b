"""Modality-mutual attention against a stock model that is given the whole mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard.interventions.mma import MMA, mutual
from tests.families import Family, Inputs, build


def by_hand(family: Family, inputs: Inputs, tag: int) -> Tensor:
    """(1, 1, S, S) bool: causal, and image rows see text keys up to the answer's tag."""
    image = family.image_tokens(inputs)[0]
    size = len(image)
    visible = torch.zeros(1, 1, size, size, dtype=torch.bool)
    for row in range(size):
        for key in range(size):
            asked = bool(image[row]) and not image[key] and key < size - tag
            visible[0, 0, row, key] = key <= row or asked
    return visible


@torch.no_grad()
def stock(family: Family, inputs: Inputs, ids: Tensor, tag: int) -> Tensor:
    """Logits (steps, V) of whole forwards; the answer's rows are causal and hidden from the image."""
    rows, prompt = [], by_hand(family, inputs, tag)
    for token in ids:
        size = inputs["input_ids"].shape[1]
        visible = torch.ones(size, size, dtype=torch.bool).tril()[None, None].clone()
        visible[..., : prompt.shape[2], : prompt.shape[3]] = prompt
        rows.append(family.model(**{**inputs, "attention_mask": visible}, use_cache=False).logits[0, -1])
        inputs = family.grow(inputs, token[None])
    return torch.stack(rows)


@pytest.mark.parametrize("tag", [0, 2])
@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl"])
def test_cached_batches_equal_whole_forwards(name: str, tag: int) -> None:
    """One image, two images, and padding; every generated step."""
    family = build(name)
    specs: list[dict[str, Any]] = [{"text": 5, "seed": 1}, {"text": 9, "seed": 2, "images": 2}]
    settings = {
        "do_sample": False,
        "max_new_tokens": 3,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    plain = family.model.generate(**family.batch(specs), **settings)
    with regard.apply(family.model, MMA(tag=tag)):
        out = family.model.generate(**family.batch(specs), **settings)
    ids, logits = out.sequences[:, -3:], torch.stack(out.logits, 1)
    assert (logits - torch.stack(plain.logits, 1)).abs().amax((1, 2)).min() > 1e-2
    for row, spec in enumerate(specs):
        expected = stock(family, family.batch([spec]), ids[row], tag)
        assert torch.allclose(logits[row], expected, atol=5e-4, rtol=1e-3), row


def test_without_a_cache() -> None:
    family = build("llava")
    inputs = family.batch([{"text": 5, "seed": 1}, {"text": 9, "seed": 2}])
    settings = {
        "do_sample": False,
        "max_new_tokens": 3,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with regard.apply(family.model, MMA()):
        cached, free = (
            family.model.generate(**inputs, **settings, use_cache=cache) for cache in (True, False)
        )
    assert torch.allclose(torch.stack(cached.logits), torch.stack(free.logits), atol=1e-4)


def test_image_rows_change_only_with_the_question() -> None:
    """The state of an image token depends on the words behind it; in a stock model it does not."""
    family = build("llava")
    one, other = family.inputs(text=6), family.inputs(text=6)
    other["input_ids"][0, -3] += 1
    image = family.image_tokens(one)[0]

    def states(inputs: Inputs) -> Tensor:
        with torch.no_grad():
            return family.model(**inputs, output_hidden_states=True).hidden_states[-1][0, image]

    assert torch.equal(states(one), states(other))
    with regard.apply(family.model, "mma"):
        assert (states(one) - states(other)).abs().max() > 1e-3
    with regard.apply(family.model, MMA(tag=3)):  # the changed word is in the tag
        assert torch.equal(states(one), states(other))


def test_pairs_of_a_padded_sample() -> None:
    image = torch.tensor([[0, 0, 1, 1, 0, 1, 0, 0]], dtype=torch.bool)
    padding = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    pairs = mutual(image, padding, 1)[0]
    assert [keys.nonzero().flatten().tolist() for keys in pairs] == [[], [], [4, 6], [4, 6], [], [6], [], []]


def test_the_tag_comes_from_the_chat_template() -> None:
    _, processor = regard.load_miniature("lvlm")
    tag = MMA().with_processor(processor).tag
    chat = [{"role": "user", "content": [{"type": "text", "text": "is there a cat ?"}]}]
    tokens = [
        len(processor.tokenizer(processor.apply_chat_template(chat, add_generation_prompt=flag))["input_ids"])
        for flag in (True, False)
    ]
    assert tag == tokens[0] - tokens[1] > 0
    with pytest.raises(ValueError, match="tag is a number of tokens"):
        MMA(tag=-1)
