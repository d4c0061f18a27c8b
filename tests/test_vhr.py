"""VHR against a reference without cache, batch or engine, in float64 (see `oracles.py`)."""

from __future__ import annotations

from dataclasses import replace

import oracles
import pytest
import torch
from families import Family, build
from oracles import VHRReference, assert_equal, logits_of
from torch import Tensor

import regard
from regard.hooks.anatomy import anatomy
from regard.interventions.vhr import drop_outliers, head_divergence, sensitive_heads

LAYERS = (0, 1, 2, 4)
NAMES = ("llava", "qwen2_vl", "internvl")


@pytest.fixture(scope="module", params=NAMES)
def family(request: pytest.FixtureRequest) -> Family:
    family = oracles.model(request.param)
    oracles.plant_heads(family)
    return family


@pytest.fixture(scope="module")
def llava() -> Family:
    family = oracles.model("llava")
    oracles.plant_heads(family)
    return family


def moved(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    return min(float((x - y).abs().amax()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("outlier_filter", [True, False])
def test_logits_equal_the_reference(family: Family, outlier_filter: bool) -> None:
    item = family.item(text=8, seed=1)
    reference = VHRReference(family, LAYERS, outlier_filter=outlier_filter)
    want = reference.logits(item)
    with regard.apply(family.model, regard.VHR(layers=LAYERS, outlier_filter=outlier_filter)):
        found = logits_of(family, item)
    assert_equal(family, item, 0, found, want)
    assert moved(found, logits_of(family, item)) > 0.5  # the identity would not pass
    assert any(reference.dropped.values()) == outlier_filter


def test_the_filter_and_its_order_matter_here(family: Family) -> None:
    """The model is one on which no filter, and divergences taken in one go before any head is scaled, differ."""
    item = family.item(text=8, seed=1)
    reference, plain = VHRReference(family, LAYERS), VHRReference(family, LAYERS, outlier_filter=False)
    reference.logits(item)
    plain.logits(item)
    assert reference.chosen != plain.chosen
    text = oracles.head_outputs(family, oracles.without_image(family, item))
    seen = oracles.head_outputs(family, item)
    at_once = {
        layer: VHRReference(family, LAYERS).select(layer, text[layer], seen[layer]) for layer in LAYERS
    }
    assert reference.chosen != at_once
    assert reference.chosen[0] == at_once[0]


def test_the_release_filters_only_where_the_spread_is_large() -> None:
    family = oracles.model("llava")  # heads of one strength: divergences spread by less than 1 in some layers
    for attention in family.attentions[1::2]:
        attention.v_proj.weight.data *= 0.3
    item = family.item(text=8, seed=0)
    found, chosen = {}, {}
    for variant, guard in (("paper", None), ("released", 1.0)):
        reference = VHRReference(family, LAYERS, guard=guard)
        want = reference.logits(item)
        with regard.apply(family.model, regard.VHR(layers=LAYERS, variant=variant)):
            found[variant] = logits_of(family, item)
        assert_equal(family, item, 0, found[variant], want)
        chosen[variant] = reference
    assert chosen["paper"].dropped[1] != chosen["released"].dropped[1] == []
    assert any(chosen["released"].dropped.values())
    assert moved(found["paper"], found["released"]) > 0.01


def test_every_row_of_a_batch_is_itself_alone(family: Family) -> None:
    """Left padding, two images, and a row of text only, which is not edited."""
    specs = [{"text": 12, "seed": 2}, {"text": 5, "seed": 3, "images": 2}, {"text": 9, "seed": 4}]
    inputs = family.batch([*specs, {"text": 7, "seed": 5, "image": False}])
    with regard.apply(family.model, regard.VHR(layers=LAYERS)):
        found = logits_of(family, inputs)
    chosen = []
    for row, spec in enumerate(specs):
        reference = VHRReference(family, LAYERS)
        assert_equal(family, inputs, row, found, reference.logits(family.item(**spec)))
        chosen.append(reference.chosen)
    assert chosen[0] != chosen[1] != chosen[2]
    plain = logits_of(family, family.item(text=7, seed=5, image=False))
    torch.testing.assert_close(found[0][3, -plain[0].shape[1] :], plain[0][0], **oracles.EXACT)
    torch.testing.assert_close(found[1][3], plain[1][0], **oracles.EXACT)


def test_a_row_without_an_image_is_never_edited_whatever_else_moved_it(llava: Family) -> None:
    """Another edit makes the two streams of a text-only row differ; that is not the image's doing."""
    inputs = llava.batch([{"text": 12, "seed": 2}, {"text": 7, "seed": 5, "image": False}])
    bias = regard.Bias(
        tuple(range(5)), lambda call: 2.0 * (torch.arange(call.key.shape[2]) % 3)[None, None, None]
    )
    with regard.apply(llava.model, bias):
        want = logits_of(llava, inputs)
    with regard.apply(llava.model, bias, regard.VHR(layers=LAYERS)):
        found = logits_of(llava, inputs)
    for got, before in zip(found, want, strict=True):
        torch.testing.assert_close(got[1], before[1], **oracles.EXACT)
        assert (got[0] - before[0]).abs().max() > 0.5


@torch.no_grad()
def test_padding_on_the_right_moves_the_last_row(llava: Family) -> None:
    items = [llava.item(text=9, seed=2), llava.item(text=5, seed=3)]
    inputs = llava.batch([{"text": 9, "seed": 2}, {"text": 5, "seed": 3}])
    for key in ("input_ids", "attention_mask"):
        inputs[key][1] = inputs[key][1].roll(-4)
    with regard.apply(llava.model, regard.VHR(layers=LAYERS)):
        found = llava.model(**oracles.wide(inputs)).logits
    for row, item in enumerate(items):
        length = item["input_ids"].shape[1]
        want = VHRReference(llava, LAYERS).logits(item)[:length]
        torch.testing.assert_close(found[row, :length], want, **oracles.EXACT)


def test_each_prompt_of_a_run_chooses_its_own_heads(family: Family) -> None:
    items = [family.item(text=8, seed=seed) for seed in (1, 6, 1)]
    with regard.apply(family.model, regard.VHR(layers=LAYERS)):
        found = [logits_of(family, item) for item in items]
    for item, logits in zip(items, found, strict=True):
        assert_equal(family, item, 0, logits, VHRReference(family, LAYERS).logits(item))
    assert torch.equal(found[0][1], found[2][1])


def test_a_smaller_alpha_weakens_and_one_changes_nothing(llava: Family) -> None:
    item = llava.item(text=8, seed=1)
    base = logits_of(llava, item)
    for alpha in (0.2, 1.0):
        with regard.apply(llava.model, regard.VHR(alpha=alpha, layers=LAYERS)):
            found = logits_of(llava, item)
        assert_equal(llava, item, 0, found, VHRReference(llava, LAYERS, alpha=alpha).logits(item))
        assert (moved(found, base) > 0.1) == (alpha != 1.0)


def test_a_layer_named_twice_is_scaled_once(llava: Family) -> None:
    item = llava.item(text=8, seed=1)
    with regard.apply(llava.model, regard.VHR(layers=(3, 1, 1, 3))):
        found = logits_of(llava, item)
    assert_equal(llava, item, 0, found, VHRReference(llava, (1, 3)).logits(item))


def test_two_vhrs_share_one_stream_without_the_image(llava: Family) -> None:
    item = llava.item(text=8, seed=1)
    with regard.apply(llava.model, regard.VHR(layers=(1,)), regard.VHR(layers=(2, 4))):
        found = logits_of(llava, item)
    assert_equal(llava, item, 0, found, VHRReference(llava, (1, 2, 4)).logits(item))


@pytest.mark.parametrize("kind", ["llava", "llava_next", "instructblip", "instructblipvideo"])
def test_default_layers_are_the_papers(kind: str) -> None:
    parts = anatomy(build("llava").model)
    sites = tuple(parts.sites[0]._replace(layer=layer) for layer in range(32))
    parts = replace(parts, model_type=kind, layers=32, sites=sites)
    instructblip = kind.startswith("instructblip")
    want = tuple(range(14, 32)) if instructblip else (1, *range(18, 32))
    assert regard.VHR().chosen_layers(parts) == want
    assert regard.VHR.for_model(parts).chosen_layers(parts) == want


def test_default_layers_of_shallow_models_hold_no_layer_twice() -> None:
    parts = anatomy(build("llava").model)
    for depth in range(1, 33):
        sites = tuple(parts.sites[0]._replace(layer=layer) for layer in range(depth))
        layers = regard.VHR().chosen_layers(replace(parts, layers=depth, sites=sites))
        assert list(layers) == sorted(set(layers))
        assert set(layers) <= set(range(depth))
        assert depth - 1 in layers
        assert (1 in layers) == (depth > 1)


def test_cross_attention_layers_are_left_out() -> None:
    parts = anatomy(build("mllama").model)
    assert parts.cross_layers == (1, 3)
    assert set(regard.VHR().chosen_layers(parts)) <= set(parts.self_layers)


def test_defaults_are_the_papers() -> None:
    vhr = regard.VHR()
    assert (vhr.alpha, vhr.outlier_filter, vhr.variant, vhr.layers) == (2.0, True, "paper", None)


# ---------------------------------------------------------------------------------- the pure functions


def test_the_divergence_is_squared() -> None:
    a, b = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), torch.zeros(1, 2, 2)
    assert head_divergence(a, b).tolist() == [[25.0, 1.0]]
    assert head_divergence(a.half(), b.half()).dtype == torch.float32
    assert head_divergence((200 * a).half(), b.half())[0, 0] == 1e6  # more than fp16 holds


@pytest.mark.parametrize(
    ("divergence", "heads"),
    [
        ([4.0, 1.0, 3.0, 2.0], [0, 2]),  # H / 2 of an even number
        ([5.0, 1.0, 4.0, 2.0, 3.0], [0, 2]),  # fewer than half of an odd one
        ([1.0, 1.0, 2.0, 3.0], [2, 3]),
        ([1.0, 2.0, 2.0, 3.0], [3]),  # ties with the median stay out
        ([0.0, 0.0, 0.0, 7.0], [3]),
        ([2.0, 2.0, 2.0, 2.0], []),
    ],
)
def test_heads_above_the_lower_median(divergence: list[float], heads: list[int]) -> None:
    assert sensitive_heads(torch.tensor([divergence]))[0].nonzero().flatten().tolist() == heads


def _outputs(strength: list[float]) -> Tensor:
    return torch.tensor(strength).sqrt()[None, :, None]


def test_an_outlier_diverges_and_is_strong_without_the_image() -> None:
    high, flat = [9.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]
    for divergence, strength, kept in ((high, high, 0.0), (high, flat, 9.0), (high, high[::-1], 9.0)):
        assert drop_outliers(torch.tensor([divergence]), _outputs(strength), None)[0, 0] == kept
    flat_divergence = drop_outliers(torch.tensor([flat]), _outputs(high), None)
    assert flat_divergence.tolist() == [flat]


def test_the_spread_is_the_unbiased_one() -> None:
    """mean + std of these is 0.690 with n in the denominator and 0.712 with n - 1."""
    values = [1.0, 1.0, 0.7, *[0.0] * 7]
    found = drop_outliers(torch.tensor([values]), _outputs(values), None)[0]
    assert found.nonzero().flatten().tolist() == [2]


def test_the_guard_is_per_sample_and_strict() -> None:
    """The standard deviation of [2, 0, 0, 0] is exactly 1, which is not above 1."""
    divergence = torch.tensor([[2.0, 0.0, 0.0, 0.0], [2.5, 0.0, 0.0, 0.0]])
    outputs = torch.cat([_outputs([9.0, 1.0, 1.0, 1.0])] * 2)
    assert drop_outliers(divergence, outputs, 1.0)[:, 0].tolist() == [2.0, 0.0]
    assert drop_outliers(divergence, outputs, None)[:, 0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounding_error_is_no_divergence(dtype: torch.dtype) -> None:
    without = torch.randn(1, 6, 32, dtype=torch.float64).to(dtype)
    noise = without * (1 + torch.finfo(dtype).eps * torch.randn_like(without).sign() / 2)
    assert head_divergence(noise, without).eq(0).all()
    assert head_divergence(without * 1.1, without).gt(0).all()


# ----------------------------------------------------------------------------------------------- errors


def test_wrong_arguments_say_so() -> None:
    with pytest.raises(ValueError, match="'paper' or 'released', got 'mine'"):
        regard.VHR(variant="mine")  # type: ignore[arg-type]
    net = build("llava").model
    with pytest.raises(regard.OutOfRange, match=r"layer 3, but model\.language_model has layers 0 to 2"):
        regard.apply(net, regard.VHR(layers=(1, 3))).start()
    with pytest.raises(regard.OutOfRange, match="layer -1"):
        regard.apply(net, regard.VHR(layers=(-1,))).start()


def test_a_prompt_without_an_image_is_an_error(llava: Family) -> None:
    item = llava.item(image=False)
    with (
        regard.apply(llava.model, regard.VHR(layers=LAYERS)),
        pytest.raises(regard.NoImageTokens, match="vhr"),
    ):
        llava.model(**item)
