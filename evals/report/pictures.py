"""The pictures of a page: small copies in the run's folder, each on the page once, within a budget."""

import base64
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

PAGE_BYTES = 40_000_000
"""About what a page may have; the pictures get what the texts leave."""
_SIDES = ((1_000, 256), (2_000, 192))  # up to so many images, so many pixels of the longer side
_SMALLEST_SIDE = 128
_QUALITY = 80


def side(images: int) -> int:
    """Pixels of the longer side of the copies, for a run of so many images."""
    return next((pixels for most, pixels in _SIDES if images <= most), _SMALLEST_SIDE)


def kept_file(run: Path, name: str) -> Path:
    """Where a run keeps the small copy of an image; names may have folders, in which base names repeat."""
    flat = name.replace("\\", "/").replace("/", "__")
    ending = "" if flat.lower().endswith((".jpg", ".jpeg")) else ".jpg"
    return run / "data" / "images" / f"{flat}{ending}"


def keep_pictures(run: Path, names: Iterable[str], files: Mapping[str, Path]) -> None:
    """Copy the images that are not there yet, small, into the folder of the run.

    Args:
        run: its folder.
        names: of all its images.
        files: image files by name; one that is missing or cannot be read gets no copy, and the page counts those.
    """
    from PIL import Image

    wanted = dict.fromkeys(names)
    pixels = side(len(wanted))
    for name in wanted:
        kept = kept_file(run, name)
        if name not in files or kept.is_file():
            continue
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_name(f"{kept.name}.part")
        try:
            with Image.open(files[name]) as image:
                image.draft("RGB", (2 * pixels, 2 * pixels))  # a JPEG is read at the size that is needed
                small = image.convert("RGB")
        except (OSError, SyntaxError):  # Pillow says SyntaxError for some broken PNG files
            continue
        small.thumbnail((pixels, pixels))
        small.save(part, format="JPEG", quality=_QUALITY, optimize=True)
        part.replace(kept)


class Pictures:
    """The pictures of one page as data URIs, equal ones once.

    Attributes:
        uris: in the order of their numbers.
        missing: how many images are not on the page for want of a copy.
        left_out: how many, for want of room.
    """

    def __init__(self, room: int) -> None:
        self.uris: list[str] = []
        self.missing, self.left_out = 0, 0
        self._room = room
        self._numbers: dict[bytes, int] = {}

    def add(self, file: Path) -> int:
        """The number of a picture on the page; -1 where it is not there."""
        if not file.is_file():
            self.missing += 1
            return -1
        content = file.read_bytes()
        key = hashlib.sha256(content).digest()
        if key in self._numbers:
            return self._numbers[key]
        kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
        uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        if len(uri) > self._room:
            self.left_out += 1
            return -1
        self._room -= len(uri)
        self._numbers[key] = len(self.uris)
        self.uris.append(uri)
        return self._numbers[key]

    def note(self) -> str:
        """How many are without picture, and why; "" where all are there."""
        parts = []
        if self.missing:
            parts.append(f"{self.missing} images have no copy in their run's folder")
        if self.left_out:
            parts.append(f"{self.left_out} images would make the page too large")
        return f"{'; '.join(parts)}: their items are shown without picture." if parts else ""
