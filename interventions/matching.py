"""Which parts of an image a text speaks of: matchers, and the masks made of their maps.

A matcher is any callable `matcher(images, texts) -> Match`: images are a list of N tensors (3, H, W) in 0..1,
texts a list of N strings. `BlipMatcher` is the one of AGLA's paper; `AttentionMatcher` is ours, for models that
come without a matching model, such as the miniature.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from ..hooks.errors import CannotEdit

WORDS = 50  # a matching model reads so many words at most
REAL_VOCABULARY = 30524  # of BLIP's released text encoder: BERT's, [DEC] and [ENC]


@dataclass(frozen=True)
class Match:
    """Relevance maps (N, h, w), at least 0, and the similarity of image and text (N,), a cosine."""

    maps: Tensor
    similarity: Tensor


Matcher: TypeAlias = Callable[[Sequence[Tensor], Sequence[str]], Match]


def clean(text: str) -> str:
    """Lower case, without `. ! " ( ) * # : ; ~`, at most 50 words, as BLIP's captions are."""
    return " ".join(re.sub(r"[.!\"()*#:;~]", " ", text.lower()).split()[:WORDS])


def kept_share(similarity: Tensor) -> Tensor:
    """min(1 - similarity / 2, 1 - 1e-5): the better text and image match, the more is masked. (N,)"""
    return (1 - similarity / 2).clamp(0, 1 - 1e-5)


def stretched(values: Tensor) -> Tensor:
    """Shifted and scaled to 0..1; a constant map becomes 0."""
    values = values - values.amin()
    peak = values.amax()
    return values / peak if peak > 0 else values


