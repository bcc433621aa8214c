"""enable, disable, report: draft attention in a diffusers pipeline."""

from __future__ import annotations

from typing import Any

from torch import nn

from draftdiff.errors import UserError
from draftdiff.hosts import diffusers as host
from draftdiff.kernels.block_sparse import resolve
from draftdiff.video.calls import attention_call
from draftdiff.video.config import DraftAttentionConfig, MadeFor
from draftdiff.video.hook import Hook
from draftdiff.video.layouts import LAYOUTS, layout_for, layout_name
from draftdiff.video.report import Report, TransformerReport
from draftdiff.video.tasks import PerThread, attentions_of


def unwrapped(module: Any) -> Any:
    return getattr(module, "_orig_mod", module)


def transformers_of(target: Any) -> list[nn.Module]:
    """The supported transformers of a pipeline, or the transformer itself, each as the target holds it: perhaps in a
    wrapper of `torch.compile`. Raises ValueError if there is none."""
    if isinstance(target, nn.Module):
        layout_for(target)
        return [target]
    if not hasattr(target, "components"):
        raise UserError(f"expected a diffusers pipeline or transformer, got {type(target).__name__}")
    found = [
        component
        for component in target.components.values()
        if isinstance(component, nn.Module) and any(c.__name__ in LAYOUTS for c in type(unwrapped(component)).__mro__)
    ]
    if not found:
        raise UserError(
            f"{type(target).__name__} has no supported transformer; supported transformers: {', '.join(LAYOUTS)}"
        )
    return found


def _hook_of(transformer: nn.Module) -> Hook | None:
    """The hook of a transformer, found where PyTorch keeps it: a copy of the model has a copy of it."""
    for function in unwrapped(transformer)._forward_pre_hooks.values():
        if isinstance(owner := getattr(function, "__self__", None), Hook):
            return owner
    return None


def check(target: Any, config: Any = None) -> DraftAttentionConfig:
    """Whether `enable` could take these and a run find its backend; changes nothing.

    Returns the config. Raises UserError, in one line, for what cannot be used.
    """
    config, models = _checked(target, config)
    for model, attention in models:
        resolve(config.backend, model.device, model.dtype, host.head_dim_of(attention), config.precision)
    return config


def _checked(target: Any, config: Any) -> tuple[DraftAttentionConfig, list[tuple[Any, nn.Module]]]:
    """The config, and each transformer with its first attention. Raises UserError where they do not fit each other."""
    config, models = DraftAttentionConfig.of(config), []
    for model in map(unwrapped, transformers_of(target)):
        layers = attentions_of(model, layout_for(model).attention)
        heads = host.heads_of(layers[0][1])
        here = MadeFor(layout_name(model), len(layers), heads)
        if config.made_for not in (None, here):
            raise UserError(f"the profile was tuned for {config.made_for}, not for {here}")
        config.budget.density(len(layers), heads)
        models.append((model, layers[0][1]))
    return config, models


def enable(target: Any, config: Any = None, *, num_steps: int = 50) -> Any:
    """Make the video self-attentions of a pipeline, or of one transformer, draft-guided.

    target: a diffusers pipeline or transformer; changed in place. Enabling again applies the new config.
    config: a `DraftAttentionConfig`, a sparsity, or a dict of its fields.  num_steps: length of a run that a share in
    `config.dense_steps` refers to, used only where a transformer is called without a pipeline. Such calls are one run
    for as long as the noise moves one way, also if it stands still: then the report grows until it is enabled again.
    Returns target. Raises ValueError if no transformer is supported or the config is not one.
    """
    config, _ = _checked(target, config)
    disable(target)
    shared = PerThread()
    for outer in transformers_of(target):
        model = unwrapped(outer)
        hook = Hook(model, layout_for(model), config, attention_call, shared, num_steps)
        hook.install(model, outer if outer is not model else None)
    return target


def disable(target: Any) -> Any:
    """Undo `enable`: processors, hooks and registrations are what they were. Does nothing where it was not enabled.

    Returns target.
    """
    for transformer in transformers_of(target):
        if (hook := _hook_of(transformer)) is not None:
            hook.remove()
    return target


def report(target: Any) -> Report:
    """What the last run did: dense and sparse steps, density, missed mass, time. Raises ValueError if not enabled."""
    hooks = [(unwrapped(transformer), _hook_of(transformer)) for transformer in transformers_of(target)]
    names = [(type(model).__name__, hook) for model, hook in hooks if hook is not None]
    if not names:
        raise UserError(f"draftdiff is not enabled on this {type(target).__name__}")
    return Report([TransformerReport.of(name, [layer.name for layer in hook.layers], hook.log) for name, hook in names])
