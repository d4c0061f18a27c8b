"""Every pair of recipes on a tiny LLaVA: both act, or the pair is refused with a reason before generation.

`python -m tests.test_pairs` writes what is seen to docs/pairs.md; the test holds that page against what it sees.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import regard
from tests.families import Family, build
from tests.test_agla import FORM, corner

PAGE = Path(__file__).resolve().parents[1] / "docs" / "pairs.md"
SINKS: dict[str, Any] = {"sink_dims": (3, 11, 20), "tau": 1.6}
OURS: dict[str, Any] = {  # settings under which a recipe acts on a model of three layers
    "vhr": {"alpha": 3.0, "layers": (0, 2)},
    "var": {**SINKS, "min_visual": 0.0, "rho": 0.0, "layers": (1, 2)},
    "drop_sinks": {**SINKS, "layers": (1, 2)},
    "m3id": {"alpha": 1.0, "decay": 0.5},
    "pai": {"layers": (0, 1, 2)},
    "icd": {"role_ids": (17, 33, 90)},
    "agla": {"matcher": corner, "text": "a dog", "pixels": FORM},
}
CLASSES = {"drop_sinks": "DropSinks", "plausible": "Plausible", "dola": "DoLa", "dyvte": "DyVTE"}


def names() -> list[str]:
    return [
        recipe.name for recipe in regard.recipes() if recipe.name != "none" and recipe.on == "transformers"
    ]


@functools.cache
def family() -> Family:
    return build("llava")


def make(name: str) -> Any:
    if name not in OURS:
        return regard.recipe(name, family().model)
    return getattr(regard, CLASSES.get(name, name.upper()))(**OURS[name])


def together(first: str, second: str) -> str:
    """ "yes" where both act, or the reason why not."""
    model, inputs = family().model, family().batch([{"text": 6, "seed": 2}])
    settings = {"num_beams": 3} if "opera" in (first, second) else {"output_logits": True}
    try:
        with regard.apply(model, make(first), make(second)) as run:
            out = model.generate(
                **inputs, do_sample=False, max_new_tokens=4, return_dict_in_generate=True, **settings
            )
    except regard.RegardError as error:
        return str(error)
    assert all(logits.isfinite().any(-1).all() for logits in getattr(out, "logits", None) or ())
    acted = {tally.intervention for tally in run.report().tallies if tally.prefill or tally.decode}
    assert acted >= {first, second} - {"opera"}, f"only {acted} acted"
    return "yes"


@functools.cache
def seen() -> dict[tuple[str, str], str]:
    return {pair: together(*pair) for pair in itertools.combinations(names(), 2)}


def page() -> str:
    """docs/pairs.md."""
    known, found = names(), seen()
    lines = [
        "# Which recipes compose",
        "",
        "Seen on a tiny LLaVA by `tests/test_pairs.py`: `+` both act, `-` refused before generation.",
    ]
    lines += [
        "Recipes act in the order given. Branches are never edited: an edit of layers changes the main stream only.",
        "",
    ]
    lines += ["| | " + " | ".join(f"`{name}`" for name in known) + " |", "|---" * (len(known) + 1) + "|"]
    for row in known:
        cells = [
            ""
            if row == column
            else "+"
            if found.get((row, column), found.get((column, row))) == "yes"
            else "-"
            for column in known
        ]
        lines.append(f"| `{row}` | " + " | ".join(cells) + " |")
    lines += ["", "Refused:", ""]
    lines += [f"- `{a}` with `{b}`: {why}" for (a, b), why in found.items() if why != "yes"]
    lines.append("")
    return "\n".join(lines)


@pytest.mark.parametrize("pair", list(itertools.combinations(names(), 2)), ids="+".join)
def test_a_pair_composes_or_says_why_not(pair: tuple[str, str]) -> None:
    before = family().model(**family().inputs()).logits
    why = seen()[pair]
    assert why == "yes" or pair[0] in why or pair[1] in why, "the reason names neither recipe"
    assert torch.equal(family().model(**family().inputs()).logits, before)


def test_the_page_says_what_is_seen() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.test_pairs"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
