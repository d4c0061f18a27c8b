"""A zoo of tiny random-weight models of 14 transformers LVLM classes, with real model inputs.

`build("llava")` gives a `Family`: the model (fp32, eval, seeded, attention far from uniform) and its inputs.
Shapes: B rows, S tokens, N images, T tiles. Ids 0..9 are special (pad, bos, eos, image, video, ...) and text
ids start at 10; the rows of the output embedding of special ids are zero, so greedy decoding avoids them.
"""

from __future__ import annotations

import copy
import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB = 128
PAD, BOS, EOS, IMAGE, VIDEO, START, END = range(7)
FIRST_TEXT = 10
HIDDEN, HEADS, KV_HEADS = 64, 4, 2

Inputs = dict[str, Tensor]
Images = tuple[Inputs, list[int]]  # the image tensors of one prompt, and the number of image tokens of each

# Tensors that run along the sequence: padded on the left with 0 (PAD is 0 too).
_SEQUENCE = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask")


# ---------------------------------------------------------------------------------------------- configs
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_UNTIED = {"tie_word_embeddings": False}


def _text(kind: str | None = "llama", layers: int = 3, **more: Any) -> dict[str, Any]:
    """The text settings that all decoders share; `kind` None where the family has its own text config."""
    shared: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 96}
    shared |= {"num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    shared |= {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "max_position_embeddings": 512}
    return shared | _UNTIED | ({"model_type": kind} if kind else {}) | more


def _vision(image: int, kind: str | None = None, **more: Any) -> dict[str, Any]:
    """The settings that ViT-like towers share: 4 x 4 patches of an `image` x `image` picture."""
    shared: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shared |= {"num_attention_heads": 4, "image_size": image, "patch_size": 4}
    return shared | ({"model_type": kind} if kind else {}) | more


def _clip(image: int) -> dict[str, Any]:
    return _vision(image, "clip_vision_model", projection_dim=32)


def _siglip(image: int) -> dict[str, Any]:
    return _vision(image, "siglip_vision_model", vision_use_head=False)


def _join(config: Any, vision: dict[str, Any], text: dict[str, Any], **more: Any) -> Any:
    return config(vision_config=vision, text_config=text, **_UNTIED, **more)


def _llava() -> Any:
    return _join(transformers.LlavaConfig, _clip(12), _text(), image_token_index=IMAGE, image_seq_length=9)


def _tiled_llava(kind: str) -> Any:
    ids: dict[str, Any] = {"image_token_index": IMAGE, "image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]]}
    if kind == "llava_next":
        return _join(transformers.LlavaNextConfig, _clip(8), _text(), **ids)
    ids["video_token_index"] = VIDEO
    return _join(transformers.LlavaOnevisionConfig, _siglip(8), _text("qwen2"), **ids)


def _blip(kind: str) -> Any:
    """A Q-Former of 5 queries; BLIP-2 has an OPT decoder with its own names, InstructBLIP a Llama."""
    qformer = _vision(8, cross_attention_frequency=1, vocab_size=VOCAB, max_position_embeddings=64)
    del qformer["image_size"], qformer["patch_size"]
    text = _text("opt", ffn_dim=96, word_embed_proj_dim=HIDDEN) if kind == "blip2" else _text()
    if kind == "blip2":
        del text["intermediate_size"], text["num_key_value_heads"]
    config = transformers.Blip2Config if kind == "blip2" else transformers.InstructBlipConfig
    more = {"qformer_config": qformer, "num_query_tokens": 5, "image_token_index": IMAGE}
    return _join(config, _vision(8), text, **more)


def _qwen(version: str) -> Any:
    vision: dict[str, Any] = {"depth": 2, "num_heads": 4, "patch_size": 4}
    text = _text(None, rope_parameters=_MROPE)
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    ids |= {"vision_start_token_id": START, "vision_end_token_id": END}
    if version == "2":
        vision |= {"embed_dim": 32, "hidden_size": HIDDEN}
        return _join(transformers.Qwen2VLConfig, vision, text, **ids)
    vision |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": HIDDEN}
    if version == "2.5":
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
        return _join(transformers.Qwen2_5_VLConfig, vision, text, **ids)
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    text |= {"rope_parameters": {**_MROPE, "mrope_interleaved": True}, "head_dim": HIDDEN // HEADS}
    return _join(transformers.Qwen3VLConfig, vision, text, **ids)


def _internvl() -> Any:
    ids = {"image_token_id": IMAGE, "image_seq_length": 4}
    return _join(transformers.InternVLConfig, _vision(16), _text("qwen2"), **ids)


def _gemma3() -> Any:
    kinds = ["sliding_attention", "full_attention"] * 2
    text = _text(None, 4, head_dim=16, query_pre_attn_scalar=16, sliding_window=8, layer_types=kinds)
    ids = {"image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END}
    return _join(transformers.Gemma3Config, _siglip(16), text, mm_tokens_per_image=4, **ids)


def _idefics(kind: str) -> Any:
    config = transformers.SmolVLMConfig if kind == "smolvlm" else transformers.Idefics3Config
    return _join(config, _vision(16), _text(), image_token_id=IMAGE)


def _paligemma() -> Any:
    sizes = {"projection_dim": HIDDEN, "hidden_size": HIDDEN, "image_token_index": IMAGE}
    return _join(transformers.PaliGemmaConfig, _siglip(12), _text("gemma", head_dim=16), **sizes)


def _mllama() -> Any:
    vision = _vision(8, num_global_layers=1, vision_output_dim=64, intermediate_layers_indices=[0])
    vision |= {"max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
    vision["attention_heads"] = vision.pop("num_attention_heads")
    text = _text(None, 4, cross_attention_layers=[1, 3])
    return _join(transformers.MllamaConfig, vision, text, image_token_index=VOCAB)


# ---------------------------------------------------------------------------------------------- images


def _plain(rng: torch.Generator, n: int, size: int, edge: int, tokens: int) -> Images:
    """pixel_values (N, 3, edge, edge)."""
    return {"pixel_values": torch.randn(n, 3, edge, edge, generator=rng)}, [tokens] * n


def _nested(rng: torch.Generator, n: int, size: int) -> Images:
    """pixel_values (B, N, 3, 16, 16) as Idefics3 takes them; images of zeros are padding."""
    pixels = torch.randn(1, n, 3, 16, 16, generator=rng)
    mask = torch.ones(1, n, 16, 16, dtype=torch.long)
    return {"pixel_values": pixels, "pixel_attention_mask": mask}, [4] * n


def _tiled(rng: torch.Generator, n: int, size: int) -> Images:
    """pixel_values (N, T, 3, 8, 8): a base tile and 2 or 4 more; a newline token ends each row of patches."""
    height, width, tiles, tokens = ((8, 16, 3, 14), (16, 8, 3, 16), (16, 16, 5, 24))[size]
    pixels = torch.randn(n, tiles, 3, 8, 8, generator=rng)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]] * n)}, [tokens] * n


def _patches(rng: torch.Generator, n: int, size: int) -> Images:
    """pixel_values (patches, 3 * 2 * 4 * 4) of the Qwen-VL family, with the grid of each image."""
    grid = ((1, 4, 4), (1, 4, 6), (1, 8, 4))[size]
    count = grid[0] * grid[1] * grid[2]
    pixels = torch.randn(n * count, 96, generator=rng)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([grid] * n)}, [count // 4] * n


def _aspects(rng: torch.Generator, n: int, size: int) -> Images:
    """pixel_values (B, N, T=2, 3, 8, 8) of Mllama: one tile (size 0) or two (size 1)."""
    pixels = torch.randn(1, n, 2, 3, 8, 8, generator=rng)
    pixels[:, :, size + 1 :] = 0
    mask = torch.tensor([[1, size]] * n)[None]
    ratio = {"aspect_ratio_ids": mask.sum(-1), "aspect_ratio_mask": mask}
    return {"pixel_values": pixels, **ratio}, [1] * n


# ------------------------------------------------------------------------------- tensors beside the ids


def _image_types(item: Inputs, key: str) -> None:
    """Token types that are 1 on image tokens."""
    item[key] = (item["input_ids"] == IMAGE).long()


def _prefix_types(item: Inputs) -> None:
    """PaliGemma: 0 on the (bidirectional) prefix, which is the whole prompt."""
    item["token_type_ids"] = torch.zeros_like(item["input_ids"])


def _instruction(item: Inputs) -> None:
    """InstructBLIP: the Q-Former reads the instruction too."""
    ids = item["input_ids"]
    item["qformer_input_ids"] = ids[ids >= FIRST_TEXT][None]
    item["qformer_attention_mask"] = torch.ones_like(item["qformer_input_ids"])


def _cross_mask(item: Inputs) -> None:
    """Mllama: a token sees the tiles of the last image before it, so tokens in front of all see none."""
    seen = (item["input_ids"] == VOCAB).cumsum(-1)[..., None] - 1  # (1, S, 1)
    images = torch.arange(item["pixel_values"].shape[1])
    item["cross_attention_mask"] = (seen == images)[..., None].long() * item["aspect_ratio_mask"][:, None]


# ---------------------------------------------------------------------------------------------- the zoo

_of = functools.partial
_NINE, _FOUR, _FIVE = (_of(_plain, edge=e, tokens=n) for e, n in ((12, 9), (16, 4), (8, 5)))
_BLIP: dict[str, Any] = {"decoder_path": "language_model.model", "max_images": 1, "text_only": False}
_BLIP |= {"cache_free_generate": False, "notes": "needs pixel_values; generate bypasses the top forward"}
_IDEFICS = {"decoder_path": "model.text_model", "nested": True}
_QWEN = {"extra": _of(_image_types, key="mm_token_type_ids"), "wrap": True, "sizes": 3}
_QWEN |= {"notes": "model.rope_deltas is state that the last forward or generate leaves behind"}
_GEMMA = {"extra": _of(_image_types, key="token_type_ids"), "wrap": True}
_GEMMA |= {"notes": "sliding layers 0 and 2; the tokens of one image see each other both ways"}
_PALI: dict[str, Any] = {"extra": _prefix_types, "images_first": True}
_PALI |= {"notes": "without token_type_ids stock code masks a padded prompt only (causal), no other"}
_MLLAMA = {"extra": _cross_mask, "nested": True, "sizes": 2, "uneven_batch_exact": False}
_MLLAMA |= {"notes": "text before all images attends uniformly to all vision keys of the batch, padding too"}

# name: config, images, everything else of its Family
_ZOO: dict[str, tuple[Callable[[], Any], Callable[..., Images], dict[str, Any]]] = {
    "llava": (_llava, _NINE, {}),
    "llava_next": (_of(_tiled_llava, "llava_next"), _tiled, {"sizes": 3}),
    "llava_onevision": (_of(_tiled_llava, "llava_onevision"), _tiled, {"sizes": 3}),
    "instructblip": (_of(_blip, "instructblip"), _FIVE, _BLIP | {"extra": _instruction}),
    "blip2": (_of(_blip, "blip2"), _FIVE, _BLIP | {"decoder_path": "language_model.model.decoder"}),
    "qwen2_vl": (_of(_qwen, "2"), _patches, _QWEN),
    "qwen2_5_vl": (_of(_qwen, "2.5"), _patches, _QWEN),
    "qwen3_vl": (_of(_qwen, "3"), _patches, _QWEN),
    "internvl": (_internvl, _FOUR, {"wrap": True}),
    "gemma3": (_gemma3, _FOUR, _GEMMA),
    "idefics3": (_of(_idefics, "idefics3"), _nested, _IDEFICS),
    "smolvlm": (_of(_idefics, "smolvlm"), _nested, _IDEFICS),
    "paligemma": (_paligemma, _NINE, _PALI),
    "mllama": (_mllama, _aspects, _MLLAMA),
}


@dataclass
class Family:
    """One model with the inputs that its class takes, and what stock transformers can do with it."""

    name: str
    model: Any
    text_layers: int
    heads: int
    kv_heads: int
    images: Callable[..., Images]
    decoder_path: str = "model.language_model"  # the module whose config holds the attention implementation
    extra: Callable[[Inputs], None] | None = None
    wrap: bool = False  # START and END around an image
    images_first: bool = False  # BOS after the images
    nested: bool = False  # image tensors are (B, N, ...) and not (images of all rows, ...)
    sizes: int = 1  # image sizes that `size` chooses from; they differ in their number of tokens
    max_images: int = 3
    text_only: bool = True
    supports_static: bool = True
    supports_beams: bool = True
    padded_batch_exact: bool = True  # a left-padded batch equals single prompts
    uneven_batch_exact: bool = True  # also when its rows have different numbers of images, or none
    cache_free_generate: bool = True  # generate(use_cache=False) has no cache
    notes: str = ""

    @property
    def decoder(self) -> nn.Module:
        return self.model.get_submodule(self.decoder_path)

    @property
    def attentions(self) -> list[nn.Module]:
        """The attention modules of the decoder, by layer."""
        return [m for m in self.decoder.modules() if hasattr(m, "layer_idx") and hasattr(m, "q_proj")]

    @property
    def cross_layers(self) -> tuple[int, ...]:
        """The layers whose keys are all image keys (Mllama)."""
        return tuple(getattr(self.decoder.config, "cross_attention_layers", ()))

    def image_tokens(self, inputs: Inputs) -> Tensor:
        """(B, S) bool: the image tokens of a prompt."""
        return inputs["input_ids"] == self.model.config.image_token_id

    def item(
        self, images: int = 1, text: int = 7, pad: int = 0, seed: int = 0, image: bool = True, size: int = 0
    ) -> Inputs:
        """One prompt: BOS, then per image a text token and its image tokens, then `text` text tokens."""
        if images > self.max_images or not (image or self.text_only):
            raise ValueError(f"{self.name} cannot take images={images}, image={image}: {self.notes}")
        rng = torch.Generator().manual_seed(1000 + seed)
        pixels, counts = self.images(rng, images, size) if image else ({}, [])
        words = torch.randint(FIRST_TEXT, VOCAB, (text + len(counts),), generator=rng).tolist()
        ids: list[int] = [] if self.images_first else [BOS]
        for count in counts:
            block = [self.model.config.image_token_id] * count
            ids += [] if self.images_first else [words.pop()]
            ids += [START, *block, END] if self.wrap else block
        ids += [BOS, *words[:text]] if self.images_first else words
        out = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        out |= pixels
        if self.extra and (image or self.images_first):
            self.extra(out)
        return {key: _pad(key, value, pad=pad) for key, value in out.items()}

    def inputs(self, batch: int = 1, seed: int = 0, **spec: Any) -> Inputs:
        """`batch` prompts of one spec; row i is `item(seed=seed + i)`."""
        return self.batch([{**spec, "seed": seed + i} for i in range(batch)])

    def batch(self, specs: Sequence[dict[str, Any]]) -> Inputs:
        """A left-padded batch of the prompts `item(**spec)`, as a processor would collate them."""
        items = [self.item(**spec) for spec in specs]
        out: Inputs = {}
        for key in dict.fromkeys(key for item in items for key in item):
            some = next(item[key] for item in items if key in item)
            shape = [max(sizes) for sizes in zip(*(i[key].shape[1:] for i in items if key in i), strict=True)]
            if key in _SEQUENCE:
                shape[0] = max(item["input_ids"].shape[1] for item in items)
            blank = some.new_zeros(int(key in _SEQUENCE or self.nested), *shape)  # no rows: left out
            out[key] = torch.cat([_pad(key, item.get(key, blank), shape) for item in items])
        return out

    def grow(self, inputs: Inputs, ids: Tensor) -> Inputs:
        """The inputs with one more generated token per row, ids (B,), for forwards without a cache."""
        out = dict(inputs)
        for key in _SEQUENCE:
            if key in inputs:
                last = inputs[key][:, -1:]
                new = {"input_ids": ids[:, None], "attention_mask": torch.ones_like(last)}.get(key, last)
                if key.endswith("token_type_ids"):
                    new = torch.full_like(last, self.images_first)  # PaliGemma: 1 is the causal suffix
                out[key] = torch.cat([inputs[key], new], 1)
        return out

    @torch.no_grad()
    def greedy(self, inputs: Inputs, steps: int) -> tuple[Tensor, Tensor]:
        """Greedy decoding by whole forwards, no cache: ids (B, steps) and logits (B, steps, V)."""
        logits: list[Tensor] = []
        for _ in range(steps):
            logits.append(self.model(**inputs, use_cache=False).logits[:, -1].float())
            inputs = self.grow(inputs, logits[-1].argmax(-1))
        return inputs["input_ids"][:, -steps:], torch.stack(logits, 1)


def _pad(key: str, value: Tensor, shape: Sequence[int] | None = None, pad: int = 0) -> Tensor:
    """Zeros up to `shape` (without the batch axis): in front along a sequence, behind anything else."""
    pads: list[int] = []
    for axis in range(value.dim() - 1, 0, -1):
        sequence = key in _SEQUENCE and axis == 1
        missing = shape[axis - 1] - value.shape[axis] if shape else pad * sequence
        pads += [missing, 0] if sequence else [0, missing]
    return nn.functional.pad(value, pads)


@torch.no_grad()
def _initialise(model: Any, seed: int, gemma: bool) -> None:
    """Weights under which attention is peaked, images matter and logits have a std of about 3."""
    rng = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings().weight
    for name, p in model.named_parameters():
        leaf = name.split(".")[-1]
        if "gate" in leaf:  # Mllama: zero gates would close its cross-attention
            p.fill_(0.7)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            p.add_(0.5)
        elif leaf == "bias":
            p.normal_(std=0.1, generator=rng)
        elif gemma and name.endswith("embed_tokens.weight"):  # Gemma multiplies by sqrt(hidden)
            p.normal_(std=HIDDEN**-0.5, generator=rng)
        elif p.dim() > 1 and (id(p) in embeddings or leaf not in ("weight", "mm_input_projection_weight")):
            p.normal_(std=1.0, generator=rng)  # embeddings, position embeddings, query tokens
        elif p.dim() > 1:
            gain = 3.0 if p is head else 1.5 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
            p.normal_(std=gain * p[0].numel() ** -0.5, generator=rng)
    head[:FIRST_TEXT] = 0


@functools.cache
def _config(name: str) -> Any:
    return _ZOO[name][0]()


def build(name: str, seed: int = 0) -> Family:
    """A new model of the family `name`; the same name and seed give the same weights."""
    _, images, facts = _ZOO[name]
    seed += zlib.crc32(name.encode())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForImageTextToText.from_config(copy.deepcopy(_config(name)))
    _initialise(model, seed, "gemma" in name)
    for owner in (model, getattr(model, "language_model", model)):  # the BLIPs generate with the second
        owner.generation_config.update(eos_token_id=None, pad_token_id=PAD, bos_token_id=BOS)
    text = model.config.get_text_config()
    layers, heads = text.num_hidden_layers, text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", heads)
    return Family(name, model.float().eval(), layers, heads, kv_heads, images, **facts)


FAMILY_NAMES: tuple[str, ...] = tuple(_ZOO)
FAMILIES: dict[str, Callable[..., Family]] = {name: _of(build, name) for name in FAMILY_NAMES}
