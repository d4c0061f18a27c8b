"""Tiny random pipelines of the real classes: two kinds of U-Net, and joint attention in both orders."""

import functools
from typing import Any

import torch

PROMPT = "a dog and an apple"
KINDS = ("sd", "sdxl", "sd3", "flux")


def _text(tokenizer: Any, projection: bool = False, hidden: int = 16) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, projection_dim=hidden,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def _t5(tokenizer: Any, hidden: int = 32) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=hidden, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )


def _vae(channels: int, **more: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=channels,
        norm_num_groups=4, **more,
    )  # fmt: skip


def _unet(**more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=2,
        **{
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            **more,
        },
    )  # fmt: skip


def _sd(tokenizer: Any) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=_vae(4), text_encoder=_text(tokenizer), tokenizer=tokenizer, unet=_unet(cross_attention_dim=16),
        scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sdxl(tokenizer: Any) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    unet = _unet(
        cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=8, use_linear_projection=True,
        projection_class_embeddings_input_dim=6 * 8 + 16, transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=_vae(4), text_encoder=_text(tokenizer), text_encoder_2=_text(tokenizer, projection=True),
        tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet, scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )  # fmt: skip


def _sd3(tokenizer: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, out_channels=4,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=_vae(4, shift_factor=0.1),
        text_encoder=_text(tokenizer, projection=True), tokenizer=tokenizer,
        text_encoder_2=_text(tokenizer, projection=True), tokenizer_2=tokenizer,
        text_encoder_3=_t5(tokenizer), tokenizer_3=tokenizer,
    )  # fmt: skip


def _flux(tokenizer: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=_vae(4, shift_factor=0.1), text_encoder=_text(tokenizer),
        tokenizer=tokenizer, text_encoder_2=_t5(tokenizer), tokenizer_2=tokenizer, transformer=transformer,
    )  # fmt: skip


@functools.cache
def _tokenizer() -> Any:
    from regard.evals.miniature.text_to_image import build_tokenizer

    return build_tokenizer()


def build(kind: str, seed: int = 0) -> Any:
    """A pipeline of random weights; its pictures are 32x32 (16x16 latents), Flux and SD3 in patches of 2."""
    torch.manual_seed(seed)
    pipe = {"sd": _sd, "sdxl": _sdxl, "sd3": _sd3, "flux": _flux}[kind](_tokenizer())
    for name in ("unet", "transformer"):
        module = getattr(pipe, name, None)
        for parameter in module.parameters() if module is not None else ():
            if parameter.ndim > 1:
                torch.nn.init.normal_(
                    parameter, std=1.2 / parameter[0].numel() ** 0.5
                )  # else attention is flat
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, prompt: Any = PROMPT, seed: int = 0, steps: int = 4, **options: Any) -> torch.Tensor:
    """What the pipeline arrives at, undecoded."""
    more: dict[str, Any] = {"height": 32, "width": 32, "guidance_scale": 4.0, **options}
    if type(pipe).__name__.startswith(("StableDiffusion3", "Flux")):
        more = {"max_sequence_length": 16, **more}
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, num_inference_steps=steps, generator=generator, output_type="latent", **more).images
