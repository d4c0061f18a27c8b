"""AGLA against stock forwards of images that were masked by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard.hooks.errors import CannotEdit
from regard.hooks.pixels import PixelFormat, fold_patches, tile_masks, unfold_patches
from regard.interventions.agla import AGLA, question_of, rows_of_images
from regard.interventions.matching import Match
from tests.families import Family, build

FORM = PixelFormat((0.4, 0.5, 0.6), (0.2, 0.3, 0.25), patch=4, pinpoints=((8, 16), (16, 8), (16, 16)))
STEPS = 4
SPECS: list[dict[str, Any]] = [{"text": 4, "seed": 1}, {"text": 9, "seed": 2}]


def corner(images: Sequence[Tensor], texts: Sequence[str]) -> Match:
    """A smooth map that falls from the top left; half of the pixels stay."""
    ramp = torch.arange(6.0)
    return Match((10 - ramp[:, None] - 0.9 * ramp).expand(len(images), 6, 6), torch.ones(len(images)))


def everything(images: Sequence[Tensor], texts: Sequence[str]) -> Match:
    return Match(torch.ones(len(images), 3, 3), torch.ones(len(images)))


def generate(family: Family, inputs: dict[str, Tensor], *edits: Any) -> tuple[Tensor, Tensor]:
    with regard.apply(family.model, *edits):
        out = family.model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return out.sequences[:, -STEPS:], torch.stack(out.logits, 1)


def forced(family: Family, inputs: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Stock logits without a cache, (B, steps, V), where each step is given the ids of the run."""
    found = []
    for i in range(ids.shape[1]):
        with torch.no_grad():
            found.append(family.model(**inputs, use_cache=False).logits[:, -1])
        inputs = family.grow(inputs, ids[:, i])
    return torch.stack(found, 1)


def cut(fused: Tensor, logits: Tensor, beta: float) -> Tensor:
    return torch.where(
        logits.softmax(-1) < beta * logits.softmax(-1).amax(-1, keepdim=True), -math.inf, fused
    )


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "llava_next"])
def test_against_masked_pixels_without_a_cache(name: str, variant: Any) -> None:
    family = build(name)
    inputs = family.batch(SPECS)
    agla = AGLA(variant=variant, matcher=corner, text="a dog", pixels=FORM)
    ids, got = generate(family, inputs, agla)
    keeps = [k.clone() for k in _half(FORM.images(inputs))]
    dark = {**inputs, "pixel_values": FORM.blackened(inputs, keeps)}
    assert not torch.equal(dark["pixel_values"], inputs["pixel_values"])
    z, local = forced(family, inputs, ids), forced(family, dark, ids)
    assert (z - local)[:, 2:].abs().max() > 1e-2
    if variant == "released":
        local = torch.cat([local[:, :1], z[:, 1:]], 1)
    assert torch.allclose(got, cut(z + 2 * local, z, 0.5), atol=2e-3)


def _half(images: list[Tensor]) -> list[Tensor]:
    from regard.interventions.matching import mask_from

    return [
        mask_from(m, 0.5, (i.shape[1], i.shape[2]))
        for m, i in zip(corner(images, ()).maps, images, strict=True)
    ]


def test_an_equal_image_is_plausibility_and_temperature() -> None:
    family = build("llava")
    inputs = family.batch(SPECS)
    ids, got = generate(family, inputs, AGLA(matcher=everything, text="a dog", pixels=FORM))
    z = forced(family, inputs, ids)
    assert torch.allclose(got, cut(3 * z, z, 0.5), atol=2e-3)
    plain = generate(family, inputs)[1]
    assert torch.equal(generate(family, inputs, AGLA(alpha=0, beta=0))[1], plain)


def test_rows_without_an_image_keep_their_logits() -> None:
    family = build("llava")
    inputs = family.batch([{"text": 5, "image": False, "seed": 3}, {"text": 7, "seed": 4}])
    ids, got = generate(family, inputs, AGLA(matcher=corner, text="a dog", pixels=FORM))
    z = forced(family, inputs, ids)
    assert torch.allclose(got[0], z[0], atol=2e-3)
    assert got[1].isinf().any()


def test_pixels_come_back() -> None:
    inputs = build("qwen2_vl").batch([{"size": 0}, {"size": 1}, {"size": 2}])
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    assert torch.equal(fold_patches(unfold_patches(pixels, grid, FORM), FORM), pixels)
    from transformers.models.qwen2_vl import Qwen2VLImageProcessor as Processor

    maker = Processor(patch_size=4, min_pixels=64, max_pixels=4096, do_resize=False)
    image = torch.randint(0, 256, (3, 16, 24), dtype=torch.uint8)
    made = maker(images=[image.permute(1, 2, 0).numpy()], return_tensors="pt")
    (back,) = PixelFormat.of(maker).images(dict(made))
    assert torch.allclose(back, image / 255, atol=1e-3)
    llava = build("llava").inputs()
    mean, std = (torch.tensor(v)[:, None, None] for v in (FORM.mean, FORM.std))
    assert torch.allclose(FORM.images(llava)[0], (llava["pixel_values"][0] * std + mean).clamp(0, 1))
    black = FORM.blackened(llava, [torch.zeros(12, 12, dtype=torch.bool)])
    assert (black * std + mean).abs().max() < 1e-6


def test_tiles_show_the_mask_of_the_whole() -> None:
    keep = torch.zeros(8, 8, dtype=torch.bool)
    keep[:, 4:] = True
    tiles = tile_masks(keep, [8, 16], FORM)
    assert tiles.shape == (3, 8, 8)
    assert not tiles[1].any()
    assert tiles[2].all()


def test_questions_and_rows() -> None:
    asked = "Is there a dog in the image?"
    for text in (
        f"USER: \n{asked} Please answer this question with one word. ASSISTANT:",
        f"system\nYou are a helpful assistant.\nuser\n{asked}\nassistant\n",
        f"[INST] <image>\n{asked} [/INST]",
        asked,
    ):
        assert question_of(text) == asked
    image = torch.tensor([[0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]]).bool()
    assert rows_of_images(image, 3) == [0, 0, 2]
    assert rows_of_images(image, 4) == [0, 0, 2, 2]
    with pytest.raises(CannotEdit, match="unclear"):
        rows_of_images(image, 5)


def test_errors() -> None:
    family = build("llava")
    inputs = family.inputs()
    for agla, match in (
        (AGLA(), "matching model"),
        (AGLA(matcher=corner), "processor"),
        (
            AGLA(
                matcher=lambda i, t: Match(torch.full((1, 2, 2), torch.nan), torch.ones(1)),
                text="a",
                pixels=FORM,
            ),
            "finite",
        ),
    ):
        with pytest.raises(CannotEdit, match=match):
            generate(family, inputs, agla)

    class Silent:
        def decode(self, ids: Any, **settings: Any) -> str:
            return "USER: <image>\n ASSISTANT:"

    with pytest.raises(CannotEdit, match="no words"):
        generate(family, inputs, AGLA(matcher=corner, pixels=FORM, tokenizer=Silent()))
    smol = build("idefics3")
    with pytest.raises(CannotEdit, match="What works"):
        generate(smol, smol.inputs(), AGLA(matcher=corner, text="a dog", pixels=FORM))
    for bad in ({"alpha": -1}, {"beta": 2}, {"variant": "x"}, {"text": "..."}):
        with pytest.raises(ValueError, match=r"must|strength|fraction"):
            AGLA(**bad)
