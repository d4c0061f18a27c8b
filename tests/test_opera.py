"""OPERA against stock beam search, and against a slow search of whole forwards in float64 without engine or cache."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from families import EOS, FIRST_TEXT, VOCAB, Family, Inputs, build
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

import regard
from regard.hooks.kv_cache import CACHE
from regard.interventions.opera import OPERA
from regard.interventions.opera_search import Search

PLAIN = OPERA(penalty_weight=0, threshold=None)
FAMILIES = ("llava", "llava_next", "instructblip", "qwen2_vl", "qwen3_vl", "internvl", "idefics3")
SHARP = OPERA(
    scale=30.0, factor=1e-2, candidates=3, warmup=3, threshold=2
)  # penalties of order 1 on tiny models


def double(name: str, seed: int = 0) -> Family:
    family = build(name, seed)
    family.model.double()
    return family


def wide(inputs: Inputs) -> Inputs:
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}


# ------------------------------------------------------------------------------------- the slow search


@dataclass
class Slow:
    """Every candidate by a forward of its own over prompt and response, eager attention, plain lists."""

    family: Family
    inputs: Inputs
    opera: OPERA
    beams: int = 3
    returned: list[int] = field(default_factory=list)
    penalties: list[float] = field(default_factory=list)

    def forward(self, tokens: list[int]) -> tuple[Tensor, Tensor]:
        inputs = self.inputs
        for token in tokens:
            inputs = self.family.grow(inputs, torch.tensor([token]))
        out = self.family.model(**inputs, use_cache=False, output_attentions=True)
        largest = out.attentions[-1][0].amax(0)
        return out.logits[0, -1], largest / largest.sum(-1, keepdim=True).clamp_min(1e-300)

    def penalty(self, attention: Tensor) -> tuple[float, int]:
        start = self.inputs["input_ids"].shape[1]
        local = attention[start:, start:] * self.opera.scale
        phi = [self.opera.factor * float(local[j:, j].prod()) for j in range(len(local))]
        column = max(range(len(phi)), key=phi.__getitem__)
        if len(local) <= self.opera.warmup:
            return -float(attention[-1, :start][self.family.image_tokens(self.inputs)[0]].sum()), column
        return phi[column], column

    def candidates(
        self, tokens: list[int], forbidden: list[int], free: bool
    ) -> tuple[list[tuple[int, float]], int]:
        """(token, score) of each candidate, and the most frequent column."""
        opera = self.opera
        logits, _ = self.forward(tokens)
        allowed = logits.clone()
        allowed[forbidden] = -torch.inf
        best = allowed.topk(2 * self.beams if free else opera.candidates).indices.tolist()
        found = [self.penalty(self.forward([*tokens, token])[1]) for token in best]
        counts = Counter(column for _, column in found)
        column = min(c for c in counts if counts[c] == max(counts.values()))
        lowered = logits.clone()
        if not free:
            self.penalties += [p for p, _ in found]
            for token, (penalty, _) in zip(best, found, strict=True):
                lowered[token] -= opera.penalty_weight * penalty
        whole = lowered[best] if opera.variant == "released" and not free else lowered
        return [(token, float(lowered[token] - whole.logsumexp(0))) for token in best], column

    @torch.no_grad()
    def run(self, new: int) -> tuple[list[int], float]:
        beams: list[tuple[float, list[int]]] = [(0.0, [])] + [(-1e9, [])] * (self.beams - 1)
        states: dict[int, list[tuple[float, list[int]]]] = {}
        taken: dict[int, list[tuple[int, int]]] = {}
        forbidden: dict[int, list[tuple[int, int]]] = {}
        times: Counter[int] = Counter()
        noted: list[list[int]] = []
        step, again = 0, False
        while step < new:
            no = forbidden.get(step, [])
            free = again and self.opera.variant == "released"
            ahead = [
                self.candidates(beam[1], [t for b, t in no if b == number], free)
                for number, beam in enumerate(beams)
            ]
            if not again:
                noted.append([column for _, column in ahead])
                place = self.place(noted, times, step)
                if place is not None:
                    self.returned.append(place)
                    times[place] += 1
                    forbidden = {key: value for key, value in forbidden.items() if key <= place}
                    forbidden[place] = forbidden.get(place, []) + taken[place]
                    noted, beams, step, again = noted[: place + 1], states[place], place, True
                    continue
            again = False
            pool = [
                (beams[b][0] + score, b, token)
                for b, (found, _) in enumerate(ahead)
                for token, score in found
            ]
            pool = sorted(pool, key=lambda entry: -entry[0])[: self.beams]
            states[step], taken[step] = beams, [(b, token) for _, b, token in pool]
            beams = [(score, [*beams[b][1], token]) for score, b, token in pool]
            step += 1
        score, tokens = max(beams)
        return tokens, score / new

    def place(self, noted: list[list[int]], times: Counter[int], step: int) -> int | None:
        if self.opera.threshold is None:
            return None
        now = Counter(noted[-1])
        column = min(c for c in now if now[c] == max(now.values()))
        often = all(
            [row[beam] for row in noted].count(column) > self.opera.threshold for beam in range(self.beams)
        )
        if not often or column < self.opera.warmup:
            return None
        for place in (column + 1, column):
            if times[place] < self.opera.candidates:
                return place if place < step else None
        return None


def fast(family: Family, inputs: Inputs, opera: OPERA, new: int, beams: int = 3) -> tuple[list[int], float]:
    with regard.apply(family.model, opera):
        out = family.model.generate(
            **inputs, num_beams=beams, max_new_tokens=new, do_sample=False, return_dict_in_generate=True
        )
    return out.sequences[0, -new:].tolist(), float(out.sequences_scores[0])


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "internvl"])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_penalties_equal_whole_forwards_in_float64(name: str, variant: Any) -> None:
    """The engine's prompt is padded, the oracle's is not: stock eager attention has no rows of padding in fp64."""
    family, oracle = double(name), double(name)
    oracle.model.set_attn_implementation("eager")
    opera = OPERA(scale=60.0, factor=0.1, candidates=3, warmup=3, threshold=None, variant=variant)
    slow = Slow(oracle, wide(oracle.item(seed=3)), opera)
    tokens, score = slow.run(6)
    inputs = wide(family.item(seed=3, pad=2))
    found, value = fast(family, inputs, opera, 6)
    assert found == tokens
    assert value == pytest.approx(score, abs=1e-5)
    assert min(slow.penalties) < -0.05
    assert max(slow.penalties) > 0.3
    _, unpenalised = fast(family, inputs, replace(PLAIN, candidates=3), 6)
    assert abs(unpenalised - value) > 1e-2


@pytest.mark.parametrize(
    ("name", "seed", "changes"),
    [
        ("llava", 0, {}),
        ("llava", 0, {"variant": "released"}),
        ("qwen2_vl", 2, {"scale": 60.0}),  # twice to the same place
        ("internvl", 3, {"scale": 60.0, "candidates": 2, "threshold": 1}),
    ],
)
def test_returns_equal_the_slow_search(
    name: str, seed: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    family, oracle = double(name), double(name)
    oracle.model.set_attn_implementation("eager")
    opera, inputs = replace(SHARP, **changes), wide(family.item(seed=seed))
    slow = Slow(oracle, inputs, opera)
    tokens, score = slow.run(12)
    places, go_back = [], Search._go_back

    def noting(self: Search, place: int) -> Any:
        places.append(place)
        return go_back(self, place)

    monkeypatch.setattr(Search, "_go_back", noting)
    found, value = fast(family, inputs, opera, 12)
    assert slow.returned
    assert (found, places) == (tokens, slow.returned)
    assert value == pytest.approx(score, abs=1e-4)
    straight, _ = fast(family, inputs, replace(opera, threshold=None), 12)
    assert straight != found


# --------------------------------------------------------------------------------- stock beam search


@pytest.mark.parametrize("name", FAMILIES)
def test_without_penalty_and_returns_it_is_stock_beam_search(name: str) -> None:
    family = build(name)
    for seed in range(2):
        inputs = family.item(seed=seed, pad=2 * seed)
        options = {"num_beams": 5, "max_new_tokens": 8, "do_sample": False}
        want = family.model.generate(**inputs, **options)
        with regard.apply(family.model, PLAIN):
            assert torch.equal(family.model.generate(**inputs, **options), want)


class FourTokens(StoppingCriteria):
    """Stop a sequence once its newest token is divisible by four."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids[:, -1] % 4 == 0


