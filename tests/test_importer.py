"""Answers made elsewhere: published figures through an imported run, every form of file, and what is refused."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from elsewhere import as_llava, as_lmms, ask, check_scores, flat, read_lines, said, share, value, write_lines
from typer.testing import CliRunner

import regard
from regard import cli
from regard.evals.harnesses.importer import import_answers, parse_files
from regard.evals.pope import Question
from regard.evals.run_folder import EvalError, RunFolderError
from regard.evals.sources import DataError
from regard.hooks.errors import UnknownName


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, list[Question]]:
    """POPE on a few images, with question files in the data folder."""
    return ask(tmp_path / "data")


# ------------------------------------------------------------------------------------- published figures


def test_llavas_answers_give_the_published_figures(shared_data: Path, tmp_path: Path) -> None:
    """Mean F1 85.9, in any order of lines; a second file is a recipe with paired differences."""
    expected = json.loads((shared_data / "expected_scores.json").read_text())["pope"]
    file = shared_data / expected["file"]
    rows = read_lines(file)
    random.Random(0).shuffle(rows)
    shuffled = write_lines(tmp_path / "shuffled.jsonl", rows)
    yes = write_lines(tmp_path / "yes.jsonl", [{**row, "text": "Yes"} for row in rows])
    data = shared_data / "pope" / "e3e3926"
    files = {"greedy": file, "shuffled": shuffled, "yes": yes}
    results = regard.import_answers("pope", files, data, tmp_path / "run")
    for recipe in ("none", "shuffled"):
        assert round(value(results, "mean_f1", recipe), 4) == expected["mean_f1"] == 0.8595
        for split, figures in expected["scores"].items():
            for key, name in {
                "accuracy": "acc",
                "precision": "precision",
                "recall": "recall",
                "f1": "f1",
            }.items():
                assert round(value(results, f"{split}.{key}", recipe), 4) == figures[name]
    found = results.metrics["pope"]
    assert (found["none"]["items"], found["none"]["images"]) == (8910, 500)
    same = found["shuffled"]["scores"]["mean_f1"]["difference"]
    assert (same["value"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)
    other = found["yes"]["scores"]["mean_f1"]["difference"]
    assert other["value"] == pytest.approx(value(results, "mean_f1", "yes") - 0.8595, abs=5e-5)
    assert other["high"] < 0
    assert other["p"] < 0.001
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model_name"] == "llava-v1.5-13b"
    assert config["data"]["pope"]["version"] == "e3e3926"
    assert config["recipes"]["none"][0]["note"] == "called greedy"
    assert config["recipes"]["yes"][0]["paired_by"] == "id"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "pope_answers_llava-v1.5-13b.jsonl" in page
    assert regard.Results.load(tmp_path / "run").metrics == results.metrics


@pytest.mark.parametrize(
    ("first", "second", "truth", "chair", "column"),
    [
        (
            "opera/llava-1.5_greedy.jsonl",
            "opera/llava-1.5_beam5.jsonl",
            "pattern_singularize",
            "opera",
            "wordnet_words+pattern_gt",
        ),
        (
            "less_is_more/r1-llava1.5-7b.jsonl",
            "less_is_more/r8-ours-cap.jsonl",
            "nltk_wordnet",
            "wordnet",
            "wordnet_words+wordnet_gt",
        ),
    ],
)
def test_captions_give_the_expected_chair(
    shared_data: Path,
    tmp_path: Path,
    nltk_here: Any,
    first: str,
    second: str,
    truth: str,
    chair: str,
    column: str,
) -> None:
    expected = json.loads((shared_data / "expected_scores.json").read_text())["chair"]
    outputs = shared_data / "outputs"
    results = import_answers(
        "chair",
        {"none": outputs / first, "other": outputs / second},
        out=tmp_path / "run",
        truth=shared_data / "chair" / f"chair_gt_trainval2014_{truth}.json.gz",
        chair=chair,
    )
    for recipe, file in {"none": first, "other": second}.items():
        figures = expected[file][column]
        assert round(100 * value(results, "chair_s", recipe), 1) == figures["CHAIRs"]
        assert round(100 * value(results, "chair_i", recipe), 2) == figures["CHAIRi"]
        assert round(100 * value(results, "recall", recipe), 2) == figures["Recall"]
    assert results.metrics["chair"]["none"]["items"] == 500
    assert results.config["scoring"]["truth_words"] == f"chair_gt_trainval2014_{truth}"


def test_captions_of_annotated_images_are_called_by_number_or_name(shared_data: Path, tmp_path: Path) -> None:
    """The objects come from COCO annotations, for the captioned images only; pictures are on the page."""
    coco = shared_data / "coco"
    images = json.loads((coco / "instances.json").read_text())["images"][:6]
    by_number = tmp_path / "by_number.jsonl"
    write_lines(by_number, [{"image_id": row["id"], "caption": "A dog and a person."} for row in images])
    mapping = tmp_path / "mapping.json"
    mapping.write_text(json.dumps({row["file_name"]: "A cat." for row in images[::-1]}))
    files = {"none": by_number, "cat": mapping}
    results = import_answers("chair", files, coco, tmp_path / "run", chair="regard")
    assert results.metrics["chair"]["none"]["items"] == 6
    assert list(results.data("chair")) == [row["file_name"] for row in images]
    truth = results.data("chair").values()
    hits = sum(thing in things for things in truth for thing in ("dog", "person"))
    assert value(results, "chair_i") == pytest.approx(1 - hits / 12)
    assert value(results, "chair_i", "cat") == pytest.approx(1 - sum("cat" in things for things in truth) / 6)
    assert len(list((tmp_path / "run" / "data" / "images").iterdir())) > 0
    extra = write_lines(tmp_path / "extra.jsonl", [{"image_id": 999999999, "caption": "A dog."}])
    with pytest.raises(DataError, match="1 of 1 captioned images are not in the annotations: 999999999"):
        import_answers("chair", {"none": extra}, coco, tmp_path / "other", chair="regard")


def test_lmms_evals_captions_of_a_data_set_of_ones_own(tmp_path: Path) -> None:
    """Its log tells an image by the number in the annotations, which the file's name does not hold."""
    from regard.evals.miniature.coco import coco_files

    data = Path(coco_files(tmp_path / "data", 4, seed=5))
    images = json.loads(next(data.rglob("instances*.json")).read_text())["images"]
    rows = []
    for number, row in enumerate(images):
        metric = {"answer": [], "pred": ["dog"], "image_id": row["id"]}
        rows.append(
            {"doc_id": number, "filtered_resps": "a dog.", "target": "[]", "coco_cap_chair_i": metric}
        )
    file = write_lines(tmp_path / "20251125_samples_coco_cap_chair.jsonl", rows[::-1])
    results = import_answers("chair", {"none": file}, data, tmp_path / "run", chair="regard")
    truth = results.data("chair")
    assert list(truth) == [row["file_name"] for row in images]
    assert value(results, "chair_i") == 1 - sum("dog" in things for things in truth.values()) / 4


