"""The Triton kernels compiled for NVIDIA cards that need not be here: registers, spills, tensor cores.

The launches are those that the backend makes, taken from it; the machine code is read with the tools that
come with Triton.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not on this platform")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from regard.kernels import triton_split  # noqa: E402
from regard.kernels.groups import Groups  # noqa: E402
from regard.kernels.policies import Drop, HeadScale, Policy, Redistribute  # noqa: E402
from regard.kernels.problem import Problem  # noqa: E402
from regard.kernels.triton_plan import Launch, config_for  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MISSING = [name for name in ("cuobjdump", "nvdisasm") if not (TOOLS / name).is_file()]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"this Triton comes without {', '.join(MISSING)}"),
    pytest.mark.skipif(
        not isinstance(triton_split.split_kernel, triton.JITFunction), reason="runs under TRITON_INTERPRET"
    ),
]
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
MMA = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")


def problem(dtype: torch.dtype, rows: int, width: int) -> Problem:
    """LLaVA's layout: text, image with a sink, text."""
    ids = torch.zeros(1, 640, dtype=torch.uint8)
    ids[:, 35:611], ids[:, 100] = 1, 2
    query = torch.empty(1, 28, rows, width, dtype=dtype)
    key, value = torch.empty(2, 1, 4, 640, width, dtype=dtype)
    return Problem(query, key, value, Groups(ids, 4), Redistribute(), width**-0.5, causal=rows > 1)


def launches(case: Problem) -> tuple[Launch, Launch]:
    """The two launches of a problem."""
    config = config_for(case.query.dtype, case.query.shape[3])
    split, table = triton_split.split_launch(case, config)
    batch, heads, rows, _ = case.shape
    masses = torch.empty(batch, heads, rows, case.groups.count)
    named = triton_split.inside(case.policy, masses)
    assert named is not None
    part, lse = split.arguments["part"], split.arguments["lse"]
    return split, triton_split.merge_launch(part, lse, table, torch.empty_like(case.query), masses, named)


def source(launch: Launch) -> ASTSource:
    """What Triton would compile for a launch: types, constants, and which integers 16 divides."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        special = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or (special and value == 1):
            signature[parameter.name], constants[index,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[index,] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
            if special and value % 16 == 0:
                attributes[index,] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def compiled(launch: Launch, arch: int, folder: Path) -> tuple[int, int, str]:
    """Registers, bytes of stack and the machine code."""
    binary = triton.compile(source(launch), GPUTarget("cuda", arch, 32), launch.options).asm["cubin"]
    file = folder / "kernel.cubin"
    file.write_bytes(binary)
    usage = _tool("cuobjdump", "--dump-resource-usage", file)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    return registers, stack, _tool("nvdisasm", "-c", file)


def _tool(name: str, *arguments: str | Path) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def loop_spills(code: str) -> list[str]:
    """The spill instructions between the target of a backward branch and the branch."""
    lines = [line for line in code.splitlines() if re.search(r"^\s*(/\*[0-9a-f]{4,}\*/|\.L\w+:)", line)]
    labels = {line.strip().rstrip(":"): at for at, line in enumerate(lines) if line.lstrip().startswith(".L")}
    inside: set[int] = set()
    for at, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*?\((\.L\w+)\)", line)
        if target and labels[target[1]] < at - 1:  # the branch to itself at the end is no loop
            inside.update(range(labels[target[1]], at))
    assert inside, "a kernel without a loop: the machine code was not understood"
    return [lines[at].strip() for at in sorted(inside) if re.search(r"\b(LDL|STL)\b", lines[at])]


# dtype, rows, width: decoding and the causal tail of a prompt
HALF = [(torch.bfloat16, 1, 128), (torch.float16, 40, 128), (torch.bfloat16, 40, 64)]


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(("dtype", "rows", "width"), HALF)
def test_splits_in_half_precision(
    arch: int, dtype: torch.dtype, rows: int, width: int, tmp_path: Path
) -> None:
    registers, _, code = compiled(launches(problem(dtype, rows, width))[0], arch, tmp_path)
    assert registers <= 255
    assert not loop_spills(code)
    assert MMA.search(code), "no tensor-core instruction"


def test_a_split_with_everything_added(tmp_path: Path) -> None:
    terms = {"mask": torch.zeros(1, 28, 40, 640), "group_bias": torch.zeros(28, 4)}
    case = replace(problem(torch.bfloat16, 40, 128), allow=torch.ones(1, 40, 4, dtype=torch.bool), **terms)
    registers, _, code = compiled(launches(case)[0], 90, tmp_path)
    assert registers <= 255
    assert not loop_spills(code)
    assert MMA.search(code), "no tensor-core instruction"


def test_splits_in_single_precision(tmp_path: Path) -> None:
    registers, _, code = compiled(launches(problem(torch.float32, 40, 128))[0], 90, tmp_path)
    assert registers <= 255
    assert not loop_spills(code)


@pytest.mark.parametrize(
    ("arch", "policy"),
    [(80, Redistribute()), (90, Drop((2,))), (90, HeadScale(torch.ones(28))), (100, Redistribute())],
)
def test_merge(arch: int, policy: Policy, tmp_path: Path) -> None:
    case = replace(problem(torch.bfloat16, 40, 128), policy=policy)
    registers, _, code = compiled(launches(case)[1], arch, tmp_path)
    assert registers <= 255
    assert not loop_spills(code)


def test_a_tile_that_spills_is_seen(tmp_path: Path) -> None:
    """The gate itself: a tile too large for the registers."""
    split = launches(problem(torch.float32, 40, 128))[0]
    large = split._replace(arguments={**split.arguments, "BM": 32, "BN": 32})
    assert loop_spills(compiled(large, 90, tmp_path)[2])
