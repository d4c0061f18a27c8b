r"""Modality-mutual attention (MMA), experimental.

Wang et al., "Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for Multimodal LLMs"
(AKI), arXiv 2503.02597. Reference:
https://github.com/sony/aki (CC BY-NC, not copied).

Row i of an image token sees, besides the keys j <= i, the question's tokens behind the image:

    visible(i, j)  =  j <= i   or   (i is an image token, j is a text token of the question)

in every layer and head, while the prompt is read. Image tokens see each other causally, text stays causal, and
no image row sees the answer: its keys come after the prompt.

The paper trains the model with this mask. On a model that was trained causally it is out of distribution, and
nobody has published what it does there: hence experimental.

Where this differs from the release: several images, batches and padding work; a row sees all question tokens behind it,
between images too. The release's question ends one token late, inside of the answer's tag ("<|assistant|>");
here the tag is left out where it is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..hooks.anatomy import Anatomy
from ..hooks.edits import Edit, Mask
from ..hooks.session import Call
from .method import Method


def mutual(image: Tensor, padding: Tensor | None, tag: int) -> Tensor:
    """Pairs of image row and question key, (B, S, S) bool.

    Args:
        image: image tokens of the prompt, (B, S) bool.
        padding: (B, S) bool or None.
        tag: tokens at the end of the prompt that belong to the answer's tag.
    """
    question = ~image
    if padding is not None:
        question = question & ~padding
    if tag:  # the last `tag` real tokens of each sample
        question = question & (question.flip(1).cumsum(1).flip(1) > tag)
    places = torch.arange(image.shape[1], device=image.device)
    behind = places[:, None] < places
    return image[:, :, None] & question[:, None, :] & behind


@dataclass(frozen=True)
class MMA(Method):
    """Let image tokens see the question behind them (experimental).

    Args:
        tag: tokens of the answer's tag at the end of the prompt ("ASSISTANT:"), hidden from the image; None takes
            them from the processor's chat template, or 0 without one.
        layers: decoder blocks from 0; None means all.
    """

    tag: int | None = None
    layers: tuple[int, ...] | None = None

    name = "mma"
    paper = "Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for Multimodal LLMs"
    arxiv = "2503.02597"
    kind = "mask"
    cost = "a mask in the prefill"
    models = ()

    def __post_init__(self) -> None:
        if self.tag is not None and self.tag < 0:
            raise ValueError(f"tag is a number of tokens, 0 or more, got {self.tag}")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))

    def with_processor(self, processor: Any) -> MMA:
        """With the length of the answer's tag in the processor's chat template."""
        if self.tag is not None or not getattr(processor, "chat_template", None):
            return self
        chat = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
        plain, tagged = (
            str(processor.apply_chat_template(chat, add_generation_prompt=generation, tokenize=False))
            for generation in (False, True)
        )
        tokenizer = getattr(processor, "tokenizer", processor)
        ids = tokenizer(tagged.removeprefix(plain), add_special_tokens=False)["input_ids"]
        return replace(self, tag=len(ids) if tagged.startswith(plain) else 0)

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        """One mask for all layers that attend to text positions."""
        layers = anatomy.self_layers if self.layers is None else self.layers
        return (Mask(layers, self.allow),)

    def allow(self, call: Call) -> Tensor:
        """Pairs that are visible besides the model's own, (B, 1, Q, K) bool."""
        session, rows, keys = call.session, call.query.shape[2], call.key.shape[2]
        pairs = session._once("mutual", lambda: mutual(session.image, session.padding, self.tag or 0))
        pairs = pairs.to(call.query.device)
        return F.pad(pairs, (0, keys - pairs.shape[2], 0, rows - pairs.shape[1]))[:, None]
