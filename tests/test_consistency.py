"""Portraits and scenes of the miniature: equal noise, cosines against loops, a folder that goes on, and its report."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import regard
from regard import cli
from regard.evals.miniature import load_judge
from regard.evals.pictures.consistency import (
    ConsistencyResults,
    compose,
    cosines,
    evaluate_consistency,
    lane_of,
)
from regard.evals.pictures.drawn import load_drawn, noise
from regard.evals.pictures.subjects import evaluate_subjects, prompts

OPTIONS: dict[str, Any] = {"items": 4, "steps": 2, "progress": False}


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = regard.load_miniature("t2i")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def run(pipe: Any, tmp_path_factory: Any) -> ConsistencyResults:
    out = tmp_path_factory.mktemp("consistency") / "run"
    return evaluate_consistency(pipe, None, "ir_diffusion", out=out, **OPTIONS)


def pictures(run: ConsistencyResults, name: str, key: str) -> list[np.ndarray]:
    """Both portraits and the scene."""
    folder = run.folder.path / f"items/consistency-{name}"
    return [np.asarray(Image.open(folder / f"{key}{end}.png")) for end in ("-portrait-0", "-portrait-1", "")]


def by_hand(items: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The scores of each item in loops; NaN where an item has no portrait of a kind."""
    found: dict[str, list[float]] = {}
    for item in items:
        lanes, portraits = np.array(item["lanes"]), np.array(item["portraits"])
        kinds: list[list[Any]] = [[], []]
        for subject, name in enumerate(item["subjects"]):
            for one in items:
                if one is not item and name in one["subjects"]:
                    kinds[subject].append(np.array(one["portraits"][one["subjects"].index(name)]))

        def like(
            lane: int, subject: int, lanes: Any = lanes, portraits: Any = portraits, kinds: Any = kinds
        ) -> float:
            return float(np.mean([lanes[lane] @ each for each in (portraits[subject], *kinds[subject])]))

        crossed = like(1, 0) + like(0, 1) > like(0, 0) + like(1, 1)
        order = (1, 0) if crossed else (0, 1)
        own = (lanes[0] @ portraits[0] + lanes[1] @ portraits[1]) / 2
        other = (lanes[0] @ portraits[1] + lanes[1] @ portraits[0]) / 2
        less = [
            lanes[lane] @ portraits[subject] - np.mean([lanes[lane] @ each for each in kinds[subject]])
            for subject, lane in enumerate(order)
            if kinds[subject]
        ]
        row = {
            "own": own,
            "other": other,
            "own_less_other": own - other,
            "in_order": float(not crossed),
            "own_either": other if crossed else own,
            "own_less_kind": np.mean(less) if less else np.nan,
            "both": float(all(name in item["seen"] for name in item["subjects"])),
        }
        for key, value in row.items():
            found.setdefault(key, []).append(float(value))
    return found


# ---- what is drawn ----------------------------------------------------------------------------------


def test_the_plain_scene_is_the_stock_pipeline_s(pipe: Any, run: ConsistencyResults) -> None:
    item = run.items["none"]["2-3"]
    first, second = item["subjects"]
    texts = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in (first, second)]
    own = [noise(0, key) for key in ("2-3-portrait-0", "2-3-portrait-1", "2-3")]
    stock = pipe([*texts, item["prompt"]], generator=own, num_inference_steps=2, guidance_scale=7.5).images
    for want, found in zip(stock, pictures(run, "none", "2-3"), strict=True):
        assert np.array_equal(np.asarray(want), found)


def test_portraits_are_the_same_and_scenes_are_not(run: ConsistencyResults) -> None:
    for key in run.items["none"]:
        plain, joint = pictures(run, "none", key), pictures(run, "ir_diffusion", key)
        apart = [int(np.abs(one.astype(int) - two).max()) for one, two in zip(plain, joint, strict=True)]
        assert max(apart[:2]) <= 1, "the same noise, and no edit of portraits"
        assert apart[2] > 10


def test_scenes_have_the_noise_of_bench_subjects(pipe: Any, run: ConsistencyResults, tmp_path: Path) -> None:
    """One prompt of the two benchmarks; the joint batch's other rows change it by a rounding at most."""
    options = {**OPTIONS, "items": 1}
    evaluate_subjects(pipe, recipes="none", out=tmp_path / "run", counts=(2,), **options)
    alone = np.asarray(Image.open(tmp_path / "run/items/subjects-none/2-0.png")).astype(int)
    assert np.abs(alone - pictures(run, "none", "2-0")[2]).max() <= 1


