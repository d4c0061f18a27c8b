"""Each bad input: an error that names what is wrong and the way out, and a model as it was before."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from families import Family, Inputs, build
from torch import Tensor, nn

import regard
from regard.hooks.attend import claims
from regard.hooks.kv_cache import CACHE


def image_bias(call: Any) -> Tensor:
    return call.image[:, None, None, :].float()


@pytest.fixture
def llava() -> Family:
    return build("llava")


@contextmanager
def untouched(model: Any, inputs: Inputs) -> Iterator[None]:
    """The model's logits, attention, hooks and attributes are the same after as before."""
    decoder = model.get_decoder()
    before = model(**inputs).logits.clone(), decoder.config._attn_implementation, "generate" in vars(model)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    yield
    assert decoder.config._attn_implementation == before[1]
    assert ("generate" in vars(model)) == before[2]
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert not any(module in claims for module in model.modules())
    assert torch.equal(model(**inputs).logits, before[0])


@contextmanager
def forwards(model: Any) -> Iterator[list[int]]:
    """How often the first block of the decoder ran."""
    ran: list[int] = []
    block = next(m for m in model.get_decoder().modules() if hasattr(m, "self_attn"))
    handle = block.register_forward_hook(lambda *_: ran.append(1))
    yield ran
    handle.remove()


def refused(model: Any, inputs: Inputs, act: Callable[[], Any], error: type[Exception], *words: str) -> None:
    """`act` raises before a block runs, its message has all the words, and the model is untouched."""
    with untouched(model, inputs), forwards(model) as ran:
        with pytest.raises(error) as caught:
            act()
        assert not ran
    for word in words:
        assert word in str(caught.value), str(caught.value)


def generate(model: Any, inputs: Inputs, *edits: Any, **more: Any) -> Any:
    with regard.apply(model, *edits):
        return model.generate(**inputs, max_new_tokens=2, **more)


# ---- names, types and ranges: nothing is attached -----------------------------------------------------


@pytest.mark.parametrize("act", [regard.recipe, lambda name, model: regard.apply(model, name)])
def test_an_unknown_recipe_names_the_nearest(llava: Family, act: Callable[[str, Any], Any]) -> None:
    def call() -> None:
        act("vhrr", llava.model)

    refused(llava.model, llava.inputs(), call, regard.UnknownName, "unknown recipe 'vhrr'", "'vhr'")
    with pytest.raises(ValueError, match=r"known: agla, astar, .*, var, vcd, vhr"):
        regard.recipe("xxxxxxx", llava.model)


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (3, ("got int: 3",)),
        (["vhr"], ("got list",)),
        (regard.VHR, ("make one with VHR()",)),
        (None, ("NoneType",)),
    ],
)
def test_a_wrong_type(llava: Family, thing: Any, words: tuple[str, ...]) -> None:
    def call() -> None:
        generate(llava.model, llava.inputs(), thing)

    refused(llava.model, llava.inputs(), call, TypeError, "expected a recipe's name", *words)


@pytest.mark.parametrize("thing", ["vhr", nn.Linear(2, 2), None])
def test_what_is_no_model(thing: Any) -> None:
    with pytest.raises(regard.CannotEdit, match="transformers model"):
        regard.apply(thing, "none")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (regard.VHR(layers=(0, 9)), ("vhr asks for layer 9", "model.language_model has layers 0 to 2")),
        (regard.VHR(layers=(-1,)), ("layer -1",)),
        (regard.VAR(layers=(3,), sink_dims=(1,), tau=2.0), ("var asks for layer 3",)),
        (regard.Bias((5,), image_bias), ("Bias asks for layer 5",)),
        (regard.Branch("b", lambda s: ~s.image, layers=(7,)), ("Branch asks for layer 7",)),
        (regard.Hidden("h", (4,), lambda h, s: h), ("Hidden asks for layer 4",)),
        (regard.HeadGain((0,), lambda call: None, heads=(0, 4)), ("head 4", "query heads 0 to 3")),
        (regard.Bias((0,), image_bias, heads=(-1,)), ("Bias asks for head -1",)),
    ],
)
def test_a_layer_or_head_out_of_range(llava: Family, edit: Any, words: tuple[str, ...]) -> None:
    def call() -> None:
        generate(llava.model, llava.inputs(), "none", edit)

    refused(llava.model, llava.inputs(), call, regard.OutOfRange, *words)


