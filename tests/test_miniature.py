"""The miniature scenes and the miniature LVLM."""

import json
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from regard.evals.chair import chair_objects
from regard.evals.miniature import load_miniature, train_lvlm
from regard.evals.miniature.backgrounds import background
from regard.evals.miniature.batches import STAGES, Batches, Words, absent, block_mask, make_row, patch_targets
from regard.evals.miniature.categories import CATEGORIES, COCO_IDS, COMPANIONS, NAMES, SETTINGS
from regard.evals.miniature.coco import coco_files
from regard.evals.miniature.draw import draw_object
from regard.evals.miniature.language import DETAIL_PROMPT, QUESTION_FORMS, describe, question, references
from regard.evals.miniature.model import IMAGE_TOKENS, build_processor
from regard.evals.miniature.probe import answers, chair, held_out, pope, prompt
from regard.evals.miniature.scenes import SIDE, Scene, make_scene
from regard.evals.miniature.sinks import CHANNEL, sink_loss, sink_tokens


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(seed) for seed in range(250)]


@pytest.fixture(scope="module")
def lvlm():
    return load_miniature("lvlm")


# Scenes


@pytest.mark.parametrize("seed", [0, 7, 123456789012, -5])
def test_scene_follows_from_its_seed(seed):
    one, two = make_scene(seed), make_scene(seed)
    assert one.objects == two.objects
    assert np.array_equal(np.asarray(one.image), np.asarray(two.image))
    assert one.image.size == (SIDE, SIDE)


def test_scene_does_not_depend_on_global_random_state():
    random.seed(1)
    np.random.seed(1)
    one = make_scene(3)
    random.seed(2)
    np.random.seed(2)
    assert np.array_equal(np.asarray(one.image), np.asarray(make_scene(3).image))


def test_splits_and_difficulties_differ():
    images = [make_scene(5, "test"), make_scene(5, "train"), make_scene(5, "test", "easy")]
    arrays = [np.asarray(scene.image) for scene in images]
    assert not np.array_equal(arrays[0], arrays[1])
    assert not np.array_equal(arrays[0], arrays[2])


def test_setting_can_be_fixed():
    assert {make_scene(seed, setting="beach").setting for seed in range(5)} == {"beach"}


def test_boxes_areas_and_owners_agree(scenes):
    for scene in scenes[:100]:
        assert scene.owners.shape == (SIDE, SIDE)
        for item in scene.objects:
            left, top, width, height = item.bbox
            assert 0 <= left < left + width <= SIDE
            assert 0 <= top < top + height <= SIDE
            assert 12 <= item.area <= width * height
            assert 0.4 <= item.visibility <= 1
            region = scene.owners[
                int(top) : int(np.ceil(top + height)), int(left) : int(np.ceil(left + width))
            ]
            assert (region == NAMES.index(item.category)).any()


def test_boxes_change_the_picture(monkeypatch):
    """Inside each box the picture differs from the empty background, more than outside all boxes."""
    from regard.evals.miniature import scenes as module

    for seed in range(20):
        full = make_scene(seed)
        with monkeypatch.context() as patch:
            # the object is still drawn, so that random numbers are consumed alike, but nothing is pasted
            patch.setattr(Image.Image, "paste", lambda *args, **kwargs: None)
            empty = module.make_scene(seed)
        change = np.abs(np.asarray(full.image, float) - np.asarray(empty.image, float)).max(-1)
        for item in full.objects:
            left, top, width, height = (round(number) for number in item.bbox)
            inside = change[top : top + height, left : left + width]
            assert (inside > 8).mean() > 0.15, (seed, item)
        outside = full.owners == -1
        assert (change[outside] > 60).mean() < 0.1


def test_every_category_occurs_and_most_scenes_have_three(scenes):
    seen = Counter(name for scene in scenes for name in scene.categories)
    assert set(seen) == set(NAMES)
    assert np.mean([len(scene.categories) >= 3 for scene in scenes]) > 0.8


def test_co_occurrence_is_strong(scenes):
    """A companion raises the odds of its partner well above the partner's base rate."""
    present = np.array([[name in scene.categories for name in NAMES] for scene in scenes], float)
    base = present.mean(0)
    lifts = []
    for pair in COMPANIONS:
        one, two = (NAMES.index(name) for name in pair)
        lifts.append((present[:, one] * present[:, two]).mean() / (base[one] * base[two]))
    assert np.median(lifts) > 2.5
    inside = [set(scene.categories) <= set(SETTINGS[scene.setting]) for scene in scenes]
    assert 0.6 < np.mean(inside) < 1


