r"""VL-SAM's attention flow: where in the image a model looks when it names an object.

Lin, Wang, Tang, "Training-Free Open-Ended Object Detection and Segmentation via Attention as Prompts",
NeurIPS 2024, arXiv 2410.05963. There is no released code; the equations are those of the paper as two
independent notes give them, and what they leave open is marked "ours".

The model generates an answer. One more forward reads prompt and answer (N tokens), with S the probs of layer l:

    W_h  = mean_i max_j S[h, i, j]            head weights, over all rows i
    S'_l = mean_h(W_h S[h])                   not normalised
    F_l  = (I + S'_l)(I + F_{l-1}),  F_0 = 0  flow; the start is ours
    S'_l[:, j] *= 1 - (L0 - 1) / L            regularisation, L0 rows see column j, L = N: (j + 1) / N

The map of an object is the row of F_L at its token, taken at the image tokens. Only that row is computed:
`v <- v + v S'_l` from the last layer down, in O(layers N^2) for all objects. Queries and keys of all layers are
kept until then, about what a cache of N tokens with all heads takes; of N x N maps one is held at a time.

Which row: the one that READS the token (as its query), not the one that predicts it. Ours:
- a word of several tokens has the mean of their rows;
- the columns are weighted in each layer, not once in the result (the paper can be read either way);
- with padding, each sample has the map that it would have alone;
- "L0 rows see column j" is counted causally also where image tokens see each other (Gemma 3, PaliGemma);
- images in tiles (LLaVA-NeXT, OneVision): the map covers the first tile, which is the whole image;
- the paper lists objects with a tagger's parser; here the caller names the words.

Points and masks are in `vlsam_points`. Two thirds of the paper's score are four corner crops and ten questions
(its ablation: 14.1, 27.3, 40.1 mAR): run those as inputs of their own and pool the masks with `suppressed`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks.anatomy import Anatomy, anatomy, base_of
from ..hooks.edits import HeadGain
from ..hooks.errors import CannotEdit, NoObjectWords
from ..hooks.generating import GREEDY
from ..hooks.run import Run
from ..hooks.session import Call
from ..kernels.maps import attention_flow, head_weights, layer_map
from .spoken import check_answer, mention_of, spans
from .vlsam_grid import Patch, image_patches
from .vlsam_points import ObjectMask, Points, masks, points, seen_box, suppressed

__all__ = [
    "ObjectMap",
    "ObjectMaps",
    "ObjectMask",
    "Points",
    "masks",
    "object_maps",
    "points",
    "seen_box",
    "suppressed",
]


@dataclass(frozen=True)
class ObjectMap:
    """One mention of an object.

    Attributes:
        word: as it was asked for, or the token's text.
        sample: row of the batch.
        tokens: its positions in prompt and output together (padding on the left counts).
        maps: one (h, w) map for each image of the sample, rows from the top; fp32, fp64 for an fp64 model. An image
            after the word has a map of zeros.
        row: the whole row of the flow, (N,), over prompt and output.
    """

    word: str
    sample: int
    tokens: tuple[int, ...]
    maps: tuple[Tensor, ...]
    row: Tensor


@dataclass(frozen=True)
class ObjectMaps:
    """Maps of all mentions, in the order of samples and tokens, and the output tokens (B, T) that were read."""

    objects: tuple[ObjectMap, ...]
    output: Tensor


@dataclass
class _Read:
    """What one layer was seen to do."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    causal: bool
    scale: float


