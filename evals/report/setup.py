"""What one needs to run a run again, and how several runs differ."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..benchmarks import BENCHMARKS
from ..results import Results
from ..run_folder import slug
from .tables import thousands

_SETTINGS = ("prompts", "generation", "scoring", "recipes", "versions", "model", "data")


def setup(results: Results) -> list[tuple[str, list[str]]]:
    """(title, lines) of what one needs to run it again."""
    config = results.config
    model, elsewhere = config["model"], config.get("imported", False)
    size = "" if elsewhere else f", {thousands(model['parameters'])} parameters, {model['dtype']}"
    lines = [
        ("model", [f"{config['model_name']}, {model['class']}{size}"]),
        ("versions", [", ".join(f"{name} {version}" for name, version in config["versions"].items())]),
    ]
    if not elsewhere:
        lines.append(("draw", [f"at most {config['items']} images, seed {config['seed']}"]))
    for name, part in config["data"].items():
        facts = [str(config["source"]), f"{part['images']} images, SHA-256 {part['images_sha256'][:16]}…"]
        if "items" in part:
            version = f", version {part['version']}" if "version" in part else ""
            facts.append(f"{part['items']} items{version}, SHA-256 {part['items_sha256'][:16]}…")
        lines.append((f"{BENCHMARKS[name].title} data", facts))
    for name, prompt in config["prompts"].items():
        limit = config["generation"][name]["max_new_tokens"]
        lines.append(
            (
                f"{BENCHMARKS[name].title} prompt",
                [prompt, f"{search(config['generation'][name])}, at most {limit} new tokens"],
            )
        )
    for label, parts in config["recipes"].items():
        lines.append(
            (f"recipe {label}", [_fields(part) for part in parts] or ["the same engine with a null edit"])
        )
    for session in config["sessions"]:
        facts = [session["command"]] if session["command"] else []
        batches = "" if elsewhere else f", batch size {session['batch_size']}"
        facts.append(f"started {session['started']}{batches}")
        facts.append(f"{session['device']}, Python {session['python']}")
        lines.append(("session", facts))
    return lines


def search(generation: Mapping[str, Any]) -> str:
    """How tokens are chosen."""
    if generation.get("do_sample"):
        temperature = generation.get("temperature")
        return f"tokens drawn at temperature {temperature}" if temperature else "tokens drawn"
    beams = generation.get("num_beams") or 1
    return f"{beams} beams" if beams > 1 else "greedy"


def _fields(part: Mapping[str, Any]) -> str:
    return ", ".join(
        str(value) if key in ("class", "note") else f"{key}={value}" for key, value in part.items()
    )


def engine_reports(results: Results) -> list[tuple[str, str]]:
    """(title, what the engine did) of each benchmark and recipe."""
    found = []
    for benchmark in results.metrics:
        for recipe in results.metrics[benchmark]:
            report = results.folder.read_json(f"reports/{benchmark}-{slug(recipe)}.json")
            if report:
                found.append((f"{BENCHMARKS[benchmark].title}, {recipe}", report["text"]))
    return found


def runs_table(runs: Mapping[str, Results]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: one run a row, with the settings that are not the same in all."""
    heads = ["run", "model", "dtype", "data", "images", "seed", "settings that differ"]
    flat = {name: _flat({key: r.config.get(key) for key in _SETTINGS}) for name, r in runs.items()}
    rows = []
    for name, results in runs.items():
        config = results.config
        images = [
            f"{BENCHMARKS[key].title} {thousands(found['none']['images'])}"
            for key, found in results.metrics.items()
        ]
        own = [config["model_name"], config["model"]["dtype"], str(config["source"]), ", ".join(images)]
        rows.append([name, *own, str(config["seed"]), "; ".join(_differing(flat, name))])
    return heads, rows


def _differing(flat: Mapping[str, Mapping[str, str]], name: str) -> Sequence[str]:
    """`key=value` of what this run has and another has otherwise; what only some runs have is not compared."""
    hidden = ("sha256", "model.class", "model.dtype", "model.parameters", ".images", ".items")
    found = []
    for key, value in flat[name].items():
        others = {part[key] for part in flat.values() if key in part}
        if len(others) > 1 and not any(word in key for word in hidden):
            found.append(f"{key}={value}")
    return found


def _flat(value: Any, name: str = "") -> dict[str, str]:
    if isinstance(value, Mapping):
        parts = (_flat(part, f"{name}.{key}".strip(".")) for key, part in value.items())
        return {key: text for part in parts for key, text in part.items()}
    return {name: str(value)}
