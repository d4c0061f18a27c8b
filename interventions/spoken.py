"""The words of generated tokens: tokenizers cut words in pieces, and people read words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_WORD = re.compile(r"\w+(?:[-'\u2019]\w+)*|[^\w\s]+")


@dataclass(frozen=True)
class Word:
    """A word or a mark: `text[start:end]` of the whole, and the tokens first <= t < last that it is made of."""

    text: str
    start: int
    end: int
    first: int
    last: int


def mention_of(word: str) -> re.Pattern[str]:
    """Finds a word or phrase in a text: whole words in any case, also with s or es."""
    return re.compile(rf"(?<!\w){re.escape(word.strip())}(?:s|es)?(?!\w)", re.IGNORECASE)


def check_answer(max_new_tokens: int, output: Tensor | None) -> None:
    """Raise ValueError unless at most one of them says what the answer is."""
    if max_new_tokens < 0 or (max_new_tokens and output is not None):
        raise ValueError(
            f"give either output or max_new_tokens from 0 up, got max_new_tokens={max_new_tokens}"
            + (" and an output" if output is not None else "")
        )


def spans(ids: Sequence[int], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The text of some tokens without special ones, and the characters (start, end) that each adds to it."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    ends = [0]
    for count in range(1, len(ids) + 1):
        begun = tokenizer.decode(ids[:count], skip_special_tokens=True)
        pairs = enumerate(zip(begun, text, strict=False))
        same = next((at for at, (one, other) in pairs if one != other), min(len(begun), len(text)))
        ends.append(max(ends[-1], same))  # the last letter may still lack some of its bytes
    return text, list(pairwise(ends))


def words_of(tokens: Tensor | Sequence[int], tokenizer: Any) -> tuple[str, list[Word]]:
    """The text of generated tokens (T,), and its words and punctuation marks with their tokens.

    A token that two words share belongs to both; tokens without a letter of the text belong to none.

    Args:
        tokens: (T,) ids.
        tokenizer: a tokenizer, or a processor that has one.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    text, places = spans([int(token) for token in tokens], tokenizer)
    found = []
    for hit in _WORD.finditer(text):
        own = [
            number
            for number, (start, end) in enumerate(places)
            if max(start, hit.start()) < min(end, hit.end())
        ]
        found.append(Word(hit.group(), hit.start(), hit.end(), own[0], own[-1] + 1))
    return text, found


def by_word(values: Tensor, words: Sequence[Word]) -> Tensor:
    """Values of tokens (T, ...) as values of words (W, ...), the mean over a word's tokens."""
    rows = [values[word.first : word.last].mean(0) for word in words]
    return torch.stack(rows) if rows else values[:0]