# ---- scores -----------------------------------------------------------------------------------------


def test_scores_are_those_of_the_pictures(run: ConsistencyResults) -> None:
    judge = load_judge()
    for name in ("none", "ir_diffusion"):
        items = []
        for key, item in run.items[name].items():
            one, two, scene = pictures(run, name, key)
            left, right = (
                np.concatenate([half[:, :1].repeat(16, 1), half, half[:, -1:].repeat(16, 1)], 1)
                for half in (scene[:, :32], scene[:, 32:])
            )
            portraits, lanes = (
                judge.embed([Image.fromarray(each) for each in pair]).numpy()
                for pair in ((one, two), (left, right))
            )
            np.testing.assert_allclose(item["lanes"], lanes, atol=1e-5)
            np.testing.assert_allclose(item["portraits"], portraits, atol=1e-5)
            items.append({**item, "portraits": portraits, "lanes": lanes})
        for key, values in by_hand(items).items():
            (row,) = [row for row in run.rows if (row["score"], row["recipe"]) == (key, name)]
            if key != "own_less_kind":  # there, subjects count, not scenes
                assert row["value"]["value"] == pytest.approx(np.mean(values), abs=1e-4)
            assert row["scenes"] == np.isfinite(values).sum()
    rows = {(row["score"], row["recipe"]): row for row in run.rows}
    change = rows["own", "ir_diffusion"]["change"]
    assert change["value"] == pytest.approx(
        rows["own", "ir_diffusion"]["value"]["value"] - rows["own", "none"]["value"]["value"]
    )
    assert change["low"] <= change["value"] <= change["high"]
    assert 0 < change["p"] <= 1
    assert rows["own", "none"]["change"] is None


def test_cosines_are_loops() -> None:
    """Random embeddings, so that the orders cross and some subjects are alone of their kind."""
    rng = np.random.default_rng(0)
    names = [*"abcdefgh"]
    items = [
        {
            "id": str(number),
            "subjects": list(rng.choice(names, 2, replace=False)) if number else ["alone", "a"],
            "seen": list(rng.choice(names, 4)),
            **{key: rng.normal(size=(2, 5)).tolist() for key in ("lanes", "portraits")},
        }
        for number in range(12)
    ]
    items.append({**items[1], "id": "last", "subjects": ["one", "two"]})
    want = by_hand(items)
    assert set(want["in_order"]) == {0.0, 1.0}
    for key, found in cosines({item["id"]: item for item in items}).items():
        values = np.divide(found[:, 0], found[:, 1], out=np.full(13, np.nan), where=found[:, 1] > 0)
        np.testing.assert_allclose(values, want[key], atol=1e-12, err_msg=key)
    assert np.isnan(want["own_less_kind"][-1])
    assert list(cosines({item["id"]: item for item in items})["own_less_kind"][[0, -1], 1]) == [1, 0]


def test_a_lane_is_made_square_by_its_edges() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (10, 8, 3), np.uint8)
    image = Image.fromarray(pixels)
    tall = np.asarray(lane_of(image, (0.5, 0, 1, 1)))
    assert tall.shape == (10, 10, 3)
    assert np.array_equal(tall[:, 3:7], pixels[:, 4:])
    assert (tall[:, :3] == pixels[:, 4:5]).all()
    assert (tall[:, 7:] == pixels[:, 7:]).all()
    wide = np.asarray(lane_of(image, (0, 0.2, 1, 0.5)))
    assert wide.shape == (8, 8, 3)
    assert np.array_equal(wide[2:5], pixels[2:5])
    assert (wide[5:] == pixels[4:5]).all()


def test_the_judge_tells_subjects_and_colours_apart(run: ConsistencyResults) -> None:
    """Pictures drawn by program: their own portrait is nearest, then another of the subject, then another subject."""
    judge, work = load_judge(), prompts(2, 30, seed=3)
    found = cosines({item["id"]: compose(judge, item, seed=5) for item in work})
    mean = {key: values[:, 0].sum() / values[:, 1].sum() for key, values in found.items()}
    assert (found["own"][:, 0] > found["other"][:, 0]).mean() >= 0.95
    assert mean["own_less_other"] > 0.3
    assert mean["own_less_kind"] > 0.05
    assert mean["in_order"] > 0.95
    assert mean["both"] > 0.85
    rows = {row["score"]: row for row in run.rows if row["recipe"] == "composed"}
    assert rows["own"]["value"]["value"] > rows["other"]["value"]["value"] + 0.2


# ---- the folder -------------------------------------------------------------------------------------


