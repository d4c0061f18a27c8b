"""The layout that packaging depends on."""

import subprocess
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]


def test_kernels_has_no_init():
    assert not (ROOT / "kernels" / "__init__.py").exists(), (
        "kernels/__init__.py shadows Hugging Face's `kernels` and breaks `import transformers` here"
    )


def test_every_folder_with_code_is_packaged():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packaged = {config["package-dir"][name] for name in config["packages"]}
    found = {
        str(path.parent.relative_to(ROOT))
        for top in ("regard", "interventions", "hooks", "kernels", "evals")
        for path in (ROOT / top).rglob("*.py")
        if not (ROOT / "regard" / path.relative_to(ROOT).parts[0]).is_symlink() or top != "regard"
    }
    found = {folder for folder in found if not folder.startswith("regard/")}
    assert found <= packaged


def test_import_is_light():
    """`import regard` brings in nothing heavy, not even torch, before a name is used."""
    code = (
        "import sys, regard;"
        "heavy = {'torch', 'transformers', 'diffusers', 'nnsight', 'triton', 'matplotlib', 'scipy'} & set(sys.modules);"
        "assert not heavy, heavy;"
        "regard.apply;"
        "unused = {'diffusers', 'nnsight', 'matplotlib'} & set(sys.modules);"
        "assert not unused, unused"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
