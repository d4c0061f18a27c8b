"""Tokens that leave, against a stock model whose later blocks have the image columns masked, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from departures import DEPTH, after_each, columns_masked, compare, family_of, lengths, moved, reference
from families import Family, build
from oracles import EXACT, FORCED, logits_of, wide
from torch import Tensor
from transformers import StaticCache

import regard
from regard.hooks.kv_cache import CACHE

NAMES = (
    "llava",
    "llava_next",
    "llava_onevision",
    "instructblip",
    "qwen2_vl",
    "qwen2_5_vl",
    "internvl",
    "idefics3",
)


@pytest.fixture(scope="module", params=NAMES)
def family(request: pytest.FixtureRequest) -> Family:
    return family_of(request.param)


@pytest.fixture(scope="module")
def llava() -> Family:
    return family_of("llava")


# ----------------------------------------------------------------------------------- what leaving means


@pytest.mark.parametrize("layer", [0, 2])
def test_leaving_is_masking_the_image_in_later_blocks(family: Family, layer: int) -> None:
    item = family.item(text=8, seed=1)
    with regard.apply(family.model, regard.DyVTE(layer=layer)):
        found = logits_of(family, item)
    compare(family, item, found, reference(family, item, [layer]))
    assert moved(found, logits_of(family, item)) > 0.05


def test_leaving_after_the_last_block_changes_no_bit(family: Family) -> None:
    item = family.item(text=8, seed=1)
    plain = logits_of(family, item)
    with regard.apply(family.model, regard.DyVTE(layer=DEPTH - 1)):
        found = logits_of(family, item)
    assert torch.equal(found[0], plain[0])
    assert torch.equal(found[1], plain[1])


def test_a_padded_batch_is_its_samples_alone(family: Family) -> None:
    """Unequal lengths and images, and where the class takes it, two images and none."""
    specs: list[dict[str, Any]] = [{"text": 12, "seed": 2}, {"text": 5, "seed": 3, "size": family.sizes - 1}]
    specs[1] |= {"images": 2} if family.max_images > 1 else {}
    specs += [{"text": 7, "seed": 5, "image": False}] if family.text_only else []
    inputs = family.batch(specs)
    with regard.apply(family.model, regard.DyVTE(layer=1)):
        found = logits_of(family, inputs)
    for row, spec in enumerate(specs):
        item = family.item(**spec)
        want = reference(family, item, [1])
        length = item["input_ids"].shape[1]
        compare(family, item, (found[0][row : row + 1, -length:], found[1][row : row + 1]), want)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_each_sample_leaves_by_itself(name: str) -> None:
    family = family_of(name)
    specs = [{"text": 12, "seed": 2}, {"text": 5, "seed": 3, "images": 2}, {"text": 9, "seed": 4}]
    inputs = family.batch(specs)
    tables = [False, True, False, False, False], [False, False, False, True, False], [False] * 2 + [True] * 3
    with regard.apply(family.model, regard.Exit(tuple(range(DEPTH)), after_each(*tables))):
        found = logits_of(family, inputs)
        with torch.no_grad():
            cache = getattr(family.model(**wide(inputs)), CACHE)
    for row, (spec, after) in enumerate(zip(specs, (1, 3, 2), strict=True)):
        item = family.item(**spec)
        length = item["input_ids"].shape[1]
        mine = found[0][row : row + 1, -length:], found[1][row : row + 1]
        compare(family, item, mine, reference(family, item, [after]))
        with torch.no_grad(), regard.apply(family.model, regard.DyVTE(layer=after)):
            alone = family.model(**wide(item)).logits
        torch.testing.assert_close(mine[0], alone, **EXACT)  # image rows too: the states at their own exit
    prompt = inputs["input_ids"].shape[1]
    longest = int((inputs["attention_mask"].bool() & ~family.image_tokens(inputs)).sum(1).max())
    assert lengths(cache) == [prompt] * 4 + [longest]


def test_a_sample_that_stays_keeps_its_image_and_is_not_asked_again(llava: Family) -> None:
    specs = [{"text": 12, "seed": 2}, {"text": 5, "seed": 3}]
    inputs, asked = llava.batch(specs), []

    def when(departure: Any) -> Tensor:
        asked.append(departure.layer)
        return torch.tensor([departure.layer == 1, False])

    with regard.apply(llava.model, regard.Exit((1, 2), when)):
        found = logits_of(llava, inputs)
        assert asked == [1, 2, 1, 2]  # two prompts: one forward, and one generate
        llava.model.generate(**wide(inputs), max_new_tokens=3, do_sample=False, use_cache=False)
        assert asked == [1, 2, 1, 2, 1, 2]
    for row, after in enumerate((1, DEPTH)):
        item = llava.item(**specs[row])
        length = item["input_ids"].shape[1]
        mine = found[0][row : row + 1, -length:], found[1][row : row + 1]
        compare(llava, item, mine, reference(llava, item, [after]))


@torch.no_grad()
def test_padding_on_the_right(llava: Family) -> None:
    inputs = llava.batch([{"text": 9, "seed": 2}, {"text": 5, "seed": 3}])
    for key in ("input_ids", "attention_mask"):
        inputs[key][1] = inputs[key][1].roll(-4)
    with regard.apply(llava.model, regard.DyVTE(layer=1)):
        found = llava.model(**wide(inputs)).logits
    with columns_masked(llava, llava.image_tokens(inputs), [1, 1]):
        want = llava.model(**wide(inputs), use_cache=False).logits
    text = ~llava.image_tokens(inputs) & inputs["attention_mask"].bool()
    torch.testing.assert_close(found[text], want[text], **EXACT)


@torch.no_grad()
def test_caches_after_the_exit_are_shorter_and_shapes_stay(family: Family) -> None:
    item = wide(family.item(text=8, seed=1))
    image = family.image_tokens(item)[0]
    with regard.apply(family.model, regard.DyVTE(layer=1)) as run:
        out = family.model(**item, output_hidden_states=True)
    long, short = len(image), int((~image).sum())
    inner = out.language_model_outputs if "language_model_outputs" in out else out  # InstructBLIP
    assert lengths(getattr(inner, CACHE)) == [long] * 2 + [short] * 3
    plain = family.model(**item, output_hidden_states=True)
    assert out.logits.shape == plain.logits.shape
    states = inner.hidden_states
    assert all(state.shape[1] == long for state in states)
    for state in states[3:-1]:  # as at the exit; the last one is behind the norm
        assert torch.equal(state[:, image], states[2][:, image])
        assert not torch.equal(state[:, ~image], states[2][:, ~image])
    assert "tokens left the decoder" in str(run.report())
    assert "newest prompt: after block 1" in str(run.report())


def test_without_a_cache_the_first_decision_stays(llava: Family) -> None:
    inputs = llava.batch([{"text": 12, "seed": 2}, {"text": 5, "seed": 3}])
    asked = []

    def when(departure: Any) -> Tensor:
        asked.append(departure.layer)
        return torch.tensor([departure.layer >= 1, departure.layer >= 2])

    logits = []
    for use_cache in (True, False):
        with regard.apply(llava.model, regard.Exit((0, 1, 2, 3), when)):
            out = llava.model.generate(
                **wide(inputs),
                max_new_tokens=5,
                do_sample=False,
                use_cache=use_cache,
                output_logits=True,
                return_dict_in_generate=True,
            )
        logits.append(torch.stack(out.logits, 1))
        assert asked == [0, 1, 2]
        asked.clear()
    torch.testing.assert_close(logits[0], logits[1], **EXACT)


@torch.no_grad()
def test_a_cache_may_be_carried_on_by_several_tokens(llava: Family) -> None:
    item = wide(llava.item(text=8, seed=1))
    more = torch.tensor([[20, 31, 42]])
    with regard.apply(llava.model, regard.DyVTE(layer=1)):
        cache = getattr(llava.model(**item), CACHE)
        found = llava.model(input_ids=more, past_key_values=cache).logits
    grown = {**item, "input_ids": torch.cat([item["input_ids"], more], 1)}
    grown["attention_mask"] = torch.ones_like(grown["input_ids"])
    with columns_masked(llava, llava.image_tokens(grown), [1]):
        want = llava.model(**grown, use_cache=False).logits[:, -3:]
    torch.testing.assert_close(found, want, **EXACT)


def test_beams_and_several_answers(llava: Family) -> None:
    """Beam search over a padded batch gives each sample's own beams."""
    specs = [{"text": 12, "seed": 2}, {"text": 5, "seed": 3, "images": 2}]
    settings: dict[str, Any] = {
        "max_new_tokens": 5,
        "num_beams": 3,
        "num_return_sequences": 2,
        "do_sample": False,
    }
    with regard.apply(llava.model, regard.DyVTE(layer=1)):
        together = llava.model.generate(**wide(llava.batch(specs)), **settings)[:, -5:]
        alone = [llava.model.generate(**wide(llava.item(**spec)), **settings)[:, -5:] for spec in specs]
    assert torch.equal(together, torch.cat(alone))


