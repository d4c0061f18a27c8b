"""The words of an answer, and the tokens that each is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..hooks.errors import NoObjectWords
from ..interventions.spoken import Word, mention_of, words_of


@dataclass(frozen=True)
class Caption:
    """An answer: its text, and its words and punctuation marks."""

    text: str
    words: tuple[Word, ...]

    @classmethod
    def of(cls, tokens: Tensor, words: Any) -> Caption:
        """The caption of tokens (T,).

        Args:
            tokens: T of them.
            words: a processor or tokenizer, to decode them; or T texts, one for each token.

        Raises:
            ValueError: no tokens, another number of texts, nothing that decodes, or no word at all.
        """
        if tokens.ndim != 1 or not len(tokens):
            raise ValueError(
                f"an answer is tokens (T,), at least one, not {tuple(tokens.shape)}: ask for them with max_new_tokens="
            )
        known = tokenizer_of(words)
        text, found = _given(words, len(tokens)) if known is None else words_of(tokens, known)
        if not found:
            raise ValueError(f"the {len(tokens)} tokens make no word: their text is {text!r}")
        return cls(text, tuple(found))

    def find(self, word: str) -> list[int]:
        """Numbers of the words in which `word` stands, a word or a phrase in any case, also with s or es.

        Raises:
            NoObjectWords: nowhere.
        """
        hits = [match.span() for match in mention_of(word).finditer(self.text)] if word.strip() else []
        found = [
            number
            for number, own in enumerate(self.words)
            if any(start < own.end and own.start < end for start, end in hits)
        ]
        if not found:
            raise NoObjectWords(
                f"{word!r} is not in the answer, which reads {self.text[:80]!r}: give words as they stand there"
            )
        return found


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor, or itself; None where there is none."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return tokenizer if callable(getattr(tokenizer, "decode", None)) else None


def _given(texts: Any, count: int) -> tuple[str, list[Word]]:
    """Texts of single tokens as words; empty ones are none."""
    if isinstance(texts, str) or not isinstance(texts, Sequence) or len(texts) != count:
        seen = f"{len(texts)} texts" if isinstance(texts, list | tuple) else type(texts).__name__
        raise ValueError(
            f"words are the processor or tokenizer, or {count} texts, one for each token; got {seen}"
        )
    whole, words = "", []
    for token, text in enumerate(text.strip() for text in texts):
        if text:
            whole += " " if whole else ""
            words.append(Word(text, len(whole), len(whole) + len(text), token, token + 1))
            whole += text
    return whole, words
