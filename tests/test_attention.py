"""`regard.attention` against probs that plain code forms: one sample, whole sequences, no cache, float64."""

import pytest
import torch
from families import FAMILY_NAMES, build
from oracles import FORCED, SINK_DIMS, VARReference, model, plain_attention, plant_sinks, sequence, wide

import regard
from regard.kernels.policies import Drop

LAYERS = (2, 3)
VAR = regard.VAR(transfer=0.6, rho=0.3, tau=4.0, min_visual=0.05, sink_dims=SINK_DIMS, layers=LAYERS)
GRIDLESS = ("instructblip", "blip2", "mllama")


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def family(request):
    found = model(request.param)
    plant_sinks(found)
    return found


@torch.no_grad()
def rows_of(family, item, edit=None):
    """(T, L, H, K) probs of the rows that chose FORCED, and the sequence."""
    whole, kept = sequence(family, item), {}

    def keep(layer, probs):
        kept[layer] = probs if edit is None else edit(layer, probs, whole)
        return kept[layer]

    with plain_attention(family, keep):
        family.model(**whole.inputs, use_cache=False)
    return torch.stack([kept[layer][:, whole.prompt - 1 :] for layer in sorted(kept)]).permute(
        2, 0, 1, 3
    ), whole


def close(found, want):
    torch.testing.assert_close(found.double(), want, atol=1e-6, rtol=1e-5)


def assert_same(found, want, whole):
    """Maps and masses of an Attention against rows (T, L, H, K)."""
    image = whole.image.nonzero()[:, 0]
    close(found.maps[0].flatten(2), want.mean(2)[:, :, image])
    where = {name: number for number, name in enumerate(found.groups)}
    of_image = sum(found.masses[..., where[name]] for name in found.groups if name.startswith("image"))
    close(of_image, want[..., image].sum(-1))
    close(found.masses[..., where["answer"]], want[..., whole.prompt :].sum(-1))
    close(found.masses.sum(-1), want.sum(-1))


def test_rows_of_the_plain_model(family):
    item = family.item(seed=1)
    found = regard.attention(family.model, wide(item), output=torch.tensor(FORCED))
    want, whole = rows_of(family, item)
    assert found.tokens.tolist() == list(FORCED)
    assert found.groups == ("first token", "prompt", "image", "answer")
    assert found.sinks is None
    assert_same(found, want, whole)
    close(found.masses[..., 0], want[..., 0])


def test_rows_with_var_are_those_that_var_left(family):
    item = family.item(seed=1)
    with regard.apply(family.model, VAR):
        found = regard.attention(
            family.model, wide(item), output=torch.tensor([FORCED]), sink_dims=SINK_DIMS, tau=VAR.tau
        )
    entering, sinks = {}, {}
    reference = VARReference(family, LAYERS, 1 - VAR.transfer, 1 - VAR.rho, VAR.tau, VAR.min_visual)
    hooks = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs, layer=layer: entering.__setitem__(
                layer, (args[0] if args else kwargs["hidden_states"])[0]
            ),
            with_kwargs=True,
        )
        for layer, block in enumerate(family.decoder.layers)
    ]

    def edit(layer, probs, whole):
        edited = reference.edit(layer, probs, entering[layer], whole)
        sinks[layer] = reference.sinks[layer]
        return edited if layer in LAYERS else probs

    want, whole = rows_of(family, item, edit)
    [hook.remove() for hook in hooks]
    assert any(row >= whole.prompt for layer, _, row in reference.selected if layer in LAYERS)
    assert_same(found, want, whole)
    image = whole.image.nonzero()[:, 0].tolist()
    for layer in range(family.text_layers):
        seen = found.sinks[0][layer].flatten().nonzero()[:, 0].tolist()
        assert seen == [image.index(sink) for sink in sinks[layer] if sink in image]
    place = found.groups.index("text sink")
    text = [[sink for sink in sinks[layer] if sink not in image] for layer in range(family.text_layers)]
    close(
        found.masses[..., place], torch.stack([want[:, n, :, own].sum(-1) for n, own in enumerate(text)], 1)
    )


