"""AMBER: descriptions and yes/no questions of annotated images. `scoring` has the rules, `benchmark` the runs."""

from .scoring import (
    AMBER_PARSERS,
    Amber,
    AmberCaption,
    AmberImage,
    AmberQuestion,
    AmberScore,
    AnswerScore,
    CaptionScore,
    amber_score,
    caption_counts,
    load_amber,
    load_amber_answers,
    parse_amber,
    question_counts,
    read_caption,
    score_amber,
)

__all__ = [
    "AMBER_PARSERS",
    "Amber",
    "AmberCaption",
    "AmberImage",
    "AmberQuestion",
    "AmberScore",
    "AnswerScore",
    "CaptionScore",
    "amber_score",
    "caption_counts",
    "load_amber",
    "load_amber_answers",
    "parse_amber",
    "question_counts",
    "read_caption",
    "score_amber",
]