def test_values_that_an_intervention_does_not_take(llava: Family) -> None:
    with pytest.raises(ValueError, match="variant must be 'paper' or 'released', got 'x'"):
        regard.VHR(variant="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="transfer is a fraction from 0 to 1"):
        regard.VAR(transfer=1.5)
    with pytest.raises(ValueError, match="either `keep` or `view`"):
        regard.Branch("b")

    def call(dims: Any) -> Callable[[], None]:
        return lambda: generate(llava.model, llava.inputs(), regard.VAR(sink_dims=dims, tau=2.0))

    refused(
        llava.model, llava.inputs(), call(None), regard.RegardError, "sink_dimensions(model, inputs)", "64"
    )
    refused(llava.model, llava.inputs(), call((64,)), ValueError, "[64]", "64 channels")


def test_a_run_is_entered_once(llava: Family) -> None:
    with untouched(llava.model, llava.inputs()), pytest.raises(RuntimeError, match="on already"):
        with regard.apply(llava.model, regard.Bias((0,), image_bias)) as run, run:
            pass
    with regard.apply(llava.model, regard.Bias((0,), image_bias)):  # and the engine is free again
        llava.model(**llava.inputs())


# ---- models that cannot be edited ---------------------------------------------------------------------


def llama() -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=4, num_attention_heads=4)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("edit", ["vhr", regard.VAR(sink_dims=(1,), tau=2.0), regard.Bias((0,), image_bias)])
def test_a_language_model_without_an_image(edit: Any) -> None:
    model, inputs = llama(), {"input_ids": torch.arange(3, 11)[None]}

    def call() -> None:
        generate(model, inputs, edit)

    refused(
        model, inputs, call, regard.CannotEdit, "llama", "no image_token_id", "whole vision-language model"
    )


def test_a_language_model_takes_edits_that_need_no_image() -> None:
    model, inputs = llama(), {"input_ids": torch.arange(3, 11)[None]}
    before = model(**inputs).logits

    def first_key(call: Any) -> Tensor:
        return (torch.arange(call.key.shape[2]) == 0).float()[None, None, None] * 2.0

    with regard.apply(model, regard.Bias((0, 1, 2, 3), first_key, needs_image=False)):
        assert (model(**inputs).logits - before).abs().max() > 1e-6
    assert torch.equal(model(**inputs).logits, before)


def test_training_mode(llava: Family) -> None:
    llava.model.train()
    refused(
        llava.model,
        llava.inputs(),
        lambda: generate(llava.model, llava.inputs(), "vhr"),
        regard.CannotEdit,
        "LlavaForConditionalGeneration is in training mode",
        "model.eval()",
    )


@pytest.mark.parametrize("how", ["torch.compile", "model.compile", "submodule", "block", "forward"])
def test_compiled_models(llava: Family, how: str) -> None:
    model, inputs = llava.model, llava.inputs()
    text = model.model.language_model
    target, path = model, "LlavaForConditionalGeneration"
    with untouched(model, inputs):
        if how == "torch.compile":
            target, path = torch.compile(model, backend="eager"), "OptimizedModule"
        elif how == "model.compile":
            model.compile(backend="eager")
        elif how == "forward":
            model.forward = torch.compile(model.forward, backend="eager")
        elif how == "block":
            text.layers[1].mlp.compile(backend="eager")
            path = "model.language_model.layers.1.mlp"
        else:
            model.model.language_model = torch.compile(text, backend="eager")
            path = "model.language_model"
        with pytest.raises(regard.CannotEdit, match=re.escape(f"{path} is compiled")) as caught:
            generate(target, inputs, "vhr")
        assert "before torch.compile" in str(caught.value)
        assert text.config._attn_implementation == "sdpa"
        vars(model).pop("forward", None)
        model._compiled_call_impl = text.layers[1].mlp._compiled_call_impl = None
        model.model.language_model = text


