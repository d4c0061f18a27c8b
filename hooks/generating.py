"""One `generate` call under edits: one session for all its forwards, branches that follow its beams."""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .branch import Stream
from .errors import CannotEdit

if TYPE_CHECKING:
    from .engine import Engine

GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "return_dict_in_generate": False}


def follow_beams(cache: Any, stream: Stream) -> None:
    """Let a beam search that reorders the main cache reorder the branch's too."""
    if cache is None or not stream.branch.every_step:
        return
    reorder = cache.reorder_cache

    def both(beam_idx: Tensor) -> None:
        reorder(beam_idx)
        stream.reorder(beam_idx)

    cache.reorder_cache = both


def watched_generate(engine: Engine, own: Callable[..., Any] | None) -> Callable[..., Any]:
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
        for name, decoding in engine.plan.decodings:
            if given.get("custom_generate") is not None:
                raise CannotEdit(
                    f"{name} replaces generate's decoding loop, and so does custom_generate=: use one"
                )
            if decoding.check is not None:
                decoding.check(_config(engine.model, given))
            kwargs["custom_generate"] = decoding.loop
        with engine.generating(ids, given):
            return own(*args, **kwargs) if own else original(engine.model, *args, **kwargs)

    return generate


def _config(model: Any, given: dict[str, Any]) -> Any:
    """The generation config as this call makes it."""
    config = copy.deepcopy(given.get("generation_config") or model.generation_config)
    config.update(**{name: value for name, value in given.items() if name != "self"})
    return config
