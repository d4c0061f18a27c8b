"""Prompt tokens that leave the decoder after a block.

Between blocks the states keep their full length. A later block is given the rows that stay, with their own
positions and mask, and what it returns is put back in its place, so its K/V cache holds the tokens that stay and
nothing else. In a batch a sample that has left hides its tokens until every sample has left; from then on
the rows that stay are packed to the right.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer

from .errors import CannotEdit
from .kv_cache import cache_in
from .session import newest_rows

if TYPE_CHECKING:
    from .anatomy import Anatomy
    from .edits import Exit
    from .engine import Engine
    from .session import Session

MEMORY = "tokens that left"  # where a session keeps its `Leaving`
NOTHING = -1  # "left after block -1": a sample without such a token


class Departure:
    """What an `Exit` sees after one block, while the prompt is read.

    `before` and `hidden` (B, S, C) are the states that enter and leave block `layer`.
    """

    __slots__ = ("before", "hidden", "layer", "session")

    def __init__(self, session: Session, layer: int, before: Tensor, hidden: Tensor) -> None:
        self.session, self.layer, self.before, self.hidden = session, layer, before, hidden

    def newest(self, states: Tensor) -> Tensor:
        """(B, S, C) -> (B, C) at the last token of each prompt."""
        return newest_rows(states, self.session.newest)


@dataclass
class Kept:
    """Which prompt tokens stay: `order` (B, T), packed to the right; `valid` is None where no row is padded.

    `same` (T,) is the order of every sample, where all have the same one.
    """

    order: Tensor
    valid: Tensor | None
    same: Tensor | None

    def upto(self, prompt: int, end: int) -> Kept:
        """With the tokens after the prompt, which all stay."""
        if end == prompt:
            return self
        newer = torch.arange(prompt, end, device=self.order.device)
        order = torch.cat([self.order, newer.expand(len(self.order), -1)], 1)
        valid = None if self.valid is None else F.pad(self.valid, (0, end - prompt), value=True)
        return Kept(order, valid, None if self.same is None else torch.cat([self.same, newer]))

    def take(self, tensor: Tensor, dim: int, batch: int) -> Tensor:
        """The chosen places of axis `dim`, where `batch` is the axis of the samples (of that size, or 1)."""
        if self.same is not None:
            return tensor.index_select(dim, self.same.to(tensor.device))
        shape = [1] * tensor.ndim
        shape[batch], shape[dim] = self.order.shape
        return torch.take_along_dim(tensor, self.order.to(tensor.device).view(shape), dim)


class Leaving:
    """Which tokens of one session leave, and after which block each sample's have left."""

    def __init__(self, edit: Exit, session: Session, layers: int) -> None:
        tokens = session.image if edit.tokens is None else edit.tokens(session)
        if tokens.dtype != torch.bool or tokens.shape != session.image.shape:
            raise CannotEdit(
                f"the tokens that leave are given as {tokens.dtype} {tuple(tokens.shape)}: "
                f"give torch.bool {tuple(session.image.shape)}"
            )
        self.padding = None if session.padding is None else session.padding.to(tokens.device)
        self.tokens = tokens if self.padding is None else tokens & ~self.padding
        self.prompt, self.never = session.prompt, layers
        self.after = [layers if some else NOTHING for some in self.tokens.any(1).tolist()]
        self.deciding = True
        self.entering: Tensor | None = None
        self._kept: Kept | None = None

    def gone(self, layer: int) -> int:
        """How many samples have no token of theirs left in this block; 0 if none lost any."""
        lost = any(NOTHING < after < layer for after in self.after)
        return sum(after < layer for after in self.after) if lost else 0

    def all_gone(self, layer: int) -> bool:
        """Whether the block runs without these tokens."""
        return self.gone(layer) == len(self.after)

    def note(self, layer: int, leaves: Tensor) -> None:
        """Take a decision (B,) after a block; who has left stays away."""
        for row, decided in enumerate(leaves.tolist()):
            if decided and self.after[row] == self.never:
                self.after[row] = layer

    def kept(self) -> Kept:
        """The prompt tokens that stay once all samples have left."""
        if self._kept is None:
            stays = ~self.tokens if self.padding is None else ~(self.tokens | self.padding)
            counts = stays.sum(1)
            longest, shortest = int(counts.max()), int(counts.min())
            if shortest == 0:
                raise CannotEdit("every token of a prompt leaves: keep its text")
            order = stays.int().argsort(dim=1, stable=True)[:, -longest:]
            valid = stays.gather(1, order) if shortest < longest else None
            same = order[0] if valid is None and bool((order == order[0]).all()) else None
            self._kept = Kept(order, valid, same)
        return self._kept

    def hidden_tokens(self, layer: int, end: int) -> Tensor:
        """Tokens (B, end) of the samples that have left before this block."""
        left = torch.tensor([after < layer for after in self.after], device=self.tokens.device)
        return F.pad(self.tokens & left[:, None], (0, end - self.prompt))


