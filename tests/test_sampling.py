"""Runs that draw tokens or search with beams, their control row, and what a recipe costs."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

import regard
from regard.evals import data as eval_data
from regard.evals.benchmarks import BENCHMARKS
from regard.evals.cost import PeakMemory, cost_cells
from regard.evals.miniature import load_miniature
from regard.evals.run_folder import EvalError
from regard.evals.settings import make_settings, with_controls

OPTIONS = {"items": 4, "batch_size": 3, "max_new_tokens": 10, "progress": False}


@pytest.fixture(scope="module")
def miniature():
    return load_miniature("lvlm")


@pytest.fixture(scope="module")
def drawn(miniature, tmp_path_factory):
    out = tmp_path_factory.mktemp("drawn") / "run"
    return regard.evaluate(*miniature, "chair", ["vcd", "vhr"], out=out, temperature=3.0, **OPTIONS)


def answers(results, recipe="none"):
    return {name: item["answer"] for name, item in results.items("chair", recipe).items()}


def test_draws_can_be_repeated_and_leave_the_callers_alone(drawn, miniature, tmp_path):
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    again = regard.evaluate(*miniature, "chair", ["none"], out=tmp_path / "a", temperature=3.0, **OPTIONS)
    assert torch.equal(torch.rand(1), expected)
    assert answers(again) == answers(drawn)
    greedy = regard.evaluate(*miniature, "chair", ["none"], out=tmp_path / "b", **OPTIONS)
    assert answers(greedy) != answers(drawn)
    other = regard.evaluate(
        *miniature, "chair", ["none"], out=tmp_path / "c", temperature=3.0, **OPTIONS | {"batch_size": 4}
    )
    assert answers(other) != answers(drawn)


def test_a_batch_that_was_torn_is_drawn_again_whole(drawn, miniature, tmp_path):
    folder = drawn.save(tmp_path / "copy")
    file = folder / "items" / "chair-none.jsonl"
    rows = file.read_text().splitlines()
    file.write_text("\n".join([rows[0], *rows[2:]]) + "\n")
    resumed = regard.evaluate(*miniature, "chair", ["vcd", "vhr"], out=folder, temperature=3.0, **OPTIONS)
    assert answers(resumed) == answers(drawn)
    assert len(file.read_text().splitlines()) == len(rows)


def test_a_draw_in_another_batch_size_is_refused(drawn, miniature, tmp_path):
    folder = drawn.save(tmp_path / "copy")
    with pytest.raises(EvalError, match="generation"):
        regard.evaluate(
            *miniature, "chair", ["none"], out=folder, temperature=3.0, **OPTIONS | {"batch_size": 4}
        )


def test_contrastive_recipes_bring_their_control(drawn, miniature):
    assert list(drawn.config["recipes"]) == ["none", "plausible", "vcd", "vhr"]
    assert answers(drawn, "plausible") != answers(drawn)
    model, _ = miniature
    labels = [
        setting.label
        for setting in with_controls(make_settings("vhr,vcd:beta=0.3,pai,damro,vcd:beta=0.0", model))
    ]
    assert labels[:3] == ["none", "plausible:beta=0.3", "plausible"]
    given = with_controls(make_settings("plausible,vcd", model))
    assert [setting.label for setting in given] == ["none", "plausible", "vcd"]


def test_beams_are_those_of_generate_with_and_without_opera(miniature, tmp_path):
    options = OPTIONS | {"items": 1, "batch_size": 1, "max_new_tokens": 24}
    opera = regard.OPERA(penalty_weight=30.0)
    found = regard.evaluate(
        *miniature, "chair", {"penalised": opera}, out=tmp_path / "run", num_beams=3, **options
    )
    model, processor = miniature
    row = next(iter(found.items("chair").values()))
    scenes = eval_data.load_data("miniature", ["chair"], 1, 0, tmp_path / "scenes", {"truth_words": "regard"})
    image = Image.open(scenes.files[row["image"]]).convert("RGB")
    inputs = processor(images=[image], text=[row["prompt"]], return_tensors="pt")

    def said() -> str:
        ids = model.generate(**inputs, max_new_tokens=24, num_beams=3, do_sample=False)
        return processor.tokenizer.decode(
            ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        ).strip()

    assert row["answer"] == said()
    with regard.apply(model, opera):
        assert next(iter(found.items("chair", "penalised").values()))["answer"] == said() != row["answer"]
    assert found.config["generation"]["chair"]["num_beams"] == 3


def test_costs_stand_beside_the_scores(drawn):
    plain, other = drawn.metrics["chair"]["none"], drawn.metrics["chair"]["vcd"]
    cells = cost_cells(other, plain)
    ratio = plain["tokens"] / plain["seconds"] * other["seconds"] / other["tokens"]
    assert cells["time of a token"] == f"{ratio:.2f}x"
    report = json.loads((drawn.path / "reports" / "chair-vcd.json").read_text())
    assert report["peak_memory"] == other["peak_memory"]
    assert cells["time of a token"] in drawn.table()
    assert "time of a token" in drawn.page.read_text()
    assert cost_cells({"tokens": 0, "seconds": 0}, plain)["tokens/s"] == "–"


def test_peak_memory_sees_what_was_held_for_a_moment():
    memory = PeakMemory(torch.device("cpu"))
    memory.start()
    before = memory.peak()
    if before is None:
        pytest.skip("this system does not say how much memory was in use")
    held = torch.ones(64 * 2**18)  # 64 MiB
    del held
    assert memory.peak() - before > 48 * 2**20
    memory.start()
    assert memory.peak() - before < 32 * 2**20


def test_repetition_is_seen(drawn):
    loop = next(iter(drawn.items("chair").values())) | {"answer": "a dog and a dog and a dog and a dog"}
    counted = BENCHMARKS["chair"].count([loop], drawn.data("chair"), drawn.config["scoring"])
    score = next(score for score in drawn.scores("chair") if score.key == "repetition")
    assert score.metric(counted.counts.sum(0)) == 5 / 8


def test_opera_without_beams_is_refused_before_anything_runs(miniature, tmp_path):
    with pytest.raises(EvalError, match="num_beams=5 and batch_size=1"):
        regard.evaluate(*miniature, "chair", ["vhr", "opera"], out=tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_agla_finds_a_matcher_for_the_miniature(miniature, tmp_path):
    options = OPTIONS | {"max_new_tokens": 60}
    found = regard.evaluate(*miniature, "chair", ["agla"], out=tmp_path / "run", **options)
    assert found.config["recipes"]["agla"][0]["matcher"] == "AttentionMatcher(layers=(2, 3), similarity=0.5)"
    again = regard.evaluate(*miniature, "chair", ["agla"], out=tmp_path / "run", **options)
    assert answers(again, "agla") == answers(found, "agla")
    assert answers(found, "agla") != answers(found)


@pytest.mark.parametrize("change", [{"temperature": -1.0}, {"temperature": float("nan")}, {"num_beams": 0}])
def test_bad_settings(miniature, tmp_path, change):
    with pytest.raises(EvalError, match=next(iter(change))):
        regard.evaluate(*miniature, "chair", out=tmp_path / "run", **OPTIONS, **change)
    assert not (tmp_path / "run").exists()
