"""The zoo itself: stock transformers does with these models what the engine's tests take for granted."""

from __future__ import annotations

import pytest
import torch
from families import FAMILY_NAMES, FIRST_TEXT, Family, build
from torch import Tensor

from regard.hooks.kv_cache import cache_in

# Largest |difference| of logits (std 3, fp32) between two ways to the same number. Measured: under 2e-5.
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def family(request: pytest.FixtureRequest) -> Family:
    return build(request.param)


def generate(family: Family, inputs: dict[str, Tensor], **more: object) -> tuple[Tensor, Tensor]:
    """The new ids (B, 4) and their scores (B, 4, V) from stock greedy generate."""
    out = family.model.generate(
        **inputs,
        max_new_tokens=4,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        **more,
    )
    return out.sequences[:, -4:], torch.stack(out.scores, 1)


@torch.no_grad()
def last(family: Family, inputs: dict[str, Tensor]) -> Tensor:
    """The logits (B, V) at the last position."""
    return family.model(**inputs).logits[:, -1]


def gaps(family: Family, specs: list[dict[str, int]]) -> Tensor:
    """Per row: the largest difference of last logits between the left-padded batch and the prompt alone."""
    alone = torch.cat([last(family, family.item(**spec)) for spec in specs])
    return (last(family, family.batch(specs)) - alone).abs().amax(-1)


def test_forward_is_finite_and_attention_has_the_stated_shape(family: Family) -> None:
    with torch.no_grad():
        logits = family.model(**family.inputs(batch=2)).logits
    assert torch.isfinite(logits).all()
    assert 2 < logits[..., FIRST_TEXT:].std() < 5
    assert (logits[..., :FIRST_TEXT] == 0).all()
    assert len(family.attentions) == family.text_layers
    assert [m.layer_idx for m in family.attentions] == list(range(family.text_layers))
    assert family.decoder.config._attn_implementation == "sdpa"
    assert family.heads % family.kv_heads == 0


def test_the_image_tokens_are_where_the_config_says(family: Family) -> None:
    inputs = family.batch([{"text": 5}, {"text": 9, "size": family.sizes - 1}])
    found = family.image_tokens(inputs)
    assert found.any(-1).all()
    assert not found[inputs["attention_mask"] == 0].any()
    text = inputs["input_ids"][~found]
    assert ((text >= FIRST_TEXT) | (text < FIRST_TEXT - 2)).all()


def test_cached_generate_equals_generate_without_a_cache(family: Family) -> None:
    inputs = family.inputs(batch=2)
    ids, scores = generate(family, inputs)
    assert (ids >= FIRST_TEXT).all()
    ways = {"whole forwards": family.greedy(inputs, 4), "generate": generate(family, inputs, use_cache=False)}
    for name, (other_ids, other_scores) in ways.items():
        assert torch.equal(ids, other_ids), name
        torch.testing.assert_close(scores, other_scores, atol=TOLERANCE, rtol=0)


def test_generate_without_a_cache_has_none_where_we_say_so(family: Family) -> None:
    seen: list[bool] = []
    hook = family.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(cache_in(kwargs) is not None), with_kwargs=True
    )
    generate(family, family.inputs(), use_cache=False)
    hook.remove()
    assert seen == [not family.cache_free_generate] * 4


def test_static_cache_equals_dynamic(family: Family) -> None:
    if not family.supports_static:
        pytest.skip(family.notes)
    inputs = family.batch([{"text": 5}, {"text": 9, "seed": 1}])
    ids, scores = generate(family, inputs)
    static_ids, static_scores = generate(family, inputs, cache_implementation="static")
    assert torch.equal(ids, static_ids)
    torch.testing.assert_close(scores, static_scores, atol=TOLERANCE, rtol=0)


def test_beams_with_a_cache_equal_beams_without(family: Family) -> None:
    if not family.supports_beams:
        pytest.skip(family.notes)
    inputs = family.inputs(batch=2)
    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": 3}
    cached = family.model.generate(**inputs, **options)
    assert torch.equal(cached, family.model.generate(**inputs, **options, use_cache=False))


def test_a_left_padded_batch_equals_its_prompts_alone(family: Family) -> None:
    specs = [{"text": 5, "seed": 1}, {"text": 9, "seed": 2, "size": family.sizes - 1}]
    assert (gaps(family, specs).max() < TOLERANCE) == family.padded_batch_exact, family.notes
    _, scores = generate(family, family.batch(specs))
    alone = torch.cat([generate(family, family.item(**spec))[1] for spec in specs])
    assert ((scores - alone).abs().max() < TOLERANCE) == family.padded_batch_exact, family.notes


def test_rows_with_different_numbers_of_images(family: Family) -> None:
    if family.max_images == 1:
        pytest.skip(family.notes)
    more = [{"text": 5, "seed": 1}, {"text": 6, "seed": 2, "images": 2}]
    none = [{"text": 5, "seed": 1}, {"text": 9, "seed": 2, "image": False}]
    for specs in (more, none):
        assert (gaps(family, specs).max() < TOLERANCE) == family.uneven_batch_exact, family.notes


def test_the_model_sees_its_image(family: Family) -> None:
    inputs = family.item()
    other = {**inputs, "pixel_values": family.item(seed=5)["pixel_values"]}
    assert (last(family, inputs) - last(family, other)).abs().max() > 1


def test_text_without_an_image(family: Family) -> None:
    if not family.text_only:
        with pytest.raises(ValueError, match="pixel_values"):
            family.item(image=False)
        return
    inputs = family.item(image=False)
    assert set(inputs) - {"token_type_ids"} == {"input_ids", "attention_mask"}
    ids, scores = generate(family, inputs)
    assert torch.isfinite(scores).all()
    assert torch.equal(ids, family.greedy(inputs, 4)[0])


def test_attention_is_far_from_uniform(family: Family) -> None:
    """Attention without its keys' content, k = 0, gives other logits: an edit of attention must show."""
    inputs = family.inputs()
    before = last(family, inputs)
    hooks = [m.k_proj.register_forward_hook(lambda m, args, out: out * 0) for m in family.attentions]
    moved = (last(family, inputs) - before).abs().max()
    for hook in hooks:
        hook.remove()
    assert moved > 1
    assert torch.equal(last(family, inputs), before)


def test_a_rebuilt_model_has_the_same_weights_and_its_own_config(family: Family) -> None:
    again = build(family.name)
    weights = again.model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in family.model.state_dict().items())
    assert again.model.config is not family.model.config
    assert again.decoder.config is not family.decoder.config


def test_names_are_the_fourteen_families() -> None:
    assert len(FAMILY_NAMES) == 14
