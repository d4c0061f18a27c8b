"""Run benchmarks on a model with and without interventions; every item is on disk as soon as it is done."""

import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..hooks.errors import UnknownName
from .cost import PeakMemory
from .data import MINIATURE, Dataset, load_data
from .generation import Search, generate, left_padding, make_inputs, make_prompt
from .pope import PARSERS
from .provenance import describe_model, model_name, session, versions
from .results import Results, build_results
from .run_folder import EvalError, Record, RunFolder, slug
from .settings import Recipe, Setting, fill_matchers, find_sinks, make_settings, with_controls
from .sources import Sources
from .words import chair_words

BENCHMARKS = ("pope", "chair")
CAPTION_PROMPT = "Please describe this image in detail."
_SINK_IMAGES = 8
# POPE's answers are read up to the first full stop; CHAIR's published setting for whole descriptions is 512.
_MAX_NEW_TOKENS = {"pope": 16, "chair": 512}


@dataclass(frozen=True)
class _Work:
    """One generation; twins (one question that stands in several splits) are generated once."""

    image: str
    text: str
    ids: list[str] = field(default_factory=list)
    facts: list[Record] = field(default_factory=list)


def evaluate(
    model: Any,
    processor: Any,
    benchmark: str | Sequence[str] = "pope",
    recipes: Sequence[Recipe] | Mapping[str, Recipe] | str = ("none", "vhr"),
    data: str | Path | Sources = "miniature",
    *,
    items: int = 600,
    seed: int = 0,
    out: str | Path | None = None,
    batch_size: int = 16,
    max_new_tokens: int | Mapping[str, int] | None = None,
    temperature: float = 0.0,
    num_beams: int = 1,
    question_suffix: str = "",
    caption_prompt: str = CAPTION_PROMPT,
    template: str | None = None,
    parser: str = "official",
    words: str | None = None,
    drop_unfinished: bool = False,
    progress: bool = True,
    command: str | None = None,
) -> Results:
    """Measure what recipes do to hallucination, item by item against the same model without them.

    The baseline "none" (the engine with a null edit) always runs, first. Where tokens are drawn, contrastive
    recipes bring a control row: their plausibility mask without the contrast. Starting again with the same
    `out` goes on after the last finished item.

    Args:
        model: a transformers image-text-to-text model, in eval mode.
        processor: its processor.
        benchmark: "pope", "chair", or both.
        recipes: names ("vhr", "var:transfer=0.3", "vhr+var"), intervention objects, or {label: recipe}.
        data: "miniature", a folder with images and COCO or POPE files, or `Sources`.
        items: most images of each benchmark. POPE asks up to eighteen questions on an image.
        seed: of the draw of images, the miniature's scenes, and the questions that are built.
        out: the run's folder. None keeps it in a temporary place until `Results.save`.
        batch_size: prompts generated at once. Smaller batches need less memory.
        max_new_tokens: limit for one answer, or one per benchmark; None is 16 for POPE and 512 for CHAIR.
        temperature: 0 is greedy; above, tokens are drawn, with one seed a batch, the same for all recipes.
        num_beams: of beam search; "opera" needs it, and a batch size of 1.
        question_suffix: added to POPE's questions, for instance
            "\\nAnswer the question using a single word or phrase." as LLaVA does.
        caption_prompt: what CHAIR asks for.
        template: the prompt with `{question}` in it; None uses the processor's chat template.
        parser: how an answer is read as yes or no: one of `pope.PARSERS`.
        words: how CHAIR reduces words, see `words.chair_words`; None takes "regard" for the miniature, and
            else the published "wordnet" where nltk and its data are installed.
        drop_unfinished: for CHAIR, leave out a last sentence that the token limit cut off.
        progress: show progress bars.
        command: noted in the run, for instance the command line.

    Raises:
        UnknownName: no benchmark, recipe or parser has that name.
        DataError: images or annotations are missing.
        RunFolderError: `out` cannot be used for this run.
        EvalError: the model is in training mode, or another argument makes no sense.
    """
    benchmarks = [benchmark] if isinstance(benchmark, str) else list(dict.fromkeys(benchmark))
    words = check_names(benchmarks, parser, words or ("regard" if str(data) == MINIATURE else None))
    _check_model(model, batch_size)
    search = Search(temperature, num_beams, seed)
    settings = fill_matchers(make_settings(recipes, model, processor), model, processor)
    _check_search(settings, search, batch_size)
    if search.samples:
        settings = with_controls(settings)
    protocol = _Protocol(
        prompts={"pope": f"{{question}}{question_suffix}", "chair": caption_prompt},
        template=template,
        limits=_limits(benchmarks, max_new_tokens),
        search=search,
        scoring={"parser": parser, "words": words, "drop_unfinished": drop_unfinished},
    )
    temporary = None
    if out is None:
        temporary = tempfile.TemporaryDirectory(prefix="regard-run-")
        out = temporary.name
    with tempfile.TemporaryDirectory(prefix="regard-data-") as scratch:
        dataset = load_data(data, benchmarks, items, seed, Path(scratch), words)
        settings = _prepare(settings, model, processor, dataset, protocol)
        config = {
            "source": dataset.name,
            "items": items,
            "seed": seed,
            "model_name": model_name(model),
            "model": describe_model(model, processor),
            "data": dataset.describe(),
            "recipes": {setting.label: setting.describe() for setting in settings},
            "versions": versions(),
            "sessions": [session(model, batch_size, command)],
            **protocol.describe(processor, batch_size),
        }
        folder = RunFolder.create(out, config)
        try:
            _keep_data(folder, dataset)
            _Runner(model, processor, folder, dataset, protocol, batch_size).run(settings, progress)
            results = build_results(folder, temporary)
            results.write(dataset.files)
        finally:
            folder.close()
    return results


