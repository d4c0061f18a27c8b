"""MME: two questions an image. `scoring` has the rules, `benchmark` the runs."""

from .scoring import (
    COGNITION,
    HALLUCINATION,
    PERCEPTION,
    SUBTASKS,
    MmeAnswer,
    MmeQuestion,
    MmeScore,
    load_mme,
    load_mme_answers,
    score_mme,
)

__all__ = [
    "COGNITION",
    "HALLUCINATION",
    "PERCEPTION",
    "SUBTASKS",
    "MmeAnswer",
    "MmeQuestion",
    "MmeScore",
    "load_mme",
    "load_mme_answers",
    "score_mme",
]
