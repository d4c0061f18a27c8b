"""Masks of words against loops in float64, and against attention that a processor of its own writes out."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, PNDMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor

import regard
from regard.hooks.denoiser import Denoiser
from regard.interventions.attencraft import _Reader, refined, regions_of, word_masks
from regard.interventions.noised import _size
from tests.pipelines import PROMPT, build

WORDS = ["dog", "apple"]
OPTIONS: dict[str, Any] = {"height": 48, "width": 32, "num_inference_steps": 4, "guidance_scale": 4.0}


# ---- the paper in loops ---------------------------------------------------------------------------


def minmax(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return np.zeros_like(values) if high - low <= 1e-5 * high else (values - low) / (high - low)


def cubic(x: float, a: float = -0.75) -> float:
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def bicubic(plane: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    out, last, values = np.zeros(grid), [side - 1 for side in plane.shape], plane.tolist()
    for row in range(grid[0]):
        for column in range(grid[1]):
            y = (row + 0.5) * plane.shape[0] / grid[0] - 0.5
            x = (column + 0.5) * plane.shape[1] / grid[1] - 0.5
            for i in range(math.floor(y) - 1, math.floor(y) + 3):
                for j in range(math.floor(x) - 1, math.floor(x) + 3):
                    near = values[min(max(i, 0), last[0])][min(max(j, 0), last[1])]
                    out[row, column] += cubic(y - i) * cubic(x - j) * near
    return np.maximum(out, 0)


def paper(own: np.ndarray, text: np.ndarray, grid: tuple[int, int], power: int = 4) -> np.ndarray:
    """(N, N) and (C, h', w') to (C, h, w): with S^power written out, and with its own min-max."""
    spread = minmax(np.linalg.matrix_power(minmax(own), power))
    maps = []
    for heat in text:
        fine = heat if heat.shape == grid else bicubic(heat, grid)
        squared = minmax(fine**2).flatten()
        maps.append(minmax(spread @ squared).reshape(grid))
    return np.stack(maps)


def labels(maps: np.ndarray, threshold: float) -> np.ndarray:
    """(C, h, w) to (h, w): the map that exceeds each other one, or -1."""
    found = np.full(maps.shape[1:], -1)
    for cell in np.ndindex(*found.shape):
        for own in range(len(maps)):
            if all(maps[own][cell] - maps[c][cell] > threshold for c in range(len(maps)) if c != own):
                found[cell] = own
    return found


def cases() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    draw = np.random.default_rng()
    grid = (6, 5)

    def own(sharp: float = 3.0) -> np.ndarray:
        scores = np.exp(sharp * draw.normal(size=(30, 30)))
        return scores / scores.sum(1, keepdims=True)

    one = np.zeros((3, 6, 5))
    one[1] = 1.0  # another token has it all
    peaks = np.zeros((2, 6, 5))
    peaks[0, 0, 0] = peaks[1, 5, 4] = 0.7
    level = np.stack([np.full((6, 5), 0.0625), draw.random(grid)])
    return {
        "two": (own(), draw.random((3, *grid))),
        "one": (own(), draw.random((2, *grid))),
        "five, coarser": (own(), draw.random((6, 3, 3))),
        "coarser and spiky": (own(), draw.random((3, 3, 3)) ** 12),
        "all mass on one": (own(), one),
        "a constant": (own(), level),
        "a constant, coarser": (own(), level[:, :3, :3]),
        "faint": (own(), 1e-9 * draw.random((3, *grid))),
        "looks at itself": (np.eye(30), peaks),
        "looks everywhere": (np.full((30, 30), 1 / 30), peaks),
        "a sink": (own(0.1) * np.eye(30)[3] + own(0.1), draw.random((3, *grid))),
    }


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_maps_are_the_papers(name: str, dtype: torch.dtype) -> None:
    own, text = cases()[name]
    for power in (4, 1, 0):
        wanted = paper(own, text, (6, 5), power) if power else None
        given = [torch.from_numpy(part)[None].to(dtype) for part in (own, text)]
        found = refined(given[0], given[1], (6, 5), power)[0].double().numpy()
        if wanted is None:  # of S^0 there is no min-max
            wanted = np.stack([minmax((h if h.shape == (6, 5) else bicubic(h, (6, 5))) ** 2) for h in text])
        assert np.isfinite(found).all()
        assert np.abs(found - wanted).max() < (1e-9 if dtype == torch.float64 else 1e-4), power


@pytest.mark.parametrize("count", [2, 3, 6])
def test_a_cell_is_of_the_map_that_exceeds_all_others(count: int) -> None:
    maps = np.random.default_rng().random((2, count, 7, 5))
    maps[0, :, 0] = maps[0, :1, 0]  # ties
    maps[1] *= 0.2
    for threshold in (0.0, 0.1, 0.6):
        found = regions_of(torch.from_numpy(maps), threshold).numpy()
        for own, regions in zip(maps, found, strict=True):
            wanted = labels(own, threshold)
            assert (regions.sum(0) <= 1).all()
            assert (np.where(regions.any(0), regions.argmax(0), -1) == wanted).all()
            for place, region in enumerate(regions):  # the release's naming says nothing else
                named = np.argmax([(other * region).sum() for other in own])
                assert named == place if region.any() else named == 0
        assert threshold or found[0].any()
        assert threshold < 0.2 or not found[1].any()


# ---- the reading ----------------------------------------------------------------------------------


class Eager:
    """A diffusers attention processor that writes out its probs and notes them by kind and number of queries."""

    def __init__(self, seen: dict[tuple[str, int], list[Tensor]]) -> None:
        self.seen = seen

    def __call__(
        self,
        attn: Any,
        hidden: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor:
        assert attention_mask is None
        context = hidden if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(source).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, source in ((attn.to_q, hidden), (attn.to_k, context), (attn.to_v, context))
        )
        probs = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        kind = "self" if encoder_hidden_states is None else "cross"
        self.seen.setdefault((kind, hidden.shape[1]), []).append(probs.mean(1))
        return attn.to_out[0]((probs @ value).transpose(1, 2).flatten(2))


def precise(kind: str) -> Any:
    return build(kind).to(torch.float64)


def eager(kind: str) -> tuple[Any, dict[tuple[str, int], list[Tensor]]]:
    pipe, seen = precise(kind), {}  # type: ignore[var-annotated]
    pipe.unet.set_attn_processor(Eager(seen))
    return pipe, seen


def wanted(own: Tensor, text: Tensor, columns: list[list[int]], coarse: Any, fine: Any) -> np.ndarray:
    heat = np.stack([text[:, few].amax(1).unflatten(0, coarse).numpy() for few in columns])
    return paper(own.numpy(), heat, fine)


def same(found: Any, row: int, maps: np.ndarray) -> None:
    assert np.abs(found.maps[row].numpy() - maps).max() < 1e-6
    table = labels(found.maps[row].numpy(), found.threshold)
    for word, mask in enumerate([*found.masks[row], found.background[row]]):
        assert (mask.numpy() == (table == word)).all()
    assert (found.unassigned[row].numpy() == (table == -1)).all()
    assert found.missing[row] == tuple(w for w in range(len(maps) - 1) if not (table == w).any())


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_masks_of_generated_pictures(kind: str) -> None:
    prompts = [PROMPT, "a potted plant and an apple"]
    columns = [[[2], [5], [0]], [[8], [2, 3, 4, 5], [0]]]
    coarse, fine = (12, 8), (24, 16) if kind == "sd" else (12, 8)
    pipe = precise(kind)
    noise = lambda: [torch.Generator().manual_seed(row) for row in range(2)]  # noqa: E731
    options = {**OPTIONS, "output_type": "latent"}
    stock = pipe(prompts, generator=noise(), **options).images
    ids = [pipe.tokenizer(text).input_ids for text in prompts]
    words = [["dog", "apple"], ["apple", "potted plant"]]
    assert pipe.tokenizer.decode(ids[1][2:6]) == "potted plant"
    found = word_masks(
        pipe, prompts, words, resolutions=(coarse, fine), generator=noise(), threshold=0.02, **options
    )
    assert torch.equal(found.images, stock)
    assert not pipe.unet._forward_pre_hooks
    assert torch.equal(pipe(prompts, generator=noise(), **options).images, stock)

    slow, seen = eager(kind)
    slow(prompts, generator=noise(), **options)
    late = [step for step, time in enumerate(slow.scheduler.timesteps) if time < 300]
    assert 0 < len(late) < 3
    sums = []
    for key in (("self", fine[0] * fine[1]), ("cross", coarse[0] * coarse[1])):
        layers = torch.stack(seen[key])
        by_step = layers.unflatten(0, (4, -1))[:, :, 2:]  # the conditional rows come last
        sums.append(by_step[late].mean((0, 1)))
    for row in range(2):
        same(found, row, wanted(sums[0][row], sums[1][row], columns[row], coarse, fine))
        assert found.maps[row, :2].std() > 0.1


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_masks_of_given_pictures(kind: str) -> None:
    draw = np.random.default_rng(3)
    pictures = [Image.fromarray(draw.integers(0, 256, (48, 32, 3), np.uint8)) for _ in range(2)]
    coarse, fine = (12, 8), (24, 16) if kind == "sd" else (12, 8)
    noise = lambda row: torch.Generator().manual_seed(row)  # noqa: E731
    more: dict[str, Any] = {"height": 48, "width": 32, "resolutions": (coarse, fine), "samples": 2}
    pipe = precise(kind)
    found = word_masks(pipe, PROMPT, WORDS, pictures, generator=[noise(0), noise(1)], **more)
    alone = word_masks(pipe, PROMPT, WORDS, pictures[1], generator=noise(1), **more)
    assert (alone.maps[0] - found.maps[1]).abs().max() < 1e-6
    assert found.images == pictures

    slow, seen = eager(kind)
    train = DDPMScheduler.from_config(slow.scheduler.config)
    if kind == "sd":
        text, added = slow.encode_prompt(PROMPT, torch.device("cpu"), 1, False)[0], None
    else:
        text, _, pooled, _ = slow.encode_prompt(PROMPT, do_classifier_free_guidance=False)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[48.0, 32, 0, 0, 48, 32]])}
    for row, picture in enumerate(pictures):
        pixels = torch.from_numpy(np.asarray(picture) / 127.5 - 1).permute(2, 0, 1)[None]
        with torch.no_grad():
            clean = slow.vae.encode(pixels).latent_dist.mean * slow.vae.config.scaling_factor
            drawn = torch.randn(2, *clean.shape[1:], generator=noise(row), dtype=clean.dtype)
            seen.clear()
            for time, own in zip((75, 225), drawn, strict=True):
                noisy = train.add_noise(clean, own[None], torch.tensor([time]))
                slow.unet(noisy, time, encoder_hidden_states=text, added_cond_kwargs=added)
        means = [
            torch.stack(seen[key]).mean((0, 1))
            for key in (("self", fine[0] * fine[1]), ("cross", coarse[0] * coarse[1]))
        ]
        same(found, row, wanted(means[0], means[1], [[2], [5], [0]], coarse, fine))


def test_of_no_step_in_the_range_the_nearest_is_read_and_guidance_is_not() -> None:
    pipe = build("sd")
    noise = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    options = {**OPTIONS, "output_type": "latent"}
    masks = lambda **more: word_masks(pipe, PROMPT, WORDS, generator=noise(), **more, **options)  # noqa: E731
    near, last, first = (masks(timesteps=few) for few in ((100, 101), (0, 1), (700, 800)))
    assert torch.equal(near.maps, last.maps)
    assert (near.maps - first.maps).abs().max() > 0.1
    with regard.apply(pipe, "astar", concepts=WORDS) as run:
        guided = pipe(PROMPT, generator=noise(), **options).images
        read = masks(timesteps=(700, 800))
        gradients = run.report().to_dict()["interventions"][0]["gradients"]
    assert gradients == 8
    assert torch.equal(read.images, guided)
    seen = _noted(pipe, lambda: pipe(PROMPT, generator=noise(), **options))
    assert np.abs(first.maps[0].numpy() - seen).max() < 1e-2  # fp32 loses digits where the attention is broad


def _noted(pipe: Any, call: Any) -> np.ndarray:
    """The maps of the first step at the finest resolution, from every site's scores."""
    own, text = [], []

    def note(call: Any) -> None:
        if call.step == 0 and call.grid == (24, 16):
            scores = (call.query @ call.key.mT)[call.rows] * call.query.shape[-1] ** -0.5
            (own if call.site.kind == "self" else text).append(scores.softmax(-1).mean(1)[0])

    with regard.apply(pipe, regard.Attend(note)):
        call()
    means = (torch.stack(each).mean(0).double() for each in (own, text))
    return wanted(*means, [[2], [5], [0]], (24, 16), (24, 16))  # type: ignore[misc]