# ----------------------------------------------------------------------------------------------- refusals


def test_answers_to_another_version_of_pope_are_refused(shared_data: Path, tmp_path: Path) -> None:
    """Most ids and some questions agree, and nothing may be scored, whatever is allowed."""
    file = shared_data / "outputs/llava_official/pope_answers_llava-v1.5-13b.jsonl"
    for allow in ({}, {"allow_extra": True, "allow_missing": True}):
        with pytest.raises(
            DataError, match=r"2816 of 8910 .*POPE version edebdda\. .*2910 rows \(version e3e3926\)"
        ):
            import_answers(
                "pope", {"none": file}, shared_data / "pope" / "edebdda", tmp_path / "run", **allow
            )
    assert not (tmp_path / "run").exists()
    captions = shared_data / "outputs/opera/llava-1.5_greedy.jsonl"
    with pytest.raises(
        DataError, match=r"answers none of the 9000 items\. Its first row says \{'image': '226988'\}"
    ):
        import_answers("pope", {"none": captions}, shared_data / "pope" / "edebdda", tmp_path / "run")


def test_popes_own_form_needs_by_order(asked: dict[str, list[Question]], tmp_path: Path) -> None:
    rows = [{"question": q.text, "answer": said(q)} for q in asked["random"]]
    file = write_lines(tmp_path / "answers_random.json", rows)
    one = tmp_path / "data" / "coco_pope_random.json"
    with pytest.raises(DataError, match=r"neither ids nor images.* add question_id"):
        import_answers("pope", {"none": file}, one, tmp_path / "run")
    results = import_answers("pope", {"none": file}, one, tmp_path / "run", by_order=True)
    check_scores(results, {"random": asked["random"]})
    assert results.config["recipes"]["none"][0]["paired_by"] == "order, with each question checked"
    write_lines(file, rows[::-1])
    with pytest.raises(DataError, match="each row must have the question of its item"):
        import_answers("pope", {"none": file}, one, tmp_path / "other", by_order=True)
    write_lines(file, rows[1:])
    with pytest.raises(DataError, match=f"{len(rows) - 1} answers for {len(rows)} items of random"):
        import_answers("pope", {"none": file}, one, tmp_path / "other", by_order=True)
    write_lines(file, [{"answer": row["answer"], "question": ""} for row in rows])
    with pytest.raises(DataError, match="row 1 answers None"):
        import_answers("pope", {"none": file}, one, tmp_path / "other", by_order=True)


