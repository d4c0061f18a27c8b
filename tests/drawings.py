"""What the tests of `regard.plots` draw, and how they read it back."""

from functools import cache

import numpy as np
import torch

import regard
from regard.evals.miniature.scenes import make_scene
from regard.interventions.tower_heads import TowerHeads
from regard.interventions.tower_outliers import ClsOutliers

IMAGE = make_scene(4, split="test").image
TOKENS = 45


@cache
def lvlm():
    """The miniature, its processor and the inputs of a prompt."""
    model, processor = regard.load_miniature("lvlm")
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image."}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    return model, processor, processor(images=IMAGE, text=text, return_tensors="pt")


@cache
def divergence():
    model, _, inputs = lvlm()
    return regard.divergence(model, inputs, max_new_tokens=TOKENS)


@cache
def runs():
    """The attention without and with VAR, on the same words."""
    model, _, inputs = lvlm()
    plain = regard.attention(model, inputs, max_new_tokens=TOKENS)
    with regard.apply(model, regard.recipe("var", model)):
        return plain, regard.attention(model, inputs, output=plain.tokens)


@cache
def flow():
    """The flow of the first mention of a word."""
    model, processor, inputs = lvlm()
    output = runs()[0].tokens[None]
    return regard.object_maps(model, inputs, ["picture"], processor=processor, output=output).objects[0]


@cache
def heat():
    pipe = regard.load_miniature("t2i")
    pipe.set_progress_bar_config(disable=True)
    seed, words = torch.Generator().manual_seed(1), ["banana", "person"]
    return regard.word_heat(pipe, "a banana and a person", words, num_inference_steps=3, generator=seed)


def towers(layers=5, heads=4, grid=(3, 4)):
    offsets = torch.rand(layers, heads, 2 * grid[0] - 1, 2 * grid[1] - 1) ** 4
    offsets = offsets / offsets.sum((2, 3), keepdim=True)
    return TowerHeads(
        torch.rand(layers, heads) - 0.1, offsets, torch.rand(layers, heads), grid=grid, patch=(14, 14)
    )


def outliers(grid=(24, 24), count=10):
    probs = torch.rand(2, *grid) ** 6
    probs = 0.9 * probs / probs.sum((1, 2), keepdim=True)
    return ClsOutliers(probs, probs >= probs.flatten(1).topk(count).values[:, -1, None, None], layer=22)


def panels(figure):
    """All axes in the order that they were made, those within axes too."""
    return [
        child
        for axes in figure.axes
        for child in ([axes, *axes.child_axes] if axes.axison else axes.child_axes)
    ]


def field(axes, at=-1):
    return np.asarray(axes.images[at].get_array())


def boxes(axes):
    """Corners (left, top, right, bottom) of the outlined rectangles."""
    outlined = [path for lines in axes.collections for path in lines.get_paths()]
    frames = [p.get_patch_transform().transform_path(p.get_path()) for p in axes.patches]
    return sorted(tuple(path.get_extents().extents) for path in [*outlined, *frames])


def title_of(axes):
    return axes.get_title().replace("\n", " ")


def shares(axes):
    return [float(word[:-1]) / 100 for word in title_of(axes).split() if word.endswith("%")]
