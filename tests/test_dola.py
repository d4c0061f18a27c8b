"""DoLa against whole forwards with stock hidden states and scipy's divergence."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.spatial.distance import jensenshannon

import regard
from regard.interventions.dola import DoLa, bucket
from tests.families import Family, Inputs, build
from tests.test_contrast import CLOSE, SPECS, generate

LAYERS = (0, 1, 2)


@torch.no_grad()
def expected(family: Family, inputs: Inputs, ids: torch.Tensor) -> torch.Tensor:
    """Logits (steps, V) that DoLa should give one prompt."""
    rows = []
    head = family.model.get_output_embeddings()
    for token in ids:
        out = family.model(**inputs, use_cache=False, output_hidden_states=True)
        final = head(out.hidden_states[-1][0, -1]).double().softmax(-1)
        early = [head(out.hidden_states[layer][0, -1]).double().softmax(-1) for layer in LAYERS]
        far = [jensenshannon(final.numpy(), other.numpy()) for other in early]
        fused = final.log() - early[far.index(max(far))].log()
        rows.append(torch.where(final >= 0.05 * final.max(), fused, -math.inf))
        inputs = family.grow(inputs, token[None])
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_every_step_equals_stock_hidden_states(name: str) -> None:
    family = build(name)
    ids, logits = generate(family, family.batch(SPECS[:3]), DoLa(layers=LAYERS, beta=0.05), steps=3)
    for row, spec in enumerate(SPECS[:3]):
        wanted = expected(family, family.batch([spec]), ids[row])
        finite = ~wanted.isinf()
        assert torch.equal(finite, ~logits[row].isinf())
        assert torch.allclose(logits[row][finite].double(), wanted[finite], **CLOSE)


def test_a_stream_in_the_same_batch_is_not_read() -> None:
    family = build("llava")
    inputs, dola = family.batch(SPECS[:3]), DoLa(layers=LAYERS, beta=0.05)
    ids, alone = generate(family, inputs, dola)
    joined_ids, joined = generate(family, inputs, regard.VCD(alpha=1e-9, beta=0.0), dola)
    assert torch.equal(joined_ids, ids)
    assert torch.allclose(joined.nan_to_num(neginf=-99), alone.nan_to_num(neginf=-99), **CLOSE)


def test_layers_that_another_edit_reads_are_not_candidates() -> None:
    family = build("llava")
    inputs = family.batch(SPECS[:2])
    reader = regard.Logits(lambda logits, step: logits, early=(0, 1))
    _, alone = generate(family, inputs, DoLa(layers=(2,)))
    _, beside = generate(family, inputs, reader, DoLa(layers=(2,)))
    assert torch.equal(alone, beside)
    assert not torch.equal(alone, generate(family, inputs, DoLa(layers=(0, 1)))[1])


def test_candidate_layers_are_those_of_transformers() -> None:
    assert bucket("low", 32, tied=False) == tuple(range(0, 16, 2))
    assert bucket("high", 32, tied=False) == tuple(range(16, 32, 2))
    assert bucket("low", 28, tied=True) == tuple(range(2, 14, 2))
    assert bucket("low", 60, tied=False) == tuple(range(0, 20, 2))
    assert bucket("high", 60, tied=False) == tuple(range(40, 60, 2))
    assert bucket("low", 3, tied=True) == (0,)


def test_beams_and_a_prompt_without_an_image() -> None:
    family = build("llava")
    inputs = {k: v for k, v in family.inputs(text=6, seed=2, images=0).items() if "pixel" not in k}
    settings = {"do_sample": False, "max_new_tokens": 4, "num_beams": 3}
    plain = family.model.generate(**inputs, **settings)
    with regard.apply(family.model, "dola") as run:
        assert not torch.equal(family.model.generate(**inputs, **settings), plain)
        assert "dola" in str(run.report())
    assert torch.equal(family.model.generate(**inputs, **settings), plain)


def test_what_is_refused() -> None:
    for layers, words in (("nine", "'low', 'high'"), ((), "empty")):
        with pytest.raises(ValueError, match=words):
            DoLa(layers=layers)
    family = build("llava")
    with pytest.raises(regard.OutOfRange), regard.apply(family.model, DoLa(layers=(99,))):
        pass