def test_rows_with_a_bias_of_the_newest_row_and_two_policies(family):
    """The bias acts before the softmax on one path with policies and on another without; heads are chosen."""
    item, heads = family.item(seed=2), (1, 4)

    def bias(call):
        return call.image[:, None, None].to(call.query.dtype) * 1.5

    def halves(call):
        return (torch.arange(call.session.prompt) % 2)[None]

    def thirds(call):
        return (torch.arange(call.session.prompt) % 3)[None]

    def half(masses):
        return torch.stack([torch.ones_like(masses[..., 0]), 0.5 + masses[..., 1]], -1)

    edits = [
        regard.Bias((1, 2), bias, heads=heads, rows="last"),
        regard.MassPolicy((2, 3), halves, half, ("even", "odd"), rows="all"),
        regard.MassPolicy((3,), thirds, Drop((1,)), ("a", "b", "c")),
    ]
    with regard.apply(family.model, *edits):
        found = regard.attention(family.model, wide(item), output=torch.tensor(FORCED))

    def edit(layer, probs, whole):
        probs, (count, prompt) = probs.clone(), (probs.shape[1], whole.prompt)
        if layer in (1, 2):
            for head in heads:
                raised = probs[head, prompt - 1 :] * torch.where(whole.image, torch.e**1.5, 1.0)
                probs[head, prompt - 1 :] = raised / raised.sum(-1, keepdim=True)
        if layer in (2, 3):
            odd = (torch.arange(count) % 2 == 1) & (torch.arange(count) < prompt)
            share = probs[..., odd].sum(-1, keepdim=True)
            probs[..., odd] *= 0.5 + share
        if layer == 3:
            last = int(whole.image.nonzero().max())
            dropped = (torch.arange(count) % 3 == 1) & (torch.arange(count) < prompt)
            tail = probs[:, last + 1 :]
            before, tail[..., dropped] = tail.sum(-1, keepdim=True), 0
            probs[:, last + 1 :] = tail / tail.sum(-1, keepdim=True) * torch.ones_like(before)
        return probs

    assert_same(found, *rows_of(family, item, edit))


@pytest.mark.parametrize("name", [name for name in FAMILY_NAMES if name not in GRIDLESS])
def test_every_family_against_its_own_eager_attention(name):
    family = build(name)
    item = family.item(seed=3)
    found = regard.attention(family.model, item, max_new_tokens=3)
    whole = item
    for token in found.tokens[:-1]:
        whole = family.grow(whole, token[None])
    family.decoder.set_attn_implementation("eager")
    with torch.no_grad():
        eager = family.model(**whole, use_cache=False, output_attentions=True).attentions
    family.decoder.set_attn_implementation("sdpa")
    want = torch.stack(eager)[:, 0, :, item["input_ids"].shape[1] - 1 :].permute(2, 0, 1, 3)
    image = family.image_tokens(whole)[0]
    place = found.groups.index("image")
    torch.testing.assert_close(found.masses[..., place], want[..., image].sum(-1), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.masses.sum(-1), torch.ones_like(want[..., 0]), atol=2e-5, rtol=0)
    shown = sum(maps.flatten(2).sum(-1) for maps in found.maps)
    assert (shown <= found.masses[..., place].mean(2) + 1e-5).all()


def test_reading_changes_nothing_and_padding_does_not_count(family):
    item = wide(family.item(seed=4))
    ids = family.model.generate(**item, max_new_tokens=4, do_sample=False)
    found = regard.attention(family.model, item, max_new_tokens=4)
    assert torch.equal(ids[0, item["input_ids"].shape[1] :], found.tokens)
    padded = regard.attention(family.model, wide(family.item(seed=4, pad=3)), max_new_tokens=4)
    torch.testing.assert_close(padded.maps, found.maps)
    torch.testing.assert_close(padded.masses, found.masses)
    only = regard.attention(family.model, item)
    assert only.tokens.numel() == 0
    torch.testing.assert_close(only.masses, found.masses[:1])


def test_a_static_cache_and_a_prompt_in_chunks_read_the_same(family):
    item = wide(family.item(seed=4))
    want = regard.attention(family.model, item, max_new_tokens=4)
    found = regard.attention(family.model, {**item, "cache_implementation": "static"}, max_new_tokens=4)
    torch.testing.assert_close(found.masses, want.masses)
    chunks = regard.attention(family.model, {**item, "prefill_chunk_size": 5}, max_new_tokens=4)
    torch.testing.assert_close(chunks.masses, want.masses)


def test_refusals(family):
    item = wide(family.item(seed=5))
    with pytest.raises(ValueError, match=r"one prompt at a time.*\(2, "):
        regard.attention(family.model, wide(family.inputs(2)))
    with pytest.raises(ValueError, match="either output or max_new_tokens"):
        regard.attention(family.model, item, 3, output=torch.tensor([1]))
    with pytest.raises(ValueError, match=r"not \(2, 3\)"):
        regard.attention(family.model, item, output=torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="without tau"):
        regard.attention(family.model, item, sink_dims=(5,))
    with pytest.raises(ValueError, match=r"channels of the decoder"):
        regard.attention(family.model, item, sink_dims=(5000,), tau=6.0)
    with pytest.raises(regard.CannotEdit, match="leave the decoder"), regard.apply(family.model, "dyvte"):
        regard.attention(family.model, item, 2)
    with pytest.raises(regard.CannotEdit, match="places of the image"):
        regard.attention(build("instructblip").model, build("instructblip").item())
