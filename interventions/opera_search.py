"""OPERA's loop: beam search over candidates that are looked ahead, with returns to earlier states.

Notation: W beams, N candidates, V the vocabulary, S prompt tokens, t response tokens chosen so far. One
prompt at a time: batch axes in front of W are 1, as transformers' beam helpers have them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput

from ..hooks.errors import CannotEdit
from ..hooks.kv_cache import CACHE, with_cache
from ..hooks.session import Call

if TYPE_CHECKING:
    from .opera import OPERA


class Reader(threading.local):
    """Reads the last layer's attention rows while candidates are looked ahead, in the thread that asks."""

    def __init__(self, rows: Callable[..., Tensor]) -> None:
        self._rows = rows
        self.visible: Tensor | None = None
        self.rows: Tensor | None = None

    def read(self, call: Call) -> None:
        """Keep the rows (W, N, K) where a search waits for them; changes nothing."""
        if self.visible is not None:
            self.rows = self._rows(call.query, call.key, visible=self.visible.to(call.query.device))


@dataclass(frozen=True)
class State:
    """The beams before token t is chosen. Tensors are never changed in place, so a state can be kept.

    `running` (1, W, length) and `done` are sequences, `parents` and `done_parents` (1, W, new tokens) the
    beam that each token came from, `sums` (W, t) the logs of the columns' products.
    """

    step: int
    running: Tensor
    scores: Tensor
    parents: Tensor
    done: Tensor
    done_scores: Tensor
    done_parents: Tensor
    finished: Tensor
    improvable: Tensor
    sums: Tensor


@dataclass(frozen=True)
class Ahead:
    """Candidates (W, N) with their scores, the logits after them (W, N, V), sums and columns."""

    tokens: Tensor
    scores: Tensor
    logits: Tensor
    sums: Tensor
    columns: Tensor


def opera_search(
    opera: OPERA,
    reader: Reader,
    image_token: int | None,
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **model_kwargs: Any,
) -> Any:
    """What `generate` calls in place of its own beam search; returns what that returns.

    Raises:
        CannotEdit: several prompts at once, no ids, or a cache that cannot drop rows.
    """
    config = generation_config
    if input_ids.shape[0] != config.num_beams:
        raise CannotEdit(
            f"opera goes back with all beams of one prompt, and got {input_ids.shape[0] // config.num_beams} "
            "prompts at once: generate for one prompt after the other"
        )
    if input_ids.shape[1] == 0:
        raise CannotEdit("opera needs input_ids, to know which tokens are the image's: pass them to generate")
    image = input_ids[:, None] == (-1 if image_token is None else image_token)
    search = Search(opera, reader, image, model, input_ids, config, model_kwargs)
    search.processors, search.criteria = logits_processor, stopping_criteria
    return search.run()


