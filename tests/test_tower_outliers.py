"""The outliers that are shown: those of a stock eager tower, and those that DAMRO's second stream keeps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import Family, Inputs, build
from torch import Tensor

import regard
from regard.hooks.session import Session
from regard.hooks.tower import find_tower
from regard.interventions.tower_outliers import cls_outliers

SPECS: list[dict[str, Any]] = [{"text": 5, "seed": 1}, {"text": 9, "seed": 2}]


@torch.no_grad()
def eager(family: Family, pixels: Tensor, layer: int) -> Tensor:
    """Probs (N, H, S, S) of one layer of a stock eager tower, float64."""
    _, tower = find_tower(copy.deepcopy(family.model).double())
    tower.set_attn_implementation("eager")
    return tower(pixels.double(), output_attentions=True).attentions[layer]


def places(chosen: Tensor) -> list[set[int]]:
    return [set(row.nonzero()[:, 0].tolist()) for row in chosen.flatten(1)]


def largest(values: Tensor, count: int) -> list[set[int]]:
    """Places of the largest values of each row (N, P)."""
    return [set(sorted(range(len(row)), key=lambda j: -float(row[j]))[:count]) for row in values]


@pytest.mark.parametrize(
    ("name", "more", "grid"),
    [
        ("llava", {}, (3, 3)),
        ("llava", {"variant": "early"}, (3, 3)),
        ("llava", {"variant": "medheval"}, (3, 3)),
        ("llava_next", {}, (2, 2)),
        ("instructblip", {}, (2, 2)),
        ("instructblip", {"variant": "released"}, (2, 2)),
        ("paligemma", {"extension": "received"}, (3, 3)),
    ],
)
def test_probs_and_outliers_are_those_of_an_eager_tower(
    name: str, more: dict[str, Any], grid: tuple[int, int]
) -> None:
    family = build(name)
    inputs = family.batch(SPECS)
    method = regard.DAMRO(tokens=2, **more)
    found = cls_outliers(family.model, inputs, method=method)
    probs = eager(family, inputs["pixel_values"].flatten(0, -4), method.layer)
    row = probs.mean(2) if more.get("extension") else probs[:, :, 0, 1:]
    torch.testing.assert_close(found.probs.flatten(1).double(), row.mean(1), atol=1e-6, rtol=1e-4)
    by_probs = (
        name == "instructblip" or bool(more.keys() & {"extension"}) or more.get("variant") == "medheval"
    )
    want = largest(row.mean(1) if by_probs else row.log().sum(1), 2)
    if more.get("variant") == "released" and name == "instructblip":  # its features still start with CLS
        want = [{place - 1 for place in some} - {-1} for some in want]
    assert places(found.chosen) == want
    assert found.probs.shape[1:] == found.chosen.shape[1:] == grid
    assert found.layer == (1 if method.layer == -1 else 0)


class Spied(regard.DAMRO):
    """DAMRO that tells what its second stream keeps."""

    seen: Any = []  # noqa: RUF012 - a field would be one of DAMRO's settings

    def keep(self, session: Session) -> Tensor:
        """(B, T) places of the second prompt's tokens in the first."""
        self.seen.append((session.image, super().keep(session)))
        return self.seen[-1][1]


def kept_by_recipe(family: Family, inputs: Inputs) -> list[set[int]]:
    """The patches whose tokens stay, of each image of a batch with one image a row."""
    Spied.seen = []
    with regard.apply(family.model, Spied(tokens=3)):
        family.model.generate(**inputs, max_new_tokens=1)
    image, order = Spied.seen[0]
    return [
        {int(place - row.long().argmax()) for place in kept if place >= 0 and row[place]}
        for row, kept in zip(image, order, strict=True)
    ]


def test_they_are_what_the_recipe_keeps() -> None:
    family = build("llava")
    inputs = family.batch(SPECS)
    found = cls_outliers(family.model, inputs, count=3)
    assert places(found.chosen) == kept_by_recipe(family, inputs)
    several = family.batch([{"images": 2, "seed": 4}, {"images": 1, "seed": 5}])
    assert cls_outliers(family.model, several, count=3).chosen.flatten(1).sum(1).tolist() == [3, 3, 3]


def test_counts_and_that_nothing_changes() -> None:
    blip, llava = build("instructblip"), build("llava")
    plain = llava.model(**llava.inputs(1)).logits
    assert cls_outliers(blip.model, blip.inputs(1)).chosen.sum() == 4
    assert cls_outliers(llava.model, llava.inputs(1)).chosen.all()  # ten of nine patches
    assert (
        cls_outliers(
            llava.model, llava.inputs(1), 4, method=regard.DAMRO(alpha=0, mode="filter")
        ).chosen.sum()
        == 4
    )
    assert torch.equal(llava.model(**llava.inputs(1)).logits, plain)
    with regard.apply(llava.model, "damro"):
        assert cls_outliers(llava.model, llava.inputs(1), 4).chosen.sum() == 4


def test_the_miniature() -> None:
    model, processor = regard.load_miniature("lvlm")
    pictures = [torch.randint(255, (3, 64, 64), dtype=torch.uint8) for _ in range(2)]
    texts = [f"USER: {processor.image_token} hello ASSISTANT:"] * 2
    inputs = processor(images=pictures, text=texts, return_tensors="pt")
    found = cls_outliers(model, inputs)
    assert found.probs.shape == (2, 8, 8)
    assert found.chosen.flatten(1).sum(1).tolist() == [10, 10]
    assert found.layer == 3


def test_errors() -> None:
    llava = build("llava")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        cls_outliers(llava.model, llava.inputs(1), 0)
    with pytest.raises(regard.NoImageTokens):
        cls_outliers(llava.model, llava.inputs(1, images=0, image=False))
    with pytest.raises(regard.CannotEdit, match="this is qwen2_vl"):
        cls_outliers(build("qwen2_vl").model, build("qwen2_vl").inputs(1))
    blind = {key: value for key, value in llava.inputs(1).items() if key != "pixel_values"}
    with pytest.raises(regard.CannotEdit, match="did not run"):
        cls_outliers(llava.model, blind)
