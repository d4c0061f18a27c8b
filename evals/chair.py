"""CHAIR: which objects a caption names that are not in the image.

Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018, arXiv 1809.02156.
References: https://github.com/LisaAnne/Hallucination/tree/6e4d33c4,
https://github.com/Maxlinn/CHAIR-metric-standalone/tree/640c5071 (recall), LALBJ/PAI 9bbd8bd5 (precision, F1).
Nothing here runs a model: captions and ground truth in, figures out.
"""

import contextlib
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from .words import ChairWords, Word, chair_words, merge_pairs, node_words

__all__ = [
    "CaptionRecord",
    "ChairScore",
    "ChairWords",
    "GroundTruth",
    "Mention",
    "chair_objects",
    "chair_words",
    "drop_unfinished_sentence",
    "ground_truth",
    "load_ground_truth",
    "score_chair",
]

_COCO_NAME = re.compile(r"(?:COCO_[a-z]+\d{4}_)?0*(\d+)(?:\.\w+)?")
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]\u201d\u2019]*(?=\s|$)")


# --------------------------------------------------------------------------------------------- ground truth


def image_key(image: str | int) -> str:
    """One name for an image: a COCO id is the same number padded or not, with prefix and ending or not."""
    name = Path(str(image)).name
    match = _COCO_NAME.fullmatch(name)
    return match.group(1) if match else name


class GroundTruth(Mapping[str, frozenset[str]]):
    """The COCO categories that are in each image, looked up by id, by file name, or by padded id.

    Attributes:
        name: which words (and file) it was made with, for the report.
    """

    def __init__(
        self,
        objects: Mapping[Any, Iterable[str]],
        aliases: Mapping[str, str | int] | None = None,
        name: str = "own",
    ) -> None:
        self.name = name
        self._objects = {image_key(image): frozenset(things) for image, things in objects.items()}
        self._aliases = {Path(alias).name: image_key(image) for alias, image in (aliases or {}).items()}

    def _find(self, image: object) -> str:
        return self._aliases.get(Path(str(image)).name, image_key(str(image)))

    def __getitem__(self, image: str | int) -> frozenset[str]:
        return self._objects[self._find(image)]

    def __contains__(self, image: object) -> bool:
        return self._find(image) in self._objects

    def __iter__(self) -> Iterator[str]:
        return iter(self._objects)

    def __len__(self) -> int:
        return len(self._objects)


def load_ground_truth(path: str | Path) -> GroundTruth:
    """Read ground truth from JSON, packed with gzip or not.

    Either {image: [category, ...]}, or {"categories": [...], "objects": {image: [index, ...]}}.

    Raises:
        ValueError: the file has another form, or names no category of COCO.
    """
    path = Path(path)
    raw = path.read_bytes()
    data = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    if not isinstance(data, dict) or not data:
        raise ValueError(f"{path} holds a {type(data).__name__}; expected {{image: [category, ...]}}")
    if "objects" in data and "categories" in data:
        names = data["categories"]
        objects = {image: [names[i] for i in indices] for image, indices in data["objects"].items()}
    else:
        objects = data
    _known_categories({thing for things in objects.values() for thing in things}, str(path))
    return GroundTruth(objects, name=path.name.split(".")[0])


def _known_categories(names: Iterable[str], where: str) -> None:
    unknown = sorted(set(names) - set(node_words().values()))
    if unknown:
        raise ValueError(f"{where}: {len(unknown)} names are none of COCO's 80 categories: {unknown[:8]}")


def _coco(source: str | Path | Mapping[str, Any]) -> Any:
    """A pycocotools index of a file or of a dict in COCO's form."""
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        if isinstance(source, Mapping):
            index = COCO()
            index.dataset = dict(source)
            index.createIndex()
            return index
        return COCO(str(source))


def ground_truth(
    instances: str | Path | Mapping[str, Any],
    captions: str | Path | Mapping[str, Any] | None = None,
    words: str | ChairWords | None = None,
) -> GroundTruth:
    """The objects of each image: its annotated instances (crowds too) and what its reference captions name.

    Args:
        instances: COCO instances, a file or a dict.
        captions: COCO captions of the same images, a file or a dict; None leaves them out.
        words: how the captions' words are reduced, see ``words.chair_words``.

    Raises:
        ValueError: a category that is not one of COCO's 80, or no images.
    """
    reducer = chair_words(words)
    index = _coco(instances)
    names = {i: category["name"] for i, category in index.cats.items()}
    _known_categories(names.values(), "instances")
    objects: dict[Any, set[str]] = {i: set() for i in index.imgs}
    files = {image["file_name"]: i for i, image in index.imgs.items() if "file_name" in image}
    for annotation in index.anns.values():
        objects.setdefault(annotation["image_id"], set()).add(names[annotation["category_id"]])
    if captions is not None:
        for annotation in _coco(captions).anns.values():
            found = objects.setdefault(annotation["image_id"], set())
            found.update(mention.node for mention in chair_objects(annotation["caption"], reducer))
    if not objects:
        raise ValueError("the instances hold no images")
    return GroundTruth(
        objects, files, name=f"coco + {reducer.name}" if captions is not None else "coco instances"
    )


# ------------------------------------------------------------------------------------------------- mentions


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


def _mentions(words: Sequence[Word], merged: Sequence[Word]) -> list[Mention]:
    position = {word.start: i for i, word in reversed(list(enumerate(words)))}
    texts = {word.text for word in merged}
    skipped = {"seat"} if {"toilet", "seat"} <= texts else set()
    return [
        Mention(word.text, node_words()[word.text], position[word.start], word.start, word.end)
        for word in merged
        if word.text in node_words() and word.text not in skipped
    ]


