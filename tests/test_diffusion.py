"""The engine on diffusers pipelines: nothing changes that should not, and what is captured is right."""

from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from torch.nn import functional as F

import regard
from tests.pipelines import KINDS, PROMPT, build, latents

WORDS = ["dog", "apple"]


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {kind: build(kind) for kind in KINDS}


def nothing(call: Any) -> None:
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_a_null_edit_and_its_removal_are_bit_exact(pipes: dict[str, Any], kind: str) -> None:
    pipe = pipes[kind]
    stock = latents(pipe)
    calls = []
    with regard.apply(pipe, regard.Attend(lambda call: calls.append(call.site.name))) as run:
        assert torch.equal(latents(pipe), stock)
        reached = set(calls)
        with run.off():
            assert torch.equal(latents(pipe), stock)
    sites = [name for name, part in pipe.components.items() if name in ("unet", "transformer")]
    assert len(reached) == sum(
        "ttention" in type(m).__name__ and hasattr(m, "to_q") for m in pipe.components[sites[0]].modules()
    )
    assert torch.equal(latents(pipe), stock)
    assert "step" not in vars(pipe.scheduler)
    assert "encode_prompt" not in vars(pipe)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.components[sites[0]].modules())


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_acts_in_every_attention(pipes: dict[str, Any], kind: str) -> None:
    pipe = pipes[kind]
    half = regard.Attend(lambda call: 0.5 * call.attend(call.query, call.key, call.value))
    own = latents(pipe)
    with regard.apply(pipe, half):
        edited = latents(pipe)
    assert (edited - own).abs().max() > 1e-2

    module = getattr(pipe, "unet", None) or pipe.transformer
    stock = F.scaled_dot_product_attention
    try:  # the same by hand, everywhere in the denoiser
        inside = []
        module.register_forward_pre_hook(lambda *a: inside.append(1))
        module.register_forward_hook(lambda *a: inside.clear())
        F.scaled_dot_product_attention = lambda *a, **k: stock(*a, **k) * (0.5 if inside else 1.0)
        assert torch.allclose(latents(pipe), edited, atol=1e-5)
    finally:
        F.scaled_dot_product_attention = stock
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()


def eager_maps(pipe: Any, kind: str, steps: int) -> list[dict[tuple[int, int], list[torch.Tensor]]]:
    """Probs of every attention to the text by eager softmax, conditional rows, by step and grid."""
    found: list[dict[tuple[int, int], list[torch.Tensor]]] = []

    def note(call: Any) -> None:
        while len(found) <= call.step:
            found.append({})
        if call.site.kind == "self":
            return
        scores = call.query.double() @ call.key.double().transpose(2, 3) * call.query.shape[-1] ** -0.5
        probs = scores.softmax(-1)[call.rows, :, call.image, call.text].mean(1)
        found[call.step].setdefault(call.grid, []).append(probs.unflatten(1, call.grid))

    with regard.apply(pipe, regard.Attend(note)):
        latents(pipe, steps=steps, height=48)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_the_eager_probs(pipes: dict[str, Any], kind: str) -> None:
    pipe = pipes[kind]
    seen: list[Any] = []
    with regard.apply(pipe, regard.Watch(tuple(WORDS), seen.append)):
        latents(pipe, steps=3, height=48)
    wanted = eager_maps(pipe, kind, 3)
    assert [maps.step for maps in seen] == sorted(step for step in range(3) for _ in wanted[step])
    for maps in seen:
        grid = maps.probs.shape[1:3]
        oracle = torch.stack(wanted[maps.step][tuple(grid)]).mean(0)
        assert grid[0] * 2 == grid[1] * 3  # pictures of 48x32
        assert (maps.probs.double() - oracle).abs().max() < 1e-6
        assert maps.probs.std() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_found_where_the_text_encoders_put_them(pipes: dict[str, Any], kind: str) -> None:
    pipe, seen = pipes[kind], []
    with regard.apply(pipe, regard.Watch(("potted plant", "dog"), seen.append)):
        latents(pipe, "a potted plant and a dog", steps=1)
    plant, dog = seen[0].concepts[0]
    assert plant[:4] == (2, 3, 4, 5)
    assert dog[0] == 8
    if kind == "sd3":  # CLIP's tokens, then T5's
        assert plant[4:] == (18, 19, 20, 21)
    else:
        assert len(plant) == 4


def first_word(maps: Any) -> torch.Tensor:
    """(B,) how much of all attention goes to the first word."""
    pairs = zip(maps.probs, maps.concepts, strict=True)
    return torch.stack([probs[..., list(found[0])].mean() for probs, found in pairs])


def guidance(**more: Any) -> Any:
    """Pull all attention to the first word."""
    options = {
        "concepts": tuple(WORDS),
        "loss": lambda maps, kept: -first_word(maps),
        "step_size": lambda step, steps: 100.0,
    }
    return regard.Guidance(**{**options, **more})


