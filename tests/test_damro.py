"""DAMRO against hand-made negative prompts, by forwards without a cache, one sample at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families import Family, Inputs, build
from oracles import wide
from torch import Tensor

import regard
from regard.hooks.anatomy import anatomy
from regard.hooks.tower import attention_layers, find_tower
from regard.interventions.damro import outliers, ranks

STEPS = 4
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
KINDS = ("llava", "llava_next", "instructblip")


@pytest.fixture(scope="module", params=KINDS)
def family(request: pytest.FixtureRequest) -> Family:
    return double(request.param)


@pytest.fixture(scope="module")
def llava() -> Family:
    return double("llava")


def double(name: str) -> Family:
    found = build(name)
    found.model.double()
    return found


# -------------------------------------------------------------------------------------------- the oracle


def unsplit_probs(family: Family, pixels: Tensor, layer: int) -> Tensor:
    """softmax(Q K^T C^-0.5) of all channels at once, as the release writes it: the CLS row, (N, P)."""
    tower: Any = find_tower(family.model)[1]
    states = tower(pixels, output_hidden_states=True).hidden_states
    index = range(len(states) - 1)[layer]
    block = [m for m in tower.modules() if hasattr(m, "self_attn")][index]
    entering = block.layer_norm1(states[index])
    query, key = block.self_attn.q_proj(entering), block.self_attn.k_proj(entering)
    return (query @ key.transpose(1, 2) * query.shape[-1] ** -0.5).softmax(-1)[:, 0, 1:]


def head_probs(family: Family, pixels: Tensor, layer: int) -> Tensor:
    """Mean over heads of the probs of a stock eager tower: the CLS row, (N, P)."""
    tower: Any = find_tower(build(family.name).model.double())[1]
    tower.set_attn_implementation("eager")
    return tower(pixels, output_attentions=True).attentions[layer].mean(1)[:, 0, 1:]


def strongest(values: Tensor, count: int) -> list[int]:
    """Indices of the largest values (P,), the largest first."""
    return sorted(range(len(values)), key=lambda j: -values[j].item())[:count]


def negative_embeddings(
    family: Family, item: Inputs, count: int, layer: int, by_position: bool, zeroed: bool
) -> Tensor:
    """The prompt with K patches of each image, (1, T, C): text between, LLaVA-NeXT with a newline behind."""
    inner = family.model.model
    features = inner.vision_tower(
        item["pixel_values"].flatten(0, 1) if item["pixel_values"].ndim == 5 else item["pixel_values"],
        output_hidden_states=True,
    ).hidden_states[-2][:, 1:]
    pixels = item["pixel_values"]
    tiles = pixels.shape[1] if pixels.ndim == 5 else 1
    crops = pixels.flatten(0, 1) if pixels.ndim == 5 else pixels
    probs = head_probs(family, crops, layer) if zeroed else unsplit_probs(family, crops, layer)
    words = family.model.get_input_embeddings()(item["input_ids"])[0]
    runs: list[Tensor] = []
    image, number = family.image_tokens(item)[0].tolist(), 0
    for position, is_image in enumerate(image):
        if not is_image:
            runs.append(words[position])
        elif not image[position - 1]:  # every image of these prompts has text in front
            crop = number * tiles
            chosen = strongest(probs[crop], count)
            for patch in range(features.shape[1]) if zeroed else sorted(chosen) if by_position else chosen:
                token = inner.multi_modal_projector(features[crop, patch][None, None])[0, 0]
                runs.append(token * (patch in chosen) if zeroed else token)
            if family.name == "llava_next":
                runs.append(inner.image_newline)
            number += 1
    return torch.stack(runs)[None]


class Reference:
    """z and z' of one sample at each step, from whole sequences."""

    def __init__(self, family: Family, item: Inputs, count: int, layer: int = -2, **more: Any) -> None:
        self.family, self.item, self.more = family, wide(item), more
        if family.name == "instructblip":
            self.states = self.blip_states(count)
        else:
            by_position = more.get("order") == "position"
            zeroed = more.get("variant") == "medheval"
            self.negative = negative_embeddings(family, self.item, count, layer, by_position, zeroed)

    def blip_states(self, count: int) -> Tensor:
        pixels = self.item["pixel_values"]
        probs = head_probs(self.family, pixels, -2)[0]
        states = find_tower(self.family.model)[1](pixels).last_hidden_state
        shift = 0 if self.more.get("variant") == "released" else 1
        return states[:, [j + shift for j in strongest(probs, count)]]

    def logits(self, prefix: Sequence[int]) -> tuple[Tensor, Tensor]:
        model, grown = self.family.model, self.item
        for token in prefix:
            grown = self.family.grow(grown, torch.tensor([token]))
        plain = model(**grown, use_cache=False).logits[0, -1]
        if self.family.name == "instructblip":
            tower = find_tower(model)[1]

            def swap(module: Any, args: Any, output: Any) -> Any:
                return type(output)(last_hidden_state=self.states)

            handle = tower.register_forward_hook(swap)
            other = model(**grown, use_cache=False).logits[0, -1]
            handle.remove()
            return plain, other
        new = model.get_input_embeddings()(torch.tensor([list(prefix)], dtype=torch.long))
        embeds = torch.cat([self.negative, new.double()], 1)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        other = model.model.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
        return plain, model.lm_head(other.last_hidden_state)[0, -1]

    @torch.no_grad()
    def greedy(self, alpha: float, beta: float) -> tuple[list[int], Tensor]:
        """Tokens and logits (T, V) of greedy decoding."""
        tokens: list[int] = []
        rows: list[Tensor] = []
        for _ in range(STEPS):
            z, other = self.logits(tokens)
            fused = (1 + alpha) * z - alpha * other
            for v in range(len(z)):
                if beta and z[v] < math.log(beta) + z.max():
                    fused[v] = -math.inf
            rows.append(fused)
            tokens.append(int(fused.argmax()))
        return tokens, torch.stack(rows)