OPTIONS: list[dict[str, Any]] = [
    {"eos_token_id": [20, 21, *range(30, 80)], "candidates": VOCAB},
    {"eos_token_id": list(range(10, 100, 3)), "early_stopping": True, "candidates": VOCAB},
    {
        "eos_token_id": list(range(10, 100, 3)),
        "early_stopping": "never",
        "length_penalty": 2.0,
        "candidates": VOCAB,
    },
    {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "eos_token_id": EOS, "min_new_tokens": 4},
    {"bad_words_ids": [[word] for word in range(FIRST_TEXT, 90)], "num_return_sequences": 3},
    {"stopping_criteria": StoppingCriteriaList([FourTokens()]), "candidates": VOCAB},
    {"num_beams": 2, "candidates": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_options_of_generate_act_as_in_stock_beam_search(options: dict[str, Any]) -> None:
    family, options = build("llava"), dict(options)
    opera = replace(PLAIN, candidates=options.pop("candidates", 5))
    options = {
        "num_beams": 5,
        "max_new_tokens": 10,
        "do_sample": False,
        "return_dict_in_generate": True,
    } | options
    for seed in range(3):
        inputs = family.item(seed=seed)
        want = family.model.generate(**inputs, **options, output_scores=True)
        with regard.apply(family.model, opera):
            found = family.model.generate(**inputs, **options)
        assert torch.equal(found.sequences, want.sequences)
        torch.testing.assert_close(found.sequences_scores, want.sequences_scores)
        assert torch.equal(found.beam_indices, want.beam_indices)


def test_default_finds_something_else_and_leaves_the_model_as_it_was() -> None:
    family = build("llava")
    inputs, options = family.item(seed=0), {"num_beams": 5, "max_new_tokens": 16, "do_sample": False}
    want = family.model.generate(**inputs, **options)
    with regard.apply(family.model, "opera") as run:
        found = family.model.generate(**inputs, **options)
        with run.off():
            assert torch.equal(family.model.generate(**inputs, **options), want)
    assert not torch.equal(found, want)
    assert torch.equal(family.model.generate(**inputs, **options), want)


# ------------------------------------------------------------------------------------------- memory


def test_the_cache_never_holds_more_than_the_beams_and_one_set_of_candidates() -> None:
    family = build("llava")
    inputs, seen = family.item(seed=0), []
    prompt = inputs["input_ids"].shape[1]
    width = family.model.config.text_config.hidden_size // family.heads * family.kv_heads

    def measure(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        layers = getattr(output, CACHE).layers
        held = sum(t.untyped_storage().nbytes() for layer in layers for t in (layer.keys, layer.values))
        seen.append(held / (2 * len(layers) * width * 4))  # tokens of beams

    handle = family.decoder.register_forward_hook(measure, with_kwargs=True)
    with regard.apply(family.model, OPERA(candidates=4, threshold=None)):
        family.model.generate(**inputs, num_beams=3, max_new_tokens=10, do_sample=False)
    handle.remove()
    assert seen == [3 * prompt, *(3 * (prompt + step + 4) for step in range(10))]  # one forward a token


def test_the_cache_stays_small_when_the_search_goes_back() -> None:
    family = build("llava")
    inputs, most = family.item(seed=0), 0
    prompt = inputs["input_ids"].shape[1]

    def measure(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal most
        most = max(
            most, *(layer.keys.shape[0] * layer.keys.shape[2] for layer in getattr(output, CACHE).layers)
        )

    handle = family.decoder.register_forward_hook(measure, with_kwargs=True)
    fast(family, inputs, SHARP, 12)
    handle.remove()
    assert most == 3 * (prompt + 11 + SHARP.candidates)
