"""IR-Diffusion and isolation against attention written from the definition: hidden states warped, bool masks."""

from typing import Any

import pipelines
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import regard
from regard.interventions.ir_diffusion import _dropped
from regard.interventions.places import masks_of, places_at

SCENE = "a dog and an apple"
PROMPTS = ["a dog", "an apple", SCENE]


def ellipse(height: int, width: int, centre: tuple[float, float], radius: tuple[float, float]) -> Tensor:
    rows, columns = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    return ((rows - centre[0]) / radius[0]) ** 2 + ((columns - centre[1]) / radius[1]) ** 2 <= 1


PORTRAITS = torch.stack([ellipse(16, 16, (8, 7), (5, 3)), ellipse(16, 16, (6, 10), (3, 5))])
TARGETS = torch.stack([ellipse(16, 16, (5, 4), (4, 3)), ellipse(16, 16, (10, 11), (5, 4))])


def draw(pipe: Any, prompts: Any, steps: int = 3, seed: int = 0, scale: float = 5.0, **more: Any) -> Tensor:
    rows = (1 if isinstance(prompts, str) else len(prompts)) * more.get("num_images_per_prompt", 1)
    noise = [torch.Generator().manual_seed(seed + row) for row in range(rows)]
    options = {"height": 32, "width": 32, "output_type": "latent", "guidance_scale": scale, **more}
    return pipe(prompts, generator=noise, num_inference_steps=steps, **options).images


