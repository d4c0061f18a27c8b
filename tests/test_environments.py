"""Dtypes, offloading, adapters, quantised linears, checkpointing, pipelines, streaming and ways to decode."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from families import FAMILY_NAMES, Family, Inputs, build
from torch import Tensor, nn

import regard
from regard.hooks.edits import without_image

KINDS = ("bias", "vhr", "var")


def edit_of(kind: str, layers: tuple[int, ...] = (0, 1, 2)) -> Any:
    """Strong edits: on random weights two channels light up often enough to be called sinks."""
    if kind == "bias":
        return regard.Bias(layers, lambda call: 1.5 * call.image[:, None, None, :].float())
    if kind == "vhr":
        return regard.VHR(alpha=3.0, layers=layers)
    sinks = {"sink_dims": (3, 11, 20, 40), "tau": 1.6, "min_visual": 0.0, "rho": 0.0}
    return regard.VAR(**sinks, transfer=0.9, layers=layers)


class Contrast:
    """1.5 times the logits less half of those without the image."""

    name = "contrast"

    def edits(self, anatomy: Any) -> Any:
        contrast = regard.Logits(lambda z, step: 1.5 * z - 0.5 * step.branch("text"), ("text",))
        return regard.Branch("text", without_image, every_step=True), contrast


def contrast() -> Contrast:
    return Contrast()


def logits_of(model: Any, inputs: Inputs, *edits: Any, steps: int = 3) -> Tensor:
    """Greedy logits (B, steps, V) under the edits."""
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    settings |= {"eos_token_id": None, "pad_token_id": 0}
    with regard.apply(model, *edits):
        return torch.stack(model.generate(**inputs, **settings, max_new_tokens=steps).logits, 1)


@pytest.fixture
def llava() -> Family:
    return build("llava")


# ---- number formats -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@torch.no_grad()
def test_an_edit_rounds_as_the_model_does(llava: Family, dtype: torch.dtype, kind: str) -> None:
    """Against float64: the edited model errs as the plain one does in this dtype, by far less than the edit."""

    def both(wanted: torch.dtype) -> tuple[Tensor, Tensor]:
        model = llava.model.to(wanted)
        inputs = {k: v.to(wanted) if v.is_floating_point() else v for k, v in llava.inputs(text=8).items()}
        plain = model(**inputs).logits
        with regard.apply(model, edit_of(kind)):
            edited = model(**inputs).logits
        assert edited.dtype == wanted
        return plain.double(), edited.double()

    exact_plain, exact = both(torch.float64)
    plain, edited = both(dtype)
    rounding = (plain - exact_plain).abs().mean()
    assert (edited - exact).abs().mean() < 2 * rounding
    assert (exact - exact_plain).abs().mean() > 10 * rounding


# ---- where the weights are ----------------------------------------------------------------------------


def dispatched(model: Any) -> Any:
    import accelerate

    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def offloaded(model: Any) -> Any:
    import accelerate

    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def reloaded(model: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return transformers.AutoModelForImageTextToText.from_pretrained(folder, device_map="auto").eval()


@pytest.mark.parametrize("move", [dispatched, offloaded, reloaded])
def test_accelerate(llava: Family, move: Callable[[Any], Any]) -> None:
    inputs = llava.batch([{"text": 5, "seed": 1}, {"text": 9, "seed": 2}])
    edits = [[edit_of(kind)] for kind in KINDS] + [[contrast()]]
    plain = logits_of(llava.model, inputs)
    want = [logits_of(llava.model, inputs, *some) for some in edits]
    model = move(llava.model)
    if move is offloaded:
        assert next(model.model.language_model.parameters()).device.type == "meta"
    for some, logits in zip(edits, want, strict=True):
        assert torch.equal(logits_of(model, inputs, *some), logits)
        assert (logits - plain).abs().max() > 1e-2
    assert torch.equal(logits_of(model, inputs), plain)


# ---- adapters and quantised linears -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_peft(name: str) -> None:
    """An edited model with LoRA equals the edited model with the same LoRA merged into its weights."""
    peft = pytest.importorskip("peft")
    family = build(name)
    inputs = family.inputs(text=8)
    base = [logits_of(family.model, inputs, edit_of(kind)) for kind in KINDS]
    targets = r".*language_model.*\.(q_proj|v_proj|o_proj|up_proj)"
    lora = peft.LoraConfig(target_modules=targets, r=4, init_lora_weights=False)
    model = peft.get_peft_model(family.model, lora).eval()
    adapted = [logits_of(model, inputs, edit_of(kind)) for kind in KINDS]
    with model.disable_adapter():
        for kind, want in zip(KINDS, base, strict=True):
            assert torch.equal(logits_of(model, inputs, edit_of(kind)), want)
    with regard.apply(model, edit_of("vhr")) as run:
        forward = model(**inputs).logits[:, -1]
    assert torch.allclose(forward, adapted[1][:, 0], atol=1e-4)
    assert [tally.prefill for tally in run.report().tallies] == [1, 1, 1]
    merged = model.merge_and_unload()
    for kind, logits, plain in zip(KINDS, adapted, base, strict=True):
        assert torch.allclose(logits_of(merged, inputs, edit_of(kind)), logits, atol=1e-4)
        assert (logits - plain).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["vhr", "var"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_linears(llava: Family, kind: str) -> None:
    model, inputs = llava.model, llava.inputs(text=8)
    exact = logits_of(model, inputs, edit_of(kind))
    text = torch.ao.quantization.quantize_dynamic(model.model.language_model, {nn.Linear}, dtype=torch.qint8)
    model.model.language_model = text
    assert not isinstance(text.layers[0].self_attn.q_proj, nn.Linear)
    plain, edited = logits_of(model, inputs), logits_of(model, inputs, edit_of(kind))
    assert (edited - plain)[:, 0].abs().mean() > 2 * (edited - exact)[:, 0].abs().mean()
    with regard.apply(model, edit_of(kind)):
        again = model(**inputs).logits[:, -1]
    assert torch.allclose(again, edited[:, 0], atol=1e-5)
    assert torch.equal(logits_of(model, inputs), plain)


# ---- gradients ----------------------------------------------------------------------------------------


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "attention_probs_dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def gradients(model: Any, prompts: list[Inputs]) -> dict[str, Tensor]:
    """Of one loss over several forwards, in one backward."""
    model.zero_grad()
    losses = [model(**inputs, use_cache=False).logits[:, -1].logsumexp(-1).sum() for inputs in prompts]
    torch.stack(losses).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kinds", [("bias",), ("vhr",), ("var",), ("bias", "vhr", "var")], ids="+".join)
def test_gradient_checkpointing(llava: Family, kinds: tuple[str, ...], reentrant: bool) -> None:
    model, prompts = llava.model, [llava.inputs(text=8), llava.inputs(text=5, seed=4, images=2)]
    plain = gradients(model, prompts)
    with regard.apply(model, *map(edit_of, kinds)) as run:
        edited = gradients(model, prompts)
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        checkpointed = gradients(model, prompts)
    assert gap(edited, checkpointed) < 1e-6
    assert gap(edited, plain) > 1e-2
    counts = {tally.prefill for tally in run.report().tallies}
    assert counts == {4}  # the second run of a block, in backward, is not counted


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_gradient_checkpointing_beside_a_contrastive_branch(name: str) -> None:
    """The blocks of the second stream run again without edits, those of the main stream with them."""
    family = build(name)
    without_dropout(family.model)
    prompts = [family.inputs(text=8), family.inputs(text=5, seed=4)]
    plain = gradients(family.model, prompts)
    with regard.apply(family.model, contrast(), edit_of("bias")):
        edited = gradients(family.model, prompts)
        family.model.train()
        family.model.gradient_checkpointing_enable()
        checkpointed = gradients(family.model, prompts)
    assert gap(edited, checkpointed) < 1e-5
    assert gap(edited, plain) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_with_and_without_grad(llava: Family, kind: str) -> None:
    inputs = llava.inputs(text=8)
    with regard.apply(llava.model, edit_of(kind)):
        graph = llava.model(**inputs).logits
        with torch.no_grad():
            bare = llava.model(**inputs).logits
        with torch.inference_mode():
            fast = llava.model(**inputs).logits
    assert graph.requires_grad
    assert not bare.requires_grad
    assert torch.equal(graph, bare)
    assert torch.equal(graph, fast)


# ---- pipelines, streaming, ways to decode -------------------------------------------------------------


def test_a_real_pipeline() -> None:
    """The embedded model in transformers' own image-text-to-text pipeline, wrapped and unwrapped."""
    from PIL import Image

    model, processor = regard.load_miniature("lvlm")
    pipe = transformers.pipeline("image-text-to-text", model=model, processor=processor)
    image = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    question = {"type": "text", "text": "Describe the image."}
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, question]}]

    def answer() -> str:
        settings = {"do_sample": False, "max_new_tokens": 12}
        return pipe(text=chat, return_full_text=False, generate_kwargs=settings)[0]["generated_text"]

    before = answer()
    assert regard.wrap(pipe, regard.VHR(alpha=8.0)) is pipe
    edited = answer()
    assert regard.unwrap(pipe) is pipe
    assert edited != before
    assert answer() == before
    with regard.apply(pipe, regard.VHR(alpha=8.0)) as run:
        assert answer() == edited
    assert run.report().tallies[0].decode == 11


