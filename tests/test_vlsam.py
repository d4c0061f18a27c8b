"""VL-SAM's attention flow against the full recursion over stock eager attention, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import oracles
import pytest
import torch
from families import FIRST_TEXT, HEADS, VOCAB, Family, Inputs, build
from torch import Tensor

import regard
from regard.interventions import spoken, vlsam

CLOSE = {"atol": 1e-6, "rtol": 1e-5}
CAUSAL = ("llava", "qwen2_vl", "llava_next", "internvl")
NAMES = (*CAUSAL, "gemma3", "paligemma")


def wide_family(name: str) -> Family:
    """float64 with its own layer types: Gemma 3 keeps its sliding layers and its images that see each other."""
    family = build(name)
    family.model.double()
    return family


@torch.no_grad()
def flow_matrix(
    name: str, item: Inputs, output: Sequence[int], regularise: bool = True, weigh: bool = True
) -> Tensor:
    """F_L (N, N) of one sample without padding, by the recursion as the paper writes it."""
    family = wide_family(name)
    family.model.set_attn_implementation("eager")
    whole = oracles.wide(item)
    for token in output:
        whole = family.grow(whole, torch.tensor([token]))
    layers = family.model(**whole, use_cache=False, output_attentions=True).attentions
    count = whole["input_ids"].shape[1]
    one, flow = torch.eye(count).double(), torch.zeros(count, count).double()
    for probs in layers:
        heads = probs[0].double()
        weights = heads.max(2).values.mean(1) if weigh else torch.ones(len(heads)).double()
        mean = sum(weight * head for weight, head in zip(weights, heads, strict=True)) / len(heads)
        if regularise:
            for column in range(count):  # so many rows may see it, whether they look or not
                seen_by = sum(1 for row in range(count) if column <= row)
                mean[:, column] *= 1 - (seen_by - 1) / count
        flow = (one + mean) @ (one + flow)
    return flow


def maps_of(name: str, item: Inputs, **how: Any) -> vlsam.ObjectMaps:
    return regard.object_maps(wide_family(name).model, oracles.wide(item), **how)


# ------------------------------------------------------------------------------------------- the flow


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("regularise", "weigh"), [(True, True), (False, True), (True, False)])
def test_rows_are_those_of_the_full_recursion(name: str, regularise: bool, weigh: bool) -> None:
    item = build(name).item(text=6, seed=2)
    how = {"regularise": regularise, "head_weights": weigh}
    found = maps_of(name, item, positions=[[-1], [-3, -2], [-6]], max_new_tokens=4, **how)
    want = flow_matrix(name, item, found.output[0].tolist(), regularise, weigh)
    count = len(want)
    for item_map, rows in zip(found.objects, ([-1], [-3, -2], [-6]), strict=True):
        assert item_map.tokens == tuple(count + row for row in rows)
        torch.testing.assert_close(item_map.row, want[rows].mean(0), **CLOSE)
        image = build(name).image_tokens(item)[0]
        place = int(image.nonzero()[0])
        height, width = item_map.maps[0].shape
        assert height * width == (4 if name == "llava_next" else int(image.sum()))
        torch.testing.assert_close(
            item_map.maps[0].flatten(), want[rows].mean(0)[place : place + height * width], **CLOSE
        )
        assert item_map.maps[0].max() > item_map.maps[0].min() > 0


def test_output_is_what_the_plain_model_says() -> None:
    for name in NAMES:
        family = wide_family(name)
        item = oracles.wide(family.item(text=6, seed=2))
        found = regard.object_maps(family.model, item, positions=[[-1]], max_new_tokens=4)
        assert found.output.tolist() == family.greedy(item, 4)[0].tolist(), name


def test_a_row_of_one_layer_sums_to_the_mean_head_weight() -> None:
    family = oracles.model("llava", layers=1)
    item = oracles.wide(family.item(text=6, seed=2))
    found = regard.object_maps(family.model, item, positions=[[-1], [-4]], regularise=False)
    family.model.set_attn_implementation("eager")
    with torch.no_grad():
        probs = family.model(**item, output_attentions=True).attentions[0][0]
    mean = probs.max(2).values.mean()
    for item_map in found.objects:
        torch.testing.assert_close(item_map.row.sum(), 1 + mean.to(item_map.row), **CLOSE)
    plain = regard.object_maps(
        family.model, item, positions=[[-1]], regularise=False, head_weights=False
    ).objects[0]
    torch.testing.assert_close(plain.row.sum().item(), 2.0)


def test_columns_of_one_layer_weigh_by_their_place() -> None:
    family = oracles.model("llava", layers=1)
    item = oracles.wide(family.item(text=6, seed=2))
    own, free = (
        regard.object_maps(family.model, item, positions=[[-1]], regularise=flag).objects[0].row
        for flag in (True, False)
    )
    count = len(own)
    ramp = torch.arange(1, count + 1).double() / count
    torch.testing.assert_close(own[:-1], (free * ramp)[:-1], **CLOSE)
    assert ramp[0] == 1 / count


def test_what_was_said_before_can_be_read_again() -> None:
    family = wide_family("llava")
    item = oracles.wide(family.item(text=6, seed=2))
    new = regard.object_maps(family.model, item, positions=[[-2]], max_new_tokens=4)
    old = regard.object_maps(family.model, item, positions=[[-2]], output=new.output)
    assert torch.equal(old.objects[0].row, new.objects[0].row)
    assert torch.equal(old.output, new.output)


def test_scores_have_the_models_own_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Granite or Gemma 2, where it is not one over the root of the head width."""
    plain = wide_family

    def scaled(name: str) -> Family:
        family = plain(name)
        for layer, module in enumerate(family.attentions):
            module.scaling = 0.1 * (layer + 1)  # type: ignore[assignment]
        return family

    monkeypatch.setitem(globals(), "wide_family", scaled)
    item = build("llava").item(text=6, seed=2)
    found = maps_of("llava", item, positions=[[-1]]).objects[0]
    torch.testing.assert_close(found.row, flow_matrix("llava", item, [])[-1], **CLOSE)


