"""VHD and T-VHD against hooks on the output projections of plain forwards, in float64."""

from __future__ import annotations

import oracles
import pytest
import torch
from families import Family, Inputs, build
from oracles import head_outputs, without_image
from torch import Tensor

import regard

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
STEPS = 4


@pytest.fixture(scope="module", params=["llava", "qwen2_vl", "internvl"])
def family(request: pytest.FixtureRequest) -> Family:
    return oracles.model(request.param)


@pytest.fixture(scope="module")
def llava() -> Family:
    return oracles.model("llava")


def apart(family: Family, item: Inputs, tokens: list[int]) -> Tensor:
    """VHD (L, H) of the row after `tokens`: two plain forwards over all that was said so far."""
    seen, unseen = oracles.wide(item), without_image(family, item)
    for token in tokens:
        new = torch.tensor([token])
        seen, unseen = family.grow(seen, new), family.grow(unseen, new)
        last = unseen["position_ids"][..., -1:] + 1
        unseen["position_ids"] = torch.cat([unseen["position_ids"], last], -1)
    return (head_outputs(family, seen) - head_outputs(family, unseen)).square().sum(-1)


def t_vhd(every: list[Tensor], top: int) -> Tensor:
    return torch.stack([vhd.sort(descending=True).values[:, :top].sum() for vhd in every])


def greedy(family: Family, item: Inputs, steps: int) -> list[int]:
    return family.greedy(oracles.wide(item), steps)[0][0].tolist()


def test_vhd_is_the_squared_distance_of_two_plain_forwards(family: Family) -> None:
    item = family.item(text=8, seed=1)
    found = regard.divergence(family.model, oracles.wide(item))
    want = apart(family, item, [])
    torch.testing.assert_close(found.vhd, want, **CLOSE)
    assert found.vhd.shape == (family.text_layers, family.heads)
    assert found.layers == tuple(range(family.text_layers))
    assert found.vhd.min() > 0
    assert found.t_vhd.shape == found.tokens.shape == (0,)


