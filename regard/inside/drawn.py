"""What a text-to-image pipeline does with one prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import plots
from ..evals.provenance import model_name
from ..evals.results import MINIATURE_NOTE
from ..hooks.errors import NoObjectWords, RegardError
from ..interventions import apply, word_heat, word_masks
from ..interventions.daam import WordHeat
from ..interventions.places import masks_of
from .board import Board, Overlay, Piece, Section, drawing, section
from .page import Page

_SMALL = frozenset("a an and at by for from in of on or the to with".split())


def show_drawn(
    pipe: Any,
    prompt: str,
    *,
    words: Sequence[str] | None = None,
    recipes: Sequence[str] = (),
    steps: int = 25,
    seed: int = 0,
    progress: Callable[[str], Any] = lambda step: None,
) -> Page:
    """Draw a picture, and show where each word of the prompt acted, step by step.

    Args:
        pipe: a diffusers pipeline.
        prompt: what to draw.
        words: the subjects, words or phrases of the prompt; None takes its words but for articles and the like.
        recipes: names of recipes that are told the subjects, such as "astar"; each draws from the same noise.
        steps: denoising steps.
        seed: of the noise.
        progress: told what is being done.

    Raises:
        NoObjectWords: the prompt has no such word.
        CannotEdit: no diffusers pipeline that the engine knows.
    """
    subjects = list(words) if words else list(dict.fromkeys(_content(prompt)))
    if not subjects:
        raise NoObjectWords(
            f"the prompt {prompt!r} has no word to map: give it some, or name them with words"
        )

    def draw() -> WordHeat:
        noise = torch.Generator().manual_seed(seed)
        return word_heat(pipe, prompt, subjects, num_inference_steps=steps, generator=noise)

    progress("drawing plain")
    heat = draw()
    sections = [_maps("Where the words act", heat), _isolated(pipe, prompt, heat, seed, progress)]
    for name in recipes:
        progress(f"drawing with {name}")
        try:
            with apply(pipe, name, concepts=subjects):
                sections.append(_maps(f"With {name}", draw()))
        except (RegardError, TypeError) as error:  # a recipe that is not told concepts
            sections.append(Section(f"With {name}", "", missing=str(error)))
    kind = model_name(pipe)
    facts = [("pipeline", kind), ("prompt", prompt), ("steps", f"{steps}, noise of seed {seed}")]
    note = MINIATURE_NOTE if kind.startswith("miniature") else ""
    return Page(f"{kind}: {prompt}", facts, _board(prompt, heat), (), sections, note)


def _content(prompt: str) -> list[str]:
    return [word for word in re.findall(r"\w[\w'-]*", prompt) if word.lower() not in _SMALL]


def _maps(title: str, heat: WordHeat) -> Section:
    text = "The share of the attention to each word, over the denoising steps and their mean."
    return section(title, text, ("Maps of the words over the steps", lambda: plots.word_maps(heat)))


def _isolated(pipe: Any, prompt: str, heat: WordHeat, seed: int, progress: Callable[[str], Any]) -> Section:
    """The regions that isolation would keep apart."""
    progress("finding the subjects")
    picture, names = heat.images[0], [str(word) for word in heat.words]
    found = section(
        "Isolation masks",
        "Regions of the subjects, which isolation keeps apart: by the attention to the words, and by that joined with "
        "self-attention (AttenCraft).",
        ("By the words", lambda: _regions(picture, masks_of(heat.mean[0]), names)),
    )
    try:
        noise = torch.Generator().manual_seed(seed)
        joined = word_masks(pipe, prompt, names, image=picture, generator=noise)
    except RegardError as error:
        found.missing = str(error)
        return found
    if joined.missing[0]:
        lacking = ", ".join(names[number] for number in joined.missing[0])
        found.text += f" By the second, no cell is clearly of {lacking}."
    if len(joined.missing[0]) < len(names):
        found.drawings.append(
            drawing(_regions(picture, joined.masks[0], names), "By words and self-attention")
        )
    return found


def _regions(picture: Any, masks: Tensor, names: Sequence[str]) -> Any:
    """The figure of the regions that are not empty."""
    found = [number for number, mask in enumerate(masks) if mask.any()]
    return plots.masks(picture, masks[found], [names[number] for number in found])


def _board(prompt: str, heat: WordHeat) -> Board:
    """The prompt over its picture."""
    steps = heat.by_step[0].transpose(0, 1)  # (C, n, h, w)
    maps = torch.cat([steps.mean(1, keepdim=True), steps], 1)
    names = ("mean of the steps", *(f"step {step}" for step in range(steps.shape[1])))
    pieces, place = [], 0
    for start, end, row in _places(prompt, [str(word) for word in heat.words]):
        pieces += [Piece(prompt[place:start]), Piece(prompt[start:end], row)]
        place = end
    pieces.append(Piece(prompt[place:]))
    overlays = [Overlay("attention to the word", maps, names, "of the attention", total=False)]
    return Board(heat.images[0], pieces, overlays, slices="step", heading="Where each word acts")


def _places(prompt: str, words: Sequence[str]) -> list[tuple[int, int, int]]:
    """Where each word first stands in the prompt: (start, end, row), in order; of two that overlap the first."""
    found = []
    for row, word in enumerate(words):
        hit = re.search(rf"(?<!\w){re.escape(word)}", prompt, re.IGNORECASE)
        if hit:
            found.append((hit.start(), hit.end(), row))
    found.sort()
    return [item for number, item in enumerate(found) if not number or item[0] >= found[number - 1][1]]
