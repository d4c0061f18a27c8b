"""The processes that share a run: those of `accelerate launch`, or this one alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import PartialState


def processes() -> PartialState:
    """This process among those of the run; without a GPU they speak over the CPU."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())
