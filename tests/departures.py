"""Token exit as plainly as it can be: a stock model, no cache, image columns masked block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import oracles
import torch
from families import Family, Inputs
from oracles import EXACT, FORCED, wide
from torch import Tensor

DEPTH = 5


def family_of(name: str) -> Family:
    return oracles.model(name, layers=DEPTH)


@contextmanager
def columns_masked(family: Family, image: Tensor, after: Sequence[int]) -> Iterator[None]:
    """A stock model in which no row but the image's own sees the image in the blocks after `after[sample]`."""

    def hook(layer: int) -> Any:
        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            rows = hidden.shape[1]
            mask = kwargs["attention_mask"]
            if mask is None:
                mask = torch.ones(1, 1, rows, rows, dtype=torch.bool).tril()
            mask = mask.expand(len(image), -1, -1, -1).clone()
            hide = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            assert mask.shape[-1] == rows  # whole sequences only
            for sample, last in enumerate(after):
                for column in image[sample].nonzero().flatten().tolist() if layer > last else ():
                    others = ~torch.nn.functional.pad(image[sample], (0, rows - image.shape[1]))
                    mask[sample, :, others, column] = hide
            return args, {**kwargs, "attention_mask": mask}

        return family.decoder.layers[layer].register_forward_pre_hook(before, with_kwargs=True)

    handles = [hook(layer) for layer in range(len(family.decoder.layers))]
    try:
        yield
    finally:
        [handle.remove() for handle in handles]


@torch.no_grad()
def reference(family: Family, inputs: Inputs, after: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What `logits_of` should give at rows of text, by whole forwards of a stock model without a cache."""
    image = family.image_tokens(inputs)
    grown, prompt = wide(inputs), inputs["input_ids"].shape[1]
    for token in FORCED[:-1]:
        grown = family.grow(grown, torch.full((len(image),), token))
    with columns_masked(family, image, after):
        logits = family.model(**grown, use_cache=False).logits
    return logits[:, :prompt], logits[:, prompt - 1 :]


def compare(family: Family, inputs: Inputs, found: Any, want: Any) -> None:
    """Rows of text; those of the image are put back as they were at the exit."""
    text = ~family.image_tokens(inputs) & inputs["attention_mask"].bool()
    torch.testing.assert_close(found[0][text], want[0][text], **EXACT)
    torch.testing.assert_close(found[1].double(), want[1], **EXACT)


def moved(a: Any, b: Any) -> float:
    return float((a[1] - b[1]).abs().max())


def lengths(cache: Any) -> list[int]:
    return [layer.keys.shape[-2] for layer in cache.layers]


def after_each(*tables: Sequence[bool]) -> Any:
    """A decision that is written down: sample i leaves at the first layer where its table is True."""

    def when(departure: Any) -> Tensor:
        return torch.tensor([table[departure.layer] for table in tables])

    return when
