"""The finder of sink dimensions on planted channels, and the table of known ones on real configs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
import transformers
from families import BOS, FAMILY_NAMES, PAD, Family, build
from torch import Tensor

import regard
from regard.hooks.anatomy import Anatomy, anatomy
from regard.interventions import sinks
from regard.interventions.sinks import known_sinks, normalised, sink_strength


@pytest.fixture
def llava() -> Family:
    return oracles.model("llava", layers=6)


def by_hand(family: Family, inputs: dict[str, Tensor]) -> Tensor:
    """Largest |x| / rms(x) of each channel over real tokens, the mean over layers from 2 on: (C,)."""
    states: list[Tensor] = []
    blocks = family.decoder.layers[2:]
    handles = [b.register_forward_pre_hook(lambda m, args: states.append(args[0])) for b in blocks]
    family.model(**inputs)
    [handle.remove() for handle in handles]
    real = inputs["attention_mask"].bool()
    return torch.stack([_ratios(state[real]) for state in states]).mean(0)


def _ratios(tokens: Tensor) -> Tensor:
    return (tokens.abs() / tokens.pow(2).mean(-1, keepdim=True).sqrt()).amax(0)


# ------------------------------------------------------------------------------------------- the finder


def test_finds_planted_channels_strongest_first(llava: Family) -> None:
    words = llava.model.get_input_embeddings().weight.data
    words[BOS, 41], words[40:60, 5] = 90.0, -30.0
    ids = llava.item(text=8)["input_ids"]
    ids[0, -2:] = 50
    inputs = oracles.wide({**llava.item(text=8), "input_ids": ids})
    found = regard.sink_dimensions(llava.model, inputs)
    assert found.dims == (41, 5)
    torch.testing.assert_close(found.strength, by_hand(llava, inputs), atol=1e-5, rtol=1e-5)
    assert found.tau == 6.0  # at least: 20 * sqrt(64 / 4096) is 2.5
    assert found.strength[list(found.dims)].min() > found.tau
    assert regard.sink_dimensions(llava.model, inputs, most=1).dims == (41,)


def test_tau_goes_with_the_width() -> None:
    """Beside 1,023 channels of 1, a tenth of the energy is |x| / rms(x) = 10: 14 is a sink dimension, 9 none."""
    config = build("llava").model.config
    config.text_config.hidden_size, config.text_config.num_hidden_layers = 1024, 4
    net = transformers.LlavaForConditionalGeneration(config).eval()
    words = net.get_input_embeddings().weight.data.normal_()
    words[BOS, 700], words[BOS, 9] = 14.0, 9.0
    found = regard.sink_dimensions(net, build("llava").item(text=8))
    assert (found.dims, found.tau) == ((700,), 10.0)
    assert found.strength[9] > 5


def test_finds_channels_of_image_tokens(llava: Family) -> None:
    oracles.plant_sinks(llava, strength=40.0)
    inputs = oracles.wide(llava.inputs(batch=2, text=8))
    assert set(regard.sink_dimensions(llava.model, inputs).dims) == set(oracles.SINK_DIMS)


def test_var_runs_with_what_was_found(llava: Family) -> None:
    oracles.plant_sinks(llava, strength=40.0)
    inputs = oracles.wide(llava.item(text=8, seed=1))
    found = regard.sink_dimensions(llava.model, inputs)
    plain = llava.model(**inputs).logits
    with regard.apply(llava.model, regard.VAR(sink_dims=found.dims, tau=found.tau, rho=0.0, min_visual=0.0)):
        assert (llava.model(**inputs).logits - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_model_without_has_none(name: str) -> None:
    family = build(name)
    found = regard.sink_dimensions(family.model, family.inputs(batch=2, text=8))
    assert found.dims == ()
    assert found.strength.shape == (64,)
    assert family.decoder.config._attn_implementation == "sdpa"


def test_a_channel_of_few_layers_is_none(llava: Family) -> None:
    """A channel that the last block but one makes, and the last reads: one layer of four."""
    llava.decoder.layers[4].mlp.down_proj.weight.data[9] *= 1000
    inputs = oracles.wide(llava.item(text=8))
    found = regard.sink_dimensions(llava.model, inputs)
    assert 9 not in found.dims
    assert by_hand(llava, inputs)[9] > by_hand(oracles.model("llava", layers=6), inputs)[9] + 0.5


def test_padding_is_ignored(llava: Family) -> None:
    llava.model.get_input_embeddings().weight.data[PAD, 17] = 300.0
    specs = [{"text": 12, "seed": 1}, {"text": 4, "seed": 2}]
    inputs = oracles.wide(llava.batch(specs))
    found = regard.sink_dimensions(llava.model, inputs)
    assert found.dims == ()
    torch.testing.assert_close(found.strength, by_hand(llava, inputs), atol=1e-5, rtol=1e-5)
    inputs["attention_mask"][:] = 1
    assert regard.sink_dimensions(llava.model, inputs).dims == (17,)


def test_text_alone_will_do(llava: Family) -> None:
    llava.model.get_input_embeddings().weight.data[BOS, 41] = 90.0
    assert regard.sink_dimensions(llava.model, llava.item(text=8, image=False)).dims == (41,)


def test_strength_has_no_weight_and_no_overflow() -> None:
    hidden = torch.randn(2, 5, 64)
    want = hidden.abs() / hidden.pow(2).mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(normalised(hidden), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        sink_strength(hidden, (3, 60)), want[..., [3, 60]].amax(-1), atol=1e-4, rtol=1e-4
    )
    huge = torch.zeros(1, 1, 64, dtype=torch.float16)
    huge[..., 3] = -60000.0
    assert sink_strength(huge, (3,)).item() == pytest.approx(8.0)
    assert sink_strength(huge, (4,)).item() == 0.0
    assert sink_strength(huge, (3,)).dtype == torch.float32
    assert sink_strength(huge.double(), (3,)).dtype == torch.float64


# -------------------------------------------------------------------------------------------- the table


def real(config: Any) -> Anatomy:
    """The anatomy of a model of that config, without its weights."""
    with torch.device("meta"):
        return anatomy(transformers.AutoModelForImageTextToText.from_config(config))


def llava_config(kind: Any = transformers.LlavaConfig, **text: Any) -> Any:
    return kind(text_config={"model_type": "llama", "vocab_size": 32064, **text})


WIDE = {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824}
EIGHT = {"vocab_size": 128320, "num_key_value_heads": 8, "intermediate_size": 14336}


@pytest.mark.parametrize(
    ("config", "dims"),
    [
        (llava_config(), (1415, 2533)),
        (llava_config(transformers.LlavaNextConfig), (1415, 2533)),
        (llava_config(**WIDE), (2100, 4743)),
        (llava_config(transformers.LlavaNextConfig, **EIGHT), (788, 1384, 4062)),
    ],
    ids=["llava-1.5-7b", "llava-1.6-vicuna-7b", "llava-1.5-13b", "llama3-llava-next-8b"],
)
def test_known_llamas(config: Any, dims: tuple[int, ...]) -> None:
    parts = real(config)
    found = known_sinks(parts)
    assert found is not None
    assert (found.dims, found.tau) == (dims, 20.0)
    var = regard.VAR.for_model(parts)
    assert (var.sink_dims, var.tau, var.transfer) == (dims, 20.0, 0.6)
    hidden, policy = regard.VAR().edits(parts)
    assert hidden.layers == policy.layers == tuple(range(2, parts.layers - 1))


def qwen(version: str, hidden: int, layers: int, heads: int) -> Any:
    kind = {
        "2": transformers.Qwen2VLConfig,
        "2.5": transformers.Qwen2_5_VLConfig,
        "3": transformers.Qwen3VLConfig,
    }
    text = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return kind[version](text_config={**text, "num_key_value_heads": 2, "intermediate_size": 64})


@pytest.mark.parametrize(
    ("config", "dims"),
    [
        (("2", 3584, 28, 28), (458, 2570)),
        (("2", 1536, 28, 12), (1073, 534, 940)),
        (("2.5", 2048, 36, 16), (318, 1874, 1819)),
        (("2.5", 3584, 28, 28), (458, 2570)),
        (("2.5", 5120, 64, 40), (4675, 3094)),
        (("3", 2048, 28, 16), (1793, 1999, 1401)),
        (("3", 4096, 36, 32), (1838,)),
        (("3", 2560, 36, 32), None),  # 4B: its author doubts the published one
        (("2", 8192, 80, 64), None),
        (("2.5", 3584, 36, 28), None),
    ],
    ids=str,
)
def test_known_qwens(config: tuple[str, int, int, int], dims: tuple[int, ...] | None) -> None:
    found = known_sinks(real(qwen(*config)))
    assert (found and found.dims) == dims


def test_another_vocabulary_is_another_base_model() -> None:
    """Mistral-7B and an unknown 4,096-channel Llama have the sizes of LLaMA-2-7B, but not its sinks."""
    parts = real(llava_config())
    for change in (
        {"vocab": 64000},
        {"vocab": 128256, "layers": 40},
        {"text_type": "mistral"},
        {"hidden": 4100},
    ):
        assert known_sinks(replace(parts, **change)) is None
    for vocab in (32000, 32064, 32128):
        assert known_sinks(replace(parts, vocab=vocab)).dims == (1415, 2533)  # type: ignore[union-attr]


def test_all_dimensions_lie_in_their_models() -> None:
    for (_, channels, _, _), known in sinks._TABLE.items():
        assert all(0 <= dim < channels for dim in known.dims)
        assert len(set(known.dims)) == len(known.dims)
        assert known.tau < channels**0.5  # no state can reach more
        assert known.source
