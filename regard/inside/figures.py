"""The figures of the page on a vision-language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from .. import plots
from ..interventions import cls_outliers, tower_heads
from ..interventions.attention import Attention
from ..interventions.divergence import Divergence
from ..interventions.spoken import Word, by_word
from ..interventions.vlsam import ObjectMap
from .board import MISSING, Section, section

MOST_FLOWS = 4


@dataclass
class Seen:
    """What was read before the page is made."""

    model: Any
    processor: Any
    picture: Image.Image
    inputs: Any
    text: str
    words: list[Word]
    wrong: list[bool]
    objects: list[int]
    plain: Attention
    divergence: Divergence
    edited: dict[str, Attention]
    flows: list[ObjectMap]


def sections(seen: Seen, importance: bool, progress: Callable[[str], Any]) -> list[Section]:
    """All that is below the board."""
    progress("drawing")
    found = [_heads(seen), *_attention(seen), _flow(seen)]
    progress("reading the vision tower")
    outliers = section(
        "Outliers of the vision tower",
        "Patches to which the vision tower's CLS token attends most (DAMRO).",
        (
            "Attention of the CLS token, outliers outlined",
            lambda: plots.outliers(
                seen.picture, cls_outliers(seen.model, seen.inputs), processor=seen.processor
            ),
        ),
    )
    return [*found, outliers, _tower(seen, importance)]


def _heads(seen: Seen) -> Section:
    wrong = [word.text for word, bad in zip(seen.words, seen.wrong, strict=True) if bad]
    return section(
        "Which heads look at the image",
        "VHD: how far each head's output at the last prompt row moves when the image is taken away. T-VHD: the "
        "same at each generated word, over the heads with the largest distance.",
        ("VHD, layers by heads", lambda: plots.vhd(seen.divergence)),
        (
            "T-VHD along the answer",
            lambda: plots.t_vhd(seen.divergence, seen.processor, hallucinated=wrong),
        ),
    )


def _attention(seen: Seen) -> list[Section]:
    """Shares of groups, and sinks; beside the first recipe."""
    label, edited = next(iter(seen.edited.items()), ("", None))
    names = ("plain", f"with {label}")
    return [
        section(
            "Where the attention goes",
            "The share of the attention of each group of tokens, by layer; the mean over generated words and heads.",
            ("Share of attention by layer", lambda: plots.masses(seen.plain, edited, names=names)),
        ),
        section(
            "Visual attention sinks",
            "Image tokens whose state is very large in a few fixed channels, and the attention over the picture, plain"
            + (f" and with {label}." if label else "."),
            (
                "Sinks on the picture, and attention",
                lambda: plots.sinks(seen.picture, seen.plain, edited, names=names, processor=seen.processor),
            ),
        ),
    ]


def _flow(seen: Seen) -> Section:
    return section(
        "Attention flow",
        "Where in the picture the flow through all layers to a word begins (VL-SAM).",
        *(
            (
                f"Attention flow to {flow.word}",
                lambda flow=flow: plots.flow(seen.picture, flow, processor=seen.processor),
            )
            for flow in _chosen_flows(seen)
        ),
    )


def _tower(seen: Seen, importance: bool) -> Section:
    title, text = "Heads of the vision tower", "How far each head looks, and in what patterns"
    try:
        heads = tower_heads(seen.model, seen.inputs.get("pixel_values"), importance=importance)
    except MISSING as error:
        return Section(title, f"{text}.", missing=str(error))
    figures = [
        ("Attention distance by layer", lambda: plots.distance(heads)),
        (
            "Patterns of attention around a patch",
            lambda: plots.patterns(heads.clusters(min(6, heads.distance.numel()))),
        ),
    ]
    if importance:
        figures.insert(0, ("What pruning each head changes", lambda: plots.importance(heads)))
        text += "; what the tower's output loses when a head is pruned"
    return section(title, f"{text}.", *figures)


def _chosen_flows(seen: Seen) -> list[ObjectMap]:
    """Of the objects that the answer names, each at its first mention; without any, of the words with most T-VHD."""
    if not seen.flows:
        return []
    first = {seen.words[number].text.lower(): number for number in reversed(seen.objects)}
    chosen = sorted(first.values())
    if not chosen:
        chosen = by_word(seen.divergence.t_vhd, seen.words).argsort(descending=True).tolist()
    return [seen.flows[number] for number in chosen[:MOST_FLOWS]]
