"""Runs on disk: the same figures as the published scorers, resumption, and errors before any work."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import regard
from regard.evals import data as eval_data
from regard.evals import runner
from regard.evals.chair import score_chair
from regard.evals.generation import make_prompt
from regard.evals.pope import load_pope, score_pope
from regard.evals.pope.benchmark import pope_questions
from regard.evals.results import Results
from regard.evals.run_folder import EvalError, RunFolder, RunFolderError
from regard.evals.settings import make_settings
from regard.evals.sources import DataError
from regard.hooks.errors import UnknownName

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = {"items": 3, "batch_size": 4, "max_new_tokens": {"pope": 3, "chair": 12}, "progress": False}


@pytest.fixture(scope="module")
def miniature():
    return regard.load_miniature("lvlm")


@pytest.fixture(scope="module")
def finished(miniature, tmp_path_factory):
    """One whole run of both benchmarks, not to be changed."""
    out = tmp_path_factory.mktemp("run") / "whole"
    return regard.evaluate(*miniature, ["pope", "chair"], ["none", "vhr"], out=out, **OPTIONS)


@pytest.fixture
def copy(finished, tmp_path):
    """The same run, to be changed."""
    return shutil.copytree(finished.path, tmp_path / "copy")


def lines(folder, name):
    return (Path(folder) / "items" / f"{name}.jsonl").read_bytes().splitlines(keepends=True)


# ---------------------------------------------------------------------------------------------- figures


def test_scores_are_the_published_ones(finished):
    for recipe in ("none", "vhr"):
        loaded = pope_questions(json.loads((finished.path / "data" / "pope.json").read_text()))
        items = finished.items("pope", recipe)
        answers = {k: [items[f"{k}/{q.question_id}"]["answer"] for q in rows] for k, rows in loaded.items()}
        published = score_pope(loaded, answers)
        ours = {key: entry["value"] for key, entry in finished.metrics["pope"][recipe]["scores"].items()}
        assert ours["mean_f1"] == pytest.approx(published.mean_f1)
        assert ours["mean_accuracy"] == pytest.approx(published.mean_accuracy)
        assert ours["mean_yes_ratio"] == pytest.approx(published.mean_yes_ratio)
        for split, score in published.splits.items():
            for name in ("f1", "accuracy", "precision", "recall", "yes_ratio"):
                assert ours[f"{split}.{name}"] == pytest.approx(getattr(score, name))
        assert finished.metrics["pope"][recipe]["unclear"] == published.unclear
        truth = json.loads((finished.path / "data" / "chair.json").read_text())
        captions = {item["image"]: item["answer"] for item in finished.items("chair", recipe).values()}
        chair = score_chair(captions, truth, "regard")
        ours = {key: entry["value"] for key, entry in finished.metrics["chair"][recipe]["scores"].items()}
        for name in ("chair_s", "chair_i", "recall", "precision", "f1"):
            assert ours[name] == pytest.approx(getattr(chair, name))
        assert ours["length"] == pytest.approx(chair.words_per_caption)


def test_recorded_answers_of_llava_give_the_published_figures(shared_data, tmp_path):
    """LLaVA-1.5-13B's own POPE answers through folder and statistics: mean F1 85.9."""
    from regard.evals.pope import load_answers
    from regard.evals.scores import Counted, measure, pope_counts, pope_scores

    questions = load_pope(shared_data / "pope" / "e3e3926")
    answers = load_answers(shared_data / "outputs" / "llava_official" / "pope_answers_llava-v1.5-13b.jsonl")
    items = regard.evals.pope.pope_items(questions, answers)
    counts = pope_counts(items.splits, items.labels, items.predictions, list(questions), "official")
    counted = Counted(items.ids, items.images, counts, items.correct.astype(bool), {})
    found = measure(counted, pope_scores(list(questions)), counted)
    score = found["scores"]["mean_f1"]
    assert score["value"] == pytest.approx(0.8595, abs=5e-5)
    assert score["low"] < 0.8595 < score["high"] < score["low"] + 0.05
    assert [score["difference"][key] for key in ("value", "low", "high", "p")] == [0, 0, 0, 1]
    assert found["images"] == 500
    assert found["items"] == 8910


