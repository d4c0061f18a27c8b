"""Hooks of the site: equations become MathML when it is built, and the commands' page is made of their help."""

import html
import re
from typing import Any

import typer
import typer.cli
from latex2mathml.converter import convert
from mkdocs.plugins import get_plugin_logger

LOG = get_plugin_logger("equations")
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.+?)\\[)\]]</\1>', re.DOTALL)
COMMANDS = "<!-- commands -->"


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Put the help of `regard` and its commands where a page asks for it."""
    if COMMANDS not in markdown:
        return markdown
    from regard.cli import app

    command = typer.main.get_command(app)
    found = typer.cli.get_docs_for_click(obj=command, ctx=typer.Context(command), name="regard")
    return markdown.replace(COMMANDS, found.partition("\n")[2])  # the page has a title of its own


def on_page_content(content: str, page: Any, **kwargs: Any) -> str:
    """Equations of one page, as arithmatex leaves them, to MathML; what cannot be read is a warning."""

    def mathml(found: re.Match[str]) -> str:
        block, latex = found[1] == "div", html.unescape(found[2]).strip()
        try:
            made = convert(latex, display="block" if block else "inline")
        except Exception as error:
            LOG.warning("%s: %r cannot be read: %r", page.file.src_uri, latex, error)
            return found[0]
        braces = re.sub(r"\\[{}]", "", latex)
        if braces.count("{") != braces.count("}"):
            LOG.warning("%s: %r has an open or a closing brace too many", page.file.src_uri, latex)
        if "\\" in html.unescape(made):  # a command that is unknown is passed on as it is
            LOG.warning("%s: %r has an unknown command", page.file.src_uri, latex)
        return f'<div class="equation">{made}</div>' if block else made

    return EQUATION.sub(mathml, content)
