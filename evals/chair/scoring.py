"""CHAIR: which objects a caption names that are not in the image.

Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018, arXiv 1809.02156.
References: https://github.com/LisaAnne/Hallucination/tree/6e4d33c4,
https://github.com/Maxlinn/CHAIR-metric-standalone/tree/640c5071 (recall), LALBJ/PAI 9bbd8bd5 (precision, F1).
Nothing here runs a model: captions and ground truth in, figures out.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .mentions import Mention, chair_objects, drop_unfinished_sentence, mentions
from .truth import GroundTruth, ground_truth, image_key, load_ground_truth
from .words import (
    CONFIGURATIONS,
    ChairConfiguration,
    ChairWords,
    chair_configuration,
    chair_words,
    merge_pairs,
)

__all__ = [
    "CONFIGURATIONS",
    "CaptionRecord",
    "ChairConfiguration",
    "ChairScore",
    "ChairSums",
    "ChairWords",
    "GroundTruth",
    "Mention",
    "caption_record",
    "chair_configuration",
    "chair_objects",
    "chair_words",
    "drop_unfinished_sentence",
    "ground_truth",
    "image_key",
    "load_ground_truth",
    "score_chair",
]


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
        captions: each caption's record, unless these were not kept.
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
    captions: list[CaptionRecord] = field(default_factory=list)

    def to_dict(self, captions: bool = False) -> dict[str, Any]:
        """The figures as plain numbers, for JSON; with ``captions`` also each caption's record."""
        result = asdict(self)
        if not captions:
            del result["captions"]
        return result


def caption_record(
    image: str | int,
    caption: str,
    truth: Iterable[str],
    words: str | ChairWords | None = None,
    drop_unfinished: bool = False,
) -> CaptionRecord:
    """Score one caption.

    Args:
        image: how the record names it.
        truth: the COCO categories that are in the image.
        words, drop_unfinished: as in ``score_chair``. With ``drop_unfinished`` the record holds the caption that
            was scored, without what was cut.

    Raises:
        TypeError: the caption is no string.
    """
    _check_text(image, caption)
    truth = frozenset(truth)
    if drop_unfinished:
        caption = drop_unfinished_sentence(caption)
    merged = merge_pairs(chair_words(words).reduce(caption))
    named = mentions(merged)
    wrong = [mention for mention in named if mention.node not in truth]
    return CaptionRecord(
        image=str(image),
        caption=caption,
        mentions=named,
        hallucinated=wrong,
        truth=sorted(truth),
        right=sorted({mention.node for mention in named} & truth),
        chair_i=len(wrong) / len(named) if named else 0.0,
        length=merged.tokens,
        words=len(caption.split()),
    )


@dataclass
class ChairSums:
    """What the figures of many captions are made of, caption by caption; its size does not grow.

    Attributes:
        n: captions. with_wrong: those with a hallucinated mention. mentions, wrong: object mentions, hallucinated
            ones. named, right, present: distinct objects that captions name, of these right ones, and objects in
            the images. tokens: after pairs are joined. words: blank-separated.
    """

    n: int = 0
    with_wrong: int = 0
    mentions: int = 0
    wrong: int = 0
    named: int = 0
    right: int = 0
    present: int = 0
    tokens: int = 0
    words: int = 0

    def add(self, record: CaptionRecord) -> None:
        """Count one more caption."""
        self.n += 1
        self.with_wrong += bool(record.hallucinated)
        self.mentions += len(record.mentions)
        self.wrong += len(record.hallucinated)
        self.named += len({mention.node for mention in record.mentions})
        self.right += len(record.right)
        self.present += len(record.truth)
        self.tokens += record.length
        self.words += record.words

    def score(self, words: str, truth: str, drop_unfinished: bool = False) -> ChairScore:
        """The figures of the captions so far, without their records; arguments as in ``ChairScore``.

        Raises:
            ValueError: there were no captions.
        """
        if not self.n:
            raise ValueError("no captions to score")
        recall = self.right / self.present if self.present else 0.0
        precision = self.right / self.named if self.named else 0.0
        return ChairScore(
            chair_s=self.with_wrong / self.n,
            chair_i=self.wrong / self.mentions if self.mentions else 0.0,
            recall=recall,
            precision=precision,
            f1=2 * precision * recall / (precision + recall) if self.right else 0.0,
            length=self.tokens / self.n,
            words_per_caption=self.words / self.n,
            n=self.n,
            mentions=self.mentions,
            words=words,
            truth=truth,
            drop_unfinished=drop_unfinished,
        )


def _check_text(image: str | int, caption: object) -> None:
    if not isinstance(caption, str):
        raise TypeError(f"the caption of image {image} is {caption!r}, a {type(caption).__name__}, no string")


def _check_images(images: Iterable[str], truth: GroundTruth) -> None:
    images = list(images)
    lost = [image for image in images if image not in truth]
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(images)} captioned images have no ground truth: {', '.join(map(str, lost[:5]))}; "
            f"the ground truth has {len(truth)} images, such as {next(iter(truth), 'none')}"
        )


def score_chair(
    captions: Mapping[str, str] | Iterable[tuple[str, str]],
    ground_truth: Mapping[str, Iterable[str]],
    words: str | ChairWords | None = None,
    drop_unfinished: bool = False,
    keep_captions: bool = True,
) -> ChairScore:
    """Score captions.

    Args:
        captions: image id or file name -> caption; or pairs of these from anywhere, which are read one at a time.
            An image that comes twice counts twice.
        ground_truth: the same images -> the COCO categories in them; a ``GroundTruth`` or a dict.
        words: "wordnet", "regard", "pattern" or a ``ChairWords``; None: see ``words.chair_words``. A published
            configuration is these words and a ground truth made with the right ones: ``chair_configuration``.
        drop_unfinished: leave out a last sentence that the token limit cut off, as OPERA does at 64 tokens;
            this lowers CHAIR_S by up to 13 points, so a table has to say it.
        keep_captions: keep each caption's record. Without them memory does not grow with the captions.

    Raises:
        ValueError: no captions, or captions of images without ground truth.
        TypeError: a caption is no string.
    """
    truth = ground_truth if isinstance(ground_truth, GroundTruth) else GroundTruth(ground_truth)
    reducer = chair_words(words)
    if isinstance(captions, Mapping):
        for image, caption in captions.items():
            _check_text(image, caption)
        _check_images(captions, truth)
        captions = captions.items()
    sums, records = ChairSums(), []
    for image, caption in captions:
        if image not in truth:
            _check_images([image], truth)
        record = caption_record(image, caption, truth[image], reducer, drop_unfinished)
        sums.add(record)
        if keep_captions:
            records.append(record)
    score = sums.score(reducer.name, truth.name, drop_unfinished)
    return replace(score, captions=records)
