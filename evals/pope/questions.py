"""POPE's questions: the published files and their versions, and the rules that make new ones.

Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023, arXiv 2305.10355.
Reference: https://github.com/AoiDragon/POPE/tree/08d957b9 (its files: output/coco, last changed in 109985c).
"""

import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

from ..answers import read_rows

SPLITS = ("random", "popular", "adversarial")

# Papers that say "POPE" ran different rows, so a run must be able to name the ones that it asked. Key: the
# first 16 hex digits of the SHA-256 over the lines "image|text|label" of one split, so that the file's layout
# does not matter.
VERSIONS: dict[str, tuple[str, ...]] = {
    "6d2867129c613c71": ("e3e3926",),  # random, 2910 rows: LLaVA, OPERA
    "ba211e6846f89cd3": ("e3e3926",),
    "199a62e9b62ad48e": ("e3e3926",),
    "7d441e9ecd8247e7": ("edebdda", "head_109985c"),
    "ecefae97a76f8e56": ("edebdda", "head_109985c"),
    "a1ef7cd19fb16df8": ("edebdda",),  # adversarial, with the "imange" typo: VCD, AGLA, DAMRO
    "f8cf51e87e475414": ("head_109985c",),
    "8acc00934e3795a4": ("orig_7ef3026",),  # 500 other images: the POPE paper
    "028457036c8548df": ("orig_7ef3026",),
    "91e36a55e0d492f0": ("orig_7ef3026",),
    "c8f499b3272846bd": ("aokvqa_seem",),
    "bb467d4cd459aadb": ("aokvqa_seem",),
    "57d37988fdabfb34": ("aokvqa_seem",),
    "7ad68e4bbd7915b4": ("gqa_seem",),
    "9820eedda0a2942a": ("gqa_seem",),
    "4c442d3c337d827a": ("gqa_seem",),
}