def test_answers_are_the_models_own(finished, miniature):
    """Batches, padding and the null edit change nothing: the first answers again, one by one, without regard."""
    model, processor = miniature
    rows = list(finished.items("pope").values())[:3] + list(finished.items("chair").values())[:1]
    scenes = eval_data.load_data(
        "miniature", ["pope"], 3, 0, finished.path.parent / "scenes", {"truth_words": "regard"}
    )
    for row in rows:
        image = Image.open(scenes.files[row["image"]]).convert("RGB")
        limit = 3 if "question" in row else 12
        inputs = processor(images=[image], text=[row["prompt"]], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
        text = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert row["answer"] == text.strip()
        assert row["prompt"].count("<image>") == 1
    assert rows[0]["prompt"] == make_prompt(processor, rows[0]["question"])


def test_one_question_in_two_splits_is_asked_once(finished):
    items = finished.items("pope")
    by_text: dict = {}
    for item in items.values():
        by_text.setdefault((item["image"], item["question"]), []).append(item)
    twins = [group for group in by_text.values() if len(group) > 1]
    assert twins
    for group in twins:
        assert len({item["answer"] for item in group}) == 1
        assert sum("same_as" in item for item in group) == len(group) - 1


def test_what_a_run_records(finished):
    config = json.loads((finished.path / "config.json").read_text())
    assert config["recipes"]["none"] == []
    assert config["recipes"]["vhr"][0]["class"] == "VHR"
    assert config["recipes"]["vhr"][0]["alpha"] == 2.0
    assert set(config["versions"]) == {"regard", "torch", "transformers"}
    assert config["generation"]["chair"] == {"max_new_tokens": 12, "do_sample": False, "num_beams": 1}
    assert config["sessions"][0]["batch_size"] == 4
    report = json.loads((finished.path / "reports" / "pope-vhr.json").read_text())
    assert report["interventions"] == ["vhr"]
    assert finished.page.is_file()
    assert json.loads((finished.path / "metrics.json").read_text())["metrics"] == finished.metrics
    text = finished.table()
    assert "CHAIR_S" in text
    assert "prove nothing about a 7B model" in text.replace("\n", " ")


# ------------------------------------------------------------------------------------------- resumption

CHILD = """
import sys, time, torch
torch.set_num_threads(1)
import regard
from regard.evals.run_folder import RunFolder
append = RunFolder.append
def slowly(self, benchmark, recipe, records, rank=None):
    append(self, benchmark, recipe, records, rank)
    time.sleep(0.5 if recipe == "vhr" else 0)  # so that the kill comes between two batches of one recipe
RunFolder.append = slowly
model, processor = regard.load_miniature("lvlm")
regard.evaluate(model, processor, ["pope", "chair"], ["none", "vhr"], out=sys.argv[1], items=3, batch_size=4,
                max_new_tokens={"pope": 3, "chair": 12}, progress=False)
"""


def test_killed_and_resumed_is_the_same_as_uninterrupted(finished, miniature, tmp_path):
    out = tmp_path / "killed"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(out)], cwd=ROOT)
    file = out / "items" / "pope-vhr.jsonl"
    limit = time.time() + 60
    while time.time() < limit and not (file.is_file() and file.stat().st_size):
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    before = {name: lines(out, name) for name in ("pope-none", "pope-vhr")}
    assert before["pope-vhr"]
    assert len(before["pope-vhr"]) < len(before["pope-none"])
    assert not (out / "metrics.json").exists()
    results = regard.evaluate(*miniature, ["pope", "chair"], ["none", "vhr"], out=out, **OPTIONS)
    for name, old in before.items():
        assert lines(out, name)[: len(old)] == old
    for benchmark in ("pope", "chair"):
        for recipe in ("none", "vhr"):
            done, whole = results.items(benchmark, recipe), finished.items(benchmark, recipe)
            assert len(lines(out, f"{benchmark}-{recipe}")) == len(done) == len(whole)
            assert {k: v["answer"] for k, v in done.items()} == {k: v["answer"] for k, v in whole.items()}
            scores = [r.metrics[benchmark][recipe]["scores"] for r in (results, finished)]
            assert scores[0] == scores[1]
    assert len(results.config["sessions"]) == 2


