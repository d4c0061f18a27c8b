"""What the GPU benchmarks share: the device, options, and results that are written as they come."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import random
import sys
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def about(device: torch.device) -> dict[str, Any]:
    """Device, versions and command, without the place of the output file."""
    words = iter(sys.argv[1:])
    kept = [word for word in words if not (word == "--out" and next(words, None))]
    found: dict[str, Any] = {"command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *kept])}
    found["device"] = f"{platform.machine()} CPU, one thread, process time"
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name()
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    found |= {"date": date.today().isoformat(), "python": platform.python_version()}
    for name in ("torch", "triton", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


class Results:
    """What is known so far, written after each step, and the time that is left."""

    def __init__(self, kind: str, given: argparse.Namespace, device: torch.device) -> None:
        self.found, self.file, self.start = about(device), given.out, time.monotonic()
        self.seconds, self.longest, self.last = 60 * given.minutes, 0.0, self.start
        if self.file is None and device.type == "cuda":
            card = self.found["device"].lower().replace(" ", "-")
            self.file = Path(__file__).parent / "results" / f"gpu-{kind}-{card}-{self.found['date']}.json"

    def add(self, name: str, line: dict[str, Any]) -> None:
        """Print a line, put it at the end of a list and write the file."""
        self.found.setdefault(name, []).append(line)
        print(json.dumps(line), flush=True)
        if self.file:
            self.file.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")

    def left(self) -> float:
        """Seconds of the budget."""
        return self.start + self.seconds - time.monotonic()

    def room(self, name: str) -> bool:
        """Whether a step as long as the longest so far still fits; notes its name where not."""
        now = time.monotonic()
        self.longest, self.last = max(self.longest, now - self.last), now
        if self.longest < self.left():
            return True
        self.add("left_out", {"case": name})
        return False


def options(doc: str | None, minutes: float, rounds: int) -> argparse.ArgumentParser:
    """Those that the GPU benchmarks share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--minutes", type=float, default=minutes, help="start nothing that would end later")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--out", type=Path, help="JSON file; with a GPU it has a name in benchmarks/results/")
    return parser


def device_of(name: str) -> torch.device:
    """The device; a CPU works with one thread."""
    random.seed(0)
    device = torch.device(
        "cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu")
    )
    if device.type == "cpu":
        torch.set_num_threads(1)
    return device
