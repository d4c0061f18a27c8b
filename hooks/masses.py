"""Mass policies in one layer: which groups, which rows, and the kernel that gives the edited rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..kernels.groups import Groups
from ..kernels.policies import InTurn, Policy
from ..kernels.problem import Problem, additive
from ..kernels.reweighted import join, reweighted_rows
from .edits import MassPolicy
from .errors import CannotEdit
from .plan import Entry
from .session import Call


class Offered:
    """A policy on some of the rows, (B, R) or all; the others get coefficient 1. Notes what it `changed`, (B, H, R)."""

    def __init__(self, policy: Policy, rows: Tensor | None) -> None:
        self.policy, self.rows = policy, rows
        self.changed: Tensor | None = None

    def __call__(self, masses: Tensor) -> Tensor:
        """Coefficients (B, H, R, G)."""
        coefficients = self.policy(masses)
        if self.rows is not None:
            coefficients = torch.where(self.rows[:, None, :, None], coefficients, 1.0)
        self.changed = (coefficients != 1).any(-1)
        return coefficients


@dataclass(frozen=True)
class Forward:
    """One attention layer in one forward: what transformers gives its attention function."""

    call: Call
    module: nn.Module
    value: Tensor
    mask: Tensor | None
    causal: bool
    kwargs: dict[str, Any]

    def problem(self, first: int, groups: Groups, policy: Policy) -> Problem:
        """The rows from `first` on, for the kernel."""
        call, mask, causal = self.call, self.mask, self.causal
        count, keys = call.query.shape[2], call.key.shape[2]
        if causal and count != keys:  # SDPA aligns its causal mask at the upper left corner
            visible = torch.ones(count, keys, dtype=torch.bool, device=call.query.device).tril()
            mask, causal = visible[None, None], False
        if mask is not None:
            mask = additive(mask[:, :, first:] if mask.shape[2] > 1 else mask, torch.float32)
        scale = self.kwargs.get("scaling") or call.query.shape[-1] ** -0.5
        return Problem(call.query[:, :, first:], call.key, self.value, groups, policy, scale, causal, mask)

    def stock(self, heads: slice, rows: int) -> Tensor:
        """The first rows of some heads as the model would have them, (B, heads, rows, D)."""
        query, key, mask = self.call.query, self.call.key, self.mask
        together = query.shape[1] // key.shape[1]
        shared = slice(heads.start // together, -(-heads.stop // together))
        seen = key.shape[2]
        if self.causal and query.shape[2] == seen and query.device.type != "cpu":
            seen = rows  # the CPU library stops at the diagonal by itself
        if mask is not None:
            mask = mask[:, heads] if mask.shape[1] > 1 else mask
            mask = mask[:, :, :rows] if mask.shape[2] > 1 else mask
        keys, values = key[:, shared, :seen], self.value[:, shared, :seen]
        out, _ = sdpa_attention_forward(
            self.module, query[:, heads, :rows], keys, values, mask, **self.kwargs
        )
        return out.transpose(1, 2)


def reweighted(entries: list[Entry[MassPolicy]], forward: Forward) -> Tensor | None:
    """Stock rows, and edited ones from the kernel, (B, Q, H, D); None when no row of this forward is edited."""
    call = forward.call
    acting = [entry for entry in entries if _groups(entry, call) is not None]
    if not acting:
        return None
    if forward.kwargs.get("dropout"):
        raise CannotEdit(f"layer {call.layer}: attention dropout is on; call model.eval() first")
    batch, count = call.query.shape[0], call.query.shape[2]
    spans = [_rows(entry.edit, call) for entry in acting]
    first = min(start for start, _ in spans)
    if first >= count:
        return None
    offered = [
        Offered(entry.edit.policy, _from(first, start, rows, call))
        for entry, (start, rows) in zip(acting, spans, strict=True)
    ]
    groups, of = _together(acting, call)
    policy = offered[0] if len(offered) == 1 else InTurn(tuple(offered), of)
    edited, path = reweighted_rows(forward.problem(first, groups, policy))
    for entry, (start, _), offer in zip(acting, spans, offered, strict=True):
        assert offer.changed is not None
        entry.tally.count(call.prefill, count - start, path)
        entry.tally.count_pairs(
            batch * (count - start) if offer.rows is None else offer.rows.sum(), offer.changed
        )
    chosen = [offer.rows for offer in offered]
    everywhere = any(rows is None for rows in chosen)
    if first == 0 and everywhere:
        return edited.out.transpose(1, 2).contiguous()

    heads = call.query.shape[1]
    if everywhere:
        together = heads // call.key.shape[1]
        return join(forward.stock, edited.out, count, together).transpose(1, 2).contiguous()
    rows = torch.stack([rows for rows in chosen if rows is not None]).any(0)
    out = forward.stock(slice(0, heads), count).transpose(1, 2)
    tail = torch.where(rows[..., None, None], edited.out.transpose(1, 2), out[:, first:])
    return torch.cat([out[:, :first], tail], 1)


def newest_probs(call: Call) -> Tensor:
    """What each sample's newest row pays attention to, after every edit of this layer's attention.

    For a `HeadGain`'s function, which is asked when the other edits have acted. Head gains do not change probs.

    Returns:
        (B, H, K) in fp32 or wider. A row sums to 1, but for mass that a policy gives or takes; it is zero where it
        sees nothing.
    """
    last = call.session.newest
    scores = Call(call.session, call.layer, call.cross, _at(call.query, last, 2), call.key)
    scores.scale = call.scale
    row = scores.scores()[:, :, 0]
    mask = call.mask if call.tail is None else call.tail
    if mask is not None:
        row = row + additive(_at(mask, last, 2)[:, :, 0], row.dtype)
    elif call.causal:
        end = call.query.shape[2] - 1 if last is None else last[:, None, None].to(row.device)
        row = row.masked_fill(torch.arange(row.shape[2], device=row.device) > end, -torch.inf)
    unseen = row.amax(-1, keepdim=True) <= torch.finfo(call.query.dtype).min
    probs = row.masked_fill(unseen, 0).softmax(-1).masked_fill(unseen, 0)
    plan = call.session.plan.layers[call.layer]
    acting = [entry for entry in plan.policies if _groups(entry, call) is not None]
    if not acting:
        return probs
    offered = tuple(Offered(entry.edit.policy, _newest_offered(entry.edit, call)) for entry in acting)
    groups, of = _together(acting, call)
    member = groups.member.to(probs)
    return probs * (InTurn(offered, of)(probs[:, :, None] @ member) @ member.transpose(2, 3))[:, :, 0]


def _at(values: Tensor, rows: Tensor | None, dim: int) -> Tensor:
    """One row of each sample, kept as a dimension: rows (B,) or None for the last; a single row serves all."""
    if rows is None or values.shape[dim] == 1:
        return values.narrow(dim, values.shape[dim] - 1, 1)
    place = rows.to(values.device).view(-1, *[1] * (values.ndim - 1))
    return torch.take_along_dim(values, place, dim)


def _newest_offered(edit: MassPolicy, call: Call) -> Tensor:
    """Whether the newest row of each sample is one that a policy edits, (B, 1) bool."""
    start, rows = _rows(edit, call)
    batch, count, last = call.query.shape[0], call.query.shape[2], call.session.newest
    place = torch.full((batch,), count - 1) if last is None else last.cpu()
    within = (place >= start).to(call.query.device)
    if rows is not None and rows.shape[1]:
        own = (place - start).clamp_min(0).to(rows.device)
        within = within & rows[torch.arange(batch, device=rows.device), own]
    return within[:, None]


def _from(first: int, start: int, rows: Tensor | None, call: Call) -> Tensor | None:
    """The rows of one policy counted from the first that any policy edits: (B, R) bool, None for all."""
    if rows is None and start == first:
        return None
    own = torch.zeros(
        call.query.shape[0], call.query.shape[2] - first, dtype=torch.bool, device=call.query.device
    )
    own[:, start - first :] = True if rows is None else rows
    return own


def _groups(entry: Entry[MassPolicy], call: Call) -> Groups | None:
    """The groups of the prompt's keys, found once and kept."""
    memory = call.session.memory
    if entry.key not in memory:
        call.owner = entry.owner
        ids = entry.edit.groups(call)
        memory[entry.key] = None if ids is None else Groups(ids, len(entry.edit.names))
    groups: Groups | None = memory[entry.key]
    return groups


