"""`regard.plots` of diffusion and of vision towers: values and places in pixels, read back from what was drawn."""

from dataclasses import replace

import drawings
import matplotlib
import numpy as np
import pytest
import torch
from drawings import IMAGE, boxes, field, outliers, panels, shares, title_of, towers
from matplotlib.patches import PathPatch

from regard import plots

heat = pytest.fixture(name="heat")(drawings.heat)


def test_word_maps_step_by_step(heat):
    figure = plots.word_maps(heat)
    picture, *maps, bar = panels(figure)
    assert np.array_equal(field(picture), np.asarray(heat.images[0]) / 255)
    want = [own for word in range(2) for own in (*heat.by_step[0, :, word], heat.by_step[0, :, word].mean(0))]
    assert len(maps) == 8
    assert all(np.allclose(field(axes), own) for axes, own in zip(maps, want, strict=True))
    assert all(axes.images[0].get_clim() == (0, pytest.approx(float(heat.by_step.max()))) for axes in maps)
    assert [axes.get_title() for axes in maps[:4]] == ["step 0", "step 1", "step 2", "mean"]
    assert [axes.get_ylabel() for axes in maps[::4]] == ["banana", "person"]
    assert bar.get_ylabel() == "probability"
    _, one, mean, _ = panels(plots.word_maps(heat, steps=[-1], words=["person"]))
    assert np.allclose(field(one), heat.by_step[0, 2, 1])
    assert np.allclose(field(mean), heat.mean[0, 1])
    for wrong, message in (
        ({"words": ["cat"]}, "'cat'.*banana"),
        ({"steps": [3]}, "no step 3"),
        ({"image": 1}, "no picture 1"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.word_maps(heat, **wrong)


def test_long_runs_show_six_steps(heat):
    many = replace(heat, by_step=torch.rand(1, 50, 2, 4, 4))
    titles = [axes.get_title() for axes in panels(plots.word_maps(many))[1:8]]
    assert titles == [*(f"step {at}" for at in (0, 10, 20, 29, 39, 49)), "mean"]


def test_masks_cover_their_cells_and_no_others(heat):
    masks = torch.rand(3, 8, 8) > 0.5
    masks[:, 0, 0], masks[:, 7, 7], masks[0] = False, True, False
    figure = plots.masks(heat.images[0], masks, ["banana", "person", "dog"])
    axes = figure.axes[0]
    assert title_of(axes) == "nowhere: banana"
    fills = [patch for patch in axes.patches if isinstance(patch, PathPatch) and patch.get_fill()]
    hatched = [patch.get_hatch() for patch in axes.patches if patch.get_hatch()]
    assert len(fills) == len(set(hatched)) == len({patch.get_facecolor() for patch in fills}) == 2
    middles = [(8 * x + 3.5, 8 * y + 3.5) for y in range(8) for x in range(8)]
    for mask, fill, lines, label in zip(masks[1:], fills, axes.collections, axes.texts, strict=True):
        inside = [any(part.contains_point(at) for part in _parts(fill)) for at in middles]
        assert inside == mask.flatten().tolist()
        x, y = label.get_position()
        assert mask[int((y + 0.5) // 8), int((x + 0.5) // 8)]
        segments = {tuple(map(tuple, segment)) for segment in lines.get_segments()}
        assert segments == _border(mask.tolist())
    assert [text.get_text() for text in axes.texts] == ["person", "dog"]


def _parts(patch):
    return [matplotlib.path.Path(ring) for ring in patch.get_path().to_polygons()]


def _border(mask):
    """Sides between a chosen cell of 8 pixels and one that is not."""

    def on(y, x):
        return 0 <= y < 8 and 0 <= x < 8 and mask[y][x]

    found = set()
    for y in range(9):
        for x in range(9):
            if on(y, x) != on(y - 1, x):
                found.add(((8 * x - 0.5, 8 * y - 0.5), (8 * x + 7.5, 8 * y - 0.5)))
            if on(y, x) != on(y, x - 1):
                found.add(((8 * x - 0.5, 8 * y - 0.5), (8 * x - 0.5, 8 * y + 7.5)))
    return found


def test_boxes_are_masks():
    axes = plots.masks(IMAGE, [[0.25, 0, 0.5, 1], [0.5, 0.5, 1, 0.75]]).axes[0]
    fills = [patch.get_path().get_extents().bounds for patch in axes.patches if patch.get_fill()]
    assert fills == [(15.5, -0.5, 16, 64), (31.5, 31.5, 32, 16)]


def test_masks_that_cannot_be_drawn():
    for masks, names, message in (
        (torch.ones(8, 8), None, r"\(subjects, height, width\).*not \(8, 8\)"),
        (torch.ones(2, 4, 4), ["a"], "2 masks and 1 names"),
        (torch.zeros(2, 4, 4), None, "all masks are empty, of subject 0, subject 1"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.masks(IMAGE, masks, names)


# ---- towers -------------------------------------------------------------------------------------


def test_outliers_on_the_picture_and_on_the_map():
    found = outliers(grid=(4, 8))
    picture, over, _ = panels(plots.outliers(IMAGE.resize((160, 80)), found, image=1))
    want = sorted(
        (20 * x - 0.5, 20 * y - 0.5, 20 * x + 19.5, 20 * y + 19.5)
        for y, x in found.chosen[1].nonzero().tolist()
    )
    assert np.allclose(boxes(picture), want)
    assert np.allclose(boxes(over), want)
    assert np.allclose(field(over), found.probs[1])
    assert shares(over) == pytest.approx([float(found.probs[1][found.chosen[1]].sum())], abs=6e-4)
    assert "layer 22" in title_of(over)
    with pytest.raises(ValueError, match="no image 2: there are 2"):
        plots.outliers(IMAGE, found, image=2)


def test_towers():
    heads = towers()
    axes, bar = plots.importance(heads).axes
    assert np.allclose(field(axes), heads.importance)
    assert axes.images[0].get_clim()[0] == pytest.approx(float(heads.importance.min()))
    labels = axes.get_xlabel(), axes.get_ylabel(), bar.get_ylabel()
    assert labels == ("head", "layer", "change when pruned")
    with pytest.raises(ValueError, match="importance=True"):
        plots.importance(replace(heads, importance=None))
    for pixels, want in ((False, heads.distance), (True, heads.pixel_distance)):
        axes = plots.distance(heads, pixels=pixels).axes[0]
        across, up = axes.lines[0].get_data()
        assert np.allclose(up, want.flatten())
        assert across.tolist() == [layer for layer in range(5) for _ in range(4)]
        assert np.allclose(axes.lines[1].get_ydata(), want.mean(1))
        assert ("pixels" if pixels else "patches") in axes.get_ylabel()
        assert axes.get_xlabel() == "layer"


@pytest.mark.parametrize("count", [1, 2, 5])
def test_patterns(count):
    kinds = towers().clusters(count)
    labels, *maps = plots.patterns(kinds).axes
    assert field(labels).tolist() == kinds.labels.tolist()
    written = {text.get_position(): text.get_text() for text in labels.texts}
    assert all(written[x, y] == str(int(kinds.labels[y, x])) for y in range(5) for x in range(4))
    assert len(maps) == count
    for axes, own, size in zip(maps, kinds.maps, kinds.sizes, strict=True):
        assert np.allclose(field(axes), own)
        assert axes.images[0].get_extent() == [-3.5, 3.5, 2.5, -2.5]
        assert f"{int(size)} head" in axes.get_title()
    assert maps[0].get_ylabel() == "down (patches)"
    assert maps[-1].get_xlabel() == "right (patches)"
