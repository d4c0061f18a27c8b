"""The readable backend: every score, prob and coefficient is formed. In float64 it is the oracle of the others."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Problem, Rows


def scores_of(problem: Problem) -> Tensor:
    """(B, H, R, K) scores with every bias and mask, -inf where a key is not seen."""
    heads = problem.query.shape[1]
    key = problem.key.to(problem.wide).repeat_interleave(heads // problem.key.shape[1], 1)
    scores = problem.query.to(problem.wide) @ key.transpose(2, 3) * problem.scale
    ids = problem.groups.ids.long()
    if problem.score_mod is not None:
        scores = problem.score_mod(scores, ids)
    if problem.group_bias is not None:
        scores = scores + problem.group_bias.to(scores)[:, ids].transpose(0, 1)[:, :, None]
    if problem.mask is not None:
        scores = scores + problem.mask
    if problem.allow is not None:
        allowed = problem.allow.expand(ids.shape[0], -1, -1) if problem.allow.shape[0] == 1 else problem.allow
        chosen = ids.expand(allowed.shape[0], -1)[:, None].expand(-1, allowed.shape[1], -1)
        scores = scores.masked_fill(~allowed.gather(2, chosen)[:, None], -torch.inf)
    visible = problem.visible()
    return scores if visible is None else scores.masked_fill(~visible, -torch.inf)


def rows(problem: Problem) -> Rows:
    """Edited rows by the definition: `out_i = sum_k c_group(k) p_ik v_k`. A row that sees nothing is zero."""
    scores = scores_of(problem)
    empty = scores.amax(-1, keepdim=True) == -torch.inf
    probs = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    member = problem.groups.member.to(probs)
    masses = probs @ member
    probs = probs * (problem.coefficients(masses) @ member.transpose(2, 3))
    heads = problem.query.shape[1]
    value = problem.value.to(problem.wide).repeat_interleave(heads // problem.value.shape[1], 1)
    return Rows((probs @ value).to(problem.query.dtype), masses)
