"""The one attention function that regard registers with transformers, and what it does in a layer.

A module that no engine has claimed, or a forward without edits, goes straight to stock SDPA.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .errors import CannotEdit
from .masses import Forward, reweighted
from .plan import Entry, LayerPlan, recomputing
from .session import SESSION, Call, Session

if TYPE_CHECKING:
    from .edits import Bias, HeadGain, Mask
    from .engine import Engine
    from .joint import Joint

NAME = "regard"  # no "/", "flash" or "sdpa" in it: transformers gives those a meaning


class Claim:
    """Which engine edits an attention module, and which layer it is."""

    __slots__ = ("_engine", "cross", "layer")

    def __init__(self, engine: Engine, layer: int, cross: bool) -> None:
        self._engine = weakref.ref(engine)  # it holds the modules that claims are filed under
        self.layer, self.cross = layer, cross

    @property
    def engine(self) -> Engine:
        """The engine; it lives as long as its model."""
        engine = self._engine()
        assert engine is not None
        return engine


claims: weakref.WeakKeyDictionary[nn.Module, Claim] = weakref.WeakKeyDictionary()


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer. Shapes as transformers gives them: (B, H, Q, D) in, (B, Q, H, D) out."""
    claim, replayed = claims.get(module), kwargs.pop(SESSION, None)
    session = None if claim is None else replayed if recomputing() else claim.engine.session
    if claim is None or session is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    stream = claim.engine.stream
    if stream is not None:  # a branch runs: read, never edit
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        if claim.layer in stream.reads:
            stream.outputs[claim.layer] = out[:, -1]
        return out, None
    if claim.engine.joint is not None:
        return _together(claim, claim.engine.joint, session, module, query, kwargs), None
    if session.checkpointed and replayed is None:
        raise CannotEdit(
            f"layer {claim.layer}: {type(module).__name__} is not told which prompt it works on, so a checkpoint could "
            "not repeat its edit during backward: call model.gradient_checkpointing_disable()"
        )
    if not session.checked:
        session.hits.add(claim.layer)
    return _main(claim, session, module, query, key, value, attention_mask, kwargs), None


