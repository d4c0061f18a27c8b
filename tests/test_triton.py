"""The Triton backend: its cases in a process of its own under the interpreter, its plan and its errors here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regard.kernels.groups import Groups
from regard.kernels.policies import Drop
from regard.kernels.problem import Unsupported
from regard.kernels.reweighted import reweighted_attention
from regard.kernels.triton_plan import MANY, plan, split_size

CPU = torch.device("cpu")


def test_cases_in_the_interpreter() -> None:
    """TRITON_INTERPRET acts where Triton is imported, so it is set for another process and not for this one."""
    pytest.importorskip("triton", reason="Triton is not on this platform")
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", folder / "triton_cases.py"],
        cwd=folder.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def served(groups: Groups, size: int) -> torch.Tensor:
    """How often each key of each sample is served, by splits of its own group."""
    found = plan(groups, size, CPU)
    times = torch.zeros(groups.ids.shape, dtype=torch.long)
    for sample, ids in enumerate(groups.ids.tolist()):
        own = sample if found.table.shape[0] > 1 else 0
        for start, stop, group, gathered in found.table[own].tolist():
            keys = range(start, min(stop, groups.keys))
            if gathered:
                assert found.columns is not None
                keys = [key for key in found.columns[own, start:stop].tolist() if key >= 0]
            for key in keys:
                times[sample, key] += ids[key] == group
    return times


@pytest.mark.parametrize("run", [1, 5, 20, 60])
@pytest.mark.parametrize("size", [32, 256])
def test_every_key_is_served_once(run: int, size: int) -> None:
    ids = torch.randint(0, 4, (3, 900 // run)).repeat_interleave(run, 1)
    ids[:, 77] = 3
    assert (served(Groups(ids, 4), size) == 1).all()


def test_very_many_spans_make_few_splits() -> None:
    ids = (torch.arange(20 * 2 * MANY) // 20 % 4)[None]
    assert len(Groups(ids, 4).layouts[0].spans) > MANY
    assert plan(Groups(ids, 4), 512, CPU).table.shape[1] < MANY


def test_without_columns_nothing_is_gathered() -> None:
    ids = torch.zeros(2, 100, dtype=torch.long)
    ids[:, 30:60] = 1
    found = plan(Groups(ids, 2), 256, CPU)
    assert found.columns is None
    assert found.table[0, :, :3].tolist() == [[0, 30, 0], [30, 60, 1], [60, 316, 0]]
    assert found.table.shape[0] == 1


@pytest.mark.parametrize("last", [0, 1])
def test_a_decoded_token_keeps_the_plan(last: int) -> None:
    ids = torch.zeros(1, 100, dtype=torch.long)
    ids[:, 30:60], ids[:, 40], ids[:, 60:] = 1, 2, last
    groups = Groups(ids, 3)
    assert groups.layouts
    plans = [plan(groups.window(0, keys), 256, CPU) for keys in (101, 102, 150)]
    assert plans[0] is plans[1] is plans[2]
    for keys in (101, 150, 700):
        assert (served(groups.window(0, keys), 256) == 1).all()


def test_split_sizes() -> None:
    assert split_size(100, 1, 264, 256) == 256
    assert split_size(16384, 4, 264, 256) == 256
    assert split_size(16384, 32, 264, 256) == 2048
    assert split_size(16384, 1000, 264, 256) == 16384
    assert split_size(2049, 264, 264, 256) == 4096


def attend(**given: object) -> torch.Tensor:
    torch.manual_seed(1)
    query, key, value = torch.randn(3, 1, 2, 40, 16)
    groups = Groups((torch.arange(40) > 20).long()[None], 2)
    return reweighted_attention(query, key, value, groups, Drop((1,)), **given).out  # type: ignore[arg-type]


def test_a_cpu_tensor_is_refused_by_name_and_goes_elsewhere_by_itself() -> None:
    pytest.importorskip("triton", reason="Triton is not on this platform")
    with pytest.raises(Unsupported, match=r"needs a CUDA tensor, not one on cpu \(set TRITON_INTERPRET=1"):
        attend(backend="triton")
    assert torch.equal(attend(), attend(backend="torch"))
