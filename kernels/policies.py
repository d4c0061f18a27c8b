"""Policies: functions from group masses to coefficients, both (B, H, Q, G).

The probs of group g are multiplied by coefficient c_g. Any torch function will do; the named ones here
also run inside the Triton kernel. Policies given together act in turn: each sees the masses that the
one before it left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Policy: TypeAlias = Callable[[Tensor], Tensor]


def identity(masses: Tensor) -> Tensor:
    """Change nothing."""
    return torch.ones_like(masses)


@dataclass(frozen=True)
class Redistribute:
    """Move mass from sinks to the rest of the image, in rows that look at it (VAR, arXiv 2503.03321).

    Groups are text 0, image 1, image sink 2, text sink 3. With p = `transfer`,

        c_sink = 1 - p,   c_image = 1 + p * (m_image_sink + m_text_sink) / m_image,   c_text = 1

    in rows with an image sink, where the image has at least `min_visual` of all mass and, of that, image
    tokens that are no sinks have at least the share `rho`.
    """

    transfer: float = 0.6
    rho: float = 0.5
    min_visual: float = 0.2

    def __call__(self, masses: Tensor) -> Tensor:
        """Coefficients (B, H, Q, 4)."""
        _, image, image_sink, text_sink = masses.unbind(-1)
        visual = image + image_sink
        acts = (visual >= self.min_visual) & (image >= self.rho * visual)
        moved = (acts & (torch.minimum(image, image_sink) > 0)).to(image.dtype) * self.transfer
        freed = moved * (image_sink + text_sink)
        gain = 1 + freed / image.clamp_min(torch.finfo(image.dtype).tiny)
        keep = 1 - moved
        return torch.stack([torch.ones_like(image), gain, keep, keep], -1)


@dataclass(frozen=True)
class Drop:
    """Take groups away. With `renormalise` the others share their mass in proportion; a row without others is zero."""

    groups: tuple[int, ...]
    renormalise: bool = True

    def __call__(self, masses: Tensor) -> Tensor:
        """Coefficients (B, H, Q, G)."""
        keep = torch.ones(masses.shape[-1], dtype=masses.dtype, device=masses.device)
        keep[list(self.groups)] = 0
        return _summing_to_one(keep, masses) if self.renormalise else keep.expand_as(masses)


@dataclass(frozen=True)
class Scale:
    """Multiply group g by `factors[g]`. With `renormalise` rows sum to 1 again."""

    factors: tuple[float, ...]
    renormalise: bool = False

    def __call__(self, masses: Tensor) -> Tensor:
        """Coefficients (B, H, Q, G)."""
        if len(self.factors) != masses.shape[-1]:
            raise ValueError(f"{len(self.factors)} factors for {masses.shape[-1]} groups")
        factors = torch.tensor(self.factors, dtype=masses.dtype, device=masses.device)
        return _summing_to_one(factors, masses) if self.renormalise else factors.expand_as(masses)


@dataclass(frozen=True)
class HeadScale:
    """Multiply the whole output of each head; `factors` is (H,) or (B, H)."""

    factors: Tensor

    def __call__(self, masses: Tensor) -> Tensor:
        """Coefficients (B, H, Q, G)."""
        factors = self.factors.to(masses)
        return factors.reshape(-1, masses.shape[1], 1, 1).expand_as(masses)


@dataclass(frozen=True)
class InTurn:
    """Several policies, each on its own grouping of the same groups.

    Args:
        policies: in the order in which they act.
        of: for each policy, the (G, G_i) matrix with a 1 where our group g belongs to its group i.
    """

    policies: tuple[Policy, ...]
    of: tuple[Tensor, ...]

    def __call__(self, masses: Tensor) -> Tensor:
        """Coefficients (B, H, Q, G)."""
        total = torch.ones_like(masses)
        for policy, of in zip(self.policies, self.of, strict=True):
            of = of.to(masses)
            total = total * (policy((masses * total) @ of) @ of.T)
        return total


def in_turn(policy: Policy | Sequence[Policy], count: int) -> Policy:
    """One policy, or several on the same G groups as one."""
    if callable(policy):
        return policy
    if len(policy) == 1:
        return policy[0]
    return InTurn(tuple(policy), (torch.eye(count),) * len(policy))


def _summing_to_one(factors: Tensor, masses: Tensor) -> Tensor:
    """Factors (G,) divided by what each row sums to under them; zero where that is nothing."""
    total = (masses * factors).sum(-1, keepdim=True)
    return factors * torch.where(total > 0, 1 / torch.where(total > 0, total, 1), 0)
