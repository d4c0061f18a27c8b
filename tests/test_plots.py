"""All of `regard.plots`: room for text, given axes, styles, and colours for everyone."""

import inspect
import math
from itertools import combinations, pairwise

import drawings
import matplotlib
import numpy as np
import pytest
import torch
from drawings import IMAGE, outliers, panels, towers
from matplotlib.figure import Figure

from regard import plots
from regard.plots import look
from regard.plots.attended import GROUPS

found = pytest.fixture(name="found")(drawings.divergence)
runs = pytest.fixture(name="runs")(drawings.runs)


def every():
    """Each function with its data."""
    _, processor, _ = drawings.lvlm()
    (plain, edited), found, heat = drawings.runs(), drawings.divergence(), drawings.heat()
    masks = torch.zeros(2, 16, 16)
    masks[0, 2:9, 3:12], masks[1, 10:, :5] = 1, 1
    return {
        "vhd": lambda **ax: plots.vhd(found, scale="layer", **ax),
        "t_vhd": lambda **ax: plots.t_vhd(found, processor, hallucinated=["a"], **ax),
        "sinks": lambda **ax: plots.sinks(IMAGE, plain, edited, token=2, **ax),
        "attention": lambda **ax: plots.attention(IMAGE, plain, token=2, processor=processor, **ax),
        "masses": lambda **ax: plots.masses(plain, edited, **ax),
        "flow": lambda **ax: plots.flow(IMAGE, drawings.flow(), **ax),
        "outliers": lambda **ax: plots.outliers(IMAGE, outliers(), **ax),
        "word_maps": lambda **ax: plots.word_maps(heat, **ax),
        "masks": lambda **ax: plots.masks(heat.images[0], masks, ["a cat", "a dog"], **ax),
        "importance": lambda **ax: plots.importance(towers(), **ax),
        "distance": lambda **ax: plots.distance(towers(), **ax),
        "patterns": lambda **ax: plots.patterns(towers().clusters(3), **ax),
    }


def test_every_figure_has_room_for_its_text():
    drawings = every()
    assert set(drawings) == set(plots.__all__)
    for name, draw in drawings.items():
        figure = draw()
        assert isinstance(figure, Figure), name
        figure.draw_without_rendering()
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert box.x0 > -0.01, (name, box)
        assert box.y0 > -0.01, (name, box)
        assert box.x1 < width + 0.01, (name, box, width)
        assert box.y1 < height + 0.01, (name, box, height)
        titles = [axes.title.get_window_extent() for axes in panels(figure) if axes.get_title()]
        assert not any(one.overlaps(other) for one, other in combinations(titles, 2)), name


def test_a_given_axis_is_drawn_on_and_others_are_left_alone():
    before = dict(matplotlib.rcParams)
    for name, draw in every().items():
        own = Figure(figsize=(9, 4))
        left, right = own.subplots(1, 2)
        left.plot([1, 2], [3, 4])
        place = left.get_position().bounds
        drawn = draw(ax=right)
        assert drawn is own, name
        assert len(left.lines) == 1, name
        assert not [*left.child_axes, *left.patches, *left.images, *left.texts], name
        assert left.get_position().bounds == place, name
        assert right.child_axes or right.images or right.patches or right.lines, name
    own.draw_without_rendering()
    assert dict(matplotlib.rcParams) == before


def test_an_inset_axis_and_one_of_a_subfigure_are_given_axes_too(found, runs):
    figure = Figure(figsize=(8, 4))
    lower, upper = figure.subfigures(2, 1)
    inset = upper.subplots().inset_axes((0.1, 0.1, 0.6, 0.8))
    assert plots.vhd(found, ax=inset) is figure
    assert plots.masses(*runs, ax=lower.subplots()) is figure
    figure.draw_without_rendering()
    with pytest.raises(ValueError, match="one matplotlib axis, got ndarray"):
        plots.vhd(found, ax=Figure().subplots(1, 2))


def test_a_figure_shows_itself_and_pyplot_knows_nothing_of_it(found):
    from IPython.core.formatters import DisplayFormatter
    from matplotlib import pyplot, style

    shown, _ = DisplayFormatter().format(plots.vhd(found))
    assert shown["image/png"].startswith(b"\x89PNG")
    assert not pyplot.get_fignums()
    with style.context("dark_background"):
        assert plots.vhd(found).get_facecolor() == (1, 1, 1, 1)
        given = Figure().subplots()
        plots.vhd(found, ax=given)
        assert given.title.get_color() == "white"
        assert {axes.yaxis.label.get_color() for axes in given.figure.axes} == {"white"}


MACHADO = {  # severity 1, doi 10.1109/TVCG.2009.113
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "normal": np.eye(3),
}


def cielab(colour, seen_by):
    """CIELAB of a colour as people with this vision see it."""
    srgb = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(MACHADO[seen_by]) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    f = [v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz / [0.9505, 1, 1.089]]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("seen_by", MACHADO)
def test_categories_differ_for_everyone(seen_by):
    groups = [style for name, style in GROUPS.items() if name != "first token"]  # in place of the text sink
    for colours in ([colour for colour, _ in groups], look.CATEGORIES, [look.RED, look.BLUE]):
        apart = [
            math.dist(cielab(one, seen_by), cielab(other, seen_by)) for one, other in combinations(colours, 2)
        ]
        assert min(apart) > 15  # 2.3 is just seen


def test_categories_differ_in_grey():
    """By lightness where groups are neighbours in the stack, and all by their hatches."""
    order = ("text sink", "prompt", "image sink", "image", "answer")
    light = [cielab(GROUPS[name][0], "normal")[0] for name in order]
    assert min(abs(one - other) for one, other in pairwise(light)) > 12
    assert len({GROUPS[name][1] for name in order}) == len(order)
    assert len(set(look.HATCHES)) == len(look.HATCHES) == len(look.CATEGORIES)


def test_heat_grows_lighter():
    colours = matplotlib.colormaps[look.HEAT](np.linspace(0, 1, 64))
    for seen_by in MACHADO:
        light = [cielab(colour[:3], seen_by)[0] for colour in colours]
        assert np.diff(light).min() > 0
        assert light[-1] - light[0] > 60


def test_every_function_takes_an_axis_by_name():
    for name in plots.__all__:
        ax = inspect.signature(getattr(plots, name)).parameters["ax"]
        assert (ax.kind, ax.default) == (ax.KEYWORD_ONLY, None)
