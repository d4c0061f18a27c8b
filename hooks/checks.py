"""What would make an edit skipped, wrong, or not what the user measures: found before anything is changed."""

from __future__ import annotations

from typing import Any

from torch import nn

from .anatomy import Anatomy
from .attend import NAME
from .errors import CannotEdit
from .plan import Entry, Plan

NOT_ROUTED = (
    "{} at {} cannot take our attention function: "
    "this class does not route through transformers' AttentionInterface"
)


def check_editable(model: nn.Module, parts: Anatomy) -> None:
    """Raise CannotEdit where an edit would be skipped, wrong, or not what the user measures."""
    if parts.decoder is model:
        raise CannotEdit(f"{type(model).__name__} is a bare decoder: pass the model with its language head")
    if model.training:
        raise CannotEdit(
            f"{type(model).__name__} is in training mode, where dropout changes every result: call model.eval()"
        )
    for path, module in model.named_modules():
        if (
            getattr(module, "_compiled_call_impl", None) is not None
            or "_orig_mod" in module._modules
            or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        ):
            raise CannotEdit(
                f"{path or type(model).__name__} is compiled: hooks and state do not reach into a compiled graph; "
                "apply to the model before torch.compile (the original is `compiled._orig_mod`)"
            )
    decoder: Any = parts.decoder
    if not getattr(decoder, "_can_set_attn_implementation", lambda: True)():
        raise CannotEdit(NOT_ROUTED.format(type(decoder).__name__, parts.decoder_path))
    stock = decoder.config._attn_implementation
    if stock == NAME:
        raise CannotEdit(
            f"{parts.decoder_path} is being edited already, as part of another object than this "
            f"{type(model).__name__}: apply to the same object, or end that run first"
        )
    if stock not in ("sdpa", "eager"):
        raise CannotEdit(
            f"{parts.decoder_path} runs attention by {stock!r}, and the baseline must run on what is edited: "
            "call model.set_attn_implementation('sdpa') first"
        )


def check_together(plan: Plan, model: nn.Module) -> None:
    """Raise CannotEdit for edits that cannot act on one model at once."""
    known = {branch.name for branch in plan.branches if branch.every_step}
    for entry in plan.logits:
        missing = [name for name in entry.edit.branches if name not in known]
        if missing:
            raise CannotEdit(
                f"{entry.tally.intervention} reads the logits of branch {missing[0]!r}, and no branch of that name "
                "runs at every step: give the Branch with it, with every_step=True"
            )
    if plan.logits and model.get_output_embeddings() is None:  # type: ignore[operator]
        raise CannotEdit(f"{type(model).__name__} has no language head, so there are no logits to edit")
    if len(plan.exits) > 1:
        names = " and ".join(entry.tally.intervention for entry in plan.exits)
        raise CannotEdit(f"{names} both let tokens leave the decoder: use one of them")
    if plan.exits:
        _check_exit(plan)
    if len(plan.decodings) > 1:
        names = " and ".join(name for name, _ in plan.decodings)
        raise CannotEdit(f"{names} both replace generate's decoding loop: use one of them")
    if plan.decodings:
        _check_decoding(plan)
    if plan.decodings and plan.following:
        raise CannotEdit(
            f"{plan.decodings[0][0]} looks several tokens ahead, and branch "
            f"{next(b.name for b in plan.branches if b.every_step)!r} follows token by token: use one of them"
        )


def _check_exit(plan: Plan) -> None:
    """Raise CannotEdit where an edit needs tokens that may have left its layer."""
    (entry,) = plan.exits
    name, layers = entry.tally.intervention, entry.edit.layers
    if not layers or list(layers) != sorted(set(layers)):
        raise CannotEdit(
            f"{name} lets tokens leave after layers {layers}: name each once, in ascending order"
        )
    for layer in sorted({*plan.layers, *plan.hidden}):
        at = plan.layers.get(layer)
        reads: list[Entry[Any]] = list(plan.hidden.get(layer, ()))
        if at is not None:
            reads += [*at.masks, *at.bias, *at.policies]
        if layer > layers[0] and reads:
            other = reads[0].tally
            raise CannotEdit(
                f"{other.intervention} needs every token in layer {layer} ({other.edit}), but {name} lets tokens leave "
                f"from layer {layers[0]} on: edit layers up to {layers[0]} only, or let tokens leave later"
            )


def _check_decoding(plan: Plan) -> None:
    """A loop of its own runs several candidates a step: edits of "the newest row" would miss all but one."""
    at_last: list[Entry[Any]] = [*plan.logits, *plan.exits]
    for layer in plan.layers.values():
        at_last += [entry for entry in layer.bias if entry.edit.rows == "last"]
        at_last += [entry for entry in layer.policies if entry.edit.rows == "last"]
    for entry in at_last:
        raise CannotEdit(
            f"{plan.decodings[0][0]} looks ahead along several candidates at once, and {entry.tally.intervention} acts "
            "on the newest row, or on what the cache holds of the prompt: use one of them"
        )
