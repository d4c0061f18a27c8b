"""VHR and VAR as plainly as they can be written: one sample, whole sequences, no cache, float64.

Nothing of `regard` is used. VHR is done by hooks on the output projections, VAR by an attention function of
its own that loops over heads and rows. A sequence is the prompt and the tokens that `Force` made generate
take, so one forward gives the logits of the prefill and of every decode step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from families import BOS, FIRST_TEXT, Family, Inputs, _initialise, build
from torch import Tensor
from transformers import AttentionInterface

SINK_DIMS = (5, 41)
FORCED = (19, 84, 33, 60, 61)  # 33 and 60 are planted: a generated token is never a sink
EXACT = {"atol": 1e-5, "rtol": 1e-6}  # transformers' norms round to fp32, the logits of generate too


# ------------------------------------------------------------------------------------------- the models


def model(name: str, layers: int = 5, heads: int = 8, kv_heads: int = 4) -> Family:
    """A family in float64 with more layers and heads, and norms whose weights are far from one."""
    config = copy.deepcopy(build(name).model.config)
    text = config.get_text_config()
    text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = layers, heads, kv_heads
    text.head_dim = text.hidden_size // heads
    if getattr(text, "layer_types", None):
        text.layer_types = ["full_attention"] * layers
    if (text.rope_parameters or {}).get("mrope_section"):
        text.rope_parameters["mrope_section"] = [text.head_dim // 2 - 2, 1, 1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        net = transformers.AutoModelForImageTextToText.from_config(config)
    _initialise(net, 7, False)
    net.generation_config.update(eos_token_id=None, pad_token_id=0, bos_token_id=BOS)
    family = replace(
        build(name), model=net.double().eval(), text_layers=layers, heads=heads, kv_heads=kv_heads
    )
    rng = torch.Generator().manual_seed(3)
    for block in family.decoder.layers:
        block.input_layernorm.weight.data.uniform_(0.4, 1.6, generator=rng)
    return family


def plant_heads(family: Family, kv_head: int = 1, factor: float = 6.0) -> None:
    """Make the heads of one key-value head strong with and without the image: outliers."""
    width = family.attentions[0].head_dim
    for layer in range(0, family.text_layers, 2):
        projection = family.attentions[layer].v_proj
        for part in (projection.weight, projection.bias):
            if part is not None:
                part.data[kv_head * width : (kv_head + 1) * width] *= factor


def plant_sinks(family: Family, strength: float = 7.0) -> None:
    """Massive activations on BOS, on one text id in three, and on the image tokens with a high feature.

    How massive is a matter of degree, so near any threshold the sinks of two layers differ.
    """
    words = family.model.get_input_embeddings().weight.data
    size = torch.arange(len(words)).remainder(5).add(2).double() * strength
    chosen = torch.arange(len(words)).remainder(3).eq(0) & torch.arange(len(words)).ge(FIRST_TEXT)
    chosen[BOS] = True
    words[chosen, SINK_DIMS[0]] = size[chosen]
    inner = family.model.model
    projector = inner.visual.merger if hasattr(inner, "visual") else inner.multi_modal_projector

    def massive(module: Any, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[..., SINK_DIMS[1]] -= strength * 5 * (out[..., 7] - 0.3).relu()
        return out

    projector.register_forward_hook(massive)


def wide(inputs: Inputs) -> Inputs:
    """Float tensors in float64."""
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}


# ----------------------------------------------------------------------------- what regard is to give


class Force(transformers.LogitsProcessor):
    """Let generate take the tokens of FORCED whatever the logits say."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, FORCED[input_ids.shape[1] - self.prompt]] = 0.0
        return forced


