"""DAMRO's outlier patches to look at: where a vision tower's CLS token looks, and which patches the recipe keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from ..hooks.anatomy import anatomy, base_of
from ..hooks.edits import Logits, Tower
from ..hooks.run import Run
from ..hooks.session import Session
from ..hooks.step import Step
from ..hooks.tower import attention_layers, find_tower, patch_grid, scores_of
from .damro import DAMRO, QFORMERS


@dataclass(frozen=True)
class ClsOutliers:
    """Outlier patches (arXiv 2410.04514) of n images, or of n crops where the tower gets crops; on the CPU.

    Attributes:
        probs: (n, h, w) the CLS token's probs over the patches, the mean over heads; 1 less their sum is what it keeps
            for itself. LLaVA's variants "paper", "released" and "early" choose by the sum of the scores over heads, so
            the chosen ones need not be the largest of these.
        chosen: (n, h, w) bool, the outliers: as many as the recipe keeps.
        layer: of the tower, from 0, that was read.
    """

    probs: Tensor
    chosen: Tensor
    layer: int


@torch.no_grad()
def cls_outliers(
    model: nn.Module, inputs: Mapping[str, Any], count: int | None = None, *, method: DAMRO | None = None
) -> ClsOutliers:
    """Show the patches that `damro` picks. Nothing is changed and nothing contrasted; it costs one forward.

    LLaVA-NeXT: each crop of each image is one of the n, the whole image the first of its own. The recipe keeps those of
    the whole image alone.

    Args:
        model: LLaVA, LLaVA-NeXT, InstructBLIP or another model that `damro` takes; recipes on it act.
        inputs: what the processor made, one prompt or a batch.
        count: K, outliers of each image; None takes the recipe's for this model.
        method: a DAMRO of another variant, or with its extension for towers without a CLS token (`probs` are then the
            shares of attention that patches receive).

    Raises:
        CannotEdit: `damro` is not defined on this model, or the tower does not run for these inputs.
        NoImageTokens: no prompt has an image.
        ValueError: a count below 1.
    """
    model = base_of(model)
    parts = anatomy(model)
    method = DAMRO.for_model(parts) if method is None else method
    reads = replace(method, alpha=1.0, mode="contrast", tokens=method.tokens if count is None else count)
    reader = next(edit for edit in reads.edits(parts) if isinstance(edit, Tower))
    kept: list[tuple[Tensor, Tensor]] = []

    def look(logits: Tensor, step: Step) -> Tensor:
        scores = scores_of(step.session, reads.layer, reads.name)
        chosen = _gathered if parts.model_type in QFORMERS else _chosen
        kept.append((scores.softmax(-1).mean(1)[:, 1:], chosen(reads, step.session, scores)))
        return logits

    with Run(model, [reader, Logits(look, needs_image=True)]):
        model(**inputs)
    _, tower = find_tower(model)
    grid, _ = patch_grid(tower, inputs["pixel_values"])
    probs, chosen = (part.cpu().unflatten(1, grid) for part in kept[0])
    return ClsOutliers(probs, chosen, range(len(attention_layers(tower)))[reads.layer])


def _chosen(method: DAMRO, session: Session, scores: Tensor) -> Tensor:
    """The patches whose tokens stay in the second prompt, (n, P) bool."""
    _, rank = method.chosen(session)
    return rank < min(method.tokens, rank.shape[1])


def _gathered(method: DAMRO, session: Session, scores: Tensor) -> Tensor:
    """The patches that the Q-Former gets, (n, P) bool: the recipe gathers from a tower that tells its places."""
    count, tokens = scores.shape[0], scores.shape[2]
    places = torch.arange(tokens, device=scores.device).expand(count, tokens)[..., None]
    found = method.gather(BaseModelOutput(last_hidden_state=places), session).last_hidden_state[..., 0]
    return torch.zeros(count, tokens, dtype=torch.bool, device=scores.device).scatter(1, found, True)[:, 1:]
