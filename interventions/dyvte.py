r"""Dynamic visual-token exit (DyVTE).

Wu et al., "Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical
Findings", NeurIPS 2025, arXiv 2411.19628. Reference: https://github.com/DoubtedSteam/DyVTE (2024-12-05).

After a block l the image tokens leave the decoder. Blocks up to l work on them, blocks above l neither
compute them nor store their keys and values; positions of the tokens that stay are not renumbered. The paper
asks a small trained gate after every block, with h_l the states that leave block l:

    x_l  = [ mean of h_l over the text after the image but for the last token ; h_l of the last token ]
    exit at the first l where  (D_l GELU(U_l x_l))_1 > (D_l GELU(U_l x_l))_0

Which rows: the decision is taken once, on the prompt; generated tokens read the shorter caches.

The release holds no gates, so the default needs none. `mode`:

    "fixed"      leave after one block
    "attention"  m_l = mean over heads of the last row's image mass; leave where m_l < tau `patience` times in a row
    "state"      d_l = 1 - cos(h_l, h_{l-1}) of the last token; leave where d_l < tau `patience` times in a row
    "gate"       the paper's, from a safetensors file

"fixed", "attention" and "state" are our reading of the paper's findings (the text has taken in what it needs of
the image by the middle of the decoder); their defaults, the fixed depth of 0.6 L, the first block asked (L / 2)
and both tau, are OURS and not the paper's. Compare them with the plain model before use.

Where this differs from the release: the image may be anywhere, in several pieces, and each sample of a batch leaves
by itself (there: rows 35 to 611 of the first sample). Where no text stands between the image and the last token, the
mean is the last token's state (there: not a number). Decoding after a prompt at which no gate fired goes on
(there: an IndexError). No attention matrix is asked for (there: output_attentions in every layer).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from ..hooks.anatomy import Anatomy
from ..hooks.edits import Edit, Exit, HeadGain
from ..hooks.errors import RegardError
from ..hooks.exits import Departure
from ..hooks.session import Call, Session, newest_rows
from .method import Method

MODES = ("fixed", "attention", "state", "gate")
TAU = {"attention": 0.1, "state": 0.05}  # ours, not the paper's
FIXED_DEPTH = 0.6  # ours: within 0.5 to 0.6 of the depth
Router = tuple[Tensor, Tensor]  # U (M, 2 C) and D (2, M)


def image_mass(query: Tensor, key: Tensor, image: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Mean over heads of the attention that one row gives to the image, (B,) in fp32 or wider.

    Args:
        query: that row, (B, H, D).
        key: (B, H_kv, K, D).
        image, visible: (B, K) bool; keys that are image, and keys that the row sees.
        scale: factor of query times key.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).unflatten(1, (key.shape[1], -1))  # (B, H_kv, H / H_kv, D)
    scores = grouped @ key.to(wide).mT * scale
    probs = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
    return (probs * image[:, None, None]).sum(-1).mean((1, 2))


def state_change(before: Tensor, after: Tensor) -> Tensor:
    """1 - cos of states (B, C), (B,) in fp32 or wider."""
    wide = torch.promote_types(before.dtype, torch.float32)
    return 1 - F.cosine_similarity(before.to(wide), after.to(wide), dim=-1)


def gate_input(hidden: Tensor, text: Tensor, last: Tensor) -> Tensor:
    """The gate's features, (B, 2 C).

    Args:
        hidden: states (B, S, C).
        text: (B, S) bool, the text after the image but for the last token; the last token serves where it is empty.
        last: the last token's states, (B, C).
    """
    weight = text.to(hidden.dtype)
    mean = (weight[:, :, None] * hidden).sum(1) / weight.sum(1, keepdim=True).clamp_min(1)
    mean = torch.where(text.any(1, keepdim=True), mean, last)
    return torch.cat([mean, last], -1)


def gate_fires(features: Tensor, router: Router) -> Tensor:
    """Whether the gate is for leaving: features (B, 2 C) -> (B,) bool."""
    up, down = (weight.to(features) for weight in router)
    stay, leave = F.linear(F.gelu(F.linear(features, up)), down).unbind(-1)
    return leave > stay


def read_gate(path: str | Path, layers: int, hidden: int) -> dict[int, Router]:
    """Routers by layer, from a safetensors file.

    It has two matrices a layer, (M, 2 C) and (2, M), whose names hold the layer's number first: "3.up" and
    "3.down", or "routers.3.0.weight" and "routers.3.3.weight".

    Raises:
        RegardError: another file, more gates than layers, or gates of another width.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise RegardError(f"gate {path} is no safetensors file (a pickle may run code): convert it to one")
    found: dict[int, list[Tensor]] = {}
    for name, weight in sorted(load_file(path).items()):
        number = re.search(r"\d+", name)
        if number is None:
            raise RegardError(
                f"gate {path}: no layer number in {name!r}; name its matrices '3.up' and '3.down'"
            )
        found.setdefault(int(number[0]), []).append(weight)
    if not found or max(found) >= layers:
        seen = f"layers {min(found)} to {max(found)}" if found else "no layer"
        raise RegardError(f"gate {path} is for {seen}, but the decoder has layers 0 to {layers - 1}")
    return {layer: _router(path, layer, weights, hidden) for layer, weights in sorted(found.items())}


