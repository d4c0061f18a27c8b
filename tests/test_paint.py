"""PAINT against whole sequences in float64 with an attention function of its own, one sample at a time."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import families
import numpy as np
import pytest
import torch
import transformers
from families import BOS, Family, build
from oracles import FORCED, assert_equal, logits_of, sequence, wide
from torch import Tensor
from transformers import AttentionInterface

import regard
from regard.hooks.anatomy import anatomy
from regard.hooks.tower import find_tower
from regard.interventions.paint import local_tokens, summary_tokens

LAYERS = (2, 3)


def deep(name: str) -> Family:
    """A family in float64 with 4 layers, a tower of 4 layers, and (LLaVA) 36 patches an image."""
    config = copy.deepcopy(build(name).model.config)
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 4
    images = build(name).images
    if name == "llava":
        config.vision_config.image_size = 24
        images = functools.partial(families._plain, edge=24, tokens=36)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        net = transformers.AutoModelForImageTextToText.from_config(config)
    families._initialise(net, 7, False)
    net.generation_config.update(eos_token_id=None, pad_token_id=0, bos_token_id=BOS)
    return replace(build(name), model=net.double().eval(), text_layers=4, images=images)


@pytest.fixture(scope="module")
def llava() -> Family:
    return deep("llava")


@pytest.fixture(scope="module")
def llava_next() -> Family:
    return deep("llava_next")


# -------------------------------------------------------------------------------------------- the oracle


def token_sets(family: Family, pixels: Tensor, share: float = 0.25) -> tuple[list[int], list[int]]:
    """T and B of one image by a stock eager tower."""
    _, tower = find_tower(copy.deepcopy(family.model))
    tower.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.no_grad():
        probs = tower(pixels[None], output_attentions=True).attentions
    first, late = (probs[i][0, :, 0, 1:].sum(0).numpy() for i in (0, 2))
    low, high = np.percentile(late, [25, 75])
    summary = [j for j in range(len(late)) if late[j] > high + 1.5 * (high - low)]
    local = np.argsort(-first)[: int(len(first) * share)].tolist()
    return [j for j in local if j not in summary], summary


_BOOST: list[dict[str, Any]] = []


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """Causal attention of one unpadded sample; rows from `row` on are boosted."""
    at = _BOOST[-1]
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    if module.layer_idx in at["layers"]:
        for head in at["heads"] or range(scores.shape[1]):
            for row in range(at["row"], scores.shape[2]):
                for token, strength in at["boosts"].items():
                    scores[0, head, row, token] += strength * scores[0, head, row, token].abs()
    future = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
    probs = scores.masked_fill(future, -torch.inf).softmax(-1)
    return (probs @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("paint_oracle", _attention)


@contextmanager
def boosted(family: Family, **at: Any) -> Iterator[None]:
    decoder: Any = family.decoder
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("paint_oracle")
    _BOOST.append(at)
    try:
        yield
    finally:
        _BOOST.pop()
        decoder.set_attn_implementation(before)


@torch.no_grad()
def reference(
    family: Family,
    item: dict[str, Tensor],
    alpha: float = 0.7,
    beta: float = 0.4,
    layers: tuple[int, ...] = LAYERS,
    heads: tuple[int, ...] | None = None,
) -> Tensor:
    """Logits (S + T - 1, V)."""
    item = wide(item)
    starts = _starts(family, item)
    boosts: dict[int, float] = {}
    for number, start in enumerate(starts):
        pixels = item["pixel_values"][number]
        local, summary = token_sets(family, pixels if pixels.ndim == 3 else pixels[0])
        boosts |= {start + j: alpha for j in local} | {start + j: beta for j in summary}
    whole = sequence(family, item)
    with boosted(family, boosts=boosts, layers=layers, heads=heads, row=whole.prompt - 1):
        return family.model(**whole.inputs, use_cache=False).logits[0]


def _starts(family: Family, item: dict[str, Tensor]) -> list[int]:
    """First token of each image."""
    image = family.image_tokens(item)[0].tolist()
    return [s for s, here in enumerate(image) if here and not (s and image[s - 1])]


def moved(family: Family, inputs: dict[str, Tensor], found: tuple[Tensor, Tensor]) -> float:
    return float((logits_of(family, inputs)[1] - found[1]).abs().amax((0, 2)).min())


# ---------------------------------------------------------------------------------------------- the edit


def test_the_two_sets_are_there_and_overlap(llava: Family) -> None:
    """Else the tests below would not see a set mixed up."""
    found = [token_sets(llava, llava.item(seed=s)["pixel_values"][0].double()) for s in range(1, 7)]
    assert any(summary for _, summary in found)
    assert any(len(local) < 9 for local, _ in found)


def test_one_sample(llava: Family) -> None:
    for seed in range(1, 7):
        item = llava.item(text=5, seed=seed)
        with regard.apply(llava.model, regard.PAINT()):
            found = logits_of(llava, item)
        assert_equal(llava, item, 0, found, reference(llava, item))
        assert moved(llava, item, found) > 1e-2


def test_a_padded_batch_with_unequal_images(llava: Family) -> None:
    specs: list[dict[str, Any]] = [{"text": 4, "seed": 3}, {"text": 9, "seed": 2, "images": 2}]
    specs += [{"text": 7, "seed": 5, "image": False}]
    inputs = llava.batch(specs)
    with regard.apply(llava.model, regard.PAINT()):
        found = logits_of(llava, inputs)
    for row, spec in enumerate(specs[:2]):
        assert_equal(llava, inputs, row, found, reference(llava, llava.item(**spec)))
    plain = logits_of(llava, inputs)
    torch.testing.assert_close(found[1][2], plain[1][2], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"variant": "released"}, {"beta": 0.3}),
        ({"alpha": 0.0, "beta": 0.6}, {"alpha": 0.0, "beta": 0.6}),
        ({"heads": (1, 2)}, {"heads": (1, 2)}),
        ({"layers": (0, 3)}, {"layers": (0, 3)}),
    ],
    ids=str,
)
def test_settings(llava: Family, settings: dict[str, Any], want: dict[str, Any]) -> None:
    item = llava.item(text=5, seed=_with_summary(llava))
    with regard.apply(llava.model, regard.PAINT(**settings)):
        found = logits_of(llava, item)
    assert_equal(llava, item, 0, found, reference(llava, item, **want))
    with regard.apply(llava.model, regard.PAINT()):
        default = logits_of(llava, item)
    assert (default[1] - found[1]).abs().max() > 1e-4


@functools.cache
def _summary_seed() -> int:
    family = deep("llava")
    return next(
        s for s in range(1, 40) if token_sets(family, family.item(seed=s)["pixel_values"][0].double())[1]
    )


def _with_summary(family: Family) -> int:
    return _summary_seed()


def test_the_whole_image_crop_of_llava_next(llava_next: Family) -> None:
    specs: list[dict[str, Any]] = [{"size": 2, "seed": 1}, {"size": 1, "seed": 2, "text": 4}]
    inputs = llava_next.batch(specs)
    with regard.apply(llava_next.model, regard.PAINT()):
        found = logits_of(llava_next, inputs)
    for row, spec in enumerate(specs):
        assert_equal(llava_next, inputs, row, found, reference(llava_next, llava_next.item(**spec)))
    assert moved(llava_next, inputs, found) > 1e-3


@torch.no_grad()
def test_right_padding_and_no_cache(llava: Family) -> None:
    item = llava.item(text=5, seed=1)
    pad = {
        "input_ids": torch.zeros(1, 3, dtype=torch.long),
        "attention_mask": torch.zeros(1, 3, dtype=torch.long),
    }
    right = {key: torch.cat([value, pad[key]], 1) if key in pad else value for key, value in item.items()}
    want = reference(llava, item)
    length = item["input_ids"].shape[1]
    with regard.apply(llava.model, regard.PAINT()):
        found = llava.model(**wide(right)).logits[0, :length]
        cached = llava.model.generate(**wide(item), max_new_tokens=4, do_sample=False, **_LOGITS).logits
        free = llava.model.generate(
            **wide(item), max_new_tokens=4, do_sample=False, use_cache=False, **_LOGITS
        ).logits
    torch.testing.assert_close(found, want[:length], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(torch.stack(cached), torch.stack(free), atol=1e-5, rtol=1e-6)


_LOGITS: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}


def test_nothing_to_do_is_bit_equal(llava: Family) -> None:
    item = llava.item(text=5, seed=1)
    plain = logits_of(llava, item)
    with regard.apply(llava.model, regard.PAINT(alpha=0.0, beta=0.0)):
        found = logits_of(llava, item)
    assert torch.equal(plain[1], found[1])
    assert not regard.PAINT(alpha=0.0, beta=0.0).edits(anatomy(llava.model))


# -------------------------------------------------------------------- pure functions, defaults and errors


def test_local_tokens_are_a_share_of_the_patches_without_cls() -> None:
    scores = torch.tensor([[[9.0, 1.0, 5.0, 2.0, 4.0, 0.0, 0.0, 0.0, 0.0]]])
    assert local_tokens(scores, 0.25)[0].nonzero().flatten().tolist() == [1, 3]
    assert local_tokens(scores, 0.3)[0].sum() == 2  # int, not rounding
    assert not local_tokens(scores, 0.1).any()


def test_summary_tokens_are_quartile_outliers() -> None:
    probs = torch.tensor([[0.5, *[0.01, 0.02, 0.03, 0.04, 0.05], 0.35]])
    assert summary_tokens(probs.log()[:, None]).tolist() == [[False] * 5 + [True]]
    even = torch.full((1, 2, 7), 1 / 7).log()
    assert not summary_tokens(even).any()  # an empty set is no error
    assert local_tokens(even, 0.0).sum() == 0


def test_defaults_and_released_numbers(llava: Family) -> None:
    assert (regard.PAINT().alpha, regard.PAINT().summary_boost, regard.PAINT().local_share) == (
        0.7,
        0.4,
        0.25,
    )
    assert regard.PAINT(variant="released").summary_boost == 0.3
    assert regard.PAINT(variant="released", beta=0.1).summary_boost == 0.1
    bias = regard.recipe("paint", llava.model).edits(anatomy(llava.model))[-1]
    assert bias.layers == LAYERS  # type: ignore[union-attr]


def test_bad_values_and_models_say_so() -> None:
    for bad, match in (
        ({"alpha": -0.1}, "alpha is a boost"),
        ({"beta": float("nan")}, "beta is a boost"),
        ({"local_share": 1.5}, "local_share is a fraction"),
        ({"variant": "mine"}, "'paper' or 'released', got 'mine'"),
    ):
        with pytest.raises(ValueError, match=match):
            regard.PAINT(**bad)  # type: ignore[arg-type]
    for name in ("instructblip", "qwen2_vl"):
        model = build(name).model
        with pytest.raises(regard.CannotEdit, match=f"this is {model.config.model_type}"):
            regard.apply(model, "paint").start()
    net = build("llava").model
    with pytest.raises(regard.OutOfRange, match="head 9"):
        regard.apply(net, regard.PAINT(heads=(9,))).start()
    assert len(FORCED) > 2
