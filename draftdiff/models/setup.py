"""What a user adds to a loaded pipeline: adapters, another scheduler, a cache, compilation, ways to save memory."""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import diffusers

from draftdiff.errors import UserError, one_line

# By the names that people use, diffusers' classes of their settings; each is asked for as NAME:FIELD=VALUE,...
CACHES = {
    "first-block": "FirstBlockCacheConfig",
    "taylorseer": "TaylorSeerCacheConfig",
    "mag": "MagCacheConfig",
    "pab": "PyramidAttentionBroadcastConfig",
    "faster": "FasterCacheConfig",
}
DBCACHE = "dbcache"  # of the package cache-dit
_SHIFTS = ("flow_shift", "shift")  # what schedulers call it


@dataclass(frozen=True)
class Setup:
    """Changes to a pipeline that is loaded, each off by default.

    lora: adapters, as PATH or PATH:WEIGHT.  scheduler: name of a diffusers class, "Scheduler" at its end may be left
    out.  flow_shift: of a flow-matching scheduler.  attention_backend: diffusers' name of one, for dense calls.
    cache: as `enable_cache` takes it.  compile: the transformer's repeated blocks.
    vae_tiling: decode part by part.
    """

    lora: tuple[str, ...] = ()
    scheduler: str | None = None
    flow_shift: float | None = None
    attention_backend: str | None = None
    cache: str | None = None
    compile: bool = False
    vae_tiling: bool = False

    def apply(self, pipeline: Any) -> None:
        """Make the changes. Raises UserError, in one line, for what the pipeline cannot do."""
        if self.lora:
            _add_adapters(pipeline, self.lora)
        if self.scheduler or self.flow_shift is not None:
            pipeline.scheduler = _scheduler(pipeline.scheduler, self.scheduler, self.flow_shift)
        for model in transformers_of(pipeline):
            if self.attention_backend:
                _told(f"--attention-backend {self.attention_backend!r}", model.set_attention_backend)(
                    self.attention_backend
                )
            if self.compile:
                _told("--compile", model.compile_repeated_blocks)(fullgraph=True)
        if self.cache:
            enable_cache(pipeline, self.cache)
        if self.vae_tiling:
            if not hasattr(getattr(pipeline, "vae", None), "enable_tiling"):
                raise UserError(f"the VAE of {type(pipeline).__name__} takes no --vae-tiling")
            pipeline.vae.enable_tiling()


def transformers_of(pipeline: Any) -> list[Any]:
    """The denoising transformers of a pipeline."""
    found = (getattr(pipeline, name, None) for name in ("transformer", "transformer_2"))
    return [model for model in found if model is not None]


def _told(what: str, function: Callable) -> Callable:
    """The function, whose errors are a user's: one line that begins with what was asked for."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:  # of diffusers, peft and torch, of every kind
            raise UserError(f"{what}: {one_line(error)}") from error

    return call


def _add_adapters(pipeline: Any, adapters: tuple[str, ...]) -> None:
    if not hasattr(pipeline, "load_lora_weights"):
        raise UserError(f"{type(pipeline).__name__} takes no --lora")
    names, weights = [], []
    for number, text in enumerate(adapters):
        place, colon, weight = text.rpartition(":")
        try:
            weights.append(float(weight) if colon else 1.0)
        except ValueError:  # the colon is the path's
            place, weights = "", [*weights, 1.0]
        names.append(f"lora_{number}")
        _told(f"--lora {text!r}", pipeline.load_lora_weights)(place or text, adapter_name=names[-1])
    _told("--lora", pipeline.set_adapters)(names, weights)


def _scheduler(current: Any, name: str | None, shift: float | None) -> Any:
    kind = type(current)
    if name is not None:
        known = {key.removesuffix("Scheduler"): key for key in dir(diffusers) if key.endswith("Scheduler")}
        key = known.get(name.removesuffix("Scheduler"))
        if key is None:
            near = [one for one in known if name.lower() in one.lower()] or difflib.get_close_matches(name, known)
            raise UserError(
                f"--scheduler {name!r} is not one of diffusers, such as {', '.join(near[:3] or sorted(known)[:3])}"
            )
        kind = getattr(diffusers, key)
    config = dict(current.config)
    if shift is not None:
        keys = [key for key in _SHIFTS if key in kind._get_init_keys(kind)]
        if not keys:
            raise UserError(f"{kind.__name__} takes no --flow-shift")
        config[keys[0]] = shift
    return _told(f"--scheduler {kind.__name__!r}", kind.from_config)(config)


def enable_cache(pipeline: Any, text: str) -> None:
    """Give a pipeline's transformers a cache: a key of `CACHES` or "dbcache", perhaps with :FIELD=VALUE,... Raises
    UserError, in one line, for what is no such cache or cannot have one."""
    name, _, given = text.partition(":")
    if name not in (*CACHES, DBCACHE):
        known = ", ".join((*CACHES, DBCACHE))
        raise UserError(f"--cache must be one of {known}, perhaps with :FIELD=VALUE,..., got {text!r}")
    settings = {}
    for pair in filter(None, given.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--cache {text!r}: {pair!r} must be FIELD=VALUE")
        settings[key] = _value(value)
    if name == DBCACHE:
        with redirect_stdout(sys.stderr):  # where it would log to
            cache_dit = _told(f"--cache {text!r}", import_module)("cache_dit")
        config = _told(f"--cache {text!r}", cache_dit.DBCacheConfig)(**settings)
        _told(f"--cache {text!r}", cache_dit.enable_cache)(pipeline, cache_config=config)
        return
    kind = getattr(diffusers, CACHES[name])
    if "current_timestep_callback" in kind.__dataclass_fields__:
        settings["current_timestep_callback"] = lambda: pipeline.current_timestep
    for model in transformers_of(pipeline):
        if not hasattr(model, "enable_cache"):
            raise UserError(f"{type(model).__name__} takes no --cache")
        config = _told(f"--cache {text!r}", kind)(**settings)
        _told(f"--cache {text!r}", model.enable_cache)(config)


@contextmanager
def with_cache(pipeline: Any, text: str) -> Iterator[None]:
    """A pipeline with a cache while it lasts; raises as `enable_cache` does."""
    enable_cache(pipeline, text)
    try:
        yield
    finally:
        if text.partition(":")[0] == DBCACHE:
            import_module("cache_dit").disable_cache(pipeline)
        else:
            for model in transformers_of(pipeline):
                model.disable_cache()


def _value(text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text