# ------------------------------------------------------------------------------------- batches, images


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_samples_of_a_batch_have_the_maps_that_they_have_alone(name: str) -> None:
    """Padded on the left; some stop early, and what follows their end is no part of them; one has no image."""
    family = wide_family(name)
    specs: list[dict[str, Any]] = [
        {"text": 9, "seed": 2},
        {"text": 4, "seed": 3, "images": 2},
        {"text": 6, "seed": 4, "image": False},
    ]
    alphabet = letters()
    said = spelt("a dog", "a cat dog", "cat")
    family.model.generation_config.eos_token_id = 2
    for row, length in enumerate((2, 5, 1)):
        said[row, length + 3 :] = 0
    said[0] = torch.tensor([*spelt("a dog")[0].tolist(), 2, 0, 0, 0])[: said.shape[1]]
    batch = oracles.wide(family.batch(specs))
    found = regard.object_maps(family.model, batch, ["dog", "cat"], processor=alphabet, output=said)
    seen = [(item.sample, item.word) for item in found.objects]
    assert seen == [(0, "dog"), (1, "cat"), (1, "dog"), (2, "cat")]
    for sample, spec in enumerate(specs):
        if sample == 2:
            continue
        alone = said[sample][said[sample] != 0][None]
        item = oracles.wide(family.item(**spec))
        own = regard.object_maps(family.model, item, ["dog", "cat"], processor=alphabet, output=alone)
        ours = [item for item in found.objects if item.sample == sample]
        for one, other in zip(ours, own.objects, strict=True):
            assert one.word == other.word
            assert len(one.maps) == len(other.maps) == spec.get("images", 1)
            for left, right in zip(one.maps, other.maps, strict=True):
                torch.testing.assert_close(left, right, **CLOSE)
    assert found.objects[-1].maps == ()


@pytest.mark.parametrize(("name", "size", "grid"), [("qwen2_vl", 1, (2, 3)), ("qwen3_vl", 2, (4, 2))])
def test_grids_need_not_be_square(name: str, size: int, grid: tuple[int, int]) -> None:
    item = build(name).item(text=5, images=2, size=size)
    found = maps_of(name, item, positions=[[-1]]).objects[0]
    want = flow_matrix(name, item, [])[-1][build(name).image_tokens(item)[0]]
    assert [tuple(field.shape) for field in found.maps] == [grid, grid]
    torch.testing.assert_close(torch.cat([field.flatten() for field in found.maps]), want, **CLOSE)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("size", [0, 2])
def test_a_map_of_tiles_covers_the_first_one(name: str, size: int) -> None:
    item = build(name).item(text=5, images=2, size=size)
    found = maps_of(name, item, positions=[[-1]]).objects[0]
    row = flow_matrix(name, item, [])[-1]
    places = build(name).image_tokens(item)[0].nonzero()[:, 0]
    starts = [int(place) for place in places if int(place) - 1 not in places.tolist()]
    assert len(found.maps) == 2
    for field, start in zip(found.maps, starts, strict=True):
        torch.testing.assert_close(field, row[start : start + 4].reshape(2, 2), **CLOSE)


