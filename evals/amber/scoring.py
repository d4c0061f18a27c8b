"""AMBER: descriptions and yes/no questions on 1,004 annotated images, scored as published, without a judge model.

Wang et al., "AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation", arXiv 2311.07397.
Reference: https://github.com/junyangwang0410/AMBER/blob/534babf6/inference.py

**Descriptions.** Nouns of the caption that `relation.json` lists are kept, with repeats (see `words.py`).
A kept noun is right when it is an annotated object or stands for one, or is one of nine safe words, which are
counted but never judged (nor do they cover an object). Else a near-synonym of such a word saves it (spaCy vectors,
cosine above 0.8). Then

    CHAIR = wrong nouns / kept nouns             Hal = captions with a wrong noun / captions
    Cover = annotated objects named / annotated  Cog = likely hallucinations named / listed ones

all four over the whole corpus. An object counts as named once; a word that stands for several objects names the
first of those it stands for, before the object of that very name ("tree" names an annotated forest, then a tree).

**Questions.** The positive class is "no": precision = right no / said no, recall = right no / asked with answer no.
An answer that is neither is wrong. The AMBER score is (1 - CHAIR + F1) / 2.

Where we differ:

- Similarity needs spaCy with `en_core_web_lg` and only ever saves nouns (and adds to Cover and Cog). Without it
  the similarity is "exact", and CHAIR and Hal are higher than the reference's: scores of the two are not to be
  compared, so every result names its similarity.
- The script takes only the answers "Yes" and "No" as they stand; its README has the user bring them so. Models
  write "Yes." or "yes, ...", and the paper means the answer: the default reads the first word. "official" is the
  script's.
- The script's sums start at 0.001, its F1 comes from rounded precision and recall and has 0.0001 (existence: 0.001)
  added below the line, and all is rounded to a tenth of a percent. variant="released" does so. It lowers F1 by
  under 0.01 points, that of existence by about 0.05, and moves the others by less than the rounding.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..answers import Reading, read_rows
from ..stats import Array
from .data import ATTRIBUTES, DIMENSIONS, Amber, AmberImage, AmberQuestion, load_amber
from .words import Noun, NounReader, Similarity, noun_reader, similarity_named

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

Variant = Literal["paper", "released"]
AMBER_PARSERS = ("first_word", "official")
CAPTION_COLUMNS = (
    *("captions", "hallucinated", "nouns", "wrong", "covered", "objects"),
    *("likely_named", "likely", "length"),
)
QUESTION_COLUMNS = ("questions", "right", "asked_no", "said_no", "right_no", "said_yes")
SIMILAR = 0.8
_START = 0.001  # where the released script's counters start


# --------------------------------------------------------------------------------------------- one caption


@dataclass(frozen=True)
class AmberCaption:
    """What one caption names.

    Attributes:
        nouns: the kept nouns in order, where they stand.
        wrong: whether each is a hallucination.
        covered: places in the list of annotated objects that are named.
        likely: places in the list of likely hallucinations that are named.
    """

    nouns: list[Noun]
    wrong: list[bool]
    covered: frozenset[int]
    likely: frozenset[int]


def _stand_for(objects: Sequence[str], relation: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Word -> place of the object that it names, in the order in which the reference looks them through."""
    places: dict[str, int] = {}
    for place, name in enumerate(objects):
        for word in relation[name]:
            places.setdefault(word, place)
    for place, name in enumerate(objects):
        places.setdefault(name, place)
    return places


def _similar(noun: str, words: Iterable[str], similarity: Similarity | None) -> str | None:
    """The first word that is like the noun."""
    for word in words:
        if noun == word or (similarity is not None and similarity(noun, word) > SIMILAR):
            return word
    return None


def read_caption(
    caption: str,
    truth: Sequence[str],
    hallu: Sequence[str],
    relation: Mapping[str, Sequence[str]],
    safe_words: Iterable[str],
    reader: NounReader,
    similarity: Similarity | None = None,
) -> AmberCaption:
    """Judge the nouns of one caption.

    Args:
        caption: the description.
        truth: objects of the image, with repeats.
        hallu: likely hallucinations.
        relation: listed word -> words that stand for it.
        safe_words: nouns that are never judged.
        reader: how nouns are found.
        similarity: saves near-synonyms; None saves none.

    Raises:
        KeyError: an object is not in the relation.
    """
    known = frozenset(relation).union(*relation.values())
    right, likely, safe = _stand_for(truth, relation), _stand_for(hallu, relation), set(safe_words)
    nouns = reader(caption, known)
    wrong: list[bool] = []
    covered: set[int] = set()
    named: set[int] = set()
    for noun, _, _ in nouns:
        if noun in safe or noun in right:
            if noun not in safe:
                covered.add(right[noun])
            wrong.append(False)
            continue
        if noun in likely:
            named.add(likely[noun])
        guess = _similar(noun, likely, similarity)  # may be another word, further up the list
        if guess is not None:
            named.add(likely[guess])
        saved = _similar(noun, right, similarity)
        if saved is not None:
            covered.add(right[saved])
        wrong.append(saved is None)
    return AmberCaption(nouns, wrong, frozenset(covered), frozenset(named))


