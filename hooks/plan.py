"""Edits sorted by the layer in which they act, with a tally of what each did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .anatomy import Anatomy
from .edits import (
    Bias,
    Branch,
    Decoding,
    Edit,
    Exit,
    HeadGain,
    Hidden,
    LayerEdit,
    Logits,
    Mask,
    MassPolicy,
    Tower,
)
from .errors import CannotEdit

E = TypeVar("E", Bias, Mask, MassPolicy, HeadGain, Hidden, Logits, Exit)
NO_LAYER = -1  # where a tally belongs to the logits or to the whole decoder


def recomputing() -> bool:
    """Whether a checkpointed block runs again, during backward."""
    return torch._C._current_graph_task_id() != -1


@dataclass
class Tally:
    """How often one edit acted in one layer, and how.

    `prefill` and `decode` count forwards, `rows` edited query rows (of one sample), `path` names the
    arithmetic and `backends` the kernels that ran, `gain` (B, H) is the newest set of head factors. Of
    `offered` pairs of head and row, a policy changed `changed`. `note` says what no count can.
    """

    intervention: str
    edit: str
    layer: int
    path: str
    prefill: int = 0
    decode: int = 0
    rows: int = 0
    gain: Tensor | None = None
    offered: Tensor | int = 0
    changed: Tensor | int = 0
    backends: set[str] = field(default_factory=set)
    note: str = ""

    def count(self, prefill: bool, rows: int, backend: str | None = None) -> None:
        """Note one forward in which `rows` query rows were edited."""
        if recomputing():
            return
        if backend is not None:
            self.backends.add(backend)
        if prefill:
            self.prefill += 1
        else:
            self.decode += 1
        self.rows += rows

    def count_pairs(self, offered: Tensor | int, changed: Tensor) -> None:
        """Note how many rows of samples a policy was offered, and which heads and rows (B, H, R) it changed."""
        if not recomputing():  # sums stay on the device: no wait for the GPU in mid-generation
            self.offered = self.offered + offered * changed.shape[1]
            self.changed = self.changed + changed.sum()


@dataclass
class Entry(Generic[E]):
    """One edit in one layer. `owner` is the identity of its contribution; `key` files what it remembers."""

    edit: E
    tally: Tally
    owner: int
    key: tuple[int, int]


@dataclass
class LayerPlan:
    """The edits of one layer, each kind in the order given."""

    masks: list[Entry[Mask]] = field(default_factory=list)
    bias: list[Entry[Bias]] = field(default_factory=list)
    policies: list[Entry[MassPolicy]] = field(default_factory=list)
    gains: list[Entry[HeadGain]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.masks or self.bias or self.policies or self.gains)


_PATHS = {
    Bias: "one SDPA call with an additive mask",
    Mask: "one SDPA call with a mask",
    MassPolicy: "SDPA, edited rows by group masses",
    HeadGain: "SDPA, head outputs scaled",
    Hidden: "read at the block's input",
    Logits: "newest row of the logits",
    Exit: "tokens left the decoder",
}


@dataclass
class Contribution:
    """The edits of one intervention, checked against a model."""

    name: str
    edits: tuple[Edit, ...]
    on: bool = True
    tallies: list[Tally] = field(default_factory=list)

    def check(self, anatomy: Anatomy) -> None:
        """Raise OutOfRange for a layer or head that the model does not have, CannotEdit for a missing image."""
        if anatomy.image_token is None and any(_needs_image(edit) for edit in self.edits):
            raise CannotEdit(
                f"{self.name} needs to know where the image is, but the config of this {anatomy.model_type} model "
                "has no image_token_id: pass the whole vision-language model, or set config.image_token_id"
            )
        for edit in self.edits:
            if isinstance(edit, LayerEdit | Branch | Exit):
                anatomy.check_layers(edit.layers, self.name)
            if isinstance(edit, Logits):
                anatomy.check_layers(edit.early, self.name)
            if isinstance(edit, Bias | HeadGain):
                anatomy.check_heads(edit.heads, self.name)

    def tally(self, edit: LayerEdit | Logits | Exit, layer: int) -> Tally:
        """The counter of one kind of edit in one layer."""
        kind = type(edit).__name__
        for tally in self.tallies:
            if (tally.edit, tally.layer) == (kind, layer):
                return tally
        tally = Tally(self.name, kind, layer, _PATHS[type(edit)])
        self.tallies.append(tally)
        return tally


class Plan:
    """All edits that act on a model at one moment.

    `needs_image` and `whole_prompt` name the interventions with that need; empty when none has it.
    """

    def __init__(self, contributions: Sequence[Contribution]) -> None:
        self.contributions = tuple(map(id, contributions))
        self.layers: dict[int, LayerPlan] = {}
        self.hidden: dict[int, list[Entry[Hidden]]] = {}
        self.branches: list[Branch] = []
        self.logits: list[Entry[Logits]] = []
        self.towers: dict[int, bool] = {}  # tower layers, and whether received attention is read there
        self.exits: list[Entry[Exit]] = []
        self.decodings: list[tuple[str, Decoding]] = []
        for number, (owner, edit) in enumerate((c, edit) for c in contributions for edit in c.edits):
            self._file(owner, edit, number)
        self.needs_image = _names(contributions, _needs_image)
        self.whole_prompt = _names(contributions, _reads_prompt_once)

    def _file(self, owner: Contribution, edit: Edit, number: int) -> None:
        """Put one edit where the engine looks for it."""
        if isinstance(edit, Branch):
            _add_branch(self.branches, edit)
        elif isinstance(edit, Tower):
            self.towers[edit.layer] = edit.received
        elif isinstance(edit, Decoding):
            self.decodings.append((owner.name, edit))
        elif isinstance(edit, Logits):
            self.logits.append(Entry(edit, owner.tally(edit, NO_LAYER), id(owner), (number, NO_LAYER)))
        elif isinstance(edit, Exit):
            self.exits.append(Entry(edit, owner.tally(edit, NO_LAYER), id(owner), (number, NO_LAYER)))
        else:
            for layer in edit.layers:
                self._file_in_layer(
                    edit, layer, Entry(edit, owner.tally(edit, layer), id(owner), (number, layer))
                )

    def _file_in_layer(self, edit: LayerEdit, layer: int, entry: Entry[Any]) -> None:
        at = self.layers.setdefault(layer, LayerPlan())
        if isinstance(edit, Hidden):
            self.hidden.setdefault(layer, []).append(entry)
        elif isinstance(edit, Mask):
            at.masks.append(entry)
        elif isinstance(edit, Bias):
            at.bias.append(entry)
        elif isinstance(edit, MassPolicy):
            at.policies.append(entry)
        else:
            at.gains.append(entry)

    def __bool__(self) -> bool:
        return bool(
            self.layers or self.hidden or self.branches or self.logits or self.exits or self.decodings
        )

    @property
    def reading(self) -> tuple[int, ...]:
        """Layers whose head outputs some branch keeps."""
        return tuple(sorted({layer for branch in self.branches for layer in branch.layers}))

    @property
    def early(self) -> tuple[int, ...]:
        """Layers whose incoming state goes through the head."""
        return tuple(sorted({layer for entry in self.logits for layer in entry.edit.early}))

    @property
    def following(self) -> bool:
        """Whether some branch goes on while tokens are generated."""
        return any(branch.every_step for branch in self.branches)


def _add_branch(branches: list[Branch], new: Branch) -> None:
    """One stream serves all branches of one name over the same tokens."""
    for number, old in enumerate(branches):
        if old == new:
            return
        if replace(old, layers=(), every_step=True) == replace(new, layers=(), every_step=True):
            layers = tuple(sorted({*old.layers, *new.layers}))
            branches[number] = replace(old, layers=layers, every_step=old.every_step or new.every_step)
            return
        if old.name == new.name:
            raise CannotEdit(
                f"two branches are called {new.name!r} but read other prompts: give one another name"
            )
    branches.append(new)


def _needs_image(edit: Edit) -> bool:
    if isinstance(edit, Exit):
        return edit.tokens is None
    return isinstance(edit, Bias | Mask | MassPolicy | HeadGain | Logits) and edit.needs_image


def _reads_prompt_once(edit: Edit) -> bool:
    return isinstance(edit, Hidden | Branch | Mask | MassPolicy | Exit | Tower) or (
        isinstance(edit, HeadGain) and edit.hold
    )


def _names(contributions: Sequence[Contribution], wanted: Callable[[Edit], bool]) -> str:
    names = (c.name for c in contributions if any(wanted(edit) for edit in c.edits))
    return ", ".join(dict.fromkeys(names))