@torch.no_grad()
def generate(family: Family, inputs: Inputs, *edits: Any, **more: Any) -> tuple[Tensor, Tensor]:
    settings: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False} | more
    with regard.apply(family.model, *edits):
        out = family.model.generate(
            **wide(inputs), **settings, output_logits=True, return_dict_in_generate=True
        )
    logits = torch.stack(out.logits, 1)
    return out.sequences[:, -logits.shape[1] :], logits


def check(family: Family, specs: list[dict[str, Any]], method: regard.DAMRO, **more: Any) -> None:
    ids, logits = generate(family, family.batch(specs), method)
    for row, spec in enumerate(specs):
        oracle = Reference(family, family.item(**spec), method.tokens, method.layer, **more)
        tokens, want = oracle.greedy(method.alpha, method.beta)
        assert ids[row].tolist() == tokens
        torch.testing.assert_close(logits[row].double(), want, **CLOSE)
        plain, other = oracle.logits(tokens[:2])
        assert (plain - other).abs().max() > 0.05  # the second stream is another


# ---------------------------------------------------------------------------------------- the contrast


def test_one_sample(family: Family) -> None:
    check(family, [{"text": 6, "seed": 1}], regard.DAMRO(alpha=1.5, beta=0.1, tokens=2))


def test_a_padded_batch(family: Family) -> None:
    specs = [{"text": 4, "seed": 1}, {"text": 9, "seed": 2}, {"text": 6, "seed": 3}]
    check(family, specs, regard.DAMRO(alpha=0.7, beta=0.0, tokens=3))


def test_several_images_and_tiles() -> None:
    next_ = double("llava_next")
    specs: list[dict[str, Any]] = [{"images": 2, "seed": 5}, {"size": 2, "seed": 6}, {"size": 1, "text": 9}]
    check(next_, specs[:1], regard.DAMRO(tokens=2))
    mixed = [{"size": 2, "seed": 6}, {"size": 1, "text": 9}]
    ids, logits = generate(next_, next_.batch(mixed), regard.DAMRO(tokens=2))
    for row, spec in enumerate(mixed):
        tokens, want = Reference(next_, next_.item(**spec), 2).greedy(2.0, 0.1)
        assert ids[row].tolist() == tokens
        torch.testing.assert_close(logits[row].double(), want, **CLOSE)


def test_llava_with_unequal_numbers_of_images(llava: Family) -> None:
    check(llava, [{"images": 3, "seed": 5}, {"images": 1, "seed": 6}], regard.DAMRO(tokens=2))


@pytest.mark.parametrize(
    "more",
    [{"order": "position"}, {"variant": "early"}, {"variant": "released"}, {"variant": "medheval"}],
    ids=str,
)
def test_orders_and_variants(llava: Family, more: dict[str, Any]) -> None:
    check(
        llava,
        [{"text": 6, "seed": 1}, {"text": 3, "seed": 2, "images": 2}],
        regard.DAMRO(tokens=4, **more),
        **more,
    )


