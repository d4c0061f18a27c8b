"""The command line: it answers quickly, works end to end on the miniature, and errors are one short message."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from regard import cli
from regard.evals.loading import load_model

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(part) for part in arguments])


def test_help_is_quick_and_has_examples():
    code = (
        "import sys; sys.argv = ['regard', '--help']\n"
        "from regard.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in ("demo", "bench", "report", "recipes", "doctor"):
        assert f" {name} " in done.stdout
    for name in ("demo", "bench", "report", "recipes", "doctor"):
        assert "Example: regard" in " ".join(run(name, "--help").output.split())


def test_demo_then_report(tmp_path):
    out = tmp_path / "demo"
    done = run("demo", "--items", 2, "--out", out)
    assert done.exit_code == 0, done.output
    for part in (
        "POPE: 36 questions, 2 images",
        "CHAIR: 2 captions, 2 images",
        "mean F1",
        "CHAIR_I",
        "vhr",
        "var",
    ):
        assert part in done.output
    assert str(out / "report.html") in done.output.replace("\n", "")
    metrics = json.loads((out / "metrics.json").read_text())["metrics"]
    assert list(metrics["chair"]) == ["none", "vhr", "var"]
    page = (out / "report.html").read_text()
    (out / "report.html").unlink()
    done = run("report", out)
    assert done.exit_code == 0, done.output
    assert (out / "report.html").read_text() == page


def test_bench_on_a_folder(tmp_path):
    from regard.evals.miniature.coco import coco_files

    data = coco_files(tmp_path / "data", 3, seed=90)
    options = ["--model", "miniature", "--data", data, "--out", tmp_path / "run", "--max-new-tokens", 8]
    done = run("bench", "chair", *options, "--recipes", "vhr:alpha=1.5", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "CHAIR: 3 captions, 3 images" in done.output
    assert "prove nothing about a 7B model" in " ".join(
        done.output.split()
    )  # other data, but the small model
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["recipes"]["vhr:alpha=1.5"][0]["alpha"] == 1.5
    assert config["source"] == str(data)
    done = run("bench", "chair", *options, "--seed", 4)
    assert done.exit_code == 2
    assert "another seed: it has 0, now 4" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["bench", "pop", "--model", "miniature", "--out", "OUT"],
            "unknown benchmark 'pop': did you mean 'pope'?",
        ),
        (["bench", "pope", "--model", "miniature", "--out", "OUT", "--recipes", "vrh"], "did you mean 'vhr'"),
        (["bench", "pope", "--model", "no/such-folder/x", "--out", "OUT"], "no/such-folder/x"),
        (
            ["bench", "pope", "--model", "miniature", "--out", "OUT", "--data", "nowhere"],
            "no data folder nowhere",
        ),
        (
            ["bench", "pope", "--model", "miniature", "--out", "OUT", "--dtype", "flaot16"],
            "did you mean 'float16'",
        ),
        (["report", "OUT"], "is not there"),
        (["recipes", "vrh"], "did you mean 'vhr'"),
    ],
)
def test_errors_are_one_short_message(arguments, message, tmp_path):
    arguments = [str(tmp_path / "run") if part == "OUT" else part for part in arguments]
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_debug_shows_the_trace(tmp_path):
    with pytest.raises(ValueError, match="is not there"):
        CliRunner().invoke(cli.app, ["--debug", "report", str(tmp_path / "x")], catch_exceptions=False)


def test_debug_may_stand_anywhere(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["regard", "report", str(tmp_path / "x"), "--debug"])
    with pytest.raises(ValueError, match="is not there"):
        cli.main()


def test_recipes_and_doctor_and_version():
    done = run("recipes", "v*")
    assert done.exit_code == 0
    assert "2412.13949" in done.output.replace("\n", "")
    assert "none" not in done.output.split()[:12]
    done = run("doctor")
    assert done.exit_code == 0, done.output
    assert "Llava" in done.output
    assert run("--version").output.startswith("regard ")


def test_load_model_from_a_folder(tmp_path):
    import regard

    model, processor = regard.load_miniature("lvlm")
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    again, _ = load_model(str(tmp_path / "m"), "float32", "cpu")
    assert type(again) is type(model)
    assert not again.training
