"""Let Griffe read `regard.kernels`, a folder that has no `__init__.py` on purpose (CONTRIBUTING.md says why)."""

from pathlib import Path
from typing import Any

import griffe


class PlainFolders(griffe.Extension):
    """Adds the modules of `regard/kernels` to the package."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Called once the package is read, before names are looked up in it."""
        folder = Path(pkg.filepath).parent / "kernels"
        shared = {
            "lines_collection": loader.lines_collection,
            "modules_collection": loader.modules_collection,
        }
        kernels = griffe.Module("kernels", filepath=[folder], **shared)
        pkg.set_member("kernels", kernels)
        for file in sorted(folder.glob("*.py")):
            module = griffe.visit(
                file.stem,
                filepath=file,
                code=file.read_text(encoding="utf-8"),
                extensions=loader.extensions,
                parent=kernels,
                docstring_parser=loader.docstring_parser,
                docstring_options=loader.docstring_options,
                **shared,
            )
            kernels.set_member(file.stem, module)