def warped(hidden: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cut the subject's box out of (N, C), scale it to the target's box (nearest) and paste it on zeros; its mask."""
    height, width = source.shape
    canvas = hidden.new_zeros(hidden.shape[1] + 1, height, width)
    plane = torch.cat([hidden.T.unflatten(1, (height, width)), torch.ones_like(canvas[:1])]) * source
    y, x = (line.nonzero()[[0, -1], 0].tolist() for line in (source.any(1), source.any(0)))
    down, across = (line.nonzero()[[0, -1], 0].tolist() for line in (target.any(1), target.any(0)))
    box = plane[None, :, y[0] : y[1] + 1, x[0] : x[1] + 1]
    size = (down[1] - down[0] + 1, across[1] - across[0] + 1)
    canvas[:, down[0] : down[1] + 1, across[0] : across[1] + 1] = F.interpolate(box, size, mode="nearest")[0]
    return canvas[:-1].flatten(1).T, canvas[-1].flatten() > 0


class Dense:
    """A diffusers attention processor of IR-Diffusion: masks over all (S + 1) N keys, in float64."""

    def __init__(self, late: bool, step: list[int], method: regard.IRDiffusion) -> None:
        self.late, self.step, self.method = late, step, method

    def heads(self, attn: Any, tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (attn.heads, -1)).transpose(0, 1).double()

    def softmax(self, query: Tensor, key: Tensor, value: Tensor, allow: Tensor | None = None) -> Tensor:
        scores = query @ key.mT * query.shape[-1] ** -0.5
        scores = scores if allow is None else scores.masked_fill(~allow, -torch.inf)
        return scores.softmax(-1) @ value

    def __call__(
        self, attn: Any, hidden: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        side = round(hidden.shape[1] ** 0.5)
        targets = places_at(self.method.scene, (side, side))
        sources = places_at(self.method.portraits, (side, side))
        seed = f"{self.method.seed}/{self.step[0]}/{(side, side)}"
        kept = _dropped(targets, self.method.dropout, seed).flatten(1)
        flat, rows = targets.flatten(1), []
        context = hidden if encoder_hidden_states is None else encoder_hidden_states
        for row in range(len(hidden)):
            guidance, place = divmod(row, 3)
            query = self.heads(attn, attn.to_q(hidden[row]))
            key, value = (self.heads(attn, proj(context[row])) for proj in (attn.to_k, attn.to_v))
            if place < 2:
                rows.append(self.softmax(query, key, value))
            elif encoder_hidden_states is None:
                rows.append(
                    self.scene(attn, query, key, value, hidden[3 * guidance :], sources, targets, kept)
                )
            else:
                own = self.softmax(query, key, value)
                for subject in range(2):
                    other = context[3 * guidance + subject]
                    heard = self.softmax(
                        query, self.heads(attn, attn.to_k(other)), self.heads(attn, attn.to_v(other))
                    )
                    mixed = (1 - self.method.mutual_cross) * own + self.method.mutual_cross * heard
                    own = torch.where(flat[subject][:, None], mixed, own)
                rows.append(own)
        out = torch.stack(rows).transpose(1, 2).flatten(2).to(hidden)
        return attn.to_out[1](attn.to_out[0](out))

    def scene(
        self,
        attn: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden: Tensor,
        sources: Any,
        targets: Any,
        kept: Any,
    ) -> Tensor:
        flat = targets.flatten(1)
        inside = torch.ones(flat.shape[1], flat.shape[1], dtype=torch.bool)
        if self.method.isolation:
            for one, two in ((0, 1), (1, 0)):
                inside &= ~(flat[one][:, None] & flat[two])
        keys, values, allow = [key], [value], [inside]
        for subject in range(2) if self.late else ():
            moved, mask = hidden[subject], sources[subject].flatten()
            if self.method.reposition:
                moved, mask = warped(moved, sources[subject], targets[subject])
            keys.append(self.heads(attn, attn.to_k(moved)))
            values.append(self.heads(attn, attn.to_v(moved)))
            allow.append(kept[subject][:, None] & mask)
        return self.softmax(query, torch.cat(keys, 1), torch.cat(values, 1), torch.cat(allow, 1))


def precise(kind: str) -> Any:
    """Euler's first noise is so large that two ways to one number differ visibly in fp32."""
    return pipelines.build(kind).to(torch.float64)


def by_definition(kind: str, method: regard.IRDiffusion, **options: Any) -> Tensor:
    """The same pictures with every attention processor of the pipeline replaced."""
    pipe = precise(kind)
    order = {"down": 0, "mid": 1, "up": 2}
    names = sorted(
        (name for name in pipe.unet.attn_processors if "attn1" in name),
        key=lambda name: order[name.split("_")[0]],
    )
    late, step = set(names[round(method.start * len(names)) :]), [-1]
    pipe.unet.set_attn_processor(
        {name: Dense(name in late, step, method) for name in pipe.unet.attn_processors}
    )
    pipe.unet.register_forward_pre_hook(lambda *_: step.__setitem__(0, step[0] + 1))
    return draw(pipe, PROMPTS, **options)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dropout": 0.0, "start": 0.0},
        {"reposition": False},
        {"isolation": False, "mutual_cross": 0.0},
        {"mutual_cross": 1.0, "start": 1.0},
    ],
)
def test_the_joint_batch_is_the_definition(kind: str, options: dict[str, Any]) -> None:
    method = regard.IRDiffusion(PORTRAITS, TARGETS, **options)
    want = by_definition(kind, method)
    pipe = precise(kind)
    plain = draw(pipe, PROMPTS)
    with regard.apply(pipe, method) as run:
        found = draw(pipe, PROMPTS)
    assert run.report().to_dict()["interventions"][0]["attention_calls"] > 0
    torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-6)
    assert (plain[:2] - found[:2]).abs().max() < 1e-6, "portraits are drawn as they would be"
    assert (plain[2] - found[2]).abs().max() > 1e-2
    assert torch.equal(draw(pipe, PROMPTS), plain)


def test_repeated_runs_are_the_same_and_another_seed_is_not() -> None:
    pipe = pipelines.build("sd")
    found = []
    for seed in (0, 0, 1):
        with regard.apply(pipe, "ir_diffusion", portraits=PORTRAITS, scene=TARGETS, seed=seed):
            found.append(draw(pipe, PROMPTS))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_several_pictures_a_prompt() -> None:
    pipe = pipelines.build("sd")
    with regard.apply(pipe, "ir_diffusion", portraits=PORTRAITS, scene=TARGETS):
        both = draw(pipe, PROMPTS, num_images_per_prompt=2)
        noise = [torch.Generator().manual_seed(row) for row in (0, 2, 4)]
        first = pipe(
            PROMPTS, generator=noise, num_inference_steps=3, height=32, width=32, output_type="latent",
            guidance_scale=5.0,
        ).images  # fmt: skip
    torch.testing.assert_close(both[::2], first, atol=1e-4, rtol=1e-4)


