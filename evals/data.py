"""What a run asks: the items of each benchmark, and the image files."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .benchmark import Data, Item, Request
from .benchmarks import BENCHMARKS
from .sources import DataError, ImageIndex, Sources, find_sources, image_sizes, read_names

MINIATURE = "miniature"
_SEED_STRIDE = 1_000_000  # the miniature's scenes count up from their seed; two runs should share none

_LIST_ADVICE = "add them, or name the images that you want, one per line, in images.txt in the data folder"


@dataclass(frozen=True)
class Dataset:
    """The items of one run.

    Attributes:
        name: "miniature", or the folder as the user gave it.
        parts: what each benchmark asks and scores with.
        files: the file of every image that is used.
        sizes: their (width, height).
    """

    name: str
    parts: dict[str, Data]
    files: dict[str, Path]
    sizes: dict[str, tuple[int, int]]

    @cached_property
    def items(self) -> dict[str, list[Item]]:
        """The items of each benchmark."""
        return items_of(self.parts)

    def describe(self) -> dict[str, Any]:
        """What identifies the items of each benchmark, for `config.json`."""
        return {name: self._describe(name, data) for name, data in self.parts.items()}

    def _describe(self, name: str, data: Data) -> dict[str, Any]:
        images = hashlib.sha256()
        names = {item.image for item in self.items[name]}
        for image in sorted(names):
            images.update(f"{image}\n".encode())
            images.update(hashlib.sha256(self.files[image].read_bytes()).digest())
        text = json.dumps(data, ensure_ascii=False)
        return {
            "images": len(names),
            "images_sha256": images.hexdigest(),
            "items": len(self.items[name]),
            "items_sha256": hashlib.sha256(text.encode()).hexdigest(),
            **BENCHMARKS[name].describe(data),
        }


def items_of(parts: Mapping[str, Data]) -> dict[str, list[Item]]:
    """The items of each benchmark."""
    return {name: BENCHMARKS[name].items(data) for name, data in parts.items()}


def load_data(
    data: str | Path | Sources,
    benchmarks: Sequence[str],
    items: int,
    seed: int,
    scratch: Path,
    scoring: Mapping[str, Any],
) -> Dataset:
    """Collect the items of a run, and check that every image is there.

    Args:
        data: "miniature", a data folder, or `Sources`.
        benchmarks: their names.
        items: most images of each benchmark; they are drawn with the seed when there are more.
        seed: of the draw, of the miniature's scenes and of the questions that are built.
        scratch: where the miniature's scenes are drawn.
        scoring: as in `config.json`; "words" makes the ground truth of COCO's captions.

    Raises:
        DataError: something is missing; the message says what, and what to do.
    """
    if items < 1:
        raise DataError(f"items={items}: at least one image is needed")
    name = str(data.images if isinstance(data, Sources) else data)
    if name == MINIATURE:
        from .miniature.coco import coco_files

        data = coco_files(scratch, items, seed * _SEED_STRIDE)
    sources = data if isinstance(data, Sources) else find_sources(data)
    index = ImageIndex(sources.images)
    wanted = read_names(sources.names) if sources.names else None
    request = Request(name, sources, wanted, items, seed, scoring)
    parts = {benchmark: BENCHMARKS[benchmark].load(request) for benchmark in benchmarks}
    needed = dict.fromkeys(item.image for rows in items_of(parts).values() for item in rows)
    files = index.require(list(needed), _LIST_ADVICE)
    return Dataset(name, parts, files, image_sizes(files))
