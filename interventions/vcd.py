r"""Visual contrastive decoding (VCD).

Leng et al., "Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive
Decoding", CVPR 2024, arXiv 2311.16922.
Reference: https://github.com/DAMO-NLP-SG/VCD/tree/c637c85 (`c637c85`, 2024-07-16)

With z the logits given the image v, and z' given the image v' that T steps of forward diffusion blurred,

    v' = sqrt(a_T) v + sqrt(1 - a_T) e,   e ~ N(0, 1),   a_T = prod_{t <= T} (1 - b_t)
    z <- (1 + alpha) z - alpha z',   kept where z >= log(beta) + max z

on the normalised pixels, with b_t = sigmoid(linspace(-6, 6, 1000)) * (0.5e-2 - 1e-5) + 1e-5.

Which rows: the newest one, at every step.

Where this differs from the release: the noise is drawn once per image from `seed`, for each image alone, so
that a batch equals its items and a run can be repeated. The noisy stream has a cache of its own from the
first token on; before `c637c85` the release reused the plain image's cache from the second token on, so
that only the first token was contrasted. The POPE script of the release takes beta 0.2, its default is 0.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..hooks.anatomy import Anatomy
from ..hooks.edits import Branch, Edit, Logits
from ..hooks.errors import CannotEdit
from ..hooks.session import Session
from ..hooks.step import Step
from .contrast import check_strengths, contrasted, keep_plausible
from .method import Method

NOISY = "noisy image"
STEPS = 1000


def signal_share(steps: int) -> tuple[float, float]:
    """sqrt(a_T) and sqrt(1 - a_T) after `steps` of the 1,000 diffusion steps, counted from 0 as released."""
    betas = torch.sigmoid(torch.linspace(-6, 6, STEPS, dtype=torch.float64)) * (0.5e-2 - 1e-5) + 1e-5
    kept = float((1 - betas).cumprod(0)[steps])
    return kept**0.5, (1 - kept) ** 0.5


def noisy(pixels: Tensor, steps: int, seed: int, images: Sequence[int] | None = None) -> Tensor:
    """Diffused pixels of any layout; rows belong to images.

    Args:
        pixels: (rows, ...), one row an image (or all its tiles), or a patch of an image.
        steps: T, from 0 to 999.
        seed: of the noise, the same for every image.
        images: number of rows of each image; None means one each.
    """
    signal, noise = signal_share(steps)
    drawn = []
    for rows in images or [1] * len(pixels):
        generator = torch.Generator().manual_seed(seed)
        drawn.append(torch.randn(rows, *pixels.shape[1:], generator=generator))
    return signal * pixels + noise * torch.cat(drawn).to(pixels)


@dataclass(frozen=True)
class VCD(Method):
    """Contrast with what the model would say of a noisy image.

    Args:
        alpha: strength of the contrast.
        beta: least probability of a token, as a share of the largest one.
        noise_step: T of 1,000 diffusion steps; 500 leaves 86 % of the signal's amplitude, 999 leaves 29 %.
        seed: of the noise.
    """

    alpha: float = 1.0
    beta: float = 0.1
    noise_step: int = 500
    seed: int = 0

    name = "vcd"
    paper = "Mitigating Object Hallucinations in LVLMs through Visual Contrastive Decoding"
    arxiv = "2311.16922"
    kind = "contrastive"
    cost = "a second stream with its own prefill"
    models = ("llava", "instructblip", "qwen_vl")

    def __post_init__(self) -> None:
        check_strengths(self.alpha, self.beta)
        if not 0 <= self.noise_step < STEPS:
            raise ValueError(f"noise_step is a diffusion step from 0 to {STEPS - 1}, got {self.noise_step}")

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        """A branch with the noisy image, and the contrast; alpha 0 leaves the plausibility mask."""
        branches = (NOISY,) if self.alpha else ()
        logits = Logits(self.fuse, branches, needs_image=True)
        if not self.alpha:
            return (logits,) if self.beta else ()
        return Branch(NOISY, every_step=True, view=self.view), logits

    def view(self, inputs: dict[str, Any], session: Session) -> dict[str, Any]:
        """The model's arguments with noisy pixels."""
        pixels = inputs.get("pixel_values")
        if pixels is None:
            raise CannotEdit(
                "vcd adds noise to pixel_values, and this prompt came without them: pass the image"
            )
        grid = inputs.get("image_grid_thw")
        images = None if grid is None else grid.prod(-1).tolist()
        return {"pixel_values": noisy(pixels, self.noise_step, self.seed, images)}

    def fuse(self, logits: Tensor, step: Step) -> Tensor:
        """Logits (B, V) of the main stream, contrasted."""
        fused = contrasted(logits, step.branch(NOISY), self.alpha) if self.alpha else logits
        return keep_plausible(fused, logits, self.beta)