# ---- what is done with them -----------------------------------------------------------------------


def test_isolation_takes_the_masks() -> None:
    pipe = build("sd")
    noise = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    found = word_masks(pipe, PROMPT, WORDS, generator=noise(), threshold=0.01, **OPTIONS)
    assert found.missing == ((),)
    with regard.apply(pipe, "isolation", masks=found.masks[0]) as run:
        isolated = pipe(PROMPT, generator=noise(), **OPTIONS).images[0]
        assert run.report().to_dict()["interventions"][0]["attention_calls"] > 0
        with pytest.raises(
            regard.CannotEdit, match=r"no attention of the image to itself was read at \(24, 16\)"
        ):
            word_masks(pipe, PROMPT, WORDS, **OPTIONS)
    assert isolated.tobytes() != found.images[0].tobytes()
    twice = word_masks(pipe, PROMPT, ["dog", "dog"], generator=noise(), **OPTIONS)
    assert twice.missing == ((0, 1),)
    with pytest.raises(ValueError, match="masks: mask 0 is empty"):
        regard.apply(pipe, "isolation", masks=twice.masks[0])


def test_the_background_may_be_a_word_and_a_photograph_keeps_its_shape() -> None:
    pipe = build("sd")
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    assert pipe.scheduler.timesteps is None
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 250), np.uint8))
    noise = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    start, word = (
        word_masks(pipe, PROMPT, WORDS, picture, background=background, generator=noise())
        for background in ((0,), "and")
    )
    assert _size(pipe, [picture]) == (16, 64)
    assert start.maps.shape == (1, 3, 8, 32)
    assert torch.equal(start.maps[:, :2], word.maps[:, :2])
    assert not torch.allclose(start.maps[:, 2], word.maps[:, 2], atol=0.01)