def test_an_image_behind_the_word_has_a_map_of_zeros() -> None:
    item = build("llava").item(text=5, images=2)
    first = int(build("llava").image_tokens(item)[0].nonzero()[8])
    found = maps_of("llava", item, positions=[[first + 1]]).objects[0]
    assert found.maps[0].min() > 0
    assert found.maps[1].eq(0).all()


def test_a_grid_can_be_given() -> None:
    item = build("llava").item(text=5)
    found = maps_of("llava", item, positions=[[-1]], grid=(1, 9)).objects[0]
    assert found.maps[0].shape == (1, 9)
    with pytest.raises(regard.CannotEdit, match=r"9 image tokens are no images of grid \(2, 2\)"):
        maps_of("llava", item, positions=[[-1]], grid=(2, 2))


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_images_that_fill_up_a_batch_are_no_images(name: str) -> None:
    family = wide_family(name)
    batch = family.batch([{"text": 9, "seed": 2}, {"text": 4, "seed": 3, "images": 2}])
    said = spelt("dog", "dog")
    found = regard.object_maps(family.model, oracles.wide(batch), ["dog"], processor=letters(), output=said)
    assert [[tuple(field.shape) for field in item.maps] for item in found.objects] == [
        [(2, 2)],
        [(2, 2), (2, 2)],
    ]


# ----------------------------------------------------------------------------------------------- words


