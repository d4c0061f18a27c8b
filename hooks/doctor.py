"""What the engine finds in a model, and what would not work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .anatomy import Anatomy, anatomy, base_of
from .checks import check_editable
from .engine import is_attached
from .errors import CannotEdit
from .report import ranges


@dataclass(frozen=True)
class Diagnosis:
    """Facts found in a model and problems that stop the engine. `ok` when there is none."""

    facts: dict[str, str]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether edits can be applied."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"ok": self.ok, "facts": self.facts, "problems": list(self.problems)}

    def __str__(self) -> str:
        width = max((len(key) for key in self.facts), default=0)
        lines = [f"{key:<{width}}  {value}" for key, value in self.facts.items()]
        lines += [f"problem: {problem}" for problem in self.problems] or ["no problem found"]
        return "\n".join(lines)


def doctor(model: Any) -> Diagnosis:
    """Look a model over without changing it.

    Returns the decoder, its layers and heads, the image token and the attention in use; and, as
    problems, what would make `apply` raise: no routing, training mode, compiled or fused modules.
    """
    try:
        base = base_of(model)
        parts = anatomy(base)
    except CannotEdit as error:
        return Diagnosis({"model": type(model).__name__}, (str(error),))
    problems = []
    try:
        if not is_attached(base):
            check_editable(base, parts)
    except CannotEdit as error:
        problems.append(str(error))
    if parts.lost_layers:
        problems.append(parts.why_lost(parts.lost_layers))
    if parts.image_token is None:
        problems.append(
            f"{type(base).__name__}: its config names no image token, so edits that need the image cannot run"
        )
    return Diagnosis(_facts(base, parts), tuple(problems))


def _facts(model: Any, parts: Anatomy) -> dict[str, str]:
    parameter = next(model.parameters())
    facts = {
        "model": f"{type(model).__name__} ({parts.model_type})",
        "decoder": f"{parts.decoder_path} ({type(parts.decoder).__name__})",
        "layers": f"{parts.layers}, attention in {ranges([site.layer for site in parts.sites])}",
        "heads": f"{parts.heads} of width {parts.head_width}, {parts.kv_heads} for keys and values",
        "channels": str(parts.hidden),
        "image token": str(parts.image_token),
        "attention": str(parts.decoder.config._attn_implementation),  # type: ignore[union-attr]
        "weights": f"{parameter.dtype}, {parameter.device}",
    }
    if parts.cross_layers:
        facts["cross-attention"] = f"layers {ranges(parts.cross_layers)}: keys are image patches"
    return facts
