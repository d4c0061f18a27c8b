"""A model for lmms-eval: its own tasks, data, prompts and scores, on a model with one recipe applied.

lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval, read at 0.7.3) finds `manifest` through the entry points
`lmms_eval.models`, so that `lmms-eval --model regard --model_args pretrained=M,recipes=vhr` works wherever both are
installed. Nothing else of regard imports this module, and it is the only one that imports lmms-eval.

Where it differs from lmms-eval's own models:

- The chat template is the processor's, or LLaVA-1.5's short form, as everywhere in regard; lmms-eval's `llava_hf`
  puts a system sentence before it. So a recipe is compared with `recipes=none`, never with another model class.
- Batches of any size; its `llava_hf` takes one prompt at a time.
- `until` is obeyed, by cutting the finished answer; its `llava_hf` and `huggingface` read it and drop it. Blanks around
  an answer go first.
- A generation setting that cannot be followed is an error; its models ignore what they do not know.
- Like its models, and unlike transformers, the temperature alone decides whether tokens are drawn.
"""

import json
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..generation import Search, generate, left_padding, make_inputs, make_prompt
from ..provenance import describe_model, model_name, versions
from ..run_folder import EvalError, slug
from ..settings import Recipe, Setting, fill_matchers, find_sinks, make_settings

try:
    from lmms_eval import utils
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelManifest
except ImportError as missing:
    raise ImportError(f"this adapter needs lmms-eval ({missing}): pip install 'regard[lmms]'") from missing

_READ = {"max_new_tokens", "temperature", "do_sample", "top_p", "top_k", "num_beams", "until"}
_NOT_FOR_US = {
    "image_aspect_ratio"
}  # how LLaVA's own code cuts images; a transformers processor does it its way
_MAX_NEW_TOKENS = 1024  # as in lmms-eval's llava_hf, where a task says nothing
_SINK_IMAGES, _SINK_DOCS = 8, 64
_SINK_PROMPT = "Please describe this image in detail."


def manifest() -> ModelManifest:
    """What lmms-eval's registry takes: the name "regard" and where its class is."""
    return ModelManifest("regard", simple_class_path=f"{__name__}.{RegardModel.__name__}")


@dataclass(frozen=True)
class _Search(Search):
    """Also draws from a part of the vocabulary, which lmms-eval's tasks may ask for."""

    top_p: float = 1.0
    top_k: int = 0

    def arguments(self) -> dict[str, Any]:
        given = super().arguments()
        return given | {"top_p": self.top_p, "top_k": self.top_k} if self.samples else given


@dataclass(frozen=True)
class _Asked:
    """What a task wants of the generation."""

    search: _Search
    max_new_tokens: int
    until: tuple[str, ...]

    @classmethod
    def of(cls, given: Mapping[str, Any], task: str) -> "_Asked":
        """From a task's `generation_kwargs`, after `--gen_kwargs`.

        Raises:
            EvalError: a setting that is not followed here.
        """
        if unknown := sorted(set(given) - _READ - _NOT_FOR_US):
            raise EvalError(
                f"{task} sets {', '.join(f'{key}={given[key]!r}' for key in unknown)} for generation, which regard "
                f"does not follow; it reads {', '.join(sorted(_READ))}. A task file that includes this one can leave "
                "it out"
            )
        until = given.get("until") or ()
        return cls(
            _Search(
                temperature=float(given.get("temperature") or 0),
                num_beams=int(given.get("num_beams") or 1),
                top_p=float(given.get("top_p") or 1),
                top_k=int(given.get("top_k") or 0),
            ),
            int(given.get("max_new_tokens") or _MAX_NEW_TOKENS),
            (until,) if isinstance(until, str) else tuple(until),
        )

    def cut(self, text: str) -> str:
        """The answer up to the first of the stop texts."""
        return text[: min((text.index(stop) for stop in self.until if stop and stop in text), default=None)]


