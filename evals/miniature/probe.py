"""POPE and CHAIR of a model folder on held-out scenes, greedy, without an engine: a check while it trains.

python -m regard.evals.miniature.probe FOLDER [number of scenes] [easy, standard or hard]
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .language import DETAIL_PROMPT
from .scenes import Scene, make_scene

if TYPE_CHECKING:
    from ..chair.scoring import ChairScore
    from ..pope.scoring import SplitScore

FIRST_SEED = 900_000_000
"""Held-out scenes of the model card count up from here; runs of the benchmarks take other seeds."""


def held_out(count: int, first: int = FIRST_SEED, difficulty: str = "hard") -> list[Scene]:
    """`count` held-out scenes with three categories or more."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = make_scene(first, "test", difficulty)
        scenes += [scene] if len(scene.categories) >= 3 else []
        first += 1
    return scenes


def prompt(processor: Any, text: str) -> str:
    """The single-turn chat prompt with one image."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


@torch.inference_mode()
def answers(
    model: Any, processor: Any, items: Sequence[tuple[Scene, str]], tokens: int, batch: int = 48
) -> list[str]:
    """Greedy answers to (scene, prompt text) items."""
    texts: list[str] = []
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
        texts += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return texts


def pope(model: Any, processor: Any, scenes: Sequence[Scene]) -> "dict[str, SplitScore]":
    """POPE by the official rules, three objects and three absent ones per scene: split name to score."""
    from ..pope.scoring import build_pope, score_pope

    shown = {str(scene.seed): scene for scene in scenes}
    questions = build_pope({name: scene.categories for name, scene in shown.items()})
    said = {
        split: answers(model, processor, [(shown[row.image], row.text) for row in rows], 3)
        for split, rows in questions.items()
    }
    return dict(score_pope(questions, said).splits)


def chair(model: Any, processor: Any, scenes: Sequence[Scene], tokens: int = 120) -> "ChairScore":
    """CHAIR of the detailed descriptions; the annotated objects are the truth."""
    from ..chair.scoring import score_chair

    texts = answers(model, processor, [(scene, DETAIL_PROMPT) for scene in scenes], tokens)
    captions = {str(scene.seed): text for scene, text in zip(scenes, texts, strict=True)}
    return score_chair(captions, {str(scene.seed): scene.categories for scene in scenes}, words="regard")


def main() -> None:
    """Print the scores of a model folder."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(sys.argv[1])
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 100
    scenes = held_out(count, difficulty=sys.argv[3] if len(sys.argv) > 3 else "hard")
    score = chair(model, processor, scenes)
    print(score.to_dict(), flush=True)
    for record in score.captions[:3]:
        print(record.truth, "|", record.caption, flush=True)
    for split, figures in pope(model, processor, scenes).items():
        print(split, figures, flush=True)


if __name__ == "__main__":
    main()
