"""MME: two yes/no questions on each image, fourteen subtasks, scored as published.

Fu et al., "MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models", arXiv 2306.13394.
Reference: eval_tool/calculation.py, which comes with the benchmark (repository
BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation).

A subtask's score is accuracy x 100 over its questions plus accuracy+ x 100, the share of its images with both
answers right: 200 at most. Perception is the sum of ten subtasks (2000), cognition that of four (800). Existence,
count, position and color are often reported alone as the hallucination subset (800). An answer counts by its first
four characters (parser "mme"), and one that is neither yes nor no is wrong.

Where we differ: answers are paired with questions by image and wording, not by the order of lines. lmms-eval also
drops dots and takes a single letter, LLaVA and lmms-eval ask for "a single word or phrase" in place of "Please
answer yes or no.": such files are paired all the same, with both endings left out of the comparison.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..answers import Reading, parse, read_rows
from ..sources import DataError, files_under

HALLUCINATION = ("existence", "count", "position", "color")
PERCEPTION = (*HALLUCINATION, "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = (*PERCEPTION, *COGNITION)
TOTALS = {"perception": PERCEPTION, "cognition": COGNITION, "hallucination": HALLUCINATION}

_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
_QUESTIONS = "questions_answers_YN"
_ENDINGS = re.compile(
    r"please answer yes or no\.?|answer the question using a single word or phrase\.?", re.IGNORECASE
)
_LAYOUT = (
    "MME's files come from its authors: get MME_Benchmark_release_version by the link, or on request, as the section "
    "on MME in BradyFU/Awesome-Multimodal-Large-Language-Models (GitHub) says, and unpack it into the data folder. "
    "A subtask is a folder of that name with images/* and questions_answers_YN/*.txt, or with images and .txt files "
    "side by side; 0001.txt has the two questions on 0001.jpg, one a line: question, tab, Yes or No"
)


@dataclass(frozen=True)
class MmeQuestion:
    """A question on an image; `image` is its path inside the folder of images, `label` "yes" or "no"."""

    subtask: str
    image: str
    text: str
    label: str


@dataclass(frozen=True)
class MmeAnswer:
    """An answer; `image` ends with its subtask and file name, such as "color/0001.jpg"."""

    image: str
    question: str
    text: str


@dataclass(frozen=True)
class SubtaskScore:
    """One subtask: shares of 1, and their sum times 100, which is MME's score. `unclear` were neither yes nor no."""

    accuracy: float
    accuracy_plus: float
    score: float
    n: int
    images: int
    unclear: int


