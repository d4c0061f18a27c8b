"""A run's life: wrap and unwrap, off and on, exact counts, and nothing left alive behind it."""

from __future__ import annotations

import gc
import json
import weakref
from typing import Any

import pytest
import torch
from families import Family, build
from torch import Tensor
from transformers import DynamicCache

import regard
from regard.hooks.attend import claims
from regard.hooks.branch import Stream
from regard.hooks.engine import is_attached
from regard.hooks.kv_cache import CACHE
from regard.hooks.session import Session

STEPS = 5


@pytest.fixture
def llava() -> Family:
    return build("llava")


def bias(*layers: int) -> regard.Bias:
    return regard.Bias(layers or (0, 1, 2), lambda call: 1.5 * call.image[:, None, None, :].float())


def policy(rows: Any = "after_image") -> regard.MassPolicy:
    def groups(call: Any) -> Tensor:
        return call.session.image.long()

    return regard.MassPolicy(
        (0, 2), groups, lambda m: torch.ones_like(m) + 0.5 * m.flip(-1), ("text", "image"), rows
    )


def ids_of(family: Family, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    return family.model.generate(**inputs, **{"max_new_tokens": STEPS, "do_sample": False} | more)


def records(run: regard.Run) -> dict[tuple[str, int], dict[str, Any]]:
    return {(line["edit"], line["layer"]): line for line in run.report().to_dict()["layers"]}


# ---- wrap and unwrap ----------------------------------------------------------------------------------


class Pipeline:
    """What regard asks of a transformers pipeline: its `model`."""

    def __init__(self, model: Any) -> None:
        self.model = model


@pytest.mark.parametrize("kind", ["model", "pipeline"])
def test_wrap_and_unwrap(llava: Family, kind: str) -> None:
    thing = llava.model if kind == "model" else Pipeline(llava.model)
    inputs = llava.inputs(text=8)
    before = llava.model(**inputs).logits
    assert regard.wrap(thing, "vhr", bias()) is thing
    edited = llava.model(**inputs).logits
    with regard.apply(llava.model, "vhr", bias()):
        pass  # a run beside it comes and goes
    assert torch.equal(llava.model(**inputs).logits, edited)
    assert (edited - before).abs().max() > 1e-2
    assert regard.unwrap(thing) is thing
    assert torch.equal(llava.model(**inputs).logits, before)
    assert not is_attached(llava.model)
    assert "generate" not in vars(llava.model)


def test_wrapping_twice_stacks_and_unwrap_takes_all(llava: Family) -> None:
    inputs = llava.inputs(text=8)
    before = llava.model(**inputs).logits
    regard.wrap(llava.model, bias(0))
    one = llava.model(**inputs).logits
    regard.wrap(llava.model, bias(1))
    two = llava.model(**inputs).logits
    with regard.apply(llava.model, bias(0), bias(1)) as run, run.off():
        assert torch.equal(llava.model(**inputs).logits, two)
    regard.unwrap(llava.model)
    with regard.apply(llava.model, bias(0), bias(1)):
        assert torch.allclose(llava.model(**inputs).logits, two, atol=1e-5)
    assert torch.equal(llava.model(**inputs).logits, before)
    assert (two - one).abs().max() > 1e-3


def test_unwrap_of_what_was_never_wrapped(llava: Family) -> None:
    inputs = llava.inputs()
    before = llava.model(**inputs).logits
    assert regard.unwrap(llava.model) is llava.model
    with regard.apply(llava.model, bias()):
        regard.unwrap(llava.model)  # takes no `apply` off
        assert not torch.equal(llava.model(**inputs).logits, before)
    regard.wrap(llava.model, bias())
    regard.unwrap(llava.model)
    regard.unwrap(llava.model)
    assert torch.equal(llava.model(**inputs).logits, before)


def test_a_failed_wrap_leaves_nothing(llava: Family) -> None:
    with pytest.raises(regard.OutOfRange):
        regard.wrap(llava.model, bias(), bias(9))
    assert not is_attached(llava.model)
    assert llava.decoder.config._attn_implementation == "sdpa"


def test_a_generate_that_somebody_put_on_the_model_is_called_and_kept(llava: Family) -> None:
    inputs, calls = llava.inputs(), []
    plain = ids_of(llava, inputs)
    own = type(llava.model).generate.__get__(llava.model)

    def generate(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    llava.model.generate = generate
    with regard.apply(llava.model, bias()) as run:
        edited = ids_of(llava, inputs)
        with run.off():
            assert torch.equal(ids_of(llava, inputs), plain)
    assert llava.model.generate is generate
    assert len(calls) == 2
    assert not torch.equal(edited, plain)


def test_eager_attention_is_restored(llava: Family) -> None:
    llava.model.set_attn_implementation("eager")
    with regard.apply(llava.model, bias()) as run:
        llava.model(**llava.inputs())
    assert llava.decoder.config._attn_implementation == "eager"
    assert run.report().to_dict()["attention_before"] == "eager"
    assert "(was eager)" in str(run.report())


# ---- off ----------------------------------------------------------------------------------------------


def test_off_between_generates_and_nested(llava: Family) -> None:
    inputs = llava.inputs(text=8)
    plain = ids_of(llava, inputs)
    with regard.apply(llava.model, "vhr", bias()) as run:
        edited = ids_of(llava, inputs)
        with run.off():
            assert torch.equal(ids_of(llava, inputs), plain)
            with run.off():
                assert torch.equal(ids_of(llava, inputs), plain)
            assert torch.equal(ids_of(llava, inputs), plain)  # the inner block does not switch it on
        assert torch.equal(ids_of(llava, inputs), edited)
        with pytest.raises(ZeroDivisionError), run.off():
            _ = 1 / 0
        assert torch.equal(ids_of(llava, inputs), edited)
    assert not torch.equal(edited, plain)
    assert records(run)["Bias", 0]["prefills"] == 3


def test_off_rests_one_run_of_two(llava: Family) -> None:
    inputs = llava.inputs(text=8)

    def logits() -> Tensor:
        return llava.model(**inputs).logits

    with regard.apply(llava.model, bias(0)):
        first = logits()
    with regard.apply(llava.model, bias(0)) as one, regard.apply(llava.model, bias(1)) as two:
        both = logits()
        with two.off():
            assert torch.equal(logits(), first)
            with one.off():
                assert not torch.equal(logits(), first)
            assert torch.equal(logits(), first)
        assert torch.equal(logits(), both)
    with one.off():  # after its end: nothing to rest, nothing to restore
        assert not is_attached(llava.model)
    assert not is_attached(llava.model)


# ---- the report ---------------------------------------------------------------------------------------


def test_counts_are_exact(llava: Family) -> None:
    """Two prompts of 22 and 18 tokens; rows after the image, all rows, the last row and the rest."""
    reader = regard.HeadGain((1,), lambda call: None, hold=False)
    with regard.apply(llava.model, regard.VHR(layers=(0, 2)), bias(1), policy(), reader) as run:
        for text in (11, 7):
            ids_of(llava, llava.inputs(batch=2, text=text))
    lines, decodes = records(run), 2 * (STEPS - 1)
    assert set(lines) == {(e, n) for e in ("HeadGain", "MassPolicy") for n in (0, 2)} | {
        ("Bias", 1),
        ("HeadGain", 1),
    }
    for line in lines.values():
        if (line["edit"], line["layer"]) != ("HeadGain", 1):
            assert (line["prefills"], line["decode_steps"]) == (2, decodes)
    assert lines["HeadGain", 0]["rows"] == lines["Bias", 1]["rows"] == 22 + 18 + decodes
    assert lines["MassPolicy", 2]["rows"] == 11 + 7 + decodes  # the image ends the prompt but for its text
    assert lines["HeadGain", 1] | {"path": ""} == {
        "intervention": "HeadGain", "edit": "HeadGain", "layer": 1, "path": "",
        "prefills": 0, "decode_steps": 0, "rows": 0, "heads": None, "changed": None, "backends": [],
    }  # fmt: skip


@pytest.mark.parametrize(("rows", "prompt"), [("all", 18), ("last", 1), ("after_image", 7)])
def test_rows_of_a_policy(llava: Family, rows: Any, prompt: int) -> None:
    with regard.apply(llava.model, policy(rows)) as run:
        ids_of(llava, llava.inputs())
    assert {line["rows"] for line in records(run).values()} == {prompt + STEPS - 1}
    assert all(0 < line["changed"] <= 1 for line in records(run).values())


def test_report_tells_rows_that_a_policy_leaves_alone(llava: Family) -> None:
    """A policy that acts on even heads only changes half of what it is offered."""

    def even(masses: Tensor) -> Tensor:
        factors = torch.ones_like(masses)
        factors[:, ::2, :, 1] = 0.5
        return factors

    edit = regard.MassPolicy((1,), lambda call: call.session.image.long(), even, ("text", "image"))
    with regard.apply(llava.model, edit) as run:
        ids_of(llava, llava.batch([{"text": 5, "seed": 1}, {"text": 9, "seed": 2}]))
    assert [line["changed"] for line in records(run).values()] == [0.5]


def test_vhr_edits_half_of_the_heads(llava: Family) -> None:
    with regard.apply(llava.model, regard.VHR(layers=(0, 1, 2), outlier_filter=False)) as run:
        ids_of(llava, llava.inputs(batch=3, text=8))
    assert [line["heads"] for line in run.report().to_dict()["layers"]] == [llava.heads / 2] * 3
    assert "heads a layer 2 to 2" in str(run.report())


def test_the_report_as_text_and_as_data(llava: Family) -> None:
    hidden = regard.Hidden("state", (1,), lambda state, session: state)
    sinks = regard.VAR(sink_dims=(3, 11), tau=1.6, layers=(1,))
    with regard.apply(llava.model, "vhr", sinks, bias(0, 1), hidden) as run:
        assert str(run.report()).count("did not act") == 5
        ids_of(llava, llava.inputs(text=8))
    report = run.report()
    data = json.loads(json.dumps(report.to_dict()))
    assert data["model"] == "LlavaForConditionalGeneration"
    assert (data["attention"], data["attention_before"]) == ("sdpa", "sdpa")
    assert data["interventions"] == ["vhr", "var", "Bias", "Hidden"]
    lines = str(report).splitlines()
    assert lines[0] == "LlavaForConditionalGeneration, attention by sdpa: vhr, var, Bias, Hidden"
    found = {line.split(":")[0].strip(): line for line in lines[1:]}
    assert "layers 0-1; one SDPA call with an additive mask; prefills 1, decode steps 4" in found["Bias/Bias"]
    assert "layers 1-2; SDPA, head outputs scaled; prefills 1" in found["vhr/HeadGain"]
    assert "layers 1; SDPA, edited rows by group masses (torch rows)" in found["var/MassPolicy"]
    assert "read at the block's input" in found["Hidden/Hidden"]
    with regard.apply(llava.model, "none") as null:
        ids_of(llava, llava.inputs())
    assert null.report().to_dict()["layers"] == []
    with regard.apply(llava.model, regard.Bias((0,), lambda call: None)) as idle:
        ids_of(llava, llava.inputs())
    assert "Bias/Bias: did not act" in str(idle.report())


def test_read_gives_the_newest_prompt(llava: Family) -> None:
    hidden = regard.Hidden("norm", (0, 2), lambda state, session: state.norm(dim=-1))
    with regard.apply(llava.model, hidden) as run:
        assert run.read("norm") == {}
        llava.model(**llava.inputs(text=5))
        short = run.read("norm")
        ids_of(llava, llava.inputs(text=9))
        long = run.read("norm")
        assert run.read("nothing") == {}
    assert {layer: tuple(kept.shape) for layer, kept in short.items()} == {0: (1, 16), 2: (1, 16)}
    assert {layer: tuple(kept.shape) for layer, kept in long.items()} == {0: (1, 20), 2: (1, 20)}
    assert run.read("norm") == {}  # a run that has ended keeps nothing


# ---- memory -------------------------------------------------------------------------------------------


def alive(*kinds: type) -> int:
    gc.collect()
    return sum(type(thing) in kinds for thing in gc.get_objects())


class Contrast:
    """1.5 times the logits less half of those without the image."""

    name = "contrast"

    def edits(self, anatomy: Any) -> Any:
        contrast = regard.Logits(lambda z, step: 1.5 * z - 0.5 * step.branch("text"), ("text",))
        return regard.Branch("text", lambda s: ~s.image, every_step=True), contrast


def contrast() -> Contrast:
    return Contrast()


def test_memory_does_not_grow(llava: Family) -> None:
    """However many prompts went by, the newest one's session and stream are all that is kept."""
    kinds = (Session, Stream, DynamicCache)
    before = alive(*kinds)
    inputs = llava.inputs(text=8)
    with regard.apply(llava.model, "vhr", contrast(), policy()):
        for _ in range(3):
            ids_of(llava, inputs, max_new_tokens=2)
        few = alive(*kinds)
        for _ in range(17):
            ids_of(llava, inputs, max_new_tokens=2)
            llava.model(**inputs)
        assert alive(*kinds) <= few
        assert alive(Session) == 1
    assert alive(*kinds) == before


def test_a_cache_that_the_user_drops_takes_its_session_along(llava: Family) -> None:
    before = alive(Session)
    with regard.apply(llava.model, "vhr"):
        caches = [getattr(llava.model(**llava.inputs(text=8), use_cache=True), CACHE) for _ in range(4)]
        assert alive(Session) == before + 4
        caches.clear()
        assert alive(Session) == before + 1


@pytest.mark.parametrize("leave", ["apply", "wrap", "left on", "error"])
def test_a_model_can_be_collected(leave: str) -> None:
    family = build("llava")
    inputs, model = family.inputs(text=8), family.model
    marks = [weakref.ref(module) for module in (model, family.decoder, family.attentions[0])]
    if leave == "apply":
        with regard.apply(model, "vhr", contrast()) as run:
            model.generate(**inputs, max_new_tokens=2)
    elif leave == "error":
        with pytest.raises(regard.OutOfRange), regard.apply(model, bias(9)):
            pass
    else:
        regard.wrap(model, "vhr", contrast())
        model.generate(**inputs, max_new_tokens=2)
        if leave == "wrap":
            regard.unwrap(model)
    count = len(claims)
    del family, model
    gc.collect()
    assert [mark() for mark in marks] == [None] * 3
    assert len(claims) <= count
    if leave == "apply":
        assert "LlavaForConditionalGeneration" in str(run.report())  # the report outlives its model


def test_a_model_that_nobody_holds() -> None:
    run = regard.apply(build("llava").model, "vhr")
    gc.collect()
    with pytest.raises(regard.CannotEdit, match="LlavaForConditionalGeneration of this run is gone"):
        run.start()