def letters() -> Any:
    """A tokenizer of letters: "dog" is d, ##o, ##g; ids from FIRST_TEXT on, below the zoo's vocabulary."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = "abcdefghijklmnopqrstuvwxyz"
    table = {f"<{number}>": number for number in range(FIRST_TEXT)}
    table |= {word: FIRST_TEXT + number for number, word in enumerate((*alphabet, ".", ","))}
    table |= {f"##{letter}": len(table) + number for number, letter in enumerate(alphabet)}
    assert len(table) <= VOCAB
    core = Tokenizer(models.WordPiece(table, unk_token="<7>", max_input_chars_per_word=50))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<7>", pad_token="<0>", bos_token="<1>", eos_token="<2>"
    )


def spelt(*texts: str) -> Tensor:
    """Ids (B, T), padded on the right with 0."""
    rows = [letters()(text, add_special_tokens=False)["input_ids"] for text in texts]
    out = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return out


def pieces_of(text: str, words: list[str]) -> list[tuple[str, tuple[int, ...]]]:
    """The word and its tokens, counted from the first of the output."""
    item = build("llava").item(text=5)
    found = maps_of("llava", item, words=words, processor=letters(), output=spelt(text))
    prompt = item["input_ids"].shape[1]
    return [(item.word, tuple(place - prompt for place in item.tokens)) for item in found.objects]


def test_every_mention_of_a_whole_word_is_found_with_all_its_pieces() -> None:
    assert pieces_of("a dog, a cat.", ["cat", "dog"]) == [("dog", (1, 2, 3)), ("cat", (6, 7, 8))]
    assert pieces_of("dog and dogs", ["dog"]) == [("dog", (0, 1, 2)), ("dog", (6, 7, 8, 9))]
    assert pieces_of("hotdog dog", ["Dog "]) == [("Dog ".strip(), (6, 7, 8))]
    assert pieces_of("a hot dog.", ["hot dog"]) == [("hot dog", (1, 2, 3, 4, 5, 6))]
    with pytest.raises(regard.NoObjectWords, match="'dog' is in the output, which reads 'hotdog dogma'"):
        pieces_of("hotdog dogma", ["dog"])


def test_pieces_are_averaged() -> None:
    item = build("llava").item(text=5)
    said = spelt("a dog")
    found = maps_of("llava", item, words=["dog"], processor=letters(), output=said).objects[0]
    want = flow_matrix("llava", item, said[0].tolist())[-3:].mean(0)
    torch.testing.assert_close(found.row, want, **CLOSE)


def test_words_of_the_prompt_count_behind_the_image_where_nothing_was_said() -> None:
    family = wide_family("llava")
    item = family.item(text=5)
    dog = spelt("dog")
    ids = torch.cat([item["input_ids"][:, :1], dog, item["input_ids"][:, 1:], dog], 1)
    item |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = maps_of("llava", item, words=["dog"], processor=letters())
    assert [item_map.tokens for item_map in found.objects] == [tuple(range(ids.shape[1] - 3, ids.shape[1]))]
    assert found.output.shape == (1, 0)


def test_a_letter_of_several_bytes_belongs_to_all_of_its_tokens() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    table = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(table, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    bytewise = PreTrainedTokenizerFast(tokenizer_object=core)
    text, spans = spoken.spans(bytewise("a né b")["input_ids"], bytewise)
    assert text == "a né b"
    # the first byte of the letter shows nothing yet
    assert spans == [(0, 1), (1, 2), (2, 3), (3, 3), (3, 4), (4, 5), (5, 6)]
    _, words = spoken.words_of(bytewise("a né b")["input_ids"], bytewise)
    assert [(word.text, word.first, word.last) for word in words] == [("a", 0, 1), ("né", 2, 5), ("b", 6, 7)]
    assert spoken.by_word(torch.arange(7.0), words).tolist() == [0.0, 3.0, 6.0]


# --------------------------------------------------------------------------------------------- edits


def test_the_model_is_as_before() -> None:
    family = wide_family("qwen2_vl")
    item = oracles.wide(family.item(text=6))
    before = family.model(**item).logits
    regard.object_maps(family.model, item, positions=[[-1]], max_new_tokens=2)
    assert torch.equal(family.model(**item).logits, before)
    assert family.decoder.config._attn_implementation == "sdpa"


def test_edits_that_are_on_are_in_the_maps() -> None:
    family = wide_family("llava")
    item = oracles.wide(family.item(text=6))

    def blind(call: Any) -> Tensor:
        return torch.zeros(1, 1, 1, call.key.shape[2]).masked_fill(call.image[:, None, None], -torch.inf)

    with regard.apply(family.model, regard.Bias(tuple(range(family.text_layers)), blind)):
        found = regard.object_maps(family.model, item, positions=[[-1]])
    assert found.objects[0].maps[0].eq(0).all()
    assert found.objects[0].row[0] > 0


def test_half_precision_has_maps_in_single() -> None:
    family = build("llava")
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in family.item(text=6).items()}
    found = regard.object_maps(family.model.bfloat16(), half, positions=[[-1]], max_new_tokens=2).objects[0]
    assert found.maps[0].dtype == torch.float32
    assert found.maps[0].min() > 0


# ----------------------------------------------------------------------------------------- miniature


def test_the_miniature_looks_at_what_it_names() -> None:
    """More of a word's map is in its own boxes than in boxes elsewhere, and than of other words' maps is."""
    from regard.evals.miniature.language import DETAIL_PROMPT, plural
    from regard.evals.miniature.probe import held_out, prompt

    model, processor = regard.load_miniature("lvlm")
    own, moved, others = [], [], []
    for scene in held_out(6, 930_000_000):
        inputs = processor(images=[scene.image], text=[prompt(processor, DETAIL_PROMPT)], return_tensors="pt")
        names = {form: name for name in scene.categories for form in (name, plural(name))}
        found = regard.object_maps(model, inputs, list(names), processor=processor, max_new_tokens=100)
        maps = {names[item.word]: item.maps[0] / item.maps[0].sum() for item in found.objects}
        for name, field in maps.items():
            cover = torch.zeros(64, 64)
            for left, top, width, height in (item.bbox for item in scene.objects if item.category == name):
                box = slice(int(top), math.ceil(top + height)), slice(int(left), math.ceil(left + width))
                cover[box] = 1
            cover = cover.reshape(8, 8, 8, 8).mean((1, 3))
            own.append(float((field * cover).sum()))
            moved.append(float((field * cover.roll((4, 4), (0, 1))).sum()))
            others += [float((other * cover).sum()) for word, other in maps.items() if word != name]
    assert len(own) > 15
    mean = sum(own) / len(own)
    assert mean > 1.5 * sum(moved) / len(moved)
    assert mean > 1.1 * sum(others) / len(others)


def test_the_zoo_has_heads_to_weigh() -> None:
    """Weights that were all one would not be seen to matter."""
    assert HEADS > 1
    item = build("llava").item(text=6)
    weighed, mean = (
        maps_of("llava", item, positions=[[-1]], head_weights=flag).objects[0] for flag in (True, False)
    )
    shares = [one.maps[0] / one.maps[0].sum() for one in (weighed, mean)]
    assert (shares[0] - shares[1]).abs().max() > 1e-3