class Collector(transformers.generation.streamers.BaseStreamer):
    """What a text streamer gets: the prompt's ids, then token by token."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = threading.Event()

    def put(self, value: Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended.set()


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_from_another_thread(llava: Family, kind: str) -> None:
    inputs, settings = llava.inputs(text=8), {"max_new_tokens": 6, "do_sample": False}
    plain = llava.model.generate(**inputs, **settings)
    streamer = Collector()
    with regard.apply(llava.model, edit_of(kind)):
        want = llava.model.generate(**inputs, **settings)
        given = {**inputs, **settings, "streamer": streamer}
        thread = threading.Thread(target=llava.model.generate, kwargs=given)
        thread.start()
        assert streamer.ended.wait(30)
        thread.join()
    assert streamer.ids == want[0].tolist()
    assert not torch.equal(want, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_with_a_seed(llava: Family, kind: str) -> None:
    inputs = llava.inputs(text=8)

    def sample(*edits: Any) -> Tensor:
        torch.manual_seed(3)
        with regard.apply(llava.model, *edits):
            settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "num_return_sequences": 3}
            return llava.model.generate(**inputs, **settings, max_new_tokens=6)

    first = sample(edit_of(kind))
    assert torch.equal(first, sample(edit_of(kind)))
    assert not torch.equal(first, sample())
    assert len({tuple(row) for row in first.tolist()}) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_guess_that_prompt_lookup_makes_while_decoding(llava: Family, kind: str) -> None:
    """Several rows in a decode forward, and tokens taken back, give the tokens of plain greedy decoding."""
    inputs, rows = llava.inputs(text=8), []
    with regard.apply(llava.model, edit_of(kind)):
        settings = {"max_new_tokens": 24, "do_sample": False}
        greedy = llava.model.generate(**inputs, **settings)
        noted = lambda module, args, kwargs: rows.append(kwargs["inputs_embeds"].shape[1])  # noqa: E731
        handle = llava.decoder.register_forward_pre_hook(noted, with_kwargs=True)
        guessed = llava.model.generate(**inputs, **settings, prompt_lookup_num_tokens=3)
        handle.remove()
    assert torch.equal(greedy, guessed)
    assert max(rows[1:]) > 1


@pytest.mark.parametrize("kind", ["vhr", "var"])
def test_guesses_read_with_the_prompt_are_refused(llava: Family, kind: str) -> None:
    inputs = llava.inputs(text=8)
    inputs["input_ids"][:, -4:] = torch.tensor([40, 41, 40, 41])
    before = llava.model(**inputs).logits
    with regard.apply(llava.model, edit_of(kind)), pytest.raises(regard.CannotEdit, match="prompt-lookup"):
        llava.model.generate(**inputs, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(llava.model(**inputs).logits, before)


def test_guessing_beside_a_contrastive_branch_is_refused(llava: Family) -> None:
    """Several tokens are scored in one forward; only the newest would be contrasted."""
    inputs = llava.inputs(text=8)
    settings = {"max_new_tokens": 60, "do_sample": False, "prompt_lookup_num_tokens": 3}
    with (
        regard.apply(llava.model, contrast()),
        pytest.raises(regard.CannotEdit, match="branch 'text' follows"),
    ):
        llava.model.generate(**inputs, **settings)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_contrastive_branch_follows_its_beams(name: str) -> None:
    """With a cache of its own, reordered with the beams, as without any cache."""
    family = build(name)
    inputs = family.batch([{"text": 5, "seed": 1}, {"text": 9, "seed": 2}])
    settings = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "num_return_sequences": 3}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    plain = family.model.generate(**inputs, **settings)
    with regard.apply(family.model, contrast()):
        cached = family.model.generate(**inputs, **settings)
        free = family.model.generate(**inputs, **settings, use_cache=False)
    assert torch.equal(cached.sequences, free.sequences)
    assert torch.allclose(cached.sequences_scores, free.sequences_scores, atol=1e-4)
    assert not torch.equal(cached.sequences, plain.sequences)
    swapped = cached.beam_indices.diff(dim=1).abs().sum()
    assert swapped > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_generate_that_transformers_would_compile(llava: Family, kind: str) -> None:
    """A static cache on a GPU asks for a compiled forward; under edits it runs as it is."""
    inputs, compiled = llava.inputs(text=8), []
    config = transformers.CompileConfig(backend="eager", fullgraph=False, mode=None)
    config._compile_all_devices = True
    llava.model.get_compiled_call = lambda *_: compiled.append(1) or llava.model.__call__
    settings = {"cache_implementation": "static", "compile_config": config, "max_new_tokens": 4}
    want = logits_of(llava.model, inputs, edit_of(kind), steps=4).argmax(-1)
    with regard.apply(llava.model, edit_of(kind)):
        ids = llava.model.generate(**inputs, **settings, do_sample=False)
    assert torch.equal(ids[:, -4:], want)
    assert not compiled
    llava.model.generate(**inputs, **settings, do_sample=False)
    assert compiled
