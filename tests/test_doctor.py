"""What the doctor says of models that can be edited and of models that cannot; it changes neither."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from families import FAMILY_NAMES, IMAGE, VOCAB, build
from torch import Tensor, nn

import regard
from regard.hooks.attend import claims

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}


def state_of(model: Any) -> tuple[Any, ...]:
    """All that an engine could leave behind, in every module."""
    modules = list(model.modules())
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]
    names = [sorted(vars(m)) for m in modules]
    configs = [getattr(getattr(m, "config", None), "_attn_implementation", None) for m in modules]
    return hooks, names, configs, [m.training for m in modules], sum(m in claims for m in modules)


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    before = state_of(model), {name: p.clone() for name, p in model.named_parameters()}
    yield
    assert state_of(model) == before[0]
    assert all(torch.equal(p, before[1][name]) for name, p in model.named_parameters())


def llama() -> Any:
    config = transformers.LlamaConfig(vocab_size=64, **SMALL)
    return transformers.LlamaForCausalLM(config).eval()


def blip1() -> Any:
    text = SMALL | {"vocab_size": 64, "encoder_hidden_size": 32, "projection_dim": 32}
    config = transformers.BlipConfig(
        text_config=text, vision_config=SMALL | {"image_size": 8, "patch_size": 4}
    )
    return transformers.BlipForConditionalGeneration(config).eval()


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_model_that_can_be_edited(name: str) -> None:
    family = build(name)
    inputs = family.inputs(text=8)
    before = family.model(**inputs).logits
    with unchanged(family.model):
        found = regard.doctor(family.model)
    assert found.ok, str(found)
    assert found.problems == ()
    facts = found.facts
    assert facts["model"].startswith(f"{type(family.model).__name__} (")
    assert facts["decoder"] == f"{family.decoder_path} ({type(family.decoder).__name__})"
    assert facts["layers"] == f"{family.text_layers}, attention in 0-{family.text_layers - 1}"
    assert facts["heads"] == f"{family.heads} of width 16, {family.kv_heads} for keys and values"
    assert facts["image token"] == str(VOCAB if name == "mllama" else IMAGE)
    assert facts["attention"] == "sdpa"
    assert facts["weights"] == "torch.float32, cpu"
    assert ("cross-attention" in facts) == (name == "mllama")
    if name == "mllama":
        assert facts["cross-attention"] == "layers 1, 3: keys are image patches"
    assert str(found).endswith("no problem found")
    assert all(value in str(found) for value in facts.values())
    assert json.loads(json.dumps(found.to_dict())) == {"ok": True, "facts": facts, "problems": []}
    assert torch.equal(family.model(**inputs).logits, before)


def training() -> Any:
    return build("llava").model.train()


def compiled() -> Any:
    model = build("llava").model
    model.compile(backend="eager")
    return model


def compiled_block() -> Any:
    model = build("llava").model
    model.model.language_model.layers[0].compile(backend="eager")
    return model


def flash() -> Any:
    model = build("llava").model
    model.model.language_model.config._attn_implementation_internal = "flash_attention_2"
    return model


class QuantAttentionFused(nn.Module):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return hidden_states, None


def fused() -> Any:
    model = build("llava").model
    model.model.language_model.layers[2].self_attn = QuantAttentionFused()
    return model


def all_fused() -> Any:
    model = build("llava").model
    for layer in model.model.language_model.layers:
        layer.self_attn = QuantAttentionFused()
    return model


def bare() -> Any:
    return build("llava").model.model.language_model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (training, ("training mode", "model.eval()")),
        (compiled, ("LlavaForConditionalGeneration is compiled", "before torch.compile")),
        (compiled_block, ("model.language_model.layers.0 is compiled",)),
        (flash, ("'flash_attention_2'", "set_attn_implementation('sdpa')")),
        (
            fused,
            ("model.language_model.layers.2.self_attn (QuantAttentionFused)", "layer 2 cannot be edited"),
        ),
        (all_fused, ("no attention module", "model.language_model")),
        (bare, ("bare decoder",)),
        (llama, ("names no image token",)),
        (blip1, ("BlipTextModel at text_decoder.bert", "does not route")),
    ],
)
def test_a_model_with_a_problem(make: Any, words: tuple[str, ...]) -> None:
    model = make()
    with unchanged(model):
        found = regard.doctor(model)
    assert not found.ok
    problems = "\n".join(found.problems)
    assert all(word in problems for word in words), problems
    assert all(f"problem: {problem}" in str(found) for problem in found.problems)
    assert "no problem found" not in str(found)
    assert found.to_dict()["problems"] == list(found.problems)


def test_what_the_doctor_says_is_what_apply_does() -> None:
    """No model of the problem list takes an edit that needs the image, and a good one takes it."""
    edit = regard.Bias((2,), lambda call: call.image[:, None, None, :].float())
    for make in (training, compiled, compiled_block, flash, fused, all_fused, bare, llama, blip1):
        model = make()
        with pytest.raises(regard.CannotEdit), regard.apply(model, edit):
            pass
    model = build("llava").model
    with regard.apply(model, edit):
        pass


def test_more_than_one_problem() -> None:
    model = llama().train()
    problems = regard.doctor(model).problems
    assert len(problems) == 2
    assert "training mode" in problems[0]
    assert "no image token" in problems[1]


def test_a_torch_compiled_object_and_no_model_at_all() -> None:
    model = build("llava").model
    found = regard.doctor(torch.compile(model, backend="eager"))
    assert not found.ok
    assert "OptimizedModule is compiled" in found.problems[0]
    assert "expected a transformers model or pipeline, got str" in regard.doctor("llava").problems[0]
    assert "has no config" in regard.doctor(nn.Linear(2, 2)).problems[0]


def test_a_model_that_is_being_edited_is_still_fine() -> None:
    model = build("llava").model
    with regard.apply(model, "vhr"), unchanged(model):
        found = regard.doctor(model)
    assert found.ok
    assert found.facts["attention"] == "regard"


def test_a_pipeline_and_a_number_format() -> None:
    class Pipeline:
        model = build("llava").model.to(torch.bfloat16)

    found = regard.doctor(Pipeline())
    assert found.ok
    assert found.facts["weights"] == "torch.bfloat16, cpu"
    assert "LlavaForConditionalGeneration" in found.facts["model"]