@dataclass(frozen=True)
class _Protocol:
    """How questions are put and answered: prompts and token limits by benchmark, search, and scoring."""

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


class _Runner:
    """Generates what is not on disk yet."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        folder: RunFolder,
        dataset: Dataset,
        protocol: _Protocol,
        batch_size: int,
    ) -> None:
        self.model, self.processor, self.folder = model, processor, folder
        self.dataset, self.protocol, self.batch_size = dataset, protocol, batch_size

    def run(self, settings: Sequence[Setting], progress: bool) -> None:
        """Every benchmark with every setting, the baseline first."""
        with _bars(progress) as bars, left_padding(self.processor):
            for benchmark in self.protocol.limits:
                units = _work(self.dataset, benchmark, self.protocol.prompts[benchmark])
                for setting in settings:
                    self._run_one(benchmark, setting, units, bars)

    def _run_one(self, benchmark: str, setting: Setting, units: list[_Work], bars: Any) -> None:
        self.folder.drop_torn_line(benchmark, setting.label)
        done = self.folder.read_items(benchmark, setting.label)
        total = sum(len(unit.ids) for unit in units)
        task = bars.add_task(f"{benchmark} {setting.label}", total=total, completed=len(done))
        # Batches are cut before the finished items leave them, so a resumed run forms the same ones.
        batches = [units[place : place + self.batch_size] for place in range(0, len(units), self.batch_size)]
        waiting = [[unit for unit in batch if not done.keys() >= set(unit.ids)] for batch in batches]
        if not any(waiting):
            return
        if self.protocol.search.samples:  # a draw depends on the whole batch
            waiting = [batch if left else [] for batch, left in zip(batches, waiting, strict=True)]
        memory = PeakMemory(self.model.device)
        with setting.attach(self.model) as run:
            memory.start()
            for number, batch in enumerate(waiting):
                if batch:
                    records = self._answer(benchmark, setting, number, batch, done)
                    self.folder.append(benchmark, setting.label, records)
                    bars.advance(task, len(records))
            report = run.report()
        facts = {"text": str(report), "peak_memory": memory.peak(), **report.to_dict()}
        self.folder.write_json(f"reports/{benchmark}-{slug(setting.label)}.json", facts)

    def _answer(
        self,
        benchmark: str,
        setting: Setting,
        number: int,
        batch: Sequence[_Work],
        done: Mapping[str, Record],
    ) -> list[Record]:
        search = self.protocol.search
        search = replace(search, seed=zlib.crc32(f"{search.seed}/{benchmark}/{number}".encode()))
        prompts = [self.protocol.full_prompt(self.processor, unit.text) for unit in batch]
        images = [_read(self.dataset.files[unit.image]) for unit in batch]
        start = time.perf_counter()
        try:
            limit = self.protocol.limits[benchmark]
            replies = generate(self.model, self.processor, prompts, images, limit, search)
        except torch.OutOfMemoryError as error:
            raise EvalError(
                f"{benchmark} with {setting.label}: out of memory at batch size {self.batch_size}. Start again "
                "with a smaller one: finished items are kept"
            ) from error
        seconds = (time.perf_counter() - start) / len(batch)
        records = []
        for unit, prompt, reply in zip(batch, prompts, replies, strict=True):
            for item, facts in zip(unit.ids, unit.facts, strict=True):
                if item in done:
                    continue
                record = {"id": item, "image": unit.image, "recipe": setting.label, **facts, "prompt": prompt}
                record |= {"answer": reply.text, "tokens": reply.tokens, "cut": reply.cut}
                record["seconds"] = round(seconds, 5) if item == unit.ids[0] else 0.0
                if item != unit.ids[0]:
                    record["same_as"] = unit.ids[0]
                records.append(record)
        return records


def _prepare(
    settings: list[Setting], model: Any, processor: Any, dataset: Dataset, protocol: _Protocol
) -> list[Setting]:
    """Settle what depends on the model, and attach each setting once, so that what cannot work fails now."""
    prompt = protocol.full_prompt(processor, protocol.prompts["chair"])

    def inputs() -> Mapping[str, Any]:
        files = list(dataset.files.values())[:_SINK_IMAGES]
        images = [_read(file) for file in files]
        with left_padding(processor):
            return dict(make_inputs(model, processor, [prompt] * len(images), images))

    settings = find_sinks(settings, model, inputs)
    for setting in settings:
        with setting.attach(model):
            pass
    return settings


def _work(dataset: Dataset, benchmark: str, prompt: str) -> list[_Work]:
    """What to generate, like beside like: short batches pad less."""
    units: dict[tuple[str, str], _Work] = {}
    if benchmark == "pope":
        for split, questions in dataset.questions.items():
            for q in questions:
                text = prompt.replace("{question}", q.text)
                unit = units.setdefault((q.image, text), _Work(q.image, text))
                unit.ids.append(f"{split}/{q.question_id}")
                unit.facts.append({"split": split, "label": q.label, "question": q.text})
    else:
        for image in dataset.truth:
            units[image, prompt] = _Work(image, prompt, [image], [{}])
    sizes = dataset.sizes
    return sorted(units.values(), key=lambda unit: (sizes[unit.image], len(unit.text), unit.image, unit.text))


def _read(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def check_names(benchmarks: Sequence[str], parser: str, words: str | None) -> str:
    """Raise for a name that nobody knows; the name of the word configuration otherwise."""
    if not benchmarks:
        raise EvalError(f"no benchmark is named; known: {', '.join(BENCHMARKS)}")
    for name in benchmarks:
        if name not in BENCHMARKS:
            raise UnknownName("benchmark", name, BENCHMARKS)
    if parser not in PARSERS:
        raise UnknownName("answer parser", parser, PARSERS)
    return chair_words(words).name


def _check_model(model: Any, batch_size: int) -> None:
    if getattr(model, "training", False):
        raise EvalError(
            "the model is in training mode, where dropout changes answers: call model.eval() first"
        )
    if batch_size < 1:
        raise EvalError(f"batch_size={batch_size}: at least one prompt is needed")


def _check_search(settings: Sequence[Setting], search: Search, batch_size: int) -> None:
    """OPERA has its own search: better known before the other recipes have run."""
    named = {getattr(part, "name", part) for setting in settings for part in setting.interventions}
    if "opera" in named and (search.num_beams == 1 or search.samples or batch_size > 1):
        raise EvalError(
            f"opera is a beam search of one prompt at a time, got num_beams={search.num_beams}, "
            f"temperature={search.temperature}, batch_size={batch_size}: use num_beams=5 and batch_size=1"
        )


def _limits(benchmarks: Sequence[str], given: int | Mapping[str, int] | None) -> dict[str, int]:
    if isinstance(given, Mapping):
        unknown = [name for name in given if name not in BENCHMARKS]
        if unknown:
            raise UnknownName("benchmark", unknown[0], BENCHMARKS)
        limits = {**_MAX_NEW_TOKENS, **given}
    else:
        limits = {name: _MAX_NEW_TOKENS[name] if given is None else given for name in benchmarks}
    for name in benchmarks:
        if limits[name] < 1:
            raise EvalError(f"max_new_tokens={limits[name]} for {name}: an answer needs at least one token")
    return {name: limits[name] for name in benchmarks}


def _keep_data(folder: RunFolder, dataset: Dataset) -> None:
    """Put the questions and the truth beside the answers, so that a run can be scored from its folder alone."""
    if dataset.questions:
        folder.write_json(
            "data/questions.json", {k: [asdict(q) for q in v] for k, v in dataset.questions.items()}
        )
    if dataset.truth:
        folder.write_json("data/truth.json", dataset.truth)


@contextmanager
def _bars(show: bool) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("taken"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr), disable=not show) as bars:
        yield bars