def _router(path: Path, layer: int, weights: Sequence[Tensor], hidden: int) -> Router:
    up = [weight for weight in weights if weight.ndim == 2 and weight.shape[1] == 2 * hidden]
    down = [
        weight for weight in weights if weight.ndim == 2 and len(up) == 1 and weight.shape == (2, len(up[0]))
    ]
    if len(weights) != 2 or len(up) != 1 or len(down) != 1 or up[0] is down[0]:
        shapes = ", ".join(str(tuple(weight.shape)) for weight in weights)
        raise RegardError(
            f"gate {path}, layer {layer}: expected matrices (M, {2 * hidden}) and (2, M), got {shapes}"
        )
    return up[0], down[0]


@dataclass(frozen=True)
class DyVTE(Method):
    """Let image tokens leave the decoder once the text has read them.

    Args:
        mode: "fixed", "attention", "state" or "gate", see above.
        layer: block after which they leave in mode "fixed"; None means at 0.6 of the depth (ours).
        start: first block asked in modes "attention" and "state"; None means half the depth (ours).
        tau: threshold of modes "attention" (image mass, 0.1) and "state" (1 - cos, 0.05); both ours.
        patience: for how many blocks in a row the value must lie below tau.
        gate: a safetensors file with the paper's gates, for mode "gate".
    """

    mode: Literal["fixed", "attention", "state", "gate"] = "fixed"
    layer: int | None = None
    start: int | None = None
    tau: float | None = None
    patience: int = 2
    gate: str | Path | None = None

    name = "dyvte"
    paper = "Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical Findings"
    arxiv = "2411.19628"
    kind = "token exit"
    cost = "less than plain: blocks after the exit run without image tokens"
    models = ("llava", "internvl")

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if (self.mode == "gate") != (self.gate is not None):
            raise ValueError(
                f"mode 'gate' goes with a gate file: got mode {self.mode!r} and gate {self.gate!r}"
            )
        if self.layer is not None and self.mode != "fixed":
            raise ValueError(
                f"layer is for mode 'fixed', got mode {self.mode!r}: pass start for a first block"
            )
        if self.mode not in TAU and (self.tau is not None or self.start is not None):
            raise ValueError(f"tau and start are for modes 'attention' and 'state', got mode {self.mode!r}")
        if self.tau is not None and not self.tau >= 0:
            raise ValueError(f"tau is a threshold of at least 0, got {self.tau}")
        if self.patience < 1:
            raise ValueError(f"patience counts blocks from 1, got {self.patience}")

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        """An exit; in mode "attention" also a reader of the last row's scores."""
        depth = anatomy.layers
        if self.mode == "fixed":
            return (Exit((max(0, round(FIXED_DEPTH * depth) - 1) if self.layer is None else self.layer,)),)
        if self.mode == "gate":
            assert self.gate is not None
            routers = read_gate(self.gate, depth, anatomy.hidden)
            return (Exit(tuple(routers), lambda departure: self.gate_says(departure, routers)),)
        start = depth // 2 if self.start is None else self.start
        layers = (
            tuple(range(start, depth)) if start < depth else (start,)
        )  # a start too high is named by the check
        if self.mode == "state":
            return (Exit(layers, self.state_says),)
        scales = _scales(anatomy)
        reader = HeadGain(layers, lambda call: self.look(call, scales[call.layer]))
        return reader, Exit(layers, self.attention_says)

    # ---- the criteria ------------------------------------------------------------------------------

    def look(self, call: Call, scale: float) -> None:
        """Keep the image mass (B,) of the last row of the prompt in this layer."""
        session = call.session
        if call.key.shape[2] != session.seen + session.rows or session.seen:
            return  # all have left
        image, padding = call.image, session.padding
        visible = (
            torch.ones_like(image) if padding is None else ~padding.to(image.device)
        )  # by the last token
        row = newest_rows(call.query.transpose(1, 2), session.newest)
        session.memory[self, "mass"] = image_mass(row, call.key, image, visible, scale)

    def attention_says(self, departure: Departure) -> Tensor:
        """Who has paid the image little attention for `patience` blocks, (B,)."""
        return self._below(departure.session, departure.session.memory[self, "mass"])

    def state_says(self, departure: Departure) -> Tensor:
        """Whose last token has hardly moved for `patience` blocks, (B,)."""
        before, after = departure.newest(departure.before), departure.newest(departure.hidden)
        return self._below(departure.session, state_change(before, after))

    def gate_says(self, departure: Departure, routers: Mapping[int, Router]) -> Tensor:
        """For whom the gate of this block fires, (B,)."""
        session, hidden = departure.session, departure.hidden
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        text = (positions >= session.image_end.to(hidden.device)[:, None]) & (
            positions < _newest(session).to(hidden.device)[:, None]
        )
        features = gate_input(hidden, text, departure.newest(hidden))
        return gate_fires(features, routers[departure.layer])

    def _below(self, session: Session, value: Tensor) -> Tensor:
        tau = TAU[self.mode] if self.tau is None else self.tau
        before = session.memory.get((self, "calm"), torch.zeros_like(value, dtype=torch.long))
        calm = session.memory[self, "calm"] = torch.where(value < tau, before.to(value.device) + 1, 0)
        return calm >= self.patience


def _newest(session: Session) -> Tensor:
    """Position (B,) of each prompt's last token."""
    newest = session.newest
    return torch.full((session.batch,), session.prompt - 1) if newest is None else newest


def _scales(anatomy: Anatomy) -> dict[int, float]:
    """The factor of the scores in each layer. OPT's query has it already."""
    scaled = anatomy.text_type == "opt"
    own = anatomy.head_width**-0.5
    return {
        site.layer: 1.0 if scaled else float(getattr(site.module, "scaling", own)) for site in anatomy.sites
    }