def test_a_class_that_does_not_route() -> None:
    """BLIP-1 has its own attention arithmetic."""
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = small | {"vocab_size": 64, "encoder_hidden_size": 32, "projection_dim": 32}
    config = transformers.BlipConfig(
        text_config=text, vision_config=small | {"image_size": 8, "patch_size": 4}
    )
    model = transformers.BlipForConditionalGeneration(config).eval()
    inputs = {"pixel_values": torch.randn(1, 3, 8, 8), "input_ids": torch.arange(3, 9)[None]}
    for edit in ("vhr", regard.Bias((0,), lambda call: None, needs_image=False), "none"):
        with untouched(model, inputs), pytest.raises(regard.CannotEdit, match="does not route") as caught:
            generate(model, inputs, edit)
        assert "BlipTextModel at text_decoder.bert" in str(caught.value)


class QuantAttentionFused(nn.Module):
    """As AWQ's fused attention: in the place of `self_attn`, without transformers' attention function."""

    def __init__(self, old: Any, index: bool) -> None:
        super().__init__()
        self.v_proj, self.o_proj = old.v_proj, old.o_proj
        if index:
            self.layer_idx = old.layer_idx

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return self.o_proj(self.v_proj(hidden_states).repeat(1, 1, 2)), None


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize(
    "edit", ["vhr", regard.VAR(sink_dims=(1,), tau=2.0, layers=(1, 2)), regard.Bias((1, 2), image_bias)]
)
def test_a_fused_attention_module(llava: Family, edit: Any, index: bool, layer: int) -> None:
    """Whether or not it looks like an attention module; also after runs on the model as it was."""
    inputs = llava.inputs()
    generate(llava.model, inputs, regard.Bias((0, 1, 2), image_bias))
    block = llava.model.model.language_model.layers[layer]
    block.self_attn = QuantAttentionFused(block.self_attn, index)
    with untouched(llava.model, inputs), pytest.raises(regard.CannotEdit, match="kernel") as caught:
        generate(llava.model, inputs, edit)
    assert f"model.language_model.layers.{layer}.self_attn (QuantAttentionFused)" in str(caught.value)
    generate(llava.model, inputs, regard.Bias((0,), image_bias))  # the other layers can be edited


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_attention_that_is_not_sdpa(llava: Family, name: str) -> None:
    inputs, config = llava.inputs(), llava.model.model.language_model.config
    with untouched(llava.model, inputs):
        config._attn_implementation_internal = name
        with pytest.raises(regard.CannotEdit, match=name) as caught:
            generate(llava.model, inputs, "vhr")
        assert "model.set_attn_implementation('sdpa')" in str(caught.value)
        assert config._attn_implementation == name
        config._attn_implementation_internal = "sdpa"


def test_a_bare_decoder_and_a_part_of_an_edited_model(llava: Family) -> None:
    inputs, decoder = llava.inputs(), llava.model.model.language_model
    refused(
        llava.model,
        inputs,
        lambda: regard.apply(decoder, "none").start(),
        regard.CannotEdit,
        "LlamaModel is a bare decoder",
    )

    def both() -> None:
        with regard.apply(llava.model, "none"), regard.apply(llava.model.model, "none"):
            pass

    refused(llava.model, inputs, both, regard.CannotEdit, "edited already", "LlavaModel")


def test_logits_need_a_language_head(llava: Family) -> None:
    branch = regard.Logits(lambda z, step: z)
    headless = llava.model.model

    def call() -> None:
        with regard.apply(headless, branch):
            pass

    refused(llava.model, llava.inputs(), call, regard.CannotEdit, "LlavaModel has no language head")
    with regard.apply(headless, regard.Bias((0,), image_bias)):  # what needs no head runs
        edited = headless(**llava.inputs()).last_hidden_state
    assert (headless(**llava.inputs()).last_hidden_state - edited).abs().max() > 1e-3


