"""Procedural scenes and the small models trained on them."""

from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).resolve().parent


def load_miniature(kind: str = "lvlm") -> tuple[Any, Any]:
    """Load an embedded model: (model in eval mode, fp32, on the CPU; its processor).

    Args:
        kind: `lvlm`, a `LlavaForConditionalGeneration` with its `LlavaProcessor`.

    Raises:
        ValueError: for any other kind.
    """
    if kind == "t2i":
        raise ValueError(
            "load_miniature('t2i'): the text-to-image miniature is not there yet; choose 'lvlm'."
        )
    if kind != "lvlm":
        raise ValueError(f"load_miniature({kind!r}): no such miniature; choose 'lvlm' ('t2i' is planned).")
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = _FOLDER / kind
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)


__all__ = ["load_miniature"]
