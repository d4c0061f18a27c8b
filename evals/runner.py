"""Run benchmarks on a model with and without interventions; every item is on disk as soon as it is done.

Under `accelerate launch`, every process takes its share of the batches. Batches are cut as one process would cut them,
so that answers do not depend on the number of processes.
"""

import sys
import tempfile
import time
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from . import protocol as protocols
from .benchmark import Item
from .cost import PeakMemory
from .data import MINIATURE, Dataset, load_data
from .generation import Search, generate, left_padding, make_inputs
from .processes import processes
from .protocol import Protocol
from .provenance import describe_model, model_name, session, versions
from .results import Results, build_results
from .run_folder import EvalError, Record, RunFolder, slug
from .settings import Recipe, Setting, fill_matchers, find_sinks, make_settings, with_controls
from .sources import DataError, Sources

CAPTION_PROMPT = "Please describe this image in detail."
_SINK_IMAGES = 8


@dataclass(frozen=True)
class _Work:
    """One generation; twins (one question that stands in several splits) are generated once."""

    image: str
    text: str
    items: list[Item] = field(default_factory=list)

    @property
    def ids(self) -> list[str]:
        """The items that it answers."""
        return [item.id for item in self.items]


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
    chair: str | None = None,
    drop_unfinished: bool = False,
    scoring: Mapping[str, Any] | None = None,
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
        benchmark: one or several of `BENCHMARKS`, such as "pope" or "chair".
        recipes: names ("vhr", "var:transfer=0.3", "vhr+var"), intervention objects, or {label: recipe}.
        data: "miniature", a folder with images and COCO or POPE files, or `Sources`.
        items: most images of each benchmark. POPE asks up to eighteen questions on an image.
        seed: of the draw of images, the miniature's scenes, and the questions that are built.
        out: the run's folder. None keeps it in a temporary place until `Results.save`.
        batch_size: prompts generated at once. Smaller batches need less memory.
        max_new_tokens: limit for one answer, or one per benchmark; None is 16 for questions and 512 for captions.
        temperature: 0 is greedy; above, tokens are drawn, with one seed a batch, the same for all recipes.
        num_beams: of beam search; "opera" needs it, and a batch size of 1.
        question_suffix: added to questions, for instance
            "\\nAnswer the question using a single word or phrase." as LLaVA does.
        caption_prompt: what CHAIR asks for.
        template: the prompt with `{question}` in it; None uses the processor's chat template.
        parser: how POPE's answers are read as yes or no: one of `answers.PARSERS`.
        chair: how CHAIR reads words, a name of `chair.CONFIGURATIONS`; None takes "regard" for the miniature, and
            else the published "wordnet" where nltk and its data are installed.
        drop_unfinished: for CHAIR, leave out a last sentence that the token limit cut off.
        scoring: further choices by name: "amber_words", "similarity", "amber_parser", "mme_parser".
        progress: show progress bars.
        command: noted in the run, for instance the command line.

    Raises:
        UnknownName: no benchmark, recipe or parser has that name.
        DataError: images or annotations are missing.
        RunFolderError: `out` cannot be used for this run.
        EvalError: the model is in training mode, or another argument makes no sense.
    """
    benchmarks = [benchmark] if isinstance(benchmark, str) else list(dict.fromkeys(benchmark))
    asked = {"parser": parser, "chair": chair, "drop_unfinished": drop_unfinished, **(scoring or {})}
    if str(data) == MINIATURE and chair is None:
        asked["chair"] = "regard"
    asked = protocols.settle(benchmarks, asked)
    protocols.check_model(model, batch_size)
    protocol = Protocol(
        prompts=protocols.prompts(benchmarks, question_suffix, caption_prompt),
        template=template,
        limits=protocols.limits(benchmarks, max_new_tokens),
        search=Search(temperature, num_beams, seed),
        scoring=asked,
    )
    settings = _settings(recipes, model, processor, protocol, batch_size)
    state = processes()
    place, temporary = _place(out, state)
    with tempfile.TemporaryDirectory(prefix="regard-data-") as scratch:
        dataset = load_data(data, benchmarks, items, seed, Path(scratch), protocol.scoring)
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
            "sessions": [session(model, batch_size, command, state.num_processes)],
            **protocol.describe(processor, batch_size),
        }
        folder = _open(place, config, dataset, state)
        try:
            _Runner(model, processor, folder, dataset, protocol, batch_size, state).run(settings, progress)
            results = build_results(folder, temporary)
            if state.is_main_process:
                results.write(dataset.files)
        finally:
            folder.close()
        state.wait_for_everyone()
    return results


def _settings(
    recipes: Sequence[Recipe] | Mapping[str, Recipe] | str,
    model: Any,
    processor: Any,
    protocol: Protocol,
    batch_size: int,
) -> list[Setting]:
    """What is compared; where tokens are drawn, with the controls of contrastive recipes."""
    settings = fill_matchers(make_settings(recipes, model, processor), model, processor)
    protocols.check_search(settings, protocol.search, batch_size)
    return with_controls(settings) if protocol.search.samples else settings


def _place(out: str | Path | None, state: Any) -> tuple[Path, Any]:
    """The run's folder, and what keeps it alive where it is a temporary one."""
    if out is not None:
        return Path(out), None
    if state.num_processes > 1:
        raise EvalError(f"{state.num_processes} processes need a folder that they share: give out=")
    temporary = tempfile.TemporaryDirectory(prefix="regard-run-")
    return Path(temporary.name), temporary