def test_a_half_written_line_is_done_again_and_nothing_else(copy, finished, miniature, monkeypatch):
    file = copy / "items" / "chair-vhr.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    prompts = count_prompts(monkeypatch)
    results = regard.evaluate(*miniature, ["pope", "chair"], ["none", "vhr"], out=copy, **OPTIONS)
    assert prompts == [1]
    assert results.metrics["chair"]["vhr"]["scores"] == finished.metrics["chair"]["vhr"]["scores"]
    assert len(lines(copy, "chair-vhr")) == 3


def count_prompts(monkeypatch):
    """The sizes of the batches that are generated from now on."""
    sizes = []
    real = runner.generate

    def counted(model, processor, prompts, *rest):
        sizes.append(len(prompts))
        return real(model, processor, prompts, *rest)

    monkeypatch.setattr(runner, "generate", counted)
    return sizes


def test_a_finished_run_is_not_done_again(copy, miniature, monkeypatch):
    prompts = count_prompts(monkeypatch)
    regard.evaluate(*miniature, ["pope", "chair"], ["none", "vhr"], out=copy, **OPTIONS)
    assert prompts == []


def test_a_recipe_can_be_added(copy, miniature, monkeypatch):
    before = {file.name: file.read_bytes() for file in (copy / "items").iterdir()}
    prompts = count_prompts(monkeypatch)
    results = regard.evaluate(*miniature, "chair", ["none", "vhr:alpha=1.5"], out=copy, **OPTIONS)
    assert sum(prompts) == 3
    assert list(results.metrics["chair"]) == ["none", "vhr", "vhr:alpha=1.5"]
    assert list(results.metrics["pope"]) == ["none", "vhr"]
    assert results.unfinished == {"pope vhr:alpha=1.5": (0, 54)}
    for name, content in before.items():
        assert (copy / "items" / name).read_bytes() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"another seed: it has 0, now 1 is asked for"),
        ({"items": 2}, r"another items: it has 3, now 2"),
        ({"max_new_tokens": 5}, r"another generation.pope.max_new_tokens: it has 3, now 5"),
        ({"question_suffix": " Answer yes or no."}, r"another prompts.pope: it has .* now .*Answer yes or no"),
        ({"recipes": {"vhr": regard.VHR(alpha=3.0)}}, r"another recipes.vhr.*2.0.* now .*3.0"),
    ],
)  # fmt: skip
def test_another_configuration_is_refused(copy, miniature, change, message):
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}
    options = {**OPTIONS, "recipes": ["none", "vhr"], **change}
    with pytest.raises(RunFolderError, match=message) as error:
        regard.evaluate(*miniature, ["pope", "chair"], out=copy, **options)
    assert "choose another --out" in str(error.value)
    assert {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()} == before


def test_another_model_is_refused(copy):
    model, processor = regard.load_miniature("lvlm")
    with_change = next(model.parameters())
    with_change.data.flatten()[0] += 1
    with pytest.raises(RunFolderError, match=r"another model\.sha256_of_samples"):
        regard.evaluate(model, processor, ["pope", "chair"], ["none", "vhr"], out=copy, **OPTIONS)


def test_a_folder_that_is_no_run(miniature, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match=r"no run folder .*thesis.tex.*choose another"):
        regard.evaluate(*miniature, out=tmp_path, **OPTIONS)
    with pytest.raises(RunFolderError, match="is a file"):
        regard.evaluate(*miniature, out=tmp_path / "thesis.tex", **OPTIONS)
    with pytest.raises(RunFolderError, match="is not there"):
        Results.load(tmp_path / "nothing")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_processes_do_not_share_a_run(copy, miniature):
    config = json.loads((copy / "config.json").read_text())
    other = RunFolder.create(copy, config)
    with pytest.raises(RunFolderError, match="another process is working"):
        regard.evaluate(*miniature, ["pope", "chair"], ["none", "vhr"], out=copy, **OPTIONS)
    other.close()


def test_a_spoilt_line_is_named(copy):
    file = copy / "items" / "pope-none.jsonl"
    rows = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([rows[0], b"{oops}\n", *rows[1:]]))
    with pytest.raises(RunFolderError, match=r"pope-none.jsonl, line 2 is no item"):
        Results.load(copy)


