"""Generate time and peak memory of whole models at full size with random weights, plain and under recipes.

LLaVA-1.5-7B (640 prompt tokens) and Qwen2-VL-7B (1,024) of benchmarks/full_size.py in bf16, batch 1 and 8. Every round
times all sides in a shuffled order, generating one token (the prefill) and all of them; ratios are taken in a round.
"decode" is the difference of the two, "but_prefill" the whole without what the prefill takes longer than plain. Eager
sides: as transformers has it, and with VAR on the whole matrix of probs. Reports say where recipes acted.

`--graphs`: instead, the decode step as transformers compiles it (static cache, mode "reduce-overhead"), plain and under
VAR: time, share of tokens that are those of uncompiled code, or the error; and what attaching to a compiled model says.
OPERA (beams) and AGLA (another model) are not for `--recipes`.

Run: python benchmarks/gpu_models.py [--only llava] [--recipes vcd,icd] [--graphs]; to try it: --device cpu --size tiny
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from full_size import CONFIGS, SINK_DIM, EagerVar, build, prompt
from gpu_common import Results, device_of, options
from reweighted import ratio
from torch import Tensor

import regard

AIMS = {"var": 1.05, "vhr": 1.03}  # of the whole, of VHR's without its extra prefill; memory 1.02


def methods(model: Any, ids: Tensor, names: str = "") -> dict[str, Any]:
    """Plain, VAR, VHR, the recipes named, and eager sides. tau is the paper's, 20 in 4,096 channels, for this width."""
    sinks: dict[str, Any] = {
        "sink_dims": (SINK_DIM,),
        "tau": 0.3 * model.config.get_text_config().hidden_size ** 0.5,
    }
    own = {"var": regard.VAR(**sinks), "vhr": regard.VHR(), "drop_sinks": regard.DropSinks(**sinks)}
    chosen = ["var", "vhr", *filter(None, names.split(","))]
    found = {name: own.get(name) or regard.recipe(name, model) for name in chosen}
    return {"plain": None, **found, "eager": "eager", "eager + var": EagerVar(model, own["var"], ids)}


@contextlib.contextmanager
def attached(model: Any, method: Any) -> Iterator[Any]:
    """The model as a side has it; gives the run, if it is one of regard's."""
    with contextlib.ExitStack() as stack:
        if method == "eager" or isinstance(method, EagerVar):
            name = "eager"
            if method != "eager":
                name = method.attach(stack)
            decoder = model.model.language_model
            decoder.set_attn_implementation(name)
            stack.callback(decoder.set_attn_implementation, "sdpa")
            yield None
        else:
            yield None if method is None else stack.enter_context(regard.apply(model, method))


def generated(model: Any, inputs: dict[str, Tensor], tokens: int, **given: Any) -> tuple[float, Tensor]:
    """Seconds, and the new tokens (B, tokens)."""
    cuda = inputs["input_ids"].is_cuda
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.synchronize()
    start = clock()
    ids = model.generate(**inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, **given)
    if cuda:
        torch.cuda.synchronize()
    return clock() - start, ids[:, inputs["input_ids"].shape[1] :]