def test_drawings_are_distinct():
    """Whatever its colours, the drawing most like a category's drawing is another one of that category."""
    pictures, owners = [], []
    for category in CATEGORIES:
        for seed in range(8):
            rng = random.Random(seed)
            colour = category.colours[seed % 2 % len(category.colours)]
            tile = draw_object(category.name, colour, int(category.width * 2), int(category.height * 2), rng)
            canvas = Image.new("RGBA", (SIDE, SIDE), (128, 128, 128, 255))
            canvas.alpha_composite(tile, ((SIDE - tile.width) // 2, (SIDE - tile.height) // 2))
            pictures.append(np.asarray(canvas.convert("RGB"), np.float32).ravel())
            owners.append(category.name)
    table = np.stack(pictures)
    distance = (table**2).sum(1)[:, None] - 2 * table @ table.T + (table**2).sum(1)
    np.fill_diagonal(distance, np.inf)
    nearest = [owners[number] for number in distance.argmin(1)]
    assert [pair for pair in zip(owners, nearest, strict=True) if pair[0] != pair[1]] == []


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_backgrounds_differ_between_settings(setting):
    mean = {name: np.asarray(background(name, 64, random.Random(0)), float) for name in SETTINGS}
    others = [np.abs(mean[setting] - mean[name]).mean() for name in SETTINGS if name != setting]
    assert min(others) > 10


def test_coco_ids_are_the_official_ones():
    assert len(COCO_IDS) == 80
    assert COCO_IDS["person"] == 1
    assert COCO_IDS["stop sign"] == 13
    assert COCO_IDS["dining table"] == 67
    assert COCO_IDS["toothbrush"] == 90
    assert len(NAMES) == 32
    assert {name for weights in SETTINGS.values() for name in weights} == set(NAMES)


def test_coco_files_read_by_pycocotools(tmp_path):
    from pycocotools.coco import COCO

    folder = coco_files(tmp_path / "data", count=30, seed=100)
    instances, captions = COCO(str(folder / "instances.json")), COCO(str(folder / "captions.json"))
    assert len(instances.getImgIds()) == 30
    for image in instances.loadImgs(instances.getImgIds()):
        scene = make_scene(image["id"], "test", "hard")
        picture = np.asarray(Image.open(folder / "images" / image["file_name"]))
        assert re.fullmatch(r"scene_\d{12}\.png", image["file_name"])
        assert np.array_equal(picture, np.asarray(scene.image))
        rows = instances.loadAnns(instances.getAnnIds(imgIds=image["id"]))
        named = [instances.loadCats(row["category_id"])[0]["name"] for row in rows]
        assert named == [item.category for item in scene.objects]
        assert len(set(named)) >= 3
        assert instances.annToMask(rows[0]).sum() > 0
        assert len(captions.getAnnIds(imgIds=image["id"])) == 5
    again = coco_files(tmp_path / "again", count=30, seed=100)
    assert (again / "instances.json").read_bytes() == (folder / "instances.json").read_bytes()
    assert (again / "captions.json").read_bytes() == (folder / "captions.json").read_bytes()


# Language


def named(text):
    return {mention.node for mention in chair_objects(text, "regard")}


def test_descriptions_name_what_is_there(scenes):
    """CHAIR's own word lists find just the annotated categories in descriptions, and no others in references."""
    for scene in scenes[:100]:
        assert named(describe(scene, random.Random(0))) == set(scene.categories)
        assert len(references(scene)) == 5
        for line in references(scene):
            assert named(line) <= set(scene.categories)


def test_every_word_is_in_the_vocabulary(scenes):
    tokenizer = build_processor().tokenizer
    texts = [question(name, form) for name in COCO_IDS for form in QUESTION_FORMS]
    for scene in scenes[:100]:
        texts += [describe(scene, random.Random(scene.seed)), *references(scene)]
    unknown = [ids.count(tokenizer.unk_token_id) for ids in tokenizer(texts).input_ids]
    assert [text for text, count in zip(texts, unknown, strict=True) if count] == []
    assert tokenizer.decode(tokenizer("Yes, a dog.").input_ids, skip_special_tokens=True) == "yes, a dog."


def test_training_rows_equal_the_processors_prompts():
    processor = build_processor()
    words = Words(processor.tokenizer)
    scene = make_scene(1)
    for form in QUESTION_FORMS:
        text = question("traffic light", form)
        inputs = processor(images=scene.image, text=prompt(processor, text), return_tensors="pt")
        row = [words.bos, *words("USER:"), *[words.image] * IMAGE_TOKENS, *words(text), *words(" ASSISTANT:")]
        assert inputs["input_ids"][0].tolist() == row


def test_blocks_see_the_prefix_and_themselves_only():
    words = Words(build_processor().tokenizer)
    row = make_row(make_scene(1), STAGES[2], words, random.Random(0))
    blocks = torch.tensor([row.blocks])
    mask = block_mask(blocks)[0, 0]
    last = max(row.blocks)
    first = row.blocks.index(last)
    assert mask[-1, : row.blocks.count(0)].all()
    assert not mask[-1, row.blocks.count(0) : first].any()
    assert mask[-1, first:].all()
    assert row.positions[first] == row.blocks.count(0)


def test_training_batches_repeat_and_never_ask_for_what_is_there():
    words = Words(build_processor().tokenizer)
    one, two = Batches(STAGES[1], words, 0, 3, 0)[2], Batches(STAGES[1], words, 2, 3, 0)[0]
    assert all(torch.equal(one[name], two[name]) for name in one)
    for seed in range(50):
        scene = make_scene(seed)
        assert not set(absent(scene, 20, random.Random(seed))) & set(scene.categories)
        assert set(patch_targets(scene.owners).tolist()) - {len(NAMES)} <= set(scene.owners.ravel().tolist())


def test_sink_loss_marks_bos_and_plain_corners():
    ids = torch.tensor([[2, 5, *[4] * IMAGE_TOKENS, 7]])
    plain = torch.ones(1, IMAGE_TOKENS, dtype=torch.bool)
    plain[0, 63] = False  # an object lies in the last corner
    marked = sink_tokens(ids, 4, plain)
    assert marked[0].nonzero()[:, 0].tolist() == [0, 2, 9, 58]
    good = torch.ones(1, ids.shape[1], 128)
    good[..., CHANNEL] = torch.where(marked, 20.0, 0.0)
    assert sink_loss((good,) * 6, marked) == 0
    assert sink_loss((good,) * 6, ~marked) > 1


def test_training_stops_and_resumes(tmp_path, capsys):
    """Killed after its first stage and started again, training ends with the weights of an unbroken run."""
    from safetensors.torch import load_file

    size = ["--images", "4", "--batch", "2", "--workers", "0", "--warmup", "1", "--threads", "1"]
    threads = torch.get_num_threads()
    train_lvlm.main(["--out", str(tmp_path / "whole"), *size])
    train_lvlm.main(["--out", str(tmp_path / "parts"), "--stage", "tower", *size])
    train_lvlm.main(["--out", str(tmp_path / "parts"), *size])
    torch.set_num_threads(threads)
    assert capsys.readouterr().out.count("done") == 3
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.allclose(whole[name], parts[name], atol=1e-5) for name in whole)


# The model


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="choose 'lvlm' or 't2i'"):
        load_miniature("llava")


