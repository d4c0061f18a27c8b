"""Let Griffe see the package as Python does at run time."""

from pathlib import Path
from typing import Any

import griffe


class AsImported(griffe.Extension):
    """Adds what Griffe leaves out of `regard`, and mends what it takes for something else."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Called once the package is read, before names are looked up in it."""
        _add_kernels(pkg, loader)
        for name, member in list(pkg.members.items()):
            if isinstance(member, griffe.Alias) and name in _module_at(loader, member.target_path):
                # `from .interventions import divergence` is the function, and not the module that it is in
                pkg.set_member(name, griffe.Alias(name, f"{member.target_path}.{name}", parent=pkg))


def _add_kernels(pkg: griffe.Module, loader: griffe.GriffeLoader) -> None:
    """The modules of `regard.kernels`, a folder without an `__init__.py` on purpose (CONTRIBUTING.md says why)."""
    folder = Path(pkg.filepath).parent / "kernels"
    shared = {"lines_collection": loader.lines_collection, "modules_collection": loader.modules_collection}
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


def _module_at(loader: griffe.GriffeLoader, path: str) -> dict[str, Any]:
    """The members of the module at a path; none where there is no module."""
    try:
        found = loader.modules_collection.get_member(path)
    except KeyError:
        return {}
    return found.members if isinstance(found, griffe.Module) else {}
