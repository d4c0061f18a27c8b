"""POPE: yes/no polling for object hallucination, scored as published.

Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023, arXiv 2305.10355.
Reference: https://github.com/AoiDragon/POPE/blob/08d957b9/evaluate.py
Nothing here runs a model: questions and answers in, figures out.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..answers import PARSERS, Answer, load_answers, parse
from .questions import (
    SPLITS,
    Question,
    Questions,
    as_splits,
    build_pope,
    load_pope,
    pope_version,
    same_question,
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

AnswerList: TypeAlias = Sequence[str | Answer] | Mapping[int, str]
Answers: TypeAlias = AnswerList | Mapping[str, AnswerList]

# LLaVA keeps the three splits in one file and tells them apart by this offset of the question ids.
LLAVA_OFFSET = 10_000_000
_LLAVA_SPLITS = ("adversarial", "random", "popular")


@dataclass(frozen=True)
class SplitScore:
    """Figures of one set of questions, all as fractions of 1; "yes" is the positive class.

    ``precision``, ``recall`` and ``f1`` are 0.0 where the published code would divide by zero. ``yes_ratio``
    is the share of the *predictions* that are yes (lmms-eval reports that of the labels, always 0.5).
    ``other`` counts the answers that the parser took for neither: wrong in the accuracy, left out of precision
    and recall, except that VLMEvalKit counts them as not-yes (``fn``). ``unclear`` counts the answers that a
    strict reading (just one of the words yes and no occurs) takes for neither, whatever the parser made of
    them.
    """

    n: int
    tp: int
    fp: int
    tn: int
    fn: int
    other: int
    unclear: int
    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float


@dataclass(frozen=True)
class PopeScore:
    """POPE figures: per split, their means (which papers print), and ``pooled`` over all questions.

    LLaVA and most papers print ``mean_f1``, others ``mean_accuracy``; VLMEvalKit prints ``pooled.f1``.
    """

    splits: dict[str, SplitScore]
    pooled: SplitScore
    mean_f1: float
    mean_accuracy: float
    mean_yes_ratio: float
    n: int
    unclear: int
    parser: str
    version: str

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts and numbers, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class PopeItems:
    """One entry per question, for paired and clustered statistics; the image is the cluster.

    ``correct`` is 1 where the prediction equals the label, else 0: int64, shape (N,).
    """

    ids: list[str]
    images: list[str]
    splits: list[str]
    labels: list[str]
    predictions: list[str]
    unclear: list[bool]
    correct: npt.NDArray[np.int64]


def _as_answers(answers: AnswerList, by_order: bool) -> list[Answer]:
    """Answers as objects. Strings are taken in their order; what comes from a file has to say what it answers.

    Raises:
        ValueError: an `Answer` without an id, unless `by_order` and it has its question's text.
    """
    if isinstance(answers, Mapping):
        answers = [Answer(text, given) for given, text in answers.items()]
    if isinstance(answers, str):
        raise TypeError(f"answers is one string ({answers[:40]!r}); give a list with one answer per question")
    for number, answer in enumerate(answers, start=1):
        if not isinstance(answer, Answer) or answer.question_id is not None:
            continue
        if not by_order:
            raise ValueError(
                f"answer {number} has no question_id, and a question's text stands for many images: add "
                "question_id, or, where the answers are in the order of these very questions, give by_order=True"
            )
        if answer.prompt is None:
            raise ValueError(
                f"answer {number} has neither question_id nor its question, so its place cannot be checked"
            )
    return [a if isinstance(a, Answer) else Answer(a) for a in answers]


def version_advice(questions: int, answers: int) -> str:
    """What a difference in numbers says of POPE's versions; "" when it says nothing."""
    if {questions, answers} in ({2910, 3000}, {8910, 9000}):
        return (
            "LLaVA's and OPERA's random file has 2910 rows (version e3e3926), every other version 3000: "
            "load the questions that these answers were made with."
        )
    return ""


def _wrong_count(where: str, questions: int, answers: int) -> ValueError:
    advice = version_advice(questions, answers) or "give one answer per question"
    return ValueError(f"{where}: {answers} answers for {questions} questions; {advice}")