@torch.no_grad()
def object_maps(
    model: nn.Module,
    inputs: Mapping[str, Any],
    words: Sequence[str] | None = None,
    *,
    positions: Sequence[Sequence[int]] | None = None,
    processor: Any = None,
    max_new_tokens: int = 0,
    output: Tensor | None = None,
    regularise: bool = True,
    head_weights: bool = True,
    grid: tuple[int, int] | None = None,
) -> ObjectMaps:
    """Maps over the image for the objects that a model names.

    Words are looked for in the output where there is one, else in the prompt behind its first image; whole words in
    any case, also with s or es. Every mention has its own map. Edits that are on the model act, but changes of
    probs after the softmax and of the newest row alone are not in the maps.

    Args:
        model: a plain model.
        inputs: what the processor made, with input_ids and the image; a batch may be padded on the left.
        words: object words.
        positions: instead of words, the token positions of each object in prompt and output, negative ones from the
            end; of one sample only.
        processor: the model's processor or tokenizer, to find words.
        max_new_tokens: generate so many tokens greedily; 0 generates nothing.
        output: instead, tokens (B, T) that were generated before, without the prompt.
        regularise: weight columns by (j + 1) / N; without it the flow collapses onto the first tokens.
        head_weights: weight heads by how sharply they look; False is their plain mean.
        grid: (h, w) of the image tokens where it cannot be found out; for images of one size.

    Raises:
        NoObjectWords: none of the words is in the text.
        NoImageTokens: no prompt has an image.
        CannotEdit: image tokens that are not a grid of places (Q-Former, cross-attention), or no tokenizer.
        ValueError: both or neither of words and positions, both of output and max_new_tokens, wrong positions.
    """
    model = base_of(model)
    parts = anatomy(model)
    tokenizer = getattr(processor, "tokenizer", processor)
    _check(inputs, words, positions, tokenizer, max_new_tokens, output)
    patches = image_patches(model, parts, inputs, grid)
    reads: list[_Read] = []

    def note(call: Call) -> None:
        reads.append(_Read(call.query, call.key, call.mask, call.causal, call.scale))

    run = Run(model, [HeadGain(parts.self_layers, note, hold=False)])
    with run:
        prompt = inputs["input_ids"]
        if output is None:
            output = _generated(model, inputs, max_new_tokens, run)
        whole, real = _whole(model, inputs, output.to(prompt.device))
        if words is None:
            found = _given(positions or (), whole["input_ids"], tokenizer)
        else:
            found = _mentions(whole["input_ids"], real, prompt.shape[1], parts, words, tokenizer)
        model(**whole)
    starts = _starts(found, real, reads[0].query.dtype)
    rows = _flow(reads, starts, real, regularise, head_weights)
    return ObjectMaps(tuple(_cut(found, rows, patches)), output)


@dataclass(frozen=True)
class _Mention:
    word: str
    sample: int
    tokens: tuple[int, ...]


def _check(
    inputs: Mapping[str, Any],
    words: Sequence[str] | None,
    positions: Sequence[Sequence[int]] | None,
    tokenizer: Any,
    max_new_tokens: int,
    output: Tensor | None,
) -> None:
    """Raise what can be raised before the model runs."""
    ids = inputs.get("input_ids")
    if ids is None:
        raise CannotEdit(
            "the prompt came without input_ids, so its image tokens cannot be found: pass input_ids"
        )
    if "position_ids" in inputs:
        raise CannotEdit(
            "position_ids are made for the prompt alone, and maps read the output too: leave them out"
        )
    if (words is None) == (positions is None):
        raise ValueError("give either words or positions of tokens, to say which objects to map")
    if isinstance(words, str):
        raise ValueError(f"words is a list of words, got the text {words!r}: give [{words!r}]")
    if words is not None and not any(word.strip() for word in words):
        raise NoObjectWords("no object words were given, so there is nothing to map: pass a list of words")
    if words is not None and not callable(getattr(tokenizer, "decode", None)):
        raise CannotEdit(
            f"to find words the model's processor or tokenizer is needed, got {type(tokenizer).__name__}: "
            "pass processor=, or positions= of tokens"
        )
    check_answer(max_new_tokens, output)
    if output is not None and (output.ndim != 2 or len(output) != len(ids)):
        raise ValueError(f"output must be (B, T) with B = {len(ids)}, not {tuple(output.shape)}")
    if positions is not None and len(ids) != 1:
        raise ValueError(
            f"positions are those of one sample, but the batch has {len(ids)}: pass one at a time"
        )


def _generated(model: nn.Module, inputs: Mapping[str, Any], count: int, run: Run) -> Tensor:
    """Greedy output (B, T), read by nobody."""
    prompt = inputs["input_ids"]
    if not count:
        return prompt[:, :0]
    with run.off():
        ids: Tensor = model.generate(**inputs, max_new_tokens=count, **GREEDY)  # type: ignore[operator]
    return ids[:, prompt.shape[1] :]


