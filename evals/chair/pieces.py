"""Pieces of text between blanks: what each consists of, remembered, and where its words stand in the text."""

from collections.abc import Callable, Container, Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Word(NamedTuple):
    """A token, or its reduced form: characters ``start`` to ``end`` of the caption, token ``position`` from 0."""

    text: str
    start: int
    end: int
    position: int


class Reduced(NamedTuple):
    """A caption's words that may matter to CHAIR, in order, and the number of all its tokens."""

    words: list[Word]
    tokens: int


def lower(text: str) -> str:
    """Lower case of the same length, so that positions hold (a few letters, as the Turkish I, would grow)."""
    low = text.lower()
    return low if len(low) == len(text) else "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


class Memo(dict[K, V], Generic[K, V]):
    """Results by key, made where they are missing; all are forgotten when there are ``most``."""

    def __init__(self, make: Callable[[K], V], most: int = 2**15) -> None:
        self._make = make
        self._most = most

    def __missing__(self, key: K) -> V:
        value = self._make(key)
        if len(self) >= self._most:
            self.clear()
        self[key] = value
        return value


class Chunk(NamedTuple):
    """What a piece of text between blanks consists of: its tokens, and those that may matter."""

    tokens: tuple[str, ...]
    words: tuple[Word, ...]


def chunk_of(tokens: Sequence[Word], matters: Container[str]) -> Chunk:
    """A piece of text with these tokens."""
    return Chunk(tuple(word.text for word in tokens), tuple(word for word in tokens if word.text in matters))


def placed(text: str, pieces: Sequence[str], chunks: Sequence[Chunk]) -> Reduced:
    """The words of a text's pieces, with their places in the text."""
    words: list[Word] = []
    at = position = 0
    for piece, (tokens, found) in zip(pieces, chunks, strict=True):
        at = text.find(piece, at)
        for word, start, end, i in found:
            words.append(Word(word, at + start, at + end, position + i))
        position += len(tokens)
        at += len(piece)
    return Reduced(words, position)
