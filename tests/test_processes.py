"""Several processes share a run: real `accelerate launch`, the same files and scores as one process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from accelerate import PartialState

import regard
from regard.evals.processes import processes
from regard.evals.run_folder import EvalError, RunFolder

ROOT = Path(__file__).resolve().parents[1]
BENCH = [
    "pope",
    "chair",
    "--model",
    "miniature",
    "--recipes",
    "none,vhr",
    "--items",
    "3",
    "--batch-size",
    "4",
]
OPTIONS = {"items": 3, "batch_size": 4, "max_new_tokens": 12, "progress": False}
NAMES = ("pope-none", "pope-vhr", "chair-none", "chair-vhr")


def launch(out: Path, processes: int = 2) -> subprocess.Popen[str]:
    """A run of the command line by so many processes."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        str(processes),
    ]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "regard"]
    command += ["bench", *BENCH, "--max-new-tokens", "12", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run by one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    model = regard.load_miniature("lvlm")
    return regard.evaluate(*model, ["pope", "chair"], ["none", "vhr"], out=out, **OPTIONS)


def untimed(folder: Path, name: str) -> list[dict]:
    """The lines of an items file, without the seconds."""
    rows = map(json.loads, (folder / "items" / f"{name}.jsonl").read_text().splitlines())
    return [{**row, "seconds": None} for row in rows]


def test_two_processes_write_what_one_does(alone, tmp_path):
    child = launch(tmp_path / "run")
    said, _ = child.communicate(timeout=300)
    assert child.returncode == 0, said
    assert said.count("Page: ") == 1
    for name in NAMES:
        assert untimed(tmp_path / "run", name) == untimed(alone.path, name)
    assert not list((tmp_path / "run" / "items").glob("rank-*/*"))
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]
    for benchmark, recipes in alone.metrics.items():
        for recipe, metrics in recipes.items():
            assert found[benchmark][recipe]["scores"] == metrics["scores"]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["sessions"][0]["processes"] == 2
    assert {key: config[key] for key in ("data", "model", "recipes")} == {
        key: alone.config[key] for key in ("data", "model", "recipes")
    }


def test_two_killed_processes_are_finished_by_one(alone, tmp_path):
    out = tmp_path / "run"
    child = launch(out)
    limit = time.time() + 200
    while time.time() < limit and not list(out.glob("items/rank-1/pope-*.jsonl")):
        time.sleep(0.01)
    for process in [child, *psutil.Process(child.pid).children(recursive=True)]:
        os.kill(process.pid, signal.SIGKILL)
    child.communicate()
    parts = {part: part.read_bytes() for part in out.glob("items/rank-*/*.jsonl")}
    assert parts
    model = regard.load_miniature("lvlm")
    results = regard.evaluate(*model, ["pope", "chair"], ["none", "vhr"], out=out, **OPTIONS)
    assert not [part for part in parts if part.exists()]
    for content in parts.values():  # what was done is kept, not done again
        for line in content.splitlines(keepends=True)[:-1]:
            files = (out / "items").glob("*.jsonl")
            assert sum(line in file.read_bytes().splitlines(keepends=True) for file in files) == 1
    for benchmark, recipes in alone.metrics.items():
        for recipe in recipes:
            done, whole = results.items(benchmark, recipe), alone.items(benchmark, recipe)
            assert {k: v["answer"] for k, v in done.items()} == {k: v["answer"] for k, v in whole.items()}
            assert results.metrics[benchmark][recipe]["scores"] == recipes[recipe]["scores"]


def test_a_model_spread_over_memory_and_disk_answers_the_same(alone, tmp_path):
    """What `--device auto` does when a model does not fit: accelerate's hooks move its parts in and out."""
    from transformers import AutoModelForImageTextToText

    model, processor = regard.load_miniature("lvlm")
    spread = AutoModelForImageTextToText.from_pretrained(
        model.name_or_path, device_map="auto", max_memory={"cpu": "4MB"}, offload_folder=tmp_path / "parts"
    ).eval()
    assert {"cpu", "disk"} <= set(spread.hf_device_map.values())
    found = regard.evaluate(spread, processor, "chair", ["vhr"], out=tmp_path / "run", **OPTIONS)
    for recipe in ("none", "vhr"):
        assert untimed(found.path, f"chair-{recipe}") == untimed(alone.path, f"chair-{recipe}")


def test_parts_are_joined_in_order_and_once(tmp_path):
    config = {"benchmarks": ["pope"], "recipes": {"none": []}, "sessions": []}
    config |= {key: {} for key in ("prompts", "generation", "data")}
    folder = RunFolder.create(tmp_path / "run", config)
    folder.append("pope", "none", [{"id": "a"}])
    folder.append("pope", "none", [{"id": "d"}, {"id": "a", "again": True}], rank=0)
    folder.append("pope", "none", [{"id": "c"}, {"id": "b"}], rank=1)
    torn = tmp_path / "run" / "items" / "rank-1" / "pope-none.jsonl"
    torn.write_bytes(torn.read_bytes() + b'{"id": "e", "ans')
    folder.join("pope", "none", "abcde")
    assert list(folder.read_items("pope", "none").values()) == [{"id": i} for i in "abcd"]
    places = folder.places("pope", "none")
    assert [row["id"] for row in folder.stream("pope", "none", [places[i] for i in "cab"])] == ["c", "a", "b"]
    assert not torn.exists()
    folder.close()


def test_several_processes_need_a_common_folder(monkeypatch):
    processes()
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 2)
    with pytest.raises(EvalError, match="2 processes need a folder that they share"):
        regard.evaluate(*regard.load_miniature("lvlm"), "chair", [], **OPTIONS)