def caption_counts(found: AmberCaption, caption: str, objects: int, likely: int) -> Array:
    """(9,) counts of one caption, in the order of `CAPTION_COLUMNS`; the length is in blank-separated words."""
    wrong = sum(found.wrong)
    row = [1, wrong > 0, len(found.nouns), wrong, len(found.covered), objects, len(found.likely), likely]
    return np.array([*row, len(caption.split())], dtype=np.float64)


# --------------------------------------------------------------------------------------------- one answer


def parse_amber(answer: str, parser: str = "first_word") -> Reading:
    """Read an answer as "yes", "no" or "other".

    Args:
        answer: what the model said.
        parser: "first_word" (in any case, punctuation and marks before it skipped) or "official" (the answer is
            exactly Yes or No).

    Raises:
        ValueError: unknown parser.
    """
    if parser == "official":
        return "yes" if answer == "Yes" else "no" if answer == "No" else "other"
    if parser != "first_word":
        raise ValueError(f"unknown AMBER parser {parser!r}, choose one of {', '.join(AMBER_PARSERS)}")
    word = re.search(r"[^\W\d_]+", answer)
    first = word.group().lower() if word else ""
    return "yes" if first == "yes" else "no" if first == "no" else "other"


def question_counts(dimension: str, label: str, said: Reading) -> Array:
    """(30,) counts of one answer: `QUESTION_COLUMNS` of its dimension, in the order of `DIMENSIONS`."""
    counts = np.zeros((len(DIMENSIONS), len(QUESTION_COLUMNS)))
    right, no = said == label, label == "no"
    counts[DIMENSIONS.index(dimension)] = [1, right, no, said == "no", right and no, said == "yes"]
    return counts.ravel()


# --------------------------------------------------------------------------------------------- whole files


@dataclass(frozen=True)
class CaptionScore:
    """Figures of the descriptions, as fractions of 1; papers print them times 100."""

    chair: float
    cover: float
    hal: float
    cog: float
    n: int
    nouns: int


@dataclass(frozen=True)
class AnswerScore:
    """Figures of a set of questions, as fractions of 1; "no" is the positive class, 0.0 where x / 0 would be."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    n: int
    unclear: int


@dataclass(frozen=True)
class AmberScore:
    """AMBER's figures.

    Attributes:
        generative: of the descriptions; None without any.
        discriminative: "all", "attribute" and each of `DIMENSIONS` that was asked -> its figures.
        amber: the AMBER score, None unless both tasks were answered.
        words, similarity, parser, variant: by which they were made.
    """

    generative: CaptionScore | None
    discriminative: dict[str, AnswerScore]
    amber: float | None
    words: str
    similarity: str
    parser: str
    variant: str

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts and numbers, for JSON."""
        return asdict(self)


def amber_score(chair: float, f1: float) -> float:
    """The AMBER score of two tasks, all three as fractions of 1; F1 is that of all questions."""
    return (1 - chair + f1) / 2


def load_amber_answers(path: str | Path) -> dict[int, str]:
    """Read the reference's answer file: rows {id, response}, as a JSON array or JSON lines.

    Raises:
        ValueError: a row lacks one of the two, or an id comes twice.
    """
    answers: dict[int, str] = {}
    for place, row in enumerate(read_rows(path), start=1):
        if not isinstance(row.get("response"), str) or not str(row.get("id", "")).isdigit():
            raise ValueError(
                f"{path}, row {place}: no number 'id' with a text 'response'; keys are {list(row)}"
            )
        number = int(row["id"])
        if number in answers:
            raise ValueError(f"{path}, row {place}: id {number} is answered twice")
        answers[number] = row["response"]
    return answers