def watch(kept: list[float]) -> Any:
    return regard.Watch(tuple(WORDS), lambda maps: kept.append(first_word(maps).item()))


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_lowers_its_loss(pipes: dict[str, Any], kind: str) -> None:
    pipe, before, after = pipes[kind], [], []
    stock = latents(pipe)
    with regard.apply(pipe, watch(before)):
        latents(pipe)
    with regard.apply(pipe, guidance(), watch(after)) as run:
        moved = latents(pipe)
    assert not torch.equal(moved, stock)
    assert sum(after) > sum(before)
    assert run.report().to_dict()["interventions"][0]["gradients"] == 4
    assert torch.equal(latents(pipe), stock)


def by_hand(pipe: Any, steps: int, size: float, prompt: str = PROMPT) -> torch.Tensor:
    """Guided Stable Diffusion as a loop over the parts, with eager attention."""
    from diffusers.models.attention_processor import AttnProcessor

    kept: list[torch.Tensor] = []

    class Eager(AttnProcessor):
        def __call__(self, attn: Any, hidden: Any, encoder_hidden_states: Any = None, **more: Any) -> Any:
            if encoder_hidden_states is not None and hidden.shape[1] == 256:
                query = attn.head_to_batch_dim(attn.to_q(hidden))
                key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
                kept.append(attn.get_attention_scores(query, key).unflatten(0, (-1, attn.heads)).mean(1))
            return super().__call__(attn, hidden, encoder_hidden_states=encoder_hidden_states, **more)

    stock = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(Eager())
    text, empty = pipe.encode_prompt(prompt, "cpu", 1, True)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        z = z.detach().requires_grad_(True)
        kept.clear()
        with torch.enable_grad():
            pipe.unet(scheduler.scale_model_input(z, time), time, encoder_hidden_states=text)
            loss = -torch.stack(kept).mean(0)[0, :, 2].mean()
            z = (z - size * torch.autograd.grad(loss, z)[0]).detach()
        with torch.no_grad():
            both = scheduler.scale_model_input(torch.cat([z, z]), time)
            noise = pipe.unet(both, time, encoder_hidden_states=torch.cat([empty, text])).sample
            plain, told = noise.chunk(2)
            z = scheduler.step(plain + 4.0 * (told - plain), time, z).prev_sample
    pipe.unet.set_attn_processor(stock)
    return z


@pytest.mark.parametrize("scheduler", [None, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler])
def test_guidance_is_the_loop_by_hand(scheduler: Any) -> None:
    pipe = build("sd")
    if scheduler is not None:
        options = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **options)
    pipe.scheduler.set_timesteps(5)
    size = 400.0 * float(pipe.scheduler.init_noise_sigma) ** 2
    wanted = by_hand(pipe, 5, size)
    stock = latents(pipe, steps=5)
    with regard.apply(pipe, guidance(resolution=(16, 16), step_size=lambda step, steps: size)) as run:
        found = latents(pipe, steps=5)
    assert (found - wanted).abs().max() < 1e-3 * (wanted - stock).abs().max()
    steps = run.report().to_dict()["interventions"][0]["losses"]
    assert [int(step) for step in steps] == list(range(len(pipe.scheduler.timesteps)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_its_prompts_one_by_one(pipes: dict[str, Any], kind: str) -> None:
    pipe = pipes[kind]
    shape = latents(pipe, steps=1).shape[1:]
    channels = (4, 16, 16)
    noise = torch.randn(4, *channels, generator=torch.Generator().manual_seed(1))
    if kind == "flux":
        noise = (
            noise.unflatten(2, (8, 2)).unflatten(4, (8, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        )
    assert noise.shape[1:] == shape
    prompts = ["an apple and a dog", "a dog and an apple"]
    stock = latents(pipe, prompts, latents=noise, num_images_per_prompt=2)
    size = 2e5 if kind == "sdxl" else 100.0  # its latents are large and its words far apart
    with regard.apply(pipe, guidance(step_size=lambda step, steps: size)):
        together = latents(pipe, prompts, latents=noise, num_images_per_prompt=2)
        effect = (together - stock).abs().amax(tuple(range(1, stock.ndim)))
        for row in range(4):
            single = latents(pipe, prompts[row // 2], latents=noise[row : row + 1])
            assert (single - together[row]).abs().max() < 1e-2 * effect[row]


@pytest.mark.parametrize("first", [0, 1])
def test_two_pipelines_share_a_scheduler(first: int) -> None:
    """Whichever run ends first, the other guides on, and the scheduler ends as it was."""
    pipes = [build("sd", seed) for seed in (0, 1)]
    pipes[1].scheduler = pipes[0].scheduler
    stock = [latents(pipe) for pipe in pipes]
    with regard.apply(pipes[1 - first], guidance()):
        alone = latents(pipes[1 - first])
    runs = [regard.apply(pipe, guidance()) for pipe in pipes]
    for run in runs:
        run.__enter__()
    for pipe in pipes:
        latents(pipe)
    runs[first].__exit__(None, None, None)
    assert torch.equal(latents(pipes[first]), stock[first])
    assert torch.equal(latents(pipes[1 - first]), alone)
    runs[1 - first].__exit__(None, None, None)
    assert "step" not in pipes[0].scheduler.__dict__
    assert torch.equal(latents(pipes[1 - first]), stock[1 - first])
