"""How questions are put and answered: prompts and token limits by benchmark, search, and scoring."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..hooks.errors import UnknownName
from .benchmarks import BENCHMARKS
from .generation import Search, make_prompt
from .run_folder import EvalError
from .settings import Setting

CHOICES = ("parser", "chair", "drop_unfinished", "amber_words", "similarity", "amber_parser", "mme_parser")


@dataclass(frozen=True)
class Protocol:
    """What must be the same for every recipe of a run.

    Attributes:
        prompts: what each benchmark asks, with `{question}` for an item's own text.
        template: the whole prompt with `{question}` in it; None is the processor's chat template.
        limits: new tokens of an answer, by benchmark.
        search: how tokens are chosen.
        scoring: how answers are read, as in `config.json`.
    """

    prompts: Mapping[str, str]
    template: str | None
    limits: Mapping[str, int]
    search: Search
    scoring: Mapping[str, Any]

    def full_prompt(self, processor: Any, text: str) -> str:
        """A question as the model reads it."""
        return make_prompt(processor, text, self.template)

    def describe(self, processor: Any, batch_size: int) -> dict[str, Any]:
        """Its part of `config.json`."""
        search = self.search.describe(batch_size)
        return {
            "benchmarks": list(self.limits),
            "prompts": {name: self.full_prompt(processor, self.prompts[name]) for name in self.limits},
            "generation": {name: {"max_new_tokens": most, **search} for name, most in self.limits.items()},
            "scoring": self.scoring,
        }


def prompts(
    benchmarks: Sequence[str], question_suffix: str = "", caption_prompt: str | None = None
) -> dict[str, str]:
    """What each benchmark asks: questions with a suffix, CHAIR with a prompt of the user's."""
    asked = {name: BENCHMARKS[name].prompt for name in benchmarks}
    asked = {name: text + question_suffix if "{question}" in text else text for name, text in asked.items()}
    if caption_prompt is not None and "chair" in asked:
        asked["chair"] = caption_prompt
    return asked


def limits(benchmarks: Sequence[str], given: int | Mapping[str, int] | None) -> dict[str, int]:
    """New tokens of an answer, by benchmark.

    Raises:
        UnknownName: a benchmark that there is not.
        EvalError: a limit below one token.
    """
    usual = {name: BENCHMARKS[name].max_new_tokens for name in benchmarks}
    if isinstance(given, Mapping):
        unknown = [name for name in given if name not in BENCHMARKS]
        if unknown:
            raise UnknownName("benchmark", unknown[0], list(BENCHMARKS))
        found = {name: given.get(name, most) for name, most in usual.items()}
    else:
        found = {name: most if given is None else given for name, most in usual.items()}
    for name, most in found.items():
        if most < 1:
            raise EvalError(f"max_new_tokens={most} for {name}: an answer needs at least one token")
    return found


def settle(benchmarks: Sequence[str], scoring: Mapping[str, Any]) -> dict[str, Any]:
    """How answers are read, with a name for every choice that was left open.

    Raises:
        UnknownName: no benchmark, parser or configuration has that name, or no benchmark has such a choice.
        EvalError: no benchmark, or something that a choice needs is not installed.
    """
    if not benchmarks:
        raise EvalError(f"no benchmark is named; known: {', '.join(BENCHMARKS)}")
    for name in benchmarks:
        if name not in BENCHMARKS:
            raise UnknownName("benchmark", name, list(BENCHMARKS))
    for choice in scoring:
        if choice not in CHOICES:
            raise UnknownName("choice of scoring", choice, CHOICES)
    settled: dict[str, Any] = {}
    for name in benchmarks:
        settled |= BENCHMARKS[name].settle(scoring)
    return settled


def check_model(model: Any, batch_size: int) -> None:
    """Raise for a model in training mode, and for a batch of none."""
    if getattr(model, "training", False):
        raise EvalError(
            "the model is in training mode, where dropout changes answers: call model.eval() first"
        )
    if batch_size < 1:
        raise EvalError(f"batch_size={batch_size}: at least one prompt is needed")


def check_search(settings: Sequence[Setting], search: Search, batch_size: int) -> None:
    """OPERA has its own search: better known before the other recipes have run."""
    named = {getattr(part, "name", part) for setting in settings for part in setting.interventions}
    if "opera" in named and (search.num_beams == 1 or search.samples or batch_size > 1):
        raise EvalError(
            f"opera is a beam search of one prompt at a time, got num_beams={search.num_beams}, "
            f"temperature={search.temperature}, batch_size={batch_size}: use num_beams=5 and batch_size=1"
        )