@pytest.mark.parametrize(
    ("latents", "levels", "coarse", "fine"),
    [
        ((64, 64), "CCCD", (16, 16), (32, 32)),
        ((96, 96), "CCCD", (24, 24), (48, 48)),
        ((64, 96), "CCCD", (16, 24), (32, 48)),
        ((128, 128), "DCC", (32, 32), (64, 64)),
        ((32, 32), "CCCD", (16, 16), (16, 16)),
        ((16, 16), "CD", (16, 16), (16, 16)),
    ],
)
def test_resolutions_are_shares_of_the_latents(latents: Any, levels: str, coarse: Any, fine: Any) -> None:
    names = {"C": "CrossAttnDownBlock2D", "D": "DownBlock2D"}
    unet = UNet2DConditionModel(
        block_out_channels=(4,) * len(levels),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=4,
        down_block_types=tuple(names[level] for level in levels),
        up_block_types=tuple(names[level].replace("Down", "Up") for level in reversed(levels)),
    )
    reader = _Reader(Denoiser("unet", unet, "unet", ()), lambda step: True, None)
    reader.begin(unet, (torch.empty(1, 4, *latents), 1, None), {})
    assert reader.grids == (coarse, fine)


def test_half_precision() -> None:
    pipe = build("sd")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    full = word_masks(pipe, PROMPT, WORDS, picture, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float16, torch.bfloat16):
        pipe.to(dtype)
        half = word_masks(pipe, PROMPT, WORDS, picture, generator=torch.Generator().manual_seed(1))
        assert pipe.vae.dtype == dtype
        assert half.maps.dtype == torch.float32
        assert (half.maps - full.maps).abs().mean() < 0.05


