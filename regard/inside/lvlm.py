"""What a vision-language model does with one picture and prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..evals.chair.mentions import chair_objects
from ..evals.chair.words import node_words
from ..evals.generation import make_inputs, make_prompt
from ..evals.provenance import model_name
from ..evals.results import MINIATURE_NOTE
from ..evals.run_folder import EvalError
from ..evals.settings import Setting, fill_matchers, find_sinks, make_settings
from ..hooks.anatomy import anatomy, base_of
from ..hooks.errors import RegardError, UnknownName
from ..interventions import attention, divergence, object_maps, sink_dimensions
from ..interventions.attention import Attention
from ..interventions.sinks import known_sinks
from ..interventions.spoken import Word, by_word, words_of
from ..interventions.vlsam import ObjectMap
from ..interventions.vlsam_points import seen_box
from .board import Board, Overlay, Piece
from .figures import Seen, sections
from .page import Page

PROMPT = "Please describe this image in detail."


def show(
    model: Any,
    processor: Any,
    image: Image.Image,
    prompt: str = PROMPT,
    *,
    recipes: Sequence[Any] | str | None = None,
    objects: Sequence[str] | None = None,
    max_new_tokens: int = 64,
    importance: bool = True,
    progress: Callable[[str], Any] = lambda step: None,
) -> Page:
    """Let a model answer, and show where each word looked, with and without recipes.

    The plain answer is generated greedily. With a recipe the model is made to say the same words, so that each
    word's attention can be compared; what it would say by itself is shown too.

    Args:
        model: a transformers model.
        processor: its processor.
        image: the picture.
        prompt: the question; the processor's chat template is used.
        recipes: as `regard.evaluate` takes them; None takes VAR, where the model's sinks are known or stand out.
        objects: what is in the picture, by COCO's names or CHAIR's synonyms; other objects of the answer are marked.
        max_new_tokens: limit of the answer.
        importance: prune each head of the vision tower once: as many forwards of the tower as it has heads.
        progress: told what is being done.

    Returns:
        The page; `page.write("show.html")` keeps it.

    Raises:
        UnknownName: a recipe, or an object that CHAIR does not know.
        NoImageTokens, CannotEdit: the model's image tokens are no places of the picture.
    """
    there = None if objects is None else {_node(name) for name in objects}
    inputs = make_inputs(model, processor, [make_prompt(processor, prompt)], [image])
    settings = _settings(recipes, model, processor, inputs)
    progress("reading the plain answer")
    sinks = _sinks(model, inputs)
    plain = attention(model, inputs, max_new_tokens, **sinks)
    text, words = words_of(plain.tokens, processor)
    named, wrong = _mentions(text, words, there)
    others, edited = [], {}
    for setting in settings:
        progress(f"reading it with {setting.label}")
        said, found, remark = _with(setting, model, processor, inputs, plain.tokens, sinks)
        others.append((setting.label, _marked(said, there), remark))
        if found is not None:
            edited[setting.label] = found
    progress("comparing heads with and without the image")
    heads = divergence(model, inputs, len(plain.tokens))
    progress("following the attention flow")
    flows = _flows(model, processor, inputs, plain.tokens, words)
    seen = Seen(
        model, processor, image, inputs, text, words, wrong, named, plain, heads, edited, flows
    )  # fmt: skip
    return Page(
        f"{model_name(model)}: {prompt}",
        _facts(seen, prompt, objects),
        _board(seen),
        others,
        sections(seen, importance, progress),
        MINIATURE_NOTE if model_name(model).startswith("miniature") else "",
    )


def _settings(recipes: Any, model: Any, processor: Any, inputs: Any) -> list[Setting]:
    """What the plain model is compared with."""
    settings = make_settings("var" if recipes is None else recipes, model, processor)
    try:
        settings = find_sinks(settings, model, lambda: inputs)
    except EvalError:
        if recipes is not None:
            raise
        settings = []
    return [setting for setting in fill_matchers(settings, model, processor) if not setting.is_baseline]


def _sinks(model: Any, inputs: Any) -> dict[str, Any]:
    """What tells a sink, where nobody has published it and it stands out."""
    base = base_of(model)
    if known_sinks(anatomy(base)) is not None:
        return {}
    found = sink_dimensions(base, inputs)
    return {"sink_dims": found.dims, "tau": found.tau} if found.dims else {}


def _node(name: str) -> str:
    """COCO's category of an object's name."""
    found = chair_objects(name, "regard")
    if not found:
        raise UnknownName("object", name, set(node_words()))
    return found[0].node


def _mentions(text: str, words: Sequence[Word], there: set[str] | None) -> tuple[list[int], list[bool]]:
    """Words that name an object, and for each word whether it names one that is not there."""
    named, wrong = [], [False] * len(words)
    for mention in chair_objects(text, "regard"):
        for number, word in enumerate(words):
            if max(word.start, mention.start) < min(word.end, mention.end):
                named.append(number)
                wrong[number] = there is not None and mention.node not in there
    return named, wrong


def _marked(text: str, there: set[str] | None) -> list[Piece]:
    """A text with the objects marked that are not there."""
    pieces, place = [], 0
    for mention in chair_objects(text, "regard"):
        pieces.append(Piece(text[place : mention.start]))
        missing = there is not None and mention.node not in there
        pieces.append(Piece(text[mention.start : mention.end], wrong=missing))
        place = mention.end
    return [*pieces, Piece(text[place:])]


def _with(
    setting: Setting, model: Any, processor: Any, inputs: Any, tokens: Tensor, sinks: dict[str, Any]
) -> tuple[str, Attention | None, str]:
    """What the model says with a recipe, where it looks when it says the plain words, and why not."""
    try:
        with setting.attach(model):
            ids = model.generate(**inputs, max_new_tokens=len(tokens), do_sample=False)
            said, _ = words_of(ids[0, inputs["input_ids"].shape[1] :], processor)
            return said, attention(model, inputs, output=tokens, **sinks), setting.note
    except RegardError as error:
        return "", None, str(error)


def _flows(model: Any, processor: Any, inputs: Any, tokens: Tensor, words: Sequence[Word]) -> list[ObjectMap]:
    """The flow to each word, read where the model reads the word."""
    start = inputs["input_ids"].shape[1]
    places = [range(start + word.first, start + word.last) for word in words]
    if not places:
        return []
    output = tokens[None].to(model.device)
    return list(object_maps(model, inputs, positions=places, output=output, processor=processor).objects)


def _board(seen: Seen) -> Board:
    """The answer, word by word, over the picture."""
    layers = ("mean of the layers", *(f"layer {layer}" for layer in seen.plain.layers))
    overlays = [
        Overlay(
            "attention" if name is None else f"attention with {name}",
            _by_layer(found, seen.words),
            layers,
            "of the attention",
        )
        for name, found in [(None, seen.plain), *seen.edited.items()]
    ]
    if seen.flows:
        flow = torch.stack([found.maps[0] for found in seen.flows])[:, None]
        overlays.append(
            Overlay("attention flow (VL-SAM)", flow, ("all layers",), "flow", share=False, total=False)
        )
    width, height = seen.picture.size
    left, top, right, bottom = seen_box(seen.processor, width, height)
    box = (left / width, top / height, right / width, bottom / height)
    return Board(seen.picture, _pieces(seen), overlays, box)


def _by_layer(found: Attention, words: Sequence[Word]) -> Tensor:
    """(W, 1 + L, h, w): the mean of the layers, and each of them."""
    maps = by_word(found.maps[0], words)
    return torch.cat([maps.mean(1, keepdim=True), maps], 1)


def _pieces(seen: Seen) -> list[Piece]:
    pieces, place = [], 0
    t_vhd = by_word(seen.divergence.t_vhd, seen.words)
    for row, (word, wrong) in enumerate(zip(seen.words, seen.wrong, strict=True)):
        if word.start > place:
            pieces.append(Piece(seen.text[place : word.start]))
        pieces.append(Piece(word.text, row, wrong, f"T-VHD {float(t_vhd[row]):.3g}"))
        place = word.end
    return pieces


def _facts(seen: Seen, prompt: str, objects: Sequence[str] | None) -> list[tuple[str, str]]:
    ids, name = seen.inputs["input_ids"], type(seen.model).__name__
    facts = [("model", f"{model_name(seen.model)} ({name})"), ("prompt", prompt)]
    facts.append(("tokens", f"{ids.shape[1]} of the prompt, {len(seen.plain.tokens)} generated, greedy"))
    grid = " x ".join(map(str, seen.plain.maps[0].shape[2:]))
    facts.append(
        ("image tokens", f"{grid}, of one picture of {seen.picture.width} x {seen.picture.height} pixels")
    )
    if objects is not None:
        facts.append(("in the picture", ", ".join(objects) or "none of CHAIR's objects"))
    return facts
