"""Attach edits to a diffusers pipeline: attention modules, the clock, guidance of the latents; and off again."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .clock import Clock
from .denoiser import AttentionSite, Denoiser, Grid, denoiser_of, half
from .errors import CannotEdit
from .latent_edits import Attend, AttentionCall, Concept, Guidance, LatentEdit, TextMaps, Watch
from .prompts import Reading, Readings, find_concepts
from .textmaps import Attention, Collector, Enough, frozen, may_stop_early

_engines: weakref.WeakKeyDictionary[Any, DiffusionEngine] = weakref.WeakKeyDictionary()
_FP16_SCALE = 4096.0  # losses are below one and their gradients would underflow


def diffusion_engine_of(pipe: Any) -> DiffusionEngine:
    """The engine of a pipeline; made when there is none."""
    engine = _engines.get(pipe)
    if engine is None:
        engine = _engines[pipe] = DiffusionEngine(pipe)
    return engine


@dataclass(eq=False)
class LatentContribution:
    """One intervention's edits, and what they did: per step the losses before the update, and attention calls."""

    name: str
    edits: tuple[LatentEdit, ...]
    on: bool = True
    losses: dict[int, list[float]] = field(default_factory=dict)
    gradients: int = 0
    forwards: int = 0
    sites: set[str] = field(default_factory=set)
    memory: dict[int, Any] = field(default_factory=dict)


@dataclass
class _Forward:
    """The denoiser's own forward that runs now."""

    inputs: dict[str, Any]
    rows: slice
    collector: Collector | None
    inner: bool = False  # our own pass over the conditional rows


