"""CHAIR: published figures, the offline words against WordNet's, ground truth from COCO, bad input."""

import json
from pathlib import Path
from typing import Any

import pytest

from regard.evals import words
from regard.evals.chair import (
    ChairScore,
    GroundTruth,
    chair_objects,
    drop_unfinished_sentence,
    ground_truth,
    image_key,
    load_ground_truth,
    score_chair,
)

# Tagging all 11,500 captions with NLTK takes a minute, so the WordNet words run on these five of the fourteen files:
# all three papers, long and short captions. (All fourteen gave the expected figures when this was written.)
WORDNET_FILES = [
    "less_is_more/r2-vcd.jsonl",
    "opera/llava-1.5_greedy.jsonl",
    "opera/minigpt4_ours.jsonl",
    "pope_captions/Instruction1_instructblip.json",
    "pope_captions/Instruction2_mmgpt.json",
]
ALL_FILES = [
    *WORDNET_FILES,
    "less_is_more/r1-llava1.5-7b.jsonl",
    "less_is_more/r11-minigptv2.jsonl",
    "less_is_more/r4-opera-fast.jsonl",
    "less_is_more/r8-ours-cap.jsonl",
    "opera/instructblip_greedy.jsonl",
    "opera/instructblip_ours.jsonl",
    "opera/llava-1.5_beam5.jsonl",
    "opera/shikra_greedy.jsonl",
    "pope_captions/Instruction2_llava.json",
]
TRUTHS = {"pattern": "pattern_singularize", "wordnet": "nltk_wordnet"}


@pytest.fixture(scope="module")
def nltk_here(shared_data: Path) -> Any:
    nltk = pytest.importorskip("nltk")
    folder = str(shared_data / "nltk_data")
    nltk.data.path.insert(0, folder)
    words._nltk_ready.cache_clear()
    yield nltk
    nltk.data.path.remove(folder)
    words._nltk_ready.cache_clear()


@pytest.fixture(scope="module")
def truths(shared_data: Path) -> dict[str, GroundTruth]:
    folder = shared_data / "chair"
    return {
        short: load_ground_truth(folder / f"chair_gt_trainval2014_{name}.json.gz")
        for short, name in TRUTHS.items()
    }


@pytest.fixture(scope="module")
def expected(shared_data: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((shared_data / "expected_scores.json").read_text())["chair"]
    return figures


def _captions(file: Path) -> dict[str, str]:
    """OPERA's rows have "caption", less-is-more's and POPE's "text"; the image is a number or a file name."""
    rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    captions = {str(row["image_id"]): row.get("caption", row.get("text")) for row in rows}
    assert len(captions) == len(rows)
    return captions


def _percent(score: ChairScore) -> dict[str, float]:
    return {
        "CHAIRs": round(100 * score.chair_s, 2),
        "CHAIRi": round(100 * score.chair_i, 2),
        "Recall": round(100 * score.recall, 2),
        "Len": round(score.length, 2),
    }


@pytest.mark.parametrize("file", WORDNET_FILES)
def test_wordnet_words_reproduce_the_published_figures(
    file: str, shared_data: Path, nltk_here: Any, truths: dict[str, GroundTruth], expected: dict[str, Any]
) -> None:
    captions = _captions(shared_data / "outputs" / file)
    scores = {short: score_chair(captions, truth, "wordnet") for short, truth in truths.items()}
    for short, score in scores.items():
        assert _percent(score) == expected[file][f"wordnet_words+{short}_gt"]
        assert round(score.words_per_caption, 2) == expected[file]["len_words"]
        assert score.n == expected[file]["n"]
        assert score.words == "wordnet"
    # How close the words that need no download come on the same captions.
    offline = score_chair(captions, truths["wordnet"], "regard")
    same = sum(
        [m.node for m in a.mentions] == [m.node for m in b.mentions]
        for a, b in zip(offline.captions, scores["wordnet"].captions, strict=True)
    )
    assert same / offline.n >= 0.97


@pytest.mark.parametrize("file", ALL_FILES)
def test_offline_words_come_close(
    file: str, shared_data: Path, truths: dict[str, GroundTruth], expected: dict[str, Any]
) -> None:
    captions = _captions(shared_data / "outputs" / file)
    for short, truth in truths.items():
        ours = _percent(score_chair(captions, truth, "regard"))
        theirs = expected[file][f"wordnet_words+{short}_gt"]
        assert ours["CHAIRs"] == pytest.approx(theirs["CHAIRs"], abs=0.25)
        assert ours["CHAIRi"] == pytest.approx(theirs["CHAIRi"], abs=0.1)
        assert ours["Recall"] == pytest.approx(theirs["Recall"], abs=0.2)
        assert ours["Len"] == pytest.approx(theirs["Len"], abs=0.02)


@pytest.mark.parametrize("file", ALL_FILES)
def test_pattern_words_reproduce_the_published_figures(
    file: str, shared_data: Path, truths: dict[str, GroundTruth], expected: dict[str, Any]
) -> None:
    ours = _percent(score_chair(_captions(shared_data / "outputs" / file), truths["pattern"], "pattern"))
    theirs = dict(expected[file]["pattern_words+pattern_gt"])
    # One of the 500 captions has "wash." in its middle, which Punkt takes for an abbreviation: 63.39, not 63.38.
    assert ours.pop("Len") == pytest.approx(theirs.pop("Len"), abs=0.011 if "minigpt4_ours" in file else 1e-9)
    assert ours == theirs


@pytest.mark.parametrize(
    ("name", "truth", "floor"),
    [("wordnet", "wordnet", 92), ("pattern", "pattern", 92), ("regard", "wordnet", 92)],
)
def test_ground_truth_of_real_annotations(
    name: str, truth: str, floor: int, shared_data: Path, truths: dict[str, GroundTruth], request: Any
) -> None:
    if name == "wordnet":
        request.getfixturevalue("nltk_here")
    folder = shared_data / "coco"
    made = ground_truth(folder / "instances.json", folder / "captions.json", name)
    assert len(made) == 92
    assert sum(made[image] == truths[truth][image] for image in made) >= floor


def _scenes() -> tuple[dict[str, Any], dict[str, Any]]:
    instances = {
        "images": [{"id": 1, "file_name": "scene_1.png"}, {"id": 2, "file_name": "scene_2.png"}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 62, "name": "chair"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 18, "iscrowd": 1}],
    }
    captions = {
        "images": instances["images"],
        "annotations": [
            {"id": 1, "image_id": 1, "caption": "A puppy on a couch."},
            {"id": 2, "image_id": 2, "caption": "An empty room."},
        ],
    }
    return instances, captions