def mask_without(mask: Tensor | None, tokens: Tensor, rows: int) -> Tensor:
    """Hide key tokens (B, K) from all rows but their own: (B|1, H|1, Q, K) or None for causal, to the same."""
    keys = tokens.shape[1]
    if mask is None:
        mask = _causal(rows, keys, tokens.device)
    tokens = tokens.to(mask.device)
    hidden = tokens[:, None, None, :] & ~tokens[:, None, keys - rows :, None]
    return _hide(mask, hidden)


def mask_of_kept(mask: Tensor | None, queries: Kept | None, keys: Kept, rows: int) -> Tensor | None:
    """The rows and columns of a mask that stay; None where it is causal and nothing is padded."""
    if mask is None and keys.valid is None:
        return None
    if mask is None:
        mask = _causal(rows, keys.order.shape[1], keys.order.device)
    else:
        mask = mask if queries is None else queries.take(mask, -2, 0)
        mask = keys.take(mask, -1, 0)
    if keys.valid is None:
        return mask
    valid = keys.valid.to(mask.device)
    hidden = ~valid[:, None, None, :]
    mask = _hide(mask, hidden.expand(-1, -1, mask.shape[-2], -1))
    if queries is None:
        return mask
    own = torch.eye(valid.shape[1], dtype=torch.bool, device=mask.device) & hidden.mT  # no empty row
    return mask | own if mask.dtype == torch.bool else mask.masked_fill(own, 0.0)


def _causal(rows: int, keys: int, device: torch.device) -> Tensor:
    return torch.ones(1, 1, rows, keys, dtype=torch.bool, device=device).tril(keys - rows)


def _hide(mask: Tensor, hidden: Tensor) -> Tensor:
    return (
        mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
    )


# ---- on a model ------------------------------------------------------------------------------------


def install(engine: Engine) -> list[Any]:
    """Hooks that let tokens leave; removed with the others.

    Raises:
        CannotEdit: the decoder has cross-attention or windows, or the edit's layers are not in order.
    """
    entry = engine.plan.exits[0]
    check_decoder(engine.anatomy, entry.tally.intervention)
    decoder: Any = engine.anatomy.decoder
    begin, end = functools.partial(_begin, engine), functools.partial(_end, engine)
    handles = [
        decoder.register_forward_pre_hook(begin, with_kwargs=True),
        decoder.register_forward_hook(end),
    ]
    for site in engine.anatomy.sites:
        if site.layer < entry.edit.layers[0]:
            continue
        before, after = (functools.partial(hook, engine, site.layer) for hook in (_enter, _leave))
        handles.append(site.block.register_forward_pre_hook(before, with_kwargs=True))
        # in front: whoever records the block's output gets it at full length
        handles.append(site.block.register_forward_hook(after, prepend=True))
    return handles


def check_decoder(parts: Anatomy, name: str) -> None:
    """Raise CannotEdit where tokens cannot leave this decoder."""
    if parts.cross_layers:
        raise CannotEdit(
            f"{name} lets image tokens leave the decoder, but {parts.decoder_path} ({parts.text_type}) reads the "
            f"image by cross-attention in layers {', '.join(map(str, parts.cross_layers))}: no image token is there"
        )
    if parts.lost_layers:
        raise CannotEdit(f"{name} lets tokens leave the decoder, but {parts.why_lost(parts.lost_layers)}")
    config: Any = parts.decoder.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds or (window and not getattr(config, "layer_types", None)):
        what = ", ".join(sorted(kinds)) or f"a window of {window}"
        raise CannotEdit(
            f"{name} lets tokens leave the decoder, but {parts.decoder_path} ({parts.text_type}) has layers of another "
            f"kind ({what}), which count how far back a token lies: use a model with full attention in all layers"
        )


def _state(engine: Engine) -> tuple[Session, Leaving] | None:
    session = engine.session
    if session is None or engine.stream is not None or MEMORY not in session.memory:
        return None
    return session, session.memory[MEMORY]