def blurred(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (H, W), the edge pixels repeated; the kernel ends at 4 sigma."""
    reach = max(1, int(4 * sigma + 0.5))
    offsets = torch.arange(-reach, reach + 1, dtype=image.dtype, device=image.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    wide = F.pad(image[None, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(wide, kernel[None, None, None]), kernel[None, None, :, None])[0, 0]


def mask_from(relevance: Tensor, ratio: float, size: tuple[int, int], blur: float = 0.02) -> Tensor:
    """The top `ratio` share of an image's pixels by a map (h, w): (H, W) bool, True where a pixel stays.

    The map is stretched to 0..1, upsampled (bicubic), blurred with sigma = blur * max(H, W), stretched again. Pixels
    that tie with the last one kept stay too, so a constant map keeps all.

    Raises:
        ValueError: a map that is not finite.
    """
    if not bool(relevance.isfinite().all()):
        raise ValueError("the relevance map has values that are not finite: look at the matcher")
    start = stretched(relevance.double())
    large = F.interpolate(start[None, None], size, mode="bicubic", align_corners=False)[0, 0]
    smooth = stretched(blurred(large, blur * max(size)) if blur else large)
    if float(start.amax()) == 0:
        return torch.ones(size, dtype=torch.bool, device=relevance.device)
    count = min(max(1, int(smooth.numel() * ratio)), smooth.numel())
    return smooth >= smooth.flatten().topk(count).values[-1]


class BlipMatcher:
    """Grad-CAM of an image-text matching model (transformers' BlipForImageTextRetrieval).

    With P the cross-attention probs of text layer `block` and G the gradient of the "match" logit, the map is
    the mean over heads and over the text rows 1 .. T-2 of P * max(G, 0), the image's CLS column left out.
    T counts the tokens, without padding: rows 1 .. T-2 are the words, between the first token and [SEP]. The
    similarity is the cosine of the projected CLS states, text and image each by itself.

    Args:
        model: BlipForImageTextRetrieval, on any device.
        processor: BlipProcessor, or anything with a `tokenizer` and an `image_processor`.
        block: text layer whose cross-attention is read; 6 of BLIP's 12.
        enc_token: id that stands first in the matching pass. None takes the tokenizer's [ENC], else the last id
            of a text encoder with BLIP's vocabulary; with -1 the [CLS] stays. transformers' class does not replace it.
    """

    def __init__(self, model: Any, processor: Any, block: int = 6, enc_token: int | None = None) -> None:
        layers = getattr(getattr(getattr(model, "text_encoder", None), "encoder", None), "layer", None)
        if layers is None or not hasattr(model, "itm_head"):
            raise CannotEdit(
                f"BlipMatcher needs a BlipForImageTextRetrieval, got {type(model).__name__}: "
                "load for instance Salesforce/blip-itm-large-coco"
            )
        if not 0 <= block < len(layers):
            raise ValueError(
                f"block is a text layer from 0 to {len(layers) - 1} of the matching model, got {block}"
            )
        self.model, self.processor, self.block = model, processor, block
        tokenizer = processor.tokenizer
        if enc_token is None:
            known = tokenizer.get_vocab().get("[ENC]")
            vocabulary = model.config.text_config.vocab_size
            enc_token = (
                known if known is not None else vocabulary - 1 if vocabulary == REAL_VOCABULARY else -1
            )
        self.enc_token = enc_token

    def __call__(self, images: Sequence[Tensor], texts: Sequence[str]) -> Match:
        """Maps (N, h, w) of the patch grid; also inside the caller's `no_grad` or `inference_mode`."""
        ids, mask = self._tokens(texts)
        with torch.inference_mode(False):
            pixels = torch.stack([self._pixels(image) for image in images])
            ids, mask = ids.clone(), mask.clone()
            with torch.no_grad():
                states = self.model.vision_model(pixel_values=pixels).last_hidden_state
                text = self.model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
                seen = F.normalize(self.model.vision_proj(states[:, 0]), dim=-1)
                said = F.normalize(self.model.text_proj(text[:, 0]), dim=-1)
            with torch.enable_grad():
                probs, gradient = self._attention(ids, mask, states)
            return Match(self._maps(probs, gradient, mask).float(), (seen * said).sum(-1).float())

    def score(self, ids: Tensor, mask: Tensor, states: Tensor) -> Tensor:
        """The "match" logit (N,) of texts (N, T) and image states (N, 1 + P, C)."""
        if self.enc_token >= 0:
            first = torch.zeros_like(ids, dtype=torch.bool)
            first[:, 0] = True
            ids = ids.masked_fill(first, self.enc_token)
        fused = self.model.text_encoder(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=states,
            encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long, device=states.device),
        ).last_hidden_state
        return self.model.itm_head(fused[:, 0])[:, 1]

    def _attention(self, ids: Tensor, mask: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-attention probs of the block and the gradient of the summed scores, (N, H, T, 1 + P) each."""
        kept: list[Tensor] = []

        def keep(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            kept.append(args[0].detach().requires_grad_())  # the graph begins here
            return (kept[-1],)

        attention = self.model.text_encoder.encoder.layer[self.block].crossattention.self
        handle = attention.dropout.register_forward_pre_hook(keep)
        training = self.model.training
        self.model.eval()
        try:
            score = self.score(ids, mask, states).sum()
        finally:
            handle.remove()
            self.model.train(training)
        (gradient,) = torch.autograd.grad(score, kept[0])
        return kept[0].detach(), gradient

    def _maps(self, probs: Tensor, gradient: Tensor, mask: Tensor) -> Tensor:
        places = mask.cumsum(1)
        words = (mask > 0) & (places > 1) & (places < mask.sum(1, keepdim=True))  # rows 1 .. T-2
        cam = (probs * gradient.clamp_min(0)).mean(1)[..., 1:]
        mean = (cam * words[..., None]).sum(1) / words.sum(1).clamp_min(1)[:, None]
        side = math.isqrt(mean.shape[1])
        return mean.view(len(mean), side, -1)

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        if not all(map(clean, texts)):
            raise CannotEdit(f"a matching model needs words to match the image with, got {list(texts)!r}")
        limit = self.model.config.text_config.max_position_embeddings
        made = self.processor.tokenizer(
            [clean(text) for text in texts],
            padding=True,
            truncation=True,
            max_length=limit,
            return_tensors="pt",
        )
        device = self.model.itm_head.weight.device
        return made["input_ids"].to(device), made["attention_mask"].to(device)

    def _pixels(self, image: Tensor) -> Tensor:
        """One image (3, H, W), squashed to the matching model's square and normalised."""
        if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape or not bool(image.isfinite().all()):
            raise CannotEdit(
                f"the matching model cannot read an image of shape {tuple(image.shape)}: it takes (3, H, W), "
                "finite values from 0 to 1"
            )
        weight, images = self.model.itm_head.weight, self.processor.image_processor
        side = self.model.config.vision_config.image_size
        value = image.clone().to(weight.device, torch.float32)[None]
        value = F.interpolate(value, (side, side), mode="bicubic", antialias=True).clamp(0, 1)[0]
        mean, std = (value.new_tensor(v)[:, None, None] for v in (images.image_mean, images.image_std))
        return ((value - mean) / std).to(weight.dtype)


class AttentionMatcher:
    """Ours, no training: where a LLaVA-like model's own attention goes from the words of the text.

    The map is the mean over heads, the layers given and the text's rows of the probs on the image tokens. These
    models have no matching score, so `similarity` is a setting.

    Args:
        model: an LVLM with one square grid of image tokens an image, eager attention; a copy of its own, not the
            one that is edited.
        processor: its processor.
        layers: decoder layers that are read; None takes the middle third.
        similarity: stands in for the cosine.
    """

    def __init__(
        self, model: Any, processor: Any, layers: Sequence[int] | None = None, similarity: float = 0.5
    ) -> None:
        if not 0 <= similarity <= 1:
            raise ValueError(f"similarity is from 0 to 1, got {similarity}")
        if getattr(model.config, "_attn_implementation", None) != "eager":
            raise CannotEdit(
                "AttentionMatcher reads attention probs: load its model with attn_implementation='eager'"
            )
        count = model.config.get_text_config().num_hidden_layers
        third = range(count // 3, max(count // 3 + 1, 2 * count // 3))
        self.layers = tuple(third if layers is None else layers)
        if not self.layers or not all(0 <= layer < count for layer in self.layers):
            raise ValueError(f"layers are from 0 to {count - 1}, got {self.layers}")
        self.model, self.processor, self.similarity = model, processor, similarity

    def __repr__(self) -> str:
        return f"AttentionMatcher(layers={self.layers}, similarity={self.similarity})"

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor], texts: Sequence[str]) -> Match:
        """Maps (N, h, w) of the grid of image tokens."""
        maps = [self._map(image, text) for image, text in zip(images, texts, strict=True)]
        return Match(torch.stack(maps), torch.full((len(maps),), self.similarity))

    def _map(self, image: Tensor, text: str) -> Tensor:
        processor, token = self.processor, self.model.config.image_token_id
        if not text.strip():
            raise CannotEdit(f"a matcher needs words to match the image with, got {text!r}")
        picture = (image.detach().cpu() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        prompt = f"{processor.tokenizer.convert_ids_to_tokens(token)} {text}"
        given = processor(images=picture, text=prompt, return_tensors="pt").to(self.model.device)
        probs = self.model(**given, output_attentions=True).attentions
        seen = given["input_ids"][0] == token
        words = seen.cumsum(0) == seen.sum()
        words &= ~seen
        mean = torch.stack([probs[layer][0].mean(0) for layer in self.layers]).mean(0)
        found = mean[words][:, seen].mean(0).float()
        side = math.isqrt(len(found))
        if side * side != len(found):
            raise CannotEdit(
                f"AttentionMatcher needs a square grid of image tokens, got {len(found)}: use BlipMatcher"
            )
        return found.view(side, side)