def test_ids_without_splits_are_refused(asked: dict[str, list[Question]], tmp_path: Path) -> None:
    rows = [{"question_id": q.question_id, "text": said(q)} for q in flat(asked)]
    file = write_lines(tmp_path / "answers.jsonl", rows)
    with pytest.raises(DataError, match=r"row 2 \(id 2\) may answer several questions .*'category'"):
        import_answers("pope", {"none": file}, tmp_path / "data", tmp_path / "run")
    rows = [as_lmms(q, n) for n, q in enumerate(flat(asked))]
    rows[0]["filtered_resps"] = "perhaps"  # one of three twins, and nothing says which
    write_lines(file, rows)
    with pytest.raises(DataError, match=r"differently, and nothing says which split"):
        import_answers("pope", {"none": file}, tmp_path / "data", tmp_path / "run")


def test_missing_extra_and_repeated_answers(asked: dict[str, list[Question]], tmp_path: Path) -> None:
    whole = as_llava(asked)
    total = len(whole)
    base = write_lines(tmp_path / "base.jsonl", whole[3:])
    other = write_lines(tmp_path / "other.jsonl", whole[:-4])
    data, out = tmp_path / "data", tmp_path / "run"
    with pytest.raises(
        DataError,
        match=rf"none: 3 of {total} items have no answer: adversarial/1; adversarial/2; adversarial/3\. .*version own",
    ):
        import_answers("pope", {"none": base}, data, out)
    twice = write_lines(tmp_path / "twice.jsonl", [*whole, whole[5]])
    with pytest.raises(DataError, match=rf"adversarial/6 is answered by row 6 and by row {total + 1}"):
        import_answers("pope", {"none": twice}, data, out, allow_missing=True, allow_extra=True)
    odd = {"question_id": 20_999_999, "prompt": "Is there a kite in the image?", "text": "no"}
    extra = write_lines(tmp_path / "extra.jsonl", [*whole, odd])
    with pytest.raises(
        DataError, match=rf"none: 1 of {total + 1} answers are to none .*\(20999999, Is there a kite"
    ):
        import_answers("pope", {"none": extra}, data, out)
    assert not out.exists()
    aside = import_answers("pope", {"none": extra}, data, tmp_path / "aside", allow_extra=True)
    check_scores(aside, asked)
    assert aside.config["data"]["pope"]["set_aside"] == {"none": 1}
    common = import_answers("pope", {"none": base, "vhr": other}, data, out, allow_missing=True)
    for recipe in ("none", "vhr"):
        assert common.metrics["pope"][recipe]["items"] == total - 7
    assert common.config["data"]["pope"]["left_out"] == {"none": 3, "vhr": 4}
    assert common.unfinished == {}
    left = asked["adversarial"][3:]
    assert value(common, "adversarial.accuracy") == pytest.approx(share(left))
    random_only = write_lines(
        tmp_path / "o.jsonl", [row for row in whole if 10**7 < row["question_id"] < 2 * 10**7]
    )
    one = import_answers("pope", {"none": random_only}, data, tmp_path / "one", allow_missing=True)
    assert list(one.data("pope")) == ["random"]
    assert value(one, "mean_accuracy") == pytest.approx(share(asked["random"]))


def test_captions_of_other_images_and_no_ground_truth(tmp_path: Path) -> None:
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps({"1": ["dog"], "2": ["cat"], "3": ["bus"]}))
    first = write_lines(tmp_path / "a.jsonl", [{"image_id": n, "caption": "a dog"} for n in (1, 2)])
    second = write_lines(tmp_path / "b.jsonl", [{"image_id": n, "caption": "a dog"} for n in (2, 3)])
    options: dict[str, Any] = {"out": tmp_path / "run", "truth": truth, "chair": "regard"}
    with pytest.raises(DataError, match=r"b: 1 of 2 answers are to none of the 2 items: row 2 \(3\)"):
        import_answers("chair", {"none": first, "b": second}, **options)
    results = import_answers(
        "chair", {"none": first, "b": second}, allow_extra=True, allow_missing=True, **options
    )
    assert list(results.data("chair")) == ["000000000002.jpg"]
    assert value(results, "chair_i") == 1.0
    third = write_lines(tmp_path / "c.jsonl", [{"image_id": n, "caption": "a dog"} for n in (1, 8, 9)])
    with pytest.raises(
        DataError, match="2 of 3 captioned images have no ground truth: 8, 9; it has 3 images"
    ):
        import_answers("chair", {"none": third}, **options)
    apart = write_lines(tmp_path / "d.jsonl", [{"image_id": 3, "caption": "a dog"}])
    with pytest.raises(DataError, match="answers none of the 2 items"):
        import_answers("chair", {"none": first, "d": apart}, **options)


