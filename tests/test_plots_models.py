"""`regard.plots` of language models: values, words, places in pixels and shares, read back from what was drawn."""

from dataclasses import replace
from itertools import combinations

import drawings
import matplotlib
import numpy as np
import pytest
import torch
from drawings import IMAGE, TOKENS, boxes, field, panels, shares, title_of
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

import regard
from regard import plots
from regard.hooks.errors import NoObjectWords
from regard.interventions.divergence import Divergence
from regard.plots import look

lvlm = pytest.fixture(name="lvlm")(drawings.lvlm)
found = pytest.fixture(name="found")(drawings.divergence)
runs = pytest.fixture(name="runs")(drawings.runs)


@pytest.fixture(scope="module")
def pieces():
    """A tokenizer that cuts words in pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = "[UNK] a man with two sur ##f ##board ##s at the dining table ##ware . cat ##apult".split()
    tokenizer = Tokenizer(models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def test_vhd_is_the_image_and_dots_are_the_upper_half_of_each_layer(found):
    figure = plots.vhd(found)
    axes, bar = figure.axes
    assert np.allclose(field(axes), found.vhd)
    dots = set(zip(*(line.tolist() for line in map(np.asarray, axes.lines[0].get_data())), strict=True))
    upper = {
        (head, layer)
        for layer, row in enumerate(found.vhd.tolist())
        for head in sorted(range(8), key=lambda head: row[head])[4:]
    }
    assert dots == upper
    assert (axes.get_xlabel(), axes.get_ylabel(), bar.get_ylabel()) == ("head", "layer", "squared distance")
    axes, bar = plots.vhd(found, scale="layer", mark=None).axes
    assert not axes.lines
    assert np.allclose(field(axes), found.vhd / found.vhd.amax(1, keepdim=True))
    assert "largest of the layer" in bar.get_ylabel()


@pytest.mark.parametrize("shape", [(32, 32), (1, 1), (48, 1), (2, 40)])
def test_vhd_of_other_shapes(shape):
    layers = tuple(range(3, 3 + shape[0]))
    figure = plots.vhd(Divergence(torch.rand(shape), torch.zeros(0), torch.zeros(0), layers))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    low, high = sorted(axes.get_ylim())
    at = [tick for tick in axes.get_yticks() if low < tick < high]
    names = [axes.yaxis.get_major_formatter()(tick) for tick in at]
    assert names == [str(layers[round(tick)]) for tick in at]
    assert 1 <= len(names) <= 9
    cell = (
        72
        * min(axes.get_window_extent().width / shape[1], axes.get_window_extent().height / shape[0])
        / figure.dpi
    )
    assert axes.lines[0].get_markersize() < cell


def test_vhd_of_a_batch_and_bad_values(found):
    batch = replace(found, vhd=torch.rand(3, 4, 5), layers=(0, 1, 2, 3))
    assert np.allclose(field(plots.vhd(batch, sample=-1).axes[0]), batch.vhd[2])
    with pytest.raises(ValueError, match="no sample 3: there are 3"):
        plots.vhd(batch, sample=3)
    broken = found.vhd.clone()
    broken[2, 5] = torch.nan
    with pytest.raises(ValueError, match=r"nan at \(2, 5\)"):
        plots.vhd(replace(found, vhd=broken))
    with pytest.raises(ValueError, match=r"\(layers, heads\).*not \(4,\)"):
        plots.vhd(replace(found, vhd=torch.rand(4)))
    with pytest.raises(ValueError, match="mark='top'"):
        plots.vhd(found, mark="top")
    zero = plots.vhd(replace(found, vhd=torch.zeros(6, 8)), scale="layer").axes[0]
    assert not field(zero).any()
    assert not len(zero.lines[0].get_xdata())


def bars(axes):
    words = [label.get_text() for label in axes.get_xticklabels()]
    return list(zip(words, axes.patches, axes.get_xticklabels(), strict=True))


def marked(axes):
    """Words that differ by hatch, by colour and by bold letters; the three agree."""
    ways = [
        [at for at, (_, bar, _) in enumerate(bars(axes)) if bar.get_hatch()],
        [at for at, (_, bar, _) in enumerate(bars(axes)) if bar.get_facecolor() != rgba(look.BLUE)],
        [at for at, (_, _, label) in enumerate(bars(axes)) if label.get_fontweight() == "bold"],
    ]
    assert ways[0] == ways[1] == ways[2]
    return [bars(axes)[at][0] for at in ways[0]]


def rgba(colour):
    return matplotlib.colors.to_rgba(colour)


def test_pieces_are_words_with_the_largest_of_their_values(pieces):
    text = "a man with two surfboards at the dining tableware . a cat a catapult"
    tokens = torch.tensor(pieces(text)["input_ids"])
    values = torch.rand(len(tokens)) + 0.5
    found = Divergence(torch.rand(2, 2), values, tokens, (0, 1))
    figure = plots.t_vhd(found, pieces, hallucinated=["Surfboard", "dining tableware", "cat"])
    axes = figure.axes[0]
    names = pieces.convert_ids_to_tokens(tokens.tolist())
    heights = []
    for name, value in zip(names, values.tolist(), strict=True):
        if name.startswith("##"):
            heights[-1] = max(heights[-1], value)
        else:
            heights.append(value)
    assert [word for word, _, _ in bars(axes)] == text.split()
    assert np.allclose([bar.get_height() for _, bar, _ in bars(axes)], heights)
    assert marked(axes) == ["surfboards", "dining", "tableware", "cat"]
    assert [entry.get_text() for entry in axes.get_legend().get_texts()] == ["hallucinated", "other words"]
    assert "squared" in axes.get_ylabel()
    with pytest.raises(NoObjectWords, match=r"'board' is not in the answer, which reads 'a man"):
        plots.t_vhd(found, pieces, hallucinated=["board"])


@pytest.mark.parametrize(("count", "lines"), [(1, [1]), (40, [40]), (41, [21, 20]), (130, [33, 33, 33, 31])])
def test_long_captions_go_on_below_on_one_scale(count, lines):
    words = [f"{'long' * (at % 4)}word{at}" for at in range(count)]
    found = Divergence(torch.rand(1, 1), torch.arange(count) + 1.0, torch.arange(count), (0,))
    figure = plots.t_vhd(found, words, hallucinated=[words[-1]])
    figure.draw_without_rendering()
    assert [len(bars(axes)) for axes in figure.axes] == lines
    assert [word for axes in figure.axes for word, _, _ in bars(axes)] == words
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    assert marked(figure.axes[-1]) == [words[-1]]
    labels = [label.get_window_extent() for _, _, label in bars(figure.axes[0])]
    assert not any(one.overlaps(other) for one, other in combinations(labels, 2))
    assert figure.bbox.y0 <= min(box.y0 for box in labels)


def test_captions_that_cannot_be_drawn(found, lvlm):
    processor = lvlm[1]
    with pytest.raises(ValueError, match=r"'dog'.*give \['dog'\]"):
        plots.t_vhd(found, processor, hallucinated="dog")
    with pytest.raises(ValueError, match=f"{TOKENS} texts, one for each token; got 2 texts"):
        plots.t_vhd(found, ["a", "dog"])
    with pytest.raises(ValueError, match="max_new_tokens="):
        plots.t_vhd(replace(found, tokens=found.tokens[:0], t_vhd=found.t_vhd[:0]), processor)
    with pytest.raises(ValueError, match="t_vhd has 3 values"):
        plots.t_vhd(replace(found, t_vhd=found.t_vhd[:3]), processor)


@pytest.mark.parametrize("layer", [4, None])
def test_sinks_are_outlined_and_both_maps_have_one_scale(runs, layer):
    plain, edited = runs
    token, read = 7, slice(None) if layer is None else slice(layer, layer + 1)
    picture, without, having, _ = panels(plots.sinks(IMAGE, plain, edited, token=token, layer=layer))
    where = plain.sinks[0][read].any(0)
    assert where.any()
    want = sorted((8 * x - 0.5, 8 * y - 0.5, 8 * x + 7.5, 8 * y + 7.5) for y, x in where.nonzero().tolist())
    assert np.allclose(boxes(picture), want)
    assert np.array_equal(field(picture), np.asarray(IMAGE) / 255)
    tops = []
    for axes, run in ((without, plain), (having, edited)):
        shown = run.maps[0][token, read].mean(0)
        assert np.allclose(field(axes), shown)
        tops.append(float(shown[~run.sinks[0][read].any(0)].max()))
        masses = run.masses[token, read].mean((0, 1)).tolist()
        group = dict(zip(run.groups, masses, strict=True))
        want = [group["image"] + group["image sink"], group["image sink"]]
        assert shares(axes) == pytest.approx(want, abs=6e-4)
    assert without.images[-1].get_clim() == having.images[-1].get_clim() == (0, pytest.approx(max(tops)))
    assert "without VAR" in title_of(without)
    assert "with VAR" in title_of(having)


def test_sinks_are_clipped_and_the_bar_says_so(runs):
    plain = runs[0]
    strong = plain.maps[0].masked_fill(plain.sinks[0], 0.5)
    figure = plots.sinks(IMAGE, replace(plain, maps=(strong,)))
    shown = field(panels(figure)[1])
    others = shown[~plain.sinks[0].any(0).numpy()]
    assert panels(figure)[1].images[-1].get_clim()[1] == pytest.approx(others.max())
    assert shown.max() > others.max()
    assert "layers" in title_of(panels(figure)[0])
    bar = panels(figure)[-1]
    assert len(bar.patches) == 1, "the arrow at the upper end"
    assert not panels(plots.attention(IMAGE, plain))[-1].patches


def test_attention_of_a_word_lies_where_the_processor_looked(lvlm, runs):
    plain, processor = runs[0], lvlm[1]
    words = processor.decode(plain.tokens).split()
    token = words.index("picture")
    picture, map_, bar = panels(plots.attention(IMAGE, plain, token="Picture", processor=processor, layer=1))
    assert np.allclose(field(map_), plain.maps[0][token, 1])
    assert "“Picture”" in map_.get_xlabel()
    assert "probability" in bar.get_ylabel()
    wide = IMAGE.resize((640, 320))
    clip = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336)
    picture, map_, _ = panels(plots.attention(wide, plain, processor=clip))
    assert map_.images[-1].get_extent() == [159.5, 479.5, 319.5, -0.5]
    assert np.allclose(field(map_), plain.maps[0].mean((0, 1)))
    assert boxes(picture) == [(159.5, -0.5, 479.5, 319.5)], "what was cut out is dashed"
    sinks = [
        box for box in boxes(panels(plots.sinks(wide, plain, processor=clip))[0]) if box[2] - box[0] < 50
    ]
    assert len(sinks) == int(plain.sinks[0].any(0).sum())
    assert all(box[2] - box[0] == 40 and box[0] >= 159.5 and box[2] <= 479.5 for box in sinks)


def test_pictures_of_every_kind_are_the_same(runs):
    array = np.asarray(IMAGE)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for picture in (IMAGE, array, array / 255, tensor, tensor[None] / 255, IMAGE.convert("RGBA")):
        assert np.allclose(field(panels(plots.attention(picture, runs[0]))[0]), array / 255, atol=1e-6)
    assert field(panels(plots.attention(IMAGE.convert("L"), runs[0]))[0]).shape == (64, 64, 3)
    with pytest.raises(ValueError, match="not its pixel_values"):
        plots.attention(tensor / 255 - 0.5, runs[0])
    with pytest.raises(ValueError, match=r"shape \(2, 64, 64, 3\)"):
        plots.attention(np.stack([array, array]), runs[0])


def test_attention_that_cannot_be_drawn(lvlm, runs):
    plain, edited = runs
    for wrong, message in (
        ({"token": TOKENS}, f"no token {TOKENS}: there are {TOKENS}"),
        ({"layer": 6}, "no layer 6: the layers are 0, 1"),
        ({"image": 1}, "no image 1: there are 1"),
        ({"token": "dog"}, "pass processor="),
        ({"token": "spaceship", "processor": lvlm[1]}, "not in the answer"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.attention(IMAGE, plain, **wrong)
    with pytest.raises(ValueError, match="sink_dims="):
        plots.sinks(IMAGE, replace(plain, sinks=None))
    with pytest.raises(ValueError, match=r"output=plain.tokens"):
        plots.sinks(IMAGE, plain, replace(edited, tokens=edited.tokens.flip(0)), token=3)
    with pytest.raises(ValueError, match="groups differ"):
        plots.masses(plain, replace(edited, groups=edited.groups[::-1]))
    with pytest.raises(ValueError, match="maps differ in shape"):
        plots.sinks(IMAGE, plain, replace(edited, maps=(edited.maps[0][..., :4],)))


def test_the_prompt_alone_has_one_row(lvlm):
    model, processor, inputs = lvlm
    prompt = regard.attention(model, inputs)
    for figure in (plots.attention(IMAGE, prompt, token=-1), plots.sinks(IMAGE, prompt)):
        assert panels(figure)[1].get_xlabel() == "last row of the prompt"
    assert title_of(plots.masses(prompt).axes[0]) == "last row of the prompt"
    with pytest.raises(ValueError, match="max_new_tokens="):
        plots.attention(IMAGE, prompt, token="dog", processor=processor)


@pytest.mark.parametrize("token", [None, 11])
def test_masses_are_stacked_group_on_group(runs, token):
    layers = (2, 3, 5, 8, 9, 13)  # as where some blocks have cross-attention
    given = [replace(run, layers=layers) for run in runs]
    axes = plots.masses(*given, token=token).axes
    for place, run in zip(axes, given, strict=True):
        want = (run.masses.mean(0) if token is None else run.masses[token]).mean(1)
        assert len(place.containers) == len(run.groups)
        floor = torch.zeros(6)
        for number, group in enumerate(place.containers):
            heights = [bar.get_height() for bar in group]
            assert np.allclose(heights, want[:, number], atol=1e-6)
            assert np.allclose([bar.get_y() for bar in group], floor, atol=1e-6)
            floor += want[:, number]
        name = place.xaxis.get_major_formatter()
        assert [name(at) for at in range(6)] == [str(layer) for layer in layers]
    legend = {text.get_text() for text in axes[-1].get_legend().get_texts()}
    assert legend == set(runs[0].groups)
    assert axes[0].get_ylabel() == "share of attention"
    assert axes[0].get_xlabel() == "layer"
    assert axes[0].get_ylim() == axes[1].get_ylim()


def test_flow_of_a_word():
    word = drawings.flow()
    _, over, bar = panels(plots.flow(IMAGE, word))
    assert np.allclose(field(over), word.maps[0])
    assert "“picture”" in title_of(over)
    assert "flow" in bar.get_ylabel()
    with pytest.raises(ValueError, match="no image 2"):
        plots.flow(IMAGE, word, image=2)
    with pytest.raises(ValueError, match="behind the word"):
        plots.flow(IMAGE, replace(word, maps=(torch.zeros(8, 8),)))
