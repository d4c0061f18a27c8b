"""CLS scores of the vision tower against a stock eager tower, and what a branch gets in the tower's place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import Family, build
from torch import Tensor

import regard
from regard.hooks.edits import Edit
from regard.hooks.session import Session
from regard.hooks.tower import find_tower, has_cls
from regard.interventions.method import Method

WITH_CLS = ("llava", "llava_next", "instructblip", "blip2", "internvl")
WITHOUT = (
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "gemma3",
    "idefics3",
    "smolvlm",
    "paligemma",
)


class Reader:
    """Keeps the scores of some tower layers, and changes nothing."""

    name = "reader"

    def __init__(self, *layers: int, more: tuple[Edit, ...] = ()) -> None:
        self.layers, self.more, self.found = layers, more, {}

    def edits(self, anatomy: Any) -> tuple[Edit, ...]:
        return (*map(regard.Tower, self.layers), *self.more, regard.Logits(self.read))

    def read(self, logits: Tensor, step: Any) -> Tensor:
        self.found = dict(step.session.tower)
        return logits


def eager_attention(family: Family, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Probs (N, H, 1 + P, 1 + P) of each layer of the stock tower, run eagerly on the same crops."""
    _, tower = find_tower(build(family.name).model)
    tower.set_attn_implementation("eager")
    pixels: list[Tensor] = []
    _, own = find_tower(family.model)

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        pixels.append(args[0] if args else kwargs["pixel_values"])

    handle = own.register_forward_pre_hook(keep, with_kwargs=True)
    family.model(**inputs)
    handle.remove()
    return tower(pixels[0], output_attentions=True).attentions


@pytest.mark.parametrize("name", WITH_CLS)
@torch.no_grad()
def test_scores_are_those_of_an_eager_tower(name: str) -> None:
    family = build(name)
    inputs = family.batch([{"text": 5, "seed": 1}, {"text": 9, "seed": 2}])
    want = eager_attention(family, inputs)
    reader = Reader(0, 1, -2, -1)
    plain = family.model(**inputs).logits
    with regard.apply(family.model, reader):
        read = family.model(**inputs).logits
    assert torch.equal(read, plain)
    for layer, index in ((0, 0), (1, 1), (-2, 0), (-1, 1)):
        torch.testing.assert_close(reader.found[layer].softmax(-1), want[index][:, :, 0])
    assert want[0].shape[1] == 4
    assert (want[0][:, :, 0] - want[0][:, :1, 0]).abs().max() > 1e-2  # heads differ, so their order shows


@pytest.mark.parametrize("name", ["llava", "instructblip"])
@torch.no_grad()
def test_scores_come_in_generate_too_and_hooks_go(name: str) -> None:
    family = build(name)
    inputs = family.inputs(2)
    want = eager_attention(family, inputs)
    reader = Reader(-2)
    with regard.apply(family.model, reader) as run:
        family.model.generate(**inputs, max_new_tokens=2, do_sample=False)
        torch.testing.assert_close(reader.found[-2].softmax(-1), want[0][:, :, 0])
        with run.off():
            assert not any(
                m._forward_hooks for m in find_tower(family.model)[1].modules() if hasattr(m, "bias")
            )
    assert not any(m._forward_hooks for m in find_tower(family.model)[1].modules() if hasattr(m, "bias"))


@torch.no_grad()
def test_a_branch_gets_another_output_and_leaves_the_scores_alone() -> None:
    family = build("instructblip")
    inputs, other = family.inputs(2, seed=1), family.inputs(2, seed=9)
    states = find_tower(family.model)[1](other["pixel_values"]).last_hidden_state
    third = {"pixel_values": family.inputs(2, seed=20)["pixel_values"]}  # its scores must not show
    seen: list[Tensor] = []

    def swap(output: Any, session: Session) -> Any:
        return type(output)(**{**output, "last_hidden_state": states})

    def read(logits: Tensor, step: Any) -> Tensor:
        seen.append(step.branch("other"))
        return logits

    branch = regard.Branch("other", every_step=True, view=lambda kwargs, session: third, tower=swap)
    reader = Reader(0, more=(branch, regard.Logits(read, ("other",))))
    want = eager_attention(family, inputs)[0]
    plain = family.model(**inputs).logits
    expected = family.model(**{**inputs, "pixel_values": other["pixel_values"]}).logits[:, -1]
    with regard.apply(family.model, reader):
        found = family.model(**inputs).logits
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(reader.found[0].softmax(-1), want[:, :, 0])
    assert (seen[0] - plain[:, -1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", WITHOUT)
def test_a_tower_without_cls_is_refused_by_name_at_attach(name: str) -> None:
    family = build(name)
    _, tower = find_tower(family.model)
    assert not has_cls(tower)
    with pytest.raises(regard.CannotEdit, match=f"{type(tower).__name__}.* has no CLS token"):
        regard.apply(family.model, Reader(0)).start()
    assert "generate" not in vars(family.model)
    assert not any(
        m._forward_pre_hooks for m in family.model.modules() if "regard" in str(m._forward_pre_hooks)
    )


def test_wrong_towers_say_so() -> None:
    llava = build("llava").model
    for layer in (2, -3):
        with pytest.raises(regard.OutOfRange, match=rf"vision layer {layer}.* layers 0 to 1"):
            regard.apply(llava, Reader(layer)).start()
    tiled = build("mllama").model
    with pytest.raises(regard.CannotEdit, match="several tiles"):
        regard.apply(tiled, Reader(0)).start()
    assert issubclass(regard.DAMRO, Method)
    with pytest.raises(ValueError, match="edits the embeddings of tokens, so it needs a `keep`"):
        regard.Branch("b", view=lambda kwargs, session: {}, embeds=lambda embeds, order, session: embeds)