_OBJECT = re.compile(r"\s*is there an? (.+?) in the im(?:a|an)ge\b", re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """One POPE question.

    Attributes:
        question_id: number within the split (the official files count from 1 in every split).
        image: file name of the image, as in the file.
        text: the question, without the suffix that a harness may add.
        label: "yes" when the object is in the image, else "no".
        split: "random", "popular" or "adversarial" (an unknown file: its stem).
        object: the object asked for; None when the text has another form.
    """

    question_id: int
    image: str
    text: str
    label: str
    split: str
    object: str | None = None


Questions: TypeAlias = Mapping[str, Sequence[Question]] | Sequence[Question]


def as_splits(questions: Questions) -> dict[str, list[Question]]:
    """Questions grouped by split, whichever way they were given."""
    if isinstance(questions, Mapping):
        return {split: list(rows) for split, rows in questions.items()}
    splits: dict[str, list[Question]] = {}
    for question in questions:
        splits.setdefault(question.split, []).append(question)
    return splits


@lru_cache(maxsize=2**15)
def question_key(text: str) -> str:
    """A question up to its last question mark, without case, extra blanks, and the typo "imange"."""
    words = " ".join(text.lower().replace("imange", "image").split())
    return words[: words.rfind("?") + 1] or words


def same_question(asked: str, prompt: str) -> bool:
    """Whether a prompt puts this question: its words, or, for POPE's form, its object in other words around it."""
    if question_key(asked) in question_key(prompt):
        return True
    wanted, given = _OBJECT.search(asked), _OBJECT.search(prompt)
    if wanted is None:
        return False
    thing = wanted.group(1).lower()
    if given is not None:
        return given.group(1).lower() == thing
    return re.search(rf"\b{re.escape(thing)}\b", prompt.lower()) is not None


# ---------------------------------------------------------------------------------------------------- files


def split_of(path: Path) -> str:
    """The split that a file name tells, or else the whole name."""
    return next((split for split in SPLITS if split in path.stem.lower()), path.stem)


def _load_split(path: Path) -> list[Question]:
    split = split_of(path)
    questions = []
    for number, row in enumerate(read_rows(path), start=1):
        missing = [key for key in ("image", "text", "label") if key not in row]
        if missing:
            raise ValueError(f"{path}, row {number}: no {', '.join(missing)}; this is no POPE question file")
        label = str(row["label"]).strip().lower()
        if label not in ("yes", "no"):
            raise ValueError(f"{path}, row {number}: label {row['label']!r}, expected 'yes' or 'no'")
        text = str(row["text"])
        found = _OBJECT.match(text)
        question_id = int(row.get("question_id", number))
        thing = found.group(1) if found else None
        questions.append(Question(question_id, str(row["image"]), text, label, split, thing))
    return questions


def load_pope(path: str | Path) -> dict[str, list[Question]]:
    """Read one POPE file, or all splits that lie in one folder. Use ``pope_version`` to name what was read.

    Takes JSON lines (COCO) and JSON arrays (the A-OKVQA and GQA files). The split is read from the file name.

    Raises:
        FileNotFoundError: no such path, or no file named ``*pope*`` with a split's name in the folder.
        ValueError: a row is no POPE question, or two files in the folder claim the same split.
    """
    path = Path(path)
    if path.is_file():
        return {split_of(path): _load_split(path)}
    if not path.is_dir():
        raise FileNotFoundError(f"no POPE file or folder at {path}")
    files = [f for f in sorted(path.glob("*pope*.json*")) if f.is_file() and split_of(f) in SPLITS]
    if not files:
        inside = ", ".join(sorted(f.name for f in path.iterdir())[:8])
        raise FileNotFoundError(
            f"no file like coco_pope_random.json in {path}; it holds: {inside or 'nothing'}"
        )
    by_split: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        by_split[split_of(file)].append(file)
    for split, same in by_split.items():
        if len(same) > 1:
            names = ", ".join(f.name for f in same)
            raise ValueError(
                f"{path} holds {len(same)} files for split {split}: {names}; give a folder with one each"
            )
    return {split: _load_split(by_split[split][0]) for split in SPLITS if split in by_split}


def split_digest(rows: Sequence[Question]) -> str:
    """16 hex digits that stand for the rows of one split, whatever the layout of their file."""
    lines = "\n".join(f"{q.image}|{q.text}|{q.label}" for q in rows)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def pope_version(questions: Questions) -> str:
    """The name of the published version, found by the rows: "e3e3926", "edebdda", "head_109985c", ...

    Two versions share their random and popular rows, so a file alone may be "edebdda or head_109985c". Splits
    taken from several versions (SID, ANTRP) give "random: ..., popular: ..."; rows that are in no published
    file give "own".
    """
    names: dict[str, tuple[str, ...]] = {}
    for split, rows in as_splits(questions).items():
        names[split] = VERSIONS.get(split_digest(rows), ("own",))
    common = set.intersection(*(set(v) for v in names.values())) if names else {"own"}
    if common:
        return " or ".join(sorted(common))
    return ", ".join(f"{split}: {' or '.join(versions)}" for split, versions in names.items())


# --------------------------------------------------------------------------------------------- construction


def _ask(thing: str) -> str:
    return f"Is there {'an' if thing[0].lower() in 'aeiou' else 'a'} {thing} in the image?"


def _chosen_images(
    objects_per_image: Mapping[str, Sequence[str]], images: int | None, rng: random.Random, per_image: int
) -> dict[str, list[str]]:
    """Images with enough objects, sampled as asked, each with its distinct objects in order."""
    if per_image < 1 or (images is not None and images < 1):
        raise ValueError(f"images={images} and per_image={per_image} must be at least 1")
    usable = {name: list(dict.fromkeys(objects)) for name, objects in objects_per_image.items()}
    usable = {name: objects for name, objects in usable.items() if len(objects) >= per_image}
    if images is None and usable:
        return usable
    if not usable or (images or 0) > len(usable):
        raise ValueError(
            f"asked for {images if images is not None else 'all'} images with at least {per_image} objects, "
            f"but only {len(usable)} of {len(objects_per_image)} have as many; lower images or per_image"
        )
    return {name: usable[name] for name in rng.sample(list(usable), images or 0)}


def _ask_split(
    split: str,
    chosen: Mapping[str, Sequence[str]],
    vocabulary: Sequence[str],
    ranked: Callable[[str], Sequence[str]],
    rng: random.Random,
    per_image: int,
) -> list[Question]:
    """Questions of one split: after each positive the first free object of its ranking, else a draw."""
    rows: list[Question] = []
    for image, objects in chosen.items():
        taken = set(objects)
        for positive in objects[:per_image]:
            free = [thing for thing in vocabulary if thing not in taken]
            if not free:
                raise ValueError(
                    f"image {image} has {len(objects)} of the {len(vocabulary)} objects in use: too few are "
                    f"left to ask for as absent; lower per_image ({per_image}) or leave this image out"
                )
            first = next((thing for thing in ranked(positive) if thing not in taken), None)
            negative = rng.choice(free) if first is None else first
            taken.add(negative)
            for thing, label in ((positive, "yes"), (negative, "no")):
                rows.append(Question(len(rows) + 1, image, _ask(thing), label, split, thing))
    return rows


def build_pope(
    objects_per_image: Mapping[str, Sequence[str]],
    images: int | None = None,
    seed: int = 0,
    per_image: int = 3,
) -> dict[str, list[Question]]:
    """Make POPE questions by the published rules (POPE ``utils.py``), the same for the same seed.

    The first ``per_image`` objects of an image are asked as positives; after each comes one object that is
    absent and not yet asked for this image: drawn evenly (random), the most frequent in the chosen images
    (popular), or the one that most often goes with that positive (adversarial). Ties go to the object that was
    met first. Unlike the original, "an" does not turn "image" into "imange".

    Args:
        objects_per_image: image name -> object names that are in it, the most important first.
        images: how many images to sample; None takes all, in the given order.
        seed: of the sample of images and of the random negatives.
        per_image: positives per image, and as many negatives.

    Raises:
        ValueError: too few images with ``per_image`` objects, or too few absent objects to ask for.
    """
    chosen = _chosen_images(objects_per_image, images, random.Random(f"{seed}/images"), per_image)
    frequency = Counter(thing for objects in chosen.values() for thing in objects)
    together: dict[str, Counter[str]] = defaultdict(Counter)
    for objects in chosen.values():
        for thing in objects:
            together[thing].update(other for other in objects if other != thing)
    # most_common keeps the order of first meeting among equals, as the original's stable sort does.
    popular = [thing for thing, _ in frequency.most_common()]
    companions = {thing: [other for other, _ in counts.most_common()] for thing, counts in together.items()}
    ranks = {
        "random": lambda positive: (),
        "popular": lambda positive: popular,
        "adversarial": lambda positive: companions[positive],
    }
    return {
        split: _ask_split(
            split, chosen, list(frequency), ranks[split], random.Random(f"{seed}/{split}"), per_image
        )
        for split in SPLITS
    }