def test_a_run_goes_on_and_is_reported(pipe: Any, run: ConsistencyResults) -> None:
    path = run.folder.path
    metrics, page = ((path / name).read_text() for name in ("metrics.json", "report.html"))
    pixels = pictures(run, "ir_diffusion", "2-1")
    file = path / "items/consistency-ir_diffusion.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]) + lines[-1][:40])
    kept = [json.loads(line) for line in lines[:-1]]
    again = evaluate_consistency(pipe, None, "ir_diffusion", out=path, **OPTIONS)
    assert [again.items["ir_diffusion"][item["id"]] for item in kept] == kept
    assert all(map(np.array_equal, pixels, pictures(again, "ir_diffusion", "2-1")))
    unclocked = [row for row in again.rows if row["score"] != "seconds"]
    assert unclocked == [row for row in run.rows if row["score"] != "seconds"]
    file.write_text("".join(lines))
    for name in ("metrics.json", "report.html"):
        (path / name).unlink()
    done = CliRunner().invoke(cli.app, ["report", str(path)])
    assert done.exit_code == 0, done.output
    assert "cosine to the own portrait, either order" in done.output
    assert (path / "metrics.json").read_text() == metrics
    assert (path / "report.html").read_text().split("<p><small>")[0] == page.split("<p><small>")[0]
    assert page.count('class="frame"') == 4 * 4
    assert page.count("left:50%;top:0%;width:50%;height:100%") == 4 * 2


def test_a_run_of_subjects_is_reported(pipe: Any, tmp_path: Path) -> None:
    options = {**OPTIONS, "items": 1}
    results = evaluate_subjects(pipe, recipes="none", out=tmp_path / "run", counts=(1,), **options)
    page = results.page.read_text()
    results.page.unlink()
    done = CliRunner().invoke(cli.app, ["report", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert "gained/lost" in done.output
    assert results.page.read_text() == page
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"benchmarks": ["pope"]}')
    assert load_drawn(tmp_path / "other") is None
    with pytest.raises(ValueError, match="holds another run, of subjects"):
        evaluate_consistency(pipe, out=tmp_path / "run", **OPTIONS)


def test_the_command(tmp_path: Path) -> None:
    command = ["bench", "consistency", "--model", "miniature", "--out", str(tmp_path / "run")]
    options = ["--items", "1", "--steps", "1", "--recipes", "ir_diffusion:mutual_cross=0:reference=False"]
    done = CliRunner().invoke(cli.app, [*command, *options])
    assert done.exit_code == 0, done.output
    assert "scenes with both subjects" in done.output
    assert "ir_diffusion:mutual_cross=0:reference=False" in (tmp_path / "run/report.html").read_text()
    done = CliRunner().invoke(cli.app, [command[0], "pope", *command[1:]])
    assert done.exit_code == 2
    assert "consistency needs a diffusers pipeline" in done.output


@pytest.mark.parametrize(
    ("recipe", "error", "words"),
    [
        ("ir_difusion", regard.UnknownName, "did you mean 'ir_diffusion'"),
        ("astar", ValueError, "gives portraits and scene: 'astar' has no option 'portraits'"),
        ("ir_diffusion:dropouts=1", ValueError, "has no option 'dropouts'"),
        ("ir_diffusion:dropout=2", ValueError, "dropout is 2: give 0 to"),
        ("ir_diffusion:scene=1", ValueError, "the benchmark itself gives scene"),
        ("ir_diffusion:start", ValueError, "'start' is no setting"),
    ],
)
def test_recipes_that_cannot_be(pipe: Any, tmp_path: Path, recipe: str, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        evaluate_consistency(pipe, None, recipe, out=tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_other_bad_input(pipe: Any, run: ConsistencyResults, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"another generation\.consistency\.steps: it has 2, now 4"):
        evaluate_consistency(pipe, out=run.folder.path, **{**OPTIONS, "steps": 4})
    with pytest.raises(regard.CannotEdit, match="U-Net, not a FluxTransformer2DModel"):
        evaluate_consistency(pipelines.build("flux"), out=tmp_path / "flux", **OPTIONS)
    assert not (tmp_path / "flux").exists()


def test_composed_pairs_are_on_the_lanes_of_their_names() -> None:
    """Whichever side the program drew them on, the first lane is the first subject's."""
    judge = load_judge()
    for item in prompts(2, 12, seed=1):
        found = compose(judge, item, seed=0)
        lanes, portraits = torch.tensor(found["lanes"]), torch.tensor(found["portraits"])
        assert torch.trace(lanes @ portraits.T) > torch.trace(lanes.flip(0) @ portraits.T)
