"""What a run did, as text and as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from .plan import NO_LAYER, Tally


@dataclass(frozen=True)
class Report:
    """Counts of one run. `stock` is the attention that the model had before."""

    model: str
    stock: str
    interventions: Sequence[str]
    tallies: Sequence[Tally]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: one record per intervention, edit and layer."""
        return {
            "model": self.model,
            "attention": "sdpa",
            "attention_before": self.stock,
            "interventions": list(self.interventions),
            "layers": [_record(tally) for tally in self.tallies],
        }

    def __str__(self) -> str:
        was = "" if self.stock == "sdpa" else f" (was {self.stock})"
        lines = [f"{self.model}, attention by sdpa{was}: {', '.join(self.interventions) or 'null edit'}"]
        ordered = sorted(self.tallies, key=lambda t: (t.intervention, t.edit, t.path))
        for (name, edit, path), group in groupby(ordered, key=lambda t: (t.intervention, t.edit, t.path)):
            acted = [tally for tally in group if tally.prefill or tally.decode]
            if not acted:
                lines.append(f"  {name}/{edit}: did not act")
                continue
            layers = [tally.layer for tally in acted if tally.layer != NO_LAYER]
            backends = ", ".join(sorted(set().union(*(tally.backends for tally in acted))))
            path = f"{path} ({backends})" if backends else path
            where = f"layers {ranges(layers)}; {path}" if layers else path
            line = f"  {name}/{edit}: {where}; prefills {acted[0].prefill}"
            line += f", decode steps {acted[0].decode}"
            heads = [count for tally in acted if (count := _heads(tally)) is not None]
            if heads:
                line += f"; heads a layer {min(heads):g} to {max(heads):g} (newest prompt)"
            line += f"; rows a layer {acted[0].rows}"
            shares = [share for tally in acted if (share := _share(tally)) is not None]
            if shares:
                line += f"; changed {min(shares):.0%} to {max(shares):.0%} of heads and rows"
            lines.append("; ".join([line, *sorted({tally.note for tally in acted if tally.note})]))
        return "\n".join(lines)


def _heads(tally: Tally) -> float | None:
    """Mean number of edited heads per sample in the newest forward."""
    return None if tally.gain is None else float((tally.gain != 1).sum(-1).float().mean())


def _share(tally: Tally) -> float | None:
    """Share of the pairs of head and row that a policy changed; None for other edits."""
    return float(tally.changed / tally.offered) if int(tally.offered) else None


def _record(tally: Tally) -> dict[str, Any]:
    return {
        "intervention": tally.intervention,
        "edit": tally.edit,
        "layer": tally.layer,
        "path": tally.path,
        "backends": sorted(tally.backends),
        "prefills": tally.prefill,
        "decode_steps": tally.decode,
        "rows": tally.rows,
        "heads": _heads(tally),
        "changed": _share(tally),
        **({"note": tally.note} if tally.note else {}),
    }


def ranges(numbers: Sequence[int]) -> str:
    """ "1, 18-31" for 1, 18, 19 ... 31."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
