"""Procedural scenes and the small models trained on them."""

from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).resolve().parent


def load_miniature(kind: str = "lvlm") -> Any:
    """Load an embedded model, in eval mode, fp32, on the CPU.

    Args:
        kind: `lvlm`, a `LlavaForConditionalGeneration` and its `LlavaProcessor`; `t2i`, a `StableDiffusionPipeline`.

    Raises:
        ValueError: for any other kind.
    """
    if kind == "t2i":
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline.from_pretrained(str(_FOLDER / kind), local_files_only=True)
    if kind != "lvlm":
        raise ValueError(f"load_miniature({kind!r}): no such miniature; choose 'lvlm' or 't2i'.")
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = _FOLDER / kind
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)


def load_judge() -> Any:
    """The judge of the text-to-image miniature: pictures -> (B, 10) probabilities that each subject is there."""
    from .text_to_image import SubjectJudge

    return SubjectJudge(_FOLDER / "t2i" / "judge")


__all__ = ["load_judge", "load_miniature"]