class Search:
    """One `generate` call."""

    processors: Any
    criteria: Any

    def __init__(
        self,
        opera: OPERA,
        reader: Reader,
        image: Tensor,
        model: Any,
        ids: Tensor,
        config: Any,
        kwargs: dict[str, Any],
    ) -> None:
        self.opera, self.reader, self.image, self.model = opera, reader, image, model
        self.ids, self.config, self.kwargs = ids, config, kwargs
        self.prompt, self.beams = ids.shape[1], config.num_beams
        eos = config._eos_token_tensor
        self.kept = max(2, 1 + (0 if eos is None else len(eos))) * self.beams
        self.noted: list[list[int]] = []  # by step: for each beam, the column of the maximum
        self.states: dict[int, State] = {}
        self.chosen: dict[int, list[tuple[int, int]]] = {}  # by step: beam and token
        self.forbidden: dict[int, list[tuple[int, int]]] = {}
        self.returns: dict[int, int] = {}

    @torch.no_grad()
    def run(self) -> Any:
        """Search until no beam can improve."""
        state, logits = self._start()
        again = False
        while True:
            ahead = self._look_ahead(state, logits, again)
            target = None if again else self._place_to_return_to(ahead.columns.tolist(), state.step)
            if target is not None:
                state, logits = self._go_back(target)
                again = True
                continue
            state, logits, unfinished = self._choose(state, ahead)
            again = False
            if not unfinished:
                return self._result(state)

    # ---- forwards -------------------------------------------------------------------------------

    def _start(self) -> tuple[State, Tensor]:
        """Read the prompt; the first state and its logits (W, V)."""
        out = self.model._prefill(self.ids, self.config, self.kwargs)
        self.cache = getattr(out, CACHE)
        if self.cache is None or any(type(layer) is not DynamicLayer for layer in self.cache.layers):
            kinds = {type(layer).__name__ for layer in getattr(self.cache, "layers", ())} or {"no cache"}
            raise CannotEdit(f"opera drops rows from a dynamic cache, got {', '.join(sorted(kinds))}")
        self.cached = self.cache.get_seq_length()
        self.padding = self.kwargs.get("attention_mask")
        positions = self.kwargs.get("position_ids")
        if positions is None:
            positions = torch.full((self.beams, 1), self.cached - 1, device=self.ids.device)
        self.position = positions[..., -1:]
        self.first = _newest(out.logits, self.ids)
        config, device = self.config, self.ids.device
        pad, eos = config._pad_token_tensor, config._eos_token_tensor
        fill = -1 if eos is None else int(eos[0] if pad is None else pad)
        running = torch.full((1, self.beams, config.max_length), fill, device=device)
        running[0, :, : self.prompt] = self.ids
        scores = torch.full((1, self.beams), -1e9, device=device)
        parents = torch.full_like(running[..., self.prompt :], -1, dtype=torch.int32)
        state = State(
            step=0,
            running=running,
            scores=scores.index_fill(1, torch.tensor([0], device=device), 0.0),
            parents=parents,
            done=running,
            done_scores=scores,
            done_parents=parents,
            finished=torch.zeros(1, self.beams, dtype=torch.bool, device=device),
            improvable=torch.ones(1, 1, dtype=torch.bool, device=device),
            sums=torch.zeros(self.beams, 0, device=device),
        )
        return state, self.first

    def _forward(self, tokens: Tensor, step: int, mask: Tensor | None, keep: int) -> Tensor:
        """Run rows (W, Q) whose first is response token `step`; logits (W, keep, V) in fp32."""
        positions = self.position + 1 + step
        if keep == 1:  # tokens that follow each other; candidates share one position
            positions = positions + torch.arange(tokens.shape[1], device=positions.device)
        more = {"logits_to_keep": keep} if "logits_to_keep" in self.kwargs else {}
        out = self.model(
            input_ids=tokens.to(self.model.device),
            attention_mask=None if mask is None else mask.to(self.model.device),
            position_ids=positions.expand(*positions.shape[:-1], tokens.shape[1]).to(self.model.device),
            use_cache=True,
            return_dict=True,
            **with_cache(more, self.cache),
        )
        return out.logits[:, -keep:].to(self.ids.device, torch.float32)

    def _rows_ahead(self, tokens: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Attention rows (W, N, K + 1) of the candidates, their own column last, and the logits after them."""
        count, seen = tokens.shape[1], self.cached + step
        past = torch.ones(self.beams, seen, dtype=torch.bool, device=tokens.device)
        if self.padding is not None:
            past[:, : self.padding.shape[1]] = self.padding.bool()
        own = torch.eye(count, dtype=torch.bool, device=tokens.device).expand(self.beams, 1, count, count)
        visible = torch.cat([past[:, None, None].expand(-1, -1, count, -1), own], -1)
        self.reader.visible = visible
        try:
            logits = self._forward(tokens, step, visible, count)
        finally:
            self.reader.visible, rows, self.reader.rows = None, self.reader.rows, None
        assert rows is not None
        rows = rows.to(tokens.device)
        return torch.cat([rows[..., :seen], rows[..., seen:].diagonal(dim1=1, dim2=2)[..., None]], -1), logits

    # ---- one step -------------------------------------------------------------------------------

    def _look_ahead(self, state: State, logits: Tensor, again: bool) -> Ahead:
        """The candidates of each beam and what they are worth; `again` after a return."""
        opera, released = self.opera, self.opera.variant == "released"
        log_probs = logits.log_softmax(-1)
        scores = self.processors(state.running[0, :, : self.prompt + state.step], log_probs.clone())
        for beam, token in self.forbidden.get(state.step, ()):
            scores[beam, token] = -math.inf
        free = again and released
        count = min(self.kept if free else opera.candidates, scores.shape[-1])
        scores, tokens = scores.topk(count, -1)
        rows, after = self._rows_ahead(tokens, state.step)
        to_image = (rows[..., : self.prompt] * self.image.to(rows)).sum(-1)
        sums = column_sums(state.sums, rows[..., self.cached :], opera.scale)
        penalty, columns = opera.penalty(sums, to_image)
        if not free and (released or opera.penalty_weight):
            lowered = opera.penalty_weight * penalty.to(scores)
            scores = scores - lowered
            lowered = log_probs.gather(1, tokens) - lowered
            whole = lowered if released else log_probs.scatter(1, tokens, lowered)
            scores = scores - whole.logsumexp(-1, keepdim=True)
        return Ahead(tokens, scores, after, sums, columns)

    def _choose(self, state: State, ahead: Ahead) -> tuple[State, Tensor, bool]:
        """The best candidates of all beams become the next state; whether to go on."""
        count, step, now = ahead.tokens.shape[1], state.step, self.prompt + state.step
        total = (ahead.scores + state.scores[0][:, None]).flatten()
        best, flat = total.topk(min(self.kept, len(total)))
        beam, place = flat // count, flat % count
        running, parents = state.running[:, beam], state.parents[:, beam]
        running[0, :, now] = ahead.tokens[beam, place]
        parents[0, :, step] = beam.to(parents.dtype)
        hits = self.criteria(running[0, :, : now + 1], None)[None]
        reachable = best[None] + hits.float() * -1e9
        scores, order = reachable.topk(self.beams)
        order = order[0]
        done = self._finished(state, running, parents, best[None], hits)
        beam, place = beam[order], place[order]
        self.states[step] = state
        self.chosen[step] = list(zip(beam.tolist(), ahead.tokens[beam, place].tolist(), strict=True))
        self.states.pop(step - self.opera.window, None)
        _keep_rows(self.cache, beam, place, count)
        state = replace(
            done,
            step=step + 1,
            running=running[:, order],
            parents=parents[:, order],
            scores=scores,
            sums=ahead.sums[beam, place],
        )
        state = replace(state, improvable=self._improvable(state))
        early = self.config.early_stopping
        go_on = self.model._beam_search_has_unfinished_sequences(
            state.improvable, state.finished, hits, early
        )
        return state, ahead.logits[beam, place], bool(go_on)

    def _finished(self, state: State, running: Tensor, parents: Tensor, best: Tensor, hits: Tensor) -> State:
        """The state with what finished in this step, as transformers' own beam search keeps it."""
        top = torch.arange(best.shape[1], device=best.device) < self.beams
        done, scores, done_parents, finished = self.model._update_finished_beams(
            sequences=state.done,
            topk_running_sequences=running,
            beam_scores=state.done_scores,
            topk_log_probs=best,
            beam_indices=state.done_parents,
            topk_running_beam_indices=parents,
            is_early_stop_heuristic_unsatisfied=state.improvable,
            is_sent_finished=state.finished,
            next_token_hits_stopping_criteria=hits,
            top_num_beam_mask=top,
            num_beams=self.beams,
            cur_len=self.prompt + state.step,
            decoder_prompt_len=self.prompt,
            length_penalty=self.config.length_penalty,
            early_stopping=self.config.early_stopping,
        )
        return replace(state, done=done, done_scores=scores, done_parents=done_parents, finished=finished)

    def _improvable(self, state: State) -> Tensor:
        found: Tensor = self.model._check_early_stop_heuristic(
            is_early_stop_heuristic_unsatisfied=state.improvable,
            running_beam_scores=state.scores,
            beam_scores=state.done_scores,
            is_sent_finished=state.finished,
            cur_len=self.prompt + state.step,
            max_length=self.config.max_length,
            decoder_prompt_len=self.prompt,
            early_stopping=self.config.early_stopping,
            length_penalty=self.config.length_penalty,
        )
        return found

    # ---- going back -----------------------------------------------------------------------------

    def _place_to_return_to(self, columns: list[list[int]], step: int) -> int | None:
        """Note this step's columns (W, N); the step whose token is to be chosen anew, or None."""
        opera = self.opera
        self.noted.append([most_frequent(row) for row in columns])
        if opera.threshold is None:
            return None
        column = most_frequent(self.noted[-1])
        counts = [sum(c == column for c in beam) for beam in zip(*self.noted[-opera.window :], strict=True)]
        if column < opera.warmup or min(counts) <= opera.threshold:
            return None
        for place in (column + 1, column):
            if self.returns.get(place, 0) < opera.candidates:
                if place not in self.chosen or place not in self.states or place >= step:
                    return None
                self.returns[place] = self.returns.get(place, 0) + 1
                return place
        return None

    def _go_back(self, place: int) -> tuple[State, Tensor]:
        """The state before token `place` was chosen, and its logits; what was chosen there is forbidden."""
        state = self.states[place]
        self.forbidden.setdefault(place, []).extend(self.chosen[place])
        self.noted = self.noted[: place + 1]
        for later in [step for step in self.forbidden if step > place]:
            del self.forbidden[later]
        for later in [step for step in self.chosen if step >= place]:
            del self.chosen[later]
            self.states.pop(later, None)
        for layer in self.cache.layers:  # all beams have the prompt's keys in common
            layer.keys, layer.values = layer.keys[:, :, : self.cached], layer.values[:, :, : self.cached]
        if place == 0:
            return state, self.first
        tokens = state.running[0, :, self.prompt : self.prompt + place]
        mask = self.padding
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(tokens, dtype=mask.dtype)], 1)
        return state, self._forward(tokens, 0, mask, 1)[:, 0]

    def _result(self, state: State) -> Any:
        """The best finished sequences, cut to their length."""
        some = self.config.num_return_sequences or 1
        parents = state.done_parents[0, :some]
        length = int((parents >= 0).sum(1).max())
        sequences = state.done[0, :some, : self.prompt + length]
        if not self.config.return_dict_in_generate:
            return sequences
        output: Any = GenerateBeamDecoderOnlyOutput  # annotated with legacy tensor types
        return output(
            sequences=sequences,
            sequences_scores=state.done_scores[0, :some],
            beam_indices=parents[:, :length],
            **{CACHE: self.cache},
        )


