"""A-STAR and Attend-and-Excite against formulas in float64, finite differences, and diffusers' own pipeline."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

import regard
from regard.hooks.latent_edits import TextMaps
from regard.interventions.astar import retention_loss, segregation_loss
from regard.interventions.word_maps import binarized, otsu, smoothed, word_maps
from tests.pipelines import PROMPT, build, latents

WORDS = ["dog", "apple"]


def maps_of(seed: int = 0, concepts: Any = ((2,), (5, 6), (9,)), images: int = 1) -> TextMaps:
    """Random probs (B, 6, 4, 12) of three concepts, one of two tokens."""
    draw = torch.Generator().manual_seed(seed)
    probs = torch.rand(images, 6, 4, 12, generator=draw, dtype=torch.float64).softmax(-1)
    return TextMaps(probs, (concepts,) * images, (tuple(range(1, 10)),) * images, 0, 50)


def test_the_losses_are_the_papers_equations() -> None:
    draw = np.random.default_rng(0)
    for concepts in (1, 2, 3):
        maps, masks = draw.random((concepts, 5, 7)), (draw.random((concepts, 5, 7)) > 0.6) * 1.0
        overlap = sum(
            np.minimum(maps[m], maps[n]).sum() / (maps[m] + maps[n]).sum()
            for m in range(concepts)
            for n in range(m)
        )
        kept = sum(
            1 - np.minimum(maps[m], masks[m]).sum() / (maps[m] + masks[m]).sum() for m in range(concepts)
        )
        assert float(segregation_loss(torch.tensor(maps))) == pytest.approx(overlap, abs=1e-12)
        assert float(retention_loss(torch.tensor(maps), torch.tensor(masks))) == pytest.approx(
            kept, abs=1e-12
        )
    same = torch.rand(1, 5, 7).expand(2, 5, 7)
    assert float(segregation_loss(same)) == pytest.approx(0.5)
    apart = torch.eye(2).view(2, 2, 1)
    assert float(segregation_loss(apart)) == 0
    assert float(retention_loss(apart, apart)) == pytest.approx(1.0)  # two concepts at their least, 1/2 each


def test_the_overlap_is_initnos_self_attention_conflict() -> None:
    """InitNO (arXiv 2404.04650) averages over pairs what A-STAR sums."""
    maps = torch.rand(3, 6, 6, dtype=torch.float64)
    pairs = [(0, 1), (0, 2), (1, 2)]
    conflict = [torch.min(maps[a], maps[b]).sum() / ((maps[a] + maps[b]).sum() + 1e-6) for a, b in pairs]
    assert float(segregation_loss(maps)) == pytest.approx(3 * float(sum(conflict) / 3), rel=1e-6)


@pytest.mark.parametrize("normalize", ["ae", "words", "minmax", "none"])
def test_the_gradient_is_that_of_finite_differences(normalize: Any) -> None:
    method = regard.ASTAR(concepts=("a", "b", "c"), normalize=normalize, smooth=True)
    kept = [binarized(each, 0.5) for each in word_maps(maps_of(1), normalize)]
    base = maps_of(2)

    def total(probs: torch.Tensor) -> torch.Tensor:
        return method.loss(TextMaps(probs, base.concepts, base.content, 3, 50), kept).sum()

    probs = base.probs.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(total(probs), probs)
    direction = torch.randn(probs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    step = 1e-7
    slope = (total(probs + step * direction) - total(probs - step * direction)) / (2 * step)
    assert float(slope) == pytest.approx(float((gradient * direction).sum()), rel=1e-4, abs=1e-9)
    assert abs(float(slope)) > 1e-5


def test_word_maps_are_attend_and_excites() -> None:
    maps = maps_of()
    found = word_maps(maps, "ae", smooth=True)[0]
    text = torch.softmax(100 * maps.probs[0, ..., 1:-1], -1)
    kernel = np.exp(-(((np.arange(3) - 1) / (2 * 0.5)) ** 2))
    kernel = np.outer(kernel, kernel) / np.outer(kernel, kernel).sum()
    for own, indices in zip(found, maps.concepts[0], strict=True):
        plain = np.pad(text[..., [index - 1 for index in indices]].mean(-1).numpy(), 1, mode="reflect")
        for y in range(6):
            for x in range(4):
                assert float(own[y, x]) == pytest.approx(
                    (plain[y : y + 3, x : x + 3] * kernel).sum(), abs=1e-12
                )
    assert smoothed(torch.ones(1, 4, 4)).allclose(torch.ones(1, 4, 4))


def test_otsu_parts_two_heaps() -> None:
    values = torch.cat([torch.rand(50) * 0.3, 0.6 + torch.rand(20) * 0.4])
    assert 0.25 < otsu(values) < 0.65
    best = min(
        np.linspace(0.01, 0.99, 99),
        key=lambda cut: sum(
            part.var(correction=0) * len(part)
            for part in (values[values <= cut], values[values > cut])
            if len(part)
        ),
    )
    assert ((values > otsu(values)) == (values > best)).all()


def test_the_mask_is_that_of_the_step_before() -> None:
    """The second step's loss is the equation on this step's maps and the first step's, as it was denoised."""
    pipe = build("sd")
    seen: list[TextMaps] = []
    method = regard.ASTAR(concepts=WORDS, scale=300.0)
    with regard.apply(pipe, method, regard.Watch(tuple(WORDS), seen.append, resolution=(16, 16))) as run:
        latents(pipe, steps=2)
    losses = run.report().to_dict()["interventions"][0]["losses"]
    kept = [binarized(each, 0.5) for each in word_maps(seen[0], "ae")]
    caught: list[TextMaps] = []
    spy = regard.Guidance(
        tuple(WORDS),
        lambda maps, _: (caught.append(maps), maps.probs.sum((1, 2, 3)) * 0)[1],
        lambda i, n: 1.0,
    )
    with regard.apply(pipe, spy, method):  # the spy looks before the method moves the second step
        latents(pipe, steps=2)
    now = word_maps(caught[1], "ae")[0].detach()
    wanted = segregation_loss(now) + retention_loss(now, kept[0])
    assert losses["1"][0] == pytest.approx(float(wanted), rel=1e-4)
    assert losses["0"][0] == pytest.approx(float(segregation_loss(word_maps(caught[0], "ae")[0])), rel=1e-4)


