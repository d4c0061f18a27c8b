"""A first drawing of portraits and a scene, without any edit, that says where the subjects are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..hooks.denoiser import is_pipeline
from ..hooks.errors import CannotEdit
from ..hooks.latent_edits import Watch
from .places import Observed, check_places, masks_of
from .recipes import apply


@dataclass(frozen=True)
class Rehearsal:
    """Portraits and scenes as the stock pipeline draws them, and where the subjects are.

    Attributes:
        images: S portraits and the scene.
        portraits: (S, H, W) bool, the subject in each portrait.
        scene: (S, H, W) bool, the subjects in the scene; disjoint, but for subjects that the words cannot tell apart.
    """

    images: list[Any]
    portraits: Tensor
    scene: Tensor


def rehearse(
    pipe: Any,
    prompts: Sequence[str],
    subjects: Sequence[Any],
    detector: Callable[[Any, Any], Any] | None = None,
    **options: Any,
) -> Rehearsal:
    """Draw portraits and a scene without any edit and find the subjects: the first stage of IR-Diffusion.

    Args:
        pipe: a diffusers pipeline.
        prompts: a portrait prompt for each of S subjects, then the scene's.
        subjects: S words or phrases; each is in its portrait's prompt and in the scene's.
        detector: (picture, subject) -> an (H, W) mask, above 0.5 where the subject is. Default is the attention to the
            word, the mean over layers and steps, cut at Otsu's threshold.
        options: of the pipeline's call; give the same generators to the joint run, for the same noise.

    Raises:
        CannotEdit: no diffusers pipeline, or one that the engine does not know.
        NoObjectWords: a subject is not in a prompt.
        ValueError: not one prompt more than subjects; nothing detected.
    """
    if not is_pipeline(pipe):
        raise CannotEdit(f"rehearse needs a diffusers pipeline, not {type(pipe).__name__}")
    if isinstance(prompts, str) or not subjects or len(prompts) != len(subjects) + 1:
        raise ValueError(
            f"{len(subjects)} subjects need as many portrait prompts and the scene's, not {prompts!r}"
        )
    if detector is not None:
        images = pipe(list(prompts), **options).images
        alone = [detector(image, name) for image, name in zip(images[:-1], subjects, strict=True)]
        there = [detector(images[-1], name) for name in subjects]
        portraits, scene = (
            torch.stack([torch.as_tensor(mask) for mask in masks]) for masks in (alone, there)
        )
        portraits = check_places(portraits, "portraits", disjoint=False)
        return Rehearsal(
            images, portraits.bool(), _apart(check_places(scene, "scene", disjoint=False).bool())
        )
    observed = Observed()
    concepts: list[Any] = [*([name] for name in subjects), list(subjects)]
    with apply(pipe, Watch(tuple(concepts), observed.see)):
        images = pipe(list(prompts), **options).images
    masks = [masks_of(heat) for heat in observed.finest()]
    return Rehearsal(images, torch.cat(masks[:-1]), masks[-1])


def _apart(masks: Tensor) -> Tensor:
    """Detections made disjoint: a shared pixel belongs to the smaller one."""
    order = masks.flatten(1).sum(1).argsort()
    free, parted = torch.ones_like(masks[0]), masks.clone()
    for index in order.tolist():
        parted[index] = masks[index] & free
        free = free & ~parted[index]
    return parted
