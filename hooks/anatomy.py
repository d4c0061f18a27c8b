"""What the engine needs to know of a model, found without a table of families."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from .errors import CannotEdit, OutOfRange


class Site(NamedTuple):
    """One attention module of the decoder."""

    layer: int
    path: str
    module: nn.Module
    block: nn.Module
    cross: bool


@dataclass(frozen=True)
class Anatomy:
    """The parts of a vision-language model, and the sizes that interventions ask for.

    `layers` counts decoder blocks, `heads` query heads, `kv_heads` key and value heads; `head_width`
    and `hidden` are in channels. `self_layers` are the blocks whose keys are text positions, `lost_layers`
    those of them whose attention module was replaced by something that cannot be edited.
    """

    model_type: str
    text_type: str
    decoder: nn.Module
    decoder_path: str
    sites: tuple[Site, ...]
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    hidden: int
    vocab: int
    image_token: int | None
    lost_layers: tuple[int, ...] = ()

    @property
    def self_layers(self) -> tuple[int, ...]:
        """Blocks that attend to text positions (image tokens among them)."""
        return tuple(sorted({site.layer for site in self.sites if not site.cross} | set(self.lost_layers)))

    @property
    def cross_layers(self) -> tuple[int, ...]:
        """Blocks that attend to image patches only."""
        return tuple(site.layer for site in self.sites if site.cross)

    def check_layers(self, layers: tuple[int, ...], what: str) -> None:
        """Raise OutOfRange unless every layer is one of the decoder's."""
        known = {site.layer for site in self.sites}
        wrong = [layer for layer in layers if layer not in known]
        lost = tuple(layer for layer in wrong if layer in self.lost_layers)
        if lost:
            raise CannotEdit(f"{what} asks for layer {_some(wrong)}, but {self.why_lost(lost)}")
        if wrong:
            raise OutOfRange(
                f"{what} asks for layer {_some(wrong)}, but {self.decoder_path} has layers "
                f"0 to {self.layers - 1} ({len(known)} with attention)"
            )

    def why_lost(self, layers: tuple[int, ...]) -> str:
        """What stands where the attention of a lost layer should be."""
        site = self.sites[0]
        path = site.path.removeprefix(f"{self.decoder_path}.").replace(f".{site.layer}.", f".{layers[0]}.", 1)
        found: Any = dict(self.decoder.named_modules()).get(path)
        return (
            f"{self.decoder_path}.{path} ({type(found).__name__}) is no attention module with a layer_idx "
            f"(replaced by a fused or quantised kernel?), so layer {_some(list(layers))} cannot be edited"
        )

    def check_heads(self, heads: tuple[int, ...] | None, what: str) -> None:
        """Raise OutOfRange unless every head is one of the decoder's query heads."""
        wrong = [head for head in heads or () if not 0 <= head < self.heads]
        if wrong:
            raise OutOfRange(
                f"{what} asks for head {_some(wrong)}, but {self.decoder_path} has query heads "
                f"0 to {self.heads - 1}"
            )


def _lost_layers(config: Any, found: set[int]) -> tuple[int, ...]:
    """Blocks that the config says have softmax attention and where none was found."""
    kinds = getattr(config, "layer_types", None) or ()
    expected = range(int(getattr(config, "num_hidden_layers", 0)))
    other = {i for i, kind in enumerate(kinds) if "attention" not in kind or "linear" in kind}
    return tuple(layer for layer in expected if layer not in found | other)


def _some(values: list[int]) -> str:
    return ", ".join(map(str, values[:4])) + (" ..." if len(values) > 4 else "")


def base_of(model: Any) -> nn.Module:
    """The transformers model inside an nnsight or PEFT wrapper, a pipeline or itself. Does not import nnsight."""
    nnsight = sys.modules.get("nnsight")
    if nnsight is not None and isinstance(model, nnsight.Envoy):
        if not getattr(model, "dispatched", True):
            raise CannotEdit(
                f"{type(model).__name__} has not loaded its weights yet, and will put other modules in the place of "
                "these when it does: call its dispatch() first, or make it with dispatch=True"
            )
        model = model._module
    if not isinstance(model, nn.Module) and isinstance(getattr(model, "model", None), nn.Module):
        model = model.model
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, nn.Module):
        raise CannotEdit(f"expected a transformers model or pipeline, got {type(model).__name__}")
    return model


def _sites(modules: Mapping[str, nn.Module], decoder_path: str) -> tuple[Site, ...]:
    """The attention modules below the decoder, in order."""
    inside = f"{decoder_path}." if decoder_path else ""
    found = {
        path: module
        for path, module in modules.items()
        if path.startswith(inside)
        and isinstance(vars(module).get("layer_idx"), int)
        and "attention" in type(module).__name__.lower()
    }
    blocks = {
        path.rpartition(".")[0] for path in found
    }  # a block's name may match too: MllamaCrossAttentionDecoderLayer
    return tuple(
        Site(module.layer_idx, path, module, modules[path.rpartition(".")[0]], _is_cross(module))  # type: ignore[arg-type]
        for path, module in found.items()
        if path not in blocks
    )


def _is_cross(module: nn.Module) -> bool:
    return "cross" in type(module).__name__.lower()


def _find_decoder(model: nn.Module) -> nn.Module:
    decoder: Any = model
    while True:  # wrappers nest: BLIP-2 holds a causal language model that holds the decoder
        inner: Any = decoder.get_decoder() if hasattr(decoder, "get_decoder") else decoder
        if inner is None or inner is decoder:
            return decoder
        decoder = inner


def anatomy(model: nn.Module) -> Anatomy:
    """Find decoder, attention modules and sizes.

    Raises:
        CannotEdit: the model has no decoder whose attention modules can be told apart.
    """
    if not hasattr(model, "config"):
        raise CannotEdit(f"{type(model).__name__} has no config: only transformers models can be edited")
    decoder = _find_decoder(model)
    modules = dict(model.named_modules())
    path = next((path for path, module in modules.items() if module is decoder), "")
    sites = _sites(modules, path)
    if not sites:
        raise CannotEdit(
            f"{type(model).__name__}: no attention module with a layer_idx under {path} "
            f"({type(decoder).__name__}); this class does not route through transformers' AttentionInterface, "
            "so its attention cannot be edited"
        )
    config: Any = decoder.config
    top: Any = model.config
    heads = int(config.num_attention_heads)
    image = getattr(top, "image_token_id", None)
    lost = _lost_layers(config, {site.layer for site in sites})
    return Anatomy(
        model_type=str(top.model_type),
        text_type=str(config.model_type),
        decoder=decoder,
        decoder_path=path,
        sites=sites,
        layers=max({site.layer for site in sites} | set(lost)) + 1,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_width=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        hidden=int(config.hidden_size),
        vocab=int(config.vocab_size),
        image_token=None if image is None else int(image),
        lost_layers=lost,
    )
