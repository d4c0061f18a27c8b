"""Where the words of a prompt are in the text that the denoiser attends to."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .denoiser import Denoiser
from .errors import NoObjectWords
from .latent_edits import Concept


class Reading(NamedTuple):
    """What one encode_prompt read: the prompts (None where embeddings were given), and the rows that came of it."""

    prompts: Sequence[str] | None = None
    images: int = 0
    embeds: Tensor | None = None


class Readings:
    """The newest readings of a pipeline. Flux reads its negative prompt by itself, after the prompt."""

    def __init__(self) -> None:
        self._newest: deque[Reading] = deque(maxlen=4)

    def note(self, prompts: str | Sequence[str] | None, embeds: Tensor) -> None:
        """Keep what was read."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        self._newest.appendleft(Reading(prompts, embeds.shape[0], embeds))

    def find(self, text: Tensor) -> Reading:
        """The reading that became the text of the denoiser, the conditional rows of which come last."""
        for reading in self._newest:
            known = reading.embeds
            if known is not None and known.shape[1:] == text.shape[1:] and torch.equal(known[-1], text[-1]):
                return reading
        return Reading()


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt as the denoiser sees it: the index of each content token, and where each word is."""

    text: str
    content: tuple[int, ...]
    segments: tuple[tuple[Any, tuple[int, ...], int], ...]  # tokenizer, ids, offset in the text sequence

    def find(self, concept: str | Sequence[int]) -> tuple[int, ...]:
        """The token indices of a word or phrase (its first occurrence in each text encoder), or of given indices.

        Raises:
            NoObjectWords: the concept is not in the prompt.
        """
        if not isinstance(concept, str):
            return tuple(concept)
        found: list[int] = []
        for tokenizer, ids, offset in self.segments:
            wanted = tuple(tokenizer(concept, add_special_tokens=False).input_ids)
            starts = range(len(ids) - len(wanted) + 1) if wanted else ()
            at = next((start for start in starts if ids[start : start + len(wanted)] == wanted), None)
            if at is not None:
                found += range(offset + at, offset + at + len(wanted))
        if not found:
            raise NoObjectWords(
                f"the concept {concept!r} is not in the prompt {self.text!r}: give a word or phrase as it stands "
                "there, or token indices such as (2,)"
            )
        return tuple(found)


def prompt_of(pipe: Any, denoiser: Denoiser, text: str) -> Prompt:
    """Tokenise a prompt as the pipeline's text encoders do."""
    names = {"unet": ["tokenizer"], "sd3": ["tokenizer", "tokenizer_3"], "flux": ["tokenizer_2"]}[
        denoiser.family
    ]
    offset, segments, content = 0, [], []
    for name in names:
        tokenizer = getattr(pipe, name, None)
        if tokenizer is None:
            continue
        if hasattr(pipe, "maybe_convert_prompt"):
            text = pipe.maybe_convert_prompt(text, tokenizer)  # textual inversion
        limit = tokenizer.model_max_length
        ids = tuple(tokenizer(text, truncation=limit < 10**6, max_length=limit).input_ids)
        special = set(tokenizer.all_special_ids)
        content += [offset + place for place, token in enumerate(ids) if token not in special]
        segments.append((tokenizer, ids, offset))
        offset += limit
    return Prompt(text, tuple(content), tuple(segments))


def find_concepts(
    pipe: Any,
    denoiser: Denoiser,
    texts: Sequence[str] | None,
    concepts: Sequence[Any],
    *,
    images: int,
    tokens: int,
) -> tuple[Any, Any]:
    """Token indices of every concept, and of the prompt's content, for each image.

    Raises:
        NoObjectWords: a word that is not in its prompt, or an index beyond the `tokens` of the text.
    """
    each: list[Sequence[Concept]]
    each = list(concepts) if any(isinstance(item, list) for item in concepts) else [concepts]
    if texts is None:
        if any(isinstance(concept, str) for own in each for concept in own):
            raise NoObjectWords(
                "the pipeline was called with prompt_embeds, so words cannot be found: give the concepts as "
                "tuples of token indices, as in concepts=[(2,), (5,)]"
            )
        texts = [""] * len(each)
    prompts = [prompt_of(pipe, denoiser, text) for text in texts]
    if len(each) not in (1, len(prompts)):
        raise NoObjectWords(
            f"{len(each)} lists of concepts for {len(prompts)} prompts: give one, or one a prompt"
        )
    found, content = [], []
    for place, prompt in enumerate(prompts):
        own = each[place if len(each) > 1 else 0]
        indices = tuple(prompt.find(concept) for concept in own)
        beyond = [index for few in indices for index in few if not 0 <= index < tokens]
        if beyond:
            raise NoObjectWords(f"token index {beyond[0]} is out of range: the text has {tokens} tokens")
        found.append(indices)
        content.append(prompt.content or tuple(range(1, tokens - 1)))
    repeat = images // len(prompts)
    return tuple(x for x in found for _ in range(repeat)), tuple(x for x in content for _ in range(repeat))
