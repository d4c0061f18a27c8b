"""A quick check of a miniature LVLM while it trains; the official scores come from the POPE and CHAIR benchmarks."""

import random
from collections import Counter
from itertools import combinations
from typing import Any

import torch

from .categories import NAMES, SETTINGS
from .language import DETAIL_PROMPT, question
from .scenes import Scene, make_scene


def prompt(processor: Any, text: str) -> str:
    """The single-turn chat prompt with one image."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


@torch.inference_mode()
def answers(
    model: Any, processor: Any, items: list[tuple[Scene, str]], tokens: int, batch: int = 50
) -> list[str]:
    """Greedy answers to (scene, prompt text) items."""
    texts = []
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        inputs = processor(
            images=[scene.image for scene, _ in part],
            text=[prompt(processor, text) for _, text in part],
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        texts += processor.batch_decode(new, skip_special_tokens=True)
    return texts


def negatives(scenes: list[Scene], mode: str, rng: random.Random, count: int = 3) -> list[list[str]]:
    """Absent names to ask per scene: random, popular, or adversarial (co-occurring most with what is there)."""
    popular = Counter(name for scene in scenes for name in scene.categories)
    pairs: Counter[tuple[str, str]] = Counter()
    for scene in scenes:
        for one, two in combinations(scene.categories, 2):
            pairs[one, two] += 1
            pairs[two, one] += 1
    chosen = []
    for scene in scenes:
        pool = [name for name in NAMES if name not in scene.categories]
        rng.shuffle(pool)
        if mode == "popular":
            pool.sort(key=lambda name: -popular[name])
        elif mode == "adversarial":
            pool.sort(key=lambda name: -sum(pairs[name, other] for other in scene.categories))
        chosen.append(pool[:count])
    return chosen


def pope(model: Any, processor: Any, scenes: list[Scene], mode: str, seed: int = 0) -> dict[str, float]:
    """Accuracy and share of yes over three present and three absent names per scene."""
    rng = random.Random(seed)
    items, truth = [], []
    for scene, wrong in zip(scenes, negatives(scenes, mode, rng), strict=True):
        right = rng.sample(scene.categories, min(3, len(scene.categories)))
        items += [(scene, question(name)) for name in right + wrong[: len(right)]]
        truth += [True] * len(right) + [False] * len(right)
    said = [text.strip().startswith("yes") for text in answers(model, processor, items, 3)]
    right_answers = sum(one == two for one, two in zip(said, truth, strict=True))
    return {"accuracy": right_answers / len(said), "yes": sum(said) / len(said)}


def mentioned(text: str) -> list[str]:
    """Categories that a caption names."""
    return [name for name in NAMES if name in text or (name == "person" and "people" in text)]


def chair(model: Any, processor: Any, scenes: list[Scene], tokens: int = 110) -> dict[str, float]:
    """Share of hallucinated mentions and captions, recall, mean words; hidden objects count as absent."""
    texts = answers(model, processor, [(scene, DETAIL_PROMPT) for scene in scenes], tokens)
    wrong = total = found = there = bad = 0
    for scene, text in zip(scenes, texts, strict=True):
        names = mentioned(text)
        false = [name for name in names if name not in scene.categories]
        wrong, total, bad = wrong + len(false), total + len(names), bad + bool(false)
        found, there = found + len(names) - len(false), there + len(scene.categories)
    words = sum(len(text.split()) for text in texts) / len(texts)
    result = {
        "chair_i": wrong / max(total, 1),
        "chair_s": bad / len(texts),
        "recall": found / there,
        "words": words,
    }
    near = sum(setting_fit(scene, text) for scene, text in zip(scenes, texts, strict=True))
    return result | {"false_in_setting": near / max(wrong, 1)}


def setting_fit(scene: Scene, text: str) -> int:
    """How many hallucinated names belong to the scene's setting."""
    return sum(name not in scene.categories and name in SETTINGS[scene.setting] for name in mentioned(text))


def main() -> None:
    """Print the scores of a model folder: `python -m regard.evals.miniature.probe FOLDER [scenes]`."""
    import sys

    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(sys.argv[1])
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 150
    scenes = [scene for scene in map(make_scene, range(count)) if len(scene.categories) >= 3]
    for mode in ("random", "popular", "adversarial"):
        print(mode, pope(model, processor, scenes, mode), flush=True)
    print(chair(model, processor, scenes), flush=True)
    for scene, text in zip(
        scenes[:3], answers(model, processor, [(s, DETAIL_PROMPT) for s in scenes[:3]], 110), strict=True
    ):
        print(scene.categories, "|", text)


if __name__ == "__main__":
    main()
