"""What a recipe costs in a run: tokens a second, and peak memory, beside the baseline's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """The most memory that was in use since `start`, in bytes: of the GPU where there is one, else of the process.

    The process is asked on Linux only, which can set its high-water mark back.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        """Forget the peak so far."""
        if self.device.type == "cuda":
            for index in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(index)
            return
        try:
            _CLEAR.write_text("5", encoding="ascii")
        except OSError:
            self.device = torch.device("meta")  # unknown

    def peak(self) -> int | None:
        """Bytes, or None where it cannot be known."""
        if self.device.type == "cuda":
            return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
        if self.device.type != "cpu" or not _STATUS.is_file():
            return None
        lines = _STATUS.read_text(encoding="ascii").splitlines()
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
        return found[0] if found else None


def speed(found: Mapping[str, Any]) -> float | None:
    """Generated tokens a second of one recipe's metrics."""
    return found["tokens"] / found["seconds"] if found["seconds"] else None


def cost_cells(found: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, str]:
    """Speed and memory of one recipe as they are shown, relative to the baseline in brackets."""
    own, plain = speed(found), speed(baseline)
    cells = {"tokens/s": "–", "time of a token": "–", "peak memory": "–"}
    if own and plain:
        cells["tokens/s"] = f"{own:.0f}"
        cells["time of a token"] = f"{plain / own:.2f}x"
    peak, before = found.get("peak_memory"), baseline.get("peak_memory")
    if peak and before:
        cells["peak memory"] = f"{peak / 2**20:,.0f} MiB ({peak / before:.2f}x)"
    return cells
