"""What the engine needs to know of a diffusers pipeline: its denoiser, the attention modules and their grids."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from .errors import CannotEdit

Kind = Literal["self", "cross", "joint"]
Grid = tuple[int, int]
_FAMILIES = {
    "UNet2DConditionModel": "unet",
    "SD3Transformer2DModel": "sd3",
    "FluxTransformer2DModel": "flux",
}


def is_pipeline(model: Any) -> bool:
    """Whether this is a diffusers pipeline. Does not import diffusers."""
    diffusers = sys.modules.get("diffusers")
    return diffusers is not None and isinstance(model, diffusers.DiffusionPipeline)


@dataclass(frozen=True)
class AttentionSite:
    """One attention module of a denoiser. Joint attention has text and image tokens in one sequence."""

    name: str
    module: nn.Module
    kind: Kind


@dataclass(frozen=True)
class Denoiser:
    """A pipeline's denoiser.

    family: "unet" (Stable Diffusion 1, 2 and XL), "sd3" (image tokens first) or "flux" (text tokens first).
    sites: its attention modules, in the order in which they are registered.
    """

    name: str
    module: Any
    family: str
    sites: tuple[AttentionSite, ...]

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of one forward by name."""
        bound = inspect.signature(self.module.forward).bind(*args, **kwargs).arguments
        return {**{key: value for key, value in bound.items() if key != "kwargs"}, **bound.get("kwargs", {})}

    @property
    def latent(self) -> str:
        """The name of the forward's latent argument."""
        return "sample" if self.family == "unet" else "hidden_states"

    def grids(self, inputs: Mapping[str, Any]) -> list[Grid]:
        """The (height, width) of every level at which images are attended to, finest first."""
        if self.family == "flux":
            ids = inputs["img_ids"].reshape(-1, 3)
            return [(int(ids[:, 1].max()) + 1, int(ids[:, 2].max()) + 1)]
        height, width = inputs[self.latent].shape[-2:]
        if self.family == "sd3":
            patch = self.module.config.patch_size
            return [(height // patch, width // patch)]
        levels = [(height, width)]
        for _ in self.module.config.down_block_types[1:]:
            height, width = math.ceil(height / 2), math.ceil(width / 2)
            levels.append((height, width))
        return levels

    def text_grids(self, inputs: Mapping[str, Any]) -> list[Grid]:
        """The grids at which the image attends to the text."""
        levels = self.grids(inputs)
        if self.family != "unet":
            return levels
        kinds = list(self.module.config.down_block_types)
        named = [grid for grid, kind in zip(levels, kinds, strict=True) if "CrossAttn" in kind]
        middle = getattr(self.module.config, "mid_block_type", None) or ""
        return [*named, *([levels[-1]] if "CrossAttn" in middle and levels[-1] not in named else [])]

    def image_tokens(self, site: AttentionSite, rows: int, text: int) -> slice:
        """Which of a site's `rows` query rows are image tokens, `text` being the length of the prompt."""
        if site.kind != "joint":
            return slice(0, rows)
        return slice(0, rows - text) if self.family == "sd3" else slice(text, rows)

    def text_tokens(self, site: AttentionSite, keys: int, text: int) -> slice:
        """Which of a site's keys are text tokens."""
        if site.kind == "self":
            return slice(0, 0)
        if site.kind == "cross":
            return slice(0, keys)
        return slice(keys - text, keys) if self.family == "sd3" else slice(0, text)


def denoiser_of(pipe: Any) -> Denoiser:
    """Find the denoiser of a pipeline.

    Raises:
        CannotEdit: a model class that the engine does not know, or one without attention to the text.
    """
    for name in ("unet", "transformer"):
        module = getattr(pipe, name, None)
        if module is None:
            continue
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise CannotEdit(
                f"{type(pipe).__name__}.{name} is compiled, so its attention cannot be edited: "
                "use the module that torch.compile was given, and compile nothing while a run is on"
            )
        family = _FAMILIES.get(type(module).__name__)
        if family is None:
            raise CannotEdit(
                f"{type(pipe).__name__}.{name} is a {type(module).__name__}; the engine knows "
                f"{', '.join(_FAMILIES)}"
            )
        sites = tuple(_sites(module, family))
        if all(site.kind == "self" for site in sites):
            raise CannotEdit(
                f"{type(pipe).__name__}.{name} ({type(module).__name__}) has no attention to text"
            )
        return Denoiser(name, module, family, sites)
    raise CannotEdit(f"{type(pipe).__name__} has neither a unet nor a transformer")


def _sites(module: nn.Module, family: str) -> list[AttentionSite]:
    found = []
    for name, part in module.named_modules():
        if family == "unet" and type(part).__name__ == "Attention":
            found.append(
                AttentionSite(name, part, "cross" if getattr(part, "is_cross_attention", False) else "self")
            )
        elif family == "sd3" and type(part).__name__ == "Attention":
            found.append(AttentionSite(name, part, "self" if part.add_k_proj is None else "joint"))
        elif family == "flux" and type(part).__name__ == "FluxAttention":
            found.append(AttentionSite(name, part, "joint"))
    return found


def half(value: Any, batch: int) -> Any:
    """The second half, which is the conditional one, of every tensor of `batch` rows; others as they are."""
    if isinstance(value, Tensor):
        return value[batch // 2 :] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, Mapping):
        return {key: half(part, batch) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(half(part, batch) for part in value)
    return value
