"""Pipelines whose weights leave the device between two calls, as with `enable_sequential_cpu_offload`."""

from typing import Any

import accelerate
import pytest
import torch

import regard
from tests.pipelines import KINDS, build, latents

WORDS = ["dog", "apple"]


def offloaded(kind: str) -> Any:
    """The pipeline with accelerate's own hooks on its denoiser: diffusers itself offers them only where a GPU is."""
    pipe = build(kind)
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    accelerate.cpu_offload(getattr(pipe, name), execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in getattr(pipe, name).parameters()} == {"meta"}
    return pipe


@pytest.mark.parametrize("kind", KINDS)
def test_edits_maps_and_guidance_are_those_of_the_plain_pipeline(kind: str) -> None:
    plain, moved = build(kind), offloaded(kind)
    stock = latents(plain)
    assert torch.equal(latents(moved), stock)
    half = regard.Attend(lambda call: 0.5 * call.attend(call.query, call.key, call.value))
    for edits in ([regard.Attend(lambda call: None)], [half], [regard.ASTAR(concepts=WORDS)]):
        found = []
        for pipe in (plain, moved):
            with regard.apply(pipe, *edits) as run:
                found.append(latents(pipe))
                with run.off():
                    assert torch.equal(latents(pipe), stock)
        assert torch.equal(*found)
    assert not torch.equal(found[0], stock)  # A-STAR did something
    assert torch.equal(latents(moved), stock)
