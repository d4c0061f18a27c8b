"""The engine's contract, line by line, on every family (see `families.py` for the models)."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from families import FAMILY_NAMES, Family, build
from torch import Tensor

import regard
from regard.hooks.attend import claims
from regard.hooks.session import Call

STEPS = 5
CLOSE = {"atol": 2e-4, "rtol": 2e-4}
BLIPS = ("instructblip", "blip2")


def image_bias(call: Call) -> Tensor:
    return 1.5 * call.image[:, None, None, :].float()


def edit_of(kind: str, family: Family) -> Any:
    """An edit that moves this tiny model: sinks are told by two channels that random states often light up."""
    if kind == "bias":
        return regard.Bias(tuple(range(family.text_layers)), image_bias)
    if kind == "vhr":
        return regard.VHR(alpha=3.0, layers=self_layers(family))
    return regard.VAR(
        sink_dims=(3, 11, 20, 40), tau=1.6, min_visual=0.0, rho=0.0, transfer=0.9, layers=self_layers(family)
    )


def self_layers(family: Family) -> tuple[int, ...]:
    return tuple(layer for layer in range(family.text_layers) if layer not in family.cross_layers)


def generate(family: Family, inputs: dict[str, Tensor], **more: Any) -> tuple[Tensor, Tensor]:
    """Ids of the new tokens (B, T) and their scores (B, T, V)."""
    settings = {"max_new_tokens": STEPS, "do_sample": False} | more
    out = family.model.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
    logits = torch.stack(out.logits, 1)
    return out.sequences[:, -logits.shape[1] :], logits


def differ(plain: Tensor, edited: Tensor) -> bool:
    """Whether an edit did something: without it the other comparisons would hold for the identity too."""
    return bool((plain - edited).abs().max() > 1e-3)


def is_clean(family: Family) -> bool:
    modules = list(family.model.modules())
    hooks = [h for m in modules for h in [*m._forward_pre_hooks.values(), *m._forward_hooks.values()]]
    ours = [
        h for h in hooks if getattr(h, "func", h).__module__.startswith("regard")
    ]  # transformers leaves its own
    routed = family.decoder.config._attn_implementation != "sdpa"
    return (
        not ours
        and not routed
        and not any(m in claims for m in modules)
        and "generate" not in vars(family.model)
    )


@pytest.fixture(params=FAMILY_NAMES)
def family(request: pytest.FixtureRequest) -> Family:
    return build(request.param)


@pytest.fixture(params=["bias", "vhr", "var"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def has_image_in_text(family: Family, kind: str) -> None:
    if family.model.config.model_type == "mllama" and kind == "var":
        pytest.skip(
            "Mllama's image is in its cross-attention: self-attention holds no image token to redistribute to"
        )


def test_null_edit_and_detach_are_bit_exact(family: Family) -> None:
    inputs = family.batch([{"text": 5, "seed": 1}, {"text": 9, "seed": 2}])
    ids, logits = generate(family, inputs)
    with regard.apply(family.model, "none"):
        null = generate(family, inputs)
    after = generate(family, inputs)
    assert torch.equal(null[0], ids)
    assert torch.equal(null[1], logits)
    assert torch.equal(after[1], logits)
    assert is_clean(family)


def test_edits_act_and_go(family: Family, kind: str) -> None:
    has_image_in_text(family, kind)
    inputs = family.inputs(text=8)
    before = family.model(**inputs).logits
    with regard.apply(family.model, edit_of(kind, family)) as run:
        edited = family.model(**inputs).logits
        with run.off():
            base = family.model(**inputs).logits
        again = family.model(**inputs).logits
    assert (edited - before)[:, -1].abs().max() > 1e-3
    assert torch.equal(base, before)
    assert torch.equal(again, edited)
    assert torch.equal(family.model(**inputs).logits, before)
    assert is_clean(family)
    acted = [tally for tally in run.report().tallies if tally.prefill]
    assert acted, str(run.report())


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_an_error_in_generate_leaves_no_trace(family: Family, error: type[BaseException]) -> None:
    inputs = family.inputs()
    before = family.model(**inputs).logits
    handle = family.attentions[-1].register_forward_hook(lambda *_: (_ for _ in ()).throw(error()))
    with pytest.raises(error), regard.apply(family.model, edit_of("vhr", family)):
        family.model.generate(**inputs, max_new_tokens=2)
    handle.remove()
    assert is_clean(family)
    assert torch.equal(family.model(**inputs).logits, before)
    with regard.apply(family.model, edit_of("vhr", family)):  # and the engine starts afresh
        family.model.generate(**inputs, max_new_tokens=2)


def test_nested_and_overlapping_runs(family: Family) -> None:
    inputs = family.inputs(text=8)
    before = family.model(**inputs).logits
    first = regard.apply(family.model, edit_of("bias", family))
    second = regard.apply(family.model, edit_of("vhr", family))
    first.start()
    only_first = family.model(**inputs).logits
    second.start()
    both = family.model(**inputs).logits
    first.stop()
    only_second = family.model(**inputs).logits
    second.stop()
    assert torch.equal(family.model(**inputs).logits, before)
    assert is_clean(family)
    results = [before, only_first, both, only_second]
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(results) for b in results[:i])


def test_two_models_and_two_threads(family: Family) -> None:
    other = build(family.name, seed=7)
    inputs = [family.inputs(text=6), other.inputs(text=9, seed=3)]
    zoo = [family, other]
    alone = []
    for one, given in zip(zoo, inputs, strict=True):
        with regard.apply(one.model, edit_of("vhr", one)):
            alone.append(generate(one, given)[1])
    plain = generate(other, inputs[1])[1]
    assert differ(plain, alone[1])
    with regard.apply(family.model, edit_of("vhr", family)):
        assert torch.equal(generate(other, inputs[1])[1], plain)
    found: dict[int, Tensor] = {}

    def work(number: int, one: Family, given: dict[str, Tensor]) -> None:
        found[number] = generate(one, given)[1]

    with regard.apply(family.model, edit_of("vhr", family)), regard.apply(other.model, edit_of("vhr", other)):
        jobs = [(0, family, inputs[0]), (1, other, inputs[1]), (2, family, family.inputs(text=9, seed=5))]
        threads = [threading.Thread(target=work, args=job) for job in jobs]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert torch.allclose(found[0], alone[0], **CLOSE)
    assert torch.allclose(found[1], alone[1], **CLOSE)
    with regard.apply(family.model, edit_of("vhr", family)):
        assert torch.allclose(found[2], generate(family, family.inputs(text=9, seed=5))[1], **CLOSE)


def test_cache_equals_no_cache(family: Family, kind: str) -> None:
    has_image_in_text(family, kind)
    if family.name in BLIPS:
        pytest.skip(
            "generate of this class turns the cache on whatever it is told, so there is nothing to compare"
        )
    inputs = family.batch([{"text": 5, "seed": 1}, {"text": 9, "seed": 2}])
    with regard.apply(family.model, edit_of(kind, family)):
        ids, logits = generate(family, inputs)
        free_ids, free = generate(family, inputs, use_cache=False)
    assert torch.equal(ids, free_ids)
    assert torch.allclose(logits, free, **CLOSE)
    assert (generate(family, inputs)[1] - logits).abs().max() > 1e-3


def test_static_cache_equals_dynamic(family: Family, kind: str) -> None:
    has_image_in_text(family, kind)
    inputs = family.batch([{"text": 5, "seed": 1}, {"text": 9, "seed": 2}])
    with regard.apply(family.model, edit_of(kind, family)):
        ids, logits = generate(family, inputs)
        static_ids, static = generate(family, inputs, cache_implementation="static")
    assert torch.equal(ids, static_ids)
    assert torch.allclose(logits, static, **CLOSE)
    assert differ(generate(family, inputs)[1], logits)


def test_padded_batch_equals_single_items(family: Family, kind: str) -> None:
    has_image_in_text(family, kind)
    specs = [{"text": 5, "seed": 1}, {"text": 11, "seed": 2}, {"text": 8, "seed": 3}]
    with regard.apply(family.model, edit_of(kind, family)):
        ids, logits = generate(family, family.batch(specs))
        for row, spec in enumerate(specs):
            one_ids, one = generate(family, family.batch([spec]))
            assert torch.allclose(logits[row], one[0], **CLOSE), f"row {row}"
            assert torch.equal(ids[row], one_ids[0])
    assert differ(generate(family, family.batch(specs))[1], logits)


def test_uneven_images_in_one_batch(family: Family, kind: str) -> None:
    """Two images, one image and a text-only row; each row equals itself alone."""
    has_image_in_text(family, kind)
    if not family.uneven_batch_exact or not family.text_only:
        pytest.skip(family.notes)
    specs = [{"text": 6, "seed": 1, "images": min(2, family.max_images)}, {"text": 9, "seed": 2}]
    with regard.apply(family.model, edit_of(kind, family)):
        _, logits = generate(family, family.batch([*specs, {"text": 7, "seed": 3, "image": False}]))
        for row, spec in enumerate(specs):
            assert torch.allclose(logits[row], generate(family, family.batch([spec]))[1][0], **CLOSE), (
                f"row {row}"
            )
    assert differ(generate(family, family.batch(specs))[1], logits[:2])
    plain = generate(family, family.batch([{"text": 7, "seed": 3, "image": False}]))[1][0]
    assert torch.allclose(logits[2], plain, **CLOSE)  # no image, nothing to edit


def test_beams(family: Family, kind: str) -> None:
    has_image_in_text(family, kind)
    inputs = family.batch([{"text": 5, "seed": 1}, {"text": 9, "seed": 2}])
    settings = {"num_beams": 3, "max_new_tokens": STEPS, "do_sample": False, "output_scores": True}
    settings |= {"return_dict_in_generate": True}
    plain = family.model.generate(**inputs, **settings)
    with regard.apply(family.model, edit_of(kind, family)):
        beams = family.model.generate(**inputs, **settings)
        free = family.model.generate(**inputs, **settings, use_cache=False)
    assert torch.equal(beams.sequences, free.sequences)
    assert torch.allclose(beams.sequences_scores, free.sequences_scores, **CLOSE)
    assert differ(plain.sequences_scores, beams.sequences_scores)


def test_a_text_stream_equals_a_forward_without_cache(family: Family) -> None:
    """The second stream's logits at every step are those of a fresh forward on its own tokens."""
    if not family.text_only:
        pytest.skip(family.notes)
    specs = [{"text": 5, "seed": 1}, {"text": 9, "seed": 2}]
    inputs = family.batch(specs)
    other: list[Tensor] = []

    def keep(main: Tensor, step: Any) -> Tensor:
        other.append(step.branch("text"))
        return 1.5 * main - 0.5 * other[-1]

    branch = regard.Branch("text", regard.hooks.edits.without_image, every_step=True)
    with regard.apply(family.model, branch, regard.Logits(keep, ("text",))):
        ids, logits = generate(family, inputs)
    plain = generate(family, inputs)[1]
    assert (plain - logits).abs().max() > 1e-3
    text = [text_only(family, inputs, row) for row in range(2)]
    for step in range(STEPS):
        for row in range(2):
            alone = family.model(**text[row]).logits[0, -1]
            assert torch.allclose(other[step][row], alone, **CLOSE), f"step {step}, row {row}"
            text[row] = family.grow(text[row], ids[row : row + 1, step])


def text_only(family: Family, inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """The prompt of one row without padding and image tokens."""
    kept = (inputs["attention_mask"][row] == 1) & ~family.image_tokens(inputs)[row]
    cut = {"input_ids": inputs["input_ids"][row : row + 1, kept]}
    cut["attention_mask"] = torch.ones_like(cut["input_ids"])
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            cut[key] = inputs[key][row : row + 1, kept]
    return cut