@dataclass(frozen=True)
class MmeScore:
    """MME's figures; a total is None unless all its subtasks were asked. `yes_ratio` is that of the answers."""

    subtasks: dict[str, SubtaskScore]
    perception: float | None
    cognition: float | None
    hallucination: float | None
    yes_ratio: float
    n: int
    unclear: int
    parser: str

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts and numbers, for JSON."""
        return asdict(self)


# ------------------------------------------------------------------------------------------------ questions


def load_mme(
    folder: str | Path, images: str | Path | None = None, subtasks: Sequence[str] = SUBTASKS
) -> list[MmeQuestion]:
    """Read the questions, in the order of the subtasks and of file names; official layout or flat one.

    Args:
        folder: holds the folders of the subtasks at any depth.
        images: folder of the images, which holds such folders too; None is the same. Images are named by their
            path inside it.
        subtasks: the ones to read.

    Raises:
        DataError: a subtask or an image is missing, a subtask is there twice, or a file is not what it should be.
    """
    root, pictures = Path(folder), Path(images if images is not None else folder)
    for place in (root, pictures):
        if not place.is_dir():
            raise DataError(f"there is no folder {place}. {_LAYOUT}")
    texts = _texts(root, subtasks)
    missing = [subtask for subtask in subtasks if subtask not in texts]
    if missing:
        there = ", ".join(texts) or "no subtask"
        advice = ""
        if set(HALLUCINATION) <= set(texts) and not set(missing) & set(HALLUCINATION):
            advice = "The benchmark mme_hallucination asks only existence, count, position and color. "
        raise DataError(
            f"{root} has no questions of {', '.join(missing)} (found: {there}). {advice}{_LAYOUT}"
        )
    files = _pictures(pictures, subtasks)
    questions, lost = [], []
    for subtask in subtasks:
        for text in texts[subtask]:
            found = files.get((subtask, text.stem), [])
            if len(found) > 1:
                raise DataError(f"{text} has several images: {', '.join(str(file) for file in found[:3])}")
            if not found:
                lost.append(f"{subtask}/{text.stem}")
                continue
            image = found[0].relative_to(pictures).as_posix()
            questions += [MmeQuestion(subtask, image, asked, label) for asked, label in _pair(text)]
    if lost:
        some = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
        raise DataError(f"{len(lost)} images of MME are missing under {pictures} ({some}). {_LAYOUT}")
    return questions


def _texts(root: Path, subtasks: Sequence[str]) -> dict[str, list[Path]]:
    """Subtask -> its question files."""
    found: dict[str, dict[Path, list[Path]]] = defaultdict(dict)
    for file in sorted(file for file in files_under(root) if file.suffix == ".txt"):
        home = file.parent.parent if file.parent.name == _QUESTIONS else file.parent
        name = root.resolve().name if home == root else home.name
        if name in subtasks:
            found[name].setdefault(home, []).append(file)
    for subtask, homes in found.items():
        if len(homes) > 1:
            places = ", ".join(str(home.relative_to(root)) for home in list(homes)[:3])
            raise DataError(
                f"{root} holds {subtask} in {len(homes)} folders ({places}): give the folder of one copy"
            )
    return {subtask: next(iter(found[subtask].values())) for subtask in subtasks if subtask in found}


def _pictures(root: Path, subtasks: Sequence[str]) -> dict[tuple[str, str], list[Path]]:
    """(subtask, file name without its ending) -> images."""
    found: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for file in sorted(files_under(root)):
        if file.suffix.lower() in _IMAGES:
            home = file.parent.parent if file.parent.name == "images" else file.parent
            name = root.resolve().name if home == root else home.name
            if name in subtasks:
                found[name, file.stem].append(file)
    return found


def _pair(file: Path) -> list[tuple[str, str]]:
    """The two questions of a file, with their labels."""
    lines = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    pairs = []
    for line in lines:
        text, _, label = line.rpartition("\t")
        if not text.strip() or label.strip().lower() not in ("yes", "no"):
            raise DataError(f"{file}: {line[:80]!r} is no question, tab, Yes or No. {_LAYOUT}")
        pairs.append((text.strip(), label.strip().lower()))
    if len(pairs) != 2 or _wording(pairs[0][0]) == _wording(pairs[1][0]):
        raise DataError(
            f"{file} has {len(pairs)} lines, and an image of MME has two different questions. {_LAYOUT}"
        )
    return pairs


# -------------------------------------------------------------------------------------------------- answers


def load_mme_answers(path: str | Path) -> list[MmeAnswer]:
    """Read answers: LLaVA's JSON lines, or a folder of result files as the reference scores them.

    Args:
        path: a file with rows {question_id, prompt, text}, whose id is the path of the image; or a folder with
            `<subtask>.txt`, a line of which is image, question, label and answer with tabs between.

    Raises:
        ValueError: a row or line lacks a part, or the folder has no file of a subtask.
    """
    source = Path(path)
    if source.is_dir():
        files = [source / f"{name}.txt" for name in SUBTASKS if (source / f"{name}.txt").is_file()]
        if not files:
            raise ValueError(f"{source} holds no result file of MME, such as existence.txt")
        return [answer for file in files for answer in _result_lines(file)]
    answers = []
    for number, row in enumerate(read_rows(source), start=1):
        parts = [row.get("question_id"), row.get("prompt"), row.get("text")]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(
                f"{source}, row {number}: 'question_id', 'prompt' and 'text' must be strings; its keys are {list(row)}"
            )
        answers.append(MmeAnswer(*map(str, parts)))
    return answers


def _result_lines(file: Path) -> Iterable[MmeAnswer]:
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        parts = line.split("\t")
        if len(parts) == 4:
            yield MmeAnswer(f"{file.stem}/{parts[0]}", parts[1], parts[3])
        elif line.strip():
            raise ValueError(
                f"{file}, line {number}: {len(parts)} parts, not image, question, label and answer"
            )


def _wording(question: str) -> str:
    return " ".join(_ENDINGS.sub(" ", question).split())


def _key(image: str, question: str) -> tuple[str, str, str]:
    """What an answer and its question share: the subtask, the image and the wording."""
    parts = [part for part in Path(image).parts if part != "images"]
    return (parts[-2] if len(parts) > 1 else "", Path(image).stem, _wording(question))


def score_mme(
    questions: Sequence[MmeQuestion], answers: Sequence[MmeAnswer], parser: str = "mme"
) -> MmeScore:
    """Score answers, which are found by their image and the wording of their question, in any order.

    Args:
        questions: two an image, see `load_mme`; of some subtasks or all.
        answers: to all of them, see `load_mme_answers`; answers of other subtasks are left aside.
        parser: one of `answers.PARSERS`.

    Raises:
        ValueError: a question without answer or with several, an answer to another question, an image without its two
            questions, or an unknown parser.
    """
    if not questions:
        raise ValueError("no questions to score")
    texts = _answered(questions, answers)
    rows = []
    for question in questions:
        said = parse(texts[_key_of(question)], parser, question.label)
        rows.append((question, said))
    subtasks = {
        name: _subtask_score([row for row in rows if row[0].subtask == name])
        for name in SUBTASKS
        if any(question.subtask == name for question, _ in rows)
    }
    return MmeScore(
        subtasks=subtasks,
        perception=_total(subtasks, PERCEPTION),
        cognition=_total(subtasks, COGNITION),
        hallucination=_total(subtasks, HALLUCINATION),
        yes_ratio=sum(said == "yes" for _, said in rows) / len(rows),
        n=len(rows),
        unclear=sum(said == "other" for _, said in rows),
        parser=parser,
    )


def _key_of(question: MmeQuestion) -> tuple[str, str, str]:
    return (question.subtask, *_key(question.image, question.text)[1:])


def _answered(
    questions: Sequence[MmeQuestion], answers: Sequence[MmeAnswer]
) -> dict[tuple[str, str, str], str]:
    """Key of each question -> the text of its answer."""
    keys = {_key_of(question) for question in questions}
    asked = {question.subtask for question in questions}
    texts: dict[tuple[str, str, str], str] = {}
    for answer in answers:
        key = _key(answer.image, answer.question)
        if key in texts:
            raise ValueError(f"two answers to {key[2]!r} on {answer.image}")
        if key in keys:
            texts[key] = answer.text
        elif key[0] in asked:
            raise ValueError(
                f"{answer.image} has no question {key[2]!r}: were these answers made with another copy of MME?"
            )
    lost = [key for key in sorted(keys) if key not in texts]
    if lost:
        subtask, image, wording = lost[0]
        raise ValueError(
            f"{len(lost)} of {len(keys)} questions have no answer, such as {wording!r} on {subtask}/{image}"
        )
    return texts


def _subtask_score(rows: Sequence[tuple[MmeQuestion, Reading]]) -> SubtaskScore:
    images: dict[str, list[bool]] = defaultdict(list)
    for question, said in rows:
        images[question.image].append(said == question.label)
    odd = [image for image, right in images.items() if len(right) != 2]
    if odd:
        raise ValueError(
            f"{odd[0]} has {len(images[odd[0]])} questions; accuracy+ needs both questions of an image"
        )
    accuracy = sum(map(sum, images.values())) / len(rows)
    plus = sum(all(right) for right in images.values()) / len(images)
    unclear = sum(said == "other" for _, said in rows)
    return SubtaskScore(accuracy, plus, 100 * (accuracy + plus), len(rows), len(images), unclear)


def _total(subtasks: Mapping[str, SubtaskScore], names: Sequence[str]) -> float | None:
    return sum(subtasks[name].score for name in names) if set(names) <= set(subtasks) else None
