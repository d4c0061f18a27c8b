"""Prompts and batched generation: images and questions in, texts out."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from .run_folder import EvalError


@dataclass(frozen=True)
class Reply:
    """One answer: its text, how many tokens were generated, and whether the token limit cut it off."""

    text: str
    tokens: int
    cut: bool


@dataclass(frozen=True)
class Search:
    """How tokens are chosen.

    Args:
        temperature: 0 takes the likeliest token; above, tokens are drawn from all of the vocabulary.
        num_beams: of beam search.
        seed: of the draw.
    """

    temperature: float = 0.0
    num_beams: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise EvalError(
                f"temperature={self.temperature}: 0 is greedy, 1 draws from the model's own probs"
            )
        if self.num_beams < 1:
            raise EvalError(f"num_beams={self.num_beams}: at least one beam is needed")

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature > 0

    def describe(self, batch_size: int) -> dict[str, Any]:
        """Its part of `config.json`. Draws depend on the batch, so its size belongs to them."""
        drawn = {"temperature": self.temperature, "batch_size": batch_size} if self.samples else {}
        return {"do_sample": self.samples, "num_beams": self.num_beams, **drawn}

    def arguments(self) -> dict[str, Any]:
        """What `generate` is called with."""
        given = {"do_sample": self.samples, "num_beams": self.num_beams}
        if self.samples:  # from all of the vocabulary, whatever the model's own settings are
            return given | {"temperature": self.temperature, "top_p": 1.0, "top_k": 0}
        return given | {"temperature": None, "top_p": None, "top_k": None}


def make_prompt(processor: Any, text: str, template: str | None = None) -> str:
    """The prompt of one question on one image.

    The processor's chat template is used when it has one; `template` (with `{question}`) goes before it.
    Without either, LLaVA-1.5's form is used with the processor's own image token.

    Raises:
        EvalError: the template has no `{question}`, or no image token is known.
    """
    if template is not None:
        if "{question}" not in template:
            raise EvalError(f"the template {template!r} has no {{question}}: say where the question goes")
        return template.replace("{question}", text)
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    image_token = getattr(processor, "image_token", None)
    if image_token is None:
        raise EvalError(
            f"{type(processor).__name__} has neither a chat template nor an image token: give a template such "
            "as 'USER: <image>\\n{question} ASSISTANT:'"
        )
    return f"USER: {image_token}\n{text} ASSISTANT:"


@contextmanager
def left_padding(processor: Any) -> Iterator[None]:
    """Pad batches on the left while inside, as generation needs; the tokenizer is restored after it."""
    tokenizer = getattr(processor, "tokenizer", processor)
    before = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        yield
    finally:
        tokenizer.padding_side = before[0]
        if before[1] is None:
            tokenizer.pad_token = None


def make_inputs(model: Any, processor: Any, prompts: Sequence[str], images: Sequence[Image.Image]) -> Any:
    """What the model takes, on its device and in its dtype: one image and one prompt each."""
    # Some chat templates write the start token themselves; it must not come twice.
    start = getattr(processor, "tokenizer", processor).bos_token
    kwargs = {"add_special_tokens": False} if start and prompts[0].startswith(start) else {}
    nested = [[image] for image in images]  # some processors take a flat list for the images of one prompt
    inputs = processor(images=nested, text=list(prompts), padding=True, return_tensors="pt", **kwargs)
    return inputs.to(model.device, dtype=model.dtype)


GREEDY = Search()


@torch.inference_mode()
def generate(
    model: Any,
    processor: Any,
    prompts: Sequence[str],
    images: Sequence[Image.Image],
    max_new_tokens: int,
    search: Search = GREEDY,
) -> list[Reply]:
    """Answer a batch: one image and one prompt each. The caller's random numbers are left as they were."""
    tokenizer = getattr(processor, "tokenizer", processor)
    inputs = make_inputs(model, processor, prompts, images)
    with torch.random.fork_rng(enabled=search.samples):
        if search.samples:
            torch.manual_seed(search.seed)
        sequences = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **search.arguments(),
        )
    if not getattr(model.config, "is_encoder_decoder", False):
        sequences = sequences[:, inputs["input_ids"].shape[1] :]
    ends = _end_tokens(model)
    return [_reply(row, ends, tokenizer, max_new_tokens) for row in sequences.tolist()]


def _end_tokens(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    if ends is None:
        return set()
    return {int(end) for end in ends} if isinstance(ends, (list, tuple)) else {int(ends)}


def _reply(row: list[int], ends: set[int], tokenizer: Any, limit: int) -> Reply:
    stop = next((place for place, token in enumerate(row) if token in ends), None)
    count = len(row) if stop is None else stop + 1
    text = tokenizer.decode(row[:count], skip_special_tokens=True).strip()
    return Reply(text, count, stop is None and count >= limit)
