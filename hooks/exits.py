"""Prompt tokens that leave the decoder after a block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine


class Departure:
    """What an `Exit` sees after one block."""


def install(engine: Engine) -> list[Any]:
    """Hooks that let tokens leave; removed with the others."""
    raise NotImplementedError
