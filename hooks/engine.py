"""Attach edits to one model: the attention function, the clock and map, the branches; and off again."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import exits, tower
from .anatomy import Anatomy, anatomy
from .attend import NAME, Claim, claims
from .branch import Stream, unexpanded
from .checks import NOT_ROUTED, check_editable, check_together
from .errors import CannotEdit
from .generating import follow_beams, watched_generate
from .joint import Joint, can_join, join
from .kv_cache import CACHE, cache_in
from .plan import Contribution, Plan
from .session import SESSION, Session
from .step import Step
from .tracing import trace_of, untraced

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
        self.plan = Plan([])
        self.joins = True  # whether branches may run as one batch with the main stream
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
            raise CannotEdit(NOT_ROUTED.format(type(decoder).__name__, self.anatomy.decoder_path))

    def watch(self) -> None:
        """Install the hooks that the edits at hand need, and no other."""
        self._unwatch()
        self.plan = plan = Plan([c for run in self._runs for c in run if c.on])
        if not plan:
            return
        check_together(plan, self.model)
        model, decoder, keep = self.model, self.anatomy.decoder, self._handles.append
        keep(model.register_forward_pre_hook(self._before_model, with_kwargs=True))
        keep(model.register_forward_hook(self._after_model, always_call=True))
        keep(decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
        keep(decoder.register_forward_hook(self._after_decoder))
        if hasattr(model, "generate"):
            self._own_generate = vars(model).get("generate")
            model.__dict__["generate"] = watched_generate(self, self._own_generate)
        reading = plan.reading
        for site in self.anatomy.sites:
            if plan.layers.get(site.layer) or site.layer in reading or plan.following:
                claims[site.module] = Claim(self, site.layer, site.cross)
            if site.layer in plan.hidden or site.layer in plan.early:
                read = functools.partial(self._before_block, site.layer)
                keep(site.block.register_forward_pre_hook(read, with_kwargs=True))
        if plan.exits:
            self._handles += exits.install(self)
        if plan.towers or any(branch.tower for branch in plan.branches):
            self._handles += tower.install(self)
        if plan.logits:
            head: Any = model.get_output_embeddings()  # type: ignore[operator]
            keep(head.register_forward_pre_hook(self._before_head))
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
        session = Session(self.plan, self.anatomy.image_token)
        session.read_prompt(ids, attention_mask)
        self.latest = session
        return session

    @property
    def joint(self) -> Joint | None:
        """The streams that run as one batch in this thread right now."""
        return getattr(self._local, "joint", None)

    @contextmanager
    def generating(self, ids: Tensor | None, given: Mapping[str, Any]) -> Iterator[None]:
        """One `generate` call with the arguments `given`: all its forwards belong to one session."""
        before = getattr(self._local, "session", None), getattr(self._local, "generating", False)
        self._local.session, self._local.generating = self._start(ids, given.get("attention_mask")), True
        given = {key: value for key, value in given.items() if isinstance(value, Tensor)}
        self._local.session.given = self._local.session.inputs = given
        try:
            yield
        finally:
            self._local.session, self._local.generating = before

    def _note_inputs(self, session: Session, kwargs: dict[str, Any], ids: Tensor | None) -> None:
        """Keep the arguments of a forward that reads the prompt, where a branch reads it in another way."""
        if any(branch.view for branch in session.plan.branches):
            session.inputs = unexpanded(session.given, {**kwargs, "input_ids": ids})

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.stream is not None:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        mask = kwargs.get("attention_mask")
        if getattr(self._local, "generating", False):
            session = self._local.session
            if session.rows == 0 or not session.cached:
                self._note_inputs(session, kwargs, ids)
            if session.rows == 0 and ids is not None and ids.shape[1] == session.prompt:
                session.read_prompt(ids, mask)  # beams are expanded and padding is inferred by now
            return
        cache = cache_in(kwargs)
        if cache is None or _length(cache) == 0:
            self._local.session = self._start(ids, mask)
        elif cache in self._by_cache and self._by_cache[cache].plan.contributions == self.plan.contributions:
            self._local.session = self._by_cache[cache]
        else:
            raise CannotEdit(
                f"the cache passed in holds {_length(cache)} tokens that were not computed under these edits: "
                "start from an empty cache"
            )
        if cache is None or _length(cache) == 0:
            self._note_inputs(self._local.session, kwargs, ids)

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.stream is not None or getattr(self._local, "generating", False):
            return
        cache = getattr(output, CACHE, None)
        if cache is not None and self._local.session is not None:
            self._by_cache[cache] = self._local.session
        self._local.session = None

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.stream is not None:
            if self.stream.branch.view is not None and self.stream.hidden is None:
                self.stream.note_view(kwargs)
            return None
        session = getattr(self._local, "session", None)
        if session is None:
            raise CannotEdit(
                f"{self.anatomy.decoder_path} was called by itself, so the image tokens are not known: "
                f"call {type(self.model).__name__} or its generate"
            )
        if args:
            kwargs, args = {"input_ids": args[0], **kwargs}, args[1:]
        tokens = kwargs.get("inputs_embeds")
        tokens = kwargs["input_ids"] if tokens is None else tokens
        cache = cache_in(kwargs)
        cached = cache is not None or kwargs.get("use_cache") is not False
        session.begin(tokens.shape[0], tokens.shape[1], 0 if cache is None else _length(cache), cached)
        if session.plan.branches or session.plan.logits:
            kwargs = self._run_branches(module, session, kwargs)
        session.checkpointed = _is_checkpointed(module)
        return args, {**kwargs, SESSION: session} if session.checkpointed else kwargs

    def _run_branches(self, decoder: nn.Module, session: Session, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Let every branch read or follow; returns the decoder's arguments, for all streams where they can join."""
        guessing = not session.prefill and session.rows > 1 and getattr(self._local, "generating", False)
        following = [branch for branch in session.plan.branches if branch.every_step]
        if guessing and (following or session.plan.logits):
            what = f"branch {following[0].name!r}" if following else session.plan.logits[0].tally.intervention
            raise CannotEdit(
                f"{what} follows the main stream token by token, but this generate tries "
                f"{session.rows} at once (assisted or prompt-lookup decoding): generate without it"
            )
        late = []
        for branch in session.plan.branches:
            stream = session.streams.get(branch.name)
            if stream is None:
                stream = session.streams[branch.name] = Stream(branch)
                follow_beams(cache_in(kwargs), stream)
                self._read(decoder, stream, session, kwargs)
            elif branch.every_step and stream.cache is None:
                self._read(decoder, stream, session, kwargs)
            elif branch.every_step:
                late.append(stream)
        together = self.joins and not session.plan.exits and trace_of(self.model) is None
        if late and together and can_join(self.anatomy):
            joined = join(decoder, session, late, kwargs)
            if joined is not None:
                self._local.joint, kwargs = joined
                return kwargs
        for stream in late:
            with self._running(stream):
                stream.step(decoder, kwargs)
        return kwargs

    def _read(self, decoder: nn.Module, stream: Stream, session: Session, kwargs: dict[str, Any]) -> None:
        """Let a branch read its prompt."""
        with self._running(stream):
            if stream.branch.view is None:
                stream.read_part(decoder, session, kwargs)
            else:
                stream.read_view(self.model, decoder, session, session.batch)

    @contextmanager
    def _running(self, stream: Stream) -> Iterator[None]:
        """Attention belongs to this stream; what the model remembers of the main stream's positions is kept."""
        deltas = [
            (module, module.rope_deltas) for module in self.model.modules() if hasattr(module, "rope_deltas")
        ]
        self._local.stream = stream
        try:
            with untraced(self.model):
                yield
        finally:
            self._local.stream = None
            for module, before in deltas:
                module.rope_deltas = before

    def _after_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.stream is not None:
            self.stream.hidden = output.last_hidden_state[:, -1]
            return None
        session, joint = getattr(self._local, "session", None), self.joint
        if joint is not None:
            self._local.joint = None
            main, *others = joint.parts(output.last_hidden_state)
            output.last_hidden_state = main
            if getattr(output, CACHE) is not None:
                setattr(output, CACHE, joint.caches.main)
            for stream, hidden in zip(joint.streams, others, strict=True):
                stream.hidden = hidden[:, -1]
        if session is not None and not session.checked:
            self._check_hits(session)
        return output

    def _check_hits(self, session: Session) -> None:
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
        hidden = args[0] if args else kwargs["hidden_states"]
        if layer in session.plan.early:
            session.early[layer] = hidden[: session.batch, -1]  # joined streams come behind the main one
        for entry in session.plan.hidden.get(layer, ()):
            kept = session.hidden.setdefault((entry.edit.name, layer), {})
            if entry.owner not in kept:
                kept[entry.owner] = entry.edit.read(hidden, session)
                entry.tally.count(True, hidden.shape[1])

    def _after_head(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        session = getattr(self._local, "session", None)
        if session is None or self.stream is not None:
            return None
        names = [stream.branch.name for stream in self._following(session)]
        rows = output.shape[1] - len(names) - len(session.early)
        output, others, early = output.split([rows, len(names), len(session.early)], 1)
        branches = dict(zip(names, others.unbind(1), strict=True))
        step = Step(session, branches, dict(zip(session.early, early.unbind(1), strict=True)))
        newest = output[:, -1]
        for entry in session.plan.logits:
            newest = entry.edit.edit(newest, step)
            entry.tally.count(session.prefill, 1)
        return newest[:, None] if output.shape[1] == 1 else torch.cat([output[:, :-1], newest[:, None]], 1)

    def _before_head(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Put the branches' newest states behind the main stream's, so that the head's weights are read once."""
        session = getattr(self._local, "session", None)
        if session is None or self.stream is not None:
            return None
        hidden = [stream.hidden for stream in self._following(session) if stream.hidden is not None]
        hidden += session.early.values()
        return (torch.cat([args[0], *(state[:, None].to(args[0]) for state in hidden)], 1), *args[1:])

    def _following(self, session: Session) -> list[Stream]:
        return [session.streams[branch.name] for branch in session.plan.branches if branch.every_step]


def _is_checkpointed(decoder: nn.Module) -> bool:
    """Whether blocks run again during backward."""
    if not (decoder.training and torch.is_grad_enabled()):
        return False
    return any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules())


def _length(cache: Any) -> int:
    return int(cache.get_seq_length())  # a static cache counts in a tensor that it updates in place
