"""AMBER and MME through a whole run of the miniature: scores of the plain functions, and the page."""

import json
from pathlib import Path

import pytest

import regard
from regard.evals.amber import load_amber, score_amber
from regard.evals.mme import HALLUCINATION, MmeAnswer, load_mme, score_mme
from regard.evals.run_folder import EvalError

SCORING = {"amber_words": "regard", "similarity": "exact"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four drawn scenes as AMBER's first images, four subtasks of MME with an image of the same name each."""
    from regard.evals.miniature.scenes import make_scene

    root = tmp_path_factory.mktemp("data")
    for number in range(1, 5):
        make_scene(number, "test", "hard").image.save(root / f"AMBER_{number}.jpg")
    for place, subtask in enumerate(HALLUCINATION, start=10):
        home = root / "MME_Benchmark_release_version" / subtask
        home.mkdir(parents=True)
        make_scene(place, "test", "hard").image.save(home / "0001.jpg")
        ending = "Please answer yes or no."
        (home / "0001.txt").write_text(f"Is there a {subtask}? {ending}\tNo\nIs there a dog? {ending}\tYes\n")
    return root


@pytest.fixture(scope="module")
def amber(pictures, shared_data, tmp_path_factory):
    root = tmp_path_factory.mktemp("amber")
    (root / "annotations").symlink_to(shared_data / "amber")
    for file in pictures.glob("AMBER_*.jpg"):
        (root / file.name).symlink_to(file)
    (root / "images.txt").write_text("\n".join(f"AMBER_{number}.jpg" for number in range(1, 5)))
    return root


@pytest.fixture(scope="module")
def model():
    return regard.load_miniature("lvlm")


def run(model, benchmarks, data, out, **options):
    return regard.evaluate(
        *model, benchmarks, ["vhr:alpha=3"], data, out=out, batch_size=8, progress=False,
        max_new_tokens=20, scoring=SCORING, **options,
    )  # fmt: skip


def test_amber(model, amber, tmp_path):
    found = run(model, ["amber_g", "amber_d"], amber, tmp_path / "run")
    published = load_amber(amber)
    for recipe in ("none", "vhr:alpha=3"):
        items = found.items("amber_g", recipe) | found.items("amber_d", recipe)
        assert {item["image"] for item in items.values()} == {f"AMBER_{number}.jpg" for number in range(1, 5)}
        whole = score_amber(
            {int(key): item["answer"] for key, item in items.items()}, published, "regard", "exact"
        )
        ours = {b: found.metrics[b][recipe]["scores"] for b in ("amber_g", "amber_d")}
        for key in ("chair", "cover", "hal", "cog"):
            assert ours["amber_g"][key]["value"] == pytest.approx(getattr(whole.generative, key))
        for key in ("accuracy", "precision", "recall", "f1"):
            assert ours["amber_d"][key]["value"] == pytest.approx(getattr(whole.discriminative["all"], key))
        told = f"AMBER score, (100 - CHAIR + F1) / 2: {100 * whole.amber:.1f} (none)"
        assert recipe != "none" or (told in found.table() and told in found.page.read_text())
    assert {item["prompt"].count("Describe this image.") for item in found.items("amber_g").values()} == {1}
    answers = [
        [item["answer"] for item in found.items("amber_g", r).values()] for r in found.config["recipes"]
    ]
    assert answers[0] != answers[1]
    assert found.config["scoring"]["similarity"] == "exact"
    assert "AMBER, generative" in found.page.read_text()
    assert "AMBER, discriminative" in found.table()


def test_answers_to_amber_are_imported_without_its_images(shared_data, tmp_path):
    captions = dict.fromkeys(range(1, 5), "A dog and a man by a lake.")
    file = tmp_path / "answers.json"
    file.write_text(json.dumps([{"id": number, "response": text} for number, text in captions.items()]))
    found = regard.import_answers(
        "amber_g",
        {"mine": file},
        shared_data / "amber",
        tmp_path / "run",
        allow_missing=True,
        scoring=SCORING,
    )
    whole = score_amber(captions, load_amber(shared_data / "amber"), "regard", "exact").generative
    scores = found.metrics["amber_g"]["none"]["scores"]
    assert scores["chair"]["value"] == pytest.approx(whole.chair)
    assert scores["cover"]["value"] == pytest.approx(whole.cover)
    assert found.metrics["amber_g"]["none"]["tokens"] is None
    assert "tokens/s" not in found.table()
    assert "0 ms" not in found.page.read_text()


def test_mme(model, pictures, tmp_path):
    found = run(model, "mme_hallucination", pictures, tmp_path / "run")
    questions = load_mme(pictures, subtasks=HALLUCINATION)
    items = found.items("mme_hallucination")
    said = {(item["image"], item["question"]): item["answer"] for item in items.values()}
    assert len(said) == len(questions) == 8
    score = score_mme(questions, [MmeAnswer(q.image, q.text, said[q.image, q.text]) for q in questions])
    ours = found.metrics["mme_hallucination"]["none"]["scores"]
    for name in HALLUCINATION:
        assert ours[f"{name}.score"]["value"] == pytest.approx(score.subtasks[name].score)
    assert ours["hallucination"]["value"] == pytest.approx(score.hallucination)
    assert "MME, hallucination subset" in found.page.read_text()


def test_missing_data_is_told_before_the_run(model, tmp_path: Path):
    (tmp_path / "data").mkdir()
    for benchmark, place in (("amber_g", "junyangwang0410/AMBER"), ("mme", "BradyFU")):
        with pytest.raises(EvalError, match=place):
            run(model, benchmark, tmp_path / "data", tmp_path / "run")
    assert not (tmp_path / "run").exists()
