"""Put interventions on a diffusers pipeline and take them off: `Run` for pipelines."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from .diffusion import DiffusionEngine, LatentContribution, diffusion_engine_of
from .errors import CannotEdit
from .latent_edits import Attend, Guidance, Watch


@dataclass(frozen=True)
class PipelineReport:
    """What a run did on a pipeline."""

    pipeline: str
    contributions: Sequence[LatentContribution]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: one record an intervention; losses by step, one an image, before the step's update."""
        return {
            "pipeline": self.pipeline,
            "interventions": [
                {
                    "intervention": each.name,
                    "gradients": each.gradients,
                    "losses": {str(step): losses for step, losses in each.losses.items()},
                    "attention_calls": each.forwards,
                    "sites": sorted(each.sites),
                }
                for each in self.contributions
            ],
        }

    def __str__(self) -> str:
        names = ", ".join(each.name for each in self.contributions) or "null edit"
        lines = [f"{self.pipeline}, attention by sdpa: {names}"]
        for each in self.contributions:
            parts = []
            if each.losses:
                first, last = min(each.losses), max(each.losses)
                means = [sum(each.losses[step]) / len(each.losses[step]) for step in (first, last)]
                parts.append(
                    f"{len(each.losses)} steps guided with {each.gradients} gradients, "
                    f"loss {means[0]:.3f} at step {first}, {means[1]:.3f} at step {last}"
                )
            if each.forwards:
                parts.append(f"{each.forwards} attention calls changed in {len(each.sites)} modules")
            lines.append(f"  {each.name}: {'; '.join(parts) or 'did not act'}")
        return "\n".join(lines)


class PipelineRun:
    """Interventions on one pipeline. Use it in a `with` statement; it restores the pipeline on any exit."""

    def __init__(self, pipe: Any, interventions: Sequence[Any]) -> None:
        engine = diffusion_engine_of(pipe)
        self._engine_of_pipe = weakref.ref(engine)
        self._name = type(pipe).__name__
        self._contributions = [_contribution(item, engine) for item in interventions]
        self._on = False

    def __enter__(self) -> PipelineRun:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Attach. Nothing is changed when this raises."""
        if self._on:
            raise RuntimeError("this run is on already; make a new one with regard.apply")
        engine = self._engine_of_pipe()
        if engine is None:
            raise CannotEdit(f"the {self._name} of this run is gone: keep a reference to it")
        engine.add(self._contributions)
        self._on = True

    def stop(self) -> None:
        """Detach. With the last run gone the pipeline is bit-exactly as before."""
        engine = self._engine_of_pipe()
        if self._on and engine is not None:
            engine.remove(self._contributions)
        self._on = False

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within this block the run's edits rest: the baseline from the same pipeline."""
        before = [each.on for each in self._contributions]
        self._switch([False] * len(before))
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, states: Sequence[bool]) -> None:
        for contribution, state in zip(self._contributions, states, strict=True):
            contribution.on = state
        engine = self._engine_of_pipe()
        if self._on and engine is not None:
            engine.watch()

    def report(self) -> PipelineReport:
        """Which steps and modules were edited, and the losses."""
        return PipelineReport(self._name, self._contributions)


def _contribution(item: Any, engine: DiffusionEngine) -> LatentContribution:
    if isinstance(item, (Attend, Guidance, Watch)):
        return LatentContribution(type(item).__name__, (item,))
    return LatentContribution(item.name, tuple(item.edits(engine.denoiser)))


_wrapped: weakref.WeakKeyDictionary[Any, list[PipelineRun]] = weakref.WeakKeyDictionary()


def wrap(pipe: Any, interventions: Sequence[Any]) -> Any:
    """Attach until `unwrap`; returns the same object."""
    run = PipelineRun(pipe, interventions)
    run.start()
    _wrapped.setdefault(pipe, []).append(run)
    return pipe


def unwrap(pipe: Any) -> Any:
    """Take off all that `wrap` attached, newest first."""
    for run in reversed(_wrapped.pop(pipe, [])):
        run.stop()
    return pipe
