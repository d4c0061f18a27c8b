"""Fixtures shared by all tests."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real benchmark files that may lie beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real benchmark files (../shared/data) are not here")
    return folder


@pytest.fixture(scope="module")
def nltk_here(shared_data: Path) -> Iterator[Any]:
    """The nltk package, with the data that CHAIR's and AMBER's words need."""
    from regard.evals.chair import words

    nltk = pytest.importorskip("nltk")
    folder = str(shared_data / "nltk_data")
    nltk.data.path.insert(0, folder)
    words._nltk_ready.cache_clear()
    yield nltk
    nltk.data.path.remove(folder)
    words._nltk_ready.cache_clear()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
