"""The text-to-image miniature: it draws single subjects, and fails on two; the judge sees what was drawn."""

import random
from typing import Any

import numpy as np
import pytest
import torch

import regard
from regard.evals.miniature import load_judge
from regard.evals.miniature.subjects import SUBJECTS, caption, draw_picture, held_out, pairs, training_example
from regard.evals.pictures.subjects import evaluate_subjects, prompts


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = regard.load_miniature("t2i")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def judge() -> Any:
    return load_judge()


def test_training_never_shows_the_held_out_pairs() -> None:
    assert len(pairs()) == 45
    apart = {caption(order) for pair in pairs(only_held_out=True) for order in (pair, pair[::-1])}
    seen = {training_example(seed)[1] for seed in range(3000)}
    assert not seen & apart
    assert len(seen) > 60
    assert all(held_out(*pair) for pair in pairs(only_held_out=True))


def test_the_judge_sees_what_was_drawn(judge: Any) -> None:
    rng = random.Random("judge test")
    drawn = [draw_picture(rng.sample(SUBJECTS, rng.choice((1, 2))), rng) for _ in range(100)]
    told = np.array([[name in dict(picture.drawn) for name in SUBJECTS] for picture in drawn])
    found = judge([picture.image for picture in drawn]).numpy() > 0.5
    assert (found == told).all(1).mean() > 0.93
    embedded = judge.embed([picture.image for picture in drawn[:4]])
    assert torch.allclose(embedded.norm(dim=1), torch.ones(4))


def test_single_subjects_are_right_and_pairs_are_not(pipe: Any, judge: Any) -> None:
    shares = []
    for count in (1, 2):
        work = prompts(count, 20, seed=5)
        images = pipe(
            [item["prompt"] for item in work], num_inference_steps=15, guidance_scale=7.5,
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
        scores = judge(images)
        there = [
            all(s[SUBJECTS.index(n)] > 0.5 for n in i["subjects"]) for i, s in zip(work, scores, strict=True)
        ]
        shares.append(sum(there) / len(there))
    assert shares[0] >= 0.8
    assert shares[1] <= shares[0] - 0.15


def test_a_run_is_a_folder_that_goes_on(pipe: Any, tmp_path: Any) -> None:
    options: dict[str, Any] = {"items": 4, "counts": (2,), "steps": 4, "batch_size": 2, "progress": False}
    results = evaluate_subjects(pipe, recipes="none,astar:scale=30", out=tmp_path / "run", **options)
    rows = {row["recipe"]: row for row in results.rows}
    assert rows["astar:scale=30"]["pictures"] == 4
    assert rows["none"]["change"] is None
    assert "astar:scale=30" in results.page.read_text()
    first = (tmp_path / "run/items/subjects-none/2-0.png").read_bytes()
    (guided,) = (tmp_path / "run/items").glob("subjects-astar*/2-0.png")
    assert guided.read_bytes() != first
    file = tmp_path / "run/items/subjects-none.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    again = evaluate_subjects(pipe, recipes="none,astar:scale=30", out=tmp_path / "run", **options)
    assert len(again.items["none"]) == 4
    assert (tmp_path / "run/items/subjects-none/2-0.png").read_bytes() == first
    with pytest.raises(ValueError, match="another"):
        evaluate_subjects(pipe, recipes="none", out=tmp_path / "run", **{**options, "steps": 5})
    with pytest.raises(regard.UnknownName, match="did you mean 'astar'"):
        evaluate_subjects(pipe, recipes="astarr", out=tmp_path / "other", **options)
    assert not (tmp_path / "other").exists()
