"""The command line: demo, bench, report, import, pope, show, recipes, doctor.

Heavy imports are inside the commands, so that `regard --help` answers at once.
"""

import shlex
import sys
from typing import Annotated, Any

import typer

from .cli_answers import import_, pope_app, pope_build, pope_check
from .cli_output import reported, show, state
from .cli_show import show_

app = typer.Typer(
    name="regard",
    help="Training-free interventions on multimodal models, measured against the same model without them.\n\n"
    "Start with `regard demo`: it runs the whole thing on an embedded model, offline, in under two minutes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipesOption = Annotated[
    str,
    typer.Option(
        help='Comma-separated names. "none", the baseline, always runs. Settings: `var:transfer=0.3`. '
        "Several at once: `vhr+var`."
    ),
]
SeedOption = Annotated[int, typer.Option(help="Seed of the choice of images and of the questions.")]
ItemsOption = Annotated[int, typer.Option(help="Most images. POPE asks up to 18 questions on each.", min=1)]
BatchOption = Annotated[int, typer.Option(help="Prompts at once. Smaller needs less memory.", min=1)]
ModelOption = Annotated[str, typer.Option(help='"miniature", a local folder, or a name on the hub.')]
DtypeOption = Annotated[str, typer.Option(help="auto (as saved), float32, float16 or bfloat16.")]
DeviceOption = Annotated[
    str | None, typer.Option(help='cpu, cuda, cuda:1, or "auto" to spread the model. Default: cuda if there.')
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"regard {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    state["debug"] = debug


@app.command()
@reported
def demo(
    items: ItemsOption = 80,
    out: Annotated[
        str, typer.Option(help="Folder of the run; an unfinished run there goes on.")
    ] = "runs/demo",
    seed: SeedOption = 0,
    recipes: RecipesOption = "none,vhr,var",
) -> None:
    """Run POPE and CHAIR on the embedded model, with and without interventions.

    Example: `regard demo --items 30 --recipes none,vhr,var:transfer=0.3`
    """
    import torch

    from .evals.loading import load_model

    # The model is so small that threads mostly wait for each other, and on a busy machine they wait long.
    torch.set_num_threads(1)
    model, processor = load_model("miniature", "float32", "cpu")
    _bench(
        model, processor, ["pope", "chair"], recipes, "miniature", out, items=items, seed=seed, batch_size=32
    )


@app.command()
@reported
def bench(
    benchmarks: Annotated[
        list[str],
        typer.Argument(
            help="Any of pope, chair, amber_g, amber_d, mme, mme_hallucination; or subjects; or consistency."
        ),
    ],
    model: ModelOption,
    out: Annotated[str, typer.Option(help="Folder of the run; an unfinished run there goes on.")],
    recipes: Annotated[
        str | None,
        typer.Option(
            help='Comma-separated names. "none", the baseline, always runs. Settings: `var:transfer=0.3`. '
            "Several at once: `vhr+var`. Default: none,vhr,var; for subjects "
            "none,attend_excite,astar,isolation; for consistency ir_diffusion and its parts."
        ),
    ] = None,
    data: Annotated[
        str, typer.Option(help='"miniature", or a folder with images and COCO annotations or POPE questions.')
    ] = "miniature",
    images: Annotated[str | None, typer.Option(help="Folder of the images, when it is another.")] = None,
    items: Annotated[
        int | None,
        typer.Option(
            help="Most images (600); POPE asks up to 18 questions on each. For subjects: prompts for each number "
            "of subjects (90). For consistency: scenes (40).",
            min=1,
        ),
    ] = None,
    seed: SeedOption = 0,
    batch_size: BatchOption = 16,
    steps: Annotated[int, typer.Option(help="Denoising steps of subjects and consistency.", min=1)] = 50,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Limit of one answer. Default: 16 for questions, 512 for captions.", min=1),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(help="0 is greedy. Above, tokens are drawn, and contrastive recipes bring a control."),
    ] = 0.0,
    num_beams: Annotated[
        int, typer.Option(help="Beam search, which opera needs (with --batch-size 1).", min=1)
    ] = 1,
    question_suffix: Annotated[str, typer.Option(help="Added to each question; \\n is a line break.")] = "",
    parser: Annotated[str, typer.Option(help="How POPE's answers are read.")] = "official",
    chair: Annotated[
        str | None,
        typer.Option(
            help="How CHAIR reads words: wordnet (as most papers since 2024; needs nltk), opera (as OPERA's table; "
            "needs nltk), pope (as the POPE paper), or regard (close to wordnet, nothing to install). Default: wordnet "
            "where nltk and its data are installed."
        ),
    ] = None,
    drop_unfinished: Annotated[
        bool,
        typer.Option(
            "--drop-unfinished", help="CHAIR leaves out a last sentence that the token limit cut off."
        ),
    ] = False,
    similarity: Annotated[
        str | None,
        typer.Option(
            help="What saves a near-synonym in AMBER's descriptions: spacy (published; needs en_core_web_lg) or "
            "exact. Default: spacy where it is installed."
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
) -> None:
    """Run benchmarks on a model. Stopped at any time, the same command goes on where it was.

    Example: `regard bench pope chair --model llava-hf/llava-1.5-7b-hf --recipes none,vhr,var
    --data coco --items 500 --dtype float16 --out runs/llava`

    Several GPUs or hosts share the items: `accelerate launch -m regard bench ...`, with --out in a folder that all
    of them see. A model larger than one GPU: --device auto, in one process.

    The data folder holds images, and `instances*.json` with `captions*.json` (COCO) or `*pope*.json`
    (questions), at any depth; or your copy of AMBER or MME. An `images.txt` with one name per line limits the images.

    subjects draws prompts of one to three subjects with the text-to-image miniature or a pipeline that knows them:
    `regard bench subjects --model miniature --out runs/subjects`

    consistency draws two portraits and a scene in one batch, and compares the scene's subjects to the portraits:
    `regard bench consistency --model miniature --out runs/consistency`
    """
    if drawn := [name for name in benchmarks if name in ("subjects", "consistency")]:
        if len(benchmarks) > 1:
            raise ValueError(f"{drawn[0]} needs a diffusers pipeline and a run of its own: run it by itself")
        _bench_drawn(drawn[0], model, recipes, out, items, seed, batch_size, steps)
        return
    from .evals.loading import load_model
    from .evals.protocol import settle
    from .evals.sources import find_sources

    choices = {"parser": parser, "chair": chair, "similarity": similarity}
    settle(benchmarks, choices)  # before a large model is loaded
    sources = data if data == "miniature" else find_sources(data, images)
    loaded, processor = load_model(model, dtype, device)
    _bench(
        loaded, processor, benchmarks, recipes or "none,vhr,var", sources, out, items=items or 600,
        seed=seed, batch_size=batch_size, max_new_tokens=max_new_tokens, temperature=temperature, num_beams=num_beams,
        question_suffix=question_suffix.replace("\\n", "\n"), parser=parser, chair=chair,
        drop_unfinished=drop_unfinished, scoring={"similarity": similarity},
    )  # fmt: skip


def _bench(
    model: Any, processor: Any, benchmarks: list[str], recipes: str, data: Any, out: str, **options: Any
) -> None:
    from .evals.runner import evaluate

    command = shlex.join(["regard", *sys.argv[1:]])
    results = evaluate(model, processor, benchmarks, recipes, data, out=out, command=command, **options)
    show(results)


def _bench_drawn(
    benchmark: str,
    model: str,
    recipes: str | None,
    out: str,
    items: int | None,
    seed: int,
    batch_size: int,
    steps: int,
) -> None:
    from .evals.loading import load_pipeline
    from .evals.pictures import consistency, subjects

    pipe = load_pipeline(model)
    command = shlex.join(["regard", *sys.argv[1:]])
    if benchmark == "subjects":
        show(
            subjects.evaluate_subjects(
                pipe, None, recipes or subjects.RECIPES, out=out, items=items or 90, seed=seed,
                batch_size=batch_size, steps=steps, command=command,
            )
        )  # fmt: skip
    else:
        show(
            consistency.evaluate_consistency(
                pipe, None, recipes or consistency.RECIPES, out=out, items=items or 40, seed=seed, steps=steps,
                command=command,
            )
        )  # fmt: skip


@app.command()
@reported
def report(
    runs: Annotated[list[str], typer.Argument(help="Folders of runs, finished or not.")],
    out: Annotated[
        str | None,
        typer.Option(
            help="File of the page. Default: report.html in the folder of a single run; comparison.html in the "
            "current folder for several. With it, no run's folder is touched."
        ),
    ] = None,
) -> None:
    """Score runs afresh and write their page: of one run, or of several beside each other.

    Example: `regard report runs/demo`, or `regard report runs/llava runs/qwen --out both.html`
    """
    from .evals.pictures.drawn import load_drawn
    from .evals.report.page import write_report
    from .evals.results import Results

    if len(runs) == 1 and out is None:
        results: Any = load_drawn(runs[0]) or Results.load(runs[0])
        results.write()
        show(results)
        return
    for run in runs:
        if load_drawn(run):
            raise ValueError(
                f"{run} holds drawn pictures, whose page stands alone: give it by itself, without --out"
            )
    page = write_report([Results.load(run) for run in runs], out=out or "comparison.html")
    typer.echo(f"Page: {page}")


@app.command()
@reported
def recipes(
    pattern: Annotated[str, typer.Argument(help="Shell pattern of names, such as 'v*'.")] = "*",
) -> None:
    """List the interventions: paper, kind, cost, and the models they have defaults for.

    Example: `regard recipes 'v*'`
    """
    from rich.console import Console
    from rich.table import Table

    from .hooks.errors import UnknownName
    from .interventions import recipes as find

    found = find(pattern)
    if not found:
        raise UnknownName("recipe", pattern, [entry.name for entry in find("*")])
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("name", "what it does", "kind", "cost", "paper", "defaults for"):
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for entry in found:
        paper = f"{entry.paper}, arXiv {entry.arxiv}" if entry.arxiv else entry.paper
        table.add_row(entry.name, entry.summary, entry.kind, entry.cost, paper, ", ".join(entry.models))
    Console().print(table)


@app.command()
@reported
def doctor(
    model: ModelOption = "miniature", dtype: DtypeOption = "auto", device: DeviceOption = None
) -> None:
    """Say what the engine finds in a model, and what would not work. Exit code 1 when something would not.

    Example: `regard doctor --model llava-hf/llava-1.5-7b-hf`
    """
    from rich.console import Console

    from .evals.loading import load_model
    from .hooks.doctor import doctor as examine

    found = examine(load_model(model, dtype, device)[0])
    Console().print(str(found), markup=False, highlight=False, soft_wrap=True)
    if not found.ok:
        raise typer.Exit(1)


app.command("show")(reported(show_))
app.command("import")(reported(import_))
app.add_typer(pope_app, name="pope")
pope_app.command("build")(reported(pope_build))
pope_app.command("check")(reported(pope_check))


def main() -> None:
    """Entry point of the `regard` command. `--debug` may stand anywhere."""
    arguments = sys.argv[1:]
    if "--debug" in arguments:
        arguments = ["--debug", *(part for part in arguments if part != "--debug")]
    app(args=arguments, prog_name="regard")


if __name__ == "__main__":
    main()
