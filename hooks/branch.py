"""The second stream: part of the prompt, run through the same decoder beside the main stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .edits import Branch
from .errors import CannotEdit
from .session import Session


class Stream:
    """A running branch. T tokens of the prompt are kept per sample, padded on the left.

    `outputs` maps a layer to the head outputs (B, H, D) at the newest row; `hidden` (B, C) is the last
    block's normalised state there.
    """

    def __init__(self, branch: Branch) -> None:
        self.branch = branch
        self.reads = frozenset(branch.layers)
        self.outputs: dict[int, Tensor] = {}
        self.hidden: Tensor | None = None
        self._cache: DynamicCache | None = None
        self._valid: Tensor | None = None  # (B, T + steps), False on padding
        self._axes: int | None = None
        self._first = 0

    def advance(self, decoder: nn.Module, session: Session, kwargs: dict[str, Any]) -> None:
        """Follow the main stream by one forward of the decoder, called with `kwargs`."""
        if self.hidden is not None and not self.branch.every_step:
            return
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            embeds = decoder.get_input_embeddings()(kwargs["input_ids"])  # type: ignore[operator]
        if self._cache is None or not session.cached:
            self._read_prompt(decoder, session, embeds, kwargs)
        else:
            self._step(decoder, embeds)

    def _read_prompt(
        self, decoder: nn.Module, session: Session, embeds: Tensor, kwargs: dict[str, Any]
    ) -> None:
        kept = self.branch.keep(session)
        if session.padding is not None:
            kept = kept & ~session.padding
        kept = torch.nn.functional.pad(kept, (0, embeds.shape[1] - kept.shape[1]), value=True).to(
            embeds.device
        )
        counts = kept.sum(1)
        longest, shortest = int(counts.max()), int(counts.min())
        if shortest == 0:
            raise CannotEdit(
                f"branch {self.branch.name!r} keeps no token of a prompt: it has nothing but its image"
            )
        order = kept.int().argsort(dim=1, stable=True)[:, -longest:]  # kept tokens last, in their order
        self._valid = kept.gather(1, order)
        if self.branch.every_step and session.cached:
            self._cache = DynamicCache(config=decoder.config)  # type: ignore[arg-type]
        own = torch.take_along_dim(embeds, order[:, :, None], 1)
        self._note_positions(session, kwargs.get("position_ids"))
        self._run(decoder, own, self._mask(kwargs.get("attention_mask"), order))

    def _note_positions(self, session: Session, positions: Tensor | None) -> None:
        """Count as the model does: its number of position axes, and its first position (0 or 1)."""
        if positions is None:
            return
        if positions.ndim == 3:
            self._axes = positions.shape[0]
        else:
            self._first = int(positions[0, 0 if session.padding is None else int(session.padding[0].sum())])

    def _mask(self, mask: Any, order: Tensor) -> Tensor | None:
        """The kept rows and columns of a mask that the model made itself (a prefix mask, say)."""
        if not isinstance(mask, Tensor) or mask.ndim != 4 or self._valid is None:
            return None
        rows = mask.expand(order.shape[0], -1, -1, -1).take_along_dim(order[:, None, :, None], 2)
        seen = rows.take_along_dim(order[:, None, None, :], 3)
        if seen.dtype != torch.bool:
            seen = seen >= 0
        own = torch.eye(
            order.shape[1], dtype=torch.bool, device=seen.device
        )  # padding sees itself: no empty row
        return (seen & self._valid[:, None, None, :]) | own

    def _step(self, decoder: nn.Module, embeds: Tensor) -> None:
        assert self._valid is not None
        fresh = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        self._valid = torch.cat([self._valid, fresh], 1)
        self._run(decoder, embeds, None)

    def _run(self, decoder: nn.Module, embeds: Tensor, mask: Tensor | None) -> None:
        assert self._valid is not None
        positions = (self._valid.long().cumsum(1) - 1).clamp_min(0)[:, -embeds.shape[1] :] + self._first
        result = decoder(
            inputs_embeds=embeds,
            attention_mask=self._valid.long() if mask is None else mask,
            position_ids=positions if self._axes is None else positions.expand(self._axes, -1, -1),
            past_key_values=self._cache,
            use_cache=self._cache is not None,
        )
        self.hidden = result.last_hidden_state[:, -1]

    def reorder(self, beams: Tensor) -> None:
        """Follow a beam search: row i goes on from row `beams[i]`."""
        if self._cache is not None and self._valid is not None:
            self._cache.reorder_cache(beams)  # type: ignore[arg-type]
            self._valid = self._valid[beams.to(self._valid.device)]
