"""Data folders: what is found in them, and one error for what is not."""

import shutil

import pytest

import regard
from regard.evals import data as eval_data
from regard.evals import runner
from regard.evals.pope import load_pope
from regard.evals.pope.benchmark import pope_questions
from regard.evals.sources import DataError, find_sources

WORDS = {"truth_words": "regard"}


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    from regard.evals.miniature.coco import coco_files

    return coco_files(tmp_path_factory.mktemp("coco") / "data", 6, seed=60)


def test_missing_images_are_one_error(coco, tmp_path, monkeypatch):
    folder = shutil.copytree(coco, tmp_path / "data")
    for file in sorted((folder / "images").iterdir())[:4]:
        file.unlink()
    monkeypatch.setattr(runner, "generate", None)
    with pytest.raises(
        DataError, match=r"4 of 6 images are missing under .* \(scene_.*, \.\.\.\).*images.txt"
    ):
        regard.evaluate(
            *regard.load_miniature("lvlm"), ["pope", "chair"], ["none"], folder, out=tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()
    left = sorted(file.name for file in (folder / "images").iterdir())
    (folder / "images.txt").write_text("\n".join(left))
    found = eval_data.load_data(folder, ["pope", "chair"], 9, 0, tmp_path, WORDS)
    assert sorted(found.files) == left


@pytest.mark.parametrize("share", [0, 0.6])
def test_a_spoilt_image_is_found_before_any_work(coco, tmp_path, share):
    folder = shutil.copytree(coco, tmp_path / "data")
    first = sorted((folder / "images").iterdir())[0]
    content = first.read_bytes()
    first.write_bytes(content[: max(5, int(share * len(content)))])
    with pytest.raises(DataError, match=rf"1 of 6 images cannot be read \(.*{first.name}\)"):
        eval_data.load_data(folder, ["chair"], 9, 0, tmp_path, WORDS)


def test_a_folder_without_annotations(coco, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(coco / "images", folder / "images")
    with pytest.raises(DataError, match=r"no instances\*\.json"):
        eval_data.load_data(folder, ["chair"], 9, 0, tmp_path, WORDS)
    shutil.copy(coco / "instances.json", folder)
    with pytest.raises(DataError, match=r"no captions\*\.json"):
        eval_data.load_data(folder, ["chair"], 9, 0, tmp_path, WORDS)
    (folder / "captions.json").write_text("{}")
    with pytest.raises(DataError, match="no COCO annotation file"):
        eval_data.load_data(folder, ["chair"], 9, 0, tmp_path, WORDS)


def test_links_are_followed_and_loops_of_links_are_not(coco, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "pictures").symlink_to(coco / "images")
    (folder / "annotations").symlink_to(coco)
    (folder / "loop").symlink_to(folder)
    found = find_sources(folder)
    assert [file.name for file in found.instances] == ["instances.json"]
    assert len(eval_data.load_data(folder, ["chair"], 9, 0, tmp_path, WORDS).files) == 6


def test_draws_follow_the_seed(coco, tmp_path):
    first, same, other = (
        eval_data.load_data(coco, ["chair"], 3, seed, tmp_path, WORDS) for seed in (0, 0, 1)
    )
    assert list(first.parts["chair"]) == list(same.parts["chair"]) != list(other.parts["chair"])
    assert len(first.items["chair"]) == 3


def test_real_coco_and_official_questions(shared_data, tmp_path):
    found = eval_data.load_data(shared_data / "coco", ["pope", "chair"], 600, 0, tmp_path, WORDS)
    truth = found.parts["chair"]
    assert len(truth) == 92
    questions = [q for rows in pope_questions(found.parts["pope"]).values() for q in rows]
    labels = [q.label for q in questions]
    assert labels.count("yes") == labels.count("no") > 0
    for q in questions:
        assert (q.object in truth[q.image]) == (q.label == "yes")
    with pytest.raises(DataError, match="POPE questions in 6 folders"):
        find_sources(shared_data / "pope")
    sources = find_sources(shared_data / "pope" / "e3e3926", shared_data / "coco" / "images")
    with pytest.raises(DataError, match=r"of 500 images are missing .*COCO_val2014_"):
        eval_data.load_data(sources, ["pope"], 600, 0, tmp_path, WORDS)
    assert set(load_pope(sources.questions)) == {"random", "popular", "adversarial"}
