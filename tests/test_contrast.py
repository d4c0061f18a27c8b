"""Contrastive methods against whole forwards of the stock model, without a cache, on both prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

import regard
from regard.interventions.vcd import noisy, signal_share
from tests.families import Family, Inputs, build

FAMILIES = ["llava", "llava_next", "instructblip", "qwen2_vl", "qwen2_5_vl"]
STEPS = 4
CLOSE = {"atol": 5e-4, "rtol": 1e-3}
SPECS: list[dict[str, Any]] = [
    {"text": 4, "seed": 1},
    {"text": 9, "seed": 2},
    {"text": 6, "seed": 3},
    {"text": 7, "seed": 4},
]


def generate(
    family: Family, inputs: Inputs, *edits: Any, steps: int = STEPS, **settings: Any
) -> tuple[Tensor, Tensor]:
    """Generated ids (B, steps) and the logits (B, steps, V) that they were taken from."""
    torch.manual_seed(3)
    settings = {"do_sample": False, "max_new_tokens": steps, **settings}
    with regard.apply(family.model, *edits):
        out = family.model.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
    return out.sequences[:, -len(out.logits) :], torch.stack(out.logits, 1)


@torch.no_grad()
def forced(family: Family, inputs: Inputs, ids: Tensor) -> Tensor:
    """Stock logits (steps, V) of one prompt that goes on with `ids`, each from a forward of its own."""
    rows = []
    for token in ids:
        rows.append(family.model(**inputs, use_cache=False).logits[0, -1])
        inputs = family.grow(inputs, token[None])
    return torch.stack(rows)


def noisy_inputs(family: Family, inputs: Inputs) -> Inputs:
    signal, noise = signal_share(700)
    pixels = inputs["pixel_values"]
    generator = torch.Generator().manual_seed(5)
    if pixels.ndim == 2:
        drawn = torch.randn(pixels.shape, generator=generator)
    else:
        drawn = torch.randn(1, *pixels.shape[1:], generator=generator).expand_as(pixels)
    return {**inputs, "pixel_values": signal * pixels + noise * drawn}


def text_only(family: Family, inputs: Inputs) -> Inputs:
    kept = ~family.image_tokens(inputs)[0]
    names = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    return {name: inputs[name][:, kept] for name in names if name in inputs}


ROLE, QFORMER_ROLE = [17, 33, 90], [41, 12]


def disturbed(family: Family, inputs: Inputs) -> Inputs:
    """One prompt, with the role behind its last image token."""
    after = int(family.image_tokens(inputs)[0].nonzero().max()) + 1
    fills = {"input_ids": ROLE, "attention_mask": [1] * 3}
    fills |= {"token_type_ids": [0] * 3, "mm_token_type_ids": [0] * 3}
    qformer = {"qformer_input_ids": QFORMER_ROLE, "qformer_attention_mask": [1, 1]}
    out = dict(inputs)
    for name, fill in {**fills, **qformer}.items():
        if name in inputs:
            row, place = inputs[name][0].tolist(), 1 if name in qformer else after
            out[name] = torch.tensor([row[:place] + fill + row[place:]])
    return out


def cut(fused: Tensor, logits: Tensor, beta: float) -> Tensor:
    probs = logits.softmax(-1)
    return torch.where(probs >= beta * probs.amax(-1, keepdim=True), fused, -math.inf)


def vcd(z: Tensor, other: Tensor) -> Tensor:
    return cut(2.5 * z - 1.5 * other, z, 0.05)


def icd(z: Tensor, other: Tensor) -> Tensor:
    return cut(3.0 * z - 2.0 * other, z, 0.05)


def m3id(z: Tensor, other: Tensor) -> Tensor:
    z, other = z.log_softmax(-1), other.log_softmax(-1)
    steps = torch.arange(1, len(z) + 1)[:, None]
    weight = (1 - torch.exp(-0.4 * steps)) / torch.exp(-0.4 * steps)
    return torch.where(z.exp().amax(-1, keepdim=True) < 0.9, z + weight * (z - other), z)


def pai(z: Tensor, other: Tensor) -> Tensor:
    z, other = z.log_softmax(-1), other.log_softmax(-1)
    return cut(1.8 * (z - other) + other, z, 0.1)


Negative = Callable[[Family, Inputs], Inputs]
METHODS: dict[str, tuple[Any, Negative, Callable[[Tensor, Tensor], Tensor]]] = {
    "vcd": (regard.VCD(alpha=1.5, beta=0.05, noise_step=700, seed=5), noisy_inputs, vcd),
    "icd": (
        regard.ICD(alpha=2.0, beta=0.05, role_ids=(17, 33, 90), qformer_ids=(41, 12)),
        disturbed,
        icd,
    ),
    "m3id": (regard.M3ID(decay=0.4, alpha=0.9), text_only, m3id),
    "pai": (regard.PAI(alpha=0.0, gamma=1.8), text_only, pai),
}


@pytest.mark.parametrize(
    "settings", [{}, {"do_sample": True, "temperature": 2.0}], ids=["greedy", "sampling"]
)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_step_equals_two_forwards_without_a_cache(
    name: str, method: str, batch: int, settings: dict[str, Any]
) -> None:
    edit, negative, formula = METHODS[method]
    family = build(name)
    if negative is text_only and not family.text_only:
        pytest.skip(family.notes)
    items = SPECS[:batch]
    ids, logits = generate(family, family.batch(items), edit, **settings)
    for row, spec in enumerate(items):
        inputs = family.batch([spec])
        positive = forced(family, inputs, ids[row])
        other = forced(family, negative(family, inputs), ids[row])
        expected = formula(positive, other)
        assert (positive - other).abs()[2:].max() > 1e-2  # the branches differ after the second token too
        near = (expected.isinf() != logits[row].isinf()).sum()
        assert near == 0, f"row {row}: {near} tokens are cut in one of both only"
        finite = ~expected.isinf()
        assert torch.allclose(logits[row][finite], expected[finite], **CLOSE), f"row {row}"


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_nothing_to_do_is_bit_equal_to_plain(name: str) -> None:
    family = build(name)
    inputs = family.batch(SPECS[:2])
    plain = generate(family, inputs)[1]
    idle = [
        regard.VCD(alpha=0, beta=0),
        regard.M3ID(decay=0),
        regard.PAI(alpha=0, gamma=1),
        regard.Plausible(beta=0),
    ]
    for edit in [*idle, regard.DropSinks(keep=1.0)]:
        assert torch.equal(generate(family, inputs, edit)[1], plain), edit


def test_without_noise_the_mask_alone_is_left() -> None:
    """Step 0 of diffusion hardly changes a pixel, and alpha 0 asks for no branch."""
    family = build("llava")
    inputs = family.batch(SPECS[:2])
    alone = generate(family, inputs, regard.Plausible(beta=0.2))[1]
    assert alone.isinf().any()
    assert torch.equal(generate(family, inputs, regard.VCD(alpha=0, beta=0.2))[1], alone)
    same = regard.Branch(
        "same", every_step=True, view=lambda kwargs, session: {"pixel_values": kwargs["pixel_values"] * 1}
    )
    mix = regard.Logits(lambda z, step: 2 * z - step.branch("same"), ("same",))
    assert torch.allclose(generate(family, inputs, same, mix)[1], generate(family, inputs)[1], **CLOSE)


def test_pai_raises_scores_of_the_newest_rows_only() -> None:
    """Layer 0 of two samples: prompt rows but the last keep their outputs."""
    family = build("llava")
    inputs = family.batch(SPECS[:2])
    seen: dict[str, Tensor] = {}
    for key, edits in {"plain": [], "pai": [regard.PAI(alpha=0.7, gamma=1, layers=(0,))]}.items():
        site = family.attentions[0]
        handle = site.o_proj.register_forward_pre_hook(lambda m, args, key=key: seen.update({key: args[0]}))
        with regard.apply(family.model, *edits), torch.no_grad():
            family.model(**inputs)
        handle.remove()
    assert torch.equal(seen["plain"][:, :-1], seen["pai"][:, :-1])
    assert (seen["plain"][:, -1] - seen["pai"][:, -1]).abs().max() > 1e-3


@torch.no_grad()
def test_pai_equals_a_loop_over_the_last_row() -> None:
    """Layer 0's last row by hand, from the block's own projections, in float64."""
    family = build("llava")
    family.model.double()
    inputs = family.batch([{"text": 6, "seed": 9}])
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    site, grabbed = family.attentions[0], {}
    handles = [
        site.register_forward_pre_hook(lambda m, args, kwargs: grabbed.update(kwargs), with_kwargs=True),
        site.o_proj.register_forward_pre_hook(lambda m, args: grabbed.update(out=args[0])),
    ]
    with regard.apply(family.model, regard.PAI(alpha=0.7, gamma=1, layers=(0,))):
        family.model(**inputs)
    for handle in handles:
        handle.remove()
    hidden, (cos, sin) = grabbed["hidden_states"], grabbed["position_embeddings"]

    def turned(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]

    shape = (*hidden.shape[:2], -1, site.head_dim)
    query, key, value = (
        p(hidden).view(shape).transpose(1, 2) for p in (site.q_proj, site.k_proj, site.v_proj)
    )
    query, key = turned(query), turned(key)
    image = family.image_tokens(inputs)[0]
    for head in range(family.heads):
        shared = head // (family.heads // family.kv_heads)
        scores = key[0, shared] @ query[0, head, -1] * site.head_dim**-0.5
        scores = torch.where(image, scores + 0.7 * scores.abs(), scores)
        out = scores.softmax(-1) @ value[0, shared]
        own = grabbed["out"][0, -1].view(family.heads, -1)[head]
        assert torch.allclose(out, own, atol=1e-9)


def test_the_users_own_processors_and_stops_go_on_working() -> None:
    family = build("llava")
    inputs = family.batch(SPECS[:1])
    seen: list[Tensor] = []

    def ban(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores.clone())
        return scores.index_fill(1, scores.argmax(-1), -math.inf)

    def stop(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor([ids.shape[1] >= inputs["input_ids"].shape[1] + 3])

    edit = regard.VCD(alpha=1.5, beta=0.0, noise_step=700)
    settings = {
        "logits_processor": LogitsProcessorList([ban]),
        "stopping_criteria": StoppingCriteriaList([stop]),
    }
    ids, logits = generate(family, inputs, edit, steps=8, **settings)
    assert ids.shape[1] == 3
    assert all(torch.equal(own, logits[:, step]) for step, own in enumerate(seen))
    assert (ids != logits.argmax(-1)).all()
    beams, _ = generate(family, inputs, edit, num_beams=3)
    assert not torch.equal(beams, generate(family, inputs, num_beams=3)[0])


def test_noise_belongs_to_an_image() -> None:
    pixels = torch.randn(2, 3, 8, 8)
    both = noisy(pixels, 500, 1)
    assert torch.equal(both[1:], noisy(pixels[1:], 500, 1))
    assert not torch.equal(both, noisy(pixels, 500, 2))
    signal, noise = signal_share(500)
    assert signal == pytest.approx(0.863, abs=2e-3)  # measured on the released schedule
    assert noise == pytest.approx(0.505, abs=2e-3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: regard.VCD(alpha=-1), "alpha is a strength of 0 or more, got -1"),
        (lambda: regard.VCD(beta=1.5), "beta is a fraction from 0 to 1, got 1.5"),
        (lambda: regard.VCD(noise_step=1000), "from 0 to 999, got 1000"),
        (lambda: regard.M3ID(alpha=0), "alpha is a probability above 0, got 0"),
        (lambda: regard.M3ID(decay=-0.1), "decay is 0 or more, got -0.1"),
        (lambda: regard.M3ID(variant="x"), "variant must be 'paper' or 'avisc'"),
        (lambda: regard.PAI(gamma=math.inf), "gamma is a strength"),
        (lambda: regard.PAI(alpha=math.nan), "alpha is a strength"),
        (lambda: regard.Plausible(beta=-0.1), "beta is a fraction"),
        (lambda: regard.DropSinks(keep=2), "keep is a factor from 0 to 1, got 2"),
    ],
)
def test_values_out_of_range(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_prompt_without_an_image_is_refused() -> None:
    family = build("llava")
    inputs = family.inputs(image=False)
    for edit in (regard.VCD(), regard.M3ID(), regard.PAI()):
        with pytest.raises(regard.NoImageTokens):
            generate(family, inputs, edit)
