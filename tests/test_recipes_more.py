"""Contrastive recipes beside what users have: streamers, models that keep state; and variants of single recipes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import regard
from tests.families import build
from tests.test_contrast import CLOSE, SPECS, cut, forced, generate, noisy_inputs, text_only

RECIPES: dict[str, Any] = {
    "vcd": regard.VCD(alpha=2.0),
    "m3id": regard.M3ID(decay=0.5, alpha=0.9),
    "pai": regard.PAI(alpha=0.0, gamma=1.8),
    "icd": regard.ICD(alpha=2.0, role_ids=(17, 33, 90)),
    "dola": regard.DoLa(layers=(0, 1)),
}


class Collector(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("name", RECIPES)
def test_a_streamer_gets_what_generate_returns(name: str) -> None:
    family = build("llava")
    inputs, streamer = family.batch(SPECS[:1]), Collector()
    settings = {"do_sample": False, "max_new_tokens": 6}
    with regard.apply(family.model, RECIPES[name]):
        ids = family.model.generate(**inputs, **settings, streamer=streamer)
    assert streamer.ended
    assert streamer.ids == ids[0].tolist()
    assert not torch.equal(ids, family.model.generate(**inputs, **settings))


@pytest.mark.parametrize("recipe", ["vcd", "m3id", "icd"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_rope_deltas_are_those_of_plain_generation(name: str, recipe: str) -> None:
    family = build(name)
    inputs = family.batch(SPECS[:2])
    holder = next(module for module in family.model.modules() if hasattr(module, "rope_deltas"))
    family.model.generate(**inputs, do_sample=False, max_new_tokens=3)
    plain = holder.rope_deltas.clone()
    holder.rope_deltas = None
    generate(family, inputs, RECIPES[recipe], steps=3)
    assert torch.equal(holder.rope_deltas, plain)


def test_a_second_image_of_mllama_has_its_tiles_masked_at_every_step() -> None:
    family = build("mllama")
    inputs = family.batch(SPECS[:1])
    ids, logits = generate(family, inputs, regard.VCD(alpha=1.5, beta=0.0, noise_step=700, seed=5), steps=3)
    z, other = forced(family, inputs, ids[0]), forced(family, noisy_inputs(family, inputs), ids[0])
    assert (z - other).abs().max() > 1e-2
    assert torch.allclose(logits[0], 2.5 * z - 1.5 * other, **CLOSE)


def test_m3id_as_avisc_has_it() -> None:
    family = build("llava")
    inputs = family.batch(SPECS[:1])
    ids, logits = generate(family, inputs, regard.M3ID(decay=0.4, variant="avisc", beta=0.05), steps=3)
    z = forced(family, inputs, ids[0]).log_softmax(-1)
    other = forced(family, text_only(family, inputs), ids[0]).log_softmax(-1)
    gamma = torch.exp(-0.4 * torch.arange(1, 4))[:, None]
    expected = cut(z + (1 - gamma) / gamma * (z - other), z, 0.05)
    finite = ~expected.isinf()
    assert torch.equal(finite, ~logits[0].isinf())
    assert torch.allclose(logits[0][finite], expected[finite], **CLOSE)
    assert (expected[finite] - z[finite]).abs().max() > 1e-2
