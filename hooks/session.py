"""One stream of tokens: where the image is, how far the prompt has been read, what edits remember.

A session lasts for one `generate`, for one plain forward, or for a cache that the user carries on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import CannotEdit, NoImageTokens

if TYPE_CHECKING:
    from .branch import Stream
    from .plan import Plan


SESSION = "regard_session"  # keyword by which a checkpointed block is given its session again, in backward


@dataclass
class Session:
    """State of one stream. Shapes: B samples (beams included), S prompt tokens.

    `image` and `padding` are (B, S) bool over the prompt; `seen` counts the tokens in the cache before
    the forward that runs now, `rows` its query rows, `prompt` the length of the prompt.
    """

    plan: Plan
    image_token: int | None
    image: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))
    padding: Tensor | None = None
    prompt: int = 0
    batch: int = 0
    seen: int = 0
    rows: int = 0
    cached: bool = False
    checked: bool = False
    checkpointed: bool = False
    hits: set[int] = field(default_factory=set)
    memory: dict[Any, Any] = field(default_factory=dict)
    hidden: dict[tuple[str, int], dict[int, Tensor]] = field(default_factory=dict)
    streams: dict[str, Stream] = field(default_factory=dict)
    given: dict[str, Tensor] = field(default_factory=dict)  # what `generate` was called with
    inputs: dict[str, Any] | None = None  # the model's own arguments at the prompt, for branches with a view
    early: dict[int, Tensor] = field(default_factory=dict)  # newest states (B, C) before some blocks
    tower: dict[int, Tensor] = field(default_factory=dict)
    _step: dict[Any, Any] = field(default_factory=dict)

    def read_prompt(self, ids: Tensor | None, attention_mask: Tensor | None) -> None:
        """Take image positions and padding from the prompt's ids (B, S).

        Raises:
            NoImageTokens: an edit needs the image and no sample has one.
            CannotEdit: ids are missing.
        """
        if ids is None:
            if self.plan.needs_image:
                raise CannotEdit(
                    "the prompt came without input_ids, so the image tokens cannot be found: pass input_ids"
                )
            return
        if self.image_token is None:
            self.image = torch.zeros_like(ids, dtype=torch.bool)
        else:
            self.image = ids == self.image_token
        self.prompt = ids.shape[1]
        if (
            isinstance(attention_mask, Tensor)
            and attention_mask.ndim == 2
            and attention_mask.shape[1] == self.prompt
        ):
            padding = attention_mask == 0
            self.padding = padding if bool(padding.any()) else None
        if self.plan.needs_image and not bool(self.image.any()):
            raise NoImageTokens(
                f"{self.plan.needs_image} needs an image, but none of the {ids.shape[0]} prompts "
                f"(length {self.prompt}) holds the image token {self.image_token}: put the processor's image "
                "token into the text and pass the image, or take the baseline with run.off()"
            )

    def begin(self, batch: int, rows: int, seen: int, cached: bool) -> None:
        """Set the clock for a forward of `rows` query rows after `seen` cached tokens."""
        first = self.rows == 0
        self.batch, self.seen, self.rows, self.cached = batch, seen, rows, cached
        self._step.clear()
        if self.prompt == 0:
            self.prompt = seen + rows
        if self.image.numel() == 0:  # no ids were given, and no edit needs the image
            self.image = torch.zeros(batch, self.prompt, dtype=torch.bool)
        if first and self.image.shape[0] not in (0, batch):  # ids were read before beams were expanded
            times = batch // self.image.shape[0]
            self.image = self.image.repeat_interleave(times, 0)
            self.padding = None if self.padding is None else self.padding.repeat_interleave(times, 0)
        if first and self.plan.whole_prompt and rows > self.prompt:
            raise CannotEdit(
                f"{self.plan.whole_prompt} must see the prompt by itself first; its {self.prompt} tokens came with "
                f"{rows - self.prompt} more: generate without assisted or prompt-lookup decoding"
            )
        if first and self.plan.whole_prompt and (seen > 0 or rows < self.prompt):
            raise CannotEdit(
                f"{self.plan.whole_prompt} must see the whole prompt in one forward; it got {rows} of {self.prompt} "
                f"tokens with {seen} already cached: start from an empty cache, without prefill_chunk_size"
            )

    @property
    def prefill(self) -> bool:
        """Whether rows of the prompt are being processed."""
        return self.seen < self.prompt

    @property
    def has_image(self) -> Tensor:
        """Samples with an image, (B,) bool."""
        return self._once("has_image", lambda: self.image.any(1))

    @property
    def image_end(self) -> Tensor:
        """Position after the last image token of each sample, (B,); 0 without an image."""

        def find() -> Tensor:
            positions = torch.arange(1, self.image.shape[1] + 1, device=self.image.device)
            return (self.image * positions).amax(1) if self.image.shape[1] else self.image.sum(1)

        return self._once("image_end", find)

    @property
    def image_ends(self) -> tuple[int, int, bool]:
        """Smallest and largest `image_end` over samples with an image, and whether every sample has one."""

        def find() -> tuple[int, int, bool]:
            ends = self.image_end[self.has_image].tolist()
            return (min(ends), max(ends), len(ends) == len(self.image)) if ends else (self.prompt, 0, False)

        return self._once("image_ends", find)

    @property
    def newest(self) -> Tensor | None:
        """Index (B,) of each sample's last real row in this forward; None when it is the last row of all."""
        return self._per_step("newest", self._find_newest)

    def _find_newest(self) -> Tensor | None:
        if not self.prefill or self.padding is None or not bool(self.padding[:, -1].any()):
            return None
        positions = torch.arange(self.prompt, device=self.padding.device)
        return (~self.padding * positions).amax(1) - self.seen

    def _once(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self.memory:
            self.memory[key] = make()
        return self.memory[key]

    def _per_step(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._step:
            self._step[key] = make()
        return self._step[key]

    def over_keys(self, tokens: Tensor, keys: int) -> Tensor:
        """Spread a per-prompt-token tensor (B, S) over the keys (B, K) that attention sees now.

        Keys past the prompt get zero. A sliding window that dropped its oldest keys is accounted for.
        """
        total = self.seen + self.rows
        tokens = tokens[:, max(0, total - keys) :][:, :keys]
        return F.pad(tokens, (0, keys - tokens.shape[1]))


class Call:
    """What an edit's function sees of one attention layer in one forward.

    `query` (B, H, Q, D) and `key` (B, H_kv, K, D) are after rotary embedding; `output` (B, Q, H, D) is
    set for `HeadGain` only, and so are `mask`, what hides keys after the edits before it (bool or added; None is
    no mask), `tail`, the mask of the newest rows where it is another, and `causal`, whether row i sees the keys up
    to i without a mask. A `Bias` of the newest rows gets these rows only: Q counts from row `first`.
    """

    __slots__ = (
        *("causal", "cross", "first", "key", "layer", "mask", "output", "owner", "query", "scale", "session"),
        "tail",
    )

    def __init__(self, session: Session, layer: int, cross: bool, query: Tensor, key: Tensor) -> None:
        self.session, self.layer, self.cross = session, layer, cross
        self.query, self.key = query, key
        self.output: Tensor | None = None
        self.mask: Tensor | None = None
        self.tail: Tensor | None = None
        self.causal = False
        self.owner = 0  # the contribution whose edit is asked
        self.first = 0
        self.scale = query.shape[-1] ** -0.5

    @property
    def prefill(self) -> bool:
        """Whether rows of the prompt are being processed."""
        return self.session.prefill

    @property
    def image(self) -> Tensor:
        """Image keys, (B, K) bool. In a cross-attention layer every key is one."""
        batch, keys = self.key.shape[0], self.key.shape[2]
        if self.cross:
            return torch.ones(batch, keys, dtype=torch.bool, device=self.key.device)
        session = self.session
        image = session.image.to(self.key.device)
        return session._per_step(("image", keys, self.key.device), lambda: session.over_keys(image, keys))

    @property
    def positions(self) -> Tensor:
        """Absolute position of each query row, (Q,)."""
        start = self.session.seen + self.first
        return torch.arange(start, start + self.query.shape[2], device=self.query.device)

    def scores(self) -> Tensor:
        """Scores of the rows and keys at hand before any mask, (B, H, Q, K), in fp32 or wider."""
        batch, heads, rows, width = self.query.shape
        shared = self.key.shape[1]
        query = self.query.reshape(batch, shared, heads // shared * rows, width)
        scores = query @ self.key.transpose(-1, -2)
        wide = torch.promote_types(scores.dtype, torch.float32)
        return scores.reshape(batch, heads, rows, -1).to(wide) * self.scale

    @property
    def has_image(self) -> Tensor:
        """Samples with an image, (B,) bool."""
        return self.session.has_image.to(self.query.device)

    def newest_output(self) -> Tensor:
        """Head outputs at each sample's newest row, (B, H, D)."""
        if self.output is None:
            raise CannotEdit("head outputs are known to HeadGain only")
        return newest_rows(self.output, self.session.newest)

    def read(self, name: str) -> Tensor:
        """What the `Hidden` edit of that name kept in this layer; the intervention's own, if it has one."""
        kept = self.session.hidden[name, self.layer]
        return kept.get(self.owner, next(reversed(kept.values())))

    def branch(self, name: str) -> Tensor:
        """Head outputs (B, H, D) of the branch of that name in this layer, at its newest row."""
        return self.session.streams[name].outputs[self.layer]


def newest_rows(output: Tensor, newest: Tensor | None) -> Tensor:
    """(B, Q, H, D) -> (B, H, D) at the given rows (B,), or at the last row."""
    if newest is None:
        return output[:, -1]
    return output[torch.arange(output.shape[0], device=output.device), newest.to(output.device)]
