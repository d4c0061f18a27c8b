"""`reweighted_attention`: attention whose probs are rescaled by a policy of group masses, and its backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from . import dense, naive, segments
from .groups import Groups
from .policies import Policy, in_turn
from .problem import Problem, Rows, ScoreMod, Unsupported, additive, fitting

Backend: TypeAlias = Literal["auto", "torch", "triton", "naive"]
FEW = 1 << 16  # row-key pairs a head below which all probs at once are faster than spans
SCATTERED = 64  # rows, and columns, from which on keys are sorted by group


class Reweighted(NamedTuple):
    """What `reweighted_attention` returns.

    Attributes:
        out: (B, H, Q, D_v) in the query's dtype.
        masses: (B, H, Q - rows_from, G) fp32 (fp64 for fp64): the groups' shares of each edited row before
            the policy; None where not asked for.
        path: the arithmetic that was used, for a report.
    """

    out: Tensor
    masses: Tensor | None
    path: str


def reweighted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Groups,
    policy: Policy | Sequence[Policy],
    *,
    causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    mask: Tensor | None = None,
    rows_from: int = 0,
    group_bias: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    allow: Tensor | None = None,
    return_masses: bool = True,
    backend: Backend = "auto",
) -> Reweighted:
    r"""Scaled dot product attention with `out = sum_g c_g(m) * N_g / L`, at about its speed and memory.

    With L a row's sum of exponentiated scores and N_g its weighted sum of values over group g, m_g = L_g / L is
    the mass of the group and c = policy(m). Rows before `rows_from` are plain attention: one library call, bit
    for bit what the library gives for all rows. (On a GPU the library may split rows otherwise.)

    Args:
        query: (B, H, Q, D).
        key: (B, H_kv, K, D).
        value: (B, H_kv, K, D_v).
        groups: the group of each key.
        policy: masses (B, H, R, G) -> coefficients of the same shape, R = Q - rows_from; several act in turn.
        causal: query row i sees the keys up to K - Q + i (aligned at the lower right).
        scale: factor of the scores, default D ** -0.5.
        enable_gqa: allow H to be a multiple of H_kv.
        mask: (B|1, H|1, Q|1, K), bool (True is seen) or added to the scores.
        rows_from: the first row that the policy, `group_bias`, `score_mod` and `allow` apply to.
        group_bias: (G,) or (H, G), added to the scores of each group.
        score_mod: (scores (B, H, R, K), ids (B|1, K)) -> scores; it makes all scores of the edited rows be formed.
        allow: (R, G) or (B, R, G) bool: which groups a row sees. A row that sees nothing is zero.
        return_masses: give the masses back.
        backend: "torch" (library calls), "triton" (CUDA; also its interpreter), "naive" (all probs formed; the
            oracle), or "auto": triton on a CUDA device where it can, else torch.

    Raises:
        ValueError: shapes that do not fit.
        Unsupported: the backend asked for by name cannot do this.

    Source: the group form of post-softmax redistribution is ours; VAR (arXiv 2503.03321) is one such policy.
    """
    _check(query, key, value, groups, enable_gqa, rows_from)
    if query.shape[2] == 1:
        causal = False
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    mask = None if mask is None else fitting(mask, (*query.shape[:3], key.shape[2]))
    added = (
        None
        if mask is None
        else additive(_rows_of(mask, rows_from), torch.promote_types(query.dtype, torch.float32))
    )
    problem = Problem(
        query[:, :, rows_from:],
        key,
        value,
        groups,
        in_turn(policy, groups.count),
        scale,
        causal,
        added,
        _biases(group_bias, query.shape[1], groups.count),
        score_mod,
        _allowed(allow, query.shape[0], query.shape[2] - rows_from, groups.count),
    )
    edited, path = reweighted_rows(problem, backend)
    out = edited.out
    if rows_from:
        out = join(
            lambda heads, rows: _plain(problem, query, mask, heads, rows),
            edited.out,
            query.shape[2],
            query.shape[1] // key.shape[1],
        )
    return Reweighted(out, edited.masses if return_masses else None, path)


def reweighted_rows(problem: Problem, backend: Backend = "auto") -> tuple[Rows, str]:
    """The edited rows of a problem, and the name of the arithmetic that was used.

    "torch spans" is one library call a span, "torch rows" all probs of the edited rows at once.
    """
    if backend == "naive":
        return naive.rows(problem), "naive"
    if _scattered(problem):
        problem = problem.by_group()
    if backend == "triton" or (backend == "auto" and problem.query.is_cuda):
        try:
            from . import triton_split  # slow to import, and not on every platform
        except ImportError as error:
            reason: str | None = f"needs the package triton ({error})"
        else:
            reason = triton_split.reason_against(problem)
            if reason is None:
                return triton_split.rows(problem), "triton"
        if backend == "triton":
            raise Unsupported(f"backend 'triton' {reason}; backend='auto' takes another one")
    elif backend not in ("auto", "torch"):
        raise ValueError(f"backend is {backend!r}; give 'auto', 'torch', 'triton' or 'naive'")
    _, _, rows, keys = problem.shape
    if problem.score_mod is not None or rows * keys <= FEW:
        return dense.rows(problem), "torch rows"
    return segments.rows(problem), "torch spans"


def _scattered(problem: Problem) -> bool:
    """Whether groups are so mixed, and rows so many, that it pays to sort the keys."""
    _, _, rows, keys = problem.shape
    if problem.causal or rows < SCATTERED or rows * keys <= FEW or problem.score_mod is not None:
        return False
    return max(len(layout.columns) for layout in problem.groups.layouts) > SCATTERED


def library_rows(rows: int, wanted: int) -> int:
    """How many of `rows` query rows to give the CPU library so that the first `wanted` come out as if all were given.

    Its blocks of rows are 256, 64 or 32 long, by the number of rows; within a block the last bits depend on the length.
    """
    least, block = next((least, block) for least, block in ((768, 256), (192, 64), (0, 32)) if rows >= least)
    return min(rows, max(least, -(-wanted // block) * block))


def join(plain: Callable[[slice, int], Tensor], edited: Tensor, rows: int, together: int = 1) -> Tensor:
    """Plain rows before edited ones, (B, H, rows, D_v).

    Args:
        plain: (heads, n) -> (B, heads, n, D_v), the library's first n rows of these heads. Called for some
            heads at a time, so that its result and ours are never both whole in memory.
        edited: (B, H, R, D_v), the last rows.
        rows: of the whole.
        together: heads that share a key-value head; they are asked for at once.
    """
    batch, heads, count, width = edited.shape
    first = rows - count
    asked = library_rows(rows, first) if edited.device.type == "cpu" else first
    if edited.requires_grad:
        return torch.cat([plain(slice(0, heads), asked)[:, :, :first], edited], 2)
    if asked == rows:
        out = plain(slice(0, heads), rows)
        out[:, :, first:] = edited
        return out
    out = edited.new_empty(batch, rows, heads, width).transpose(1, 2)
    step = _heads_at_a_time(edited, asked, together)
    for start in range(0, heads, step):
        own = slice(start, min(start + step, heads))
        out[:, own, :first] = plain(own, asked)[:, :, :first]
    out[:, :, first:] = edited
    return out


def _heads_at_a_time(edited: Tensor, rows: int, together: int) -> int:
    """Enough for 4 MiB of output and a block of work a thread, in whole groups."""
    a_head = edited.shape[0] * rows * edited.shape[3] * edited.element_size()
    enough = max((4 << 20) // max(1, a_head), torch.get_num_threads() // edited.shape[0], 1)
    return -(-enough // together) * together


def _plain(problem: Problem, query: Tensor, mask: Tensor | None, heads: slice, rows: int) -> Tensor:
    """The first rows of some heads by the library alone."""
    together = query.shape[1] // problem.key.shape[1]
    shared = slice(heads.start // together, -(-heads.stop // together))
    keys, causal = problem.key.shape[2], problem.causal
    if causal and (mask is not None or keys != query.shape[2]):
        visible = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril(keys - query.shape[2])
        mask = (
            visible
            if mask is None
            else additive(_first(mask, rows), query.dtype).masked_fill(~visible, -torch.inf)
        )
        causal = False
    if mask is not None:
        mask = _first(mask, rows)
        mask = mask[:, heads] if mask.ndim == 4 and mask.shape[1] > 1 else mask
    seen = slice(0, rows if causal and query.device.type != "cpu" else keys)
    return F.scaled_dot_product_attention(
        query[:, heads, :rows],
        problem.key[:, shared, seen],
        problem.value[:, shared, seen],
        attn_mask=mask,
        is_causal=causal,
        scale=problem.scale,
        enable_gqa=together > 1,
    )


def _first(mask: Tensor, rows: int) -> Tensor:
    return mask if mask.shape[-2] == 1 else mask[..., :rows, :]


def _check(
    query: Tensor, key: Tensor, value: Tensor, groups: Groups, enable_gqa: bool, rows_from: int
) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(f"query, key and value must have 4 dimensions (B, H, Q, D), not {shapes}")
    fits = query.shape[0] == key.shape[0] == value.shape[0] and query.shape[3] == key.shape[3]
    if not fits or key.shape[1:3] != value.shape[1:3]:
        raise ValueError(
            f"query (B, H, Q, D), key (B, H_kv, K, D) and value (B, H_kv, K, D_v) do not fit: {shapes}"
        )
    if query.shape[1] % key.shape[1] or (query.shape[1] != key.shape[1] and not enable_gqa):
        way = "" if query.shape[1] % key.shape[1] else "; pass enable_gqa=True"
        raise ValueError(f"{query.shape[1]} query heads for {key.shape[1]} key-value heads{way}: {shapes}")
    if groups.keys != key.shape[2] or groups.ids.shape[0] not in (1, query.shape[0]):
        raise ValueError(f"group ids of shape {tuple(groups.ids.shape)} do not fit (B, K) of {shapes}")
    if not query.numel() or not key.numel():
        raise ValueError(f"nothing to attend to: {shapes}")
    if not 0 <= rows_from < query.shape[2]:
        raise ValueError(f"rows_from is {rows_from}, but there are rows 0 to {query.shape[2] - 1}")


def _rows_of(mask: Tensor, first: int) -> Tensor:
    return mask if mask.shape[2] == 1 else mask[:, :, first:]


def _biases(bias: Tensor | None, heads: int, count: int) -> Tensor | None:
    if bias is None:
        return None
    if bias.shape not in ((count,), (1, count), (heads, count)):
        raise ValueError(
            f"group_bias must be of shape (G,) = ({count},) or (H, G) = ({heads}, {count}), not {tuple(bias.shape)}"
        )
    return bias.reshape(-1, count)


def _allowed(allow: Tensor | None, batch: int, rows: int, count: int) -> Tensor | None:
    if allow is None:
        return None
    if allow.dtype != torch.bool or allow.shape not in (
        (rows, count),
        (1, rows, count),
        (batch, rows, count),
    ):
        raise ValueError(
            f"allow must be bool of shape (R, G) = ({rows}, {count}) or (B, R, G), B = {batch}, "
            f"not {allow.dtype} of {tuple(allow.shape)}"
        )
    return allow.reshape(-1, rows, count)
