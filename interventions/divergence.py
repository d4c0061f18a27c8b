"""VHD of every head, and T-VHD of every generated token (arXiv 2412.13949, Eq. 4 and 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks.anatomy import anatomy, base_of
from ..hooks.edits import Branch, HeadGain, without_image
from ..hooks.generating import GREEDY
from ..hooks.run import Run
from ..hooks.session import Call
from .vhr import TEXT_ONLY, head_divergence


@dataclass(frozen=True)
class Divergence:
    """How far the image moves the heads of a plain model.

    Attributes:
        vhd: squared Euclidean distance at the last prompt row, (layers, heads); (B, layers, heads) for a batch.
        t_vhd: for each generated token, the sum over layers of the `top` largest distances, (T,) or (B, T).
        tokens: the tokens that t_vhd belongs to, (T,) or (B, T); empty when none were asked for.
        layers: the decoder blocks that the rows of `vhd` stand for.
    """

    vhd: Tensor
    t_vhd: Tensor
    tokens: Tensor
    layers: tuple[int, ...]


@torch.no_grad()
def divergence(
    model: nn.Module,
    inputs: Mapping[str, Any],
    max_new_tokens: int = 0,
    top: int | None = None,
) -> Divergence:
    """Run a prompt with and without its image, and compare each head's output at the newest row.

    The stream without the image goes on beside the generation, on the same tokens and its own cache.

    Args:
        model: a plain model; edits that are on it act on the stream with the image.
        inputs: what the processor made, with input_ids and the image.
        max_new_tokens: generate so many tokens greedily, for T-VHD; 0 reads the prompt only.
        top: k of Eq. 5, heads a layer. The paper does not state it; None takes half of the heads.

    Raises:
        NoImageTokens: no prompt has an image.
    """
    model = base_of(model)
    parts = anatomy(model)
    layers = parts.self_layers
    top = max(1, parts.heads // 2) if top is None else top
    if not 1 <= top <= parts.heads:
        raise ValueError(f"top is a number of heads from 1 to {parts.heads}, got {top}")
    steps: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def note(call: Call) -> None:
        steps[call.layer].append(head_divergence(call.newest_output(), call.branch(TEXT_ONLY)))

    reader = HeadGain(layers, note, hold=False)
    branch = Branch(TEXT_ONLY, without_image, layers, every_step=max_new_tokens > 1)
    with Run(model, [branch, reader]):
        if max_new_tokens:
            ids = model.generate(**inputs, max_new_tokens=max_new_tokens, **GREEDY)  # type: ignore[operator]
            tokens = ids[:, -len(steps[layers[0]]) :]
        else:
            model(**inputs)
            tokens = torch.zeros(len(steps[layers[0]][0]), 0, dtype=torch.long)
    every = torch.stack([torch.stack(steps[layer], 1) for layer in layers], 2)  # (B, T, layers, heads)
    t_vhd = every.topk(top, -1).values.sum((2, 3))[:, : tokens.shape[1]]
    single = len(every) == 1
    vhd = every[:, 0]
    return Divergence(
        vhd[0] if single else vhd, t_vhd[0] if single else t_vhd, tokens[0] if single else tokens, layers
    )
