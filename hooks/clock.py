"""Which denoising step runs: read from the pipeline's scheduler, so that no counter of ours can drift."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import CannotEdit


@dataclass
class _Layer:
    """One wrapper of a scheduler's step, and the one that it was put over."""

    below: Any
    off: bool = False


class Clock:
    """The step of one pipeline call, and how far guidance has moved the latents in it."""

    def __init__(self, pipe: Any, per_thousand: bool) -> None:
        self._pipe_ref = weakref.ref(pipe)  # a wrapped pipeline that nobody holds can go
        self._factor = 1000.0 if per_thousand else 1.0  # Flux is given timesteps from 0 to 1
        self._scheduler: Any = None
        self._layer = _Layer(None)
        self.reset()

    def reset(self) -> None:
        """A new call of the pipeline begins."""
        self.step = -1
        self.moved: Tensor | None = None
        self._stepped = True

    @property
    def _pipe(self) -> Any:
        return self._pipe_ref()

    @property
    def steps(self) -> int:
        """How many times the denoiser is called, by the scheduler."""
        return len(self._pipe.scheduler.timesteps)

    def tick(self, timestep: Any) -> bool:
        """Note a forward at this timestep. True where it is the step's first, the conditional one if there are two."""
        self._follow(self._pipe.scheduler)
        if not self._stepped:
            return False
        times = self._pipe.scheduler.timesteps.float().cpu()
        now = float(torch.as_tensor(timestep).flatten()[0]) * self._factor
        near = (times - now).abs()
        following = self.step + 1
        if following >= len(times) or near[following] > near.min() + 1e-3 * self._factor:
            following = int(near.argmin())  # image-to-image starts late, a restart begins anew
        self.step, self.moved, self._stepped = following, None, False
        return True

    def scale(self, timestep: Any) -> float:
        """The factor by which the scheduler scales latents for the denoiser."""
        rescale = getattr(self._pipe.scheduler, "scale_model_input", None)
        if rescale is None:
            return 1.0
        time = self._pipe.scheduler.timesteps[self.step]
        return float(rescale(torch.ones((), dtype=torch.float64, device=time.device), time))

    def _follow(self, scheduler: Any) -> None:
        """Let the scheduler's own step go on from the moved latents."""
        if scheduler is self._scheduler:
            return
        self.release()
        own = scheduler.step
        layer = _Layer(scheduler.__dict__.get("step"))  # another pipeline's, where two share a scheduler
        names = ("model_output", "timestep", "sample")

        @functools.wraps(own)
        def step(*args: Any, **kwargs: Any) -> Any:
            moved, self.moved, self._stepped = self.moved, None, True
            if moved is None or layer.off:
                return own(*args, **kwargs)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            sample = given["sample"]
            if sample.shape != moved.shape:
                raise CannotEdit(
                    f"guidance moved latents of shape {tuple(moved.shape)}, but the scheduler steps "
                    f"{tuple(sample.shape)}: {type(self._pipe).__name__} is not supported"
                )
            given["sample"] = (sample + moved).to(sample.dtype)
            return own(*args[3:], **given)

        scheduler.__dict__["step"] = step
        self._scheduler, self._layer = scheduler, layer
        step.__dict__["layer"] = layer

    def release(self) -> None:
        """Leave the scheduler as it was, or to the other pipelines that still follow it."""
        if self._scheduler is None:
            return
        self._layer.off = True
        top = self._scheduler.__dict__.pop("step", None)
        while top is not None and getattr(top, "layer", None) is not None and top.layer.off:
            top = top.layer.below
        if top is not None:
            self._scheduler.__dict__["step"] = top
        self._scheduler = None
