"""CHAIR as a benchmark of a run; the published rules are in `scoring.py` and `words.py`."""

from collections.abc import Mapping
from typing import Any

from ..benchmark import Benchmark, Data, Item, Request, Tally, View
from ..run_folder import Record
from ..scores import Score, chair_counts, chair_scores
from ..sources import sample
from .coco import objects_by_image, settle_words
from .scoring import CaptionRecord, caption_record


class Chair(Benchmark):
    """Which objects does a description name that are not there?"""

    name = "chair"
    title = "CHAIR"
    units = "captions"
    prompt = "Please describe this image in detail."
    max_new_tokens = 512  # the published setting for whole descriptions
    became = ("became clean", "ceased to be clean")
    headline = ("chair_s", "chair_i")
    verdicts = ("clean", "not clean")
    tradeoff = (("recall", "chair_i"), ("length", "chair_i"))

    def load(self, request: Request) -> Data:
        """Image -> its objects."""
        return sample(objects_by_image(request), request.items, f"{request.seed}/chair")

    def settle(self, scoring: Mapping[str, Any]) -> dict[str, Any]:
        """Which words read captions and made the ground truth, and whether unfinished sentences count."""
        return {**settle_words(scoring), "drop_unfinished": bool(scoring.get("drop_unfinished"))}

    def items(self, data: Data) -> list[Item]:
        """One item an image."""
        return [Item(image, image) for image in data]

    def scores(self, data: Data) -> list[Score]:
        """CHAIR_S and CHAIR_I, with recall and length beside them."""
        return chair_scores()

    def plotted(self, data: Data) -> list[str]:
        """Hallucination, and what it may have cost."""
        return ["chair_s", "chair_i", "recall", "f1"]

    def tally(self, record: Record, data: Data, scoring: Mapping[str, Any]) -> Tally:
        """The counts of one caption."""
        counts = caption_counts(_scored(record, data, scoring))
        return Tally(chair_counts([counts])[0], not counts["hallucinated_captions"])

    def view(self, record: Record, data: Data, scoring: Mapping[str, Any]) -> View:
        """Its objects, marked."""
        scored = _scored(record, data, scoring)
        truth = set(scored.truth)
        marks = [(m.start, m.end, m.node in truth, m.node) for m in scored.mentions]
        return View(not scored.hallucinated, ", ".join(scored.truth), marks)

    def reading(self, scoring: Mapping[str, Any]) -> str:
        """Which words."""
        return (
            "CHAIR_S is the share of captions that name an object that is not there, CHAIR_I the share of such "
            f"mentions. {_words(scoring)} A recipe that makes captions shorter lowers both, so recall and length stand "
            "beside them."
        )


def _words(scoring: Mapping[str, Any]) -> str:
    """Which configuration, in words."""
    truth = scoring.get("truth_words", scoring["words"])
    named = f"Configuration: {scoring['chair']}. " if "chair" in scoring else ""
    cut = " A last sentence that the token limit cut off is left out." if scoring["drop_unfinished"] else ""
    return f"{named}Words: {scoring['words']}, those of the ground truth: {truth}.{cut}"


def _scored(record: Record, data: Data, scoring: Mapping[str, Any]) -> CaptionRecord:
    image = record["image"]
    return caption_record(image, record["answer"], data[image], scoring["words"], scoring["drop_unfinished"])


def caption_counts(record: CaptionRecord) -> dict[str, int]:
    """One caption's part of the sums, by column."""
    words = record.caption.lower().split()
    runs = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return {
        "captions": 1,
        "hallucinated_captions": int(bool(record.hallucinated)),
        "mentions": len(record.mentions),
        "hallucinated_mentions": len(record.hallucinated),
        "right_objects": len(record.right),
        "named_objects": len({m.node for m in record.mentions}),
        "true_objects": len(record.truth),
        "length": record.words,
        "runs": len(runs),
        "repeated_runs": len(runs) - len(set(runs)),
    }
