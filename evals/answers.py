"""Yes/no answers: files of them, and the six ways in the wild to read one.

The harnesses disagree on what "NO", "There isn't a dog." or an empty answer mean, which moves published
figures by points; so each reading is a parser with a name. Sources: POPE evaluate.py (AoiDragon/POPE
08d957b9), OPERA pope_eval.py (shikiw/OPERA 61426efe), VCD experiments/eval/eval_pope.py (DAMO-NLP-SG/VCD
d6568ff8), lmms-eval tasks/pope/utils.py (75571cfe), VLMEvalKit dataset/utils/yorn.py (e8e78f05), MME
eval_tool/calculation.py.
"""

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

Reading: TypeAlias = Literal["yes", "no", "other"]


@dataclass(frozen=True)
class Answer:
    """A model's answer, with the id and the wording of the question where the file has them."""

    text: str
    question_id: int | None = None
    prompt: str | None = None


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines, or of one JSON array.

    Raises:
        ValueError: the file is neither, is empty, or has a row that is no object.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is neither JSON lines nor a JSON array: {error}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds {len(rows)} rows; expected one JSON object per question or answer")
    return rows


def load_answers(path: str | Path) -> list[Answer]:
    """Read answers: LLaVA's JSON lines ({question_id, text}) or POPE's ({question, answer}), which have no ids.

    Raises:
        ValueError: a row has neither "text" nor "answer", or its answer is no string.
    """
    answers = []
    for number, row in enumerate(read_rows(path), start=1):
        text = row.get("text", row.get("answer"))
        if not isinstance(text, str):
            raise ValueError(
                f"{path}, row {number}: no string under 'text' or 'answer'; its keys are {list(row)}"
            )
        given, prompt = row.get("question_id"), row.get("prompt", row.get("question"))
        answers.append(Answer(text, None if given is None else int(given), prompt))
    return answers


def _official(answer: str, _: str | None) -> Reading:
    """POPE and LLaVA: whole words of the first sentence, split at single blanks; all else is yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def _opera(answer: str, _: str | None) -> Reading:
    """OPERA, PAI, HALC: as the official one, but on the whole answer, and with NO and ...n't."""
    words = answer.replace(".", "").replace(",", "").split(" ")
    return "no" if any(w in ("No", "not", "no", "NO") or w.endswith("n't") for w in words) else "yes"


def _vcd(answer: str, label: str | None) -> Reading:
    """VCD, AGLA, DAMRO: looks for the label's own word, so the reading depends on the label."""
    if label not in ("yes", "no"):
        raise ValueError(
            f"parser 'vcd' reads an answer against its label; give label='yes' or 'no', not {label!r}"
        )
    found = label in answer.lower()
    return "yes" if found == (label == "yes") else "no"


def _lmms(answer: str, _: str | None) -> Reading:
    """lmms-eval: exact match."""
    text = answer.lower().strip()
    return "yes" if text == "yes" else "no" if text == "no" else "other"


def _vlmeval(answer: str, _: str | None) -> Reading:
    """VLMEvalKit without its judge: exactly one of the words, punctuation cleaned as for VQA."""
    source = answer.lower()
    text = source.replace("*", "")
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside_blank = f"{mark} " in source or f" {mark}" in source or re.search(r"\d,\d", source)
        text = text.replace(mark, "" if beside_blank else " ")
    words = re.sub(r"\.(?!\d)", "", text).split()
    if ("yes" in words) == ("no" in words):
        return "other"
    return "yes" if "yes" in words else "no"


def _mme(answer: str, _: str | None) -> Reading:
    """MME: the first four characters."""
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


_PARSERS: dict[str, Callable[[str, str | None], Reading]] = {
    "official": _official,
    "opera": _opera,
    "vcd": _vcd,
    "lmms": _lmms,
    "vlmeval": _vlmeval,
    "mme": _mme,
}
PARSERS = tuple(_PARSERS)


def parse(answer: str, parser: str = "official", label: str | None = None) -> Reading:
    """Read an answer as "yes", "no" or "other", the way the named harness does.

    ``official`` and ``opera`` never say "other": what is not a no is a yes, an empty answer too. ``vcd``
    needs the question's ``label``; the rest ignore it.

    Raises:
        ValueError: unknown parser, or ``vcd`` without a label.
    """
    if parser not in _PARSERS:
        near = difflib.get_close_matches(parser, _PARSERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown answer parser {parser!r}, choose one of {', '.join(PARSERS)}{hint}")
    return _PARSERS[parser](answer, label)