def _begin(engine: Engine, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the decoder: see that tokens can leave, and start anew with a new prompt."""
    session = engine.session
    if session is None or engine.stream is not None or not session.plan.exits:
        return
    entry = session.plan.exits[0]
    name = entry.tally.intervention
    if session.checkpointed:
        raise CannotEdit(
            f"{name} lets tokens leave the decoder, and a checkpoint cannot repeat that during backward: "
            "call model.gradient_checkpointing_disable()"
        )
    if MEMORY in session.memory:
        session.memory[MEMORY].deciding = False
        return
    cache = cache_in(kwargs)
    for layer in getattr(cache, "layers", ()):
        if not isinstance(layer, DynamicLayer) or layer.is_sliding:
            raise CannotEdit(
                f"{name} lets tokens leave the decoder, so its layers need caches of different lengths, but the cache "
                f"has a {type(layer).__name__}: generate with the default (dynamic) cache"
            )
    session.memory[MEMORY] = Leaving(entry.edit, session, engine.anatomy.layers)


def _end(engine: Engine, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    state = _state(engine)
    if state is None:
        return
    session, leaving = state
    session._step.pop("newest", None)  # it was that of the rows that stay
    if leaving.gone(engine.anatomy.layers):
        rows = session.rows
        if session.seen == 0 and leaving.all_gone(engine.anatomy.layers):
            rows = leaving.kept().order.shape[1] + session.rows - session.prompt
        tally = session.plan.exits[0].tally
        tally.count(session.prefill, rows)
        blocks = sorted({after for after in leaving.after if NOTHING < after < leaving.never})
        tally.note = f"newest prompt: after block {', '.join(map(str, blocks))}"


def _enter(
    engine: Engine, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before a block: take away what has left."""
    state = _state(engine)
    if state is None:
        return None
    session, leaving = state
    hidden = args[0] if args else kwargs["hidden_states"]
    leaving.entering = hidden
    gone = leaving.gone(layer)
    if not gone:
        return None
    if len(args) > 1:
        raise CannotEdit(f"{type(module).__name__} takes its mask by position: tokens cannot leave it")
    mask = kwargs.get("attention_mask")
    rows, keys = session.rows, session.seen + session.rows
    if not leaving.all_gone(layer):
        key = ("mask without what left", gone, None if mask is None else mask.device)
        tokens = functools.partial(leaving.hidden_tokens, layer, keys)
        return args, kwargs | {
            "attention_mask": session._per_step(
                key, lambda: mask_without(mask, tokens(), rows).to(hidden.device)
            )
        }
    kept = leaving.kept()
    columns = session._per_step("columns that stay", lambda: kept.upto(leaving.prompt, keys))
    device = hidden.device
    session._step["image", columns.order.shape[1], device] = _kept_image(session, columns, device)
    taken: dict[str, Any] = {}
    queries = columns if session.seen == 0 else None
    if queries is not None:
        session._step["newest"] = None  # rows are packed to the right
        hidden, taken = columns.take(hidden, 1, 0), _positions(session, columns, kwargs)
    taken["attention_mask"] = session._per_step(
        ("mask of what stays", device),
        lambda: _on(device, mask_of_kept(mask, queries, columns, hidden.shape[1])),
    )
    if args:
        return (hidden,), kwargs | taken
    return args, kwargs | taken | {"hidden_states": hidden}


def _on(device: torch.device, mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.to(device)


def _kept_image(session: Session, columns: Kept, device: torch.device) -> Tensor:
    """The image keys among those that stay, (B, K), for readers of this layer."""

    def make() -> Tensor:
        image = F.pad(session.image, (0, session.seen + session.rows - session.prompt)).to(
            columns.order.device
        )
        found = image.gather(1, columns.order)
        return (found if columns.valid is None else found & columns.valid).to(device)

    return session._per_step(("image that stays", device), make)  # type: ignore[no-any-return]


def _positions(session: Session, kept: Kept, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Positions of the rows that stay, as they were."""
    found: dict[str, Any] = {}
    for name, dim in (("position_embeddings", -2), ("position_ids", -1)):
        value = kwargs.get(name)
        if value is None:
            continue
        parts = value if isinstance(value, tuple | list) else (value,)

        def take(parts: Any = parts, dim: int = dim) -> tuple[Tensor, ...]:
            return tuple(kept.take(part, dim, dim - 1) for part in parts)

        first = parts[0]
        taken = session._per_step(("positions that stay", name, first.device), take)
        found[name] = taken if isinstance(value, tuple | list) else taken[0]
    return found


def _leave(engine: Engine, layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """After a block: put back what it did not see, and ask who leaves now."""
    state = _state(engine)
    if state is None:
        return None
    session, leaving = state
    entering, leaving.entering = leaving.entering, None
    if entering is None:
        return None
    hidden = output[0] if isinstance(output, tuple) else output
    whole = hidden
    if session.seen == 0 and leaving.gone(layer):
        whole = _put_back(session, leaving, layer, entering, hidden)
    edit = session.plan.exits[0].edit
    if leaving.deciding and layer in edit.layers and leaving.never in leaving.after:
        if edit.when is None:
            leaving.note(layer, torch.ones(len(leaving.after), dtype=torch.bool))
        else:
            leaving.note(layer, edit.when(Departure(session, layer, entering, whole)))
    if whole is hidden:
        return None
    return (whole, *output[1:]) if isinstance(output, tuple) else whole


def _put_back(session: Session, leaving: Leaving, layer: int, entering: Tensor, hidden: Tensor) -> Tensor:
    """All rows (B, Q, C): the block's where it ran, and the states that entered where it did not."""
    device = hidden.device
    if not leaving.all_gone(layer):
        tokens = leaving.hidden_tokens(layer, session.rows).to(device)
        return torch.where(tokens[:, :, None], entering, hidden)
    kept = leaving.kept().upto(leaving.prompt, session.rows)
    if kept.same is not None:
        return entering.index_copy(1, kept.same.to(device), hidden)
    order = kept.order.to(device)
    places = order + torch.arange(len(order), device=device)[:, None] * entering.shape[1]
    rows = hidden.flatten(0, 1)
    if kept.valid is not None:
        valid = kept.valid.to(device)
        places, rows = places[valid], hidden[valid]
    return entering.flatten(0, 1).index_copy(0, places.flatten(), rows).view_as(entering)