def column_sums(sums: Tensor, rows: Tensor, scale: float) -> Tensor:
    """log prod_i sigma w_{i,j} of each response column: (W, t) and rows (W, N, t + 1) -> (W, N, t + 1)."""
    return torch.nn.functional.pad(sums, (0, 1))[:, None] + (scale * rows).log()


def most_frequent(values: Sequence[int]) -> int:
    """The most frequent value, the smallest of several."""
    return max(sorted(set(values)), key=list(values).count)


def _newest(logits: Tensor, like: Tensor) -> Tensor:
    return logits[:, -1].to(like.device, torch.float32, copy=True)


def _keep_rows(cache: Any, beams: Tensor, rows: Tensor, count: int) -> None:
    """Of the newest `count` rows of each beam keep the chosen one, and put the beams in their new order."""
    for layer in cache.layers:
        layer.keys = _kept(layer.keys, beams.to(layer.keys.device), rows.to(layer.keys.device), count)
        layer.values = _kept(layer.values, beams.to(layer.values.device), rows.to(layer.values.device), count)


def _kept(tensor: Tensor, beams: Tensor, rows: Tensor, count: int) -> Tensor:
    past = tensor.shape[2] - count
    kept = tensor[beams, :, : past + 1]
    kept[:, :, past] = tensor[beams, :, past + rows]
    return kept