class RegardModel(lmms):  # type: ignore[misc]
    """Any transformers image-text-to-text model with one recipe, for tasks that ask one question on one image.

    The recipe, the versions and what the edits did are kept in `description`; with `--output_path` they are written
    beside lmms-eval's results, as `<date>_regard_<recipe>.json`.

    Args:
        pretrained: name or folder of the model, or "miniature".
        recipes: one recipe as in `regard bench`: "vhr", "var:transfer=0.3", or "vhr+var" to act together; "none" is
            the baseline, the engine with a null edit. From Python also an intervention object, or a list of these.
        dtype: "auto", "float32", "float16" or "bfloat16".
        device: where the model goes; by default the first GPU, under `accelerate launch` each process's own.
        device_map: "auto" spreads the model over the devices; anything else counts as `device`.
        batch_size: prompts generated at once.
        max_batch_size: taken because lmms-eval may give it; not used.
        template: the prompt with `{question}` in it, in place of the chat template; `\\n` is a line break.

    Raises:
        UnknownName: no recipe has that name.
        EvalError: several recipes, or a batch size that is no number.
        ValueError, OSError: the model cannot be loaded.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        recipes: Recipe = "none",
        dtype: str = "auto",
        device: str | None = None,
        device_map: str = "",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        template: str | None = None,
    ) -> None:
        super().__init__()
        from accelerate import Accelerator

        from ..loading import load_model

        self.batch_size = _batch_size(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        own = str(self.accelerator.device) if self._world_size > 1 else None
        self.model, self.processor = load_model(pretrained, dtype, device_map or own or device)
        self.device = self.model.device
        self.pretrained = pretrained
        self.template = template.replace("\\n", "\n") if template else None
        self._setting = _one_setting(recipes, self.model, self.processor)
        self._run: Any = None
        self._started = ""
        self._seed = torch.initial_seed()  # lmms-eval's --seed
        self._batches = 0
        self.description: dict[str, Any] = {}

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answer requests, in their order.

        Raises:
            CannotEdit: the recipe does not work on this model.
            EvalError: a request without exactly one image, or with a generation setting that is not followed.
        """
        from tqdm import tqdm

        if not requests:
            return []
        order = utils.Collator(
            [r.args for r in requests], lambda args: (-len(args[0]), args[0]), grouping=True
        )
        results: list[GenerationResult] = []
        start = time.perf_counter()
        bar = tqdm(total=len(requests), desc=f"regard {self._setting.label}", disable=self.rank != 0)
        with left_padding(self.processor), self._attached(requests[0]), bar:
            for batch in order.get_batched(n=self.batch_size):
                results += self._answer(batch)
                bar.update(len(batch))
        self._describe(requests, results, time.perf_counter() - start)
        return list(order.get_original(results))

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: recipes are defined for generation."""
        raise NotImplementedError("regard only generates: choose tasks with output_type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered: prompts here have one turn."""
        raise NotImplementedError("regard answers one turn: choose tasks with output_type generate_until")

    def clean(self) -> None:
        """Let go of the model, so that lmms-eval can load a judge."""
        self._run = None
        super().clean()

    def _attached(self, request: Any) -> Any:
        """The engine; one run for all calls, so that its report covers them (a response cache makes several)."""
        if self._run is None:
            (self._setting,) = find_sinks(
                [self._setting],
                self.model,
                lambda: self._inputs(list(_first_images(self.task_dict, request))),
            )
            self._run = self._setting.attach(self.model)
        return self._run

    def _inputs(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        prompt = make_prompt(self.processor, _SINK_PROMPT, self.template)
        return dict(make_inputs(self.model, self.processor, [prompt] * len(images), images))

    def _answer(self, batch: Sequence[tuple[Any, ...]]) -> list[GenerationResult]:
        asked = _Asked.of(batch[0][1], batch[0][4])
        seed = zlib.crc32(f"{self._seed}/{self.rank}/{self._batches}".encode())
        self._batches += 1
        prompts, images = [], []
        for text, _, to_visual, number, task, split in batch:
            prompts.append(make_prompt(self.processor, text, self.template))
            images.append(
                _only_image(to_visual(self.task_dict[task][split][number]), f"{task}, item {number}")
            )
        search = replace(asked.search, seed=seed)
        replies = generate(self.model, self.processor, prompts, images, asked.max_new_tokens, search)
        return [GenerationResult(asked.cut(r.text), TokenCounts(output_tokens=r.tokens)) for r in replies]

    def _describe(self, requests: Sequence[Any], results: Sequence[Any], seconds: float) -> None:
        from lmms_eval.models.model_utils.gen_metrics import log_metrics

        tokens = sum(result.token_counts.output_tokens for result in results)
        log_metrics(seconds, tokens, tokens / seconds, {"total_requests": len(results)})
        report = self._run.report()
        tasks = {request.args[4] for request in requests} | set(self.description.get("tasks", ()))
        self.description = {
            "recipe": self._setting.label,
            "interventions": self._setting.describe(),
            "versions": {**versions(), "lmms_eval": version("lmms_eval")},
            "model_name": model_name(self.model),
            "model": describe_model(self.model, self.processor),
            "batch_size": self.batch_size,
            "process": [self.rank, self.world_size],
            "template": self.template,
            "example_prompt": make_prompt(self.processor, requests[0].args[0], self.template),
            "tasks": sorted(tasks),
            "report": {"text": str(report), **report.to_dict()},
        }
        arguments = _command_arguments(requests[0])
        if getattr(arguments, "output_path", None) and self.rank == 0:
            self._write(arguments)

    def _write(self, arguments: Any) -> None:
        self._started = self._started or utils.get_datetime_str(timezone=arguments.timezone).replace(":", "-")
        folder = Path(arguments.output_path) / utils.sanitize_model_name(self.pretrained)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.description, indent=2, ensure_ascii=False, default=str)
        name = f"{self._started}_regard_{slug(self._setting.label)}.json"
        (folder / name).write_text(text + "\n", encoding="utf-8")