def test_variants_differ(llava: Family) -> None:
    inputs = llava.inputs(seed=1)
    found = []
    for more in ({"order": "position"}, {"variant": "early"}):
        found.append(generate(llava, inputs, regard.DAMRO(tokens=4, beta=0.0, **more))[1][:, 0])
    base = generate(llava, inputs, regard.DAMRO(tokens=4, beta=0.0))[1][:, 0]
    assert all((other - base).abs().max() > 1e-2 for other in found)


def test_the_released_index_on_instructblip_is_off_by_one() -> None:
    blip = double("instructblip")
    for variant in ("paper", "released"):
        method = regard.DAMRO(tokens=2, variant=variant)
        check(blip, [{"seed": 1}, {"seed": 2, "text": 9}], method, variant=variant)
    base, released = (
        generate(blip, blip.inputs(), regard.DAMRO(tokens=1, beta=0.0, variant=v))[1][:, 0]
        for v in ("paper", "released")
    )
    assert (base - released).abs().max() > 1e-3


# ---------------------------------------------------------------------------------- identities, neighbours


def test_alpha_zero_is_the_constraint_alone(family: Family) -> None:
    inputs = family.inputs(2, seed=4)
    _, plain = generate(family, inputs)
    _, found = generate(family, inputs, regard.DAMRO(alpha=0.0, beta=0.3))
    first = plain[:, 0]
    cut = first < first.amax(-1, keepdim=True) + math.log(0.3)
    assert torch.equal(found[:, 0], first.masked_fill(cut, -math.inf))
    assert cut.any()
    assert not cut.all()
    _, nothing = generate(family, inputs, regard.DAMRO(alpha=0.0, beta=0.0))
    assert torch.equal(nothing, plain)


def test_all_patches_by_position_leave_the_constraint_alone(llava: Family) -> None:
    inputs = llava.inputs(2, seed=4)
    _, whole = generate(llava, inputs, regard.DAMRO(tokens=99, order="position"))
    _, alone = generate(llava, inputs, regard.DAMRO(alpha=0.0))
    torch.testing.assert_close(whole, alone, **CLOSE)


def test_rows_without_an_image_keep_their_logits(llava: Family) -> None:
    specs = [{"image": False, "text": 8, "seed": 1}, {"text": 4, "seed": 2}]
    _, plain = generate(llava, llava.batch(specs))
    _, found = generate(llava, llava.batch(specs), regard.DAMRO(tokens=2))
    torch.testing.assert_close(found[0], plain[0], **CLOSE)
    assert (found[1, 0] - plain[1, 0]).abs().max() > 1e-2
    with pytest.raises(regard.NoImageTokens, match="damro"):
        generate(llava, llava.batch(specs[:1]), regard.DAMRO(tokens=2))


@pytest.mark.parametrize(
    "more", [{"num_beams": 2}, {"use_cache": False}, {"use_cache": False, "zeroed": True}], ids=str
)
def test_beams_and_no_cache(family: Family, more: dict[str, Any]) -> None:
    """A beam search of one prompt is that of the prompt in a batch; no cache gives what a cache gives."""
    method, more = regard.DAMRO(alpha=0.5, tokens=2), dict(more)
    if more.pop("zeroed", False):
        if family.name == "instructblip":
            pytest.skip("LLaVA's only")
        method = regard.DAMRO(alpha=0.5, tokens=2, variant="medheval")
    inputs = family.inputs(2, seed=3)
    if "num_beams" in more:
        ids = generate(family, inputs, method, **more)[0]
        for row in range(2):
            assert torch.equal(
                ids[row], generate(family, family.inputs(1, seed=3 + row), method, **more)[0][0]
            )
        return
    cached, found = generate(family, inputs, method), generate(family, inputs, method, **more)
    assert torch.equal(cached[0], found[0])
    torch.testing.assert_close(cached[1], found[1], **CLOSE)


# ------------------------------------------------------------------------------------------- the filter