def test_scaling_both_sides_to_one_place_is_moving_the_reference() -> None:
    """What the paper says (both sides) and the release does (the reference only) is one in a U-Net's attention."""
    torch.manual_seed(0)
    hidden, scene = torch.randn(2, 36, 8, dtype=torch.float64)
    weights = torch.randn(3, 8, 8, dtype=torch.float64)
    source, target, common = (torch.zeros(6, 6, dtype=torch.bool) for _ in range(3))
    source[1:5, 0:2], target[0:3, 3:6], common[2:5, 1:4] = True, True, True

    def attend(rows: Tensor, moved: Tensor, mask: Tensor) -> Tensor:
        scores = (rows @ weights[0]) @ (moved @ weights[1]).T
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ (moved @ weights[2])

    released = attend(scene[target.flatten()], *warped(hidden, source, target))
    subject, _ = warped(scene, target, common)
    both = attend(subject[common.flatten()], *warped(hidden, source, common))
    torch.testing.assert_close(released, both)


# ---- isolation alone --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", pipelines.KINDS)
def test_isolation_is_a_mask(kind: str) -> None:
    """Each self-attention call against a bool mask; the same with boxes."""
    pipe, hits = pipelines.build(kind), []
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.5, 0.25, 1.0, 1.0]])
    method = regard.IsolationAttention(masks=boxes)
    (edit,) = method.edits(regard.hooks.denoiser.denoiser_of(pipe))

    def compare(call: Any) -> Tensor:
        found = edit.attend(call)
        one, two = places_at(boxes, call.grid).flatten(1)
        allow = torch.ones(call.query.shape[2], call.key.shape[2], dtype=torch.bool)
        image = allow[call.image, call.image]
        image &= ~(one[:, None] & two) & ~(two[:, None] & one)
        allow[call.image, call.image] = image
        torch.testing.assert_close(
            found, call.attend(call.query, call.key, call.value, allow), atol=1e-5, rtol=1e-4
        )
        hits.append((found - call.attend(call.query, call.key, call.value)).abs().max().item())
        return found

    with regard.apply(pipe, regard.Attend(compare, lambda site: site.kind != "cross")):
        changed = draw(pipe, SCENE)
    assert min(hits) > 1e-5
    with regard.apply(pipe, method):
        assert torch.equal(draw(pipe, SCENE), changed)


@pytest.mark.parametrize("kind", pipelines.KINDS)
def test_isolation_by_words(kind: str) -> None:
    """Each picture of a batch has the masks that it would have alone; before `start` nothing changes."""
    pipe = precise(kind)
    prompts, words = [SCENE, "a car and a pizza"], [["dog", "apple"], ["car", "pizza"]]
    plain = draw(pipe, prompts, steps=4)
    with regard.apply(pipe, "isolation", concepts=words):
        both = draw(pipe, prompts, steps=4)
        again = draw(pipe, prompts, steps=4)
    assert torch.equal(both, again)
    assert (both - plain).flatten(1).abs().amax(1).min() > 1e-4
    with regard.apply(pipe, "isolation", concepts=words[0]):
        alone = draw(pipe, prompts[:1], steps=4)
    torch.testing.assert_close(both[:1], alone, atol=1e-4, rtol=1e-4)
    with regard.apply(pipe, "isolation", concepts=words, start=1.0):
        assert torch.equal(draw(pipe, prompts, steps=4), plain)


def test_masks_from_heat_are_disjoint_and_never_empty() -> None:
    torch.manual_seed(1)
    for heat in torch.rand(20, 3, 7, 5):
        masks = masks_of(heat)
        assert masks.any((1, 2)).all()
        assert masks.sum(0).max() == 1
    for heat in (torch.ones(2, 4, 4), torch.rand(1, 6, 6).expand(3, 6, 6)):  # nothing to tell them apart by
        assert masks_of(heat).any((1, 2)).all()
    blobs = torch.stack([ellipse(16, 16, (4, 4), (3, 3)), ellipse(16, 16, (11, 11), (3, 3))])
    assert torch.equal(masks_of(blobs * 0.9 + 0.05), blobs)


# ---- rehearsal --------------------------------------------------------------------------------------


