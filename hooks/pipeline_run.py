"""Put interventions on a diffusers pipeline and take them off: `Run` for pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .attached import Attached
from .diffusion import DiffusionEngine, LatentContribution, diffusion_engine_of
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


class PipelineRun(Attached[DiffusionEngine, LatentContribution]):
    """Interventions on one pipeline. Use it in a `with` statement; it restores the pipeline on any exit."""

    def __init__(self, pipe: Any, interventions: Sequence[Any]) -> None:
        engine = diffusion_engine_of(pipe)
        super().__init__(engine, type(pipe).__name__, [_contribution(item, engine) for item in interventions])

    def report(self) -> PipelineReport:
        """Which steps and modules were edited, and the losses."""
        return PipelineReport(self._model_name, self._contributions)


def _contribution(item: Any, engine: DiffusionEngine) -> LatentContribution:
    if isinstance(item, (Attend, Guidance, Watch)):
        return LatentContribution(type(item).__name__, (item,))
    return LatentContribution(item.name, tuple(item.edits(engine.denoiser)))