def warmed(
    model: Any, inputs: dict[str, Tensor], sides: dict[str, Any], tokens: int
) -> dict[str, dict[str, Any]]:
    """One generate of each side: its peak memory, and what its recipe did or why it cannot run."""
    found: dict[str, dict[str, Any]] = {}
    cuda = inputs["input_ids"].is_cuda
    for name, method in sides.items():
        line = found[name] = {}
        try:
            with attached(model, method) as run:
                generated(model, inputs, 2)
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                generated(model, inputs, tokens)
                if cuda:
                    line["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
                    line["peak_over_plain"] = round(line["peak_gib"] / found["plain"]["peak_gib"], 4)
                if run is not None:
                    line["report"] = str(run.report()).splitlines()
        except Exception as error:  # a recipe that does not fit the model, or memory
            line["error"] = f"{type(error).__name__}: {error}"[:400]
            if cuda:
                torch.cuda.empty_cache()
    return found


def less(whole: list[float], part: list[float]) -> list[float]:
    return [a - b for a, b in zip(whole, part, strict=True)]


def measure(model: Any, inputs: dict[str, Tensor], given: Any, results: Results) -> dict[str, Any]:
    """Ratios to plain with quartiles, of the whole, the prefill and the decoding; fewer rounds where time is short."""
    sides = methods(model, inputs["input_ids"], given.recipes)
    found = warmed(model, inputs, sides, given.tokens)
    order = [name for name in sides if "error" not in found[name]]
    first: dict[str, list[float]] = {name: [] for name in order}
    whole: dict[str, list[float]] = {name: [] for name in order}
    began = time.monotonic()
    for number in range(given.rounds):
        if number and results.left() < (time.monotonic() - began) / number:
            break
        random.shuffle(order)
        for name in order:
            with attached(model, sides[name]):
                first[name].append(generated(model, inputs, 1)[0])
                whole[name].append(generated(model, inputs, given.tokens)[0])
    for name in order:
        line, longer = found[name], less(first[name], first["plain"])
        line |= {
            "over_plain": ratio(whole[name], whole["plain"]),
            "prefill": ratio(first[name], first["plain"]),
        }
        line["decode"] = ratio(less(whole[name], first[name]), less(whole["plain"], first["plain"]))
        line["but_prefill"] = ratio(less(whole[name], longer), whole["plain"])
        line |= {"seconds": statistics.median(whole[name]), "prefill_seconds": statistics.median(first[name])}
        line |= {"aim": AIMS[name]} if name in AIMS else {}
    return {"rounds": len(whole["plain"]), "sides": found}


def graphs(model: Any, inputs: dict[str, Tensor], tokens: int) -> dict[str, Any]:
    """The decode step compiled by transformers, and the refusal to attach to a compiled model."""
    static = {"cache_implementation": "static", "disable_compile": False}
    loosely = static | {"disable_compile": True}
    sides, found = methods(model, inputs["input_ids"]), {}
    for name in ("plain", "var"):
        line: dict[str, Any] = {}
        try:
            with attached(model, sides[name]):
                loose = [generated(model, inputs, tokens, **loosely) for _ in "123"]
            with attached(model, sides[name]) as run:
                line["compiling_seconds"] = generated(model, inputs, tokens, **static)[0]
                tight = [generated(model, inputs, tokens, **static) for _ in "123"]
                if run is not None:
                    line["report"] = str(run.report()).splitlines()
            line["same_tokens"] = (tight[-1][1] == loose[-1][1]).float().mean().item()
            line["compiled_over_not"] = statistics.median(t for t, _ in tight) / statistics.median(
                t for t, _ in loose
            )
            line["seconds"] = statistics.median(t for t, _ in tight)
        except Exception as error:  # this is the answer looked for
            line["error"] = f"{type(error).__name__}: {error}"[:1000]
        line["was_compiled"] = "_compiled_call" in vars(model)
        found[name] = line
        vars(model).pop("_compiled_call", None)
        torch.compiler.reset()
    model.compile(mode="reduce-overhead")
    try:
        with regard.apply(model, sides["var"]):
            found["attaching_to_a_compiled_model"] = "taken"
    except Exception as error:
        found["attaching_to_a_compiled_model"] = f"{type(error).__name__}: {error}"
    vars(model)["_compiled_call_impl"] = None
    return found


def main() -> None:
    parser = options(__doc__, 9, 5)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--only", choices=tuple(CONFIGS), help="one of the models")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--recipes", default="", help="more of them, separated by commas")
    parser.add_argument("--graphs", action="store_true", help="compiled decoding instead")
    given = parser.parse_args()
    unknown = set(filter(None, given.recipes.split(","))) - {line.name for line in regard.recipes()}
    if unknown:
        parser.error(f"no recipes: {', '.join(unknown)}")
    device = device_of(given.device)
    kind = "graphs" if given.graphs else "models"
    results = Results(f"{kind}-{given.only}" if given.only else kind, given, device)
    for name, config in CONFIGS.items():
        if given.only not in (None, name) or not results.room(name):
            continue
        model = build(config(given.size == "tiny"), device)
        size = f"{name}, {sum(p.numel() for p in model.parameters()) / 1e9:.2f}B parameters"
        for batch in given.batches:
            case = f"{size}, batch {batch}, {given.tokens} tokens"
            if results.room(case):
                inputs = prompt(model, batch, device, given.size == "tiny")
                found = (
                    graphs(model, inputs, given.tokens)
                    if given.graphs
                    else measure(model, inputs, given, results)
                )
                results.add("cases", {"case": case, "prompt_tokens": inputs["input_ids"].shape[1]} | found)
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
