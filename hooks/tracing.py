"""Traces of nnsight on the model that is edited: they follow the main stream alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def trace_of(model: nn.Module) -> Any:
    """The interleaver of the nnsight trace that follows this model right now, or None.

    nnsight 0.8 leaves its state on every module that it wraps. Nothing of it is imported.
    """
    state: Any = vars(model).get("__nnsight__")
    return None if state is None else state.active()[0]


@contextmanager
def untraced(model: nn.Module) -> Iterator[None]:
    """Let the modules run without the trace, which would take a branch's visit of them for the main stream's."""
    interleaver = trace_of(model)
    if interleaver is None:
        yield
        return
    interleaver.interleaving = False
    try:
        yield
    finally:
        interleaver.interleaving = True
