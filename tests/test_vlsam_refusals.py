"""What `object_maps` refuses, and that it does so before the model runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import build

import regard

_ONE = {"positions": [[-1]]}


@pytest.mark.parametrize(
    ("name", "spec", "how", "error", "match"),
    [
        ("blip2", {}, _ONE, regard.CannotEdit, "has a qformer_config"),
        ("instructblip", {}, _ONE, regard.CannotEdit, "has a qformer_config"),
        ("mllama", {}, _ONE, regard.CannotEdit, "by cross-attention"),
        ("llava", {"image": False}, _ONE, regard.NoImageTokens, "none of the 1 prompts"),
        ("llava", {}, {}, ValueError, "either words or positions"),
        ("llava", {}, {"words": ["dog"], **_ONE}, ValueError, "either words or positions"),
        ("llava", {}, {"words": "dog"}, ValueError, r"give \['dog'\]"),
        ("llava", {}, {"words": [" "]}, regard.NoObjectWords, "no object words"),
        ("llava", {}, {"words": []}, regard.NoObjectWords, "no object words"),
        ("llava", {}, {"words": ["dog"]}, regard.CannotEdit, "processor or tokenizer"),
        ("llava", {}, {**_ONE, "max_new_tokens": -1}, ValueError, "max_new_tokens=-1"),
        ("llava", {}, {**_ONE, "output": torch.zeros(2, 3).long()}, ValueError, r"B = 1, not \(2, 3\)"),
        (
            "llava",
            {},
            {**_ONE, "output": torch.ones(1, 1).long(), "max_new_tokens": 2},
            ValueError,
            "and an output",
        ),
        ("llava", {"batch": 2}, _ONE, ValueError, "the batch has 2"),
    ],
)
def test_refusals_come_before_the_model_runs(
    name: str, spec: dict[str, Any], how: dict[str, Any], error: type[Exception], match: str
) -> None:
    family = build(name)
    inputs = family.inputs(**spec)

    def ran(*_: Any) -> None:
        raise AssertionError("the model ran")

    family.decoder.register_forward_pre_hook(ran)
    with pytest.raises(error, match=match):
        regard.object_maps(family.model, inputs, **how)
    assert family.decoder.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("pieces", [[], [99], [-99]])
def test_positions_out_of_range_say_so(pieces: list[int]) -> None:
    with pytest.raises(ValueError, match="positions of an object are"):
        regard.object_maps(build("llava").model, build("llava").item(), positions=[pieces])


def test_position_ids_and_missing_ids_are_refused() -> None:
    family = build("llava")
    item = family.item()
    with pytest.raises(regard.CannotEdit, match="position_ids"):
        regard.object_maps(family.model, item | {"position_ids": item["input_ids"]}, positions=[[-1]])
    with pytest.raises(regard.CannotEdit, match="without input_ids"):
        regard.object_maps(family.model, {"attention_mask": item["attention_mask"]}, positions=[[-1]])


def test_images_that_do_not_fit_their_tokens_are_refused() -> None:
    family = build("llava")
    item = family.item()
    item["pixel_values"] = item["pixel_values"].repeat(2, 1, 1, 1)
    with pytest.raises(regard.CannotEdit, match="9 image tokens do not share out among 2 images"):
        regard.object_maps(family.model, item, positions=[[-1]])
    tiled = build("llava_next")
    item = tiled.item(images=2)
    gap = item["input_ids"].shape[1]
    kept = [at for at in range(gap) if at != 2 + int(tiled.image_tokens(item).sum()) // 2]
    item = {
        key: value[:, kept] if key in ("input_ids", "attention_mask") else value
        for key, value in item.items()
    }
    with pytest.raises(regard.CannotEdit, match="2 images in tiles, but their tokens stand in 1 groups"):
        regard.object_maps(tiled.model, item, positions=[[-1]])
