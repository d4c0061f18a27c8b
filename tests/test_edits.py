"""An edited layer, inside real models, against loops in float64 written from the edits' definitions.

`spy.Spy` records what one layer is given (q, k, v, mask) and what it returns in each forward of a generate;
`spy.expected` computes a row again: scores, bias, softmax, coefficients of group masses, gain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from families import Family, Inputs, build
from spy import Formula, Seen, Spy, expected
from torch import Tensor
from transformers import AttentionInterface

import regard
from regard.hooks.session import Call
from regard.kernels import groups, reweighted

# family, layer, new tokens; Gemma's layer 0 slides over 8 keys, so the prompt leaves its window
CASES = (
    ("llava", 1, 3),
    ("blip2", 0, 3),
    ("qwen2_5_vl", 2, 3),
    ("gemma3", 0, 12),
    ("gemma3", 1, 3),
    ("paligemma", 1, 3),
)
SPECS = ({"text": 5, "seed": 1}, {"text": 9, "seed": 2})  # the first row is padded by 4 tokens


class Setting:
    """A family with a padded batch of two prompts, and the edits that the tests choose from."""

    def __init__(self, name: str, layer: int) -> None:
        self.family: Family = build(name)
        self.layer, self.layers = layer, (layer,)
        self.inputs: Inputs = self.family.batch(SPECS)
        self.image = self.family.image_tokens(self.inputs)
        self.ends = [int(row.nonzero().max()) + 1 for row in self.image]
        self.strength = torch.linspace(0.5, 2.0, 2 * self.family.heads).reshape(2, -1)

    def group(self, sample: int, positions: Tensor) -> Tensor:
        """1 for the image, 2 for every third text token of the prompt, else 0; generated tokens are 0."""
        prompt = self.image.shape[1]
        known = torch.where(self.image[sample], 1, torch.where(torch.arange(prompt) % 3 == 0, 2, 0))
        return torch.tensor([int(known[p]) if p < prompt else 0 for p in positions.tolist()])

    def groups(self, call: Call) -> Tensor:
        rows = [self.group(sample, torch.arange(self.image.shape[1])) for sample in range(2)]
        return torch.stack(rows).repeat_interleave(call.query.shape[0] // 2, 0)

    def bias_at(self, sample: int, head: int, row: int, positions: Tensor) -> Tensor:
        image = (self.group(sample, positions) == 1).double()
        return (1.0 + 0.5 * head) * image - 0.3 * (row % 4) * (1 - image)

    def bias(self, call: Call) -> Tensor:
        """The same by the engine's map: (B, H, Q, K)."""
        image = call.image[:, None, None, :].float()
        head = 1.0 + 0.5 * torch.arange(call.query.shape[1])[None, :, None, None]
        return head * image - 0.3 * (call.positions % 4)[None, None, :, None] * (1 - image)

    def policy_edit(self, policy: Callable[[Tensor], Tensor], rows: Any) -> regard.MassPolicy:
        return regard.MassPolicy(self.layers, self.groups, policy, ("text", "image", "third"), rows)

    def run(self, edits: Sequence[Any], steps: int, spy: Spy, **more: Any) -> list[Seen]:
        with pytest.MonkeyPatch.context() as patch, regard.apply(self.family.model, *edits):
            patch.setitem(AttentionInterface._global_mapping, "regard", spy)
            settings = {"max_new_tokens": steps, "do_sample": False} | more
            self.family.model.generate(**self.inputs, **settings)
        return spy.seen

    def check(self, edits: Sequence[Any], formula: Formula, steps: int, **more: Any) -> list[Seen]:
        """Every row that sees something equals the formula, in every forward; and the edit is not nothing."""
        forwards = self.run(edits, steps, Spy(self.layer), **more)
        assert len(forwards) == steps
        for seen in forwards:
            for sample in range(2):
                for row in range(seen.query.shape[2]):
                    if (seen.visible(sample, 0, row) == -torch.inf).all() or self.is_padding(
                        sample, seen, row
                    ):
                        continue
                    for head in range(self.family.heads):
                        want = expected(seen, formula, sample, head, row, self.ends)
                        got = seen.out[sample, row, head].double()
                        assert (got - want).abs().max() < 2e-5, (sample, head, seen.first + row)
        for seen in forwards[:2]:
            assert (seen.out[:, -1] - seen.stock[:, -1]).abs().max() > 1e-3
        return forwards

    def is_padding(self, sample: int, seen: Seen, row: int) -> bool:
        position = seen.first + row
        mask = self.inputs["attention_mask"]
        return position < mask.shape[1] and not bool(mask[sample, position])


