"""One piece of work as every backend gets it: the rows that a policy edits, checked and brought to one form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .groups import Groups
from .policies import Policy

ScoreMod: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class Rows(NamedTuple):
    """What a backend gives back: `out` (B, H, R, D_v) in the query's dtype, `masses` (B, H, R, G) fp32 or wider."""

    out: Tensor
    masses: Tensor


class Unsupported(NotImplementedError):
    """A backend was asked for by name and cannot do what was asked of it."""


@dataclass(frozen=True)
class Problem:
    """Attention of R rows over K keys, with the probs rescaled by a policy of group masses.

    Args:
        query: (B, H, R, D): the last R rows.
        key: (B, H_kv, K, D).
        value: (B, H_kv, K, D_v).
        groups: of the K keys.
        policy: masses (B, H, R, G) -> coefficients of the same shape.
        scale: factor of the scores.
        causal: row i sees the keys up to K - R + i.
        mask: (B|1, H|1, R|1, K), added to the scores, -inf where a key is not seen; not in half precision.
        group_bias: (H|1, G), added to the scores of a group.
        score_mod: (scores (B, H, R, K), ids (B|1, K)) -> scores, before bias and mask.
        allow: (B|1, R, G) bool, whether a row sees a group.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    groups: Groups
    policy: Policy
    scale: float
    causal: bool = False
    mask: Tensor | None = None
    group_bias: Tensor | None = None
    score_mod: ScoreMod | None = None
    allow: Tensor | None = None

    @property
    def wide(self) -> torch.dtype:
        """The dtype in which masses and sums are kept: fp32, or fp64 for fp64 inputs."""
        return torch.promote_types(self.query.dtype, torch.float32)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, H, R, K."""
        return self.query.shape[0], self.query.shape[1], self.query.shape[2], self.key.shape[2]

    @property
    def differentiable(self) -> bool:
        """Whether a gradient will be asked for."""
        return torch.is_grad_enabled() and any(t.requires_grad for t in (self.query, self.key, self.value))

    def visible(self) -> Tensor | None:
        """(R, K) bool under causality; None when every row sees every key."""
        _, _, rows, keys = self.shape
        if not self.causal or rows == 1:
            return None
        return torch.ones(rows, keys, dtype=torch.bool, device=self.query.device).tril(keys - rows)

    def coefficients(self, masses: Tensor) -> Tensor:
        """What the policy makes of masses (B, H, R, G), in their dtype."""
        found = self.policy(masses)
        if found.shape != masses.shape:
            raise ValueError(
                f"the policy gave coefficients of shape {tuple(found.shape)} for masses (B, H, R, G) = "
                f"{tuple(masses.shape)}; both must have the same shape"
            )
        return found.to(masses.dtype)

    def sample(self, index: int) -> Problem:
        """The same for one sample of the batch."""
        own = slice(index, index + 1)

        def cut(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or tensor.shape[0] == 1 else tensor[own]

        parts = (part[own] for part in (self.query, self.key, self.value))
        query, key, value = parts
        return replace(
            self,
            query=query,
            key=key,
            value=value,
            groups=self.groups.sample(index),
            mask=cut(self.mask),
            allow=cut(self.allow),
        )

    def by_group(self) -> Problem:
        """The same with its keys in the order of their groups, so that each group is one span. Not under causality."""
        order = self.groups.ids.argsort(dim=1, stable=True)
        ids = self.groups.ids.gather(1, order)

        def sort(tensor: Tensor, dim: int) -> Tensor:
            if len(order) == 1:
                return tensor.index_select(dim, order[0])
            shape = [1] * tensor.ndim
            shape[0], shape[dim] = order.shape
            return torch.take_along_dim(tensor, order.reshape(shape), dim)

        return replace(
            self,
            key=sort(self.key, 2),
            value=sort(self.value, 2),
            groups=Groups(ids, self.groups.count),
            mask=None if self.mask is None else sort(self.mask, 3),
        )


def fitting(mask: Tensor, full: tuple[int, int, int, int]) -> Tensor:
    """A mask as (B|1, H|1, Q|1, K).

    Raises:
        ValueError: integers, or a shape that does not broadcast to `full`.
    """
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"a mask is bool (True is seen) or added to the scores, not {mask.dtype}; pass mask.bool()"
        )
    mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
    fits = mask.ndim == 4 and all(size in (1, whole) for size, whole in zip(mask.shape, full, strict=True))
    if not fits or mask.shape[3] != full[3]:
        raise ValueError(f"a mask of shape {tuple(mask.shape)} does not broadcast to (B, H, Q, K) = {full}")
    return mask


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask (True is seen) or one that is added, as one that is added with -inf for unseen keys."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    lowest = (
        torch.finfo(mask.dtype).min / 2
    )  # such a number means "not seen"; added to a score it would overflow
    return mask.to(dtype).masked_fill(mask <= lowest, -torch.inf)
