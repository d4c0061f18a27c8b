"""lmms-eval's own POPE and CHAIR tasks on the miniature, against our run of the same questions on the same images."""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install 'regard[lmms]'")

import datasets
import lmms_eval
import lmms_eval.models
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

import regard
from regard.evals.chair import score_chair
from regard.evals.generation import generate, left_padding, make_prompt
from regard.evals.harnesses.lmms import RegardModel, _Asked, manifest
from regard.evals.miniature.coco import coco_files
from regard.evals.pope import Question, score_pope
from regard.evals.run_folder import EvalError, RunFolder

TASKS = Path(lmms_eval.__file__).parent / "tasks"
SUFFIX = "\nAnswer the question using a single word or phrase."
RECIPE = "dola+var:transfer=0.9"  # changes some of the short answers too
IMAGES = 6


class Ours(NamedTuple):
    """Our run, and the same data in the form that lmms-eval's tasks read."""

    run: RunFolder
    tasks: Path
    questions: dict[str, list[Question]]
    truth: dict[str, list[str]]
    images: Path

    def answers(self, benchmark: str, recipe: str) -> dict[str, str]:
        return {key: row["answer"] for key, row in self.run.read_items(benchmark, recipe).items()}


@pytest.fixture(scope="module")
def nltk_here(shared_data: Path) -> Iterator[str]:
    nltk = pytest.importorskip("nltk")
    folder = str(shared_data / "nltk_data")
    nltk.data.path.insert(0, folder)
    yield folder
    nltk.data.path.remove(folder)


@pytest.fixture(scope="module")
def miniature() -> Any:
    return regard.load_miniature("lvlm")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: Any, nltk_here: str, miniature: Any) -> Ours:
    root = tmp_path_factory.mktemp("lmms")
    coco = coco_files(root / "coco", IMAGES)
    regard.evaluate(
        *miniature, ["pope", "chair"], ["none", RECIPE], coco, items=IMAGES, out=root / "run", progress=False,
        question_suffix=SUFFIX, parser="lmms", chair="wordnet",
    )  # fmt: skip
    run = RunFolder.load(root / "run")
    pope, truth = run.read_json("data/pope.json"), run.read_json("data/chair.json")
    questions = {split: [Question(**row) for row in rows] for split, rows in pope.items()}
    images = coco / "images"
    _save(root / "pope", [_pope_row(q, images) for rows in questions.values() for q in rows])
    _save(root / "chair", [_chair_row(number, name, truth, images) for number, name in enumerate(truth)])
    (root / "tasks").mkdir()
    _task_file(root, "pope", TASKS / "pope" / "pope.yaml")
    _task_file(root, "chair", TASKS / "coco_cap_chair" / "coco_cap_chair.yaml")
    return Ours(run, root / "tasks", questions, truth, images)


def _save(folder: Path, rows: list[dict[str, Any]]) -> None:
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"test": table}).save_to_disk(str(folder))


def _pope_row(q: Question, images: Path) -> dict[str, Any]:
    """A row of lmms-lab/POPE."""
    return {
        "id": f"{q.split}/{q.question_id}", "question_id": str(q.question_id), "question": q.text, "answer": q.label,
        "image_source": Path(q.image).stem, "image": str(images / q.image), "category": q.split,
    }  # fmt: skip


def _chair_row(number: int, name: str, truth: dict[str, list[str]], images: Path) -> dict[str, Any]:
    """A row of tsunghanwu/mscoco_chair, as far as the task reads it."""
    return {"question_id": str(number), "image": str(images / name), "gt_object": truth[name]}


def _task_file(root: Path, name: str, original: Path) -> None:
    """The original task with another place for its data."""
    lines = f"include: {original}\ntask: local_{name}\ndataset_path: {root / name}\n"
    (root / "tasks" / f"{name}.yaml").write_text(lines + "dataset_kwargs:\n  load_from_disk: true\n")


@pytest.fixture(scope="module")
def baseline(ours: Ours) -> dict[str, Any]:
    """lmms-eval from Python."""
    return _evaluate(ours, "none")


