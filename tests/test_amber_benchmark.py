"""AMBER as benchmarks of a run: what is loaded, scores against the plain function, marks, missing data."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from regard.evals.amber import load_amber, score_amber
from regard.evals.amber.benchmark import AmberDiscriminative, AmberGenerative
from regard.evals.benchmark import Benchmark, Request
from regard.evals.scores import measure
from regard.evals.sources import DataError, Sources

SCORING = {"amber_words": "regard", "similarity": "exact", "amber_parser": "first_word"}
# Of AMBER_1: a man, path, lake, trees and the sky are there; a light is never judged.
FIRST = "A man is on a path by a lake with trees, a dog and clouds. There is a bird and a light in the sky."


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Empty files in the place of AMBER's images: loading looks for their names only."""
    folder = tmp_path_factory.mktemp("amber") / "image"
    folder.mkdir()
    for number in range(1, 1005):
        (folder / f"AMBER_{number}.jpg").touch()
    return folder


def _request(root: Path, pictures: Path, **changes: Any) -> Request:
    settings = {"wanted": None, "items": 2000, "seed": 0, "scoring": SCORING} | changes
    return Request("AMBER", Sources(images=pictures, root=root), **settings)


def test_a_run_loads_all_or_some(shared_data: Path, pictures: Path) -> None:
    root = shared_data / "amber"
    for benchmark, count in ((AmberGenerative(), 1004), (AmberDiscriminative(), 14216)):
        data = benchmark.load(_request(root, pictures))
        assert json.loads(json.dumps(data)) == data
        items = benchmark.items(data)
        assert len({item.id for item in items}) == len(items) == count
    few = [b.load(_request(root, pictures, items=7)) for b in (AmberGenerative(), AmberDiscriminative())]
    images = list(few[0]["images"])
    assert len(images) == 7
    assert images == sorted(images, key=lambda name: int(name[6:-4]))
    assert {row["image"] for row in few[1]["questions"]} == set(images)  # both tasks on the same images
    other = AmberGenerative().load(_request(root, pictures, items=7, seed=1))
    assert list(other["images"]) != images
    named = AmberDiscriminative().load(_request(root, pictures, wanted=["AMBER_9.jpg", "AMBER_2.jpg"]))
    assert list(dict.fromkeys(row["image"] for row in named["questions"])) == ["AMBER_2.jpg", "AMBER_9.jpg"]
    with pytest.raises(DataError, match=r"one of AMBER's, such as AMBER_1\.jpg"):
        AmberGenerative().load(_request(root, pictures, wanted=["dog.jpg"]))


def test_marks_point_into_the_caption(shared_data: Path, pictures: Path) -> None:
    benchmark = AmberGenerative()
    data = benchmark.load(_request(shared_data / "amber", pictures, wanted=["AMBER_1.jpg"]))
    view = benchmark.view({"id": "1", "image": "AMBER_1.jpg", "answer": FIRST}, data, SCORING)
    marked = [(FIRST[start:end], right) for start, end, right, _ in view.marks]
    assert [word for word, right in marked if not right] == ["dog", "clouds", "bird"]
    assert [word for word, right in marked if right] == ["man", "path", "lake", "trees", "light", "sky"]
    assert not view.right
    assert view.truth.startswith("sky, forest, grass")


def _records(benchmark: Benchmark, data: Any, answers: dict[int, str]) -> list[dict[str, Any]]:
    return [
        {"id": item.id, "image": item.image, "answer": answers[int(item.id)], **item.facts}
        for item in benchmark.items(data)
    ]


