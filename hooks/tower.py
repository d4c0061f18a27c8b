"""The vision tower: where its CLS token looks, and which image token of the prompt is which patch."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import CannotEdit, OutOfRange
from .session import Session

if TYPE_CHECKING:
    from .engine import Engine

_NAMES = ("vision_tower", "vision_model", "visual", "vision_encoder", "image_encoder")
_CLS = ("class_embedding", "cls_token", "cls_embedding")
PATCHWISE = ("llava", "vipllava", "llava_next")  # models whose projector gives one image token per patch
_OUTPUTS = ("out_proj", "o_proj", "projection", "projection_layer", "proj")
_LENGTHS = "crops and tokens of each image"  # under which a session remembers them


def find_tower(model: nn.Module) -> tuple[str, nn.Module]:
    """Path and module of the vision tower that the model calls.

    Raises:
        CannotEdit: no module has a name that vision towers have.
    """
    found = [(path, m) for path, m in model.named_modules() if path.rpartition(".")[2] in _NAMES]
    if not found:
        raise CannotEdit(f"{type(model).__name__} has no vision tower under a name of {', '.join(_NAMES)}")
    return min(found, key=lambda item: item[0].count("."))


def attention_layers(tower: nn.Module) -> list[nn.Module]:
    """The tower's attention modules, from the first layer to the last."""
    return [
        module
        for module in tower.modules()
        if heads_of(module)
        and (hasattr(module, "qkv") or (hasattr(module, "q_proj") and hasattr(module, "k_proj")))
    ]


def heads_of(attention: nn.Module) -> int:
    """How many heads an attention module has; 0 where it does not say."""
    return int(getattr(attention, "num_heads", 0) or getattr(attention, "num_attention_heads", 0))  # type: ignore[arg-type]


def projections(attention: nn.Module) -> dict[str, nn.Module]:
    """Modules whose outputs are the queries, keys and values: "fused", or "q", "k" and "v" behind their norms."""
    if hasattr(attention, "qkv"):
        return {"fused": attention.qkv}  # type: ignore[dict-item]
    found = {}
    for name in "qkv":
        norm = getattr(attention, f"{name}_norm", None)
        found[name] = getattr(attention, f"{name}_proj") if norm is None else norm
    return found


def output_projection(attention: nn.Module) -> nn.Module:
    """The module that takes the outputs of the heads (N, S, H * D).

    Raises:
        CannotEdit: there is none under a known name.
    """
    found = (getattr(attention, name, None) for name in _OUTPUTS)
    module = next((module for module in found if isinstance(module, nn.Module)), None)
    if module is None:
        names = ", ".join(_OUTPUTS)
        raise CannotEdit(f"{type(attention).__name__} has no output projection under a name of {names}")
    return module


def readable_layers(path: str, tower: nn.Module) -> list[nn.Module]:
    """The tower's attention modules, where each attends over one image.

    Raises:
        CannotEdit: it attends over several tiles at once, or has none that can be read.
    """
    name = type(tower).__name__
    if hasattr(tower, "max_num_tiles"):
        raise CannotEdit(f"{path} ({name}) attends over several tiles at once, each with its own CLS token")
    layers = attention_layers(tower)
    if not layers:
        raise CannotEdit(f"{path} ({name}) has no attention modules with q_proj and k_proj, or qkv")
    return layers