def towards_image(masses: Tensor) -> Tensor:
    """(..., 3) -> (..., 3), not linear in the masses."""
    text, image, third = masses.unbind(-1)
    return torch.stack([1 - 0.5 * image, 1 + text.square() + third, 0.25 + 0.5 * text], -1)


def away_from_third(masses: Tensor) -> Tensor:
    text, image, third = masses.unbind(-1)
    return torch.stack([1 + third, 1.5 - 0.5 * image * text, torch.full_like(third, 0.4)], -1)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest) -> tuple[Setting, int]:
    name, layer, steps = request.param
    return Setting(name, layer), steps


@pytest.fixture(params=["rows", "spans"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of its paths the kernel takes; prompts are short here, so it would always form the edited rows' probs."""
    path = f"torch {request.param}"
    if request.param == "spans":
        monkeypatch.setattr(reweighted, "FEW", -1)
        monkeypatch.setattr(groups, "SHORT", 3)
    return path


def everything(setting: Setting) -> tuple[list[Any], Formula]:
    """Bias, two policies on different rows, and a gain, given in another order than they act in."""
    gain = regard.HeadGain(setting.layers, lambda call: setting.strength)
    first = setting.policy_edit(towards_image, "after_image")
    second = setting.policy_edit(away_from_third, "all")
    edits = [gain, first, second, regard.Bias(setting.layers, setting.bias)]
    policies = [(setting.group, towards_image, "after_image"), (setting.group, away_from_third, "all")]
    return edits, Formula(setting.bias_at, policies, setting.strength)


def test_bias(case: tuple[Setting, int]) -> None:
    setting, steps = case
    setting.check([regard.Bias(setting.layers, setting.bias)], Formula(setting.bias_at), steps)


@pytest.mark.parametrize("rows", ["after_image", "all", "last"])
def test_mass_policy(case: tuple[Setting, int], rows: Any, kernel: str) -> None:
    setting, steps = case
    formula = Formula(policies=[(setting.group, towards_image, rows)])
    forwards = setting.check([setting.policy_edit(towards_image, rows)], formula, steps)
    prompt, untouched = forwards[0], {"after_image": min(setting.ends), "all": 0, "last": -1}[rows]
    assert torch.equal(prompt.out[:, :untouched], prompt.stock[:, :untouched])


def test_rows_before_the_image_stay_bit_exact_in_the_other_sample_too(kernel: str) -> None:
    """One sample's image ends earlier; the other's rows up to its own image are the library's."""
    setting = Setting("llava", 1)
    setting.inputs = setting.family.batch([{"text": 12, "seed": 1}, {"text": 3, "seed": 2, "pad": 9}])
    setting.image = setting.family.image_tokens(setting.inputs)
    setting.ends = [int(row.nonzero().max()) + 1 for row in setting.image]
    assert setting.ends[0] + 4 < setting.ends[1]
    formula = Formula(policies=[(setting.group, towards_image, "after_image")])
    prompt = setting.check([setting.policy_edit(towards_image, "after_image")], formula, 2)[0]
    for sample, end in enumerate(setting.ends):
        assert torch.equal(prompt.out[sample, :end], prompt.stock[sample, :end])
        assert (prompt.out[sample, end] - prompt.stock[sample, end]).abs().max() > 1e-4


def test_head_gain(case: tuple[Setting, int]) -> None:
    setting, steps = case
    asked: list[bool] = []

    def gain(call: Call) -> Tensor:
        asked.append(call.prefill)
        return setting.strength

    setting.check([regard.HeadGain(setting.layers, gain)], Formula(gain=setting.strength), steps)
    assert asked == [True]
    asked.clear()
    setting.check([regard.HeadGain(setting.layers, gain, hold=False)], Formula(gain=setting.strength), steps)
    assert asked == [True] + [False] * (steps - 1)


def test_all_together(case: tuple[Setting, int], kernel: str) -> None:
    setting, steps = case
    setting.check(*everything(setting), steps)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_all_together_in_a_static_cache(name: str, kernel: str) -> None:
    setting = Setting(name, 1)
    edits, formula = everything(setting)
    forwards = setting.check(edits, formula, 4, cache_implementation="static")
    assert {seen.key.shape[2] for seen in forwards} == {setting.image.shape[1] + 3}


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_a_window_that_has_left_the_prompt(implementation: str, kernel: str) -> None:
    setting = Setting("gemma3", 0)
    edits, formula = everything(setting)
    more = {"cache_implementation": "static"} if implementation == "static" else {}
    forwards = setting.check(edits, formula, 12, **more)
    assert forwards[-1].key.shape[2] == 8
    assert forwards[-1].positions().min() >= setting.image.shape[1]
    assert forwards[3].positions().min() < setting.image.shape[1]


def test_policies_act_in_the_order_given(kernel: str) -> None:
    setting = Setting("llava", 1)
    edits = [setting.policy_edit(policy, "all") for policy in (towards_image, away_from_third)]
    policies = [(setting.group, policy, "all") for policy in (towards_image, away_from_third)]
    one = setting.check(edits, Formula(policies=policies), 2)
    other = setting.check(edits[::-1], Formula(policies=policies[::-1]), 2)
    assert (one[0].out - other[0].out).abs().max() > 1e-3
    model = setting.family.model
    with regard.apply(model, edits[0]), regard.apply(model, edits[1]):
        nested = model(**setting.inputs).logits
    with regard.apply(model, *edits) as run:
        assert torch.equal(model(**setting.inputs).logits, nested)
    assert {tuple(line["backends"]) for line in run.report().to_dict()["layers"]} == {(kernel,)}


def test_two_biases_add_and_two_gains_multiply() -> None:
    setting = Setting("llava", 1)
    bias = regard.Bias(setting.layers, setting.bias)
    gain = regard.HeadGain(setting.layers, lambda call: setting.strength)

    def twice(*args: Any) -> Tensor:
        return 2 * setting.bias_at(*args)

    setting.check([bias, gain, bias, gain], Formula(twice, gain=setting.strength.square()), 2)


def test_heads_restrict_bias_and_gain() -> None:
    setting = Setting("llava", 1)
    bias = regard.Bias(setting.layers, setting.bias, heads=(0, 3))
    gain = regard.HeadGain(setting.layers, lambda call: setting.strength, heads=(1,))
    chosen = torch.ones_like(setting.strength)
    chosen[:, 1] = setting.strength[:, 1]

    def some(sample: int, head: int, row: int, positions: Tensor) -> Tensor:
        return setting.bias_at(sample, head, row, positions) * (head in (0, 3))

    prompt = setting.check([bias, gain], Formula(some, gain=chosen), 3)[0]
    real = setting.inputs["attention_mask"][0].bool()
    assert (prompt.out - prompt.stock)[0, real, 2].abs().max() < 1e-6  # no edit names head 2


def test_a_gain_may_read_the_output_that_it_scales() -> None:
    setting = Setting("llava", 1)

    def loudness(call: Call) -> Tensor:
        return 1 + call.newest_output().norm(dim=-1)

    for seen in setting.run([regard.HeadGain(setting.layers, loudness, hold=False)], 3, Spy(1)):
        gain = 1 + seen.stock[:, -1].norm(dim=-1)
        assert torch.allclose(seen.out, seen.stock * gain[:, None, :, None], atol=1e-6)


def test_bias_on_image_patches_in_cross_attention() -> None:
    setting = Setting("mllama", 1)
    keys: set[int] = set()

    def patches(call: Call) -> Tensor:
        assert call.cross
        assert call.image.all()
        keys.add(call.key.shape[2])
        return torch.sin(torch.arange(call.key.shape[2]).float())[None, None, None]

    def formula(sample: int, head: int, row: int, positions: Tensor) -> Tensor:
        return torch.sin(torch.arange(len(positions)).double())

    forwards = setting.check([regard.Bias((1,), patches)], Formula(formula), 3)
    assert keys == {forwards[0].key.shape[2]}
    assert forwards[0].key.shape[2] not in (setting.image.shape[1], setting.image.shape[1] + 1)


def blind(call: Call) -> Tensor:
    """No row sees an image token."""
    return torch.where(call.image, -torch.inf, 0.0)[:, None, None, :]


@pytest.mark.parametrize("name", ["llava", "idefics3", "internvl", "llava_onevision"])
def test_minus_infinity_on_the_image_is_a_mask_without_it(name: str) -> None:
    """Against stock transformers, told by attention_mask that the image tokens are padding."""
    family = build(name)
    inputs, masked = family.inputs(text=8), family.inputs(text=8)
    with regard.apply(family.model, regard.Bias(tuple(range(family.text_layers)), blind)):
        out = family.model.generate(
            **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    plain = family.model(**inputs).logits[:, -1]
    for step, logits in enumerate(out.logits):
        positions = torch.arange(masked["input_ids"].shape[1])[None]
        seen = masked["attention_mask"] * ~family.image_tokens(masked)
        stock = family.model(**{**masked, "attention_mask": seen, "position_ids": positions}).logits[:, -1]
        assert torch.allclose(logits, stock, atol=1e-4)
        masked = family.grow(masked, out.sequences[:, inputs["input_ids"].shape[1] + step])
    assert (out.logits[0] - plain).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "mllama", "blip2"])
def test_hidden_reads_the_input_of_each_block(name: str) -> None:
    """The prompt's states, bit for bit those that transformers reports, and once a prompt."""
    family = build(name)
    inputs = family.inputs(batch=2, text=6)
    layers = tuple(range(family.text_layers))
    stock = family.model(**inputs, output_hidden_states=True)
    states = stock.language_model_outputs.hidden_states if name == "blip2" else stock.hidden_states
    calls: list[int] = []

    def keep(hidden: Tensor, session: Any) -> Tensor:
        calls.append(hidden.shape[1])
        return hidden.clone()

    with regard.apply(family.model, regard.Hidden("state", layers, keep)) as run:
        family.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        found = run.read("state")
    assert calls == [inputs["input_ids"].shape[1]] * family.text_layers
    assert sorted(found) == list(layers)
    assert all(torch.equal(found[layer], states[layer]) for layer in layers)


def test_hidden_below_an_edit_is_plain_and_above_it_is_not() -> None:
    family = build("llava")
    inputs = family.inputs(text=8)
    hidden = regard.Hidden("state", (0, 1, 2), lambda state, session: state.clone())
    stock = family.model(**inputs, output_hidden_states=True).hidden_states
    with regard.apply(
        family.model, hidden, regard.Bias((1,), lambda call: call.image[:, None, None].float())
    ) as run:
        family.model(**inputs)
        found = run.read("state")
    assert torch.equal(found[1], stock[1])
    assert (found[2] - stock[2]).abs().max() > 1e-3


@pytest.mark.parametrize("rows", ["all", "after_image", "last"])
def test_rows_are_the_same_without_a_cache(rows: Any) -> None:
    setting = Setting("llava", 1)
    edit = setting.policy_edit(towards_image, rows)
    settings = {
        "max_new_tokens": 4,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with regard.apply(setting.family.model, edit):
        cached = setting.family.model.generate(**setting.inputs, **settings)
        free = setting.family.model.generate(**setting.inputs, **settings, use_cache=False)
    assert torch.allclose(torch.stack(cached.logits), torch.stack(free.logits), atol=1e-4)


def test_the_last_row_of_a_sample_padded_on_the_right() -> None:
    family = build("llava")
    specs = [{"text": 4, "seed": 1}, {"text": 9, "seed": 2}]
    inputs = family.batch(specs)
    for key in ("input_ids", "attention_mask"):
        inputs[key][0] = inputs[key][0].roll(-5)
    group = torch.zeros(2, inputs["input_ids"].shape[1], dtype=torch.long)
    edit = regard.MassPolicy(
        (1,), lambda call: group[: len(call.query)], lambda m: 0.5 * m, ("text",), "last"
    )
    with regard.apply(family.model, edit):
        both = family.model(**inputs).logits
        alone = family.model(**family.batch(specs[:1])).logits
    plain = family.model(**inputs).logits
    assert torch.allclose(both[0, 14], alone[0, 14], atol=1e-4)
    assert torch.equal(both[0, :14], plain[0, :14])
    assert (both - plain)[0, 14].abs().max() > 1e-3


def test_text_rows_beside_image_rows_are_left_alone() -> None:
    llava = build("llava")
    inputs = llava.batch([{"image": False, "seed": 1}, {"seed": 2, "text": 5}])
    before = llava.model(**inputs).logits[:, -1]
    with regard.apply(llava.model, regard.VHR(alpha=3.0, layers=(0, 1, 2))):
        after = llava.model(**inputs).logits[:, -1]
    assert torch.allclose(after[0], before[0], atol=1e-5)
    assert (after[1] - before[1]).abs().max() > 1e-2
