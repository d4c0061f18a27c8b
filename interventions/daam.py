"""DAAM: where in the picture each word of the prompt acted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..hooks.denoiser import is_pipeline
from ..hooks.errors import CannotEdit
from ..hooks.latent_edits import TextMaps, Watch
from .recipes import apply
from .word_maps import heat_of


@dataclass(frozen=True)
class WordHeat:
    """Heat maps of words over generated pictures.

    Attributes:
        images: what the pipeline gave, B pictures.
        words: C words or phrases; of a batch with words of its own for each prompt, the first prompt's.
        by_step: (B, n, C, h, w) mean probs of each word, step by step, at the finest resolution there is.
    """

    images: Any
    words: tuple[Any, ...]
    by_step: Tensor

    @property
    def mean(self) -> Tensor:
        """(B, C, h, w), the mean over the steps."""
        return self.by_step.mean(1)


def word_heat(pipe: Any, prompt: str | list[str], words: Sequence[Any], **options: Any) -> WordHeat:
    """Generate pictures and note where each word acts (DAAM, arXiv 2210.04885). The pictures do not change.

    The maps of the attention to the text, means over heads and layers, are brought from each resolution to the finest
    (bicubic, not below zero) and averaged, each resolution by its number of layers; then over the steps.
    Reference: https://github.com/castorini/daam (MIT); the differences:

    - any image shape, batch, and number of text tokens; U-Nets (SD 1, 2, XL), SD 3 and Flux; attention stays SDPA.
    - the mean over heads, layers and steps in place of the sum, so that a heat is a probability.
    - all resolutions count; the reference leaves out those an eighth of the latents and smaller.
    - a word of several tokens has the mean of their maps.

    Args:
        pipe: a diffusers pipeline; edits that are on it stay on.
        prompt: one or several prompts.
        words: words or phrases of the prompt, or tuples of token indices; or a list of lists, one a prompt.
        options: of the pipeline's call.

    Raises:
        CannotEdit: no diffusers pipeline, or one that the engine does not know.
        NoObjectWords: a word is not in the prompt.
    """
    if not is_pipeline(pipe):
        raise CannotEdit(f"word_heat needs a diffusers pipeline, not {type(pipe).__name__}")
    seen: list[TextMaps] = []
    with apply(pipe, Watch(tuple(words), seen.append)):
        images = pipe(prompt, **options).images
    height, width = max((maps.probs.shape[1:3] for maps in seen), key=lambda grid: grid[0] * grid[1])
    steps: dict[int, list[tuple[Tensor, int]]] = {}
    for maps in seen:
        steps.setdefault(maps.step, []).append(
            (torch.stack(heat_of(maps, (height, width), "bicubic")), maps.layers)
        )
    each = []
    for step in sorted(steps):
        layers = sum(count for _, count in steps[step])
        each.append(torch.stack([heat * count for heat, count in steps[step]]).sum(0) / layers)
    first = words[0] if isinstance(words[0], list) else words
    return WordHeat(images, tuple(first), torch.stack(each, 1))
