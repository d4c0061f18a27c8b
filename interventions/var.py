r"""Visual attention redistribution (VAR).

Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models", ICLR 2025,
arXiv 2503.03321. Reference: https://github.com/seilk/VisAttnSink/tree/98e62d6 (`98e62d6`, 2025-02-17).

Sinks of layer l: tokens j whose state x_j entering the block has max_{d in D_sink} |x_j[d]| / rms(x_j)
at or above tau. For a (head, row) whose image mass is at least `min_visual`, and of it at least the share
`rho` on image tokens that are no sinks, a fraction p of the mass of all sinks, text and image, goes to the
other image tokens in proportion to their probs:

    c_sink = 1 - p,   c_image = 1 + p * (m_image_sink + m_text_sink) / m_image,   c_text = 1

Which rows: prompt rows after the image, the last one included, and every decode row. Heads are chosen
anew for every row. A layer in which no image token is a sink is left alone, as in the release.

Layers: from 2 to the one before the last. The paper excludes the last; that 0 and 1 are left out is in
the release only (there are no massive activations there yet).

`variant="released"` reads the same numbers as the release does: `transfer` is the fraction that sinks
KEEP, `rho` the largest share of sinks, tau is exceeded strictly, and the last layer is edited. (The 1e-6
that each image token adds to its denominator is left out.) Its bugs are not repeated: sink positions of
the first sample reused for all later ones, row limits lost from the second sample on, BOS cut from the
prompt, samples of a batch merged, 7B sink dimensions for every model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..hooks.anatomy import Anatomy
from ..hooks.edits import Edit, Hidden, MassPolicy
from ..hooks.errors import RegardError
from ..hooks.session import Call, Session
from ..kernels.policies import Redistribute
from .method import Method
from .sinks import known_sinks, sink_strength

SINKS = "sinks"
TEXT, IMAGE, IMAGE_SINK, TEXT_SINK = range(4)
GROUPS = ("text", "image", "image sink", "text sink")


@dataclass(frozen=True)
class VAR(Method):
    """Move probability from sink tokens to the rest of the image, in the heads that look at it.

    Args:
        transfer: p, the fraction of the sinks' mass that is moved ("released": the fraction kept).
        rho: least share of the image mass on image tokens that are no sinks; the paper takes 0.5 against
            hallucination, 0.8 in general, 0.9 for vision-centric tasks ("released": largest share of sinks).
        tau: a token is a sink where its normalised activation reaches this. Of C channels one can reach no
            more than sqrt(C), so a known base model too narrow for the tau given has its own in its place.
        min_visual: least image mass of a row.
        sink_dims: D_sink, channels of the residual stream; None takes those known for the base model.
        layers: decoder blocks from 0; None means 2 to the one before the last.
        variant: "paper" or "released".
    """

    transfer: float = 0.6
    rho: float = 0.5
    tau: float = 20.0
    min_visual: float = 0.2
    sink_dims: tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None
    variant: Literal["paper", "released"] = "paper"

    name = "var"
    paper = "See What You Are Told: Visual Attention Sink in Large Multimodal Models"
    arxiv = "2503.03321"
    kind = "mass policy"
    cost = "edited rows computed twice"
    models = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")

    def __post_init__(self) -> None:
        if self.variant not in ("paper", "released"):
            raise ValueError(f"variant must be 'paper' or 'released', got {self.variant!r}")
        for key in ("transfer", "rho", "min_visual"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key} is a fraction from 0 to 1, got {getattr(self, key)}")
        for key in ("sink_dims", "layers"):
            if getattr(self, key) is not None:
                object.__setattr__(self, key, tuple(getattr(self, key)))

    @classmethod
    def for_model(cls, anatomy: Anatomy) -> VAR:
        """The paper's defaults, with the sink dimensions (and tau, where it is another) of the base model."""
        known = known_sinks(anatomy)
        return cls() if known is None else cls(sink_dims=known.dims, tau=known.tau)

    def chosen_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        """The blocks that are edited; cross-attention blocks hold no text sink and are left out."""
        if self.layers is not None:
            return tuple(sorted(set(self.layers)))
        end = anatomy.layers - (0 if self.variant == "released" else 1)
        return tuple(layer for layer in range(2, end) if layer in anatomy.self_layers)

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        """Read the sinks at each block's input, then move mass by group."""
        dims, known, reach = self.sink_dims, known_sinks(anatomy), anatomy.hidden**0.5
        if dims is None and known is not None:
            tau = known.tau if self.tau >= reach else self.tau
            return replace(self, sink_dims=known.dims, tau=tau).edits(anatomy)
        if dims is None:
            raise RegardError(
                f"VAR does not know the sink dimensions of {anatomy.model_type} with a {anatomy.text_type} decoder "
                f"({anatomy.layers} layers, {anatomy.hidden} channels): find them with "
                "regard.sink_dimensions(model, inputs) and pass regard.VAR(sink_dims=...)"
            )
        wrong = [dim for dim in dims if not 0 <= dim < anatomy.hidden]
        if wrong:
            raise ValueError(f"sink_dims {wrong} lie outside of the decoder's {anatomy.hidden} channels")
        if self.tau >= reach:
            raise ValueError(
                f"no token can be a sink: |x| / rms(x) stays below {reach:.3g} in {anatomy.hidden} channels and tau "
                f"is {self.tau:g}; pass the tau that regard.sink_dimensions(model, inputs) finds"
            )
        layers = self.chosen_layers(anatomy)

        def find(hidden: Tensor, session: Session) -> Tensor:
            return self.sinks(hidden, dims)

        return Hidden(SINKS, layers, find), MassPolicy(layers, self.groups, self.policy, GROUPS)

    def sinks(self, hidden: Tensor, dims: Sequence[int]) -> Tensor:
        """Which tokens are sinks: hidden (B, S, C) -> (B, S) bool."""
        strength = sink_strength(hidden, dims)
        return strength > self.tau if self.variant == "released" else strength >= self.tau

    def groups(self, call: Call) -> Tensor | None:
        """Group of each prompt token, (B, S). Padding is plain text and has no mass."""
        sinks, image = call.read(SINKS), call.session.image.to(call.query.device)
        padding = call.session.padding
        if padding is not None:
            sinks = sinks & ~padding.to(sinks.device)
        groups = torch.where(image, IMAGE, TEXT)
        groups = torch.where(sinks & image, IMAGE_SINK, groups)
        return torch.where(sinks & ~image, TEXT_SINK, groups)

    def policy(self, masses: Tensor) -> Tensor:
        """Masses (B, H, Q, 4) -> coefficients. Rows that are not chosen get 1 everywhere."""
        if self.variant == "released":
            return Redistribute(1 - self.transfer, 1 - self.rho, self.min_visual)(masses)
        return Redistribute(self.transfer, self.rho, self.min_visual)(masses)
