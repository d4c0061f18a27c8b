"""The objects that a caption names, as CHAIR counts them.

Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018, arXiv 1809.02156.
"""

import re
from dataclasses import dataclass

from .pieces import Reduced
from .words import ChairWords, chair_words, merge_pairs, node_words

_SENTENCE_END = re.compile(r"[.!?]+[\"')\]\u201d\u2019]*(?=\s|$)")


@dataclass(frozen=True)
class Mention:
    """An object that a caption names.

    Attributes:
        word: the reduced word, for instance "girl" or "hot dog".
        node: the COCO category it counts as.
        position: number of its first token, from 0, before pairs are joined.
        start, end: the characters of the original caption, for marking it there.
    """

    word: str
    node: str
    position: int
    start: int
    end: int


def mentions(merged: Reduced) -> list[Mention]:
    """The objects among a caption's words once pairs are joined, see ``chair_objects``."""
    nodes = node_words()
    texts = {word.text for word in merged.words}
    skipped = "seat" if {"toilet", "seat"} <= texts else None
    return [
        Mention(text, nodes[text], position, start, end)
        for text, start, end, position in merged.words
        if text in nodes and text != skipped
    ]


def chair_objects(caption: str, words: str | ChairWords | None = None) -> list[Mention]:
    """The objects that a caption names, in order and with repeats.

    A caption that speaks of a toilet has no "seat" that is a chair. Positions are those of the caption (the
    published ``hallucination_idxs`` shift after such a seat).
    """
    return mentions(merge_pairs(chair_words(words).reduce(caption)))


def drop_unfinished_sentence(caption: str) -> str:
    """The caption up to its last full sentence; all of it when it has none, so that nothing becomes empty.

    A sentence ends with ".", "!" or "?" before a blank or the end, closing quotes and brackets included. OPERA's rule
    (two lines in its ``chair.py``, commented out there) cuts after the last "." of any kind, so within "3.50" too and
    not after a question, and leaves nothing of a caption without one. An abbreviation's dot ends a sentence in both.
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(caption)]
    return caption[: ends[-1]] if ends else caption