@torch.no_grad()
def logits_of(family: Family, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Logits (B, S, V) of the prompt, then (B, T, V) of cached generation that takes FORCED."""
    prompt = inputs["input_ids"].shape[1]
    whole = family.model(**wide(inputs)).logits
    out = family.model.generate(
        **wide(inputs),
        max_new_tokens=len(FORCED),
        do_sample=False,
        logits_processor=[Force(prompt)],
        output_logits=True,
        return_dict_in_generate=True,
    )
    return whole, torch.stack(out.logits, 1)


def assert_equal(
    family: Family, inputs: Inputs, row: int, found: tuple[Tensor, Tensor], want: Tensor
) -> None:
    """Row `row` of what `logits_of` gave is the reference (S + T - 1, V), padding aside."""
    length = int(inputs["attention_mask"][row].sum())
    torch.testing.assert_close(found[0][row, -length:], want[:length], **EXACT)
    torch.testing.assert_close(found[1][row].double(), want[length - 1 :], **EXACT)


# --------------------------------------------------------------------------------------- one sequence


@dataclass
class Sequence_:
    """The prompt of one sample followed by FORCED, but for the last token, whose logits nobody asks for."""

    inputs: Inputs
    prompt: int
    image: Tensor  # (S + T - 1,) bool


def sequence(family: Family, item: Inputs, forced: Sequence[int] = FORCED) -> Sequence_:
    grown = wide(item)
    for token in forced[:-1]:
        grown = family.grow(grown, torch.tensor([token]))
    return Sequence_(grown, item["input_ids"].shape[1], family.image_tokens(grown)[0])


@contextmanager
def on_heads(family: Family, change: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Call `change(layer, heads)` with the head outputs (S, H, D) of one sample before each o_proj."""

    def hook(layer: int) -> Any:
        def before(module: Any, args: tuple[Tensor]) -> Any:
            heads = args[0][0].unflatten(-1, (family.heads, -1))
            changed = change(layer, heads)
            return None if changed is None else (changed.flatten(-2)[None],)

        return family.attentions[layer].o_proj.register_forward_pre_hook(before)

    handles = [hook(layer) for layer in range(family.text_layers)]
    try:
        yield
    finally:
        [handle.remove() for handle in handles]


@torch.no_grad()
def head_outputs(family: Family, inputs: Inputs) -> Tensor:
    """Head outputs (L, H, D) at the last row of one plain sample."""
    kept: list[Tensor] = []
    with on_heads(family, lambda layer, heads: kept.append(heads[-1])):
        family.model(**wide(inputs), use_cache=False)
    return torch.stack(kept)


def without_image(family: Family, item: Inputs) -> Inputs:
    """The ids of one sample with its image tokens cut out, at positions 0, 1, 2 ..."""
    ids = item["input_ids"][~family.image_tokens(item)][None]
    positions = torch.arange(ids.shape[1])[None]
    if "mm_token_type_ids" in item:
        positions = positions.expand(3, 1, -1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}


# ------------------------------------------------------------------------------------------------ VHR


@dataclass
class VHRReference:
    """Steps 2 to 4 of the published algorithm. `guard` is the release's "filter only if std > 1"."""

    family: Family
    layers: Sequence[int]
    alpha: float = 2.0
    outlier_filter: bool = True
    guard: float | None = None
    chosen: dict[int, list[int]] = field(default_factory=dict)
    dropped: dict[int, list[int]] = field(default_factory=dict)

    @torch.no_grad()
    def logits(self, item: Inputs) -> Tensor:
        """Logits (S + T - 1, V)."""
        text = head_outputs(self.family, without_image(self.family, item))
        whole = sequence(self.family, item)

        def reinforce(layer: int, heads: Tensor) -> Tensor | None:
            if layer not in self.layers:
                return None
            self.chosen[layer] = self.select(layer, text[layer], heads[whole.prompt - 1])
            scaled = heads.clone()
            for head in self.chosen[layer]:
                scaled[:, head] *= self.alpha
            return scaled

        with on_heads(self.family, reinforce):
            return self.family.model(**whole.inputs, use_cache=False).logits[0]

    def select(self, layer: int, text: Tensor, visual: Tensor) -> list[int]:
        """Heads of H with (H, D) outputs that are reinforced."""
        distance = [float((t - v).pow(2).sum()) for t, v in zip(text, visual, strict=True)]
        strength = [float(t.pow(2).sum()) for t in text]
        self.dropped[layer] = []
        if self.outlier_filter and (self.guard is None or _std(distance) > self.guard):
            for head in range(len(distance)):
                if distance[head] > _edge(distance) and strength[head] > _edge(strength):
                    self.dropped[layer].append(head)
        distance = [0.0 if head in self.dropped[layer] else value for head, value in enumerate(distance)]
        lower_median = sorted(distance)[(len(distance) - 1) // 2]
        return [head for head, value in enumerate(distance) if value > lower_median]


def _std(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5


def _edge(values: list[float]) -> float:
    return sum(values) / len(values) + _std(values)


# ------------------------------------------------------------------------------------------------ VAR


@dataclass
class VARReference:
    """Steps S1 to S4. `keep` is the fraction that sinks keep; `rho` bounds the share of sinks from above."""

    family: Family
    layers: Sequence[int]
    keep: float = 0.4
    rho: float = 0.5
    tau: float = 20.0
    least: float = 0.2
    dims: tuple[int, ...] = SINK_DIMS
    strict: bool = False  # the release: phi > tau, and 1e-6 for each image token in the denominator
    sinks: dict[int, list[int]] = field(default_factory=dict)
    selected: set[tuple[int, int, int]] = field(default_factory=set)  # layer, head, row

    @torch.no_grad()
    def logits(self, item: Inputs) -> Tensor:
        """Logits (S + T - 1, V)."""
        whole = sequence(self.family, item)
        entering: dict[int, Tensor] = {}

        def attention(layer: int, probs: Tensor) -> Tensor:
            return self.edit(layer, probs, entering[layer], whole) if layer in self.layers else probs

        def keep(layer: int) -> Any:
            def before(module: Any, args: Any, kwargs: Any) -> None:
                entering[layer] = (args[0] if args else kwargs["hidden_states"])[0]

            return self.family.decoder.layers[layer].register_forward_pre_hook(before, with_kwargs=True)

        handles = [keep(layer) for layer in range(self.family.text_layers)]
        try:
            with plain_attention(self.family, attention):
                return self.family.model(**whole.inputs, use_cache=False).logits[0]
        finally:
            [handle.remove() for handle in handles]

    def edit(self, layer: int, probs: Tensor, entering: Tensor, whole: Sequence_) -> Tensor:
        """Probs (H, Q, K) of one layer, redistributed row by row."""
        normal = entering * (entering.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        phi = normal[:, list(self.dims)].abs().max(-1).values
        massive = phi > self.tau if self.strict else phi >= self.tau
        massive[whole.prompt :] = False  # tokens generated later are never sinks
        self.sinks[layer] = massive.nonzero().flatten().tolist()
        after_image = int(whole.image.nonzero().max()) + 1 if whole.image.any() else len(phi)
        probs = probs.clone()
        for head in range(probs.shape[0]):
            for row in range(after_image, probs.shape[1]):
                new = self.redistribute(probs[head, row], massive, whole.image)
                if new is not None:
                    self.selected.add((layer, head, row))
                    probs[head, row] = new
        return probs

    def redistribute(self, w: Tensor, massive: Tensor, image: Tensor) -> Tensor | None:
        """One row (K,) of one head; None when it is not selected."""
        visual, rest = massive & image, image & ~massive
        if not visual.any():
            return None
        total = w[image].sum()
        share = w[visual].sum() / (w[image] + (1e-6 if self.strict else 0.0)).sum()
        if not (share <= self.rho and total >= self.least):
            return None
        new = w.clone()
        new[massive] = self.keep * w[massive]
        new[rest] += (1 - self.keep) * w[massive].sum() * w[rest] / w[rest].sum()
        assert abs(float(new.sum() - w.sum())) < 1e-12
        return new


_EDIT: list[Callable[[int, Tensor], Tensor]] = []


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """Causal attention of one unpadded sample, with every probability at hand."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    future = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
    probs = scores.masked_fill(future, -torch.inf).softmax(-1)
    probs = _EDIT[-1](module.layer_idx, probs[0])[None]
    return (probs @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("plain_oracle", _attention)


@contextmanager
def plain_attention(family: Family, edit: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Run the decoder with `_attention`, whose probs (H, Q, K) go through `edit(layer, probs)`."""
    decoder: Any = family.decoder
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("plain_oracle")
    _EDIT.append(edit)
    try:
        yield
    finally:
        _EDIT.pop()
        decoder.set_attn_implementation(before)
