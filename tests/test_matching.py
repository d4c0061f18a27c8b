"""Grad-CAM against finite differences of the matching score, masks against their share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import regard
from regard.evals.miniature import load_miniature
from regard.evals.miniature.scenes import make_scene
from regard.hooks.errors import CannotEdit
from regard.interventions.matching import AttentionMatcher, BlipMatcher, clean, kept_share, mask_from


class Words:
    """A tokenizer of whole words: [CLS] 2, one id from 10 a word, [SEP] 3, padding 0."""

    def get_vocab(self) -> dict[str, int]:
        return {"[ENC]": 4}

    def __call__(self, texts: list[str], **settings: Any) -> dict[str, Tensor]:
        rows = [[2, *(10 + sum(map(ord, word)) % 50 for word in text.split()), 3] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def tiny_blip(enc: int | None = None) -> BlipMatcher:
    shared = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = shared | {"vocab_size": 64, "encoder_hidden_size": 32, "num_hidden_layers": 3}
    vision = shared | {"image_size": 16, "patch_size": 4, "num_hidden_layers": 2}
    config = transformers.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=16)
    torch.manual_seed(3)
    model = transformers.BlipForImageTextRetrieval(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    pixels = SimpleNamespace(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25])
    return BlipMatcher(model, SimpleNamespace(tokenizer=Words(), image_processor=pixels), 1, enc)


TEXTS = ["Is there a dog?", "is there a small red car in the image"]


def by_differences(matcher: BlipMatcher, image: Tensor, text: str) -> Tensor:
    """The map of one image, each gradient taken by moving one prob a little, in float64."""
    model = matcher.model.double()
    ids, mask = matcher._tokens([text])
    pixels = matcher._pixels(image)[None]
    states = model.vision_model(pixel_values=pixels).last_hidden_state
    ids = torch.cat([ids.new_tensor([[4]]), ids[:, 1:]], 1)
    dropout = model.text_encoder.encoder.layer[1].crossattention.self.dropout
    shift: list[Any] = [0.0]
    seen: list[Tensor] = []

    def move(module: Any, args: Any) -> Any:
        seen.append(args[0])
        return (args[0] + shift[0],)

    def score() -> Tensor:
        text = model.text_encoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=states)
        return model.itm_head(text.last_hidden_state[:, 0])[0, 1]

    handle = dropout.register_forward_pre_hook(move)
    score()
    probs = seen[0]
    cam = torch.zeros(16, dtype=torch.float64)
    for head in range(probs.shape[1]):
        for row in range(1, probs.shape[2] - 1):
            for key in range(1, 17):
                step = torch.zeros_like(probs)
                step[0, head, row, key] = 1e-5
                shift[0] = step
                up = score()
                shift[0] = -step
                slope = (up - score()) / 2e-5
                cam[key - 1] += probs[0, head, row, key] * max(float(slope), 0.0)
    handle.remove()
    return cam.view(4, 4) / probs.shape[1] / (probs.shape[2] - 2)


@torch.no_grad()
def test_grad_cam_against_finite_differences() -> None:
    matcher = tiny_blip()
    image = torch.rand(3, 16, 16)
    want = by_differences(matcher, image, TEXTS[0])
    got = matcher([image], TEXTS[:1]).maps[0]
    assert torch.allclose(got.double(), want, rtol=1e-4, atol=1e-9)
    assert want.max() > 1e-6


def test_in_inference_mode_in_a_padded_batch() -> None:
    matcher = tiny_blip()
    images = [torch.rand(3, 16, 16), torch.rand(3, 20, 12)]
    single = [matcher([image], [text]) for image, text in zip(images, TEXTS, strict=True)]
    with torch.inference_mode():
        both = matcher([image.clone() for image in images], TEXTS)
    assert torch.allclose(both.maps, torch.cat([one.maps for one in single]), rtol=1e-3, atol=1e-8)
    assert torch.allclose(both.similarity, torch.cat([one.similarity for one in single]), atol=1e-5)
    assert all(weight.grad is None for weight in matcher.model.parameters())
    assert not torch.allclose(tiny_blip(-1)(images, TEXTS).maps, both.maps, rtol=1e-2)


def test_similarity_is_the_stock_cosine() -> None:
    matcher = tiny_blip()
    image = torch.rand(3, 16, 16)
    ids, mask = matcher._tokens(TEXTS[1:])
    pixels = (image - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / torch.tensor([0.2, 0.3, 0.25])[
        :, None, None
    ]
    stock = matcher.model(ids, pixels[None], use_itm_head=False, attention_mask=mask).itm_score
    assert torch.allclose(matcher([image], TEXTS[1:]).similarity, stock[0], atol=1e-5)


@pytest.mark.parametrize("similarity", [-0.3, 0.0, 0.4, 1.0])
def test_the_kept_share_is_the_ratio(similarity: float) -> None:
    ratio = float(kept_share(torch.tensor([similarity], dtype=torch.float64)))
    assert ratio == pytest.approx(min(1 - similarity / 2, 1 - 1e-5))
    keep = mask_from(torch.rand(6, 6), ratio, (48, 36))
    assert abs(int(keep.sum()) - ratio * 48 * 36) <= 1


def test_the_most_relevant_pixels_stay() -> None:
    relevance = torch.zeros(4, 4)
    relevance[0, 3] = 5.0
    keep = mask_from(relevance + 0.01 * torch.rand(4, 4), 0.1, (40, 40))
    assert bool(keep[:10, 30:].all())  # the 100 pixels of that cell, of 160 kept
    assert bool(mask_from(torch.full((4, 4), 0.3), 0.5, (8, 8)).all())
    assert bool(mask_from(torch.zeros(4, 4), 0.5, (8, 8)).all())


def test_text_and_errors() -> None:
    assert clean('  Is there (a) "dog": here? ~') == "is there a dog here?"
    assert len(clean("word " * 80).split()) == 50
    matcher = tiny_blip()
    with pytest.raises(CannotEdit, match="words"):
        matcher([torch.rand(3, 8, 8)], ["..."])
    for image in (torch.rand(1, 8, 8), torch.full((3, 8, 8), torch.nan)):
        with pytest.raises(CannotEdit, match="cannot read an image"):
            matcher([image], ["a dog"])
    with pytest.raises(ValueError, match="block"):
        BlipMatcher(matcher.model, matcher.processor, 3)


def test_a_models_own_attention_is_a_matcher() -> None:
    model, processor = load_miniature("lvlm")
    model.set_attn_implementation("eager")
    scene = make_scene(4)
    image = torch.from_numpy(np.asarray(scene.image).copy()).permute(2, 0, 1) / 255
    matcher = AttentionMatcher(model, processor, layers=(1, 2), similarity=0.3)
    match = matcher([image, image.flip(2)], ["is there a dog", "is there a dog"])
    assert match.similarity.tolist() == pytest.approx([0.3, 0.3])
    assert not torch.allclose(match.maps[0], match.maps[1])

    given = processor(images=[scene.image], text="<image> is there a dog", return_tensors="pt")
    with torch.no_grad():
        probs = model(**given, output_attentions=True).attentions
    image_at = (given["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    rows = torch.arange(int(image_at[-1]) + 1, given["input_ids"].shape[1])
    own = sum(probs[layer][0][:, rows][:, :, image_at].mean((0, 1)) for layer in (1, 2)) / 2
    assert torch.allclose(match.maps[0].flatten(), own, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"layers": (99,)}, "layers are from 0"), ({"similarity": 2.0}, "from 0 to 1"), ({}, "eager")],
)
def test_what_an_attention_matcher_refuses(change: dict[str, Any], words: str) -> None:
    model, processor = load_miniature("lvlm")
    if change:
        model.set_attn_implementation("eager")
    with pytest.raises((ValueError, regard.CannotEdit), match=words):
        AttentionMatcher(model, processor, **change)
