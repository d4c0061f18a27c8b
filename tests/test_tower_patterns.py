"""Distance, hops and clusters of heads that were made to look somewhere, and of planted groups."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from regard.interventions.tower_heads import tower_heads
from regard.interventions.tower_patterns import cluster_heads, mean_distance


def engineered(side: int) -> Any:
    """A one-layer ViT: heads that look at themselves, evenly, at the right-hand neighbour, and at CLS."""
    places = width = side**2 + 1
    sizes = {
        "hidden_size": 4 * width,
        "intermediate_size": 8,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
    }
    model = tf.ViTModel(
        tf.ViTConfig(**sizes, image_size=4 * side, patch_size=4), add_pooling_layer=False
    ).double()
    eye = torch.eye(places, dtype=torch.float64)
    right = eye.clone()
    for place in range(1, places):
        right[:, place] = eye[:, place + bool(place % side)]
    to_cls = torch.zeros_like(eye)
    to_cls[0] = 1
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        block = model.layers[0]
        block.layernorm_before.weight.fill_(1)
        model.embeddings.position_embeddings[0, :, :width] = eye
        for head, wanted in enumerate((eye, 0 * eye, right, to_cls)):
            rows = slice(head * width, (head + 1) * width)
            block.attention.q_proj.weight[rows, :width] = 10 * wanted
            block.attention.k_proj.weight[rows, :width] = eye
            block.attention.v_proj.weight[rows, :width] = eye
    return model.eval()


def test_engineered_heads_are_told_apart() -> None:
    side = 4
    found = tower_heads(engineered(side), torch.randn(2, 3, 16, 16), importance=False)
    cells = [(y, x) for y in range(side) for x in range(side)]
    even = np.mean([math.dist(a, b) for a in cells for b in cells])
    want = torch.tensor([[0, even, 0.75, even]], dtype=torch.float64)  # the last column looks at itself
    torch.testing.assert_close(found.distance, want, atol=1e-4, rtol=1e-4)
    assert found.outside[0, 3] > 0.999
    torch.testing.assert_close(found.outside[0, 1].item(), 1 / 17)
    torch.testing.assert_close(
        found.hops[0, 2, :2], torch.tensor([0.25, 0.75]).double(), atol=1e-4, rtol=1e-4
    )
    assert found.offsets[0, 2, side - 1, side].item() == pytest.approx(0.75, abs=1e-4)  # dy 0, dx 1
    kinds = found.clusters(3)
    assert kinds.labels.tolist() == [[0, 2, 1, 2]]
    assert kinds.sizes.tolist() == [1, 1, 2]
    torch.testing.assert_close(kinds.maps[1], found.offsets[0, 2])
    torch.testing.assert_close(kinds.distance, want[0, [0, 2, 1]], atol=1e-4, rtol=1e-4)


def test_clusters_are_planted_groups_and_do_not_depend_on_order() -> None:
    rng = torch.Generator().manual_seed(1)
    centres = torch.rand(4, 5, 7, generator=rng).double() ** 6
    groups = torch.randint(4, (3, 8), generator=rng)
    maps = centres[groups] + 0.01 * torch.rand(3, 8, 5, 7, generator=rng).double()
    maps = maps / maps.sum((-2, -1), keepdim=True)
    kinds = cluster_heads(maps, 4)
    assert kinds.distance.tolist() == sorted(kinds.distance.tolist())
    for kind in range(4):
        mine = maps[kinds.labels == kind]
        assert groups[kinds.labels == kind].unique().numel() == 1
        torch.testing.assert_close(kinds.maps[kind], mine.mean(0))
        torch.testing.assert_close(kinds.distance[kind], mean_distance(mine).mean())
    order = torch.randperm(24, generator=rng)
    mixed = cluster_heads(maps.flatten(0, 1)[order].view_as(maps), 4)
    assert torch.equal(mixed.labels.flatten(), kinds.labels.flatten()[order])
    assert cluster_heads(maps, 1).labels.eq(0).all()
    assert cluster_heads(maps, 24).sizes.eq(1).all()
    same = cluster_heads(
        maps[:1, :1].expand(2, 2, 5, 7), 3
    )  # equal heads still give as many kinds as asked for
    assert same.sizes.min() == 1
    for count in (0, 25):
        with pytest.raises(ValueError, match=f"1 to the tower's 24 heads, got {count}"):
            cluster_heads(maps, count)


def test_diffuse_kinds_count_as_much_as_sharp_ones() -> None:
    itself, beside, row, column = maps = torch.zeros(4, 17, 17, dtype=torch.float64)
    itself[8, 8] = 1
    beside[8, 8:10] = 0.5
    row[8], column[:, 8] = 1 / 17, 1 / 17  # their squared distance is 0.11, that of the sharp ones 0.5
    assert cluster_heads(maps[None], 3).labels.tolist()[0][:2] == [0, 0]