def patch_grid(tower: nn.Module, pixels: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of patches that pixels (..., height, width) become, and a patch's height and width.

    Raises:
        CannotEdit: the tower's config has no patch size.
    """
    size = getattr(tower.config, "patch_size", None)
    if size is None:
        raise CannotEdit(f"the config of {type(tower).__name__} has no patch_size, so its grid is unknown")
    rows, columns = (size, size) if isinstance(size, int) else map(int, size)
    return (pixels.shape[-2] // rows, pixels.shape[-1] // columns), (rows, columns)


def has_cls(tower: nn.Module) -> bool:
    """Whether the tower puts a CLS token in front of its patches."""
    names = {name.rpartition(".")[2] for name, _ in [*tower.named_parameters(), *tower.named_modules()]}
    return bool(names & set(_CLS))


def install(engine: Engine) -> list[Any]:
    """Hooks that read CLS scores and edit the output for a branch; removed with the others.

    Raises:
        CannotEdit: there is no vision tower, or none of whose attention a CLS token is part.
        OutOfRange: the tower has no such layer.
    """
    path, tower = find_tower(engine.model)
    handles = [tower.register_forward_hook(functools.partial(_after_tower, engine))]
    if not engine.plan.towers:
        return handles
    try:
        layers = _readable(path, tower, any(engine.plan.towers.values()))
        for layer in sorted(engine.plan.towers):
            if not -len(layers) <= layer < len(layers):
                raise OutOfRange(f"vision layer {layer}, but {path} has layers 0 to {len(layers) - 1}")
            handles += _watch_layer(engine, layer, layers[layer])
    except BaseException:
        for handle in handles:
            handle.remove()
        raise
    handles.append(engine.model.register_forward_pre_hook(functools.partial(_note, engine), with_kwargs=True))
    return handles


def _readable(path: str, tower: nn.Module, received: bool) -> list[nn.Module]:
    """The tower's attention modules, if the scores of a CLS token (or without one, what is `received`) can be read."""
    name = type(tower).__name__
    if received and has_cls(tower):
        raise CannotEdit(f"{path} ({name}) has a CLS token: read that one, not what patches receive")
    if not received and not has_cls(tower):
        raise CannotEdit(
            f"{path} ({name}) has no CLS token, so where it looks is undefined: "
            "use a model whose tower has one (CLIP, EVA-CLIP)"
        )
    return readable_layers(path, tower)


def _watch_layer(engine: Engine, layer: int, attention: nn.Module) -> list[Any]:
    """Hooks where one layer makes its queries and keys."""
    heads = heads_of(attention)
    scores = received_scores if engine.plan.towers[layer] else cls_scores
    parts = {name: part for name, part in projections(attention).items() if name != "v"}

    def keep(name: str, module: nn.Module, args: Any, out: Tensor) -> None:
        session = engine.session
        if session is None or engine.stream is not None:
            return
        halves: dict[str, Tensor] = session.memory.setdefault(f"tower halves {layer}", {})
        if name == "fused":
            halves["q"], halves["k"] = out.chunk(3, -1)[:2]
        else:
            halves[name] = out
        if len(halves) == 2:
            session.tower[layer] = scores(halves.pop("q"), halves.pop("k"), heads)

    return [part.register_forward_hook(functools.partial(keep, name)) for name, part in parts.items()]


def cls_scores(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Scores of the CLS token: query and key (N, 1 + P, H * D) -> (N, H, 1 + P), in fp32 or wider."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q = query[:, 0].to(wide).unflatten(-1, (heads, -1))
    k = key.to(wide).unflatten(-1, (heads, -1))
    return torch.einsum("nhd,nphd->nhp", q, k) * q.shape[-1] ** -0.5


def received_scores(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Log of the mean probs that each patch receives: query, key (N, P, H * D) -> (N, H, 1 + P), -inf in front."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k = (part.to(wide).unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key))
    probs = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.nn.functional.pad(probs.mean(2).log(), (1, 0), value=-torch.inf)


def _after_tower(engine: Engine, module: nn.Module, args: Any, output: Any) -> Any:
    """What a branch gets in place of the tower's output."""
    session, stream = engine.session, engine.stream
    if session is None or stream is None or stream.branch.tower is None:
        return None
    return stream.branch.tower(output, session)


def _note(engine: Engine, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Remember the sizes of the images: with tiles, they tell which tokens are whose."""
    session = engine.session
    if session is None or engine.stream is not None:
        return
    sizes = kwargs.get("image_sizes")
    sizes = (
        (session.given or {}).get("image_sizes") if sizes is None else sizes
    )  # generate may encode images first
    if sizes is None or _LENGTHS in session.memory:
        return
    if model.config.model_type == "llava_next":  # type: ignore[union-attr]
        session.memory[_LENGTHS] = _tiles_and_tokens(model.config, torch.as_tensor(sizes))


def _tiles_and_tokens(config: Any, sizes: Tensor) -> list[tuple[int, int]]:
    """Crops and image tokens of each image of LLaVA-NeXT, counted as its model does; sizes (N, 2)."""
    from transformers.models.llava_next import modeling_llava_next as next_

    edge, side = config.vision_config.image_size, config.vision_config.image_size
    side //= config.vision_config.patch_size
    found = []
    for height, width in sizes.tolist():
        size = (int(height), int(width))
        crops = next_.image_size_to_num_patches(list(size), config.image_grid_pinpoints, edge)
        rows, columns = next_.get_anyres_image_grid_shape(size, config.image_grid_pinpoints, edge)
        whole = torch.empty(1, rows * side, columns * side, device="meta")
        tall, broad = next_.unpad_image(whole, size).shape[1:]
        found.append((int(crops), side * side + (tall * (broad + 1) if crops > 1 else 1)))
    return found


@dataclass(frozen=True)
class Patches:
    """Which patch each prompt token is. All (B, S); `image` and `patch` are -1 where a token is no such patch.

    Attributes:
        image: row of the tower's batch (an image, or its whole-image crop).
        patch: index of the patch in that row, from 0, without CLS.
        start: position of the first token of the token's image.
        newline: the last token of an image with tiles.
    """

    image: Tensor
    patch: Tensor
    start: Tensor
    newline: Tensor

    def spread(self, values: Tensor) -> Tensor:
        """Values of patches (N, P) as values of prompt tokens (B, S); zero (False) elsewhere."""
        found = values[self.image.clamp_min(0), self.patch.clamp_min(0)]
        return torch.where(self.patch >= 0, found, torch.zeros((), dtype=values.dtype, device=values.device))


def scores_of(session: Session, layer: int, who: str) -> Tensor:
    """The CLS scores (N, H, 1 + P) of one tower layer.

    Raises:
        CannotEdit: the tower did not run for this prompt.
    """
    if layer not in session.tower:
        raise CannotEdit(
            f"{who} reads the vision tower, but it did not run for this prompt: pass pixel_values, "
            "not features or embeddings"
        )
    return session.tower[layer]


def patches_of(session: Session, scores: Tensor, who: str) -> Patches:
    """Find the patches of tower scores (N, H, 1 + P) among the prompt's tokens.

    Raises:
        CannotEdit: the image tokens are not one per patch of the tower.
    """
    found: Patches = session._once(f"patches {tuple(scores.shape)}", lambda: _find(session, scores, who))
    return found


def _find(session: Session, scores: Tensor, who: str) -> Patches:
    image, patches = session.image.to(scores.device), scores.shape[2] - 1
    spans = _spans(session, scores.shape[0], int(image.sum()), patches)
    if spans is None:
        raise CannotEdit(
            f"{who} needs one image token per patch, but the tower gave {scores.shape[0]} x {patches} patches "
            f"for {int(image.sum())} image tokens"
        )
    *listed, skipped, times = spans
    image = image[::times]
    rows, lengths = (torch.tensor(part, device=image.device) for part in listed)
    ends = lengths.cumsum(0)
    order = (image.flatten().cumsum(0) - 1).view_as(image).clamp_min(0)  # features fill image tokens in order
    number = torch.searchsorted(ends, order, right=True)
    within = order - (ends - lengths)[number]
    patch = within - skipped
    real = image & (patch >= 0) & (patch < patches)
    positions = torch.arange(image.shape[1], device=image.device)
    found = (
        torch.where(real, rows[number], -1),
        torch.where(real, patch, -1),
        torch.where(image, positions - within, -1),
        image & (within == lengths[number] - 1) & bool(_LENGTHS in session.memory),
    )
    return Patches(*(part.repeat_interleave(times, 0) for part in found))


def _spans(
    session: Session, count: int, total: int, patches: int
) -> tuple[list[int], list[int], int, int] | None:
    """Of each image its row in the tower and its number of tokens; whether CLS is the first of them; beams.

    Beams that were expanded after the tower ran repeat each prompt.
    """
    tiles: list[tuple[int, int]] | None = session.memory.get(_LENGTHS)
    if tiles is None:
        times = 1 if total < count * (patches + 2) else total // (count * patches)
        each, left = divmod(total, max(1, count * times))
        if left or each not in (patches, patches + 1):
            return None
        return list(range(count)), [each] * count, each - patches, times
    tiles = tiles[:: max(1, sum(crops for crops, _ in tiles) // count)]
    rows, row = [], 0
    for crops, _ in tiles:
        rows.append(row)
        row += crops
    lengths = [length for _, length in tiles]
    times, left = divmod(total, sum(lengths))
    return None if left or row != count else (rows, lengths, 0, times)