@pytest.fixture(scope="module")
def edited(ours: Ours, nltk_here: str) -> tuple[dict[str, Any], Path]:
    """lmms-eval by its command, which finds the model through our entry point: its results file, and the folder."""
    out = ours.tasks.parent / "out"
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "regard",
        "--model_args", f"pretrained=miniature,recipes={RECIPE}", "--tasks", "local_pope,local_chair",
        "--include_path", str(ours.tasks), "--batch_size", "16", "--device", "cpu",
        "--log_samples", "--output_path", str(out), "--process_docs_parallel", "1",
    ]  # fmt: skip
    env = _environment(nltk_here, ours.tasks.parent)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = out / "miniature"
    files = list(folder.glob("*_results.json"))
    assert len(files) == 1, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads(files[0].read_text())
    results["samples"] = {
        task: [json.loads(line) for line in next(folder.glob(f"*_samples_{task}.jsonl")).open()]
        for task in ("local_pope", "local_chair")
    }
    return results, folder


def _environment(nltk_data: str, cache: Path) -> dict[str, str]:
    import os

    root = str(Path(regard.__file__).parents[1])
    return {**os.environ, "NLTK_DATA": nltk_data, "PYTHONPATH": root, "HF_HOME": str(cache / "hf")}


def _evaluate(ours: Ours, recipe: str, tasks: str = "local_pope,local_chair", **more: Any) -> dict[str, Any]:
    if not (registry := lmms_eval.models.MODEL_REGISTRY_V2)._alias_to_model_id.get("regard"):
        registry.register_manifest(manifest())  # a checkout that is not installed
    more.setdefault(
        "predict_only", "gen_kwargs" in more
    )  # CHAIR of captions without an object divides by zero
    results: dict[str, Any] = simple_evaluate(
        model="regard", model_args=f"pretrained=miniature,recipes={recipe}", tasks=tasks.split(","), batch_size=16,
        device="cpu", task_manager=TaskManager(include_path=str(ours.tasks), include_defaults=False), bootstrap_iters=0,
        **more,
    )  # fmt: skip
    return results


def _texts(results: dict[str, Any], task: str) -> list[str]:
    """The answers in the order of the task's data."""
    rows = sorted(results["samples"][task], key=lambda row: row["doc_id"])
    texts = [row["filtered_resps"] for row in rows]
    return [text if isinstance(text, str) else text[0] for text in texts]


def _figure(results: dict[str, Any], task: str, metric: str) -> float:
    return float(results["results"][task][f"{metric},none"])


def test_the_entry_point_names_the_class() -> None:
    found = [point for point in entry_points(group="lmms_eval.models") if point.name == "regard"]
    assert found, "the installed regard is older than its entry point: install it again"
    assert found[0].load() is manifest
    assert lmms_eval.models.get_model("regard") is RegardModel


@pytest.mark.parametrize("recipe", ["none", RECIPE])
def test_answers_are_those_of_our_run(recipe: str, ours: Ours, request: Any) -> None:
    results = (
        request.getfixturevalue("baseline") if recipe == "none" else request.getfixturevalue("edited")[0]
    )
    asked = [f"{q.split}/{q.question_id}" for rows in ours.questions.values() for q in rows]
    pope, chair = ours.answers("pope", recipe), ours.answers("chair", recipe)
    assert _texts(results, "local_pope") == [pope[key] for key in asked]
    assert _texts(results, "local_chair") == [chair[name] for name in ours.truth]


def test_the_recipe_acts_as_under_apply(
    ours: Ours, miniature: Any, baseline: dict[str, Any], edited: Any
) -> None:
    model, processor = miniature
    names = list(ours.truth)
    images = [Image.open(ours.images / name).convert("RGB") for name in names]
    prompts = [make_prompt(processor, "Please describe this image in detail.")] * len(names)
    sinks = _description(edited[1])["interventions"][1]
    var = regard.VAR(transfer=0.9, sink_dims=tuple(sinks["sink_dims"]), tau=sinks["tau"])
    with left_padding(processor), regard.apply(model, "dola", var):
        direct = [reply.text for reply in generate(model, processor, prompts, images, 2048)]
    assert _texts(edited[0], "local_chair") == direct
    assert _texts(baseline, "local_chair") != direct
    assert _texts(baseline, "local_pope") != _texts(edited[0], "local_pope")


