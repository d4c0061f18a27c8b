"""POPE: is there a dog in the image? `scoring` has the rules, `benchmark` the runs."""

from .scoring import (
    PARSERS,
    SPLITS,
    Answer,
    PopeItems,
    PopeScore,
    Question,
    SplitScore,
    build_pope,
    load_answers,
    load_pope,
    parse,
    pope_items,
    pope_version,
    score_pope,
)

__all__ = [
    "PARSERS",
    "SPLITS",
    "Answer",
    "PopeItems",
    "PopeScore",
    "Question",
    "SplitScore",
    "build_pope",
    "load_answers",
    "load_pope",
    "parse",
    "pope_items",
    "pope_version",
    "score_pope",
]
