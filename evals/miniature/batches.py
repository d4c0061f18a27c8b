"""Training batches for the miniature LVLM: one image, many independent questions.

A row is the prefix `<s> USER: <image>` followed by blocks, each a question with its answer. A block sees the
prefix and itself and its positions go on from the prefix, so each one is exactly a single-turn prompt, while
the image is paid for once.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from . import language
from .categories import COCO_IDS, INDEX, NAMES, SETTINGS
from .model import IMAGE_TOKENS, PATCH, SPECIAL
from .scenes import SIDE, Scene, make_scene

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FAR_NAMES = tuple(name for name in COCO_IDS if name not in INDEX)


@dataclass(frozen=True)
class Stage:
    """What one training stage shows.

    easy: share of easy scenes. length: tokens of a row, filled with yes/no questions after the caption, of the
    form "dog?" as well if `short`. caption: `brief` or `detail`.
    lr, tower_lr: peak learning rates; a rate of 0 freezes the tower. align: weight of the alignment loss.
    sinks: weight of the loss that teaches massive activations.
    """

    name: str
    images: int
    batch: int
    easy: float
    length: int = 0
    short: bool = False
    caption: str = ""
    lr: float = 1e-3
    tower_lr: float = 1e-3
    align: float = 0.0
    sinks: float = 0.0


STAGES: tuple[Stage, ...] = (
    Stage("tower", 50_000, 64, 0.3, lr=1.5e-3, tower_lr=1.5e-3),
    Stage("ground", 24_000, 48, 0.6, length=192, short=True, caption="brief", lr=2e-3, tower_lr=0, align=0.5),
    Stage("talk", 60_000, 48, 0.1, length=224, caption="detail", lr=1.5e-3, tower_lr=0, align=0.2, sinks=0.1),
)


class Words:
    """Token ids of text, by table lookup; the same ids as the tokenizer gives (tested)."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self.core = tokenizer.backend_tokenizer
        self.bos, self.eos, self.pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        self.image = SPECIAL.index("<image>")
        self.memory: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """Ids without BOS; sentences repeat so often that each is kept."""
        if text not in self.memory:
            self.memory[text] = self.core.encode(text, add_special_tokens=False).ids
        return self.memory[text]

    def caption(self, text: str) -> list[int]:
        """Ids of a caption, one lookup per sentence."""
        return [i for part in text.split(". ") for i in self(part if part.endswith(".") else part + ".")]


def absent(scene: Scene, count: int, rng: random.Random) -> list[str]:
    """Names not in the scene: half from its setting, the rest anywhere, some that no scene holds."""
    shown = set(scene.categories) | scene.hidden
    near = [name for name in SETTINGS[scene.setting] if name not in shown]
    far = [name for name in NAMES if name not in shown]
    names: list[str] = []
    while len(names) < count:
        draw = rng.random()
        pool = near if draw < 0.5 and near else far if draw < 0.95 else _FAR_NAMES
        names.append(rng.choice(pool))
    return names


def _questions(scene: Scene, stage: Stage, rng: random.Random) -> Iterator[tuple[str, str, bool]]:
    """(prompt, answer, is a full prompt) of yes/no questions about one scene, without end, half of them yes."""
    present = list(scene.categories) or absent(scene, 1, rng)
    while True:
        rng.shuffle(present)
        for name in present:
            pair = [(name, "Yes" if name in scene.categories else "No"), (absent(scene, 1, rng)[0], "No")]
            rng.shuffle(pair)
            for other, answer in pair:
                if stage.short and rng.random() < 0.8:
                    yield f"{other}?", answer, False
                else:
                    form = rng.choice((language.POPE_PROMPT, rng.choice(language.QUESTION_FORMS)))
                    yield language.question(other, form), answer, True


@dataclass
class Row:
    """One sequence: parallel lists over tokens. label is -100 where nothing is learnt; kind 1 yes/no, 2 caption."""

    ids: list[int]
    labels: list[int]
    kinds: list[int]
    blocks: list[int]
    positions: list[int]

    def add(self, prompt: list[int], answer: list[int], kind: int, block: int, start: int) -> None:
        """Append a question with its answer as one block."""
        self.ids += prompt + answer
        self.labels += [-100] * len(prompt) + answer
        self.kinds += [0] * len(prompt) + [kind] * len(answer)
        self.blocks += [block] * (len(prompt) + len(answer))
        self.positions += range(start, start + len(prompt) + len(answer))


