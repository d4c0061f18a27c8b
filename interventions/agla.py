r"""AGLA: add what the model says of an image in which only the regions that the question is about are left.

An et al., "AGLA: Mitigating Object Hallucinations in Large Vision-Language Models with Assembly of Global
and Local Attention", CVPR 2025, arXiv 2406.12718. Reference: https://github.com/Lackel/AGLA (no licence; a
patched transformers 4.34).

A matching model (BLIP, `matching.BlipMatcher`) gives a relevance map of image and question and their cosine s. The
share min(1 - s / 2, 1 - 1e-5) of the pixels with the largest relevance stays, the others are black. With z the
logits of the image and z' those of the masked one,

    out = z + alpha z',   -inf where z < log beta + max z

Which rows: logits of the newest row, at the prompt and at every step. Rows of a batch without an image keep
their logits. The sum is not normalised: where z' is about z it acts as temperature 1 / (1 + alpha), so the
control of AGLA is that with the plausibility cut, not plain decoding.

Variants: "paper". "released": the release copies the main stream's cache inside its decoding loop, so the masked
image is seen for the first token only; afterwards z' = z. (With DynamicCache that code would also corrupt the cache.)

Where this differs from the release: it masks the raw image, squashed to 384 x 384, before the LVLM's own crop; we mask
the pixels that the LVLM was given, so that both streams have one geometry and one number of image tokens. It keeps
one pixel more than the share. Its constant maps give NaN; ours keep all pixels. It upsamples with skimage's
cubic spline, we with bicubic interpolation; the blur is at 0.02 of the longer side in both. It ignores the
user's logits processors unless they come after; here they act after the sum. An image that the matcher cannot read
is an error, where a port falls back to the plain image. Tiles that a model takes as images of their own (InternVL)
are matched one by one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..hooks.anatomy import Anatomy
from ..hooks.edits import Branch, Edit, Logits
from ..hooks.errors import CannotEdit
from ..hooks.pixels import PixelFormat
from ..hooks.session import Session
from ..hooks.step import Step
from .contrast import check_strengths, keep_plausible
from .matching import Match, Matcher, clean, kept_share, mask_from
from .method import Method

LOCAL = "local image"
_USER = re.compile(r"(?:^|\s|\])(?:user|human|question)\s*(?::|\n)|\[INST\]", re.IGNORECASE)
_ANSWER = re.compile(r"(?:^|\s)(?:assistant|model|(?:short )?answer)\s*(?::|\n|$)|\[/INST\]", re.IGNORECASE)
_ORDER = re.compile(
    r"(?:please )?answer (?:this|the) question (?:with|using) (?:a single|one) word(?: or (?:short )?phrase)?\.?",
    re.IGNORECASE,
)


def assembled(logits: Tensor, local: Tensor, alpha: float, beta: float) -> Tensor:
    """z + alpha z', among the tokens that z finds plausible; (B, V) each."""
    return keep_plausible(logits + alpha * local, logits, beta)


def question_of(text: str) -> str:
    """What a decoded prompt asks: without role names, special tokens and the order to answer with one word."""
    text = re.sub(r"<[|/]?[\w|/ -]+>", " ", text.replace("[/INST]", "\nassistant\n"))
    starts = [found.end() for found in _USER.finditer(text)]
    text = text[starts[-1] :] if starts else text
    end = _ANSWER.search(text)
    text = text[: end.start()] if end else text
    return " ".join(_ORDER.sub(" ", text).split())


