"""enable, disable, report: draft attention in a diffusers pipeline, and what answers its attention calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from draftdiff.attention.attend import attend, attend_op, compute_dtype, needs_gradient
from draftdiff.attention.rule import Rule
from draftdiff.core.grid import LatentGrid
from draftdiff.errors import UserError
from draftdiff.hosts import diffusers as host
from draftdiff.kernels.block_sparse import resolve
from draftdiff.video.config import DraftAttentionConfig, MadeFor
from draftdiff.video.hook import Hook
from draftdiff.video.layouts import LAYOUTS, layout_for, layout_name
from draftdiff.video.report import Report, TransformerReport
from draftdiff.video.tasks import Layer, PerThread, Task, attentions_of


def attention_call(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: dict[str, Any],
    processes: int,
    dense: Callable[[], Tensor],
) -> Tensor:
    """One attention call of a hooked layer: sparse if this call of its transformer says so and nothing speaks against.

    query, key, value: [batch, tokens, heads, head_dim].  options: mask, scale, dropout, causal, gqa.
    processes: number of them that share the heads and bring a stretch of the tokens each (Ulysses).
    """
    task: Task | None = layer.here.value
    eager = not torch.compiler.is_compiling()
    if task is None:
        if eager:
            layer.hook.log.reasons["attention was reached outside a forward that draftdiff saw"] += 1
        return dense()
    is_self = query.shape[1] == key.shape[1]  # adapters send other calls the same way
    reason = reason_for_dense(layer, query, key, options, processes, eager) if task.density is not None else None
    if task.density is None or not is_self or reason is not None:
        if reason is not None and is_self:
            assert task.stats is not None
            task.stats.fill_(1.0)
            if eager:
                task.call.log.reasons[reason] += 1
        if not eager:
            return dense()
        with task.call.log.clock.part("dense attention"):
            return dense()
    rule = layer.hook.config.rule
    out, stats = sparse(layer, task, rule, query, key, value, options, processes, eager)
    assert task.stats is not None
    task.stats.copy_(stats.detach())
    return out


def reason_for_dense(
    layer: Layer, query: Tensor, key: Tensor, options: dict[str, Any], processes: int, eager: bool
) -> str | None:
    """Why a call of a layer with a sparse task has to be dense, or None."""
    task: Task = layer.here.value
    assert task.shape is not None
    frames, height, width, lead = task.shape.shape[:4]
    text = query.shape[1] - frames * height * width
    layout, mask = layer.hook.layout, options["mask"]
    if text < 0 or (text > 0 and layout.text == "none"):
        return "a call's tokens do not fit the grid of its model"
    if key.shape[2] != query.shape[2] or options["dropout"] or options["causal"]:
        return "causal attention, dropout or fewer key heads than query heads"
    if mask is not None and (text == 0 or mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:3] != (1, 1)):
        return "a mask that is not one flag per text token"
    uneven = text % processes or (frames * height * width) % processes
    if processes > 1 and text > 0 and not layout.one_stream and (uneven or (layout.text == "around" and lead != text)):
        return "text or video that processes cannot share evenly"
    if processes > 1 and layer.hook.config.budget.heads:
        raise UserError("draftdiff: a budget per head cannot be used where processes share the heads (Ulysses)")
    if eager and host.is_watched():
        return "a torch function mode watches attention (perturbed-attention guidance does)"
    return None


def sparse(
    layer: Layer,
    task: Task,
    rule: Rule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: dict[str, Any],
    processes: int,
    eager: bool,
) -> tuple[Tensor, Tensor]:
    """Draft attention of a layer's call by this rule, at the density of its task; returns as `attend` does."""
    assert task.shape is not None and task.density is not None
    layout, mask = layer.hook.layout, options["mask"]
    frames, height, width, lead = task.shape.shape[:4]
    tokens = frames * height * width
    text = query.shape[1] - tokens
    if layout.text == "first":
        lead = text
    text_first = layout.text == "first" or (layout.text == "around" and lead == text)
    dtype = compute_dtype(query)
    query, key, value = (x.to(dtype) for x in (query, key, value))
    apart = processes > 1 and text > 0 and not layout.one_stream
    if apart:
        sizes = [text // processes, tokens // processes]
        sizes = sizes if text_first else sizes[::-1]
        query, key, value = (_joined(x, processes, sizes, 1) for x in (query, key, value))
        mask = None if mask is None else _joined(mask, processes, sizes, 3)
    text_mask = None
    if mask is not None:
        valid = mask[:, 0, 0].expand(query.shape[0], -1)
        text_mask = torch.cat([valid[:, :lead], valid[:, lead + tokens :]], dim=1)
    density = task.density[: query.shape[2]].to(query.device)
    scale = options["scale"]
    if not eager or needs_gradient(query, key, value):
        grid = [frames, height, width]
        out, stats = attend_op(query, key, value, density, text_mask, grid, lead, scale, rule.packed)
    else:
        log = task.call.log
        log.backend = resolve(rule.backend, query.device, dtype, query.shape[-1], rule.precision)
        out, stats = attend(
            query,
            key,
            value,
            density,
            rule,
            grid=LatentGrid(frames, height, width),
            lead=lead,
            text_mask=text_mask,
            scale=scale,
            part=log.clock.part,
        )
    return (_joined(out, processes, sizes, 1, back=True) if apart else out), stats


def _joined(x: Tensor, processes: int, sizes: list[int], axis: int, back: bool = False) -> Tensor:
    """Tokens as processes bring them, a stretch of each stream from each, in the order of the streams; or back again.

    sizes: of the two streams' stretches.
    """
    if back:
        streams = x.split([size * processes for size in sizes], dim=axis)
        return torch.cat([s.unflatten(axis, (processes, -1)) for s in streams], dim=axis + 1).flatten(axis, axis + 1)
    shares = x.unflatten(axis, (processes, -1)).split(sizes, dim=axis + 1)
    return torch.cat([share.flatten(axis, axis + 1) for share in shares], dim=axis)


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
