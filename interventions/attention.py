"""Where a model looks while it writes: the attention of the newest row, token by token.

The probs are those that the model really used: after the masks, biases and mass policies of the recipes that are on
it, one row at a time, read beside SDPA. (B, H, Q, K) matrices are never formed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from ..hooks.anatomy import Anatomy, anatomy, base_of
from ..hooks.edits import Edit, HeadGain, Hidden
from ..hooks.errors import CannotEdit
from ..hooks.generating import GREEDY
from ..hooks.masses import newest_probs
from ..hooks.run import Run
from ..hooks.session import Call
from .sinks import known_sinks, sink_strength
from .spoken import check_answer
from .vlsam_grid import Patch, image_patches

SINKS = "sinks of the reader"


@dataclass(frozen=True)
class Attention:
    """Attention of one prompt's newest rows: N = T rows, or 1 where nothing was generated. fp32 (fp64 of fp64).

    Attributes:
        tokens: (T,) generated tokens. Row t of all else is the row that chose token t: for t = 0 the prompt's last.
        layers: L decoder blocks.
        maps: for each image of the prompt (N, L, h, w), probs of its tokens, the mean over the heads.
        groups: G names: prompt, image and answer, with the sinks of text and image apart where the sink dimensions of
            the base model are known or given, else with the first token of the text apart. Image tokens that are no
            places of the whole image (newlines, further tiles) count as image here and are not in `maps`.
        masses: (N, L, H, G) probs summed over each group. Their sum is 1, but for mass that a recipe gives or takes.
        sinks: for each image (L, h, w) bool, the sinks by VAR's definition (arXiv 2503.03321); None where unknown.
    """

    tokens: Tensor
    layers: tuple[int, ...]
    maps: tuple[Tensor, ...]
    groups: tuple[str, ...]
    masses: Tensor
    sinks: tuple[Tensor, ...] | None


@torch.no_grad()
def attention(
    model: nn.Module,
    inputs: Mapping[str, Any],
    max_new_tokens: int = 0,
    *,
    output: Tensor | None = None,
    sink_dims: Sequence[int] | None = None,
    tau: float | None = None,
    grid: tuple[int, int] | None = None,
) -> Attention:
    """Read where each newly chosen token looked. Recipes on the model act, and the reading changes nothing.

        plain = regard.attention(model, inputs, max_new_tokens=40)
        with regard.apply(model, "var"):
            edited = regard.attention(model, inputs, output=plain.tokens)  # the same words

    Args:
        model: a transformers model, plain or with recipes on it.
        inputs: what the processor made of one prompt with its images.
        max_new_tokens: generate so many tokens greedily; 0 reads the last row of the prompt only.
        output: instead, (T,) or (1, T) tokens that the model is made to generate.
        sink_dims: channels by which sinks are told; None takes those known for the base model.
        tau: least |x| / rms(x) of a sink in one of them; None takes the known one.
        grid: (h, w) of the image tokens where it cannot be found out.

    Raises:
        NoImageTokens: the prompt has no image.
        CannotEdit: image tokens that are no grid of places (Q-Former, cross-attention), or a recipe on the model that
            has tokens leave the decoder.
        ValueError: more than one prompt; both of output and max_new_tokens; tau without sink dimensions.
    """
    model = base_of(model)
    parts = anatomy(model)
    forced = _check(inputs, max_new_tokens, output)
    patches = image_patches(model, parts, inputs, grid)[0]
    reader = _Reader(parts, _finder(parts, sink_dims, tau))
    with Run(model, reader.edits()) as run:
        if forced is not None or max_new_tokens:
            count = max_new_tokens if forced is None else len(forced)
            processors = LogitsProcessorList([] if forced is None else [_Forced(inputs, forced)])
            ids = model.generate(  # type: ignore[operator]
                **inputs, max_new_tokens=count, logits_processor=processors, **GREEDY
            )
            tokens = ids[0, inputs["input_ids"].shape[1] :]
        else:
            model(**inputs)
            tokens = inputs["input_ids"][0, :0]
        sinks = torch.stack(list(run.read(SINKS).values()))[:, 0] if reader.finder else None
    return reader.result(inputs, tokens, patches, sinks)


class _Forced(LogitsProcessor):  # type: ignore[misc]
    """Leaves one token to choose from, the next one of a given answer."""

    def __init__(self, inputs: Mapping[str, Any], tokens: Tensor) -> None:
        self._start, self._tokens = inputs["input_ids"].shape[1], tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (1, V)."""
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._tokens[input_ids.shape[1] - self._start]] = 0
        return forced


@dataclass(frozen=True)
class _Finder:
    """What tells a sink: a channel's share of a token's state."""

    dims: tuple[int, ...]
    tau: float

    def __call__(self, hidden: Tensor, session: Any) -> Tensor:
        """(B, S, C) -> (B, S) bool."""
        found = sink_strength(hidden, self.dims) >= self.tau
        return found if session.padding is None else found & ~session.padding.to(found.device)


