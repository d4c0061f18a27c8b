"""What a run must say of itself: model, versions, machine."""

import hashlib
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .data import MINIATURE


def describe_model(model: Any, processor: Any) -> dict[str, Any]:
    """What decides a model's answers: class, dtype, and a digest over a few values of every weight."""
    digest = hashlib.sha256()
    count = 0
    for name, weight in model.named_parameters():
        count += weight.numel()
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        if weight.device.type != "meta":  # offloaded weights are named only
            flat = weight.detach().flatten()
            some = torch.cat([flat[:4], flat[flat.numel() // 2 :][:4]])
            digest.update(some.float().cpu().numpy().tobytes())
    return {
        "class": type(model).__name__,
        "processor": type(processor).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": count,
        "sha256_of_samples": digest.hexdigest(),
    }


def model_name(model: Any) -> str:
    """The model's name on the hub, or the name of the folder that it came from."""
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    path = Path(name)
    if path.parent == Path(__file__).resolve().parent / "miniature":
        return f"{MINIATURE} {path.name}"
    return path.name if path.is_absolute() else name


def versions() -> dict[str, str]:
    """The libraries whose version can change an answer."""
    return {name: version(name) for name in ("regard", "torch", "transformers")}


def session(model: Any, batch_size: int, command: str | None, processes: int = 1) -> dict[str, Any]:
    """One start of the command: what may differ between the sessions of a run."""
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": command,
        "batch_size": batch_size,
        "processes": processes,
        "device": _device_name(model.device),
        "python": platform.python_version(),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