@pytest.mark.parametrize("recipe", ["none", RECIPE])
def test_pope_figures_are_ours_with_its_parser(recipe: str, ours: Ours, request: Any) -> None:
    results = (
        request.getfixturevalue("baseline") if recipe == "none" else request.getfixturevalue("edited")[0]
    )
    score = score_pope(ours.questions, _texts(results, "local_pope"), parser="lmms").pooled
    for metric, ours_is in {
        "accuracy": score.accuracy, "precision": score.precision, "recall": score.recall, "f1_score": score.f1
    }.items():  # fmt: skip
        assert _figure(results, "local_pope", f"pope_{metric}") == pytest.approx(ours_is, abs=1e-12)
    assert 0 < score.accuracy < 1
    assert _figure(results, "local_pope", "pope_yes_ratio") == 0.5  # of the labels, not of the answers


@pytest.mark.parametrize("recipe", ["none", RECIPE])
def test_chair_figures_are_ours_with_wordnet(recipe: str, ours: Ours, request: Any) -> None:
    results = (
        request.getfixturevalue("baseline") if recipe == "none" else request.getfixturevalue("edited")[0]
    )
    captions = dict(zip(ours.truth, _texts(results, "local_chair"), strict=True))
    score = score_chair(captions, ours.truth, "wordnet")
    assert score.mentions > 0
    assert _figure(results, "local_chair", "coco_cap_chair_i") == pytest.approx(100 * score.chair_i, abs=1e-9)
    assert _figure(results, "local_chair", "coco_cap_chair_s") == pytest.approx(100 * score.chair_s, abs=1e-9)
    assert _figure(results, "local_chair", "coco_cap_recall") == pytest.approx(100 * score.recall, abs=1e-9)


def _description(folder: Path) -> dict[str, Any]:
    files = list(folder.glob("*_regard_*.json"))
    assert len(files) == 1
    found: dict[str, Any] = json.loads(files[0].read_text())
    return found


def test_what_was_applied_lies_beside_the_results(edited: Any) -> None:
    results, folder = edited
    found = _description(folder)
    assert found["recipe"] == RECIPE
    assert [part["class"] for part in found["interventions"]] == ["DoLa", "VAR"]
    assert found["interventions"][1]["transfer"] == 0.9
    assert found["versions"]["lmms_eval"] == version("lmms_eval")
    assert found["tasks"] == ["local_chair", "local_pope"]
    assert found["example_prompt"].startswith("USER: <image>\nIs there a ")
    assert {layer["intervention"] for layer in found["report"]["layers"] if layer["rows"]} == {"dola", "var"}
    assert RECIPE in results["config"]["model_args"]
    assert results["throughput"]["total_gen_tokens"] > 0


def test_generation_settings_are_obeyed(ours: Ours, baseline: dict[str, Any]) -> None:
    """A token limit, a stop text and draws, given by --gen_kwargs."""
    whole = _texts(baseline, "local_chair")
    short = _evaluate(ours, "none", "local_chair", gen_kwargs="max_new_tokens=5")
    assert all(row["token_counts"][0]["output_tokens"] == 5 for row in short["samples"]["local_chair"])
    stopped = _texts(_evaluate(ours, "none", "local_chair", gen_kwargs="until=."), "local_chair")
    assert stopped == [text.split(".")[0] for text in whole]
    drawn = []
    for top_k, seed in ((1, 1), (0, 1), (0, 1), (0, 2)):
        wanted = f"temperature=1,top_k={top_k},max_new_tokens=20"
        found = _evaluate(ours, "none", "local_chair", gen_kwargs=wanted, torch_random_seed=seed)
        drawn.append(_texts(found, "local_chair"))
    assert all(text.startswith(likeliest) for text, likeliest in zip(whole, drawn[0], strict=True))
    assert drawn[0] != drawn[1] == drawn[2] != drawn[3]