def test_answers_of_another_length_are_not_scored(copy):
    """An item that lost its line is unfinished, never scored as if the rest were all."""
    file = copy / "items" / "pope-vhr.jsonl"
    file.write_bytes(b"".join(lines(copy, "pope-vhr")[1:]))
    results = Results.load(copy)
    assert "vhr" not in results.metrics["pope"]
    assert results.unfinished == {"pope vhr": (53, 54)}
    assert "53 of 54" in results.table()
    (copy / "items" / "pope-none.jsonl").unlink()
    (copy / "items" / "chair-none.jsonl").unlink()
    with pytest.raises(RunFolderError, match=r"no benchmark is finished.*0 of 54"):
        Results.load(copy)


def test_without_a_folder_and_saved(miniature, tmp_path):
    results = regard.evaluate(*miniature, "chair", [], **{**OPTIONS, "items": 2})
    assert list(results.metrics["chair"]) == ["none"]
    temporary = results.path
    saved = results.save(tmp_path / "kept")
    again = Results.load(saved)
    assert again.metrics == results.metrics
    assert again.page.is_file()
    with pytest.raises(RunFolderError, match="not empty"):
        results.save(saved)
    del results
    import gc

    gc.collect()
    assert not temporary.exists()


# ---------------------------------------------------------------------------------- errors before any work


@pytest.fixture
def no_work(monkeypatch):
    def refuse(*_):
        raise AssertionError("model work was started")

    monkeypatch.setattr(runner, "generate", refuse)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"benchmark": "pop"}, UnknownName, "unknown benchmark 'pop': did you mean 'pope'"),
        ({"benchmark": []}, EvalError, "no benchmark"),
        ({"recipes": ["vrh"]}, UnknownName, "unknown recipe 'vrh': did you mean .*'vhr'"),
        ({"recipes": ["vhr:alfa=2"]}, UnknownName, "unknown setting of vhr 'alfa': did you mean 'alpha'"),
        ({"recipes": ["vhr:2"]}, EvalError, "is no setting"),
        ({"recipes": ["none+vhr"]}, EvalError, "cannot be combined"),
        ({"recipes": ["vhr", "VHR"]}, EvalError, "two recipes"),
        ({"recipes": [3]}, EvalError, "is no recipe"),
        ({"recipes": [regard.VHR(layers=(99,))]}, regard.RegardError, "99"),
        ({"parser": "officail"}, UnknownName, "did you mean 'official'"),
        ({"chair": "wordnt"}, UnknownName, "unknown CHAIR configuration 'wordnt': did you mean .*'wordnet'"),
        ({"scoring": {"similarty": "exact"}}, UnknownName, "did you mean 'similarity'"),
        ({"data": "no/such/folder"}, DataError, "no data folder no/such/folder"),
        ({"items": 0}, DataError, "at least one image"),
        ({"batch_size": 0}, EvalError, "batch_size=0"),
        ({"max_new_tokens": 0}, EvalError, "at least one token"),
        ({"max_new_tokens": {"chiar": 3}}, UnknownName, "did you mean 'chair'"),
        ({"template": "USER: <image> ASSISTANT:"}, EvalError, "{question}"),
    ],
)
def test_bad_arguments(miniature, tmp_path, change, error, message):
    options = {**OPTIONS, "recipes": ["none"], "out": tmp_path / "run", **change}
    with pytest.raises(error, match=message):
        regard.evaluate(*miniature, **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_work")
def test_training_mode_is_refused(tmp_path):
    model, processor = regard.load_miniature("lvlm")
    with pytest.raises(EvalError, match=r"training mode.*model.eval\(\)"):
        regard.evaluate(model.train(), processor, recipes=["none"], out=tmp_path / "run", **OPTIONS)


def test_settings_and_labels(miniature):
    model = miniature[0]
    settings = make_settings("vhr:alpha=1.5,vhr+vhr:layers=(2,3)", model)
    assert [setting.label for setting in settings] == ["none", "vhr:alpha=1.5", "vhr+vhr:layers=(2,3)"]
    assert settings[1].interventions[0].alpha == 1.5
    assert settings[2].interventions[1].layers == (2, 3)
    settings = make_settings([regard.Null(), regard.VHR(alpha=3.0)], model)
    assert [setting.label for setting in settings] == ["none", "vhr:alpha=3.0"]
    assert [s.label for s in make_settings({"strong": regard.VHR(alpha=9)}, model)] == ["none", "strong"]