# ---- prompts and calls that cannot be edited ----------------------------------------------------------


@pytest.mark.parametrize("edit", ["vhr", regard.Bias((0,), image_bias)])
def test_a_text_prompt(llava: Family, edit: Any) -> None:
    inputs = llava.batch([{"image": False, "seed": 1}, {"image": False, "seed": 2, "text": 9}])

    def call() -> None:
        generate(llava.model, inputs, edit)

    words = ("none of the 2 prompts (length 10)", "image token 3", "run.off()")
    refused(llava.model, inputs, call, regard.NoImageTokens, *words)

    def forward() -> None:
        with regard.apply(llava.model, edit):
            llava.model(**inputs)

    refused(llava.model, inputs, forward, regard.NoImageTokens, *words)


def test_the_decoder_called_by_itself(llava: Family) -> None:
    inputs = llava.inputs()

    def call() -> None:
        with regard.apply(llava.model, "vhr"):
            llava.model.model.language_model(input_ids=inputs["input_ids"])

    words = ("model.language_model was called by itself", "LlavaForConditionalGeneration")
    refused(llava.model, inputs, call, regard.CannotEdit, *words)


def test_a_cache_from_outside(llava: Family) -> None:
    inputs, more = llava.inputs(), torch.tensor([[20]])
    cache = getattr(llava.model(**inputs, use_cache=True), CACHE)

    def call() -> None:
        with regard.apply(llava.model, "vhr"):
            llava.model(input_ids=more, past_key_values=cache)

    refused(llava.model, inputs, call, regard.CannotEdit, "holds 18 tokens", "start from an empty cache")
    bias = [regard.Bias((layer,), image_bias) for layer in (0, 1)]
    with regard.apply(llava.model, bias[0]) as run, regard.apply(llava.model, bias[1]):
        cache = getattr(llava.model(**inputs, use_cache=True), CACHE)
        llava.model(input_ids=more, past_key_values=cache)
        with run.off(), pytest.raises(regard.CannotEdit, match="not computed under these edits"):
            llava.model(input_ids=more, past_key_values=cache)
        llava.model(input_ids=more, past_key_values=cache)


@pytest.mark.parametrize("edit", ["vhr", regard.VAR(sink_dims=(1,), tau=2.0, layers=(1,))])
def test_a_prompt_in_chunks(llava: Family, edit: Any) -> None:
    inputs = llava.inputs()

    def call() -> None:
        generate(llava.model, inputs, edit, prefill_chunk_size=4)

    refused(
        llava.model,
        inputs,
        call,
        regard.CannotEdit,
        "whole prompt in one forward",
        "4 of 18",
        "prefill_chunk_size",
    )


def test_embeddings_without_ids(llava: Family) -> None:
    inputs = llava.inputs()
    with torch.no_grad():
        embeds = llava.model.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}

    def call() -> None:
        generate(llava.model, given, "vhr")

    refused(llava.model, inputs, call, regard.CannotEdit, "without input_ids", "pass input_ids")
    group = torch.arange(18)[None] % 2
    policy = regard.MassPolicy(
        (0, 1), lambda call: group, lambda m: 1 + m.flip(-1), ("even", "odd"), "all", needs_image=False
    )
    plain = llava.model.generate(**given, max_new_tokens=2, do_sample=False)
    with regard.apply(llava.model, policy) as run:  # an edit that needs no image runs on embeddings
        assert llava.model.generate(**given, max_new_tokens=2, do_sample=False).shape == plain.shape
    assert [tally.rows for tally in run.report().tallies] == [19, 19]


def test_a_branch_that_keeps_nothing(llava: Family) -> None:
    def call() -> None:
        generate(llava.model, llava.inputs(), regard.Branch("void", lambda s: torch.zeros_like(s.image)))

    refused(llava.model, llava.inputs(), call, regard.CannotEdit, "'void' keeps no token")
