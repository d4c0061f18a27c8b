"""The text-to-image miniature's parts: real diffusers and transformers classes, small sizes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from .subjects import SIDE, SUBJECTS, colours

TOKENS = 16
"""Length of the padded prompt."""
_WORDS = ("a", "an", "and", "the", "photo", "picture", "of", "with", "two", "no", "red", "blue", "green")


def build_tokenizer() -> Any:
    """A CLIPTokenizer whose BPE knows the subjects' words; any other word falls apart into letters."""
    from transformers import CLIPTokenizer

    words = dict.fromkeys([*_WORDS, *(part for name in SUBJECTS for part in name.split())])
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    pieces = [*letters, *(letter + "</w>" for letter in letters)]
    merges: dict[tuple[str, str], None] = {}  # ordered, without repeats
    for word in words:
        left = word[0]
        for index, letter in enumerate(word[1:], start=2):
            right = letter + "</w>" if index == len(word) else letter
            merges[(left, right)] = None
            left += right
            pieces.append(left)
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=cast(Any, list(merges)), model_max_length=TOKENS)


def build_vae() -> Any:
    """AutoencoderKL from (3, 64, 64) to (8, 16, 16)."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )


def build_pipeline(vae: Any) -> Any:
    """A StableDiffusionPipeline round the VAE, its U-Net and CLIP text model fresh."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 96),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def judge_labels() -> list[str]:
    """What the judge tells: each subject, then each subject of each colour (`red car`)."""
    return [*SUBJECTS, *(f"{colour} {name}" for name in SUBJECTS for colour in colours(name))]


def build_judge() -> Any:
    """A small ResNet over (3, 64, 64) pictures in [-1, 1] with one sigmoid per label of `judge_labels`."""
    from transformers import ResNetConfig, ResNetForImageClassification

    labels = judge_labels()
    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[24, 48, 96],
        depths=[1, 1, 1],
        layer_type="basic",
        problem_type="multi_label_classification",
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    return ResNetForImageClassification(config)


class SubjectJudge:
    """Tells which subjects a picture shows: called with pictures, (B, 10) probabilities in `SUBJECTS` order."""

    def __init__(self, folder: Path) -> None:
        from transformers import ResNetForImageClassification

        self.model = ResNetForImageClassification.from_pretrained(folder, local_files_only=True).eval()

    def pixels(self, pictures: Sequence[Any]) -> torch.Tensor:
        """(B, 3, 64, 64) in [-1, 1]."""
        small = [picture.convert("RGB").resize((SIDE, SIDE)) for picture in pictures]
        return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 127.5 - 1

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Any]) -> torch.Tensor:
        """(B, 10) probabilities."""
        return self.model(self.pixels(pictures)).logits[:, : len(SUBJECTS)].sigmoid()

    @torch.no_grad()
    def embed(self, pictures: Sequence[Any]) -> torch.Tensor:
        """(B, 96) features before the last layer, of length 1."""
        features = self.model.resnet(self.pixels(pictures)).pooler_output.flatten(1)
        return torch.nn.functional.normalize(features, dim=-1)
