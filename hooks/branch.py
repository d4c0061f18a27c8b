"""The second stream: another reading of the prompt, run through the same decoder beside the main stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .edits import Branch
from .errors import CannotEdit
from .kv_cache import with_cache
from .session import Session


class Stream:
    """A running branch. T tokens are in its prompt, padded on the left.

    `outputs` maps a layer to the head outputs (B, H, D) at the newest row; `hidden` (B, C) is the last
    block's normalised state there.
    """

    def __init__(self, branch: Branch) -> None:
        self.branch = branch
        self.reads = frozenset(branch.layers)
        self.outputs: dict[int, Tensor] = {}
        self.hidden: Tensor | None = None
        self.cache: DynamicCache | None = None
        self._valid: Tensor | None = None  # (B, T + steps), False on padding
        self._padded = False
        self._next: Tensor | None = None  # (B, 1) or (axes, B, 1): the newest token's position

    @property
    def waiting(self) -> bool:
        """Whether the prompt is read and the stream only has to follow."""
        return self.cache is not None

    # ---- the prompt --------------------------------------------------------------------------------

    def read_part(self, decoder: nn.Module, session: Session, kwargs: dict[str, Any]) -> None:
        """Run the kept tokens of a forward of the decoder that is called with `kwargs`."""
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            embeds = decoder.get_input_embeddings()(kwargs["input_ids"])  # type: ignore[operator]
        order = self._order(session, embeds)
        self._start(decoder, session)
        own = torch.take_along_dim(embeds, order.clamp_min(0)[:, :, None], 1)
        if self.branch.embeds is not None:
            own = self.branch.embeds(own, order, session)
        positions = self._positions(session, kwargs.get("position_ids"))
        mask = self._mask(kwargs.get("attention_mask"), order.clamp_min(0))
        self._run(decoder, own, positions, mask)

    def _order(self, session: Session, embeds: Tensor) -> Tensor:
        """Which token stands where in the stream's prompt, (B, T); -1 on padding, which comes first."""
        assert self.branch.keep is not None
        kept = self.branch.keep(session).to(embeds.device)
        prompt = session.prompt
        if kept.dtype == torch.bool:
            if session.padding is not None:
                kept = kept & ~session.padding.to(kept.device)
            tokens = torch.arange(kept.shape[1], device=kept.device)
            kept = torch.where(kept, tokens, -1)
        if embeds.shape[1] > prompt:  # without a cache, generated tokens come again
            newer = torch.arange(prompt, embeds.shape[1], device=kept.device)
            kept = torch.cat([kept, newer.expand(len(kept), -1)], 1)
        counts = (kept >= 0).sum(1)
        if int(counts.min()) == 0:
            raise CannotEdit(
                f"branch {self.branch.name!r} keeps no token of a prompt: it has nothing but its image"
            )
        last = (kept >= 0).int().argsort(dim=1, stable=True)[:, -int(counts.max()) :]
        order = kept.gather(1, last)
        self._valid = order >= 0
        return order

    def _start(self, decoder: nn.Module, session: Session) -> None:
        assert self._valid is not None
        self._padded = not bool(self._valid.all())
        self.cache = None
        if self.branch.every_step and session.cached:
            self.cache = DynamicCache(config=decoder.config)  # type: ignore[arg-type]

    def _positions(self, session: Session, given: Tensor | None) -> Tensor:
        """Counted as the model does: its number of position axes, and its first position (0 or 1)."""
        assert self._valid is not None
        counted = (self._valid.long().cumsum(1) - 1).clamp_min(0)
        if given is None:
            return counted
        if given.ndim == 3:
            return counted.expand(given.shape[0], -1, -1)
        return counted + int(given[0, 0 if session.padding is None else int(session.padding[0].sum())])

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

    def read_view(self, model: nn.Module, decoder: nn.Module, session: Session, batch: int) -> None:
        """Have the whole model read another prompt, with the stream's own cache, for `batch` rows or beams."""
        assert self.branch.view is not None
        before = session.inputs
        if before is None or before.get("input_ids") is None:
            raise CannotEdit(
                f"branch {self.branch.name!r} reads another prompt, but the model's own arguments are not known: "
                f"call {type(model).__name__} or its generate, with input_ids"
            )
        changed = {**before, **self.branch.view(dict(before), session)}
        own = [name for name in changed if changed[name] is not before.get(name)]
        if "input_ids" in own:
            changed["position_ids"] = None
        if "mm_encoder_outputs" in changed:  # generate has encoded the image already
            again = self.branch.tower is not None or any(name not in _ALONG_ROWS for name in own)
            spare = "mm_encoder_outputs" if again else "pixel_values"
            changed.pop(spare, None)
        ids, mask = changed["input_ids"], changed.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            self._valid = mask.bool()
        else:
            self._valid = torch.ones_like(ids, dtype=torch.bool)
        self._start(decoder, session)
        changed = {**with_cache(changed, self.cache), "use_cache": self.cache is not None}
        if "logits_to_keep" in changed:
            changed["logits_to_keep"] = 1
        for name in ("labels", "cache_position", "return_dict"):
            changed.pop(name, None)
        model(**{name: value for name, value in changed.items() if value is not None})
        self._expand(batch // len(ids), session)

    def _expand(self, times: int, session: Session) -> None:
        """Repeat each row for the beams that it is read for."""
        if times == 1:
            return
        if self.cache is None:
            raise CannotEdit(
                f"branch {self.branch.name!r} reads another prompt: beams need the cache, use_cache=True"
            )
        assert self._valid is not None
        assert self._next is not None
        assert self.hidden is not None
        self.cache.batch_repeat_interleave(times)
        self._valid = self._valid.repeat_interleave(times, 0)
        self._next = self._next.repeat_interleave(times, -2)
        self.hidden = self.hidden.repeat_interleave(times, 0)
        self.outputs = {layer: out.repeat_interleave(times, 0) for layer, out in self.outputs.items()}

    def note_view(self, kwargs: dict[str, Any]) -> None:
        """Positions of a view's prompt, as the model gave them to its decoder."""
        assert self._valid is not None
        given = kwargs.get("position_ids")
        if given is None:
            length = torch.full((len(self._valid), 1), self._valid.shape[1] - 1)
            self._next = length.to(self._valid.device)
        else:
            newest = given[..., -1:]
            self._next = newest.expand(*newest.shape[:-2], len(self._valid), 1)

    # ---- generated tokens --------------------------------------------------------------------------

    def next_positions(self, like: Tensor) -> Tensor:
        """Positions of the next token, with as many axes as `like`, (B, 1) or (axes, B, 1). Moves on by one."""
        assert self._next is not None
        assert self._valid is not None
        newest = self._next.to(like.device)
        # Given no positions, Qwen's model makes those of the image's axes only; `generate` has one of the text too.
        if newest.ndim == like.ndim == 3 and len(like) == len(newest) + 1:
            newest = torch.cat([self._valid.sum(1).to(newest)[None, :, None] - 1, newest])
        self._next = newest + 1
        fresh = torch.ones(len(self._valid), 1, dtype=torch.bool, device=self._valid.device)
        self._valid = torch.cat([self._valid, fresh], 1)
        return self._next if self._next.ndim == like.ndim else self._next.expand_as(like)

    def visible(self) -> Tensor | None:
        """The keys that the newest token sees, (B, 1, 1, K) bool; None when it sees all."""
        assert self._valid is not None
        return self._valid[:, None, None] if self._padded else None

    def step(self, decoder: nn.Module, kwargs: dict[str, Any]) -> None:
        """Follow the main stream by one forward of the decoder, called with `kwargs`."""
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            embeds = decoder.get_input_embeddings()(kwargs["input_ids"])  # type: ignore[operator]
        assert self._next is not None
        images = {} if self.branch.view is None else {n: kwargs[n] for n in _CROSS if n in kwargs}
        self._run(decoder, embeds, self.next_positions(self._next), None, **images)

    def _run(
        self, decoder: nn.Module, embeds: Tensor, positions: Tensor, mask: Tensor | None, **images: Any
    ) -> None:
        assert self._valid is not None
        self._next = positions[..., -1:]
        result = decoder(
            inputs_embeds=embeds,
            attention_mask=self._valid.long() if mask is None else mask,
            position_ids=positions,
            use_cache=self.cache is not None,
            **with_cache(images, self.cache),
        )
        self.hidden = result.last_hidden_state[:, -1]

    def reorder(self, beams: Tensor) -> None:
        """Follow a beam search: row i goes on from row `beams[i]`."""
        if self.cache is None or self._valid is None or self._next is None:
            return
        self.cache.reorder_cache(beams)  # type: ignore[arg-type]
        self._valid = self._valid[beams.to(self._valid.device)]
        self._next = self._next.index_select(-2, beams.to(self._next.device))


_CROSS = ("cross_attention_mask", "full_text_row_masked_out_mask")  # Mllama: which image keys a row sees
_ALONG_ROWS = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")


def unexpanded(given: dict[str, Tensor], forward: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward, without the copies of rows that beams or several answers have.

    `given` is what `generate` was called with: a forward need not be told of pixels that are encoded already.
    """
    ids = given.get("input_ids")
    times = 1 if ids is None or forward["input_ids"] is None else len(forward["input_ids"]) // len(ids)
    if times == 1:
        return {**given, **forward}
    own = {name: forward[name] for name in _ALONG_ROWS if isinstance(forward.get(name), Tensor)}
    rows = {name: value[..., ::times, :] for name, value in own.items()}
    return {**given, **rows}
