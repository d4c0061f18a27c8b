"""Streams that run as one batch against the same streams run one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard.hooks.anatomy import anatomy
from regard.hooks.edits import without_image
from regard.hooks.engine import Engine, engine_of
from regard.hooks.joint import can_join
from tests.families import FAMILY_NAMES, Family, build

SEPARATE = {"blip2", "gemma3", "mllama"}  # positions made inside, sliding windows, cross-attention
STEPS = 4


class Contrast:
    """Against the prompt without its image, and against a darker image where the model takes one."""

    name = "contrast"

    def edits(self, parts: Any) -> Any:
        def mix(logits: Tensor, step: Any) -> Tensor:
            return 2.5 * logits - 0.5 * step.branch("text") - step.branch("dark")

        dark = regard.Branch("dark", every_step=True, view=darker)
        text = regard.Branch("text", without_image, (0, 1), every_step=True)
        return text, dark, regard.Logits(mix, ("text", "dark"))


def darker(kwargs: dict[str, Any], session: Any) -> dict[str, Any]:
    return {"pixel_values": 0.3 * kwargs["pixel_values"] - 1.0}


def logits_of(family: Family, joins: bool, *edits: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    """Generated ids and logits (B, steps, V) under the edits."""
    engine_of(family.model).joins = joins
    specs: list[dict[str, Any]] = [{"text": 4, "seed": 1}, {"text": 9, "seed": 2}]
    inputs = family.batch(specs)
    torch.manual_seed(0)
    with regard.apply(family.model, *edits):
        out = family.model.generate(
            **inputs,
            max_new_tokens=STEPS,
            output_logits=True,
            return_dict_in_generate=True,
            **{"do_sample": False, **settings},
        )
    return out.sequences[:, -STEPS:], torch.stack(out.logits, 1)


def count_joint(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each forward of a decoder: whether streams ran as one batch in it."""
    seen: list[bool] = []
    original = Engine._after_decoder

    def after(self: Engine, *args: Any) -> Any:
        if self.stream is None:
            seen.append(self.joint is not None)
        return original(self, *args)

    monkeypatch.setattr(Engine, "_after_decoder", after)
    return seen


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_one_batch_equals_one_after_the_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = build(name)
    seen = count_joint(monkeypatch)
    ids, apart = logits_of(family, False, Contrast())
    assert not any(seen)
    seen.clear()
    same, together = logits_of(family, True, Contrast())
    assert seen == [False] + [name not in SEPARATE] * (STEPS - 1)
    assert can_join(anatomy(family.model)) == (name not in SEPARATE)
    assert torch.equal(ids, same)
    assert torch.allclose(apart, together, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_edits_of_layers_reach_the_main_stream_only(name: str) -> None:
    """VHR reads a branch's heads and scales the main stream's; VAR moves its masses."""
    family = build(name)
    var = regard.VAR(sink_dims=(3, 11, 20), tau=1.6, min_visual=0.0, rho=0.0, transfer=0.9, layers=(1, 2))
    edits = [regard.VHR(alpha=3.0, layers=(0, 2)), var, Contrast()]
    ids, apart = logits_of(family, False, *edits)
    same, together = logits_of(family, True, *edits)
    assert torch.equal(ids, same)
    assert torch.allclose(apart, together, atol=5e-4, rtol=1e-3)
    assert (logits_of(family, True, Contrast())[1] - together).abs().max() > 1e-2


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"do_sample": True, "top_k": 5}])
@pytest.mark.parametrize("name", ["llava", "instructblip", "qwen2_vl"])
def test_beams_and_samples(name: str, settings: dict[str, Any]) -> None:
    family = build(name)
    ids, _ = logits_of(family, False, Contrast(), **settings)
    same, _ = logits_of(family, True, Contrast(), **settings)
    assert torch.equal(ids, same)
    assert not torch.equal(ids, logits_of(family, True, "none", **settings)[0])


def test_beams_follow_their_own_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three equal beams of one prompt: the view is read for one row and repeated."""
    family = build("llava")
    rows: list[int] = []

    def view(kwargs: dict[str, Any], session: Any) -> dict[str, Any]:
        rows.append(len(kwargs["input_ids"]))
        return darker(kwargs, session)

    branch = regard.Branch("dark", every_step=True, view=view)
    mix = regard.Logits(lambda z, step: 2 * z - step.branch("dark"), ("dark",))
    logits_of(family, True, branch, mix, num_beams=3)
    assert rows == [2]