def test_what_cannot_be_asked() -> None:
    pipe = build("sd")
    white = Image.new("RGB", (32, 32))
    with pytest.raises(regard.CannotEdit, match="needs a diffusers pipeline, not UNet2DConditionModel"):
        word_masks(pipe.unet, PROMPT, WORDS)
    with pytest.raises(regard.CannotEdit, match="a SD3Transformer2DModel has both in one softmax"):
        word_masks(build("sd3"), PROMPT, WORDS)
    with pytest.raises(regard.NoObjectWords, match="'zebra' is not in the prompt"):
        word_masks(pipe, PROMPT, ["zebra"], white)
    for words in ("dog", [], [[]], [["dog", "apple"], ["dog"]]):
        with pytest.raises(ValueError, match=r"words is .*: give a list"):
            word_masks(pipe, PROMPT, words)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"threshold": 1.0}, "threshold is 1.0"),
        ({"timesteps": (300, 300)}, "timesteps is .300, 300.: give a range"),
        ({"timesteps": (0, 1001)}, "from 0 to 1000"),
        ({"power": -1}, "power is -1"),
        ({"samples": 0}, "samples 0"),
        ({"image": [white, white], "prompt": [PROMPT]}, "1 prompts for 2 pictures"),
        ({"image": [white, white.resize((40, 32))]}, "give height= and width="),
        ({"image": torch.zeros(3, 32, 32)}, "image is a Tensor: give a Pillow picture"),
    ]
    for more, message in wrong:
        with pytest.raises(ValueError, match=message):
            word_masks(pipe, **{"prompt": PROMPT, "words": WORDS, **more})
    with pytest.raises(
        regard.CannotEdit, match=r"no attention at resolution \(4, 4\): there is \(16, 16\), \(8, 8\)"
    ):
        word_masks(pipe, PROMPT, WORDS, white, resolutions=((4, 4), (16, 16)))
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(regard.CannotEdit, match="EDMEulerScheduler has no alphas_cumprod"):
        word_masks(pipe, PROMPT, WORDS, white)
    assert not pipe.unet._forward_pre_hooks
