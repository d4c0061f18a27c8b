r"""Instruction contrastive decoding (ICD).

Wang et al., "Mitigating Hallucinations in Large Vision-Language Models with Instruction Contrastive Decoding",
Findings of ACL 2024, arXiv 2403.18715. Reference: https://github.com/p1k0pan/ICD

With z the logits given the prompt, and z' those given the same image and the prompt behind a disturbing role,

    z <- (1 + lambda) z - lambda z',   kept where z >= log(beta) + max z

Which rows: the newest one, at every step.

The role's tokens go in behind the image, before the question (the release's LLaVA script makes it the system prompt,
before the image and in place of LLaVA's own); a Q-Former that reads the instruction gets them
too, behind its first token. Positions, masks and token types grow with the prompt. Ours: the role is read
behind the last image of a prompt with several, and one special token that closes an image stays with it.
The paper tries several roles; the default here is the one of its first figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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

DISTURBED = "disturbed instruction"
_ZERO = ("token_type_ids", "mm_token_type_ids")
_AS_BEFORE = ("cross_attention_mask",)


def inserted(value: Tensor, places: Tensor, count: int, fill: Tensor | int | None) -> Tensor:
    """Rows grown by `count` entries before `places`.

    Args:
        value: (B, S, ...).
        places: (B,) from 0 to S.
        count: n.
        fill: (n,) or one value; None repeats the entry before the place.
    """
    slots = torch.arange(value.shape[1] + count, device=value.device)
    start = places.to(value.device)[:, None]
    fresh = (slots >= start) & (slots < start + count)
    source = torch.where(fresh, start - 1, slots - count * (slots >= start)).clamp_min(0)
    tail = (1,) * (value.ndim - 2)
    grown = torch.take_along_dim(value, source.view(*source.shape, *tail), 1)
    if fill is None:
        return grown
    new = torch.as_tensor(fill, device=value.device, dtype=value.dtype)
    if new.ndim:
        new = new[(slots - start).clamp(0, count - 1)].view(*source.shape, *tail)
    return torch.where(fresh.view(*fresh.shape, *tail), new, grown)


@dataclass(frozen=True)
class ICD(Method):
    """Contrast with what the model would say in a disturbing role.

    Args:
        alpha: lambda, strength of the contrast.
        beta: least probability of a token, as a share of the largest one.
        role: the disturbing words; the processor makes tokens of them.
        role_ids: these tokens, where there is no processor.
        qformer_ids: the same in the Q-Former's vocabulary, for a model that has one.
        closing: special tokens that may close an image, such as Qwen's end of vision.
    """

    alpha: float = 1.0
    beta: float = 0.1
    role: str = "You are a confused object detector to provide a fuzzy overview or impression of the image."
    role_ids: tuple[int, ...] | None = None
    qformer_ids: tuple[int, ...] | None = None
    closing: tuple[int, ...] = ()

    name = "icd"
    paper = "Mitigating Hallucinations in LVLMs with Instruction Contrastive Decoding"
    arxiv = "2403.18715"
    kind = "contrastive"
    cost = "a second stream with its own prefill"
    models = ("instructblip", "llava")

    def __post_init__(self) -> None:
        check_strengths(self.alpha, self.beta)
        for name in ("role_ids", "qformer_ids"):
            ids = getattr(self, name)
            if ids is not None and not ids:
                raise ValueError(f"{name} is empty, so nothing disturbs: give a role of at least one token")

    def with_processor(self, processor: Any) -> ICD:
        """With the role's tokens, and the special tokens that may close an image."""
        tokenizer = getattr(processor, "tokenizer", processor)
        found = self
        if self.role_ids is None:
            ids = tokenizer(self.role, add_special_tokens=False)["input_ids"]
            ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
            found = replace(found, role_ids=tuple(ids))
            found = replace(found, closing=tuple(sorted(set(tokenizer.all_special_ids) - ends)))
        other = getattr(processor, "qformer_tokenizer", None)
        if self.qformer_ids is None and other is not None:
            ids = other(self.role, add_special_tokens=False)["input_ids"]
            found = replace(found, qformer_ids=tuple(ids))
        return found

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        """A branch with the disturbed prompt, and the contrast; alpha 0 leaves the plausibility mask.

        Raises:
            CannotEdit: the role's tokens are not known.
        """
        if not self.alpha:
            return (Logits(self.fuse, needs_image=True),) if self.beta else ()
        if self.role_ids is None:
            raise CannotEdit(
                "icd needs its role as tokens: pass processor= to regard.apply, or regard.ICD(role_ids=...)"
            )
        branch = Branch(DISTURBED, every_step=True, view=self.view)
        return branch, Logits(self.fuse, (DISTURBED,), needs_image=True)

    def view(self, inputs: dict[str, Any], session: Session) -> dict[str, Any]:
        """The model's arguments with the role behind the image; a prompt without an image gets padding."""
        assert self.role_ids is not None
        ids, count = inputs["input_ids"], len(self.role_ids)
        image = session.image[:: len(session.image) // len(ids)].to(ids.device)  # beams repeat rows
        seen = image.any(1)
        places = torch.where(seen, image.shape[1] - image.flip(1).int().argmax(1), 0)
        follower = ids.gather(1, places.clamp_max(ids.shape[1] - 1)[:, None])[:, 0]
        closes = torch.isin(follower, torch.tensor(self.closing, dtype=ids.dtype, device=ids.device))
        places = places + (seen & closes & (places < ids.shape[1])).long()
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        changed = {
            "input_ids": inserted(ids, places, count, torch.tensor(self.role_ids)),
            "attention_mask": inserted(mask, places, count, 1),
        }
        changed["attention_mask"][~seen, :count] = 0
        for name in (*_ZERO, *_AS_BEFORE):
            if isinstance(inputs.get(name), Tensor):
                changed[name] = inserted(inputs[name], places, count, 0 if name in _ZERO else None)
        return changed | self._instruction(inputs)

    def _instruction(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The Q-Former's instruction with the role behind its first token."""
        ids = inputs.get("qformer_input_ids")
        if ids is None:
            return {}
        if self.qformer_ids is None:
            raise CannotEdit(
                "this model's Q-Former reads the instruction too, and icd has no tokens of its role for it: pass "
                "processor=, or regard.ICD(qformer_ids=...)"
            )
        places, count = torch.ones(len(ids), dtype=torch.long, device=ids.device), len(self.qformer_ids)
        changed = {"qformer_input_ids": inserted(ids, places, count, torch.tensor(self.qformer_ids))}
        mask = inputs.get("qformer_attention_mask")
        if mask is not None:
            changed["qformer_attention_mask"] = inserted(mask, places, count, 1)
        return changed

    def fuse(self, logits: Tensor, step: Step) -> Tensor:
        """Logits (B, V), contrasted; prompts without an image keep theirs."""
        if not self.alpha:
            return keep_plausible(logits, logits, self.beta)
        fused = keep_plausible(contrasted(logits, step.branch(DISTURBED), self.alpha), logits, self.beta)
        return torch.where(step.session.has_image.to(logits.device)[:, None], fused, logits)
