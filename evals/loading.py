"""Models by name, for commands and harnesses."""

from typing import Any

import torch

from ..hooks.errors import UnknownName
from .processes import processes


def own_device() -> str:
    """The GPU of this process among those that `accelerate launch` started, where there are GPUs."""
    state = processes()
    if state.num_processes > 1:
        return str(state.device)
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(name: str, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """The model (in eval mode) and processor of a name; safetensors only, and no code from the hub is run.

    Raises:
        ValueError: the dtype is unknown, or the model is not there.
        OSError: the model cannot be read.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    known = ("auto", "float32", "float16", "bfloat16")
    if dtype not in known:
        raise UnknownName("dtype", dtype, known)
    kind = "auto" if dtype == "auto" else getattr(torch, dtype)
    place = device or own_device()
    if place == "auto" and processes().num_processes > 1:
        raise ValueError("--device auto spreads one model over all GPUs: start one process, not several")
    if name == "miniature":
        from .miniature import load_miniature

        small, processor = load_miniature("lvlm")
        small = small if dtype == "auto" else small.to(kind)
        return small.to("cpu" if place == "auto" else place), processor
    from transformers import AutoModelForImageTextToText, AutoProcessor

    options: dict[str, Any] = {"dtype": kind, "use_safetensors": True, "trust_remote_code": False}
    if place == "auto":
        options["device_map"] = "auto"
    model: Any = AutoModelForImageTextToText.from_pretrained(name, **options)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    if place != "auto":
        model.to(torch.device(place))
    return model.eval(), processor


def load_pipeline(name: str, device: str | None = None) -> Any:
    """The diffusers pipeline of a name, "miniature" or "miniature-t2i" the embedded one; safetensors only.

    Raises:
        OSError: the pipeline cannot be read.
    """
    if name in ("miniature", "miniature-t2i"):
        from .miniature import load_miniature

        pipe = load_miniature("t2i")
    else:
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(name, use_safetensors=True)
        pipe.to(device or own_device())
    pipe.set_progress_bar_config(disable=True)
    return pipe