def _caption(scene: Scene, stage: Stage, rng: random.Random) -> tuple[str, str]:
    """A prompt and its caption."""
    if stage.caption == "brief" or rng.random() < 0.15:
        return language.BRIEF_PROMPT, language.brief(scene)
    form = language.DETAIL_PROMPT if rng.random() < 0.7 else rng.choice(language.DETAIL_FORMS)
    return form, language.describe(scene, rng)


def make_row(scene: Scene, stage: Stage, words: Words, rng: random.Random) -> Row:
    """The token sequence of one scene: its caption, then questions as long as they fit."""
    prefix = [words.bos, *words("USER:"), *[words.image] * IMAGE_TOKENS]
    size = len(prefix)
    row = Row(list(prefix), [-100] * size, [0] * size, [0] * size, list(range(size)))
    ask = words(" ASSISTANT:")
    prompt, text = _caption(scene, stage, rng)
    row.add(words(prompt) + ask, [*words.caption(text), words.eos], 2, 1, size)
    for number, (prompt, answer, full) in enumerate(_questions(scene, stage, rng), start=2):
        question = words(prompt) + (ask if full else [])
        if len(row.ids) + len(question) + 2 > stage.length:
            return row
        row.add(question, [*words(answer), words.eos], 1, number, size)
    return row


def patch_targets(owners: np.ndarray) -> np.ndarray:
    """(64,) the category that covers most of each patch if it covers over 1/6 of it, else 32 (background)."""
    grid = SIDE // PATCH
    cells = owners.reshape(grid, PATCH, grid, PATCH).transpose(0, 2, 1, 3).reshape(grid * grid, -1)
    counts = (cells[..., None] == np.arange(len(NAMES), dtype=np.int8)).sum(1)
    best = counts.argmax(1)
    return np.where(counts.max(1) * 6 > PATCH * PATCH, best, len(NAMES))


class Batches(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Batch number i of a stage; the same i gives the same batch, so that training can resume."""

    def __init__(self, stage: Stage, words: Words, first: int, last: int, seed: int) -> None:
        self.stage, self.words, self.first, self.last, self.seed = stage, words, first, last, seed

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = random.Random(f"{self.stage.name}/{self.seed}/{self.first + index}")
        scenes = []
        for _ in range(self.stage.batch):
            difficulty = "easy" if rng.random() < self.stage.easy else "standard"
            scenes.append(make_scene(rng.getrandbits(48), "train", difficulty))
        batch = {
            "pixels": torch.from_numpy(np.stack([np.asarray(scene.image) for scene in scenes])),
            "patches": torch.from_numpy(np.stack([patch_targets(scene.owners) for scene in scenes])),
            "present": torch.tensor(
                [[name in scene.categories for name in NAMES] for scene in scenes]
            ).float(),
        }
        if self.stage.caption:
            rows = [make_row(scene, self.stage, self.words, rng) for scene in scenes]
            batch |= collate(rows, self.words.pad, self.stage.length)
        return batch


def collate(rows: list[Row], pad: int, length: int) -> dict[str, torch.Tensor]:
    """Right-pad rows to (B, length) tensors; one length for all batches means one compilation."""

    def stack(field: str, fill: int) -> torch.Tensor:
        lists = [getattr(row, field) for row in rows]
        return torch.tensor([values + [fill] * (length - len(values)) for values in lists])

    return {
        "ids": stack("ids", pad),
        "labels": stack("labels", -100),
        "kinds": stack("kinds", 0),
        "blocks": stack("blocks", -1),
        "positions": stack("positions", 0),
    }


def block_mask(blocks: torch.Tensor) -> torch.Tensor:
    """(B, 1, L, L) bool: a token sees the prefix (block 0) and what comes before it in its own block."""
    length = blocks.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=blocks.device).tril()
    same = blocks[:, :, None] == blocks[:, None, :]
    return ((same | (blocks[:, None, :] == 0)) & causal)[:, None]
