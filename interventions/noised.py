"""Given pictures as a U-Net sees them on the way to being drawn: encoded, noised, and run once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..hooks.denoiser import Grid
from ..hooks.errors import CannotEdit


@torch.no_grad()
def show_pictures(
    pipe: Any,
    prompt: str | list[str],
    pictures: list[Any],
    times: list[int],
    *,
    generator: Any = None,
    height: int | None = None,
    width: int | None = None,
) -> None:
    """One forward of the U-Net over pictures, each noised to every timestep; for what edits on the pipeline read.

    The rows are conditional, a picture's timesteps next to each other. Latents are the mean of the VAE's distribution,
    and noised as in training, whatever the scheduler: `sqrt(a_t) x + sqrt(1 - a_t) noise`.

    Args:
        pipe: a diffusers pipeline with a U-Net.
        prompt: one for all pictures, or one each.
        pictures: Pillow pictures.
        times: timesteps of the training's.
        generator: of the noise, or one a picture: then it does not depend on the other pictures.
        height, width: in pixels; None is the pictures' shape at the pipeline's usual area.

    Raises:
        CannotEdit: a U-Net that takes other latents, or a scheduler that does not say how it was trained.
        ValueError: no Pillow pictures, of several sizes, or not as many as prompts.
    """
    from diffusers.utils.torch_utils import randn_tensor

    prompts = [prompt] * len(pictures) if isinstance(prompt, str) else list(prompt)
    _check(pipe, prompts, pictures)
    if height is None or width is None:
        height, width = _size(pipe, pictures)
    device, count = pipe._execution_device, len(times)
    text, _, *pooled = pipe.encode_prompt(
        prompt=prompts, device=device, num_images_per_prompt=count, do_classifier_free_guidance=False
    )
    clean = _encoded(pipe, pictures, height, width, device).to(text.dtype)
    shape = (len(pictures), count * clean.shape[1], *clean.shape[2:])
    noise = randn_tensor(shape, generator=generator, device=device, dtype=clean.dtype)
    clean = clean.repeat_interleave(count, 0)
    alpha = pipe.scheduler.alphas_cumprod.cpu()[times].to(clean).repeat(len(pictures)).view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise.view_as(clean)
    added = None
    if pooled:  # XL is told the size, too
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=device, dtype=text.dtype)
        added = {"text_embeds": pooled[0], "time_ids": sizes.repeat(len(noisy), 1)}
    if pipe.scheduler.timesteps is None:  # PNDM's before its first call; the engine's clock needs some
        pipe.scheduler.set_timesteps(50)
    steps = torch.tensor(times, device=device).repeat(len(pictures))
    pipe.unet(noisy, steps, encoder_hidden_states=text, added_cond_kwargs=added)
    pipe.maybe_free_model_hooks()


def _check(pipe: Any, prompts: list[str], pictures: list[Any]) -> None:
    from PIL import Image

    if wrong := [each for each in pictures if not isinstance(each, Image.Image)]:
        raise ValueError(f"image is a {type(wrong[0]).__name__}: give a Pillow picture, or a list of them")
    if len(prompts) != len(pictures):
        raise ValueError(f"{len(prompts)} prompts for {len(pictures)} pictures: give one, or one a picture")
    vae = getattr(pipe, "vae", None)
    have = None if vae is None else vae.config.latent_channels
    if pipe.unet.config.in_channels != have:
        raise CannotEdit(
            f"the U-Net takes {pipe.unet.config.in_channels} channels and the VAE gives {have}: only text-to-image "
            "pipelines can be shown a picture"
        )
    if not hasattr(pipe.scheduler, "alphas_cumprod"):
        raise CannotEdit(
            f"{type(pipe.scheduler).__name__} has no alphas_cumprod, so no picture can be noised as in training: give "
            "the pipeline another scheduler, or read the pictures that it generates"
        )


def _size(pipe: Any, pictures: list[Any]) -> Grid:
    """The height and width at which pictures of one size have the area that the pipeline draws by itself."""
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        raise ValueError(f"pictures of the sizes {sorted(sizes)}: give height= and width=, or one at a time")
    (width, height) = sizes.pop()
    config = pipe.unet.config
    side = config.sample_size
    area = (side**2 if isinstance(side, int) else side[0] * side[1]) * pipe.vae_scale_factor**2
    unit = pipe.vae_scale_factor * 2 ** (len(config.down_block_types) - 1)  # all levels are whole
    scale = (area / (width * height)) ** 0.5 / unit
    return max(1, round(height * scale)) * unit, max(1, round(width * scale)) * unit


def _encoded(pipe: Any, pictures: list[Any], height: int, width: int, device: Any) -> Tensor:
    vae = pipe.vae
    dtype = vae.dtype
    pixels = pipe.image_processor.preprocess([each.convert("RGB") for each in pictures], height, width)
    upcast = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)  # XL's overflows
    if upcast:
        vae.to(torch.float32)
    try:
        latents: Tensor = vae.encode(pixels.to(device, vae.dtype)).latent_dist.mode()
    finally:
        if upcast:
            vae.to(dtype)
    return latents * vae.config.scaling_factor
