"""VAR against a reference that loops over heads and rows, in float64 (see `oracles.py`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
from families import BOS, Family, Inputs, build
from oracles import FORCED, SINK_DIMS, VARReference, assert_equal, logits_of
from torch import Tensor

import regard
from regard.hooks.anatomy import anatomy
from regard.interventions.var import GROUPS, VAR

NAMES = ("llava", "qwen2_vl", "internvl")
TAU = 3.0
# variant: (arguments of VAR, layers of 5, arguments of the reference). Numbers at which no convention can
# be taken for the other: a transfer that is not a half, a rho whose two readings differ.
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...], dict[str, Any]]] = {
    "paper": ({"transfer": 0.6, "rho": 0.7}, (2, 3), {"keep": 0.4, "rho": 0.3}),
    "released": ({"transfer": 0.7, "rho": 0.35}, (2, 3, 4), {"keep": 0.7, "rho": 0.35, "strict": True}),
}


@pytest.fixture(scope="module", params=NAMES)
def family(request: pytest.FixtureRequest) -> Family:
    family = oracles.model(request.param)
    oracles.plant_sinks(family)
    return family


@pytest.fixture(scope="module")
def llava() -> Family:
    family = oracles.model("llava")
    oracles.plant_sinks(family)
    return family


def var(variant: str = "paper", **more: Any) -> VAR:
    return VAR(**{"sink_dims": SINK_DIMS, "tau": TAU, "variant": variant, **CASES[variant][0], **more})


def reference(family: Family, variant: str = "paper", **more: Any) -> VARReference:
    _, layers, arguments = CASES[variant]
    return VARReference(family, **{"layers": layers, "tau": TAU, **arguments, **more})


def gap(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    return min(float((x - y).abs().amax()) for x, y in zip(a, b, strict=True))


def assert_rich(family: Family, item: Inputs, want: VARReference) -> None:
    """The sample has all that VAR must tell apart, so a wrong reading of any of it shows."""
    ids, image = item["input_ids"][0], family.image_tokens(item)[0]
    end, prompt = int(image.nonzero().max()) + 1, len(ids)
    layer = want.layers[0]
    sinks = want.sinks[layer]
    assert BOS in ids[sinks]  # a text sink in front
    assert any(image[j] for j in sinks)
    assert any(j >= end for j in sinks)  # and one after the image
    rows = {(head, row) for at, head, row in want.selected if at == layer}
    assert {row for _, row in rows if row < prompt}
    assert {row for _, row in rows if row >= prompt}
    of_heads = [{row for h, row in rows if h == head} for head in range(family.heads)]
    assert len({frozenset(of_head) for of_head in of_heads}) > 2  # rows choose their own heads
    assert set.union(*of_heads) != set.intersection(*of_heads)


@pytest.mark.parametrize("variant", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_logits_equal_the_reference(family: Family, variant: str, seed: int) -> None:
    item = family.item(text=9, seed=seed)
    checked = reference(family, variant)
    want = checked.logits(item)
    with regard.apply(family.model, var(variant)):  # the layers are the default
        found = logits_of(family, item)
    assert_equal(family, item, 0, found, want)
    assert gap(found, logits_of(family, item)) > 0.01  # the identity would not pass
    if family.name == "llava":
        assert_rich(family, item, checked)


def test_generated_tokens_are_never_sinks_though_they_look_like_it(llava: Family) -> None:
    item = llava.item(text=9, seed=1)
    whole = oracles.sequence(llava, item)
    states: list[Tensor] = []
    handle = llava.decoder.layers[2].register_forward_pre_hook(lambda m, args: states.append(args[0][0]))
    llava.model(**whole.inputs)
    handle.remove()
    phi = states[0].abs() / states[0].square().mean(-1, keepdim=True).sqrt()
    assert phi[whole.prompt :, list(SINK_DIMS)].amax(-1).ge(TAU).any()


@pytest.mark.parametrize("tau", [1.0, 2.0, 4.0])
def test_sinks_are_read_at_the_input_of_each_block(llava: Family, tau: float) -> None:
    """At some threshold the sinks of two layers differ, so reading one layer off would show."""
    item = llava.item(text=9, seed=4)
    checked = reference(llava, tau=tau, layers=(0, 1, 2, 3, 4))
    want = checked.logits(item)
    with regard.apply(llava.model, var(tau=tau, layers=(0, 1, 2, 3, 4))):
        assert_equal(llava, item, 0, logits_of(llava, item), want)
    assert len({tuple(sinks) for sinks in checked.sinks.values()}) > 1


@pytest.mark.parametrize("variant", CASES)
def test_every_row_of_a_batch_is_itself_alone(family: Family, variant: str) -> None:
    """Left padding, two images with text between, and a row of text only, which is not edited."""
    specs = [{"text": 12, "seed": 1}, {"text": 5, "seed": 3, "images": 2}, {"text": 9, "seed": 0}]
    inputs = family.batch([*specs, {"text": 7, "seed": 5, "image": False}])
    with regard.apply(family.model, var(variant)):
        found = logits_of(family, inputs)
    sinks = []
    for row, spec in enumerate(specs):
        checked = reference(family, variant)
        assert_equal(family, inputs, row, found, checked.logits(family.item(**spec)))
        sinks.append(checked.sinks)
    assert sinks[0] != sinks[1] != sinks[2]
    plain = logits_of(family, family.item(text=7, seed=5, image=False))
    torch.testing.assert_close(found[0][3, -plain[0].shape[1] :], plain[0][0], **oracles.EXACT)
    torch.testing.assert_close(found[1][3], plain[1][0], **oracles.EXACT)


def test_nothing_leaks_from_one_prompt_into_the_next(family: Family) -> None:
    """The release reuses the first sample's sinks and drops its row limit from the second sample on."""
    items = [family.item(text=9 + extra, seed=seed) for seed, extra in ((1, 0), (0, 3), (1, 0))]
    with regard.apply(family.model, var()):
        found = [logits_of(family, item) for item in items]
    for item, logits in zip(items, found, strict=True):
        assert_equal(family, item, 0, logits, reference(family).logits(item))
    assert torch.equal(found[0][1], found[2][1])


