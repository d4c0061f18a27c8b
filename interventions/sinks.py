"""Massive activations: the channels by which sink tokens are told, known ones and new ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..hooks.anatomy import Anatomy, anatomy, base_of
from ..hooks.edits import Hidden
from ..hooks.run import Run

PAPER_TAU = 20.0
PAPER_HIDDEN = 4096
LEAST_TAU = 6.0  # a Gaussian channel does not reach this, however narrow the model


class KnownSinks(NamedTuple):
    """Sink dimensions of a base model, and the threshold tau that goes with its width."""

    dims: tuple[int, ...]
    tau: float
    source: str


# (text model type, channels, layers, vocabulary): fine-tuning keeps these dimensions, mostly. The
# vocabulary is None where the first three tell the base model.
_TABLE: Mapping[tuple[str, int, int, int | None], KnownSinks] = {
    ("llama", 4096, 32, 32000): KnownSinks((1415, 2533), PAPER_TAU, "VAR paper and code, LLaMA-2-7B"),
    ("llama", 5120, 40, 32000): KnownSinks((2100, 4743), PAPER_TAU, "VAR code, LLaMA-2-13B"),
    ("llama", 4096, 32, 128256): KnownSinks((788, 1384, 4062), PAPER_TAU, "massive-activations, LLaMA-3-8B"),
    ("mixtral", 4096, 32, None): KnownSinks((2070, 3398), PAPER_TAU, "massive-activations, Mixtral"),
    ("qwen2_vl", 3584, 28, None): KnownSinks((458, 2570), PAPER_TAU, "VAR paper, Qwen2-7B"),
    ("qwen2_vl", 1536, 28, None): KnownSinks((1073, 534, 940), PAPER_TAU, "third party, Qwen2-VL-2B"),
    ("qwen2_5_vl", 2048, 36, None): KnownSinks((318, 1874, 1819), PAPER_TAU, "third party, Qwen2.5-VL-3B"),
    ("qwen2_5_vl", 3584, 28, None): KnownSinks((458, 2570), PAPER_TAU, "third party, Qwen2.5-VL-7B"),
    ("qwen2_5_vl", 5120, 64, None): KnownSinks((4675, 3094), PAPER_TAU, "third party, Qwen2.5-VL-32B"),
    ("qwen3_vl", 2048, 28, None): KnownSinks((1793, 1999, 1401), PAPER_TAU, "third party, Qwen3-VL-2B"),
    ("llama", 128, 6, None): KnownSinks((7,), LEAST_TAU, "trained so, the miniature LVLM"),
    ("qwen3_vl", 4096, 36, None): KnownSinks((1838,), PAPER_TAU, "third party, Qwen3-VL-8B"),
}


def known_sinks(parts: Anatomy) -> KnownSinks | None:
    """Sink dimensions of the base model, or None when nobody has published them.

    LLaVA adds a few tokens to its base model's vocabulary, so that is matched to the nearest thousand.
    """
    text_type = parts.text_type.removesuffix("_text")
    for (kind, channels, layers, vocab), known in _TABLE.items():
        if (kind, channels, layers) == (text_type, parts.hidden, parts.layers) and (
            vocab is None or abs(vocab - parts.vocab) < 1000
        ):
            return known
    return None


def sink_strength(hidden: Tensor, dims: Sequence[int]) -> Tensor:
    """max_{d in dims} |x[d]| / rms(x) of states (B, S, C) -> (B, S), in fp32: fp16 squares overflow."""
    return normalised(hidden)[..., list(dims)].amax(-1)


def normalised(hidden: Tensor) -> Tensor:
    """|x| / rms(x), the RMS norm without its weight, of states (B, S, C), in fp32 or wider."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return wide.abs() * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)


@dataclass(frozen=True)
class SinkDimensions:
    """What `sink_dimensions` found.

    Attributes:
        dims: channels that are outlying in more than half of the layers, strongest first; may be empty.
        tau: VAR's threshold at the same share of a token's energy as 20 has at 4,096 channels, at least 6.
        strength: mean over layers of the largest |x| / rms(x) of each channel, (C,).
    """

    dims: tuple[int, ...]
    tau: float
    strength: Tensor


@torch.no_grad()
def sink_dimensions(model: nn.Module, inputs: Mapping[str, Any], most: int = 4) -> SinkDimensions:
    """Find the sink dimensions of a model from one prompt (several images make it surer).

    A channel counts in a layer from 2 on when the largest |x| / rms(x) that any token reaches there is at
    least tau, which for a width of C channels is 20 * sqrt(C / 4096): a tenth of the token's energy in
    one channel, and never less than 6. It is a sink dimension when it counts in more than half of these layers.

    Args:
        model: any model that the engine can attach to.
        inputs: what the processor made: input_ids, attention_mask, pixel_values ...
        most: return at most so many dimensions.

    Raises:
        CannotEdit: the engine cannot attach to this model.
    """
    model = base_of(model)
    parts = anatomy(model)
    tau = max(LEAST_TAU, PAPER_TAU * (parts.hidden / PAPER_HIDDEN) ** 0.5)
    layers = parts.self_layers[2:] or parts.self_layers

    def read(hidden: Tensor, session: Any) -> Tensor:
        values = normalised(hidden)
        if session.padding is not None:
            values = values.masked_fill(session.padding.to(values.device)[..., None], 0.0)
        return values.amax((0, 1))

    with Run(model, [Hidden("channels", layers, read)]) as run:
        model(**inputs)
        strength = torch.stack([value.cpu() for value in run.read("channels").values()])
    often = (strength >= tau).float().mean(0) > 0.5
    ranked = strength.mean(0).masked_fill(~often, -1.0).argsort(descending=True)[:most]
    dims = tuple(int(dim) for dim in ranked if often[dim])
    return SinkDimensions(dims, tau, strength.mean(0))