def chair_objects(caption: str, words: str | ChairWords | None = None) -> list[Mention]:
    """The objects that a caption names, in order and with repeats.

    A caption that speaks of a toilet has no "seat" that is a chair. Positions are those of the caption (the
    published ``hallucination_idxs`` shift after such a seat).
    """
    reduced = chair_words(words).reduce(caption)
    return _mentions(reduced, merge_pairs(reduced))


def drop_unfinished_sentence(caption: str) -> str:
    """The caption up to its last full sentence; all of it when it has none, so that nothing becomes empty."""
    ends = [match.end() for match in _SENTENCE_END.finditer(caption)]
    return caption[: ends[-1]] if ends else caption


# --------------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class CaptionRecord:
    """One caption's part of the figures, for paired statistics and for marking its words.

    ``length`` is in tokens after pairs are joined, ``words`` in blank-separated words. ``chair_i`` is the
    share of mentions that are hallucinated, 0.0 when it names nothing.
    """

    image: str
    caption: str
    mentions: list[Mention]
    hallucinated: list[Mention]
    truth: list[str]
    right: list[str]
    chair_i: float
    length: int
    words: int


@dataclass(frozen=True)
class ChairScore:
    """CHAIR figures; shares are fractions of 1, which papers print times 100.

    Attributes:
        chair_s: captions with a hallucinated object / captions (one that names nothing counts as clean).
        chair_i: hallucinated mentions / mentions, over all captions; 0.0 when there are none.
        recall: distinct right objects / objects in the images, summed over captions.
        precision: distinct right objects / distinct named objects, summed over captions (PAI).
        f1: of that precision and recall.
        length: mean tokens per caption after pairs are joined (OPERA prints it times 0.01).
        words_per_caption: mean blank-separated words per caption (the POPE paper's length).
        n: captions. mentions: object mentions in all captions.
        words, truth: names of the word configuration and of the ground truth.
        drop_unfinished: whether unfinished last sentences were cut.
    """

    chair_s: float
    chair_i: float
    recall: float
    precision: float
    f1: float
    length: float
    words_per_caption: float
    n: int
    mentions: int
    words: str
    truth: str
    drop_unfinished: bool
    captions: list[CaptionRecord]

    def to_dict(self, captions: bool = False) -> dict[str, Any]:
        """The figures as plain numbers, for JSON; with ``captions`` also each caption's record."""
        result = asdict(self)
        if not captions:
            del result["captions"]
        return result


def _record(image: str, caption: str, truth: Iterable[str], words: ChairWords) -> CaptionRecord:
    truth = frozenset(truth)
    reduced = words.reduce(caption)
    merged = merge_pairs(reduced)
    mentions = _mentions(reduced, merged)
    wrong = [mention for mention in mentions if mention.node not in truth]
    return CaptionRecord(
        image=str(image),
        caption=caption,
        mentions=mentions,
        hallucinated=wrong,
        truth=sorted(truth),
        right=sorted({mention.node for mention in mentions} & truth),
        chair_i=len(wrong) / len(mentions) if mentions else 0.0,
        length=len(merged),
        words=len(caption.split()),
    )


def _check(captions: Mapping[str, str], truth: Mapping[str, Iterable[str]]) -> None:
    if not captions:
        raise ValueError("no captions to score")
    for image, caption in captions.items():
        if not isinstance(caption, str):
            raise TypeError(
                f"the caption of image {image} is {caption!r}, a {type(caption).__name__}, no string"
            )
    lost = [image for image in captions if image not in truth]
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(captions)} captioned images have no ground truth: {', '.join(map(str, lost[:5]))}; "
            f"the ground truth has {len(truth)} images, such as {next(iter(truth), 'none')}"
        )


def score_chair(
    captions: Mapping[str, str],
    ground_truth: Mapping[str, Iterable[str]],
    words: str | ChairWords | None = None,
    drop_unfinished: bool = False,
) -> ChairScore:
    """Score captions.

    Args:
        captions: image id or file name -> caption.
        ground_truth: the same images -> the COCO categories in them; a ``GroundTruth`` or a dict.
        words: "wordnet", "regard", "pattern" or a ``ChairWords``; None: see ``words.chair_words``.
        drop_unfinished: leave out a last sentence that the token limit cut off, as OPERA does at 64 tokens;
            this lowers CHAIR_S by up to 13 points, so a table has to say it.

    Raises:
        ValueError: no captions, or captions of images without ground truth.
        TypeError: a caption is no string.
    """
    truth = ground_truth if isinstance(ground_truth, GroundTruth) else GroundTruth(ground_truth)
    _check(captions, truth)
    reducer = chair_words(words)
    records = []
    for image, caption in captions.items():
        kept = drop_unfinished_sentence(caption) if drop_unfinished else caption
        records.append(_record(image, kept, truth[image], reducer))
    mentions = sum(len(r.mentions) for r in records)
    right = sum(len(r.right) for r in records)
    present = sum(len(r.truth) for r in records)
    named = sum(len({m.node for m in r.mentions}) for r in records)
    recall = right / present if present else 0.0
    precision = right / named if named else 0.0
    return ChairScore(
        chair_s=sum(bool(r.hallucinated) for r in records) / len(records),
        chair_i=sum(len(r.hallucinated) for r in records) / mentions if mentions else 0.0,
        recall=recall,
        precision=precision,
        f1=2 * precision * recall / (precision + recall) if right else 0.0,
        length=fmean(r.length for r in records),
        words_per_caption=fmean(r.words for r in records),
        n=len(records),
        mentions=mentions,
        words=reducer.name,
        truth=truth.name,
        drop_unfinished=drop_unfinished,
        captions=records,
    )