def test_rows_of_the_image_and_before_it_are_left_alone(llava: Family) -> None:
    """With every row chosen that may be: the states of the other rows are bit-equal to the plain model's."""
    item = oracles.wide(llava.item(text=9, seed=1))
    end = int(llava.image_tokens(item)[0].nonzero().max()) + 1
    plain = llava.model(**item).logits
    with regard.apply(llava.model, var(rho=0.0, min_visual=0.0, layers=(0, 1, 2, 3, 4))):
        found = llava.model(**item).logits
    assert torch.equal(found[:, :end], plain[:, :end])
    assert (found != plain)[:, end:].any(-1).all()


def test_without_an_image_sink_the_text_sinks_stay(llava: Family) -> None:
    """By the first channel alone text tokens are sinks and image tokens are not."""
    item = llava.item(text=9, seed=1)
    one = {"tau": TAU, "rho": 0.0, "min_visual": 0.0, "sink_dims": SINK_DIMS[:1]}
    checked = reference(llava, rho=1.0, least=0.0, dims=SINK_DIMS[:1])
    checked.logits(item)
    image = llava.image_tokens(item)[0]
    assert all(len(sinks) > 2 and not image[sinks].any() for sinks in checked.sinks.values())
    plain = logits_of(llava, item)
    with regard.apply(llava.model, VAR(**one)):
        found = logits_of(llava, item)
    torch.testing.assert_close(found[0], plain[0], **oracles.EXACT)
    torch.testing.assert_close(found[1], plain[1], **oracles.EXACT)


@pytest.mark.parametrize("transfer", [0.0, 0.3, 1.0])
def test_any_transfer(llava: Family, transfer: float) -> None:
    item = llava.item(text=9, seed=1)
    with regard.apply(llava.model, var(transfer=transfer)):
        found = logits_of(llava, item)
    assert_equal(llava, item, 0, found, reference(llava, keep=1 - transfer).logits(item))


@pytest.mark.parametrize("least", [0.05, 0.5, 0.9])
def test_any_least_image_mass(llava: Family, least: float) -> None:
    item = llava.item(text=9, seed=1)
    with regard.apply(llava.model, var(min_visual=least)):
        found = logits_of(llava, item)
    checked = reference(llava, least=least)
    assert_equal(llava, item, 0, found, checked.logits(item))
    assert len(checked.selected) != len(_selected(llava, item, 0.2))


def _selected(family: Family, item: Inputs, least: float) -> set[tuple[int, int, int]]:
    checked = reference(family, least=least)
    checked.logits(item)
    return checked.selected