class DiffusionEngine:
    """What is attached to one pipeline while at least one run is on."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)
        self.denoiser: Denoiser = denoiser_of(pipe)
        self._runs: list[Sequence[LatentContribution]] = []
        self._handles: list[Any] = []
        self._clock: Clock | None = None
        self._read = Readings()
        self._reading = Reading()
        self._now: _Forward | None = None
        self._modes: list[Attention] = []
        self._expected: dict[tuple[Any, ...], int] = {}

    @property
    def pipe(self) -> Any:
        """The pipeline."""
        pipe = self._pipe()
        if pipe is None:
            raise CannotEdit("the pipeline is gone: keep a reference to it while a run is on")
        return pipe

    # ---- on and off -----------------------------------------------------------------------------

    def add(self, contributions: Sequence[LatentContribution]) -> None:
        """Let one run's edits act from the next forward on.

        Raises:
            CannotEdit: before anything is changed.
        """
        denoiser = denoiser_of(self.pipe)  # modules may have been replaced since the last run
        if self._runs and denoiser.module is not self.denoiser.module:
            raise CannotEdit(f"{self.denoiser.name} was replaced while a run is on: stop that run first")
        self.denoiser = denoiser
        self._runs.append(contributions)
        self.watch()

    def remove(self, contributions: Sequence[LatentContribution]) -> None:
        """Take one run off; with the last one the pipeline is as it was."""
        self._runs = [run for run in self._runs if run is not contributions]
        self.watch()

    def watch(self) -> None:
        """Install the hooks that the edits at hand need, and no other."""
        self._unwatch()
        edits = [edit for _, edit in self._edits()]
        if not edits:
            return
        pipe, module = self.pipe, self.denoiser.module
        self._clock = Clock(pipe, self.denoiser.family == "flux")
        pipe.__dict__["encode_prompt"] = self._noting(pipe.encode_prompt)
        self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(self._after, always_call=True))
        maps = any(isinstance(edit, (Guidance, Watch)) for edit in edits)
        for site in self.denoiser.sites:
            if (maps and site.kind != "self") or any(_takes(edit, site) for edit in edits):
                self._handles.append(
                    site.module.register_forward_pre_hook(functools.partial(self._enter, site))
                )
                leave = functools.partial(self._leave, site)
                self._handles.append(site.module.register_forward_hook(leave, always_call=True))

    def _unwatch(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._clock is not None:
            self._clock.release()
            self._clock = None
        pipe = self._pipe()
        if pipe is not None:
            pipe.__dict__.pop("encode_prompt", None)

    def _edits(self) -> list[tuple[LatentContribution, LatentEdit]]:
        return [(each, edit) for run in self._runs for each in run if each.on for edit in each.edits]

    # ---- one call of the pipeline ---------------------------------------------------------------

    def _noting(self, own: Any) -> Any:
        """The pipeline's encode_prompt, noting what it read; it is the first thing a call does."""

        @functools.wraps(own)
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(own).bind(*args, **kwargs).arguments
            encoded = own(*args, **kwargs)
            self._read.note(given.get("prompt"), encoded[0])
            if self._clock is not None:
                self._clock.reset()
            for contribution, _ in self._edits():
                contribution.memory.clear()
            return encoded

        return encode_prompt

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        clock = self._clock
        if clock is None or self._now is not None:
            return None
        inputs = self.denoiser.bind(args, kwargs)
        first = clock.tick(inputs["timestep"])
        batch = inputs[self.denoiser.latent].shape[0]
        if first:
            self._reading = self._read.find(inputs["encoder_hidden_states"])
        images = self._reading.images
        if images and batch not in (images, 2 * images):
            raise CannotEdit(
                f"the denoiser got {batch} rows for {images} images: only one or two rows an image are known, as "
                "with classifier-free guidance"
            )
        both = batch == 2 * images  # some pipelines run the two one after the other
        rows = slice(batch // 2, batch) if both else slice(0, batch)
        if first:
            self._guide(half(inputs, batch) if both else inputs)
        if clock.moved is not None:
            moved = clock.moved * clock.scale(inputs["timestep"])
            latents = inputs[self.denoiser.latent]
            moved = torch.cat([moved, moved]) if both else moved
            inputs[self.denoiser.latent] = (latents + moved).to(latents.dtype)
        self._now = _Forward(inputs, rows, self._collector(inputs, rows) if first else None)
        return (), inputs

    def _after(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        now, clock = self._now, self._clock
        if now is None or clock is None or now.inner:
            return
        self._now = None
        if output is None or now.collector is None:
            return
        for contribution, edit in self._edits():
            if isinstance(edit, Watch):
                wanted = [edit.resolution] if edit.resolution else sorted(now.collector.sums, reverse=True)
                for grid in wanted:
                    edit.see(self._maps(now.collector, grid, edit.concepts))
            elif isinstance(edit, Guidance) and edit.remember is not None:
                grid = self._resolution(edit, now.inputs)
                maps = self._maps(now.collector, grid, edit.concepts)
                contribution.memory[id(edit)] = edit.remember(maps)

    def _collector(self, inputs: Mapping[str, Any], rows: slice) -> Collector | None:
        """What the ordinary forward must keep: the maps to look at, and those to remember."""
        wanted: set[Grid] = set()
        for _, edit in self._edits():
            if isinstance(edit, Watch):
                wanted |= {edit.resolution} if edit.resolution else set(self.denoiser.text_grids(inputs))
            elif isinstance(edit, Guidance) and edit.remember is not None:
                wanted.add(self._resolution(edit, inputs))
        return Collector(wanted, rows) if wanted else None

    def _resolution(self, edit: Guidance, inputs: Mapping[str, Any]) -> Grid:
        """The grid asked for, or the one whose side is nearest to 16 (ties go to the finer one)."""
        grids = self.denoiser.text_grids(inputs)
        if edit.resolution is None:
            return min(grids, key=lambda grid: abs(torch.tensor(grid[0] * grid[1] / 256).log().item()))
        if edit.resolution not in grids:
            raise CannotEdit(
                f"no attention to the text at resolution {edit.resolution}: {self.denoiser.name} has "
                f"{', '.join(map(str, grids))} at this image size"
            )
        return edit.resolution

    def _maps(self, collector: Collector, grid: Grid, concepts: Sequence[Concept]) -> TextMaps:
        clock = self._clock
        assert clock is not None
        if grid not in collector.sums:
            seen = ", ".join(map(str, collector.sums)) or "none"
            raise CannotEdit(f"no attention to the text at resolution {grid}: seen were {seen}")
        probs = collector.mean(grid)
        found, content = find_concepts(
            self.pipe,
            self.denoiser,
            self._reading.prompts,
            concepts,
            images=probs.shape[0],
            tokens=probs.shape[-1],
        )
        return TextMaps(probs, found, content, clock.step, clock.steps, collector.counts[grid])

    # ---- guidance -------------------------------------------------------------------------------

    def _guide(self, inputs: dict[str, Any]) -> None:
        """Move the latents of the conditional rows, once for each guidance in turn."""
        clock = self._clock
        assert clock is not None
        for contribution, edit in self._edits():
            if not isinstance(edit, Guidance):
                continue
            size = edit.step_size(clock.step, clock.steps)
            if size == 0 and clock.step not in edit.refine:
                continue
            if torch.is_inference_mode_enabled():
                raise CannotEdit(
                    "guidance needs gradients: call the pipeline outside of torch.inference_mode()"
                )
            latents = inputs[self.denoiser.latent]
            moved = torch.zeros_like(latents, dtype=torch.float32) if clock.moved is None else clock.moved
            moved, losses = self._descend(contribution, edit, inputs, moved, size)
            contribution.losses.setdefault(clock.step, []).extend(losses.tolist())
            clock.moved = moved

    def _descend(
        self,
        contribution: LatentContribution,
        edit: Guidance,
        inputs: dict[str, Any],
        moved: Tensor,
        size: float,
    ) -> tuple[Tensor, Tensor]:
        """One step's updates; returns how far the latents have moved, and the (B,) losses before."""
        step = self._clock.step  # type: ignore[union-attr]
        losses, gradient = self._gradient(contribution, edit, inputs, moved)
        before = losses
        if step in edit.refine:
            pull = edit.refine_size(step, self._clock.steps) if edit.refine_size else size  # type: ignore[union-attr]
            late = torch.zeros_like(losses, dtype=torch.bool)
            for _ in range(edit.refinements):
                active = (losses > edit.refine[step]) | late
                if not active.any():
                    break
                late = (losses > edit.refine[step]) if edit.overshoot else late
                moved = moved - pull * gradient * _column(active, gradient)
                losses, gradient = self._gradient(contribution, edit, inputs, moved)
        return moved - size * gradient, before

    def _gradient(
        self, contribution: LatentContribution, edit: Guidance, inputs: dict[str, Any], moved: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B,) losses at the moved latents, and the gradient with respect to these."""
        clock, name = self._clock, self.denoiser.latent
        assert clock is not None
        grid = self._resolution(edit, inputs)
        key = (inputs[name].shape, grid)
        stop = may_stop_early(self.denoiser.module)
        with torch.enable_grad(), frozen(self.denoiser.module):
            leaf = moved.detach().clone().requires_grad_(True)
            latents = inputs[name]
            given = {
                **inputs,
                name: (latents.detach() + clock.scale(inputs["timestep"]) * leaf).to(latents.dtype),
            }
            collector = Collector({grid}, slice(None), self._expected.get(key) if stop else None)
            self._now = _Forward(given, slice(None), collector, inner=True)
            try:
                self.denoiser.module(**given)
            except Enough:
                pass
            finally:
                self._now = None
            self._expected[key] = sum(collector.counts.values())
            maps = self._maps(collector, grid, edit.concepts)
            losses = edit.loss(maps, contribution.memory.get(id(edit)))
            scale = _FP16_SCALE if latents.dtype == torch.float16 else 1.0
            (gradient,) = torch.autograd.grad(losses.sum() * scale, leaf, allow_unused=True)
        contribution.gradients += 1
        return losses.detach(), torch.zeros_like(leaf) if gradient is None else gradient / scale

    # ---- one attention module -------------------------------------------------------------------

    def _enter(self, site: AttentionSite, module: Any, args: Any) -> None:
        if self._now is not None:
            mode = Attention(functools.partial(self._attend, site))
            self._modes.append(mode)
            mode.__enter__()

    def _leave(self, site: AttentionSite, module: Any, args: Any, output: Any) -> None:
        if not self._modes:
            return
        mode = self._modes.pop()
        mode.__exit__(None, None, None)
        if output is not None and not mode.hits:
            processor = type(getattr(module, "processor", None)).__name__
            raise CannotEdit(
                f"{self.denoiser.name}.{site.name} ({processor}) does not call scaled_dot_product_attention, so it "
                "cannot be edited: give it back its own processor, as in set_attn_processor(AttnProcessor2_0()), no "
                "attention slicing, no xformers, and no backend but the native one"
            )

    def _attend(
        self,
        site: AttentionSite,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        now, clock = self._now, self._clock
        assert now is not None
        assert clock is not None

        def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = attn_mask) -> Tensor:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)

        text = now.inputs["encoder_hidden_states"].shape[1]
        image = self.denoiser.image_tokens(site, query.shape[2], text)
        count = image.stop - image.start
        grid = next((grid for grid in self.denoiser.grids(now.inputs) if grid[0] * grid[1] == count), None)
        if grid is None:
            raise CannotEdit(
                f"{self.denoiser.name}.{site.name} has {count} image tokens, which fit no known grid"
            )
        columns = self.denoiser.text_tokens(site, key.shape[2], text)
        call = AttentionCall(
            site,
            query,
            key,
            value,
            attn_mask,
            options.get("scale"),
            now.rows,
            grid,
            image,
            columns,
            clock.step,
            clock.steps,
            attend,
        )
        if now.collector is not None:
            now.collector.add(call)
        output = None
        for contribution, edit in self._edits():
            if isinstance(edit, Attend) and output is None and _takes(edit, site):
                output = edit.attend(call)
                contribution.forwards += output is not None
                contribution.sites.add(site.name)
        return attend(query, key, value) if output is None else output


def _takes(edit: LatentEdit, site: AttentionSite) -> bool:
    return isinstance(edit, Attend) and (edit.sites is None or edit.sites(site))


def _column(rows: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ...) in the dtype and dimensions of `like`."""
    return rows.to(like).view(-1, *[1] * (like.ndim - 1))