def _main(
    claim: Claim,
    session: Session,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """The main stream, edited where the plan says so."""
    plan = session.plan.layers.get(claim.layer)
    if not plan:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    call = Call(session, claim.layer, claim.cross, query, key)
    return _edited(plan, call, module, value, mask, kwargs)


def _together(
    claim: Claim, joint: Joint, session: Session, module: nn.Module, query: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """All streams of one batch, each over its own keys: (n * B, 1, H, D)."""
    first, *others = joint.parts(query)
    (key, value), *theirs = joint.caches.newest
    outs = []
    for stream, rows, (k, v), mask in zip(joint.streams, others, theirs, joint.masks[1:], strict=True):
        out, _ = sdpa_attention_forward(module, rows, k, v, mask, **kwargs)
        outs.append(out)
        if claim.layer in stream.reads:
            stream.outputs[claim.layer] = out[:, -1]
    main = _main(claim, session, module, first, key, value, joint.masks[0], kwargs)
    return torch.cat([main, *outs])


def _edited(
    plan: LayerPlan, call: Call, module: nn.Module, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor:
    call.scale = kwargs.get("scaling") or call.query.shape[-1] ** -0.5
    if plan.masks and call.prefill:
        mask = _allowed(plan.masks, call, mask, _is_causal(module, call, mask, kwargs))
    everywhere = [entry for entry in plan.bias if entry.edit.rows == "all"]
    newest = [entry for entry in plan.bias if entry.edit.rows == "last"]
    if everywhere:
        mask = _biased(everywhere, call, mask, _is_causal(module, call, mask, kwargs))
    first = newest_from(call) if newest else None
    if first is not None and first >= call.query.shape[2]:
        newest = []  # a chunk of the prompt that ends before its last row
    if newest and (first is None or first == 0 or plan.policies):
        mask = _biased(newest, call, mask, _is_causal(module, call, mask, kwargs), _newest_rows(call))
    out = None
    if plan.policies:
        causal = _is_causal(module, call, mask, kwargs)
        out = reweighted(plan.policies, Forward(call, module, value, mask, causal, kwargs))
    if out is None:
        out, _ = sdpa_attention_forward(module, call.query, call.key, value, mask, **kwargs)
        if newest and first:
            out = torch.cat([out[:, :first], _tail(newest, first, call, module, value, mask, kwargs)], 1)
    if plan.gains:
        call.mask, call.causal = mask, _is_causal(module, call, mask, kwargs)
    for entry in plan.gains:
        gain = _gain(entry, call, out)
        if gain is not None:
            out = out * gain[:, None, :, None]
    return out


def _is_causal(module: nn.Module, call: Call, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    flag = kwargs.get("is_causal")
    flag = getattr(module, "is_causal", True) if flag is None else flag
    return bool(flag) and mask is None and call.query.shape[2] > 1


def _causal(call: Call) -> Tensor:
    """(Q, K) bool. SDPA aligns its causal mask at the upper left corner."""
    rows, keys = call.query.shape[2], call.key.shape[2]
    return torch.ones(rows, keys, dtype=torch.bool, device=call.query.device).tril()


def newest_from(call: Call) -> int | None:
    """The first of the newest rows of this forward, the last prompt row or later; None where samples differ."""
    session = call.session
    return None if session.newest is not None else max(0, session.prompt - 1 - session.seen)


def _newest_rows(call: Call) -> Tensor | None:
    """The newest rows, (B|1, 1, Q, 1) bool; None when all are."""
    first, count, device = newest_from(call), call.query.shape[2], call.query.device
    rows = torch.arange(count, device=device)
    if first is not None:
        return None if first == 0 else (rows >= first)[None, None, :, None]
    session = call.session
    assert session.newest is not None
    return ((rows == session.newest.to(device)[:, None]) | (rows >= session.prompt))[:, None, :, None]


def _tail(
    entries: list[Entry[Bias]],
    first: int,
    call: Call,
    module: nn.Module,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """The rows from `first` on with their biases, (B, R, H, D)."""
    causal = _is_causal(module, call, mask, kwargs)
    if mask is not None and mask.shape[2] > 1:
        mask = mask[:, :, first:]
    last = Call(call.session, call.layer, call.cross, call.query[:, :, first:], call.key)
    last.scale, last.first = call.scale, first
    if causal and last.query.shape[2] > 1:
        mask = _causal(call)[None, None, first:]
    call.tail = _biased(entries, last, mask, False)
    return sdpa_attention_forward(module, last.query, last.key, value, call.tail, **kwargs)[0]


def _allowed(entries: list[Entry[Mask]], call: Call, mask: Tensor | None, causal: bool) -> Tensor | None:
    """The mask with the pairs of row and key that edits let through. Padding stays hidden."""
    if mask is None:
        if not causal:
            return None  # every row sees every key
        mask = _causal(call)[None, None]
    for entry in entries:
        call.owner = entry.owner
        allow = entry.edit.allow(call)
        if allow is None:
            continue
        padding = call.session.padding
        if padding is not None:
            hidden = call.session.over_keys(padding.to(allow.device), call.key.shape[2])
            allow = allow & ~hidden[:, None, None, :]
        entry.tally.count(call.prefill, call.query.shape[2])
        mask = mask | allow if mask.dtype == torch.bool else mask.masked_fill(allow, 0.0)
    return mask


def _biased(
    entries: list[Entry[Bias]], call: Call, mask: Tensor | None, causal: bool, rows: Tensor | None = None
) -> Tensor | None:
    """The mask with every bias added to it in the given rows, in the query's dtype."""
    total: Tensor | None = None
    for entry in entries:
        call.owner = entry.owner
        bias = entry.edit.bias(call)
        if bias is None:
            continue
        if entry.edit.heads is not None:
            chosen = torch.zeros(call.query.shape[1], dtype=torch.bool, device=bias.device)
            chosen[list(entry.edit.heads)] = True
            bias = torch.where(chosen[None, :, None, None], bias, 0.0)
        if rows is not None:
            bias = torch.where(rows, bias, 0.0)
        entry.tally.count(call.prefill, call.query.shape[2] if rows is None else int(rows[0].sum()))
        total = bias if total is None else total + bias
    if total is None:
        return mask
    total = total.to(call.query.dtype)
    lowest = torch.finfo(total.dtype).min
    if mask is None and causal:
        mask = _causal(call)[None, None]
    if mask is not None and mask.dtype == torch.bool:
        total = total.clamp_min(lowest).masked_fill(~mask, lowest)
    elif mask is not None:
        total = total + mask
    return total.expand(total.shape[0], total.shape[1], call.query.shape[2], call.key.shape[2])


def _gain(entry: Entry[HeadGain], call: Call, out: Tensor) -> Tensor | None:
    """Factors (B, H) of one edit, asked for once a prompt or at every step."""
    memory = call.session.memory
    if entry.edit.hold and entry.key in memory and not recomputing():  # a checkpoint repeats every operation
        gain = memory[entry.key]
    else:
        call.output = out
        call.owner = entry.owner
        gain = entry.edit.gain(call)
        if gain is not None:
            if entry.edit.heads is not None:
                kept = torch.zeros(out.shape[2], dtype=torch.bool, device=gain.device)
                kept[list(entry.edit.heads)] = True
                gain = torch.where(kept, gain, 1.0)
            gain = gain.to(out.dtype)
        if entry.edit.hold:
            memory[entry.key] = gain
    if gain is not None:
        entry.tally.count(call.prefill, out.shape[1])
        entry.tally.gain = gain
    return gain


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without it the mask is None and causality is silently lost
