"""DAMRO's labelled extension to towers without a CLS token, against a stock eager tower."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard.hooks.tower import find_tower
from tests.families import Family, build
from tests.test_contrast import CLOSE, generate

SPECS: list[dict[str, Any]] = [{"text": 4, "seed": 1}, {"text": 9, "seed": 2}]
COUNT = 2


@torch.no_grad()
def received(family: Family, pixels: Tensor) -> Tensor:
    """The patches (N, COUNT) that get most attention in the second-to-last layer of a stock eager tower."""
    _, tower = find_tower(family.model)
    tower.set_attn_implementation("eager")
    probs = tower(pixels, output_attentions=True).attentions[-2]
    tower.set_attn_implementation("sdpa")
    return probs.double().mean((1, 2)).topk(COUNT, -1).indices


@pytest.mark.parametrize("order", ["attention", "position"])
def test_the_second_stream_sees_what_all_patches_look_at(order: Any) -> None:
    family = build("paligemma")
    inputs = family.batch(SPECS)
    chosen = received(family, inputs["pixel_values"])
    if order == "position":
        chosen = chosen.sort(-1).values

    def keep(session: Any) -> Tensor:
        rows = []
        for image, padding, patches in zip(session.image, inputs["attention_mask"] == 0, chosen, strict=True):
            start = int(image.nonzero().min())
            text = (~image & ~padding).nonzero()[:, 0]
            before, after = text[text < start], text[text > start]
            rows.append(torch.cat([before, start + patches, after]))
        width = max(map(len, rows))
        return torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=-1) for row in rows])

    by_hand = (
        regard.Branch("outliers by hand", keep, every_step=True),
        regard.Logits(lambda z, step: 3 * z - 2 * step.branch("outliers by hand"), ("outliers by hand",)),
    )
    damro = regard.DAMRO(alpha=2.0, beta=0.0, tokens=COUNT, order=order, extension="received")
    ids, logits = generate(family, inputs, damro)
    expected_ids, expected = generate(family, inputs, *by_hand)
    assert torch.equal(ids, expected_ids)
    assert torch.allclose(logits, expected, **CLOSE)
    assert (logits - generate(family, inputs)[1])[:, 0].abs().max() > 1e-2


def test_it_has_to_be_asked_for_and_is_not_for_towers_with_a_cls_token() -> None:
    family, other = build("paligemma"), build("llava")
    with pytest.raises(regard.CannotEdit, match="defined where"), regard.apply(family.model, "damro"):
        pass
    damro = regard.DAMRO(extension="received")
    with pytest.raises(regard.CannotEdit, match="has a CLS token"), regard.apply(other.model, damro):
        pass
    with pytest.raises(ValueError, match="extension"):
        regard.DAMRO(extension="sent")  # type: ignore[arg-type]
