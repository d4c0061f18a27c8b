"""Heads of vision towers against stock eager towers, loops over pairs of patches, and weights set to zero."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from families import build
from torch import Tensor
from torch.nn import functional as F

import regard
from regard.hooks.tower import find_tower, has_cls
from regard.interventions import tower_patterns
from regard.interventions.tower_heads import tower_heads, without_heads

CLOSE = {"atol": 1e-6, "rtol": 1e-5}
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
SIZES |= {"num_hidden_layers": 2, "patch_size": 4, "image_size": 12}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}


BOTH: dict[str, Any] = {"vision_config": SIZES, "text_config": TEXT}
KINDS: dict[str, Callable[[], Any]] = {
    "clip": lambda: tf.CLIPModel(tf.CLIPConfig(**BOTH, projection_dim=16)),
    "clip vision": lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**SIZES)),
    "clip projected": lambda: tf.CLIPVisionModelWithProjection(
        tf.CLIPVisionConfig(**SIZES, projection_dim=16)
    ),
    "siglip": lambda: tf.SiglipModel(tf.SiglipConfig(**BOTH)),
    "siglip vision": lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**SIZES)),
    "vit": lambda: tf.ViTModel(tf.ViTConfig(**SIZES | {"image_size": (8, 16)}), add_pooling_layer=False),
    "classifier": lambda: tf.ViTForImageClassification(tf.ViTConfig(**SIZES, num_labels=5)),
    "dinov2": lambda: tf.Dinov2Model(tf.Dinov2Config(**SIZES)),
    "registers": lambda: tf.Dinov2WithRegistersModel(
        tf.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3)
    ),
}
LANGUAGE = ("llava", "llava_next", "instructblip", "internvl", "paligemma", "idefics3")


def model_of(kind: str) -> Any:
    """A tiny model whose heads differ, in float64."""
    if kind in LANGUAGE:
        return build(kind).model.double()
    model = KINDS[kind]().double().eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            gain = 1.5 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
            if weight.dim() > 1 and "embedding" not in name:
                weight.normal_(std=gain * weight[0].numel() ** -0.5, generator=rng)
            elif weight.dim() > 0:
                weight.add_(0.5 * torch.randn(weight.shape, generator=rng))
    return model


def tower_of(model: Any) -> Any:
    try:
        return find_tower(model)[1]
    except regard.CannotEdit:
        return model.base_model


def pixels_of(kind: str, count: int = 2) -> Tensor:
    rng = torch.Generator().manual_seed(3)
    if kind in LANGUAGE:
        return build(kind).inputs(count, images=1)["pixel_values"].double()
    size = (8, 16) if kind == "vit" else (12, 12)
    return torch.randn(count, 3, *size, generator=rng, dtype=torch.float64)


# -------------------------------------------------------------------------------------------- the oracle


def oracle(model: Any, pixels: Tensor, grid: tuple[int, int]) -> dict[str, np.ndarray]:
    """Every figure by loops over pairs of patches, from the probs of an eager copy of the tower."""
    tower = tower_of(copy.deepcopy(model))
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        probs = np.stack(tower(pixels, output_attentions=True).attentions)  # (L, N, H, S, S)
    height, width = grid
    first = probs.shape[-1] - height * width
    layers, images, heads = probs.shape[:3]
    zeros = functools.partial(np.zeros, dtype=np.float64)
    found = {
        "offsets": zeros((layers, heads, 2 * height - 1, 2 * width - 1)),
        "hops": zeros((layers, heads, max(grid))),
        "distance": zeros((layers, heads)),
        "outside": zeros((layers, heads)),
    }
    share = 1 / (images * height * width)
    for query in range(height * width):
        rows = probs[..., first + query, :].transpose(0, 2, 1, 3)  # (L, H, N, S)
        inside = rows[..., first:]
        found["outside"] += share * rows[..., :first].sum((-1, -2))
        inside = (inside / inside.sum(-1, keepdims=True)).sum(2)
        for key in range(height * width):
            dy, dx = key // width - query // width, key % width - query % width
            found["offsets"][:, :, height - 1 + dy, width - 1 + dx] += share * inside[..., key]
            found["hops"][:, :, max(abs(dy), abs(dx))] += share * inside[..., key]
            found["distance"] += share * math.hypot(dy, dx) * inside[..., key]
    return found


def zeroed(model: Any, heads: list[tuple[int, int]]) -> Any:
    """A copy whose output projections have no weight for some heads."""
    other = copy.deepcopy(model)
    names = ("out_proj", "o_proj", "projection", "projection_layer")
    modules = [m for m in tower_of(other).modules() if "Attention" in type(m).__name__]
    outs = [getattr(m, name) for m in modules for name in names if hasattr(m, name)]
    outs = [out for out in outs if out.in_features == out.out_features and hasattr(out, "weight")]
    with torch.no_grad():
        for layer, head in heads:
            width = outs[layer].in_features // 4
            outs[layer].weight[:, head * width : (head + 1) * width] = 0
    return other


def seen_by_language(model: Any, pixels: Tensor) -> Tensor:
    """What projector or Q-Former of a vision-language model reads, (N, T, C)."""
    kept: list[Tensor] = []
    if model.config.model_type == "instructblip":
        return model.vision_model(pixels).last_hidden_state
    inner = model.model
    handle = inner.multi_modal_projector.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    more = {"image_sizes": torch.tensor([[8, 16]] * len(pixels))} if pixels.ndim == 5 else {}
    inner.get_image_features(pixel_values=pixels, **more)
    handle.remove()
    return kept[0]


def embedding(kind: str, model: Any, pixels: Tensor) -> Tensor:
    if kind in LANGUAGE:
        return seen_by_language(model, pixels)
    if kind in ("clip", "siglip"):
        return model.get_image_features(pixel_values=pixels).pooler_output
    if kind == "clip projected":
        return model(pixels).image_embeds
    return model(pixels).last_hidden_state[:, 0] if kind == "vit" else model(pixels).pooler_output


# ------------------------------------------------------------------------------------------------ figures


@pytest.mark.parametrize("kind", [*KINDS, *LANGUAGE])
def test_patterns_are_those_of_an_eager_tower(kind: str) -> None:
    model, pixels = model_of(kind), pixels_of(kind)
    grid = (2, 4) if kind == "vit" else (pixels.shape[-2] // 4, pixels.shape[-1] // 4)
    found = tower_heads(model, pixels, importance=False, batch=3)
    want = oracle(model, pixels.flatten(0, -4), grid)
    assert found.importance is None
    assert (found.grid, found.patch) == (grid, (4, 4))
    for name, values in want.items():
        torch.testing.assert_close(getattr(found, name), torch.from_numpy(values), **CLOSE)
    torch.testing.assert_close(found.pixel_distance, 4 * found.distance)
    assert found.distance.std() > 0.01  # heads differ, so their order shows
    assert bool(found.outside.eq(0).all()) == (not has_cls(tower_of(model)))


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", ["clip", "clip projected", "siglip", "vit", "dinov2", "llava", "llava_next", "instructblip"]
)
def test_importance_is_the_turn_after_zeroing_weights(kind: str) -> None:
    model, pixels = model_of(kind), pixels_of(kind, 3)
    found = tower_heads(model, pixels, batch=2 if pixels.ndim == 4 else 5).importance
    assert found is not None
    plain = embedding(kind, model, pixels)
    for layer, head in ((0, 0), (0, 3), (1, 1), (1, 2)):
        pruned = embedding(kind, zeroed(model, [(layer, head)]), pixels)
        want = 1 - F.cosine_similarity(plain, pruned, dim=-1).mean()
        torch.testing.assert_close(found[layer, head], want)
    unread = kind in ("llava", "llava_next")  # they read the state before the last layer
    assert bool((found[1] == 0).all()) == unread
    assert (found[0] > 1e-4).all()


@torch.no_grad()
def test_classifiers_lose_probability_and_measures_choose_what() -> None:
    model, pixels = model_of("classifier"), pixels_of("classifier", 5)
    truth = torch.tensor([4, 0, 1, 1, 3])

    def right(output: Any, rows: slice) -> Tensor:
        return output.logits.softmax(-1).gather(1, truth[rows, None])[:, 0]

    found = tower_heads(model, pixels, batch=2)
    measured = tower_heads(model, pixels, measure=right, batch=3)
    plain = model(pixels).logits.softmax(-1)
    assert (plain.argmax(-1) != truth).any()
    for layer, head in ((0, 1), (1, 3)):
        pruned = zeroed(model, [(layer, head)])(pixels).logits.softmax(-1)
        for heads, classes in ((found, plain.argmax(-1)), (measured, truth)):
            assert heads.importance is not None
            want = sum(float(plain[i, c] - pruned[i, c]) for i, c in enumerate(classes)) / 5
            assert float(heads.importance[layer, head]) == pytest.approx(want, abs=1e-9)
    torch.testing.assert_close(found.offsets, measured.offsets)


@torch.no_grad()
def test_without_heads_equals_weights_of_zero_in_the_whole_model() -> None:
    family = build("llava_next")
    inputs = family.inputs(2, images=1)
    heads = [(0, 0), (0, 2), (1, 1)]
    with without_heads(family.model, heads):
        found = family.model(**inputs).logits
    plain = family.model(**inputs).logits
    torch.testing.assert_close(found, zeroed(family.model, heads)(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert (found - plain).abs().max() > 1e-2
    with pytest.raises(regard.OutOfRange, match=r"\[\(2, 0\)\].* layers 0 to 1 with heads 0 to 3"):
        without_heads(family.model, [(0, 0), (2, 0)]).__enter__()


def test_few_scores_at_a_time_and_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = model_of("registers"), pixels_of("registers")
    whole = tower_heads(model, pixels)
    monkeypatch.setattr(tower_patterns, "_AT_ONCE", 13**2 * 3)  # three of the eight heads of two images
    parts = tower_heads(model, pixels)
    torch.testing.assert_close(parts.offsets, whole.offsets)
    torch.testing.assert_close(parts.outside, whole.outside)
    half = tower_heads(model.bfloat16(), pixels)
    assert half.offsets.dtype == half.importance.dtype == torch.float32  # type: ignore[union-attr]
    torch.testing.assert_close(half.distance, whole.distance.float(), atol=0.02, rtol=0.02)
    torch.testing.assert_close(half.importance, whole.importance.float(), atol=0.01, rtol=0.3)  # type: ignore[union-attr]


def test_the_miniature() -> None:
    model, processor = regard.load_miniature("lvlm")
    pictures = [np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8) for seed in (0, 1)]
    pixels = processor.image_processor(images=pictures, return_tensors="pt").pixel_values
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = tower_heads(model, pixels)
    want = oracle(model, pixels, (8, 8))
    torch.testing.assert_close(
        found.distance.double(), torch.from_numpy(want["distance"]), atol=1e-4, rtol=1e-4
    )
    assert found.importance is not None
    assert found.importance[:4].min() > 0
    assert found.importance[4].eq(0).all()  # LLaVA reads the state before the last layer
    assert clean(model, before)
    assert found.clusters().labels.shape == (5, 4)


def test_pruned_towers_are_read_too() -> None:
    model, pixels = model_of("clip vision"), pixels_of("clip vision")
    plain = tower_heads(model, pixels)
    with without_heads(model, [(0, 1)]):
        found = tower_heads(model, pixels)
    torch.testing.assert_close(found.offsets[0], plain.offsets[0])
    torch.testing.assert_close(found.importance[0, 1].item(), 0.0)  # type: ignore[index]
    assert (found.distance[1] - plain.distance[1]).abs().max() > 1e-3


def test_crops_of_zeros_are_padding() -> None:
    model, pixels = model_of("llava_next"), pixels_of("llava_next")
    padded = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, 2))
    found, want = tower_heads(model, padded), tower_heads(model, pixels.flatten(0, 1))
    torch.testing.assert_close(found.distance, want.distance)
    torch.testing.assert_close(found.importance, want.importance)


# ------------------------------------------------------------------------------------------ restored, errors


def clean(model: Any, before: dict[str, Tensor]) -> bool:
    hooks = [
        m
        for m in tower_of(model).modules()
        if m._forward_pre_hooks or any(map(ours, m._forward_hooks.values()))
    ]
    return not hooks and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def ours(hook: Any) -> bool:
    return "regard" in str(getattr(getattr(hook, "func", hook), "__module__", ""))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["siglip", "dinov2", "llava"])
def test_the_model_is_as_before_after_errors_too(kind: str) -> None:
    model, pixels = model_of(kind), pixels_of(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = tower_of(model)(pixels).last_hidden_state
    calls: list[int] = []

    def fails(output: Any, rows: slice) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("in the middle")
        return torch.zeros(len(pixels))

    with pytest.raises(RuntimeError, match="in the middle"):
        tower_heads(model, pixels, measure=fails)
    assert len(calls) == 4
    assert clean(model, before)
    if kind == "siglip":  # whose embeddings spread one patch over all places
        with pytest.raises(regard.CannotEdit, match="9 tokens, which are not 1 x 1 patches behind 0 CLS"):
            tower_heads(model, pixels[..., :7, :7])
    assert clean(model, before)
    assert torch.equal(tower_of(model)(pixels).last_hidden_state, plain)


def test_errors_say_what_is_wrong() -> None:
    model, pixels = model_of("dinov2"), pixels_of("dinov2")
    for wrong in (pixels[0], pixels[:, :2], pixels[:0], pixels[None, None]):
        with pytest.raises(ValueError, match=r"pixel_values must be \(N, 3, height, width\)"):
            tower_heads(model, wrong)
    with pytest.raises(ValueError, match="got NoneType"):
        tower_heads(model, None)
    with pytest.raises(ValueError, match="of zeros"):
        tower_heads(model, torch.zeros(1, 2, 3, 12, 12))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        tower_heads(model, pixels, batch=0)
    wrong_values = {
        r"\(2,\), got \(3,\)": torch.zeros(3),
        r"got \(2, 1\)": torch.zeros(2, 1),
        "got float": 0.5,
    }
    for seen, values in wrong_values.items():
        with pytest.raises(ValueError, match=f"one value for each of 2 images, .*{seen}"):
            tower_heads(model, pixels, measure=functools.partial(lambda bad, *given: bad, values))
    heads = tower_heads(model, pixels, importance=False)
    with pytest.raises(ValueError, match="from 1 to the tower's 8 heads, got 9"):
        heads.clusters(9)


def test_towers_that_cannot_be_read_are_refused() -> None:
    text = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, vocab_size=20))
    with pytest.raises(regard.CannotEdit, match="LlamaForCausalLM has no vision tower"):
        tower_heads(text, pixels_of("clip"))
    with pytest.raises(regard.CannotEdit, match="packed patches"):
        tower_heads(build("qwen2_vl").model, pixels_of("clip"))
    with pytest.raises(regard.CannotEdit, match="several tiles"):
        tower_heads(build("mllama").model, pixels_of("clip"))
    rotary = tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**SIZES)).eval()
    with torch.no_grad():
        for layer in rotary.modules():
            for name in ("q_proj", "k_proj"):
                if hasattr(layer, name):
                    getattr(layer, name).weight.normal_(std=0.5)
    with pytest.raises(regard.CannotEdit, match=r"vision layer 0 cannot be read.* rotary"):
        tower_heads(rotary, pixels_of("clip"))
    assert not any(m._forward_pre_hooks for m in rotary.modules())
