"""The edits that an intervention may ask for: frozen statements, no modules, no caches.

Notation: B samples, H query heads, Q query rows, K keys, D head width, S prompt tokens, G groups.
Scores are before the softmax, probs after it. `layers` are indices of decoder blocks from 0.

Within one layer the engine applies Bias first, then MassPolicy, then HeadGain, each kind in the
order in which it was given. Every function gets a `Call` (see `hooks.session`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from .session import Call, Session

Rows = Literal["all", "after_image", "last"]


@dataclass(frozen=True)
class Bias:
    """Add `bias(call)` to the scores. Still one scaled-dot-product call.

    Multiplying probs by g and renormalising is the same as adding log g; -inf drops a key.

    Args:
        layers: decoder blocks to edit.
        bias: returns (B|1, H|1, Q|1, K), or None to leave this forward alone.
        heads: query heads to edit; None means all.
        needs_image: raise when no prompt of the batch has an image.
    """

    layers: tuple[int, ...]
    bias: Callable[[Call], Tensor | None]
    heads: tuple[int, ...] | None = None
    needs_image: bool = True


@dataclass(frozen=True)
class MassPolicy:
    """Rescale the probs of groups of keys by coefficients that depend on the group masses only.

    The output row becomes `sum_g c_g(m) * N_g / L`: with masses m (B, H, Q, G) the policy returns
    coefficients of the same shape. Group 0 is the rest of the text; generated tokens belong to it.

    Args:
        layers: decoder blocks to edit.
        groups: called once a prompt and layer; returns the group of each prompt key, (B, S) integers
            from 0 to `names` - 1, or None to leave the layer alone.
        policy: masses (B, H, Q, G) in fp32 -> coefficients of the same shape.
        names: what the groups are, for the report.
        rows: the query rows that are edited. "after_image" takes rows after the last image token of
            their sample (and none of a sample without an image), in prefill and in decode; "last" the
            last row of the prompt and every generated one.
        needs_image: raise when no prompt of the batch has an image.
    """

    layers: tuple[int, ...]
    groups: Callable[[Call], Tensor | None]
    policy: Callable[[Tensor], Tensor]
    names: tuple[str, ...]
    rows: Rows = "after_image"
    needs_image: bool = True


@dataclass(frozen=True)
class HeadGain:
    """Multiply the output of each head, (B, Q, H, D) before the output projection, by `gain(call)`.

    Args:
        layers: decoder blocks to edit.
        gain: returns (B, H) factors, or None to change nothing (a reader). `call.output` is set.
        hold: ask once, when the prompt is read, and keep the factors while tokens are generated.
            False asks at every step.
        heads: query heads to edit; None means all.
        needs_image: raise when no prompt of the batch has an image.
    """

    layers: tuple[int, ...]
    gain: Callable[[Call], Tensor | None]
    hold: bool = True
    heads: tuple[int, ...] | None = None
    needs_image: bool = True


@dataclass(frozen=True)
class Hidden:
    """Read the state that enters each block while the prompt is processed.

    Args:
        name: under which `call.read(name)` finds the result in the same layer.
        layers: decoder blocks to read.
        read: (hidden (B, S, C), session) -> any tensor; it is kept for the whole sample.
    """

    name: str
    layers: tuple[int, ...]
    read: Callable[[Tensor, Session], Tensor]


@dataclass(frozen=True)
class Branch:
    """A second stream over part of the prompt, with its own cache, positions and mask.

    It runs before the main stream, is never edited, and leaves the main cache and `rope_deltas` alone.

    Args:
        name: under which `call.branch(name)` finds the stream's head outputs, (B, H, D) at its newest row.
        keep: session -> (B, S) bool, the prompt tokens that the stream sees. Positions are renumbered from 0.
        layers: decoder blocks whose head outputs are kept.
        every_step: go on while tokens are generated (teacher-forced on the main stream's tokens).
        combine: (logits (B, V), stream logits (B, V)) -> (B, V), applied to the newest row; needs `every_step`.
    """

    name: str
    keep: Callable[[Session], Tensor]
    layers: tuple[int, ...] = ()
    every_step: bool = False
    combine: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.combine is not None and not self.every_step:
            raise ValueError(f"branch {self.name!r} combines logits, so it must run at every step")


Edit: TypeAlias = Bias | MassPolicy | HeadGain | Hidden | Branch


def without_image(session: Session) -> Tensor:
    """The prompt without its image tokens: (B, S) bool, True where a token is text."""
    return ~session.image