def test_single_precision_is_close(llava: Family) -> None:
    item = llava.item(text=9, seed=1)
    want = reference(llava).logits(item)
    single = oracles.model("llava")
    oracles.plant_sinks(single)
    single.model.float()
    with regard.apply(single.model, var()):
        found = single.model(**item).logits[0]
    torch.testing.assert_close(found.double(), want[: len(found)], atol=3e-4, rtol=1e-4)


def test_two_vars_keep_their_own_sinks(llava: Family) -> None:
    """The second sees the masses that the first left, and its own sinks."""
    item = llava.item(text=9, seed=0)
    whole = oracles.sequence(llava, item)
    first, second = reference(llava, tau=2.0), reference(llava, keep=0.1, least=0.3)
    edit_one, edit_two = first.edit, second.edit
    first.edit = lambda *a: edit_two(a[0], edit_one(*a), *a[2:])  # type: ignore[method-assign]
    want = first.logits(item)
    assert first.sinks != second.sinks
    assert first.selected != second.selected != set()
    with regard.apply(llava.model, var(tau=2.0), var(transfer=0.9, min_visual=0.3)):
        found = logits_of(llava, item)
    assert_equal(llava, item, 0, found, want)
    assert len(want) == whole.prompt + len(FORCED) - 1


def test_vhr_beside_var_measures_what_var_left(family: Family) -> None:
    item = family.item(text=9, seed=1)
    vhr, text = oracles.VHRReference(family, (2, 3, 4)), oracles.without_image(family, item)
    alone, last = oracles.head_outputs(family, text), item["input_ids"].shape[1] - 1

    def reinforce(layer: int, heads: Tensor) -> Tensor | None:
        if layer not in vhr.layers:
            return None
        scaled = heads.clone()
        scaled[:, vhr.select(layer, alone[layer], heads[last])] *= 2.0
        return scaled

    with oracles.on_heads(family, reinforce):
        want = reference(family).logits(item)
    for order in ((regard.VHR(layers=(2, 3, 4)), var()), (var(), regard.VHR(layers=(2, 3, 4)))):
        with regard.apply(family.model, *order):
            assert_equal(family, item, 0, logits_of(family, item), want)


# ---------------------------------------------------------------------------------- the pure functions


def masses(text: float, image: float, image_sink: float, text_sink: float) -> Tensor:
    return torch.tensor([text, image, image_sink, text_sink], dtype=torch.float64)


def changed(policy: VAR, row: Tensor) -> bool:
    return bool((policy.policy(row) != 1).any())


@pytest.mark.parametrize("variant", CASES)
def test_mass_is_moved_not_made(variant: str) -> None:
    row = torch.rand(500, 4, dtype=torch.float64)
    row /= row.sum(-1, keepdim=True)
    policy = var(variant, rho=0.5)
    new = row * policy.policy(row)
    torch.testing.assert_close(new.sum(-1), row.sum(-1))
    assert torch.equal(new[:, GROUPS.index("text")], row[:, 0])
    chosen = (policy.policy(row) != 1).any(-1)
    assert 0 < chosen.sum() < 500
    kept = 0.4 if variant == "paper" else 0.7
    torch.testing.assert_close(new[chosen, 2:], kept * row[chosen, 2:])


def test_the_bounds_belong_to_the_chosen() -> None:
    assert changed(var(rho=0.5), masses(0.5, 0.25, 0.25, 0.0))  # both are met exactly
    assert not changed(var(rho=0.5), masses(0.48, 0.25, 0.27, 0.0))
    assert changed(var(min_visual=0.5, rho=0.0), masses(0.5, 0.25, 0.25, 0.0))
    assert not changed(var(min_visual=0.5, rho=0.0), masses(0.51, 0.25, 0.24, 0.0))
    assert changed(var("released", rho=0.5), masses(0.5, 0.25, 0.25, 0.0))
    assert not changed(var("released", rho=0.25), masses(0.5, 0.25, 0.25, 0.0))


def test_rho_means_the_other_share_in_the_release() -> None:
    few_sinks, many_sinks = masses(0.2, 0.7, 0.1, 0.0), masses(0.2, 0.1, 0.7, 0.0)
    assert [changed(var(rho=0.8), row) for row in (few_sinks, many_sinks)] == [True, False]
    assert [changed(var("released", rho=0.2), row) for row in (few_sinks, many_sinks)] == [True, False]
    assert [changed(var(rho=0.1), row) for row in (few_sinks, many_sinks)] == [True, True]
    assert [changed(var("released", rho=0.1), row) for row in (few_sinks, many_sinks)] == [False, False]


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_nothing_to_give_or_nobody_to_take(rho: float) -> None:
    for row in (masses(0.3, 0.7, 0, 0), masses(0.3, 0.4, 0, 0.3), masses(0.3, 0, 0.7, 0), masses(1, 0, 0, 0)):
        assert not changed(var(rho=rho), row)
        assert torch.isfinite(var(rho=rho).policy(row)).all()


