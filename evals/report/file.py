"""A page as one file: templates, the policy that keeps it from the network, JSON inside, and writing it in one step."""

import base64
import hashlib
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..run_folder import RunFolderError

_HERE = Path(__file__).resolve().parent


def policy(scripts: Sequence[str]) -> str:
    """A content security policy under which these scripts run and nothing is asked of the network."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}; "
        "base-uri 'none'; form-action 'none'"
    )


def script_text(text: str) -> str:
    """JSON that can stand in a script element: no `<`, so that nothing ends it or opens a comment."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


@cache
def template(name: str, folder: Path | None = None) -> Any:
    """A jinja template of `folder`, which may include those of this one."""
    from jinja2 import Environment, FileSystemLoader

    loader = FileSystemLoader([part for part in (folder, _HERE) if part])
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(name)


def write_page(out: Path, text: str) -> Path:
    """Replace a file in one step.

    Raises:
        RunFolderError: `out` is a folder, or cannot be written.
    """
    if out.is_dir():
        raise RunFolderError(f"{out} is a folder: give the name of a file, such as {out / 'report.html'}")
    part = out.with_name(f"{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, out)
    except OSError as error:
        raise RunFolderError(f"{out} cannot be written ({error.strerror or error})") from error
    return out
