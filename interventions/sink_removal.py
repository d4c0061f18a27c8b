r"""Sink removal: take attention away from the image's sink tokens.

The control of methods that move the mass of visual sinks (VAR, arXiv 2503.03321, whose Table on removing sinks shows
that the answers hardly change). With probs a of a row, and S the image tokens whose state has a massive activation,

    a_j <- keep * a_j   for j in S,   renormalised to sum 1 if asked for

Which rows: rows after the image, the last one of the prompt and every decode row included. Sinks are found
as in VAR: where max_{d in D_sink} |x_j[d]| / rms(x_j) reaches tau at the block's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..hooks.anatomy import Anatomy
from ..hooks.edits import Edit, Hidden, MassPolicy
from ..hooks.session import Call
from .method import Method
from .sinks import known_sinks
from .var import SINKS, VAR

REST, SINK = range(2)
GROUPS = ("rest", "image sink")


@dataclass(frozen=True)
class DropSinks(Method):
    """Drop the image's sink tokens from attention, or scale them down.

    Args:
        keep: factor of a sink's probs; 0 drops it.
        renormalise: let the other tokens take what the sinks lose. False leaves a sum below 1.
        tau: a token is a sink where its normalised activation reaches this.
        sink_dims: D_sink, channels of the residual stream; None takes those known for the base model.
        layers: decoder blocks from 0; None means 2 to the one before the last, as in VAR.
    """

    keep: float = 0.0
    renormalise: bool = True
    tau: float = 20.0
    sink_dims: tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None

    name = "drop_sinks"
    paper = "See What You Are Told: Visual Attention Sink in Large Multimodal Models (its removal of sinks)"
    arxiv = "2503.03321"
    kind = "mass policy"
    cost = "edited rows computed twice"
    models = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= 1:
            raise ValueError(f"keep is a factor from 0 to 1, got {self.keep}")
        for key in ("sink_dims", "layers"):
            if getattr(self, key) is not None:
                object.__setattr__(self, key, tuple(getattr(self, key)))

    @classmethod
    def for_model(cls, anatomy: Anatomy) -> DropSinks:
        """The sink dimensions (and tau, where it is another) of the base model."""
        known = known_sinks(anatomy)
        return cls() if known is None else cls(sink_dims=known.dims, tau=known.tau)

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        """Read the sinks at each block's input, then scale their mass."""
        if self.keep == 1:
            return ()
        finder = VAR(tau=self.tau, sink_dims=self.sink_dims, layers=self.layers)
        read = next(edit for edit in finder.edits(anatomy) if isinstance(edit, Hidden))
        return read, MassPolicy(read.layers, self.groups, self.policy, GROUPS)

    def groups(self, call: Call) -> Tensor | None:
        """Group of each prompt token, (B, S)."""
        sinks, image = call.read(SINKS), call.session.image.to(call.query.device)
        return torch.where(sinks & image, SINK, REST)

    def policy(self, masses: Tensor) -> Tensor:
        """Masses (B, H, Q, 2) -> coefficients. A row with all its mass on sinks is left alone."""
        coefficients = torch.ones_like(masses)
        coefficients[..., SINK] = self.keep
        total = (masses * coefficients).sum(-1, keepdim=True)
        if self.renormalise:
            coefficients = coefficients * masses.sum(-1, keepdim=True) / total.clamp_min(1e-12)
        return torch.where(total > 1e-6, coefficients, 1.0)
