"""Attach edits to one model: the attention function, the clock and map, the branches; and off again."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import Anatomy, anatomy
from .attend import NAME, Claim, claims
from .branch import Stream
from .errors import CannotEdit
from .plan import Contribution, Plan
from .session import SESSION, Session

_NOT_ROUTED = (
    "{} at {} cannot take our attention function: "
    "this class does not route through transformers' AttentionInterface"
)
_engines: weakref.WeakKeyDictionary[nn.Module, Engine] = weakref.WeakKeyDictionary()


def engine_of(model: nn.Module) -> Engine:
    """The engine of a model; made when there is none."""
    engine = _engines.get(model)
    if engine is None:
        engine = _engines[model] = Engine(model)
    elif not engine.attached:
        engine.anatomy = anatomy(model)  # modules may have been replaced since the last run
    return engine


def is_attached(model: nn.Module) -> bool:
    """Whether some run is on."""
    return model in _engines and _engines[model].attached


class Engine:
    """What is attached to one model while at least one run is on."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self.anatomy: Anatomy = anatomy(model)
        self.stock = "sdpa"
        self.latest: Session | None = None
        self._runs: list[Sequence[Contribution]] = []
        self._plan = Plan([])
        self._local = threading.local()
        self._by_cache: weakref.WeakKeyDictionary[Any, Session] = weakref.WeakKeyDictionary()
        self._handles: list[Any] = []
        self._own_generate: Callable[..., Any] | None = None

    @property
    def model(self) -> nn.Module:
        """The model that this engine is on."""
        model = self._model()
        if model is None:
            raise CannotEdit("the model is gone: keep a reference to it while a run is on")
        return model

    @property
    def attached(self) -> bool:
        """Whether some run is on."""
        return bool(self._runs)

    # ---- on and off -----------------------------------------------------------------------------

    def add(self, contributions: Sequence[Contribution]) -> None:
        """Let one run's interventions act from the next forward on.

        Raises:
            CannotEdit, OutOfRange: before anything is changed.
        """
        if not self._runs:
            check_editable(self.model, self.anatomy)
        for contribution in contributions:
            contribution.check(self.anatomy)
        if not self._runs:
            self._attach()
        self._runs.append(contributions)
        try:
            self.watch()
        except BaseException:
            self.remove(contributions)
            raise

    def remove(self, contributions: Sequence[Contribution]) -> None:
        """Take one run off; with the last one the model is as it was."""
        self._runs = [run for run in self._runs if run is not contributions]
        if self._runs:
            self.watch()
            return
        self._unwatch()
        decoder: Any = self.anatomy.decoder
        decoder.set_attn_implementation(self.stock)
        self.latest = None
        self._by_cache.clear()

    def _attach(self) -> None:
        decoder: Any = self.anatomy.decoder
        self.stock = decoder.config._attn_implementation
        decoder.set_attn_implementation(NAME)
        if decoder.config._attn_implementation != NAME:
            raise CannotEdit(_NOT_ROUTED.format(type(decoder).__name__, self.anatomy.decoder_path))

    def watch(self) -> None:
        """Install the hooks that the edits at hand need, and no other."""
        self._unwatch()
        self._plan = plan = Plan([c for run in self._runs for c in run if c.on])
        if not plan:
            return
        model, decoder, keep = self.model, self.anatomy.decoder, self._handles.append
        keep(model.register_forward_pre_hook(self._before_model, with_kwargs=True))
        keep(model.register_forward_hook(self._after_model, always_call=True))
        keep(decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
        keep(decoder.register_forward_hook(self._after_decoder))
        if hasattr(model, "generate"):
            self._own_generate = vars(model).get("generate")
            model.__dict__["generate"] = _watched_generate(self, self._own_generate)
        reading = plan.reading
        for site in self.anatomy.sites:
            if plan.layers.get(site.layer) or site.layer in reading:
                claims[site.module] = Claim(self, site.layer, site.cross)
            if site.layer in plan.hidden:
                read = functools.partial(self._before_block, site.layer)
                keep(site.block.register_forward_pre_hook(read, with_kwargs=True))
        if any(branch.combine for branch in plan.branches):
            head: Any = model.get_output_embeddings()  # type: ignore[operator]
            if head is None:
                raise CannotEdit(
                    f"{type(model).__name__} has no language head, so a branch has no logits to combine"
                )
            keep(head.register_forward_hook(self._after_head))

    def _unwatch(self) -> None:
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for site in self.anatomy.sites:
            claims.pop(site.module, None)
        model = self._model()
        if model is None:
            return
        model.__dict__.pop("generate", None)
        if self._own_generate is not None:  # somebody else had put one on this very object
            model.__dict__["generate"], self._own_generate = self._own_generate, None

    # ---- the stream that runs now ---------------------------------------------------------------

    @property
    def session(self) -> Session | None:
        """The session of this thread's forward, if edits are on."""
        session: Session | None = getattr(self._local, "session", None)
        return session

    @property
    def stream(self) -> Stream | None:
        """The branch that runs in this thread right now."""
        return getattr(self._local, "stream", None)

    def _start(self, ids: Tensor | None, attention_mask: Tensor | None) -> Session:
        session = Session(self._plan, self.anatomy.image_token)
        session.read_prompt(ids, attention_mask)
        self.latest = session
        return session

    @contextmanager
    def generating(self, ids: Tensor | None, attention_mask: Tensor | None) -> Iterator[None]:
        """One `generate` call: all its forwards belong to one session."""
        before = getattr(self._local, "session", None), getattr(self._local, "generating", False)
        self._local.session, self._local.generating = self._start(ids, attention_mask), True
        try:
            yield
        finally:
            self._local.session, self._local.generating = before

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        mask = kwargs.get("attention_mask")
        if getattr(self._local, "generating", False):
            session = self._local.session
            if session.rows == 0 and ids is not None and ids.shape[1] == session.prompt:
                session.read_prompt(ids, mask)  # beams are expanded and padding is inferred by now
            return
        cache = kwargs.get("past_key_values")
        if cache is None or _length(cache) == 0:
            self._local.session = self._start(ids, mask)
        elif cache in self._by_cache and self._by_cache[cache].plan.contributions == self._plan.contributions:
            self._local.session = self._by_cache[cache]
        else:
            raise CannotEdit(
                f"the cache passed in holds {_length(cache)} tokens that were not computed under these edits: "
                "start from an empty cache"
            )

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if getattr(self._local, "generating", False):
            return
        cache = getattr(output, "past_key_values", None)
        if cache is not None and self._local.session is not None:
            self._by_cache[cache] = self._local.session
        self._local.session = None

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.stream is not None:
            return None
        session = getattr(self._local, "session", None)
        if session is None:
            raise CannotEdit(
                f"{self.anatomy.decoder_path} was called by itself, so the image tokens are not known: "
                f"call {type(self.model).__name__} or its generate"
            )
        tokens = kwargs.get("inputs_embeds")
        if tokens is None:
            tokens = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        cached = cache is not None or kwargs.get("use_cache") is not False
        assert tokens is not None
        session.begin(tokens.shape[0], tokens.shape[1], 0 if cache is None else _length(cache), cached)
        guessing = not session.prefill and session.rows > 1 and getattr(self._local, "generating", False)
        for branch in session.plan.branches:
            if branch.every_step and guessing:
                raise CannotEdit(
                    f"branch {branch.name!r} follows the main stream token by token, but this generate tries "
                    f"{session.rows} at once (assisted or prompt-lookup decoding): generate without it"
                )
            if branch.name not in session.streams:
                session.streams[branch.name] = Stream(branch)
                _follow_beams(cache, session.streams[branch.name])
            self._local.stream = session.streams[branch.name]
            try:
                self._local.stream.advance(module, session, kwargs)
            finally:
                self._local.stream = None
        session.checkpointed = _is_checkpointed(module)
        return (args, {**kwargs, SESSION: session}) if session.checkpointed else None

    def _after_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        session = getattr(self._local, "session", None)
        if self.stream is not None or session is None or session.checked:
            return
        wanted = {layer for layer, plan in session.plan.layers.items() if plan} - set(
            self.anatomy.cross_layers
        )
        missed = sorted(wanted - session.hits)
        if missed:
            site = next(site for site in self.anatomy.sites if site.layer == missed[0])
            raise CannotEdit(
                f"layer {missed[0]} was never reached: {site.path} ({type(site.module).__name__}) does not call "
                "transformers' attention function (replaced by a fused or quantised kernel?); "
                "nothing there can be edited"
            )
        session.checked = True

    def _before_block(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        session = getattr(self._local, "session", None)
        if self.stream is not None or session is None:
            return
        for entry in session.plan.hidden.get(layer, ()):
            kept = session.hidden.setdefault((entry.edit.name, layer), {})
            if entry.owner not in kept:
                hidden = args[0] if args else kwargs["hidden_states"]
                kept[entry.owner] = entry.edit.read(hidden, session)
                entry.tally.count(True, hidden.shape[1])

    def _after_head(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        session = getattr(self._local, "session", None)
        if session is None or getattr(self._local, "combining", False):
            return None
        self._local.combining = True
        try:
            newest = output[:, -1]
            for branch in session.plan.branches:
                if branch.combine is not None:
                    newest = branch.combine(newest, module(session.streams[branch.name].hidden))
        finally:
            self._local.combining = False
        return torch.cat([output[:, :-1], newest[:, None]], 1)


def _is_checkpointed(decoder: nn.Module) -> bool:
    """Whether blocks run again during backward."""
    if not (decoder.training and torch.is_grad_enabled()):
        return False
    return any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules())


def _length(cache: Any) -> int:
    return int(cache.get_seq_length())  # a static cache counts in a tensor that it updates in place


def _follow_beams(cache: Any, stream: Stream) -> None:
    """Let a beam search that reorders the main cache reorder the branch's too."""
    if cache is None or not stream.branch.every_step:
        return
    reorder = cache.reorder_cache

    def both(beam_idx: Tensor) -> None:
        reorder(beam_idx)
        stream.reorder(beam_idx)

    cache.reorder_cache = both


def _watched_generate(engine: Engine, own: Callable[..., Any] | None) -> Callable[..., Any]:
    """The model's generate (its class's, or its own if it has one) as one session, never compiled."""
    original: Callable[..., Any] = type(engine.model).generate  # type: ignore[attr-defined]
    reference, signature = weakref.ref(engine), inspect.signature(original)

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        engine = reference()
        assert engine is not None
        given = {**signature.bind_partial(engine.model, *args).arguments, **kwargs}
        ids = given.get("input_ids", given.get("inputs"))
        if ids is not None and ids.is_floating_point():
            ids = None
        kwargs.setdefault("disable_compile", True)  # on a GPU a static cache would compile the hooked forward
        with engine.generating(ids, given.get("attention_mask")):
            return own(*args, **kwargs) if own else original(engine.model, *args, **kwargs)

    return generate


def check_editable(model: nn.Module, parts: Anatomy) -> None:
    """Raise CannotEdit where an edit would be skipped, wrong, or not what the user measures."""
    if parts.decoder is model:
        raise CannotEdit(f"{type(model).__name__} is a bare decoder: pass the model with its language head")
    if model.training:
        raise CannotEdit(
            f"{type(model).__name__} is in training mode, where dropout changes every result: call model.eval()"
        )
    for path, module in model.named_modules():
        if (
            getattr(module, "_compiled_call_impl", None) is not None
            or "_orig_mod" in module._modules
            or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        ):
            raise CannotEdit(
                f"{path or type(model).__name__} is compiled: hooks and state do not reach into a compiled graph; "
                "apply to the model before torch.compile (the original is `compiled._orig_mod`)"
            )
    decoder: Any = parts.decoder
    if not getattr(decoder, "_can_set_attn_implementation", lambda: True)():
        raise CannotEdit(_NOT_ROUTED.format(type(decoder).__name__, parts.decoder_path))
    stock = decoder.config._attn_implementation
    if stock == NAME:
        raise CannotEdit(
            f"{parts.decoder_path} is being edited already, as part of another object than this "
            f"{type(model).__name__}: apply to the same object, or end that run first"
        )
    if stock not in ("sdpa", "eager"):
        raise CannotEdit(
            f"{parts.decoder_path} runs attention by {stock!r}, and the baseline must run on what is edited: "
            "call model.set_attn_implementation('sdpa') first"
        )
