"""What commands print: results, and errors as one short message."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import typer

Command = TypeVar("Command", bound=Callable[..., Any])
state = {"debug": False}


def reported(command: Command) -> Command:
    """Print what a user can mend as one short message, and leave with exit code 2."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        from .hooks.errors import RegardError

        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            _complain("stopped; what was finished is kept, and the same command goes on from there")
            raise typer.Exit(130) from None
        except (RegardError, ValueError, OSError) as error:
            if state["debug"]:
                raise
            _complain(" ".join(str(error).split()) or type(error).__name__)
            raise typer.Exit(2) from None

    return wrapper  # type: ignore[return-value]


def _complain(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(message, style="red"), soft_wrap=True)


def show(results: Any) -> None:
    """Print the tables; of several processes, the first does."""
    from rich.console import Console

    from .evals.processes import processes

    if not processes().is_main_process:
        return
    console = Console()
    for part in results.rich():
        console.print(part)
    console.print(f"Page: {results.page}", soft_wrap=True)