def test_ground_truth_of_a_small_world(tmp_path: Path) -> None:
    instances, captions = _scenes()
    truth = ground_truth(instances, captions, "regard")
    assert truth["scene_1.png"] == truth["folder/scene_1.png"] == truth["1"] == truth[1] == {"dog", "couch"}
    assert truth["scene_2.png"] == frozenset()
    assert "scene_3.png" not in truth
    assert ground_truth(instances)["1"] == {"dog"}
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(instances))
    assert ground_truth(file)["1"] == {"dog"}
    instances["categories"].append({"id": 99, "name": "unicorn"})
    with pytest.raises(ValueError, match=r"none of COCO's 80 categories: \['unicorn'\]"):
        ground_truth(instances)


def test_scores_of_a_small_world() -> None:
    truth = {"a.jpg": ["dog", "chair"], "b.jpg": ["cat"], "c.jpg": ["person"]}
    captions = {
        "a.jpg": "A dog and a puppy near the cat and a cat.",
        "b.jpg": "A cat sleeps.",
        "c.jpg": "Nothing to see.",
    }
    score = score_chair(captions, truth, "regard")
    assert score.chair_s == pytest.approx(1 / 3)
    assert score.chair_i == pytest.approx(2 / 5)  # mentions, and repeats count
    assert score.recall == pytest.approx(2 / 4)
    assert score.precision == pytest.approx(2 / 3)
    assert score.f1 == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    assert (score.n, score.mentions) == (3, 5)
    first = score.captions[0]
    assert [first.caption[m.start : m.end] for m in first.hallucinated] == ["cat", "cat"]
    assert (first.truth, first.right, first.chair_i) == (["chair", "dog"], ["dog"], 0.5)
    assert score.captions[2].chair_i == 0.0
    assert score.length == pytest.approx((12 + 4 + 4) / 3)
    assert "captions" not in score.to_dict()
    assert json.loads(json.dumps(score.to_dict(captions=True)))["captions"][1]["mentions"][0]["node"] == "cat"


def test_no_objects_at_all() -> None:
    score = score_chair({"a": "Nothing."}, {"a": []}, "regard")
    assert (score.chair_s, score.chair_i, score.recall, score.precision, score.f1) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("caption", "kept"),
    [
        ("A dog runs. A cat sits on the", "A dog runs."),
        ("A dog runs. A cat sits.", "A dog runs. A cat sits."),
        ('He said "Stop!" and a', 'He said "Stop!"'),
        ("It costs 3.50 and a dog", "It costs 3.50 and a dog"),
        ("A dog without an end", "A dog without an end"),
        ("", ""),
    ],
)
def test_unfinished_sentences(caption: str, kept: str) -> None:
    assert drop_unfinished_sentence(caption) == kept


def test_dropping_unfinished_sentences_is_an_option() -> None:
    captions, truth = {"1": "A dog runs. A cat sits on the"}, {"1": ["dog"]}
    assert score_chair(captions, truth, "regard").chair_s == 1.0
    cut = score_chair(captions, truth, "regard", drop_unfinished=True)
    assert (cut.chair_s, cut.drop_unfinished, cut.captions[0].caption) == (0.0, True, "A dog runs.")


def test_images_are_found_by_any_of_their_names() -> None:
    names = ["COCO_val2014_000000000042.jpg", "000000000042.jpg", "000000000042", "42", 42, "val/42.jpg"]
    assert {image_key(name) for name in names} == {"42"}
    assert image_key("scene_0042.png") == "scene_0042.png"
    truth = GroundTruth({"42": ["dog"]})
    assert all(truth[name] == {"dog"} for name in names)
    assert all(name in truth for name in names)


def test_bad_input(tmp_path: Path) -> None:
    truth = {"1": ["dog"]}
    with pytest.raises(
        ValueError, match=r"2 of 3 captioned images have no ground truth: 2, x.jpg; .* such as 1"
    ):
        score_chair({"1": "A dog.", "2": "A cat.", "x.jpg": "A cow."}, truth, "regard")
    with pytest.raises(ValueError, match="no captions"):
        score_chair({}, truth, "regard")
    with pytest.raises(TypeError, match="caption of image 1 is None"):
        score_chair({"1": None}, truth, "regard")  # type: ignore[dict-item]
    file = tmp_path / "gt.json"
    file.write_text('{"1": ["dragon"]}')
    with pytest.raises(ValueError, match=r"none of COCO's 80 categories: \['dragon'\]"):
        load_ground_truth(file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        load_ground_truth(file)
    file.write_text('{"1": ["dog"]}')
    assert load_ground_truth(file)["1"] == {"dog"}


def test_default_words_work_without_arguments() -> None:
    assert [m.node for m in chair_objects("A dog on a couch.")] == ["dog", "couch"]
