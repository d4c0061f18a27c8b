"""LLaVA-1.5-7B and Qwen2-VL-7B with random weights, their prompts, and eager attention with VAR; for gpu_models.py.

VAR acts on sinks only, so every 57th image token and BOS get one massive channel.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

import regard
from regard.interventions.sinks import sink_strength
from regard.kernels.policies import Redistribute

SINK_DIM, MASSIVE, EACH = 7, 1000.0, 57
BOS, TEXT = 1, 3
IMAGE, START, END = 151_655, 151_652, 151_653  # Qwen2-VL's ids


def llava(tiny: bool) -> Any:
    text: dict[str, Any] = {"model_type": "llama", "vocab_size": 32_064, "max_position_embeddings": 4096}
    vision: dict[str, Any] = {
        "model_type": "clip_vision_model",
        "image_size": 112 if tiny else 336,
        "patch_size": 14,
    }
    if tiny:
        text |= {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
        }
        vision |= {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
    else:
        text |= {
            "hidden_size": 4096,
            "intermediate_size": 11_008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        }
        vision |= {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        }
    return transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=32_000)


def qwen2_vl(tiny: bool) -> Any:
    text: dict[str, Any] = {"vocab_size": 152_064, "max_position_embeddings": 32_768}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    if tiny:
        text |= {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
        }
        text |= {"num_key_value_heads": 2, "rope_parameters": rope | {"mrope_section": [4, 6, 6]}}
        vision = {"depth": 2, "embed_dim": 64, "num_heads": 4, "hidden_size": 128}
    else:
        text |= {
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
        }
        text |= {"num_key_value_heads": 4, "rope_parameters": rope | {"mrope_section": [16, 24, 24]}}
        vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 3584}
    ids = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END}
    return transformers.Qwen2VLConfig(vision_config=vision, text_config=text, **ids)


def build(config: Any, device: torch.device) -> Any:
    """Random weights made on the device in bf16, with sinks among the image tokens and at BOS."""
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    model.get_input_embeddings().weight.data[BOS, SINK_DIM] = MASSIVE
    inner = model.model
    projector = inner.visual.merger if hasattr(inner, "visual") else inner.multi_modal_projector

    def massive(module: Any, args: Any, out: Tensor) -> None:
        out[..., ::EACH, SINK_DIM] = MASSIVE

    projector.register_forward_hook(massive)
    return model


def prompt(model: Any, batch: int, device: torch.device, tiny: bool) -> dict[str, Tensor]:
    """BOS, text, an image and text: 35 + 576 + 29 tokens, or 16 + 988 + 20 with the image's borders."""
    rng = torch.Generator().manual_seed(0)
    qwen = hasattr(model.model, "visual")
    before, count, after = (15, 988, 19) if qwen else (35, 576, 29)
    if tiny:
        count = 64
    words = torch.randint(TEXT, 30_000, (batch, before + after), generator=rng)
    words[:, 0] = BOS
    image = torch.full((batch, count), model.config.image_token_id)
    if qwen:
        image = F.pad(F.pad(image, (1, 0), value=START), (0, 1), value=END)
    ids = torch.cat([words[:, :before], image, words[:, before:]], 1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if qwen:
        given["pixel_values"] = torch.randn(batch * 4 * count, 1176, generator=rng).bfloat16()
        given["image_grid_thw"] = torch.tensor([[1, 16, 16] if tiny else [1, 52, 76]] * batch)
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
            given["mm_token_type_ids"] = (ids == IMAGE).int()
    else:
        edge = model.config.vision_config.image_size
        given["pixel_values"] = torch.randn(batch, 3, edge, edge, generator=rng).bfloat16()
    return {name: tensor.to(device) for name, tensor in given.items()}


class EagerVar:
    """VAR on the whole matrix of probs: eager attention that also keeps it, with the sinks of each layer."""

    def __init__(self, model: Any, var: regard.VAR, ids: Tensor) -> None:
        self.layers, self.var = model.model.language_model.layers, var
        self.image = ids == model.config.image_token_id
        self.first = int(self.image[0].nonzero().max()) + 1
        self.policy = Redistribute(var.transfer, var.rho, var.min_visual)
        self.groups: dict[int, Tensor] = {}

    def read(self, layer: int, hidden: Tensor) -> None:
        """The groups of the prompt, as one-hot rows (B, 1, S, 4)."""
        if hidden.shape[1] > 1:
            sinks = sink_strength(hidden, (SINK_DIM,)) >= self.var.tau
            ids = torch.where(self.image, 1 + sinks.long(), 3 * sinks)
            self.groups[layer] = F.one_hot(ids, 4).float()[:, None]

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Any:
        out, probs = eager_attention_forward(module, query, key, value, mask, **kwargs)
        if not 2 <= module.layer_idx < len(self.layers) - 1:
            return out, probs
        member = self.groups[module.layer_idx]
        generated = key.shape[2] - member.shape[2]
        member = F.pad(member, (0, 0, 0, generated))
        member[:, :, member.shape[2] - generated :, 0] = 1
        first = self.first if query.shape[2] > 1 else 0
        edited = probs[:, :, first:].float()
        edited = edited * (self.policy(edited @ member) @ member.mT)
        probs = torch.cat([probs[:, :, :first], edited.to(probs)], 2)
        value = value.repeat_interleave(module.num_key_value_groups, 1)
        return (probs @ value).transpose(1, 2).contiguous(), probs

    def attach(self, stack: contextlib.ExitStack) -> str:
        """Be ready as the decoder's attention until the stack is left; gives its name."""
        AttentionInterface.register("eager_var", self.attend)
        AttentionMaskInterface.register("eager_var", eager_mask)
        for number, layer in enumerate(self.layers):
            read = lambda _, args, number=number: self.read(number, args[0])  # noqa: E731
            stack.callback(layer.register_forward_pre_hook(read).remove)
        return "eager_var"


CONFIGS = {"llava": llava, "qwen2_vl": qwen2_vl}