def llava_place(question_id: int) -> tuple[str, int] | None:
    """(split, id within it) of an id of LLaVA's one file for three splits; None when it is none beyond the first."""
    place, within = divmod(question_id, LLAVA_OFFSET)
    return (_LLAVA_SPLITS[place], within) if 0 <= place < len(_LLAVA_SPLITS) else None


def _llava_splits(splits: Mapping[str, list[Question]], answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    named: dict[str, list[Answer]] = {split: [] for split in splits}
    for answer in answers:
        place = llava_place(answer.question_id or 0)
        if place is None or place[0] not in named:
            split = place[0] if place else "no split that is known"
            raise ValueError(
                f"answer {answer.question_id} is of {split}; the questions are of {sorted(splits)}"
            )
        named[place[0]].append(answer)
    return named


def _splits_by_id(splits: Mapping[str, list[Question]], answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """Answers by split where ids tell the split.

    Raises:
        ValueError: an id stands in several splits, or in none.
    """
    homes: dict[int, list[str]] = {}
    for split, rows in splits.items():
        for q in rows:
            homes.setdefault(q.question_id, []).append(split)
    named: dict[str, list[Answer]] = {split: [] for split in splits}
    for answer in answers:
        home = homes.get(answer.question_id or 0, [])
        if len(home) != 1:
            where = f"stands in {', '.join(home)}" if home else "is no question's"
            raise ValueError(
                f"question_id {answer.question_id} {where}: give the answers of each split by its name, "
                f"{{{next(iter(splits))!r}: [...], ...}}"
            )
        named[home[0]].append(answer)
    return named


def _answers_by_split(
    splits: Mapping[str, list[Question]], answers: Answers, by_order: bool
) -> dict[str, list[Answer]]:
    """Answers per split: named by split, told apart by ids, or, without ids, one split after the other."""
    if isinstance(answers, Mapping) and answers and all(isinstance(key, str) for key in answers):
        if set(answers) != set(splits):
            raise ValueError(f"answers are for {sorted(map(str, answers))}, questions for {sorted(splits)}")
        return {split: _as_answers(answers[split], by_order) for split in splits}  # type: ignore[index]
    flat = _as_answers(answers, by_order)  # type: ignore[arg-type]
    if any((a.question_id or 0) > LLAVA_OFFSET for a in flat):
        return _llava_splits(splits, flat)
    total = sum(len(rows) for rows in splits.values())
    if len(flat) != total:
        raise _wrong_count("/".join(splits), total, len(flat))
    if len(splits) > 1 and all(a.question_id is not None for a in flat):
        return _splits_by_id(splits, flat)
    taken = iter(flat)
    return {split: [next(taken) for _ in rows] for split, rows in splits.items()}


def _paired(split: str, questions: Sequence[Question], answers: Sequence[Answer]) -> list[str]:
    """The text of the answer to each question: by id, or by order where no answer has one."""
    if len(answers) != len(questions):
        raise _wrong_count(split, len(questions), len(answers))
    for answer in answers:
        if not isinstance(answer.text, str):
            raise TypeError(
                f"{split}: an answer is {answer.text!r} ({type(answer.text).__name__}), not a string"
            )
    ordered = list(answers)
    with_ids = [answer for answer in answers if answer.question_id is not None]
    if with_ids and len(with_ids) != len(answers):
        raise ValueError(
            f"{split}: {len(answers) - len(with_ids)} of {len(answers)} answers have no question_id"
        )
    if with_ids:
        by_id = {(a.question_id or 0) % LLAVA_OFFSET: a for a in answers}
        lost = [q.question_id for q in questions if q.question_id not in by_id]
        if lost or len(by_id) != len(answers):
            what = f"no answer to question_id {lost[:5]}" if lost else "some question_id answered twice"
            raise ValueError(f"{split}: {what}; were these answers made with another POPE version?")
        ordered = [by_id[q.question_id] for q in questions]
    for q, a in zip(questions, ordered, strict=True):
        if a.prompt and not same_question(q.text, a.prompt):
            raise ValueError(
                f"{split}, question {q.question_id}: asks {q.text!r}, its answer was given to {a.prompt!r}; "
                "were these answers made with another POPE version, or for another split?"
            )
    return [a.text for a in ordered]


def pope_items(
    questions: Questions, answers: Answers, parser: str = "official", by_order: bool = False
) -> PopeItems:
    """Each question's prediction and whether it is right; arguments and errors as for ``score_pope``."""
    splits = as_splits(questions)
    if not any(splits.values()):
        raise ValueError("no questions to score")
    given = _answers_by_split(splits, answers, by_order)
    questions_asked = [q for rows in splits.values() for q in rows]
    texts = [text for split, rows in splits.items() for text in _paired(split, rows, given[split])]
    rows = list(zip(questions_asked, texts, strict=True))
    predictions = [str(parse(text, parser, q.label)) for q, text in rows]
    return PopeItems(
        ids=[f"{q.split}/{q.question_id}" for q, _ in rows],
        images=[q.image for q, _ in rows],
        splits=[q.split for q, _ in rows],
        labels=[q.label for q, _ in rows],
        predictions=predictions,
        unclear=[parse(text, "vlmeval") == "other" for _, text in rows],
        correct=np.array([p == q.label for p, (q, _) in zip(predictions, rows, strict=True)], dtype=np.int64),
    )


def _figures(items: PopeItems, keep: Sequence[int], parser: str) -> SplitScore:
    seen = Counter((items.labels[i], items.predictions[i]) for i in keep)
    tp, fp = seen["yes", "yes"], seen["no", "yes"]
    tn, fn = seen["no", "no"], seen["yes", "no"]
    if parser == "vlmeval":
        fn += seen["yes", "other"]
    precision = tp / (tp + fp) if tp + fp else 0.0
    recall = tp / (tp + fn) if tp + fn else 0.0
    return SplitScore(
        n=len(keep),
        tp=tp,
        fp=fp,
        tn=tn,
        fn=fn,
        other=seen["yes", "other"] + seen["no", "other"],
        unclear=sum(items.unclear[i] for i in keep),
        accuracy=(tp + tn) / len(keep),
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / (precision + recall) if tp else 0.0,
        yes_ratio=(tp + fp) / len(keep),
    )


def score_pope(
    questions: Questions, answers: Answers, parser: str = "official", by_order: bool = False
) -> PopeScore:
    """Score answers to POPE questions.

    The published code pairs by the order of lines, which mixes up versions of POPE without a word. Here only plain
    strings are paired by order, which a caller gives for exactly these questions; all else is paired by id, and
    where an answer comes with its question, the two must be the same.

    Args:
        questions: of one or several splits, as ``load_pope`` and ``build_pope`` give them.
        answers: ``Answer`` with ids in any order, {question_id: text}, strings in the order of the questions, or
            {split: one of these}. Where an id stands in several splits, answers are given by split; LLaVA's one
            file for three splits (``load_answers``) is known by its ids.
        parser: how an answer becomes yes or no: one of ``PARSERS``, see ``parse``.
        by_order: take ``Answer`` without ids (POPE's own files have none) in their order; each must then have the
            text of its question.

    Raises:
        ValueError: more or fewer answers than questions, answers to other questions, answers without ids, ids that
            do not tell the split, or an unknown parser.
        TypeError: an answer is no string.
    """
    items = pope_items(questions, answers, parser, by_order)
    places: dict[str, list[int]] = {}
    for i, split in enumerate(items.splits):
        places.setdefault(split, []).append(i)
    splits = {split: _figures(items, keep, parser) for split, keep in places.items()}
    pooled = _figures(items, range(len(items.ids)), parser)
    return PopeScore(
        splits=splits,
        pooled=pooled,
        mean_f1=fmean(s.f1 for s in splits.values()),
        mean_accuracy=fmean(s.accuracy for s in splits.values()),
        mean_yes_ratio=fmean(s.yes_ratio for s in splits.values()),
        n=pooled.n,
        unclear=pooled.unclear,
        parser=parser,
        version=pope_version(questions),
    )