def test_the_threshold_is_met_in_the_paper_and_passed_in_the_release() -> None:
    """One channel of four holds all: |x| / rms(x) is exactly 2, as 1e-6 is lost beside 2^22."""
    hidden = torch.tensor([[[0.0, -4096.0, 0.0, 0.0]]])
    for strength, want in ((2.0, [True, False]), (1.99, [True, True]), (2.01, [False, False])):
        found = [var(v, tau=strength).sinks(hidden, (1,)).item() for v in ("paper", "released")]
        assert found == want
    assert not var(tau=0.1).sinks(hidden, (0, 2)).item()
    assert var(tau=2.0).sinks((hidden * 10).half(), (1,)).item()  # its square is beyond fp16


def test_default_layers() -> None:
    parts = anatomy(build("mllama").model)
    assert parts.cross_layers == (1, 3)
    assert VAR().chosen_layers(parts) == (2,)
    parts = anatomy(oracles.model("llava").model)
    assert VAR().chosen_layers(parts) == (2, 3)
    assert VAR(variant="released").chosen_layers(parts) == (2, 3, 4)
    assert VAR(layers=(4, 0, 4)).chosen_layers(parts) == (0, 4)


def test_defaults_are_the_papers() -> None:
    found = VAR()
    assert (found.transfer, found.rho, found.tau, found.min_visual) == (0.6, 0.5, 20.0, 0.2)
    assert (found.variant, found.sink_dims, found.layers) == ("paper", None, None)


# ----------------------------------------------------------------------------------------------- errors


def test_an_unknown_base_model_is_told_the_way_out() -> None:
    net = build("llava").model
    with pytest.raises(regard.RegardError, match=r"3 layers, 64 channels.*sink_dimensions.*VAR\(sink_dims="):
        regard.apply(net, "var")
    assert net.model.language_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("key", ["transfer", "rho", "min_visual"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_fractions_are_fractions(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{key} is a fraction from 0 to 1, got {value}"):
        VAR(**{key: value})


def test_wrong_arguments_say_so() -> None:
    net = build("llava").model
    with pytest.raises(ValueError, match="'paper' or 'released', got 'code'"):
        VAR(variant="code")  # type: ignore[arg-type]
    for dim in (-1, 64):
        with pytest.raises(
            ValueError, match=rf"sink_dims \[{dim}\] lie outside of the decoder's 64 channels"
        ):
            regard.apply(net, VAR(sink_dims=(3, dim)))
    with pytest.raises(regard.OutOfRange, match="layer 7"):
        regard.apply(net, VAR(sink_dims=(3,), tau=2.0, layers=(2, 7))).start()


def test_a_threshold_that_no_token_can_reach_is_an_error() -> None:
    net = build("llava").model
    with pytest.raises(ValueError, match=r"below 8 in 64 channels and tau is 20; .*sink_dimensions"):
        regard.apply(net, VAR(sink_dims=(3,)))
    regard.apply(net, VAR(sink_dims=(3,), tau=7.9))


def test_a_narrow_model_that_is_known_brings_its_own_threshold() -> None:
    """The miniature has 128 channels, so 20 cannot be; a threshold that can be is kept."""
    parts = replace(anatomy(build("llava").model), hidden=128, layers=6)
    state = torch.zeros(1, 2, 128)
    state[0, :, 7], state[0, :, 8] = torch.tensor([10.0, 7.0]), 10.0  # |x| / rms(x) of 8.0 and 6.5
    for tau, want in ((20.0, [True, True]), (7.0, [True, False]), (4.0, [True, True])):
        reader, _ = VAR(tau=tau).edits(parts)
        assert reader.read(state, None)[0].tolist() == want


def test_a_prompt_without_an_image_is_an_error(llava: Family) -> None:
    with regard.apply(llava.model, var()), pytest.raises(regard.NoImageTokens, match="var needs an image"):
        llava.model(**llava.item(image=False))
