"""Disks that fill up or go away: what was done is kept, and the same command goes on."""

import resource

import pytest

import regard
from regard.evals import runner
from regard.evals.miniature.coco import coco_files
from regard.evals.run_folder import RunFolderError
from regard.evals.sources import DataError

OPTIONS = {"items": 3, "batch_size": 4, "max_new_tokens": {"pope": 3, "chair": 12}, "progress": False}


@pytest.fixture(scope="module")
def miniature():
    return regard.load_miniature("lvlm")


def lines(folder, name):
    return (folder / "items" / f"{name}.jsonl").read_bytes().splitlines(keepends=True)


def test_a_full_disk_keeps_what_was_done(miniature, tmp_path):
    """The system lets no file grow beyond 14,000 bytes: the write that would stops half-way."""
    out, data, options = tmp_path / "run", coco_files(tmp_path / "data", 3), {**OPTIONS, "chair": "regard"}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (14000, hard))
    try:
        with pytest.raises(
            RunFolderError, match=r"pope-none.jsonl cannot be written .*is kept.*start the same"
        ):
            regard.evaluate(*miniature, "pope", ["none", "vhr"], data, out=out, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    file = out / "items" / "pope-none.jsonl"
    assert file.stat().st_size == 14000
    kept = lines(out, "pope-none")[:-1]
    assert len(kept) > 10
    results = regard.evaluate(*miniature, "pope", ["none", "vhr"], data, out=out, **options)
    assert lines(out, "pope-none")[: len(kept)] == kept
    whole = regard.evaluate(*miniature, "pope", ["none", "vhr"], data, out=tmp_path / "whole", **options)
    assert results.metrics["pope"]["vhr"]["scores"] == whole.metrics["pope"]["vhr"]["scores"]


def test_an_image_that_vanishes_keeps_what_was_done(miniature, tmp_path, monkeypatch):
    folder, hidden = coco_files(tmp_path / "data", 3), tmp_path / "hidden.png"
    victim = sorted((folder / "images").iterdir())[-1]
    real = runner.generate

    def unplug(*arguments):
        if victim.exists() and len(list((tmp_path / "run").glob("items/*"))):
            victim.rename(hidden)
        return real(*arguments)

    monkeypatch.setattr(runner, "generate", unplug)
    options = {**OPTIONS, "batch_size": 1}
    with pytest.raises(DataError, match=rf"{victim.name} could be read before and cannot be now"):
        regard.evaluate(*miniature, "chair", ["none"], folder, out=tmp_path / "run", **options)
    before = lines(tmp_path / "run", "chair-none")
    assert len(before) == 2
    hidden.rename(victim)
    monkeypatch.setattr(runner, "generate", real)
    regard.evaluate(*miniature, "chair", ["none"], folder, out=tmp_path / "run", **options)
    assert lines(tmp_path / "run", "chair-none")[:2] == before
