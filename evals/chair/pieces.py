"""Pieces of text between blanks: what each consists of, remembered, and where its words stand in the text."""

from collections.abc import Callable, Container, Hashable, Sequence
from itertools import accumulate
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
    sizes = [len(chunk.tokens) for chunk in chunks]
    ends = list(accumulate(map(len, pieces)))
    single = bool(pieces) and len(text) == ends[-1] + len(pieces) - 1  # one blank between each two pieces
    starts = None if single else _starts(text, pieces)
    positions = list(accumulate(sizes, initial=0))
    words: list[Word] = []
    for k in [k for k, chunk in enumerate(chunks) if chunk.words]:
        at = starts[k] if starts else ends[k] - len(pieces[k]) + k
        words += [
            Word(word, at + start, at + end, positions[k] + i) for word, start, end, i in chunks[k].words
        ]
    return Reduced(words, positions[-1])


def _starts(text: str, pieces: Sequence[str]) -> list[int]:
    starts, at = [], 0
    for piece in pieces:
        starts.append(text.find(piece, at))
        at = starts[-1] + len(piece)
    return starts