def test_what_an_import_needs(asked: dict[str, list[Question]], tmp_path: Path) -> None:
    file = write_lines(tmp_path / "answers.jsonl", as_llava(asked))
    out = tmp_path / "run"
    with pytest.raises(EvalError, match="pope needs the data folder"):
        import_answers("pope", {"none": file}, out=out)
    with pytest.raises(EvalError, match="is for chair"):
        import_answers("pope", {"none": file}, tmp_path / "data", out, truth=file)
    with pytest.raises(UnknownName, match="did you mean 'pope'"):
        import_answers("popes", {"none": file}, tmp_path / "data", out)
    with pytest.raises(UnknownName, match="did you mean 'official'"):
        import_answers("pope", {"none": file}, tmp_path / "data", out, parser="oficial")
    with pytest.raises(EvalError, match="no file of answers"):
        import_answers("pope", {}, tmp_path / "data", out)
    with pytest.raises(EvalError, match="labels must differ"):
        import_answers("pope", {"a b": file, "a_b": file}, tmp_path / "data", out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no POPE questions.*regard pope build"):
        import_answers("pope", {"none": file}, tmp_path / "empty", out)
    with pytest.raises(DataError, match="is a file: give a folder"):
        import_answers("pope", {"none": file}, file, out)


def test_a_run_takes_more_files_but_not_others(asked: dict[str, list[Question]], tmp_path: Path) -> None:
    rows = as_llava(asked)
    base = write_lines(tmp_path / "base.jsonl", rows)
    vhr = write_lines(tmp_path / "vhr.jsonl", [{**row, "text": "Yes"} for row in rows])
    data, out = tmp_path / "data", tmp_path / "run"
    import_answers("pope", {"none": base}, data, out)
    before = (out / "items" / "pope-none.jsonl").read_bytes()
    results = import_answers("pope", {"vhr": vhr, "none": base}, data, out)
    assert list(results.metrics["pope"]) == ["none", "vhr"]
    assert value(results, "mean_yes_ratio", "vhr") == 1.0
    assert (out / "items" / "pope-none.jsonl").read_bytes() == before
    with pytest.raises(RunFolderError, match=r"another recipes\.vhr"):
        import_answers("pope", {"none": base, "vhr": base}, data, out)
    text = results.table()
    assert "tokens/s" not in text or "–" in text


# ----------------------------------------------------------------------------------------- command line


def test_labels_and_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "x=y.jsonl"):
        (tmp_path / name).touch()
    a, b, odd = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "x=y.jsonl"))
    assert parse_files([f"none={a},{b}", f"var:transfer=0.3={b}", f"odd={odd}"]) == {
        "none": [a, b],
        "var:transfer=0.3": [b],
        "odd": [odd],
    }
    for given, message in {
        "a.jsonl": "write LABEL=FILE",
        "none=nowhere.jsonl": "there is no file nowhere.jsonl",
        f"={a}": "write LABEL=FILE",
    }.items():
        with pytest.raises(EvalError, match=message):
            parse_files([given])
    with pytest.raises(EvalError, match="'none' is given twice"):
        parse_files([f"none={a}", f"none={b}"])


def test_import_on_the_command_line(asked: dict[str, list[Question]], tmp_path: Path) -> None:
    rows = as_llava(asked)
    base = write_lines(tmp_path / "base.jsonl", rows)
    vhr = write_lines(tmp_path / "vhr.jsonl", [{**row, "text": "Yes"} for row in rows])
    options = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(
        cli.app, ["import", "pope", f"none={base}", f"vhr={vhr}", *options, "--model", "mine"]
    )
    assert done.exit_code == 0, done.output
    assert f"POPE: {len(rows)} questions, 12 images" in done.output
    assert "mine" in (tmp_path / "run" / "report.html").read_text()
    done = CliRunner().invoke(cli.app, ["import", "pope", f"none={base}", "--out", str(tmp_path / "other")])
    assert done.exit_code == 2
    assert "pope needs the data folder (--data)" in " ".join(done.output.split())
    assert not (tmp_path / "other").exists()