class _Reader:
    """The rows of all layers as they come; only image tokens and group masses are kept."""

    def __init__(self, parts: Anatomy, finder: _Finder | None) -> None:
        self.layers, self.finder = parts.self_layers, finder
        self._rows: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}
        self._masses: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}
        first = ("text sink", "prompt", "image sink") if finder else ("first token", "prompt")
        self.groups = (*first, "image", "answer")

    def edits(self) -> list[Edit]:
        """A reader of sinks, where there is one, and of rows."""
        rows = HeadGain(self.layers, self.note, hold=False)
        return [Hidden(SINKS, self.layers, self.finder), rows] if self.finder else [rows]

    def note(self, call: Call) -> None:
        """Keep one row of one layer."""
        session = call.session
        if session.plan.exits:
            raise CannotEdit(
                "attention is read by the places of tokens, and a recipe on this model has tokens leave the decoder: "
                "take it off, or read the baseline with run.off()"
            )
        if session.seen + session.rows < session.prompt:
            return  # a chunk of the prompt that ends before its last row
        probs = newest_probs(call)[0]
        keys, total = probs.shape[1], session.seen + session.rows
        probs = torch.nn.functional.pad(probs, (max(0, total - keys), 0))[
            :, :total
        ]  # a sliding window forgets
        self._rows[call.layer].append(probs[:, : session.prompt].mean(0))
        group = self._group(call)
        group = torch.nn.functional.pad(group, (0, total - len(group)), value=len(self.groups) - 1)
        masses = probs.new_zeros(len(probs), len(self.groups))
        self._masses[call.layer].append(masses.index_add_(1, group.to(probs.device), probs))

    def _group(self, call: Call) -> Tensor:
        """The group of each prompt token in this layer, (S,)."""
        session, place = call.session, {name: number for number, name in enumerate(self.groups)}
        image = session.image[0]
        groups = torch.where(image, place["image"], place["prompt"])
        if self.finder:
            sinks = session.hidden[SINKS, call.layer]
            sink = next(reversed(sinks.values()))[0].to(image.device)
            return torch.where(sink, torch.where(image, place["image sink"], place["text sink"]), groups)
        text = ~image if session.padding is None else ~(image | session.padding[0].to(image.device))
        groups[text.long().argmax()] = place["first token"]
        return groups

    def result(
        self, inputs: Mapping[str, Any], tokens: Tensor, patches: Sequence[Patch], sinks: Tensor | None
    ) -> Attention:
        """What was read; sinks (L, S) bool."""
        rows, masses = (
            torch.stack([torch.stack(kept[layer]).cpu() for layer in self.layers], 1)
            for kept in (self._rows, self._masses)
        )
        count = max(1, len(tokens))
        maps, found = [], []
        for patch in patches:
            places = patch.tokens.cpu()
            maps.append(rows[:count, :, places].unflatten(2, patch.grid))
            if sinks is not None:
                found.append(sinks.cpu()[:, places].unflatten(1, patch.grid))
        return Attention(
            tokens.cpu(),
            self.layers,
            tuple(maps),
            self.groups,
            masses[:count],
            tuple(found) if self.finder else None,
        )


def _check(inputs: Mapping[str, Any], max_new_tokens: int, output: Tensor | None) -> Tensor | None:
    """The tokens (T,) that the model is made to generate, or None."""
    ids = inputs.get("input_ids")
    if ids is None:
        raise CannotEdit(
            "the prompt came without input_ids, so its image tokens cannot be found: pass input_ids"
        )
    if len(ids) != 1:
        raise ValueError(
            f"attention is read one prompt at a time, but input_ids has the shape {tuple(ids.shape)}"
        )
    check_answer(max_new_tokens, output)
    if output is None:
        return None
    if output.ndim not in (1, 2) or (output.ndim == 2 and len(output) != 1) or not output.numel():
        raise ValueError(f"output must be (T,) or (1, T) tokens, at least one, not {tuple(output.shape)}")
    return output.flatten().to(ids.device)


def _finder(parts: Anatomy, dims: Sequence[int] | None, tau: float | None) -> _Finder | None:
    known = known_sinks(parts)
    if dims is None and known is None:
        if tau is not None:
            raise ValueError(
                f"tau={tau} needs sink dimensions, and none are known for this model: pass sink_dims= as "
                "regard.sink_dimensions(model, inputs) finds them"
            )
        return None
    chosen = tuple(known.dims if dims is None else dims)  # type: ignore[union-attr]
    wrong = [dim for dim in chosen if not 0 <= dim < parts.hidden]
    if wrong or not chosen:
        raise ValueError(f"sink_dims {list(chosen)} must be channels of the decoder, 0 to {parts.hidden - 1}")
    if tau is None and known is None:
        raise ValueError("sink_dims came without tau: regard.sink_dimensions(model, inputs) finds both")
    return _Finder(chosen, known.tau if tau is None else tau)  # type: ignore[union-attr]