def test_a_float_mask_of_the_user_is_cut_too(llava: Family) -> None:
    item = wide(llava.item(text=8, seed=1))
    size = item["input_ids"].shape[1]
    lowest = torch.finfo(torch.float64).min
    mask = torch.zeros(1, 1, size, size, dtype=torch.float64).masked_fill(
        ~torch.ones(size, size).tril().bool(), lowest
    )
    mask[..., 3, 1] = -1.5
    changed = {**item, "attention_mask": mask}
    with torch.no_grad(), regard.apply(llava.model, regard.DyVTE(layer=1)):
        found = llava.model(**changed).logits
        plain = llava.model(**item).logits
    with torch.no_grad(), regard.apply(llava.model, regard.Exit((1,), tokens=lambda s: s.image & False)):
        whole = llava.model(**changed).logits
    assert (found - plain).abs().max() > 1e-3
    assert (found - whole).abs().max() > 1e-3


@torch.no_grad()
def test_head_gains_after_the_exit_find_the_last_row_before_padding(llava: Family) -> None:
    """VHR reads each sample's newest row; after the exit rows are packed to the right."""
    specs = [{"text": 9, "seed": 2}, {"text": 5, "seed": 3}]
    inputs = llava.batch(specs)
    for key in ("input_ids", "attention_mask"):
        inputs[key][1] = inputs[key][1].roll(-4)
    images = []

    def look(call: Any) -> None:
        images.append((call.layer, call.image.sum().item(), call.newest_output()))

    reader = regard.HeadGain((0, 3), look)
    with regard.apply(llava.model, regard.DyVTE(layer=1), regard.VHR(layers=(0, 3)), reader):
        found = llava.model(**wide(inputs)).logits
        seen = list(images)
        for row, spec in enumerate(specs):
            images.clear()
            item = llava.item(**spec)
            alone = llava.model(**wide(item)).logits
            length, text = alone.shape[1], ~llava.image_tokens(item)[0]
            torch.testing.assert_close(found[row, :length][text], alone[0][text], **EXACT)
            for (layer, count, output), (_, own, single) in zip(seen, images, strict=True):
                torch.testing.assert_close(output[row], single[0], **EXACT)
                assert (count, own) == ((18, 9) if layer == 0 else (0, 0))