@pytest.mark.parametrize("method", [regard.ASTAR, regard.AttendExcite])
def test_strength_zero_is_the_stock_pipeline_and_the_same_seed_the_same_picture(method: Any) -> None:
    pipe = build("sd")
    stock = latents(pipe)
    with regard.apply(pipe, method(concepts=WORDS, scale=0.0)):
        assert torch.equal(latents(pipe), stock)
    with regard.apply(pipe, method(concepts=WORDS)):
        once = latents(pipe)
        assert torch.equal(latents(pipe), once)
    assert not torch.equal(once, stock)
    assert torch.equal(latents(pipe), stock)


@pytest.mark.parametrize("refine", [{}, {0: 0.05, 2: 0.5}])
def test_attend_and_excite_is_diffusers_own(refine: dict[int, float]) -> None:
    from diffusers import StableDiffusionAttendAndExcitePipeline

    pipe = build("sd")
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    reference = StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    reference.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    scale = 200
    wanted = reference(
        PROMPT, token_indices=[2, 5], latents=noise, num_inference_steps=4, guidance_scale=4.0, height=32, width=32,
        max_iter_to_alter=3, thresholds=refine, scale_factor=scale, attn_res=(16, 16), output_type="latent",
    ).images  # fmt: skip
    stock = latents(pipe, latents=noise)
    options: dict[str, Any] = {"concepts": WORDS, "alter": 3, "thresholds": refine, "scale": float(scale)}
    with regard.apply(pipe, "attend_excite", **options, variant="released", resolution=(16, 16)) as run:
        found = latents(pipe, latents=noise)
    effect = (wanted - stock).abs().max()
    assert (found - wanted).abs().max() < 2e-3 * effect
    assert (run.report().to_dict()["interventions"][0]["gradients"] > 4) == bool(refine)