def test_filter_hides_the_outliers_from_all_other_tokens(llava: Family) -> None:
    """As if the tokens had been cut out of the prompt and the others had kept their positions."""
    item = wide(llava.item(text=6, seed=1))
    with torch.no_grad():
        chosen = strongest(unsplit_probs(llava, item["pixel_values"], -2)[0], 3)
        features = llava.model.model.get_image_features(pixel_values=item["pixel_values"]).pooler_output[0]
        embeds = llava.model.get_input_embeddings()(item["input_ids"])
        image = llava.image_tokens(item)[0].nonzero().flatten()
        embeds[0, image] = features
        left = [s for s in range(embeds.shape[1]) if s not in image[chosen].tolist()]
        states = llava.model.model.language_model(
            inputs_embeds=embeds[:, left],
            attention_mask=torch.ones(
                1, len(left), dtype=torch.long
            ),  # else a jump of positions parts sequences
            position_ids=torch.tensor([left]),
            use_cache=False,
        ).last_hidden_state
        want = llava.model.lm_head(states)[0]
        with regard.apply(llava.model, regard.DAMRO(tokens=3, mode="filter")):
            found = llava.model(**item).logits[0]
        plain = llava.model(**item).logits[0]
    torch.testing.assert_close(found[left], want, **CLOSE)
    assert (found[-1] - plain[-1]).abs().max() > 1e-2


def test_filter_in_a_padded_batch_and_in_decode(llava: Family) -> None:
    specs = [{"text": 4, "seed": 1}, {"text": 9, "seed": 2, "images": 2}]
    method = regard.DAMRO(tokens=3, mode="filter")
    ids, logits = generate(llava, llava.batch(specs), method)
    for row, spec in enumerate(specs):
        own, alone = generate(llava, llava.item(**spec), method)
        assert torch.equal(ids[row], own[0])
        torch.testing.assert_close(logits[row], alone[0], **CLOSE)
    _, whole = generate(llava, llava.batch(specs), method, use_cache=False)
    torch.testing.assert_close(whole, logits, **CLOSE)


# -------------------------------------------------------------------------- pure functions, defaults, errors


def test_the_sum_of_head_scores_has_the_order_of_the_unsplit_softmax(llava: Family) -> None:
    pixels = wide(llava.inputs(2, seed=8))["pixel_values"]
    found: dict[int, Tensor] = {}

    def read(logits: Tensor, step: Any) -> Tensor:
        found.update(step.session.tower)
        return logits

    with torch.no_grad(), regard.apply(llava.model, regard.Tower(-2), regard.Logits(read)):
        llava.model(**wide(llava.inputs(2, seed=8)))
        want = unsplit_probs(llava, pixels, -2)
    assert outliers(found[-2], 9).tolist() == [strongest(row, 9) for row in want]
    assert outliers(found[-2], 9).tolist() != outliers(found[-2], 9, probs=True).tolist()
    assert len(attention_layers(find_tower(llava.model)[1])) == 2


def test_outliers_leave_cls_out_and_ranks_are_their_places() -> None:
    scores = torch.tensor([[[9.0, 1.0, 3.0, 2.0]]])
    assert outliers(scores, 2).tolist() == [[1, 2]]
    assert outliers(scores, 50).tolist() == [[1, 2, 0]]
    assert ranks(torch.tensor([[1, 2]]), 4).tolist() == [[2, 0, 1, 2]]


def test_defaults_by_model() -> None:
    for name in ("llava", "llava_next"):
        method = regard.recipe("damro", build(name).model)
        assert (method.alpha, method.beta, method.tokens) == (2.0, 0.1, 10)  # type: ignore[attr-defined]
    blip = regard.recipe("damro", build("instructblip").model)
    assert (blip.alpha, blip.beta, blip.tokens) == (0.5, 0.1, 4)  # type: ignore[attr-defined]
    assert not regard.DAMRO(alpha=0.0, beta=0.0).edits(anatomy(build("llava").model))


def test_bad_values_say_so() -> None:
    for bad, match in (
        ({"alpha": -1.0}, "alpha"),
        ({"beta": 1.5}, "beta"),
        ({"tokens": 0}, "tokens counts"),
        ({"variant": "mine"}, "variant must be one of 'paper'"),
        ({"order": "mine"}, "order must be"),
        ({"mode": "mine"}, "mode must be"),
    ):
        with pytest.raises(ValueError, match=match):
            regard.DAMRO(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["qwen2_vl", "internvl", "mllama", "paligemma"])
def test_other_models_are_refused_by_name(name: str) -> None:
    model = build(name).model
    with pytest.raises(regard.CannotEdit, match=f"this is {model.config.model_type}"):
        regard.apply(model, "damro").start()


def test_what_instructblip_cannot_do() -> None:
    model = build("instructblip").model
    with pytest.raises(regard.CannotEdit, match="queries, not patches"):
        regard.apply(model, regard.DAMRO(mode="filter")).start()
    with pytest.raises(regard.CannotEdit, match="LLaVA only"):
        regard.apply(model, regard.DAMRO(variant="early")).start()