def test_other_tokens_may_leave(llava: Family) -> None:
    item = llava.item(text=8, seed=1)
    gone = torch.zeros_like(item["input_ids"], dtype=torch.bool)
    gone[0, [2, 3, 11]] = True
    with torch.no_grad(), regard.apply(llava.model, regard.Exit((1,), tokens=lambda session: gone)):
        found = llava.model(**wide(item)).logits
    with torch.no_grad(), columns_masked(llava, gone, [1]):
        want = llava.model(**wide(item), use_cache=False).logits
    torch.testing.assert_close(found[~gone], want[~gone], **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_vl", "paligemma"])
def test_deepstack_and_prefix_masks(name: str) -> None:
    """Qwen3-VL adds to image rows between blocks; PaliGemma's prompt is seen both ways."""
    family = build(name)
    item = family.item(text=8, seed=1)
    image = family.image_tokens(item)
    with regard.apply(family.model, regard.DyVTE(layer=0)):
        found = family.model(**item).logits
    plain = family.model(**item).logits
    with columns_masked(family, image, [0]):
        want = family.model(**item, use_cache=False).logits
    torch.testing.assert_close(found[~image], want[~image], atol=2e-4, rtol=2e-4)
    assert (found - plain)[~image].abs().max() > 0.01


def test_a_branch_keeps_its_image_while_the_main_stream_loses_it(llava: Family) -> None:
    """VHR-like reading of another stream: it is never cut."""
    item = llava.item(text=8, seed=1)
    seen: list[Tensor] = []

    def edit(logits: Tensor, step: Any) -> Tensor:
        seen.append(step.branch("whole"))
        return logits

    whole = regard.Branch("whole", keep=lambda session: torch.ones_like(session.image), every_step=True)
    with regard.apply(llava.model, regard.DyVTE(layer=1), whole, regard.Logits(edit, ("whole",))):
        found = logits_of(llava, item)
    compare(llava, item, found, reference(llava, item, [1]))
    plain = logits_of(llava, item)
    torch.testing.assert_close(torch.stack(seen[-len(FORCED) :], 1).double(), plain[1].double(), **EXACT)


def test_vhr_acts_on_the_rows_that_stay(llava: Family) -> None:
    """Head gains after the exit: a padded batch still equals its samples alone."""
    specs = [{"text": 12, "seed": 2}, {"text": 5, "seed": 3, "images": 2}]
    edits = regard.DyVTE(layer=1), regard.VHR(layers=(0, 3))
    with regard.apply(llava.model, *edits):
        found = logits_of(llava, llava.batch(specs))
        for row, spec in enumerate(specs):
            alone = logits_of(llava, llava.item(**spec))
            torch.testing.assert_close(found[1][row : row + 1], alone[1], **EXACT)
    with regard.apply(llava.model, edits[0]):
        assert moved(logits_of(llava, llava.batch(specs)), found) > 0.05


# ----------------------------------------------------------------------------------------------- errors


def test_layers_that_do_not_exist(llava: Family) -> None:
    for method in (regard.DyVTE(layer=5), regard.DyVTE("state", start=5), regard.Exit(tuple(range(7)))):
        with pytest.raises(regard.OutOfRange, match="layers 0 to 4"):
            regard.apply(llava.model, method).start()
    for layers in ((), (2, 1), (1, 1)):
        with pytest.raises(regard.CannotEdit, match="ascending"):
            regard.apply(llava.model, regard.Exit(layers)).start()


def test_edits_of_later_layers_are_refused(llava: Family) -> None:
    bias = regard.Bias((3,), lambda call: None)
    mask = regard.Mask((3,), lambda call: None)
    hidden = regard.Hidden("state", (3,), lambda hidden, session: hidden)
    for edit in (bias, mask, hidden, regard.VAR(sink_dims=(1,), tau=1.5, layers=(3,))):
        with pytest.raises(regard.CannotEdit, match=r"layer 3 .* dyvte lets tokens leave from layer 1 on"):
            regard.apply(llava.model, regard.DyVTE(layer=1), edit).start()
        with regard.apply(llava.model, regard.DyVTE(layer=3), edit):
            pass
    with pytest.raises(regard.CannotEdit, match="use one of them"):
        regard.apply(llava.model, regard.DyVTE(), regard.Exit((1,))).start()
    assert llava.decoder.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("name", "says"), [("mllama", "cross-attention in layers 1, 3"), ("gemma3", "sliding")]
)
def test_decoders_that_no_token_can_leave(name: str, says: str) -> None:
    family = build(name)
    with pytest.raises(regard.CannotEdit, match=says):
        regard.apply(family.model, "dyvte").start()
    assert family.decoder.config._attn_implementation == "sdpa"


