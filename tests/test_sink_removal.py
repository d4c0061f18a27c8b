"""Sink removal against a mask that drops the same keys, and against float64 probs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard.interventions.sink_removal import DropSinks
from tests.families import Family, build

FOUND: dict[str, Any] = {"sink_dims": (3, 11, 20), "tau": 1.6, "layers": (1, 2)}


def logits_of(family: Family, *edits: Any) -> Tensor:
    inputs = family.batch([{"text": 4, "seed": 1}, {"text": 9, "seed": 2}])
    with regard.apply(family.model, *edits):
        out = family.model.generate(
            **inputs, do_sample=False, max_new_tokens=4, output_logits=True, return_dict_in_generate=True
        )
    return torch.stack(out.logits, 1)


def masked(call: Any) -> Tensor:
    """-inf on the sinks for rows after the image: dropping and renormalising in one."""
    if "sinks" not in call.session.memory:
        call.session.memory["sinks"] = {}
    found = call.session.memory["sinks"]
    if call.layer not in found:
        strength = call.read("states").abs()[..., list(FOUND["sink_dims"])].amax(-1)
        rms = call.read("states").square().mean(-1).add(1e-6).sqrt()
        found[call.layer] = (strength / rms >= FOUND["tau"]) & call.session.image
    sinks = call.session.over_keys(found[call.layer], call.key.shape[2])
    after = call.positions >= call.session.image_end[:, None]
    return torch.where(after[:, None, :, None] & sinks[:, None, None, :], -torch.inf, 0.0)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "internvl"])
def test_dropping_with_renormalisation_is_a_mask(name: str) -> None:
    family = build(name)
    states = regard.Hidden("states", FOUND["layers"], lambda hidden, session: hidden)
    expected = logits_of(family, states, regard.Bias(FOUND["layers"], masked))
    dropped = logits_of(family, DropSinks(**FOUND))
    assert torch.allclose(dropped, expected, atol=2e-4, rtol=1e-3)
    assert (logits_of(family) - dropped).abs().max() > 1e-2


def test_coefficients() -> None:
    masses = torch.tensor([[0.7, 0.3], [0.0, 1.0], [1.0, 0.0], [1e-9, 1 - 1e-9]], dtype=torch.float64)
    half = DropSinks(keep=0.5).policy(masses)
    assert torch.allclose((half * masses).sum(-1), torch.ones(4, dtype=torch.float64))
    assert half[0, 1] / half[0, 0] == pytest.approx(0.5)
    plain = DropSinks(keep=0.5, renormalise=False).policy(masses)
    assert torch.equal(plain[0], torch.tensor([1.0, 0.5], dtype=torch.float64))
    dropped = DropSinks().policy(masses)
    assert torch.equal(dropped[1], torch.ones(2, dtype=torch.float64))  # nothing else to look at: left alone
    assert torch.equal(dropped[3], torch.ones(2, dtype=torch.float64))
    assert dropped[0].tolist() == pytest.approx([1 / 0.7, 0.0])


def test_scaling_without_renormalisation_differs() -> None:
    family = build("llava")
    kept = logits_of(family, DropSinks(keep=0.3, **FOUND))
    loose = logits_of(family, DropSinks(keep=0.3, renormalise=False, **FOUND))
    assert (kept - loose).abs().max() > 1e-3