def test_a_run_scores_as_the_plain_function(shared_data: Path, pictures: Path) -> None:
    draw, amber = random.Random(2), load_amber(shared_data / "amber")
    answers = {}
    for image in amber.images:
        named = draw.choices([*image.truth, *image.hallu, "dog", "line", "tree"], k=draw.randrange(9))
        answers[image.number] = f"Here one sees: {', '.join(named)}."
    answers |= {q.number: draw.choice(["Yes.", "No, it is not", "Unsure"]) for q in amber.questions}
    plain = score_amber(answers, amber, "regard", "exact")
    found: dict[str, Any] = {}
    for benchmark in (AmberGenerative(), AmberDiscriminative()):
        data = benchmark.load(_request(shared_data / "amber", pictures))
        counted = benchmark.count(_records(benchmark, data, answers), data, SCORING)
        metrics = measure(counted, benchmark.scores(data), counted)
        assert set(benchmark.plotted(data)) | set(benchmark.headline) <= set(metrics["scores"])
        found |= {f"{benchmark.name}.{key}": entry["value"] for key, entry in metrics["scores"].items()}
        low, high = (metrics["scores"][benchmark.headline[0]][end] for end in ("low", "high"))
        assert low < metrics["scores"][benchmark.headline[0]]["value"] < high
        if benchmark.name == "amber_d":
            assert metrics["unclear"] == plain.discriminative["all"].unclear > 0
            assert counted.right.mean() == pytest.approx(plain.discriminative["all"].accuracy)
    assert plain.generative is not None
    for key in ("chair", "cover", "hal", "cog"):
        assert found[f"amber_g.{key}"] == pytest.approx(getattr(plain.generative, key))
    for part, score in plain.discriminative.items():
        for key in ("accuracy", "precision", "recall", "f1"):
            name = f"amber_d.{key}" if part == "all" else f"amber_d.{part}.{key}"
            assert found[name] == pytest.approx(getattr(score, key)), name
    assert found["amber_d.yes_ratio"] == pytest.approx(plain.discriminative["all"].yes_ratio)


def test_a_dimension_that_was_not_asked_has_no_score(shared_data: Path, pictures: Path) -> None:
    benchmark = AmberDiscriminative()
    data = benchmark.load(_request(shared_data / "amber", pictures, wanted=["AMBER_1.jpg"]))
    data["questions"] = [row for row in data["questions"] if row["dimension"] == "existence"]
    answers = {row["number"]: "Yes" for row in data["questions"]}
    counted = benchmark.count(_records(benchmark, data, answers), data, SCORING)
    scores = measure(counted, benchmark.scores(data))["scores"]
    assert scores["relation.f1"]["value"] is None
    assert scores["existence.f1"]["value"] == 0.0


def test_missing_data_says_what_to_get(shared_data: Path, pictures: Path, tmp_path: Path) -> None:
    benchmark = AmberGenerative()
    with pytest.raises(
        DataError, match=r"no annotations.json, relation.json, safe_words.txt, query_all.json .*GitHub"
    ):
        benchmark.load(_request(tmp_path, pictures))
    root = tmp_path / "deep" / "data"
    shutil.copytree(shared_data / "amber", root, copy_function=shutil.copyfile)
    with pytest.raises(DataError, match=r"1004 of 1004 images are missing under .*README"):
        benchmark.load(_request(tmp_path, tmp_path))
    assert len(benchmark.load(_request(tmp_path, pictures))["images"]) == 1004
    (tmp_path / "annotations.json").write_text("[]")  # another benchmark's: not beside relation.json
    assert len(load_amber(tmp_path).images) == 1004
    (tmp_path / "relation.json").write_text('{"dog": []}')
    with pytest.raises(DataError, match=r"several different (annotations|relation)\.json"):
        load_amber(tmp_path)
    (tmp_path / "relation.json").unlink()
    (root / "relation.json").write_text('{"sky": []}')
    with pytest.raises(DataError, match=r"lacks \d+ annotated words"):
        load_amber(tmp_path)
    (root / "annotations.json").write_text('{"id": 1}')
    with pytest.raises(DataError, match=r"annotations.json is not AMBER's file"):
        load_amber(tmp_path)
    with pytest.raises(DataError, match="there is no folder"):
        load_amber(tmp_path / "nowhere")
