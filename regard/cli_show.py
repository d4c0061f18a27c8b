"""The command that looks inside: `show`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

PROMPT = "Please describe this image in detail."


def show_(
    model: Annotated[
        str,
        typer.Option(
            help='"miniature" or "miniature-t2i", a local folder, or a name on the hub: a vision-language model, or '
            "a diffusers pipeline."
        ),
    ] = "miniature",
    image: Annotated[
        Path | None, typer.Option(help="The picture. The miniature has drawn ones: default is --seed's.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="The question, or what to draw.")] = PROMPT,
    out: Annotated[Path, typer.Option(help="File of the page.")] = Path("show.html"),
    recipes: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated names, compared with the plain model. Default: var where the model's sinks are "
            "known or stand out; none for text-to-image."
        ),
    ] = None,
    objects: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated objects that are in the picture; others that are named are marked."
        ),
    ] = None,
    words: Annotated[
        str | None,
        typer.Option(help="Text-to-image: comma-separated words of the prompt to map. Default: all."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Limit of the answer.", min=1)] = 64,
    steps: Annotated[int, typer.Option(help="Text-to-image: denoising steps.", min=1)] = 25,
    seed: Annotated[int, typer.Option(help="Of the noise, or of the miniature's picture.")] = 4,
    importance: Annotated[
        bool, typer.Option(help="Prune each head of the vision tower: as many forwards as it has heads.")
    ] = True,
    dtype: Annotated[str, typer.Option(help="auto (as saved), float32, float16 or bfloat16.")] = "auto",
    device: Annotated[
        str | None,
        typer.Option(help='cpu, cuda, cuda:1, or "auto" to spread the model. Default: cuda if there.'),
    ] = None,
) -> None:
    """Show what a model does inside with one picture and prompt: one HTML page, to look at and to keep.

    Point at a word of the answer to see where it looked, plain and with recipes. Below: which heads look at the image,
    shares of attention, sinks, outliers of the vision tower, attention flow, heads of the vision tower.

    Example: `regard show` (the embedded model), or `regard show --model llava-hf/llava-1.5-7b-hf --image cat.jpg
    --prompt "What is on the table?" --objects cat,table --out cat.html`

    Text-to-image: `regard show --model miniature-t2i --prompt "a dog and an apple" --words dog,apple`
    """
    with _progress() as progress:
        progress("loading the model")
        if _is_pipeline(model):
            page = _drawn(model, prompt, _listed(words), _listed(recipes), steps, seed, device, progress)
        else:
            page = _answered(
                model, image, prompt, recipes, _listed(objects), max_new_tokens, seed, importance, dtype, device,
                progress,
            )  # fmt: skip
        written = page.write(out)
    typer.echo(f"Page: {written}")


@contextmanager
def _progress() -> Iterator[Callable[[str], Any]]:
    """A line that says what is being done."""
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield lambda step: status.update(f"{step} ...")


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _is_pipeline(model: str) -> bool:
    """Whether a name is a diffusers pipeline's: its folder, or its repository on the hub, has a model_index.json."""
    if model in ("miniature", "miniature-t2i") or Path(model).is_dir():
        return model == "miniature-t2i" or (Path(model) / "model_index.json").is_file()
    from huggingface_hub import file_exists
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return bool(file_exists(model, "model_index.json"))
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError):
        return False  # the loader says what is wrong with the name


def _answered(
    name: str,
    image: Path | None,
    prompt: str,
    recipes: str | None,
    objects: list[str],
    max_new_tokens: int,
    seed: int,
    importance: bool,
    dtype: str,
    device: str | None,
    progress: Callable[[str], Any],
) -> Any:
    from PIL import Image

    from .evals.loading import load_model
    from .inside import show

    there = objects or None
    if image is not None:
        picture = Image.open(image).convert("RGB")
    elif name == "miniature":
        from .evals.miniature.scenes import make_scene

        scene = make_scene(seed, split="test")
        picture, there = scene.image, there or list(scene.categories)
    else:
        raise ValueError("--image is missing: give a picture, or take the miniature, which has drawn ones")
    model, processor = load_model(name, dtype, device)
    return show(
        model, processor, picture, prompt, recipes=recipes, objects=there, max_new_tokens=max_new_tokens,
        importance=importance, progress=progress,
    )  # fmt: skip


def _drawn(
    name: str,
    prompt: str,
    words: list[str],
    recipes: list[str],
    steps: int,
    seed: int,
    device: str | None,
    progress: Callable[[str], Any],
) -> Any:
    from .evals.loading import load_pipeline
    from .inside import show_drawn

    if prompt == PROMPT:
        raise ValueError('--prompt is missing: say what to draw, such as "a dog and an apple"')
    pipe = load_pipeline(name, device)
    return show_drawn(
        pipe, prompt, words=words or None, recipes=recipes, steps=steps, seed=seed, progress=progress
    )