def _together(acting: list[Entry[MassPolicy]], call: Call) -> tuple[Groups, tuple[Tensor, ...]]:
    """The groups of the keys that attention sees now, fine enough for every policy, and each one's part of them."""
    memory, name = call.session.memory, ("groups", *(entry.key for entry in acting))
    if name not in memory:
        memory[name] = Groups.product([memory[entry.key] for entry in acting])
    groups, of = memory[name]
    if call.cross:
        return groups, of
    keys = call.key.shape[2]
    dropped = max(0, call.session.seen + call.session.rows - keys)  # a sliding window forgets its oldest keys
    return groups.window(dropped, dropped + keys), of


def _rows(edit: MassPolicy, call: Call) -> tuple[int, Tensor | None]:
    """First edited row of this forward, and which rows from there on, (B, rows) bool; None means all."""
    session, count, device = call.session, call.query.shape[2], call.query.device
    if edit.rows == "all":
        return 0, None
    if edit.rows == "last":
        if session.newest is None:  # generated rows were the last ones in their turn
            return max(0, session.prompt - 1 - session.seen), None
        rows = torch.arange(count, device=device)
        return 0, (rows == session.newest.to(device)[:, None]) | (rows >= session.prompt)
    first_end, last_end, everywhere = session.image_ends
    start = max(0, first_end - session.seen)
    if start >= count or (everywhere and last_end - session.seen <= start):
        return start, None
    after = call.positions[start:] >= session.image_end.to(device)[:, None]
    return start, after & call.has_image[:, None]
