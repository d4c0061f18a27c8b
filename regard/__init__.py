"""regard: training-free interventions on multimodal models, each figure beside its baseline."""

from pathlib import Path as _Path

_root = _Path(__file__).resolve().parents[1]
if (_root / "pyproject.toml").is_file():  # a source checkout: the subpackages lie beside this folder
    __path__.append(str(_root))

__version__ = "0.1.0"