def test_a_static_cache_and_chunks_are_refused(llava: Family) -> None:
    item = wide(llava.item(text=8, seed=1))
    with regard.apply(llava.model, "dyvte"):
        with pytest.raises(regard.CannotEdit, match="StaticLayer"):
            llava.model.generate(**item, max_new_tokens=2, cache_implementation="static")
        cache = StaticCache(config=llava.model.config.get_text_config(), max_cache_len=64)
        with pytest.raises(regard.CannotEdit, match="StaticLayer"):
            llava.model(**item, past_key_values=cache)
        with pytest.raises(regard.CannotEdit, match="whole prompt in one forward"):
            llava.model.generate(**item, max_new_tokens=2, prefill_chunk_size=4)
        with pytest.raises(regard.NoImageTokens, match="dyvte"):
            llava.model(**llava.item(image=False))


def test_tokens_that_cannot_leave(llava: Family) -> None:
    item = wide(llava.item(text=8, seed=1))
    for tokens, says in (
        (lambda s: torch.ones_like(s.image), "every token of a prompt leaves"),
        (lambda s: s.image.long(), r"give torch\.bool"),
        (lambda s: s.image[:, 1:], r"give torch\.bool"),
    ):
        with (
            regard.apply(llava.model, regard.Exit((1,), tokens=tokens)),
            pytest.raises(regard.CannotEdit, match=says),
        ):
            llava.model(**item)
    assert torch.isfinite(llava.model(**item).logits).all()
