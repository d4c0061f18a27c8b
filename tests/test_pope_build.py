"""POPE questions built for a data set: own categories, COCO's, the same bytes again; and what a folder holds."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from regard import cli
from regard.evals.pope import SPLITS, load_pope
from regard.evals.pope.build import check_pope, write_pope
from regard.evals.run_folder import RunFolderError
from regard.evals.sources import DataError

NAMES = [
    "forklift",
    "pallet",
    "safety vest",
    "ladder",
    "crate",
    "hard hat",
    "umbrella",
    "extinguisher",
    "person",
]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(part) for part in arguments])


@pytest.fixture
def hall(tmp_path: Path) -> dict[str, list[str]]:
    """A data set with categories of its own, in `data/instances_hall.json`; what is in each image."""
    draw = random.Random(1)
    objects = {f"hall/{n:04d}.jpg": draw.sample(NAMES, draw.randint(1, 5)) for n in range(40)}
    images = [{"id": f"h{n}", "file_name": name} for n, name in enumerate(objects)]
    annotations = [
        {"image_id": image["id"], "category_id": NAMES.index(thing)}
        for image in images
        for thing in [*objects[image["file_name"]], objects[image["file_name"]][0]]
    ]
    categories = [{"id": n, "name": name} for n, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "instances_hall.json").write_text(json.dumps(content))
    return objects


def test_own_categories(hall: dict[str, list[str]], tmp_path: Path) -> None:
    found = write_pope(tmp_path / "data", tmp_path / "pope", images=20, seed=3)
    questions = load_pope(tmp_path / "pope")
    assert list(questions) == list(SPLITS)
    assert found.images == 20
    assert found.version == "own"
    asked = {q.image for q in questions["random"]}
    frequency = Counter(thing for image in asked for thing in hall[image])
    for split, rows in questions.items():
        count = found.splits[split]
        assert (count.questions, count.images, count.yes, count.no) == (120, 20, 60, 60)
        assert (count.repeated_ids, count.typos) == (0, 0)
        for place, q in enumerate(rows):
            assert (q.label == "yes") == (q.object in hall[q.image])
            if q.label == "yes":
                assert (
                    q.object == hall[q.image][place % 6 // 2]
                )  # the first three, in the order of the annotations
            elif split == "popular":
                used = {row.object for row in rows[place - place % 6 : place]}
                free = [thing for thing in frequency if thing not in hall[q.image] and thing not in used]
                assert frequency[str(q.object)] == max(frequency[thing] for thing in free)
    assert any(q.text == "Is there an extinguisher in the image?" for q in questions["random"])
    lines = (tmp_path / "pope" / "coco_pope_random.json").read_text().splitlines()
    assert list(json.loads(lines[0])) == ["question_id", "image", "text", "label"]
    about = json.loads((tmp_path / "pope" / "pope.json").read_text())
    assert about == found.about
    assert (about["seed"], about["images"], about["names"]) == (3, 20, 9)
    assert about["objects"] == "annotated instances only: 'crate' is none of COCO's 80 categories"


def test_the_same_seed_gives_the_same_bytes(hall: dict[str, list[str]], tmp_path: Path) -> None:
    def content(name: str) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}

    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        write_pope(tmp_path / "data", tmp_path / name, images=15, seed=seed)
    assert content("a") == content("b")
    assert all(content("a")[name] != content("c")[name] for name in content("a"))
    before = content("a")
    write_pope(tmp_path / "data", tmp_path / "a", images=15, seed=0)
    with pytest.raises(RunFolderError, match=r"holds other questions \(coco_pope_adversarial.json"):
        write_pope(tmp_path / "data", tmp_path / "a", images=15, seed=1)
    assert content("a") == before


def test_a_list_of_images_and_a_file_of_another_name(hall: dict[str, list[str]], tmp_path: Path) -> None:
    kept = [name for name, things in hall.items() if len(things) >= 3][:8]
    (tmp_path / "data" / "images.txt").write_text("\n".join(kept))
    assert write_pope(tmp_path / "data", tmp_path / "listed", images=8, per_image=2).images == 8
    assert {q.image for q in load_pope(tmp_path / "listed")["random"]} == set(kept)
    other = tmp_path / "_annotations.coco.json"
    other.write_bytes((tmp_path / "data" / "instances_hall.json").read_bytes())
    (tmp_path / "data" / "images.txt").unlink()
    write_pope(other, tmp_path / "file", images=12)
    write_pope(tmp_path / "data", tmp_path / "folder", images=12)
    assert load_pope(tmp_path / "file") == load_pope(tmp_path / "folder")


def test_cocos_categories_take_in_the_reference_captions(shared_data: Path, tmp_path: Path) -> None:
    coco = shared_data / "coco"
    found = write_pope(coco, tmp_path / "both", images=60, chair="regard")
    assert found.about is not None
    assert found.about["objects"].endswith("what reference captions name (words: regard)")
    alone = write_pope(coco / "instances.json", tmp_path / "alone", images=50)
    assert alone.about is not None
    assert alone.about["objects"] == "annotated instances only: there are no reference captions"
    content = json.loads((coco / "instances.json").read_text())
    names = {row["id"]: row["file_name"] for row in content["images"]}
    kinds = {row["id"]: row["name"] for row in content["categories"]}
    seen = {(names[row["image_id"]], kinds[row["category_id"]]) for row in content["annotations"]}
    for folder, more in {"alone": False, "both": True}.items():
        rows = [q for part in load_pope(tmp_path / folder).values() for q in part]
        assert all(q.label == "yes" for q in rows if (q.image, q.object) in seen)
        named = [q for q in rows if q.label == "yes" and (q.image, q.object) not in seen]
        assert bool(named) is more


def test_what_cannot_be_built(hall: dict[str, list[str]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="asked for 500 images with at least 3 objects, but only 21 of 40"):
        write_pope(tmp_path / "data", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match=r"holds no instances\*\.json: give the annotation file itself"):
        write_pope(tmp_path / "bare", tmp_path / "out")
    file = tmp_path / "bad.json"
    for content, message in {
        '{"images": []}': "no COCO instances file",
        "[": "no COCO instances file",
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "a.jpg"}],
                "annotations": [{"image_id": 2, "category_id": 1}],
                "categories": [{"id": 1, "name": "forklift"}],
            }
        ): "of image 2 and category 1, and one of them is not listed",
    }.items():
        file.write_text(content)
        with pytest.raises(DataError, match=message):
            write_pope(file, tmp_path / "out")


@pytest.mark.parametrize(
    ("version", "random_no", "typos"),
    [
        ("e3e3926", 1410, [144, 44, 58]),
        ("edebdda", 1500, [0, 0, 57]),
        ("head_109985c", 1500, [0, 0, 0]),
        ("orig_7ef3026", 1500, [0, 0, 0]),
        ("aokvqa_seem", 1500, [0, 0, 0]),
        ("gqa_seem", 1500, [0, 0, 0]),
    ],
)
def test_published_folders_are_named_and_counted(
    shared_data: Path, version: str, random_no: int, typos: list[int]
) -> None:
    found = check_pope(shared_data / "pope" / version)
    assert found.version == version
    assert found.images == 500
    assert found.about is None
    assert [count.typos for count in found.splits.values()] == typos
    assert [(count.yes, count.no) for count in found.splits.values()] == [
        (1500, random_no),
        (1500, 1500),
        (1500, 1500),
    ]
    assert json.loads(json.dumps(found.to_dict()))["version"] == version


def test_changed_questions_are_not_said_to_be_built(hall: dict[str, list[str]], tmp_path: Path) -> None:
    write_pope(tmp_path / "data", tmp_path / "pope", images=10)
    file = tmp_path / "pope" / "coco_pope_popular.json"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, lines[0]]))
    found = check_pope(tmp_path / "pope")
    assert found.about is None
    assert found.splits["popular"].repeated_ids == 1
    assert "in no published file" in str(found)


def test_commands(hall: dict[str, list[str]], tmp_path: Path) -> None:
    out = tmp_path / "pope"
    done = run("pope", "build", tmp_path / "data", "--images", 10, "--seed", 2, "--out", out)
    assert done.exit_code == 0, done.output
    assert "POPE version own, 10 images" in done.output
    assert "built with seed 2" in done.output
    assert "annotated instances only" in done.output
    again = run("pope", "check", out)
    assert again.output == done.output
    row = next(line for line in again.output.splitlines() if line.startswith("popular"))
    assert row.split() == ["popular", "60", "10", "30", "30", "50.0%", "0", "0"]
    done = run("pope", "check", tmp_path / "data")
    assert done.exit_code == 2
    assert "no file like coco_pope_random.json" in done.output
