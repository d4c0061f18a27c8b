"""Heat maps of words: against a loop over every layer, and the pictures untouched."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import regard
from tests.pipelines import KINDS, PROMPT, build

OPTIONS: dict[str, Any] = {"height": 48, "width": 32, "num_inference_steps": 2, "guidance_scale": 4.0}


@pytest.mark.parametrize("kind", KINDS)
def test_heat_is_the_mean_over_layers_and_steps(kind: str) -> None:
    pipe = build(kind)
    options = {**OPTIONS, **({"max_sequence_length": 16} if kind in ("sd3", "flux") else {})}
    found: dict[int, list[torch.Tensor]] = {}
    grids = []

    def note(call: Any) -> None:
        if call.site.kind != "self":
            scores = call.query @ call.key.transpose(2, 3) * call.query.shape[-1] ** -0.5
            probs = scores.softmax(-1)[call.rows, :, call.image, call.text].mean(1)
            found.setdefault(call.step, []).append(probs.mT.unflatten(2, call.grid))
            grids.append(call.grid)

    generator = torch.Generator().manual_seed(0)
    with regard.apply(pipe, regard.Attend(note)):
        plain = pipe(PROMPT, generator=generator, **options).images[0]
    heat = regard.word_heat(pipe, PROMPT, ["dog", "apple"], generator=generator.manual_seed(0), **options)
    assert heat.images[0].tobytes() == plain.tobytes()
    seen: list[Any] = []
    with regard.apply(pipe, regard.Watch(("dog", "apple"), seen.append)):
        pipe(PROMPT, generator=generator.manual_seed(0), **options)
    columns = seen[0].concepts[0]
    finest = max(grids, key=lambda grid: grid[0])
    assert heat.by_step.shape == (1, 2, 2, *finest)
    for step, layers in found.items():
        for word, indices in enumerate(columns):
            total = torch.zeros(finest)
            for grid in {layer.shape[2:] for layer in layers}:
                same = [
                    layer[:, list(indices)].mean(1, keepdim=True)
                    for layer in layers
                    if layer.shape[2:] == grid
                ]
                mean = torch.stack(same).mean(0)
                fine = F.interpolate(mean, finest, mode="bicubic").clamp_min(0) if grid != finest else mean
                total += fine[0, 0] * len(same) / len(layers)
            assert (heat.by_step[0, step, word] - total).abs().max() < 1e-6
            assert total.std() > 1e-4
    assert torch.allclose(heat.mean, heat.by_step.mean(1))


def test_refusals() -> None:
    with pytest.raises(regard.NoObjectWords, match="'zebra' is not in the prompt"):
        regard.word_heat(build("sd"), PROMPT, ["zebra"], **OPTIONS)
    with pytest.raises(regard.CannotEdit, match="needs a diffusers pipeline"):
        regard.word_heat(build("sd").unet, PROMPT, ["dog"])
