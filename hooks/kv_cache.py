"""The name under which a model takes and returns its keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

_FIELDS = {each.name for each in fields(BaseModelOutputWithPast)}
CACHE = "cache" if "cache" in _FIELDS else "past_key_values"
"""What transformers calls it: `cache` since 5.24, where the old name still works, and `past_key_values` before."""

NAMES = ("cache", "past_key_values")


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The cache among a forward's keyword arguments, by either name; None where there is none."""
    return next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)


def with_cache(kwargs: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """A forward's keyword arguments with `cache` in place of the one that they have."""
    return {**{name: value for name, value in kwargs.items() if name not in NAMES}, CACHE: cache}
