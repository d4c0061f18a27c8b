"""Streams that run as one batch: weights are read once, caches and masks stay apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .anatomy import Anatomy
from .kv_cache import NAMES, cache_in, with_cache
from .session import Session

if TYPE_CHECKING:
    from .branch import Stream


class Caches:
    """The caches of all streams behind one `update`. Everything else is asked of the main stream's."""

    def __init__(self, caches: Sequence[Any]) -> None:
        self.main, self._caches = caches[0], caches
        self.newest: list[tuple[Tensor, Tensor]] = []

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Give each stream's rows to its own cache; returns the main stream's keys and values."""
        count = len(self._caches)
        rows = zip(self._caches, key.chunk(count), value.chunk(count), strict=True)
        self.newest = [cache.update(k, v, layer_idx, *args, **kwargs) for cache, k, v in rows]
        return self.newest[0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.main, name)


@dataclass
class Joint:
    """One forward over the main stream and others, a batch of n * B rows with one new token each.

    `masks` has each stream's visible keys, (B, 1, 1, K) bool, or None where all are.
    """

    caches: Caches
    masks: list[Tensor | None]
    streams: list[Stream] = field(default_factory=list)

    def parts(self, tensor: Tensor) -> Sequence[Tensor]:
        """The rows of each stream."""
        return tensor.chunk(len(self.masks))


def can_join(parts: Anatomy) -> bool:
    """Whether this decoder's forward treats the rows of a batch alike, so that streams can be stacked.

    Rotary positions come with each row. A sliding window or cross-attention would need masks and keys that
    are made inside the decoder.
    """
    config: Any = parts.decoder.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    rotary = any("rotary" in name for name, _ in parts.decoder.named_children())
    return (
        rotary
        and not parts.cross_layers
        and not parts.lost_layers
        and kinds == {"full_attention"}
        and not window
    )


_STACKED = {"inputs_embeds", "input_ids", "position_ids", "attention_mask", *NAMES}


def join(
    decoder: nn.Module, session: Session, streams: list[Stream], kwargs: dict[str, Any]
) -> tuple[Joint, dict[str, Any]] | None:
    """The decoder's arguments for all streams at once; None when they do not allow it."""
    embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    if embeds is None:
        embeds = decoder.get_input_embeddings()(kwargs["input_ids"])  # type: ignore[operator]
    others = [name for name, value in kwargs.items() if name not in _STACKED and isinstance(value, Tensor)]
    plain = mask is None or isinstance(mask, Tensor)
    if others or not plain or embeds.shape[1] != 1 or kwargs.get("output_attentions"):
        return None
    batch = embeds.shape[0]
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.full((batch, 1), session.seen, device=embeds.device)
    positions = positions.expand(*positions.shape[:-2], batch, 1)
    own = [stream.next_positions(positions) for stream in streams]
    visible = mask  # of four axes: made by the model itself
    if mask is not None and mask.ndim == 2:
        padded = session._once("padded", lambda: not bool(mask.all()))
        visible = mask[:, None, None].bool() if padded else None
    joint = Joint(
        Caches([cache_in(kwargs), *(stream.cache for stream in streams)]),
        [visible, *(stream.visible() for stream in streams)],
        streams,
    )
    stacked = {
        "input_ids": None,
        "inputs_embeds": embeds.repeat(1 + len(streams), 1, 1),
        "position_ids": torch.cat([positions, *own], -2),
        "attention_mask": None,
    }
    return joint, with_cache({**kwargs, **stacked}, joint.caches)
