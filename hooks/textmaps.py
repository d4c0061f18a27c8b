"""Capture of the image's attention to the text from the query and key of stock attention calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..kernels.maps import concept_maps
from .denoiser import Grid
from .latent_edits import AttentionCall


class Attention(TorchFunctionMode):
    """Within one attention module: hands its first scaled-dot-product call to `handle`, leaves all else."""

    def __init__(self, handle: Callable[..., Tensor]) -> None:
        super().__init__()
        self._handle = handle
        self.hits = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As `TorchFunctionMode`."""
        if func is F.scaled_dot_product_attention:
            self.hits += 1
            if self.hits == 1:  # an image adapter attends to its own tokens in a second call
                return self._handle(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class Collector:
    """Sums the maps of one forward, by resolution; the mean over layers comes at the end."""

    def __init__(self, wanted: set[Grid], rows: slice, enough: int | None = None) -> None:
        self._wanted, self._rows, self._enough = wanted, rows, enough
        self.sums: dict[Grid, Tensor] = {}
        self.counts: dict[Grid, int] = {}

    def add(self, call: AttentionCall) -> None:
        """Take the map of one attention to the text, if it is wanted."""
        if call.site.kind == "self" or call.grid not in self._wanted:
            return
        mask = call.mask
        if mask is not None:
            mask = mask[self._rows] if mask.shape[0] == call.query.shape[0] else mask
            mask = mask[..., call.image, :] if mask.shape[-2] > 1 else mask
        query, key = call.query[self._rows][:, :, call.image], call.key[self._rows]
        columns = torch.arange(key.shape[2], device=key.device)[call.text]
        probs = concept_maps(query, key, columns, scale=call.scale, mask=mask).unflatten(1, call.grid)
        known = self.sums.get(call.grid)
        self.sums[call.grid] = probs if known is None else known + probs
        self.counts[call.grid] = self.counts.get(call.grid, 0) + 1
        if self._enough is not None and sum(self.counts.values()) == self._enough:
            raise Enough

    def mean(self, grid: Grid) -> Tensor:
        """(B, h, w, T)."""
        return self.sums[grid] / self.counts[grid]


class Enough(Exception):
    """All maps are in: the rest of the forward is not needed. Not an error."""


@contextmanager
def frozen(module: torch.nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient, so that the forward keeps only what the latents' gradient needs."""
    asking = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def may_stop_early(module: torch.nn.Module) -> bool:
    """Whether a forward may be left half-way: not where other tools do work at its end."""
    return not any(hasattr(part, "_hf_hook") or hasattr(part, "peft_config") for part in module.modules())
