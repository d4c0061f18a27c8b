"""What the engine needs to know of a model, found without a table of families."""

from __future__ import annotations

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
    and `hidden` are in channels. `self_layers` are the blocks whose keys are text positions.
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

    @property
    def self_layers(self) -> tuple[int, ...]:
        """Blocks that attend to text positions (image tokens among them)."""
        return tuple(site.layer for site in self.sites if not site.cross)

    @property
    def cross_layers(self) -> tuple[int, ...]:
        """Blocks that attend to image patches only."""
        return tuple(site.layer for site in self.sites if site.cross)

    def check_layers(self, layers: tuple[int, ...], what: str) -> None:
        """Raise OutOfRange unless every layer is one of the decoder's."""
        known = {site.layer for site in self.sites}
        wrong = [layer for layer in layers if layer not in known]
        if wrong:
            raise OutOfRange(
                f"{what} asks for layer {_some(wrong)}, but {self.decoder_path} has layers "
                f"0 to {self.layers - 1} ({len(known)} with attention)"
            )

    def check_heads(self, heads: tuple[int, ...] | None, what: str) -> None:
        """Raise OutOfRange unless every head is one of the decoder's query heads."""
        wrong = [head for head in heads or () if not 0 <= head < self.heads]
        if wrong:
            raise OutOfRange(
                f"{what} asks for head {_some(wrong)}, but {self.decoder_path} has query heads "
                f"0 to {self.heads - 1}"
            )


def _some(values: list[int]) -> str:
    return ", ".join(map(str, values[:4])) + (" ..." if len(values) > 4 else "")


def base_of(model: Any) -> nn.Module:
    """The transformers model inside a PEFT wrapper, a pipeline or itself."""
    if not isinstance(model, nn.Module) and isinstance(getattr(model, "model", None), nn.Module):
        model = model.model
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, nn.Module):
        raise CannotEdit(f"expected a transformers model or pipeline, got {type(model).__name__}")
    return model


def _attention_modules(decoder: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (path, module)
        for path, module in decoder.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and "attention" in type(module).__name__.lower()
    ]


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
    names = {id(module): path for path, module in model.named_modules()}
    path = names.get(id(decoder), type(decoder).__name__)
    modules = dict(decoder.named_modules())
    sites = []
    for module_path, module in _attention_modules(decoder):
        parent = modules[module_path.rpartition(".")[0]]
        cross = "cross" in type(module).__name__.lower()
        sites.append(Site(int(module.layer_idx), f"{path}.{module_path}", module, parent, cross))  # type: ignore[arg-type]
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
    return Anatomy(
        model_type=str(top.model_type),
        text_type=str(config.model_type),
        decoder=decoder,
        decoder_path=path,
        sites=tuple(sites),
        layers=max(site.layer for site in sites) + 1,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_width=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        hidden=int(config.hidden_size),
        vocab=int(config.vocab_size),
        image_token=None if image is None else int(image),
    )