def test_masks_lay_the_concepts_out() -> None:
    pipe = build("sd")
    masks = torch.zeros(2, 32, 32)
    masks[0, :, :16] = masks[1, :, 16:] = 1
    sides = []
    for given in (masks, masks.flip(0)):
        seen: list[TextMaps] = []
        look = regard.Watch(tuple(WORDS), seen.append, resolution=(16, 16))
        with regard.apply(pipe, regard.ASTAR(concepts=WORDS, masks=given, scale=300.0), look):
            latents(pipe, steps=6)
        first = word_maps(seen[-1], "ae")[0][0]
        sides.append(float(first[:, :8].mean() - first[:, 8:].mean()))
    assert sides[0] > sides[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concepts": []}, "at least one word"),
        ({"concepts": "dog"}, "at least one word"),
        ({"concepts": WORDS, "threshold": 2.0}, "threshold is 2.0"),
        ({"concepts": WORDS, "masks": torch.ones(1, 8, 8)}, r"masks of shape \(1, 8, 8\) for 2 concepts"),
        ({"concepts": WORDS, "masks": torch.ones(2, 8, 8)}, "masks 0 and 1 overlap in 64 pixels"),
        ({"concepts": WORDS, "masks": torch.stack([torch.ones(8, 8), torch.zeros(8, 8)])}, "mask 1 is empty"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        regard.ASTAR(**options)


def test_bad_runs_are_named() -> None:
    pipe = build("sd")
    stock = latents(pipe)
    for item, options, error, message in (
        (
            regard.ASTAR(concepts=["zebra"]),
            {},
            regard.NoObjectWords,
            "'zebra' is not in the prompt 'a dog and",
        ),
        (regard.ASTAR(concepts=[(99,)]), {}, regard.NoObjectWords, "token index 99 is out of range"),
        (regard.ASTAR(concepts=WORDS, resolution=(5, 5)), {}, regard.CannotEdit, r"resolution \(5, 5\)"),
        (
            regard.ASTAR(concepts=WORDS, masks=torch.eye(2)[:, :, None].repeat(1, 1, 9)),
            {},
            ValueError,
            "aspect ratio",
        ),
    ):
        with regard.apply(pipe, item), pytest.raises(error, match=message):
            latents(pipe, **options)
    embeds, _ = pipe.encode_prompt(PROMPT, "cpu", 1, False)
    empty, _ = pipe.encode_prompt("", "cpu", 1, False)
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": empty}
    with (
        regard.apply(pipe, "astar", concepts=WORDS),
        pytest.raises(regard.NoObjectWords, match="prompt_embeds"),
    ):
        latents(pipe, None, **given)
    with regard.apply(pipe, "astar", concepts=WORDS):
        wanted = latents(pipe)
    with regard.apply(pipe, "astar", concepts=[(2,), (5,)], normalize="ae"):
        assert torch.equal(latents(pipe, None, **given), wanted)
    with (
        regard.apply(pipe, "astar", concepts=WORDS),
        torch.inference_mode(),
        pytest.raises(regard.CannotEdit, match="inference_mode"),
    ):
        latents(pipe)
    assert torch.equal(latents(pipe), stock)


def test_wrong_places_are_named() -> None:
    pipe = build("sd")
    with pytest.raises(regard.CannotEdit, match="'vhr' edits a transformers model"):
        regard.apply(pipe, "vhr")
    with pytest.raises(regard.CannotEdit, match="VHR does not edit a diffusers pipeline"):
        regard.apply(pipe, regard.VHR())
    with pytest.raises(regard.CannotEdit, match="'astar' edits a diffusers pipeline"):
        regard.apply(pipe.text_encoder, "astar", concepts=WORDS)
    with pytest.raises(TypeError, match="no option 'concept'; it has concepts"):
        regard.apply(pipe, "astar", concept=WORDS)
    stock = pipe.unet
    pipe.unet = torch.compile(stock)
    with pytest.raises(regard.CannotEdit, match="unet is compiled"):
        regard.apply(pipe, "astar", concepts=WORDS).start()
    pipe.unet = UNet2DModel(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    with pytest.raises(regard.CannotEdit, match="UNet2DModel; the engine knows"):
        regard.apply(pipe, "astar", concepts=WORDS).start()
    pipe.unet = UNet2DConditionModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4,
        mid_block_type="UNetMidBlock2D",
    )  # fmt: skip
    with pytest.raises(regard.CannotEdit, match="no attention to text"):
        regard.apply(pipe, "astar", concepts=WORDS).start()
    pipe.unet = stock
    pipe.enable_attention_slicing(1)
    with (
        regard.apply(pipe, "astar", concepts=WORDS),
        pytest.raises(regard.CannotEdit, match="SlicedAttnProcessor"),
    ):
        latents(pipe)


def test_wrap_stays_until_unwrap() -> None:
    pipe = build("sd")
    stock = latents(pipe)
    assert regard.wrap(pipe, "astar", concepts=WORDS) is pipe
    assert not torch.equal(latents(pipe), stock)
    assert regard.unwrap(pipe) is pipe
    assert torch.equal(latents(pipe), stock)
    assert math.isfinite(float(stock.sum()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_moves_the_latents_the_same_way(dtype: torch.dtype) -> None:
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    moves = []
    for kind in (torch.float32, dtype):
        pipe = build("sd").to(kind)
        method = regard.ASTAR(concepts=WORDS, scale=3000.0)
        first = latents(pipe, latents=noise.to(kind), steps=1)
        with regard.apply(pipe, method):
            moves.append((latents(pipe, latents=noise.to(kind), steps=1) - first).float())
        assert first.dtype == kind
    assert moves[0].abs().max() > 1e-2
    assert torch.cosine_similarity(moves[0].flatten(), moves[1].flatten(), dim=0) > 0.9


def test_fused_projections_are_guided_the_same() -> None:
    pipe = build("sd")
    with regard.apply(pipe, "astar", concepts=WORDS, scale=300.0):
        apart = latents(pipe)
    stock = latents(pipe)
    pipe.fuse_qkv_projections()
    with regard.apply(pipe, "astar", concepts=WORDS, scale=300.0):
        fused = latents(pipe)
    assert (fused - apart).abs().max() < 1e-2 * (apart - stock).abs().max()


def test_guidance_in_two_calls_a_step_moves_both() -> None:
    """Flux runs its negative prompt after the prompt: both see the moved latents, and words are the prompt's."""
    pipe = build("flux")
    options = {"negative_prompt": "a car", "true_cfg_scale": 3.0, "steps": 2}
    stock = latents(pipe, **options)
    seen: list[torch.Tensor] = []
    with regard.apply(pipe, "astar", concepts=WORDS, scale=3000.0) as run:
        note = pipe.transformer.register_forward_pre_hook(
            lambda module, args, given: seen.append(given["hidden_states"].clone()), with_kwargs=True
        )
        guided = latents(pipe, **options)
        note.remove()
    assert (guided - stock).abs().max() > 1e-3
    assert run.report().to_dict()["interventions"][0]["gradients"] == 2
    for gradient, told, plain in (seen[:3], seen[3:]):
        assert torch.equal(told, plain)
        assert not torch.equal(told, gradient)
