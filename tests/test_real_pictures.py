"""Real photographs through the whole path: processor, batches, ground truth, scores, page."""

import base64
import io
import json
import re

import pytest
from PIL import Image

import regard
from regard.evals.chair import load_ground_truth, score_chair

OPTIONS = {"max_new_tokens": {"pope": 3, "chair": 16}, "progress": False, "chair": "regard"}


@pytest.fixture(scope="module")
def model():
    return regard.load_miniature("lvlm")


@pytest.fixture(scope="module")
def run(model, shared_data, tmp_path_factory):
    """All 92 photographs described, plain and with VHR."""
    out = tmp_path_factory.mktemp("real") / "run"
    return regard.evaluate(*model, "chair", ["vhr"], shared_data / "coco", out=out, batch_size=16, **OPTIONS)


def test_every_photograph_is_described(run, shared_data):
    manifest = json.loads((shared_data / "coco" / "manifest.json").read_text())
    names = {entry["file_name"] for entry in manifest}
    assert set(run.items("chair")) == set(run.items("chair", "vhr")) == names
    assert len(names) == 92
    sizes = {Image.open(shared_data / "coco" / "images" / name).size for name in run.items("chair")}
    assert len(sizes) > 10
    answers = {item["answer"] for item in run.items("chair").values()}
    assert len(answers) > 20  # the model looks at them
    assert any(
        run.items("chair", "vhr")[key]["answer"] != item["answer"] for key, item in run.items("chair").items()
    )


def test_questions_about_photographs(model, shared_data, tmp_path):
    data = shared_data / "coco"
    found = regard.evaluate(*model, "pope", [], data, out=tmp_path / "run", items=8, batch_size=32, **OPTIONS)
    items = found.items("pope").values()
    assert {item["split"] for item in items} == {"random", "popular", "adversarial"}
    assert len(items) == 8 * 18
    assert found.metrics["pope"]["none"]["unclear"] == 0


def test_ground_truth_is_the_published_one(run, shared_data):
    """By WordNet's words; those of the offline table differ in a few."""
    published = load_ground_truth(shared_data / "chair" / "chair_gt_trainval2014_nltk_wordnet.json.gz")
    truth = run.data("chair")
    known = [image for image in truth if image in published]
    same = sum(set(truth[image]) == published[image] for image in known)
    assert len(known) > 80
    assert same / len(known) > 0.9
    captions = {image: item["answer"] for image, item in run.items("chair").items()}
    score = score_chair(captions, truth, "regard")
    assert run.metrics["chair"]["none"]["scores"]["chair_i"]["value"] == pytest.approx(score.chair_i)


def test_batches_of_unequal_photographs_answer_like_single_ones(run, model, shared_data, tmp_path):
    (tmp_path / "data").mkdir()
    for part in ("images", "instances.json", "captions.json"):
        (tmp_path / "data" / part).symlink_to(shared_data / "coco" / part)
    chosen = sorted(run.items("chair"))[::8]
    (tmp_path / "data" / "images.txt").write_text("\n".join(chosen))
    out = tmp_path / "run"
    alone = regard.evaluate(*model, "chair", ["vhr"], tmp_path / "data", out=out, batch_size=1, **OPTIONS)
    for recipe in ("none", "vhr"):
        batched = run.items("chair", recipe)
        single = alone.items("chair", recipe)
        assert sorted(single) == chosen
        assert {k: v["answer"] for k, v in single.items()} == {k: batched[k]["answer"] for k in single}


def test_the_page_shows_photographs(run):
    text = run.page.read_text()
    pictures = re.findall(r"data:image/jpeg;base64,([\w+/=]+)", text)
    assert pictures
    for picture in pictures[:5]:
        assert min(Image.open(io.BytesIO(base64.b64decode(picture))).size) > 100
