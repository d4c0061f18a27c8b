"""Commands on files: scoring answers made elsewhere, and POPE's questions. `cli.py` adds them to the others."""

import shlex
import sys
from typing import Annotated, Any

import typer

pope_app = typer.Typer(
    no_args_is_help=True,
    help="Build POPE's questions for a data set of your own, or say which ones a folder holds.",
)


def import_(
    benchmark: Annotated[str, typer.Argument(help="pope, chair, mme, ...: what the answers are to.")],
    files: Annotated[
        list[str],
        typer.Argument(
            help="LABEL=FILE, or LABEL=FILE,FILE for one a split. The baseline is the one called none."
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder of the run.")],
    data: Annotated[
        str | None,
        typer.Option(help="What was asked: the benchmark's folder, or one file of POPE questions."),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="auto, llava, pope, captions, amber, lmms, vlmeval or regard.")
    ] = "auto",
    truth: Annotated[
        str | None, typer.Option(help="For chair: a file of ground truth, in place of annotations.")
    ] = None,
    images: Annotated[str | None, typer.Option(help="Folder of the images for the page.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model, for the page.")] = None,
    parser: Annotated[
        str | None, typer.Option(help="How yes/no answers are read. Default: the benchmark's own way.")
    ] = None,
    chair: Annotated[
        str | None, typer.Option(help="How CHAIR reads words: wordnet, opera, pope or regard.")
    ] = None,
    drop_unfinished: Annotated[
        bool, typer.Option("--drop-unfinished", help="Leave out a caption's unfinished last sentence.")
    ] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Score the items that all files answer.")
    ] = False,
    allow_extra: Annotated[
        bool, typer.Option("--allow-extra", help="Leave aside answers to other questions.")
    ] = False,
    by_order: Annotated[
        bool, typer.Option("--by-order", help="Pair rows without ids by order, checking each question.")
    ] = False,
) -> None:
    """Score files of answers that were made elsewhere, like a run of one's own.

    Example: `regard import pope none=base.jsonl vhr=vhr.jsonl --data pope/coco --out runs/imported`
    """
    from .cli_output import show
    from .evals.harnesses.importer import import_answers, parse_files

    results = import_answers(
        benchmark, parse_files(files), data, out, form=form, truth=truth, images=images, model=model, parser=parser,
        chair=chair, drop_unfinished=drop_unfinished, allow_missing=allow_missing, allow_extra=allow_extra,
        by_order=by_order, command=shlex.join(["regard", *sys.argv[1:]]),
    )  # fmt: skip
    show(results)


def pope_build(
    data: Annotated[str, typer.Argument(help="Folder with instances*.json, or one COCO annotation file.")],
    out: Annotated[str, typer.Option(help="Folder of the questions.")],
    images: Annotated[int, typer.Option(help="How many images to draw.", min=1)] = 500,
    seed: Annotated[int, typer.Option(help="Seed of that draw and of the random negatives.")] = 0,
    per_image: Annotated[
        int,
        typer.Option(help="Objects that are there asked for on an image, and as many that are not.", min=1),
    ] = 3,
    chair: Annotated[
        str | None,
        typer.Option(help="How COCO's reference captions are read: wordnet, opera, pope or regard."),
    ] = None,
) -> None:
    """Build questions by POPE's rules for any data set in COCO's format.

    Example: `regard pope build warehouse/annotations.json --images 200 --out warehouse/pope`
    """
    from .evals.pope.build import write_pope

    _show_pope(write_pope(data, out, images, seed, per_image, chair))


def pope_check(
    path: Annotated[str, typer.Argument(help="Folder of POPE questions, or the file of one split.")],
) -> None:
    """Name the version of POPE questions, and count them.

    Example: `regard pope check POPE/output/coco`
    """
    from .evals.pope.build import check_pope

    _show_pope(check_pope(path))


def _show_pope(folder: Any) -> None:
    from rich.console import Console

    Console().print(str(folder), markup=False, highlight=False, soft_wrap=True)
