"""nnsight around a model with recipes, and VHD read through its traces. It needs its blocks' source on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor

import regard
from regard.evals import miniature
from regard.evals.miniature.scenes import make_scene

STEPS = 5
GENERATE: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False}
GENERATE |= {"output_logits": True, "return_dict_in_generate": True}
SCENE = make_scene(4, split="test").image


@pytest.fixture(scope="module")
def nnsight() -> Any:
    import nnsight

    return nnsight


@pytest.fixture(scope="module")
def lvlm() -> Any:
    return regard.load_miniature("lvlm")


@pytest.fixture(scope="module")
def traced(nnsight: Any, lvlm: Any) -> Any:
    """The wrapper that was there before any recipe."""
    return nnsight.TransformersModel(lvlm[0], task="image-text-to-text", processor=lvlm[1])


@pytest.fixture(scope="module")
def prompt(lvlm: Any) -> str:
    text = {"type": "text", "text": "Please describe this image in detail."}
    turn = [{"role": "user", "content": [{"type": "image"}, text]}]
    return lvlm[1].apply_chat_template(turn, add_generation_prompt=True)


@pytest.fixture(scope="module")
def inputs(lvlm: Any, prompt: str) -> Any:
    return lvlm[1](images=SCENE, text=prompt, return_tensors="pt")


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def by_itself(model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
    """Logits of the prompt (1, S, V), and of every token of cached generation (T, V), without nnsight."""
    return model(**inputs).logits, torch.cat(model.generate(**inputs, **GENERATE).logits)


def through_nnsight(traced: Any, inputs: Any) -> tuple[Tensor, Tensor]:
    """The same two, read inside traces."""
    with traced.trace(**inputs):
        logits = traced.output.logits.save()
    with traced.generate(**inputs, **GENERATE) as tracer:
        steps = tracer.result.logits.save()
    return logits, torch.cat(steps)


def same(found: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("wrapped", ["before", "after"])
@pytest.mark.parametrize("recipe", ["vhr", "var"])
def test_a_trace_shows_the_model_with_its_recipe(
    nnsight: Any, lvlm: Any, traced: Any, inputs: Any, recipe: str, wrapped: str
) -> None:
    model, processor = lvlm
    plain = by_itself(model, inputs)
    assert same(through_nnsight(traced, inputs), plain)
    with regard.apply(model, recipe):
        if wrapped == "after":
            traced = nnsight.TransformersModel(model, task="image-text-to-text", processor=processor)
        found, want = through_nnsight(traced, inputs), by_itself(model, inputs)
    assert same(found, want)
    assert (found[0] - plain[0]).abs().max() > 0.01
    assert (found[1][1:] - plain[1][1:]).abs().max() > 0.01  # cached decoding too, not its first token alone
    assert same(by_itself(model, inputs), plain)
    assert same(through_nnsight(traced, inputs), plain)
    assert "generate" not in vars(model)


@pytest.mark.parametrize("door", ["apply", "wrap"])
def test_recipes_go_on_through_the_wrapper(lvlm: Any, traced: Any, inputs: Any, door: str) -> None:
    """`icd` asks for the processor, which the wrapper brings along."""
    plain = by_itself(lvlm[0], inputs)
    with regard.apply(lvlm[0], "icd", "var", processor=lvlm[1]):
        want = by_itself(lvlm[0], inputs)
    if door == "apply":
        with regard.apply(traced, "icd", "var"):
            found = by_itself(lvlm[0], inputs)
    else:
        assert regard.wrap(traced, "icd", "var") is traced
        found = by_itself(lvlm[0], inputs)
        assert regard.unwrap(traced) is traced
    assert same(found, want)
    assert not same(found, plain)
    assert same(by_itself(lvlm[0], inputs), plain)
    assert torch.equal(regard.divergence(traced, inputs).vhd, regard.divergence(lvlm[0], inputs).vhd)


def test_nnsights_own_way_of_giving_a_prompt(lvlm: Any, traced: Any, inputs: Any, prompt: str) -> None:
    with regard.apply(traced, "vhr"):
        with traced.trace(prompt, images=SCENE):
            found = traced.output.logits.save()
        assert torch.equal(found, lvlm[0](**inputs).logits)


def test_a_traced_edit_and_a_recipe_act_on_one_forward(lvlm: Any, traced: Any, inputs: Any) -> None:
    model = lvlm[0]
    layers = model.model.language_model.layers

    def turned(heads: Tensor) -> Tensor:
        return heads.unflatten(-1, (8, -1)).flip(-2).flatten(-2)

    def hook(module: Any, args: Any) -> Any:
        return (turned(args[0]),)

    with regard.apply(model, "var"):
        recipe = model(**inputs).logits
        handle = layers[4].self_attn.o_proj.register_forward_pre_hook(hook)
        both = model(**inputs).logits
        handle.remove()
        with traced.trace(**inputs):
            place = traced.model.language_model.layers[4].self_attn.o_proj
            place.input = turned(place.input)
            found = traced.output.logits.save()
    assert torch.equal(found, both)
    assert (both - recipe).abs().max() > 0.01
    with traced.trace(**inputs):
        place = traced.model.language_model.layers[4].self_attn.o_proj
        place.input = turned(place.input)
        edit = traced.output.logits.save()
    assert (both - edit).abs().max() > 0.01


# --------------------------------------------------------------------------------------------------- VHD


def traced_heads(nnsight: Any, traced: Any, inputs: Any, heads: int) -> Tensor:
    """Head outputs (L, H, D) at the last row: what enters each output projection."""
    with traced.trace(**inputs, use_cache=False):
        rows = []
        for layer in traced.model.language_model.layers:
            rows.append(layer.self_attn.o_proj.input[0, -1])
        found = nnsight.save(torch.stack(rows))
    return found.unflatten(-1, (heads, -1))


def traced_vhd(nnsight: Any, traced: Any, inputs: Any, image_token: int, heads: int) -> Tensor:
    """VHD (L, H) of one prompt: one trace with the image, one with its tokens cut out of the ids."""
    ids = inputs["input_ids"]
    text = ids[ids != image_token][None]
    seen = traced_heads(nnsight, traced, inputs, heads)
    unseen = traced_heads(
        nnsight, traced, {"input_ids": text, "attention_mask": torch.ones_like(text)}, heads
    )
    return (seen - unseen).square().sum(-1)


def test_vhd_of_the_miniature_is_that_of_two_traces(nnsight: Any) -> None:
    model, processor = regard.load_miniature("lvlm")
    model.double()
    traced = nnsight.TransformersModel(model, task="image-text-to-text", processor=processor)
    for seed, text in enumerate(("What is on the left?", "Is there a dog in the image?", "Go on")):
        image = make_scene(seed, split="test").image
        item = oracles.wide(
            processor(images=image, text=f"USER: <image>\n{text} ASSISTANT:", return_tensors="pt")
        )
        want = traced_vhd(nnsight, traced, item, model.config.image_token_id, 8)
        found = regard.divergence(model, item).vhd
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, want, atol=0.0, rtol=1e-6)
        assert want.min() > 0


@pytest.mark.parametrize("name", ["qwen2_vl", "internvl", "gemma3"])
def test_vhd_with_grouped_query_attention(nnsight: Any, name: str) -> None:
    family = oracles.model(name, heads=8, kv_heads=2)
    item = oracles.wide(family.item(text=8, images=2, seed=3))
    traced = nnsight.NNsight(family.model)
    want = traced_vhd(nnsight, traced, item, family.model.config.image_token_id, 8)
    found = regard.divergence(family.model, item).vhd
    torch.testing.assert_close(found, want, atol=0.0, rtol=1e-6)
    assert want.shape == (family.text_layers, 8)
    assert want.min() > 0


# ------------------------------------------------------------------------------------------------ errors


def test_weights_that_are_not_loaded_yet(nnsight: Any, lvlm: Any, inputs: Any) -> None:
    """nnsight builds on the meta device and puts the real modules in later: edits would stay on the first."""
    folder = str(Path(miniature.__file__).parent / "lvlm")
    traced = nnsight.TransformersModel(folder, task="image-text-to-text", processor=lvlm[1])
    with pytest.raises(regard.CannotEdit, match=r"TransformersModel has not loaded .* dispatch\(\)"):
        regard.apply(traced, "vhr")
    traced.dispatch()
    with traced.trace(**inputs):
        plain = traced.output.logits.save()
    with regard.apply(traced, "vhr"), traced.trace(**inputs):
        edited = traced.output.logits.save()
    assert (edited - plain).abs().max() > 0.01


def test_something_else_inside(nnsight: Any) -> None:
    with pytest.raises(regard.CannotEdit, match="Linear has no config"):
        regard.apply(nnsight.NNsight(torch.nn.Linear(2, 2)), regard.VAR())


# ---------------------------------------------------------------------------------------------- branches


@pytest.mark.parametrize("recipe", ["vhr", "icd", "m3id"])
def test_a_trace_follows_the_main_stream_alone(lvlm: Any, traced: Any, inputs: Any, recipe: str) -> None:
    """Branches run the same modules, before the main stream or in one batch with it."""
    model, processor = lvlm
    seen: list[Tensor] = []
    block = model.model.language_model.layers[3]
    with regard.apply(model, recipe, processor=processor):
        handle = block.register_forward_hook(lambda module, args, out: seen.append(out))
        want, _ = by_itself(model, inputs)
        handle.remove()
        with traced.trace(**inputs):
            hidden = traced.model.language_model.layers[3].output.save()
            logits = traced.output.logits.save()
        rows = []
        with traced.generate(**inputs, **GENERATE) as tracer:
            for _ in tracer.iter[:STEPS]:
                rows.append(traced.model.language_model.layers[3].output)
    prompt = [out for out in seen if out.shape[:2] == inputs["input_ids"].shape]
    assert torch.equal(logits, want)
    assert torch.equal(hidden, prompt[0])
    assert [out.shape[:2] for out in rows] == [hidden.shape[:2], *[(1, 1)] * (STEPS - 1)]
    main = [out[:1] for out in seen if out.shape[1] == 1][-(STEPS - 1) :]
    for found, expected in zip(rows[1:], main, strict=True):
        torch.testing.assert_close(found, expected)