def test_repeats_are_drawn_afresh(ours: Ours) -> None:
    results = _evaluate(ours, "none", "local_chair", gen_kwargs="temperature=1", repeats=18, limit=1)
    (row,) = results["samples"]["local_chair"]
    texts = row["resps"][0]
    assert len(texts) == 18
    assert texts[:2] != texts[16:]  # the second batch has another seed


@pytest.mark.parametrize(
    ("given", "search", "limit", "until"),
    [
        ({"until": [], "temperature": 0, "top_p": 0, "do_sample": False}, (0.0, 1, 1.0), 1024, ()),
        ({"until": "\n\n", "max_new_tokens": 7, "num_beams": 3}, (0.0, 3, 1.0), 7, ("\n\n",)),
        (
            {"until": None, "temperature": 0.5, "top_p": 0.9, "image_aspect_ratio": "pad"},
            (0.5, 1, 0.9),
            1024,
            (),
        ),
    ],
)
def test_settings_are_read(given: Any, search: Any, limit: int, until: Any) -> None:
    asked = _Asked.of(given, "a task")
    assert (asked.search.temperature, asked.search.num_beams, asked.search.top_p) == search
    assert (asked.max_new_tokens, asked.until) == (limit, until)


def test_a_stop_text_cuts_at_the_first() -> None:
    asked = _Asked.of({"until": ["b", "", "a", "z"]}, "a task")
    assert asked.cut("cab") == "c"
    assert asked.cut("ccc") == "ccc"


def test_beams_are_obeyed(ours: Ours, miniature: Any) -> None:
    model, processor = miniature
    results = _evaluate(ours, "none", "local_chair", gen_kwargs="num_beams=3,max_new_tokens=30")
    from regard.evals.generation import Search

    prompts = [make_prompt(processor, "Please describe this image in detail.")] * IMAGES
    images = [Image.open(ours.images / name).convert("RGB") for name in ours.truth]
    with left_padding(processor):
        direct = generate(model, processor, prompts, images, 30, Search(num_beams=3))
    assert _texts(results, "local_chair") == [reply.text for reply in direct]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"recipes": "vhr,var"}, EvalError, "one recipe"),
        ({"recipes": "vhrr"}, regard.UnknownName, "did you mean"),
        ({"batch_size": "auto"}, EvalError, "needs a number"),
        ({"dtype": "int3"}, regard.UnknownName, "dtype"),
    ],
)
def test_bad_arguments(options: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        RegardModel("miniature", device="cpu", **options)


def test_what_cannot_be_asked(ours: Ours) -> None:
    model = RegardModel("miniature", device="cpu", recipes='"vhr:layers=(1,2)"')
    assert model._setting.interventions[0].layers == (1, 2)
    with pytest.raises(EvalError, match="repetition_penalty"):
        _Asked.of({"repetition_penalty": 1.2}, "a task")
    image = Image.new("RGB", (8, 8))
    model.task_dict = {"a": {"test": [{}]}}
    for visuals in ([], [image, image], ["film.mp4"]):
        request = argparse.Namespace(args=("What?", {}, lambda _, v=visuals: v, 0, "a", "test"))
        with pytest.raises(EvalError, match="exactly one image"):
            model.generate_until([request])
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.loglikelihood([])


def test_the_model_is_as_before_between_calls(ours: Ours) -> None:
    """Several calls (a response cache makes them) count into one report; outside of them nothing is attached."""
    model = RegardModel("miniature", device="cpu", recipes="vhr", batch_size=4)
    name = next(iter(ours.truth))
    model.task_dict = {"a": {"test": [{"image": Image.open(ours.images / name).convert("RGB")}]}}
    args = ("Is there a dog in the image?", {"max_new_tokens": 2}, lambda doc: [doc["image"]], 0, "a", "test")
    counts = []
    for _ in range(2):
        (answer,) = model.generate_until([argparse.Namespace(args=args)])
        assert answer.token_counts.output_tokens <= 2
        counts.append(max(layer["prefills"] for layer in model.description["report"]["layers"]))
        assert model.model.config._attn_implementation == "sdpa"
    assert counts == [1, 2]
    model.clean()
    assert not hasattr(model, "model")