def test_rehearsal_draws_the_stock_pictures() -> None:
    pipe = pipelines.build("sdxl")
    options = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent"}
    noise = [torch.Generator().manual_seed(row) for row in range(3)]
    found = regard.rehearse(pipe, PROMPTS, ["dog", "apple"], generator=noise, **options)
    noise = [torch.Generator().manual_seed(row) for row in range(3)]
    assert torch.equal(found.images, pipe(PROMPTS, generator=noise, **options).images)
    noise, seen = [torch.Generator().manual_seed(row) for row in range(3)], []
    with regard.apply(pipe, regard.Watch((["dog"], ["apple"], ["dog", "apple"]), seen.append)):
        pipe(PROMPTS, generator=noise, **options)
    assert {maps.probs.shape[1:3] for maps in seen} == {(8, 8)}
    for row, masks in enumerate((found.portraits[:1], found.portraits[1:], found.scene)):
        words = [(maps.probs[row], maps.concepts[row]) for maps in seen]
        heat = sum(torch.stack([probs[..., list(few)].mean(-1) for few in own]) for probs, own in words)
        assert torch.equal(masks, masks_of(heat))
    with regard.apply(pipe, "ir_diffusion", portraits=found.portraits, scene=found.scene):
        assert torch.isfinite(draw(pipe, PROMPTS)).all()


def test_a_detector_gives_the_masks() -> None:
    pipe = pipelines.build("sd")
    options = {"num_inference_steps": 1, "height": 32, "width": 32}
    sizes = {"dog": ellipse(32, 32, (16, 12), (10, 10)), "apple": ellipse(32, 32, (16, 20), (6, 6))}
    found = regard.rehearse(pipe, PROMPTS, list(sizes), detector=lambda image, name: sizes[name], **options)
    assert torch.equal(found.portraits, torch.stack(list(sizes.values())))
    assert torch.equal(found.scene[1], sizes["apple"])
    assert torch.equal(found.scene[0], sizes["dog"] & ~sizes["apple"])


# ---- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("portraits", "scene", "words"),
    [
        (None, TARGETS, "needs portraits= and scene="),
        (PORTRAITS[:1], TARGETS, "1 portraits, 2 subjects"),
        (PORTRAITS, TARGETS * 0, "scene: mask 0 is empty"),
        (PORTRAITS * 0, TARGETS, "portraits: mask 0 is empty"),
        (PORTRAITS, TARGETS | True, "scene: masks 0 and 1 overlap in 256 pixels"),
        (PORTRAITS, TARGETS[0], r"scene has the shape \(16, 16\)"),
        (PORTRAITS, [[0, 0, 0.6, 1], [0.4, 0, 1, 1]], "boxes 0 and 1 overlap"),
        (PORTRAITS, [[0, 0, 0.6, 1], [0.9, 0, 0.8, 1]], "left < right"),
    ],
)
def test_places_that_cannot_be(portraits: Any, scene: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        regard.IRDiffusion(portraits, scene)


def test_other_bad_input() -> None:
    pipe = pipelines.build("sd")
    with (
        pytest.raises(regard.CannotEdit, match="draws 2 pictures: call it with 3 prompts"),
        regard.apply(pipe, "ir_diffusion", portraits=PORTRAITS, scene=TARGETS),
    ):
        draw(pipe, PROMPTS[:2])
    wide = torch.zeros(2, 16, 32)
    wide[0, :, :8] = wide[1, :, 20:] = 1
    with (
        pytest.raises(ValueError, match="16x32 do not have the aspect ratio"),
        regard.apply(pipe, "isolation", masks=wide),
    ):
        draw(pipe, SCENE)
    with pytest.raises(regard.CannotEdit, match="U-Net, not a FluxTransformer2DModel: use isolation"):
        regard.apply(pipelines.build("flux"), "ir_diffusion", portraits=PORTRAITS, scene=TARGETS)
    for options in ({}, {"concepts": ["dog"], "masks": TARGETS}):
        with pytest.raises(ValueError, match="either concepts"):
            regard.apply(pipe, "isolation", **options)
    with pytest.raises(ValueError, match="dropout is 1: give 0 to"):
        regard.IRDiffusion(PORTRAITS, TARGETS, dropout=1)
    with pytest.raises(ValueError, match="need as many portrait prompts"):
        regard.rehearse(pipe, PROMPTS[:2], ["dog", "apple"])
    with pytest.raises(ValueError, match="give masks"):
        regard.IsolationAttention(masks=torch.ones(0, 4))
