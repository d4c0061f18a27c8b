"""ICD: where the role goes in, and on which prompts; `test_contrast` holds its logits against whole forwards."""

from __future__ import annotations

import pytest
import torch

import regard
from regard.evals.miniature import load_miniature
from regard.evals.miniature.scenes import make_scene
from regard.interventions.icd import ICD, inserted
from tests.families import build
from tests.test_contrast import CLOSE, cut, disturbed, forced, generate

METHOD = ICD(alpha=2.0, beta=0.05, role_ids=(17, 33, 90), qformer_ids=(41, 12))


def test_rows_grow_at_their_own_places() -> None:
    value = torch.arange(8).view(2, 4)
    grown = inserted(value, torch.tensor([0, 3]), 2, torch.tensor([8, 9]))
    assert grown.tolist() == [[8, 9, 0, 1, 2, 3], [4, 5, 6, 8, 9, 7]]
    assert inserted(value, torch.tensor([4, 1]), 1, None).tolist() == [[0, 1, 2, 3, 3], [4, 4, 5, 6, 7]]


@pytest.mark.parametrize("name", ["gemma3", "paligemma", "mllama", "internvl", "idefics3", "qwen3_vl"])
def test_other_families_read_the_role_too(name: str) -> None:
    family = build(name)
    inputs = family.batch([{"text": 6, "seed": 2}])
    ids, logits = generate(family, inputs, METHOD, steps=3)
    other = disturbed(family, inputs)
    if "cross_attention_mask" in inputs:
        after = int(family.image_tokens(inputs)[0].nonzero().max()) + 1
        mask = inputs["cross_attention_mask"]
        parts = [mask[:, :after], mask[:, after - 1 : after].expand(-1, 3, -1, -1), mask[:, after:]]
        other["cross_attention_mask"] = torch.cat(parts, 1)
    z, negative = forced(family, inputs, ids[0]), forced(family, other, ids[0])
    expected = cut(3.0 * z - 2.0 * negative, z, 0.05)
    finite = ~expected.isinf()
    assert (z - negative).abs().max() > 1e-2
    assert torch.equal(finite, ~logits[0].isinf())
    assert torch.allclose(logits[0][finite], expected[finite], **CLOSE)


def test_a_prompt_without_an_image_keeps_its_logits() -> None:
    family = build("llava")
    inputs = family.batch([{"text": 6, "seed": 2}, {"text": 5, "seed": 1, "images": 0}])
    _, logits = generate(family, inputs, METHOD, steps=3)
    _, plain = generate(family, inputs, steps=3)
    assert torch.allclose(logits[1], plain[1], **CLOSE)
    assert not torch.allclose(logits[0, 0], plain[0, 0], **CLOSE)


def test_beams_read_the_role() -> None:
    family = build("qwen2_5_vl")
    inputs = family.batch([{"text": 6, "seed": 2}, {"text": 9, "seed": 1}])
    settings = {"do_sample": False, "max_new_tokens": 4, "num_beams": 3}
    with regard.apply(family.model, METHOD):
        both = family.model.generate(**inputs, **settings)
        alone = family.model.generate(**family.batch([{"text": 6, "seed": 2}]), **settings)
    assert torch.equal(both[0, -4:], alone[0, -4:])
    assert not torch.equal(both, family.model.generate(**inputs, **settings))


def test_a_token_that_closes_the_image_stays_with_it() -> None:
    family = build("llava")
    inputs = family.batch([{"text": 6, "seed": 2}])
    after = int(family.image_tokens(inputs)[0].nonzero().max()) + 1
    closing = int(inputs["input_ids"][0, after])
    session = type("Session", (), {"image": family.image_tokens(inputs)})
    ids = ICD(role_ids=(17,), closing=(closing,)).view(dict(inputs), session)["input_ids"][0]
    assert ids[after : after + 2].tolist() == [closing, 17]


def test_the_processor_has_the_tokens() -> None:
    model, processor = load_miniature("lvlm")
    made = ICD(role="is there a dog").with_processor(processor)
    assert made.role_ids == tuple(
        processor.tokenizer("is there a dog", add_special_tokens=False)["input_ids"]
    )
    inputs = processor(images=[make_scene(4).image], text=["<image> is there a dog"], return_tensors="pt")
    settings = {
        "do_sample": False,
        "max_new_tokens": 1,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    plain = model.generate(**inputs, **settings).logits[0]
    with regard.apply(model, ICD(beta=0.0, role="is there a dog"), processor=processor):
        by_processor = model.generate(**inputs, **settings).logits[0]
    with regard.apply(model, ICD(beta=0.0, role_ids=made.role_ids, closing=made.closing)):
        by_ids = model.generate(**inputs, **settings).logits[0]
    assert torch.equal(by_processor, by_ids)
    assert (by_processor - plain).abs().max() > 1e-2


def test_what_is_refused() -> None:
    family = build("llava")
    with pytest.raises(regard.CannotEdit, match="processor="), regard.apply(family.model, "icd"):
        pass
    with pytest.raises(ValueError, match="role_ids is empty"):
        ICD(role_ids=())
    blip = build("instructblip")
    with (
        pytest.raises(regard.CannotEdit, match="qformer_ids"),
        regard.apply(blip.model, ICD(role_ids=(17,))),
    ):
        blip.model.generate(**blip.batch([{"text": 6, "seed": 2}]), max_new_tokens=1)
