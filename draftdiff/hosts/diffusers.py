"""What else we read of diffusers and its models: names of an attention's parts, hooks, running pipelines, dtypes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
from diffusers.modular_pipelines import ModularPipeline
from packaging.version import Version
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from draftdiff.core.devices import chosen_dtype

# Of from_pretrained: the old name warns where the new one exists.
DTYPE_ARGUMENT = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"


def with_one_dtype(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a from_pretrained whose `dtype` or `torch_dtype`, which may be names, become the one that this
    version knows; diffusers takes any name for float32. Raises ValueError for what is no dtype."""
    rest = {name: value for name, value in arguments.items() if name not in ("dtype", "torch_dtype")}
    given = [arguments.get(name) for name in ("dtype", "torch_dtype")]
    one_each = next((value for value in given if isinstance(value, dict)), None)
    if one_each is not None:  # of a pipeline, by part
        return rest | {DTYPE_ARGUMENT: {part: chosen_dtype(value, None) for part, value in one_each.items()}}
    dtype = chosen_dtype(*given)
    return rest if dtype is None else rest | {DTYPE_ARGUMENT: dtype}


_HEADS = ("heads", "num_heads", "num_attention_heads")


def heads_of(attention: Any) -> int:
    return next(getattr(attention, name) for name in _HEADS if hasattr(attention, name))


def head_dim_of(attention: Any) -> int:
    if isinstance(getattr(attention, "head_dim", None), int):  # FLUX.2 has no layer for queries alone
        return attention.head_dim
    project = attention.to_q if hasattr(attention, "to_q") else attention.to_query
    return project.out_features // heads_of(attention)


def projection_of(attention: Any) -> Tensor | None:
    """Weight of the linear layer that joins an attention's heads, [width, heads * head_dim]; None where there is no
    plain one."""
    project: Any = getattr(attention, "to_out", None)
    project = project[0] if isinstance(project, nn.ModuleList) and len(project) else project
    if type(project) is not nn.Linear or project.in_features != heads_of(attention) * head_dim_of(attention):
        return None
    return project.weight


def is_watched() -> bool:
    """Whether some torch function mode would see PyTorch's attention here: it may replace it, as perturbed-attention
    guidance does. Devices set by `with torch.device` do not."""
    return any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def is_skipped(attention: nn.Module) -> bool:
    """Whether a layer-skip hook of diffusers stands before an attention module."""
    registry = getattr(attention, "_diffusers_hook", None)
    return registry is not None and any(isinstance(h, AttentionProcessorSkipHook) for h in registry.hooks.values())


def running_pipelines() -> list[tuple[FrameType, Any]]:
    """(frame, pipeline) of the pipelines that are calling, the innermost first.

    A transformer may serve several pipelines, and they do not tell it which one runs; the interpreter's stack does.
    """
    found = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            owner = frame.f_locals.get("self")
            if isinstance(owner, (DiffusionPipeline, ModularPipeline)):
                found.append((frame, owner))
        frame = frame.f_back
    return found


@contextmanager
def checkpoints_through(model: nn.Module, bind: Callable[[Callable], Callable]) -> Iterator[None]:
    """While it lasts, gradient checkpointing of a model keeps bind(block) instead of block to be run again."""
    found = [m for m in model.modules() if getattr(m, "_gradient_checkpointing_func", None) is not None]
    stock = [m._gradient_checkpointing_func for m in found]

    def bound(function: Callable) -> Callable:
        return lambda block, *args: function(bind(block), *args)

    for module, function in zip(found, stock):
        module._gradient_checkpointing_func = bound(function)  # type: ignore[arg-type, assignment]
    try:
        yield
    finally:
        for module, function in zip(found, stock):
            module._gradient_checkpointing_func = function  # type: ignore[assignment]