@dataclass(frozen=True)
class AGLA(Method):
    """Add the logits of a stream that sees the regions the question is about, the rest black.

    Args:
        alpha: strength of the second stream.
        beta: least probability of a token, as a share of the largest.
        variant: "paper", or "released": the masked image counts for the first token only.
        matcher: gives relevance maps and similarities, see `matching`.
        text: what the image is matched with, one for all rows; None takes the question of each prompt.
        pixels: how the model's pixels are normalised; `with_processor` fills it in.
        tokenizer: reads the prompt; `with_processor` fills it in. Not needed with `text`.
    """

    alpha: float = 2.0
    beta: float = 0.5
    variant: Literal["paper", "released"] = "paper"
    matcher: Matcher | None = None
    text: str | None = None
    pixels: PixelFormat | None = None
    tokenizer: Any = field(default=None, repr=False, compare=False)

    name = "agla"
    paper = "AGLA: Mitigating Object Hallucinations with Assembly of Global and Local Attention"
    arxiv = "2406.12718"
    kind = "contrastive"
    cost = "a matching model's forward and backward once, two streams"
    models = ("llava", "instructblip")

    def __post_init__(self) -> None:
        check_strengths(self.alpha, self.beta)
        if self.variant not in ("paper", "released"):
            raise ValueError(f"variant must be one of 'paper', 'released', got {self.variant!r}")
        if self.text is not None and not clean(self.text):
            raise ValueError(f"text must have words, got {self.text!r}: leave it out to take the question")

    def with_processor(self, processor: Any) -> AGLA:
        """Image mean and std, and the tokenizer, where they are not given."""
        return replace(
            self,
            pixels=self.pixels or PixelFormat.of(processor),
            tokenizer=self.tokenizer or getattr(processor, "tokenizer", processor),
        )

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        """A branch and the sum; only the plausibility cut at alpha 0, nothing when beta is 0 too.

        Raises:
            CannotEdit: no matcher, no processor, or a model whose image has no tokens in the prompt.
        """
        if self.alpha == 0:
            if self.beta == 0:
                return ()
            return (Logits(lambda logits, step: keep_plausible(logits, logits, self.beta)),)
        if self.matcher is None:
            raise CannotEdit(
                "AGLA needs a matching model: regard.AGLA(matcher=BlipMatcher(model, processor)) with for instance "
                "Salesforce/blip-itm-large-coco, or any callable (images, texts) -> Match"
            )
        if self.pixels is None or (self.tokenizer is None and self.text is None):
            raise CannotEdit(
                "AGLA reads the image and the question, so it needs the model's processor: "
                "regard.apply(model, agla, processor=processor), or the fields pixels= and text="
            )
        if anatomy.image_token is None:
            raise CannotEdit(
                f"AGLA cannot tell which rows have an image: {anatomy.model_type} has no image token"
            )
        return (
            Branch(LOCAL, every_step=True, view=self._view),
            Logits(self._edit, (LOCAL,), needs_image=True),
        )

    def _edit(self, logits: Tensor, step: Step) -> Tensor:
        later = self.variant == "released" and step.generated > 0
        fused = assembled(logits, logits if later else step.branch(LOCAL), self.alpha, self.beta)
        return torch.where(step.session.has_image[:, None].to(logits.device), fused, logits)

    def _view(self, inputs: dict[str, Any], session: Session) -> dict[str, Any]:
        assert self.pixels is not None
        key = (LOCAL, id(self))
        if key not in session.memory:
            session.memory[key] = self._keeps(inputs, session)
        return {"pixel_values": self.pixels.blackened(inputs, session.memory[key])}

    def _keeps(self, inputs: dict[str, Any], session: Session) -> list[Tensor]:
        """The pixels of each image that stay, (H, W) bool."""
        assert self.pixels is not None
        assert self.matcher is not None
        images = self.pixels.images(inputs)
        ids = inputs["input_ids"][:, : session.prompt]
        rows = rows_of_images(ids == session.image_token, len(images))
        texts = self._texts(ids, session, set(rows))
        match = self.matcher(images, [texts[row] for row in rows])
        self._check(match, len(images))
        shares = kept_share(match.similarity).tolist()
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        return [mask_from(m, share, s) for m, share, s in zip(match.maps, shares, sizes, strict=True)]

    def _check(self, match: Match, count: int) -> None:
        if match.maps.ndim != 3 or len(match.maps) != count or match.similarity.shape != (count,):
            raise CannotEdit(
                f"the matcher must give maps (N, h, w) and similarity (N,) for {count} images, got "
                f"{tuple(match.maps.shape)} and {tuple(match.similarity.shape)}"
            )
        if not bool(match.maps.isfinite().all() & match.similarity.isfinite().all()):
            raise CannotEdit("the matcher cannot read an image: its maps or similarities are not finite")

    def _texts(self, ids: Tensor, session: Session, rows: set[int]) -> dict[int, str]:
        """The question of each row that has an image."""
        if self.text is not None:
            return dict.fromkeys(rows, self.text)
        found: dict[int, str] = {}
        for row in rows:
            words = ids[row][ids[row] != session.image_token]
            found[row] = question_of(self.tokenizer.decode(words.tolist(), skip_special_tokens=True))
            if not clean(found[row]):
                raise CannotEdit(
                    f"prompt {row} has no words to match its image with: give them, AGLA(text='...')"
                )
        return found


def rows_of_images(image: Tensor, count: int) -> list[int]:
    """The row of each of `count` images, in order; `image` (B, S) marks their tokens.

    Raises:
        CannotEdit: the tokens cannot be shared out.
    """
    before = torch.nn.functional.pad(image, (1, 0))[:, :-1]
    runs = (image & ~before).sum(1).tolist()
    if sum(runs) != count:  # images side by side: all have one number of tokens
        tokens = image.sum(1).tolist()
        each, rest = divmod(sum(tokens), max(count, 1))
        if rest or not each or any(number % each for number in tokens):
            raise CannotEdit(
                f"{count} images for {sum(tokens)} image tokens in rows of {tokens}: which row has which image is "
                "unclear; put text between the images of a prompt"
            )
        runs = [number // each for number in tokens]
    return [row for row, number in enumerate(runs) for _ in range(number)]