def _batch_size(given: int | str) -> int:
    if not str(given).isdecimal() or int(given) < 1:
        raise EvalError(f"batch_size={given!r}: regard needs a number of at least 1")
    return int(given)


def _one_setting(recipes: Recipe, model: Any, processor: Any) -> Setting:
    if isinstance(recipes, str):
        recipes = recipes.strip("\"'")  # lmms-eval leaves the quotes that keep a comma together
    settings = make_settings(recipes if isinstance(recipes, str) else [recipes], model, processor)
    if len(settings) > 2:
        raise EvalError(
            f"recipes={','.join(s.label for s in settings[1:])}: one run of lmms-eval has one recipe; start it once "
            "for each, or join recipes that shall act together with +"
        )
    return fill_matchers(settings[-1:], model, processor)[0]


def _only_image(visuals: Any, where: str) -> Image.Image:
    if not isinstance(visuals, (list, tuple)) or len(visuals) != 1 or not isinstance(visuals[0], Image.Image):
        kinds = [type(visual).__name__ for visual in visuals or ()]
        raise EvalError(f"{where} shows {kinds or 'nothing'}; regard's prompts hold exactly one image")
    return visuals[0].convert("RGB")


def _first_images(data: Mapping[str, Any], request: Any) -> Iterator[Image.Image]:
    """Different images from the start of a task's data, which is the same in every process."""
    _, _, to_visual, _, task, split = request.args
    documents = data[task][split]
    seen: set[bytes] = set()
    for number in range(min(len(documents), _SINK_DOCS)):
        image = _only_image(to_visual(documents[number]), f"{task}, item {number}")
        if image.tobytes() not in seen and len(seen) < _SINK_IMAGES:
            seen.add(image.tobytes())
            yield image


def _command_arguments(request: Any) -> Any:
    """The arguments of lmms-eval's command line. It hands them to tasks only, and a task's method leads to it."""
    return getattr(getattr(request.args[2], "__self__", None), "args", None)