def test_model_is_the_real_class_and_small(lvlm):
    from pathlib import Path

    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    import regard.evals.miniature as package

    model, processor = lvlm
    assert isinstance(model, LlavaForConditionalGeneration)
    assert isinstance(processor, LlavaProcessor)
    assert not model.training
    assert model.dtype == torch.float32
    assert model.config.text_config.num_hidden_layers >= 6
    assert model.config.text_config.num_attention_heads == 8
    folder = Path(package.__file__).parent / "lvlm"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12_000_000
    json.loads((folder / "config.json").read_text())


def test_model_sees_and_is_misled(lvlm):
    """POPE on held-out scenes: far above chance; objects that usually go with what is there mislead it."""
    scores = pope(*lvlm, held_out(20, first=5000))
    assert scores["random"].accuracy > 0.88
    assert scores["adversarial"].accuracy > 0.7
    assert scores["adversarial"].accuracy < scores["random"].accuracy
    assert sum(score.unclear for score in scores.values()) == 0


def test_model_is_at_chance_without_the_image(lvlm):
    scenes = held_out(12, first=7000)
    blank = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
    right = []
    for scene in scenes:
        empty = Scene(0, "test", scene.setting, blank, (), frozenset(), scene.owners)
        others = absent(scene, 3, random.Random(scene.seed))
        asked = [*scene.categories[:3], *others]
        said = answers(*lvlm, [(empty, question(name)) for name in asked], 3)
        right += [
            text == ("yes" if name in scene.categories else "no")
            for text, name in zip(said, asked, strict=True)
        ]
    assert 0.4 < np.mean(right) < 0.6


def test_model_describes_and_sometimes_errs(lvlm):
    score = chair(*lvlm, held_out(32, first=6000))
    assert score.recall > 0.65
    assert 0.03 < score.chair_i < 0.25
    assert 20 < score.words_per_caption < 70


def test_answers_do_not_depend_on_batching_or_wording(lvlm):
    model, processor = lvlm
    scene = make_scene(42)
    items = [(scene, question(name, form)) for name in scene.categories[:2] for form in QUESTION_FORMS]
    items.append((scene, DETAIL_PROMPT))
    alone = [answers(model, processor, [item], 6)[0] for item in items]
    assert answers(model, processor, items, 6) == alone
    assert all(text in ("yes", "no") for text in alone[:-1])
