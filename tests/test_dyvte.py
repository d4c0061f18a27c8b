"""When image tokens leave: DyVTE's criteria against stock attention, stock states and a gate in plain loops."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from departures import DEPTH, compare, family_of, reference
from families import IMAGE, Family, Inputs, build
from oracles import logits_of, wide
from safetensors.torch import save_file
from torch import Tensor

import regard
from regard.hooks.anatomy import anatomy
from regard.hooks.engine import engine_of
from regard.hooks.exits import MEMORY
from regard.interventions.dyvte import gate_fires, gate_input, image_mass, read_gate, state_change


@pytest.fixture(scope="module")
def llava() -> Family:
    return family_of("llava")


# --------------------------------------------------------------------------------------- when they leave


def exits_of(family: Family, inputs: Inputs, method: Any) -> list[int]:
    with torch.no_grad(), regard.apply(family.model, method):
        family.model(**wide(inputs))
        session = engine_of(family.model).latest
        assert session is not None
        return list(session.memory[MEMORY].after)


@torch.no_grad()
def last_row_masses(family: Family, item: Inputs) -> list[float]:
    """Image mass of the last row by stock eager attention, before any token has left."""
    family.model.set_attn_implementation("eager")
    probs = family.model(**wide(item), use_cache=False, output_attentions=True).attentions
    family.model.set_attn_implementation("sdpa")
    image = family.image_tokens(item)[0]
    return [float(layer[0, :, -1, image].sum(-1).mean()) for layer in probs]


@torch.no_grad()
def last_row_changes(family: Family, item: Inputs) -> list[float]:
    states: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda m, a, out: states.append(out[0, -1]))
        for block in family.decoder.layers
    ]
    first = family.decoder.layers[0].register_forward_pre_hook(
        lambda m, a, k: states.append((a[0] if a else k["hidden_states"])[0, -1]), with_kwargs=True
    )
    family.model(**wide(item), use_cache=False)
    [handle.remove() for handle in [*handles, first]]
    return [float(1 - (a @ b) / (a.norm() * b.norm())) for a, b in itertools.pairwise(states)]


def first_calm(values: list[float], start: int, tau: float, patience: int) -> int:
    calm = 0
    for layer in range(start, len(values)):
        calm = calm + 1 if values[layer] < tau else 0
        if calm == patience:
            return layer
    return len(values)


@pytest.mark.parametrize("mode", ["attention", "state"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_thresholds_and_patience(name: str, mode: Any) -> None:
    family = family_of(name)
    specs = [{"text": 12, "seed": 2}, {"text": 5, "seed": 3, "images": 2}, {"text": 9, "seed": 8}]
    measure = last_row_masses if mode == "attention" else last_row_changes
    values = [measure(family, family.item(**spec)) for spec in specs]
    inputs, ever = family.batch(specs), set()
    for tau in sorted(value + 1e-6 for line in values for value in line):
        for start, patience in ((0, 1), (1, 2), (2, 1)):
            method = regard.DyVTE(mode, start=start, tau=tau, patience=patience)
            want = [first_calm(line, start, tau, patience) for line in values]
            assert exits_of(family, inputs, method) == want
            ever |= set(want)
    assert len(ever) >= 4  # the thresholds tell layers apart
    compare(family, inputs, *(both_ways(family, inputs, mode, values)))


def both_ways(family: Family, inputs: Inputs, mode: Any, values: list[list[float]]) -> Any:
    tau = sorted(value for line in values for value in line)[5] + 1e-6
    with regard.apply(family.model, regard.DyVTE(mode, start=0, tau=tau, patience=1)):
        found = logits_of(family, inputs)
    return found, reference(family, inputs, [first_calm(line, 0, tau, 1) for line in values])


def test_the_last_row_may_be_followed_by_padding(llava: Family) -> None:
    specs = [{"text": 9, "seed": 2}, {"text": 5, "seed": 3}]
    inputs = llava.batch(specs)
    for key in ("input_ids", "attention_mask"):
        inputs[key][1] = inputs[key][1].roll(-4)
    values = [last_row_masses(llava, llava.item(**spec)) for spec in specs]
    for tau in sorted(value + 1e-6 for line in values for value in line):
        want = [first_calm(line, 0, tau, 1) for line in values]
        assert exits_of(llava, inputs, regard.DyVTE("attention", start=0, tau=tau, patience=1)) == want


def gates(seed: int, layers: Sequence[int] = range(DEPTH), width: int = 64) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    made = {}
    for layer in layers:
        made[f"routers.{layer}.0.weight"] = torch.randn(32, 2 * width, generator=rng) / 11
        made[f"routers.{layer}.3.weight"] = torch.randn(2, 32, generator=rng)
    return made


@torch.no_grad()
def test_a_gate_from_a_file(llava: Family, tmp_path: Path) -> None:
    specs = [{"text": 12, "seed": 2}, {"text": 5, "seed": 3, "images": 2}, {"text": 9, "seed": 8}]
    ever = set()
    for seed in range(6):
        weights = gates(seed)
        save_file(weights, tmp_path / "gate.safetensors")
        want = []
        for spec in specs:
            item = wide(llava.item(**spec))
            after = int((item["input_ids"][0] == IMAGE).nonzero().max()) + 1
            states: list[Tensor] = []
            handles = [
                block.register_forward_hook(lambda m, a, out, states=states: states.append(out[0]))
                for block in llava.decoder.layers
            ]
            llava.model(**item, use_cache=False)
            [handle.remove() for handle in handles]
            fired = []
            for layer, state in enumerate(states):
                x = torch.cat([state[after:-1].mean(0), state[-1]])
                up, down = (weights[f"routers.{layer}.{i}.weight"].double() for i in (0, 3))
                y = up @ x
                y = down @ (y * 0.5 * (1 + torch.erf(y / 2**0.5)))
                fired += [layer] if y[0] < y[1] else []
            want.append(fired[0] if fired else DEPTH)
        assert (
            exits_of(llava, llava.batch(specs), regard.DyVTE("gate", gate=tmp_path / "gate.safetensors"))
            == want
        )
        ever |= set(want)
    assert len(ever) >= 3


# ---------------------------------------------------------------------------------- the pure functions


def test_image_mass_is_a_mean_over_heads() -> None:
    rng = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 8, generator=rng), torch.randn(2, 2, 6, 8, generator=rng)
    image = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0]]).bool()
    visible = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]]).bool()
    for sample in range(2):
        masses = []
        for head in range(4):
            keys = [k for k in range(6) if visible[sample, k]]
            weight = [float((0.3 * query[sample, head] @ key[sample, head // 2, k]).exp()) for k in keys]
            masses.append(sum(w for w, k in zip(weight, keys, strict=True) if image[sample, k]) / sum(weight))
        found = image_mass(query, key, image, visible, 0.3)[sample]
        assert float(found) == pytest.approx(sum(masses) / 4, rel=1e-5)


def test_state_change_and_gate_features() -> None:
    a, b = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [2.0, 2.0]])
    torch.testing.assert_close(state_change(a, b), torch.tensor([1.0, 0.0]))
    hidden = torch.arange(12.0).view(2, 3, 2)
    text = torch.tensor([[True, True, False], [False, False, False]])
    found = gate_input(hidden, text, hidden[:, -1])
    assert found.tolist() == [[1.0, 2.0, 4.0, 5.0], [10.0, 11.0, 10.0, 11.0]]
    router = torch.tensor([[1.0, 0, 0, 0], [0, -1.0, 0, 0]]), torch.eye(2)
    assert gate_fires(torch.tensor([[1.0, 9, 0, 0], [-9.0, -9, 0, 0], [0.0, 0, 0, 0]]), router).tolist() == [
        False,
        True,
        False,
    ]


# ----------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mode": "soon"}, "got 'soon'"),
        ({"mode": "gate"}, "mode 'gate' goes with a gate file"),
        ({"gate": "a.safetensors"}, "mode 'gate' goes with a gate file"),
        ({"mode": "state", "layer": 3}, "layer is for mode 'fixed'"),
        ({"tau": 0.1}, "got mode 'fixed'"),
        ({"mode": "state", "tau": -1.0}, "at least 0, got -1"),
        ({"mode": "state", "patience": 0}, "from 1, got 0"),
    ],
)
def test_wrong_arguments_say_so(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        regard.DyVTE(**arguments)


def test_a_gate_that_does_not_fit(llava: Family, tmp_path: Path) -> None:
    file = tmp_path / "gate.safetensors"
    for weights, says in (
        (gates(0, range(6)), "layers 0 to 5, but the decoder has layers 0 to 4"),
        (gates(0, width=32), r"expected matrices \(M, 128\) and \(2, M\)"),
        ({"up": torch.zeros(2, 2)}, "no layer number in 'up'"),
    ):
        save_file(weights, file)
        with pytest.raises(regard.RegardError, match=says):
            read_gate(file, DEPTH, 64)
    with pytest.raises(regard.RegardError, match="pickle"):
        regard.apply(llava.model, regard.DyVTE("gate", gate=tmp_path / "gate.bin"))


def test_defaults_are_labelled_and_in_the_list() -> None:
    (line,) = regard.recipes("dyvte")
    assert (line.arxiv, line.kind) == ("2411.19628", "token exit")
    family = build("llava")
    (exit_,) = regard.DyVTE().edits(anatomy(family.model))
    assert exit_.layers == (1,)  # 0.6 of 3 layers: two read the image