def _open(out: Path, config: Mapping[str, Any], dataset: Dataset, state: Any) -> RunFolder:
    """The run's folder: the first process makes it, the others read it."""
    if state.is_main_process:
        folder = RunFolder.create(out, config)
        for name, data in dataset.parts.items():  # so that a run can be scored from its folder alone
            folder.write_json(f"data/{name}.json", data)
    state.wait_for_everyone()
    return folder if state.is_main_process else RunFolder.load(out)


class _Runner:
    """Generates what is not on disk yet."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        folder: RunFolder,
        dataset: Dataset,
        protocol: Protocol,
        batch_size: int,
        state: Any,
    ) -> None:
        self.model, self.processor, self.folder = model, processor, folder
        self.dataset, self.protocol, self.batch_size = dataset, protocol, batch_size
        self.state = state
        self.rank = state.process_index if state.num_processes > 1 else None

    def run(self, settings: Sequence[Setting], progress: bool) -> None:
        """Every benchmark with every setting, the baseline first."""
        with _bars(progress and self.state.is_main_process) as bars, left_padding(self.processor):
            for benchmark in self.protocol.limits:
                units = _work(self.dataset, benchmark, self.protocol.prompts[benchmark])
                for setting in settings:
                    self._run_one(benchmark, setting, units, bars)

    def _join(self, benchmark: str, setting: Setting, order: Sequence[str]) -> None:
        """Bring what several processes have done into one file; all wait for it."""
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            self.folder.join(benchmark, setting.label, order)
        self.state.wait_for_everyone()

    def _run_one(self, benchmark: str, setting: Setting, units: list[_Work], bars: Any) -> None:
        order = [item for unit in units for item in unit.ids]
        self._join(benchmark, setting, order)  # a stopped session may have left parts
        if self.rank is None:
            self.folder.drop_torn_line(benchmark, setting.label)
        done = self.folder.places(benchmark, setting.label).keys()
        task = bars.add_task(f"{benchmark} {setting.label}", total=len(order), completed=len(done))
        # Batches are cut before the finished items leave them, so a resumed run forms the same ones.
        batches = [units[place : place + self.batch_size] for place in range(0, len(units), self.batch_size)]
        waiting = [[unit for unit in batch if not done >= set(unit.ids)] for batch in batches]
        if not any(waiting):
            return
        if self.protocol.search.samples:  # a draw depends on the whole batch
            waiting = [batch if left else [] for batch, left in zip(batches, waiting, strict=True)]
        memory = PeakMemory(self.model.device)
        with setting.attach(self.model) as run:
            memory.start()
            todo = [(number, batch) for number, batch in enumerate(waiting) if batch]
            for number, batch in todo[self.state.process_index :: self.state.num_processes]:
                records = self._answer(benchmark, setting, number, batch, done)
                self.folder.append(benchmark, setting.label, records, self.rank)
                bars.advance(task, len(records) * self.state.num_processes)
            report = run.report()
        self._join(benchmark, setting, order)
        if self.state.is_main_process:
            facts = {"text": str(report), "peak_memory": memory.peak(), **report.to_dict()}
            self.folder.write_json(f"reports/{benchmark}-{slug(setting.label)}.json", facts)

    def _answer(
        self, benchmark: str, setting: Setting, number: int, batch: Sequence[_Work], done: Collection[str]
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
            for item in unit.items:
                if item.id in done:
                    continue
                record = {"id": item.id, "image": unit.image, "recipe": setting.label, **item.facts}
                record |= {"prompt": prompt, "answer": reply.text, "tokens": reply.tokens, "cut": reply.cut}
                record["seconds"] = round(seconds, 5) if item is unit.items[0] else 0.0
                if item is not unit.items[0]:
                    record["same_as"] = unit.items[0].id
                records.append(record)
        return records


def _prepare(
    settings: list[Setting], model: Any, processor: Any, dataset: Dataset, protocol: Protocol
) -> list[Setting]:
    """Settle what depends on the model, and attach each setting once, so that what cannot work fails now."""
    prompt = protocol.full_prompt(processor, CAPTION_PROMPT)

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
    for item in dataset.items[benchmark]:
        text = prompt.replace("{question}", item.text)
        units.setdefault((item.image, text), _Work(item.image, text)).items.append(item)
    sizes = dataset.sizes
    return sorted(units.values(), key=lambda unit: (sizes[unit.image], len(unit.text), unit.image, unit.text))


def _read(file: Path) -> Image.Image:
    """An image as RGB.

    Raises:
        DataError: it cannot be read to its end.
    """
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow says SyntaxError for some broken PNG files
        raise DataError(
            f"{file} could be read before and cannot be now ({error}): when it is there again, start the same "
            "command again; finished items are kept"
        ) from error


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