def _whole(model: nn.Module, inputs: Mapping[str, Any], output: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The model's arguments for prompt and output, and which tokens are real, (B, N) bool."""
    prompt = inputs["input_ids"]
    config: Any = model.generation_config
    ends = torch.tensor(config.eos_token_id if config.eos_token_id is not None else [], device=output.device)
    ended = torch.isin(output, ends).long()
    said = ended.cumsum(1) - ended == 0  # the end token itself was said
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(prompt) if mask is None else mask
    whole = dict(inputs) | {"input_ids": torch.cat([prompt, output], 1)}
    whole["attention_mask"] = torch.cat([mask, said.to(mask)], 1)
    # PaliGemma: 1 is the answer, which is causal; without types all would be prompt
    causal = int(getattr(model.config, "model_type", "") == "paligemma")
    if causal and "token_type_ids" not in inputs:
        whole["token_type_ids"] = torch.zeros_like(prompt)
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in whole:
            whole[key] = torch.cat([whole[key], torch.full_like(output, causal)], 1)
    whole["use_cache"] = False
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        whole["logits_to_keep"] = 1
    return whole, whole["attention_mask"].bool()


def _mentions(
    ids: Tensor, real: Tensor, prompt: int, parts: Anatomy, words: Sequence[str], tokenizer: Any
) -> list[_Mention]:
    """Every mention of every word in the output, or in the prompt where there is no output."""
    assert parts.image_token is not None  # or `image_patches` had raised
    image = ids == parts.image_token
    spoken = ids.shape[1] > prompt
    searched = torch.arange(ids.shape[1], device=ids.device) >= prompt if spoken else image.cumsum(1) > 0
    searched = searched & real & ~image
    found, texts = [], []
    for sample, row in enumerate(searched):
        places = row.nonzero()[:, 0].tolist()
        text, ends = spans(ids[sample, places].tolist(), tokenizer)
        texts.append(text)
        for word in dict.fromkeys(word.strip() for word in words if word.strip()):
            for hit in mention_of(word).finditer(text):
                pieces = [
                    place
                    for place, (start, end) in zip(places, ends, strict=True)
                    if max(start, hit.start()) < min(end, hit.end())
                ]
                found.append(_Mention(word, sample, tuple(pieces)))
    if not found:
        where = "output" if spoken else "prompt behind its image"
        raise NoObjectWords(
            f"none of the words {', '.join(map(repr, words[:4]))}{' ...' if len(words) > 4 else ''} is in the "
            f"{where}, which reads {texts[0][:80]!r}: ask for words that are in it"
            + ("" if spoken else ", or have an answer generated with max_new_tokens")
        )
    return sorted(found, key=lambda mention: (mention.sample, mention.tokens))


def _given(positions: Sequence[Sequence[int]], ids: Tensor, tokenizer: Any) -> list[_Mention]:
    """The objects at given positions of the only sample."""
    count = ids.shape[1]
    if not positions:
        raise NoObjectWords("no positions of object tokens were given, so there is nothing to map")
    found = []
    for pieces in positions:
        if not len(pieces) or not all(-count <= place < count for place in pieces):
            raise ValueError(
                f"positions of an object are token positions from {-count} to {count - 1} of prompt and output, at "
                f"least one, got {list(pieces)}"
            )
        places = tuple(place % count for place in pieces)
        found.append(_Mention(tokenizer.decode(ids[0, list(places)]).strip() if tokenizer else "", 0, places))
    return found


def _starts(found: Sequence[_Mention], real: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T, N): row t of a sample is the mean over the tokens of its t-th mention; zero where it has fewer."""
    counts = [sum(mention.sample == sample for mention in found) for sample in range(len(real))]
    wide = torch.promote_types(dtype, torch.float32)
    start = torch.zeros(len(real), max(counts), real.shape[1], dtype=wide, device=real.device)
    next_row = [0] * len(real)
    for mention in found:
        start[mention.sample, next_row[mention.sample], list(mention.tokens)] = 1 / len(mention.tokens)
        next_row[mention.sample] += 1
    return start


def _flow(reads: list[_Read], start: Tensor, real: Tensor, regularise: bool, weigh: bool) -> Tensor:
    """(B, T, N) rows of the flow. Empties `reads` on its way."""
    padded = not bool(real.all())

    def layers() -> Iterator[Any]:
        while reads:
            yield partial(_layer, reads.pop(), real if padded else None, weigh, start.device)

    return attention_flow(layers(), start, regularise=regularise, real=real if regularise else None)


def _layer(read: _Read, real: Tensor | None, weigh: bool, device: torch.device) -> Tensor:
    """S' of one layer, (B, N, N)."""
    mask, causal = read.mask, read.causal
    if real is not None:  # rows of padding on the right see the text, but are no rows of the sample
        rows = real[:, None, :, None].to(read.query.device)
        if mask is None:
            mask = rows.expand(-1, -1, -1, real.shape[1])
        else:
            mask = mask & rows if mask.dtype == torch.bool else mask.masked_fill(~rows, -torch.inf)
    how: dict[str, Any] = {"scale": read.scale, "causal": causal, "mask": mask}
    weights = head_weights(read.query, read.key, **how) if weigh else None
    return layer_map(read.query, read.key, weights, **how).to(device)


def _cut(found: Sequence[_Mention], rows: Tensor, patches: Sequence[Sequence[Patch]]) -> Iterator[ObjectMap]:
    """The mentions with their maps."""
    next_row = [0] * len(rows)
    for mention in found:
        row = rows[mention.sample, next_row[mention.sample]]
        next_row[mention.sample] += 1
        maps = tuple(row[patch.tokens].reshape(patch.grid) for patch in patches[mention.sample])
        yield ObjectMap(mention.word, mention.sample, mention.tokens, maps, row)
