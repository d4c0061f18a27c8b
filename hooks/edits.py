"""The edits that an intervention may ask for: frozen statements, no modules, no caches.

Notation: B samples, H query heads, Q query rows, K keys, D head width, S prompt tokens, G groups.
Scores are before the softmax, probs after it. `layers` are indices of decoder blocks from 0.

Within one layer the engine applies Mask first, then Bias, MassPolicy and HeadGain, each kind in the
order in which it was given. These functions get a `Call` (see `hooks.session`). Logits edits act in
the order given too, before the user's own logits processors. Branches are never edited.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from .exits import Departure
    from .session import Call, Session
    from .step import Step

Rows = Literal["all", "after_image", "last"]


@dataclass(frozen=True)
class Bias:
    """Add `bias(call)` to the scores. Still one scaled-dot-product call.

    Multiplying probs by g and renormalising is the same as adding log g; -inf drops a key. A bias may
    depend on the scores themselves, `call.scores()`.

    Args:
        layers: decoder blocks to edit.
        bias: returns (B|1, H|1, Q|1, K), or None to leave this forward alone. With rows "last" Q is the newest
            rows only, where all samples have the same ones (no padding on the right).
        heads: query heads to edit; None means all.
        rows: "all", or "last": the last row of the prompt and every generated one.
        needs_image: raise when no prompt of the batch has an image.
    """

    layers: tuple[int, ...]
    bias: Callable[[Call], Tensor | None]
    heads: tuple[int, ...] | None = None
    needs_image: bool = True
    rows: Literal["all", "last"] = "all"


@dataclass(frozen=True)
class Mask:
    """Let rows see keys that the model's own mask hides, while the prompt is processed.

    Args:
        layers: decoder blocks to edit.
        allow: returns (B|1, H|1, Q, K) bool, True where a row sees a key besides those it sees anyway, or
            None to leave this forward alone. Padding stays hidden.
        needs_image: raise when no prompt of the batch has an image.
    """

    layers: tuple[int, ...]
    allow: Callable[[Call], Tensor | None]
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
class Tower:
    """Read the CLS token's attention scores in one layer of the vision tower.

    `session.tower[layer]` holds them while the prompt is processed: (N, H, 1 + P) for N images or crops and
    P patches, before the softmax, column 0 the CLS token itself.

    Args:
        layer: a block of the vision tower; negative ones count from the end, as in `hidden_states`' own use.
        received: for a tower without a CLS token: log of the mean probs that each patch gets from all patches
            instead, with -inf in column 0.
    """

    layer: int
    received: bool = False


@dataclass(frozen=True)
class Exit:
    """Let prompt tokens leave the decoder: blocks after the exit neither compute nor store them.

    Positions are kept. Each sample leaves by itself; memory and time are saved from the block on after
    which every sample has left.

    Args:
        layers: blocks after which the tokens may leave, ascending.
        when: asked after each of these blocks while the prompt is read; returns (B,) bool. None: at the first.
        tokens: session -> (B, S) bool, the tokens that leave; None takes the image tokens.
    """

    layers: tuple[int, ...]
    when: Callable[[Departure], Tensor] | None = None
    tokens: Callable[[Session], Tensor] | None = None


@dataclass(frozen=True)
class Branch:
    """A second stream with its own cache, positions and mask, beside the main one.

    It is never edited, and leaves the main cache and `rope_deltas` alone. Either `keep` takes some of the
    main stream's prompt tokens, or `view` has the model read another prompt: another image, another text.
    While tokens are generated, both streams run as one batch where the decoder allows it.

    Args:
        name: under which `call.branch(name)` finds the stream's head outputs, (B, H, D) at its newest row,
            and `step.branch(name)` its logits.
        keep: session -> (B, S) bool, the prompt tokens that the stream sees, or (B, T) indices of tokens in
            the stream's own order, -1 for none. Positions are renumbered from 0.
        layers: decoder blocks whose head outputs are kept.
        every_step: go on while tokens are generated (teacher-forced on the main stream's tokens).
        view: (the model's keyword arguments at the prompt, session) -> the changed ones, for instance with
            other `pixel_values`, or with other `input_ids` and `attention_mask` (padded on the left).
        tower: (what the vision tower returns, session) -> what the stream gets in its place; with `view`.
        embeds: (embeddings (B, T, C), the prompt token that each is (B, T), -1 on padding, session) -> what the
            stream reads in their place; with `keep`.
    """

    name: str
    keep: Callable[[Session], Tensor] | None = None
    layers: tuple[int, ...] = ()
    every_step: bool = False
    view: Callable[[dict[str, Any], Session], dict[str, Any]] | None = None
    tower: Callable[[Any, Session], Any] | None = None
    embeds: Callable[[Tensor, Tensor, Session], Tensor] | None = None

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.view is None):
            raise ValueError(f"branch {self.name!r} needs either `keep` or `view`, to know what it reads")
        if self.tower is not None and self.view is None:
            raise ValueError(f"branch {self.name!r} edits the vision tower's output, so it needs a `view`")
        if self.embeds is not None and self.keep is None:
            raise ValueError(f"branch {self.name!r} edits the embeddings of tokens, so it needs a `keep`")


@dataclass(frozen=True)
class Logits:
    """Change the logits of the newest row, before the user's logits processors and sampling.

    Args:
        edit: (logits (B, V), step) -> (B, V). `step.branch(name)` gives the logits of a branch, (B, V), and
            `step.generated` the number of tokens generated before this one.
        branches: the branches that it reads; each must be among the edits, with `every_step`.
        needs_image: raise when no prompt of the batch has an image.
        early: blocks before which the newest row's state goes through the head too, as it is, without the last
            norm: `step.early[layer]`, (B, V).
    """

    edit: Callable[[Tensor, Step], Tensor]
    branches: tuple[str, ...] = ()
    needs_image: bool = False
    early: tuple[int, ...] = ()


@dataclass(frozen=True)
class Decoding:
    """Replace the decoding loop of `generate`.

    Args:
        loop: called as transformers calls a `custom_generate` function: (model, input_ids, logits_processor=,
            stopping_criteria=, generation_config=, **model_kwargs) -> what generate returns.
        check: raises CannotEdit for a generation config that the loop cannot serve, before anything runs.
    """

    loop: Callable[..., Any]
    check: Callable[[Any], None] | None = None


LayerEdit: TypeAlias = Bias | Mask | MassPolicy | HeadGain | Hidden
Edit: TypeAlias = LayerEdit | Tower | Exit | Branch | Logits | Decoding


def without_image(session: Session) -> Tensor:
    """The prompt without its image tokens: (B, S) bool, True where a token is text."""
    return ~session.image