def score_amber(
    answers: Mapping[int, str],
    amber: Amber,
    words: str | NounReader | None = None,
    similarity: str | Similarity | None = None,
    parser: str = "first_word",
    variant: Variant = "paper",
) -> AmberScore:
    """Score answers to AMBER by their ids; what is not answered is not counted, as in the reference.

    Args:
        answers: id -> caption (ids of images) or answer (ids of questions).
        amber: the annotations, see `load_amber`.
        words: how nouns are found, see `words.noun_reader`.
        similarity: a name, see `words.similarity_named`, or a function of two nouns.
        parser: see `parse_amber`.
        variant: "paper", or "released" for the sums and rounding of the reference's script.

    Raises:
        ValueError: no answers, an id that AMBER does not have, or an unknown name.
        TypeError: an answer is no string.
    """
    if variant not in ("paper", "released"):
        raise ValueError(f"unknown variant {variant!r}, choose paper or released")
    images, questions = {i.number: i for i in amber.images}, {q.number: q for q in amber.questions}
    _check(answers, images.keys() | questions.keys())
    reader = noun_reader(words)
    named = ("callable", similarity) if callable(similarity) else similarity_named(similarity)
    captions, asked = np.zeros(len(CAPTION_COLUMNS)), np.zeros(len(DIMENSIONS) * len(QUESTION_COLUMNS))
    for number, answer in answers.items():
        if number in images:
            image = images[number]
            found = read_caption(
                answer, image.truth, image.hallu, amber.relation, amber.safe_words, reader, named[1]
            )
            captions += caption_counts(found, answer, len(image.truth), len(image.hallu))
        else:
            question = questions[number]
            asked += question_counts(question.dimension, question.label, parse_amber(answer, parser))
    generative = _caption_score(captions, variant) if captions[0] else None
    discriminative = _answer_scores(asked.reshape(len(DIMENSIONS), -1), variant)
    whole = discriminative.get("all")
    return AmberScore(
        generative=generative,
        discriminative=discriminative,
        amber=amber_score(generative.chair, whole.f1) if generative and whole else None,
        words=reader.name,
        similarity=named[0],
        parser=parser,
        variant=variant,
    )


def _check(answers: Mapping[int, str], known: Iterable[int]) -> None:
    if not answers:
        raise ValueError("no answers to score")
    lost = sorted(set(answers) - set(known), key=str)
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(answers)} answers have an id that these annotations lack: {lost[:5]}; "
            "the published ids are 1 to 1004 for descriptions and 1005 to 15220 for questions"
        )
    for number, answer in answers.items():
        if not isinstance(answer, str):
            raise TypeError(f"the answer to id {number} is {answer!r}, a {type(answer).__name__}, no string")


def _share(above: float, below: float, variant: str, counters: int = 1) -> float:
    """above / below, or what the script makes of it, with so many counters added up below the line."""
    if variant == "released":
        return round(above / (below + counters * _START) * 100, 1) / 100
    return above / below if below else 0.0


def _caption_score(sums: Array, variant: str) -> CaptionScore:
    row = dict(zip(CAPTION_COLUMNS, sums.tolist(), strict=True))
    hal = _share(row["hallucinated"], row["captions"], variant)
    if variant == "released":
        clean = row["captions"] - row["hallucinated"]
        hal = round(100 - clean / (row["captions"] + _START) * 100, 1) / 100
    return CaptionScore(
        chair=_share(row["wrong"], row["nouns"], variant),
        cover=_share(row["covered"], row["objects"], variant),
        hal=hal,
        cog=_share(row["likely_named"], row["likely"], variant),
        n=int(row["captions"]),
        nouns=int(row["nouns"]),
    )


def _answer_scores(sums: Array, variant: str) -> dict[str, AnswerScore]:
    rows = dict(zip(DIMENSIONS, sums, strict=True))
    attributes = sum((rows[name] for name in ATTRIBUTES), np.zeros(len(QUESTION_COLUMNS)))
    parts = {"all": (sums.sum(axis=0), 1, 0.0001), "existence": (rows["existence"], 1, 0.001)}
    parts["attribute"] = (attributes, len(ATTRIBUTES), 0.0001)
    parts |= {name: (rows[name], 1, 0.0001) for name in (*ATTRIBUTES, "relation")}
    return {name: _answer_score(*part, variant) for name, part in parts.items() if part[0][0]}


def _answer_score(sums: Array, counters: int, added: float, variant: str) -> AnswerScore:
    row = dict(zip(QUESTION_COLUMNS, sums.tolist(), strict=True))
    precision = _share(row["right_no"], row["said_no"], variant, counters)
    recall = _share(row["right_no"], row["asked_no"], variant, counters)
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    if variant == "released":
        f1 = round(2 * precision * recall / (precision + recall + added) * 100, 1) / 100
    return AnswerScore(
        accuracy=_share(row["right"], row["questions"], variant, counters),
        precision=precision,
        recall=recall,
        f1=f1,
        yes_ratio=row["said_yes"] / row["questions"],
        n=int(row["questions"]),
        unclear=int(row["questions"] - row["said_no"] - row["said_yes"]),
    )