@pytest.mark.parametrize("top", [None, 1, 3, 8])
def test_t_vhd_goes_on_beside_the_generation(family: Family, top: int | None) -> None:
    item = family.item(text=8, seed=1)
    said = greedy(family, item, STEPS)
    every = [apart(family, item, said[:step]) for step in range(STEPS)]
    found = regard.divergence(family.model, oracles.wide(item), max_new_tokens=STEPS, top=top)
    assert found.tokens.tolist() == said
    torch.testing.assert_close(found.t_vhd, t_vhd(every, top or family.heads // 2), **CLOSE)
    torch.testing.assert_close(found.vhd, every[0], **CLOSE)


def test_one_token_has_one_value(family: Family) -> None:
    item = family.item(text=8, seed=1)
    found = regard.divergence(family.model, oracles.wide(item), max_new_tokens=1, top=2)
    assert found.tokens.tolist() == greedy(family, item, 1)
    torch.testing.assert_close(found.t_vhd, t_vhd([apart(family, item, [])], 2), **CLOSE)


def test_rows_of_a_batch_are_themselves_alone(family: Family) -> None:
    specs = [{"text": 11, "seed": 2}, {"text": 5, "seed": 3, "images": 2}, {"text": 8, "seed": 4}]
    found = regard.divergence(family.model, oracles.wide(family.batch(specs)), max_new_tokens=3, top=2)
    assert found.vhd.shape == (3, family.text_layers, family.heads)
    assert found.t_vhd.shape == found.tokens.shape == (3, 3)
    for row, spec in enumerate(specs):
        item = family.item(**spec)
        said = greedy(family, item, 3)
        every = [apart(family, item, said[:step]) for step in range(3)]
        torch.testing.assert_close(found.vhd[row], every[0], **CLOSE)
        torch.testing.assert_close(found.t_vhd[row], t_vhd(every, 2), **CLOSE)
        assert found.tokens[row].tolist() == said


def test_a_row_of_text_only_does_not_diverge(family: Family) -> None:
    specs = [{"text": 8, "seed": 2}, {"text": 6, "seed": 3, "image": False}]
    found = regard.divergence(family.model, oracles.wide(family.batch(specs)), max_new_tokens=3)
    assert found.vhd[1].eq(0).all()
    assert found.t_vhd[1].eq(0).all()
    assert found.t_vhd[0].gt(0).all()


def test_generation_may_end_before_its_time(llava: Family) -> None:
    item = oracles.wide(llava.item(text=8, seed=1))
    said = greedy(llava, item, STEPS)
    settings = llava.model.generation_config
    settings.eos_token_id = said[1]
    try:
        found = regard.divergence(llava.model, item, max_new_tokens=STEPS)
    finally:
        settings.eos_token_id = None
    assert found.tokens.tolist() == said[: said.index(said[1]) + 1]
    assert found.t_vhd.shape == found.tokens.shape


def test_generation_is_greedy_whatever_the_models_defaults(llava: Family) -> None:
    item = oracles.wide(llava.item(text=8, seed=1))
    want = regard.divergence(llava.model, item, max_new_tokens=3)
    settings = llava.model.generation_config
    settings.num_beams, settings.return_dict_in_generate = 3, True
    try:
        found = regard.divergence(llava.model, item, max_new_tokens=3)
    finally:
        settings.num_beams, settings.return_dict_in_generate = 1, False
    assert torch.equal(found.tokens, want.tokens)
    torch.testing.assert_close(found.t_vhd, want.t_vhd, **CLOSE)


def test_the_model_is_as_before(family: Family) -> None:
    item = oracles.wide(family.item(text=8, seed=1))
    before = family.model(**item).logits
    regard.divergence(family.model, item, max_new_tokens=2)
    assert torch.equal(family.model(**item).logits, before)
    assert family.decoder.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_edits_that_are_on_act_on_the_stream_with_the_image(llava: Family) -> None:
    """VHR has a stream without the image too, over fewer layers and for the prompt only: one serves both."""
    item = llava.item(text=8, seed=1)
    vhr = oracles.VHRReference(llava, (1, 3))
    text = head_outputs(llava, without_image(llava, item))
    seen: list[Tensor] = []

    def reinforce(layer: int, heads: Tensor) -> Tensor:
        scaled = heads.clone()
        if layer in vhr.layers:
            scaled[:, vhr.select(layer, text[layer], heads[-1])] *= 2.0
        seen.append(scaled[-1])
        return scaled

    with oracles.on_heads(llava, reinforce):
        llava.model(**oracles.wide(item))
    with regard.apply(llava.model, regard.VHR(layers=(1, 3))):
        found = regard.divergence(llava.model, oracles.wide(item), max_new_tokens=3)
    torch.testing.assert_close(found.vhd, (torch.stack(seen) - text).square().sum(-1), **CLOSE)
    plain = regard.divergence(llava.model, oracles.wide(item))
    torch.testing.assert_close(found.vhd[0], plain.vhd[0], **CLOSE)
    assert (found.vhd[1] - plain.vhd[1]).abs().max() > 0.1


def test_half_precision_is_measured_in_single() -> None:
    net = build("llava")
    found = regard.divergence(net.model.bfloat16(), {k: _half(v) for k, v in net.inputs(text=8).items()})
    assert found.vhd.dtype == torch.float32
    assert torch.isfinite(found.vhd).all()


def _half(value: Tensor) -> Tensor:
    return value.bfloat16() if value.is_floating_point() else value


def test_cross_attention_layers_are_left_out() -> None:
    net = build("mllama")
    found = regard.divergence(net.model, net.item(text=8))
    assert found.layers == (0, 2)
    assert found.vhd.shape == (2, net.heads)


@pytest.mark.parametrize("top", [0, -1, 9])
def test_a_wrong_number_of_heads_says_so(llava: Family, top: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to 8, got {top}"):
        regard.divergence(llava.model, llava.item(), top=top)


def test_a_prompt_without_an_image_is_an_error(llava: Family) -> None:
    with pytest.raises(regard.NoImageTokens):
        regard.divergence(llava.model, llava.item(image=False))
    assert llava.decoder.config._attn_implementation == "sdpa"
