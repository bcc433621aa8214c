"""What draft attention needs of ComfyUI, stated again in small: an override of attention, wrappers around forwards,
cloned patchers, and its models' order of tokens and signatures. `real.py` holds the same tests against ComfyUI itself.

From Comfy-Org/ComfyUI at a125cd8 (October 2025) and, where told, of autumn 2026.
"""

import copy
import functools
import math
import sys
import types

import torch
import torch.nn.functional as F
from torch import nn


class CallbacksMP:
    ON_PRE_RUN = "on_pre_run"
    ON_PREPARE_STATE = "on_prepare_state"


class WrappersMP:
    DIFFUSION_MODEL = "diffusion_model"


class Executor:
    """Calls the wrappers of a method of a model, the first outermost, and then the method."""

    def __init__(self, original, class_obj, wrappers):
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args, **kwargs):
        return Executor(self.original, self.class_obj, self.wrappers[1:]).execute(*args, **kwargs)

    def execute(self, *args, **kwargs):
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](self, *args, **kwargs)


class AttentionTensorContainer:
    """Of autumn 2026: q, k and v that attention takes out, so that they can be freed."""

    def __init__(self, tensor):
        self.tensor = tensor

    def take(self):
        tensor, self.tensor = self.tensor, None
        return tensor


def wrap_attn(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        kwargs.pop("preferred_attention", None)
        if isinstance(args[0], AttentionTensorContainer):
            args = (*(held.take() for held in args[:3]), *args[3:])
        override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
        if "_inside_attn_wrapper" in kwargs or override is None:
            return function(*args, **kwargs)
        return override(function, *args, **{**kwargs, "_inside_attn_wrapper": True})

    return wrapper


@wrap_attn
def optimized_attention(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs
):
    if not skip_reshape:
        head_dim = q.shape[-1] // heads
        q, k, v = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        mask = mask[None] if mask.ndim == 2 else mask
        mask = mask[:, None] if mask.ndim == 3 else mask
    given = {"scale": kwargs.get("scale"), "enable_gqa": kwargs.get("enable_gqa", False)}
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **given)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class FlowSampling:
    def percent_to_sigma(self, percent):
        return 1.0 - percent


class ModelPatcher:
    """A model with what nodes put on it; `sample` is what a sampler does with it."""

    def __init__(self, model):
        self.model, self.model_options = model, {"transformer_options": {}}
        self.wrappers, self.callbacks = {}, {}

    def clone(self):
        other = ModelPatcher(self.model)
        other.model_options = copy.deepcopy(self.model_options)
        for name in ("wrappers", "callbacks"):
            held = {kind: {key: list(of) for key, of in keys.items()} for kind, keys in getattr(self, name).items()}
            setattr(other, name, held)
        return other

    def get_model_object(self, name):
        return {"model_sampling": FlowSampling(), "diffusion_model": self.model}[name]

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.get(kind, {}).pop(key, None)

    def get_wrappers(self, kind, key):
        return self.wrappers.get(kind, {}).get(key, [])

    def add_callback_with_key(self, kind, key, callback):
        self.callbacks.setdefault(kind, {}).setdefault(key, []).append(callback)

    def remove_callbacks_with_key(self, kind, key):
        self.callbacks.get(kind, {}).pop(key, None)

    def sample(self, sigmas, *args, **kwargs):
        """The model's output at each sigma."""

        def call(kind, *given):
            for callbacks in self.callbacks.get(kind, {}).values():
                for callback in callbacks:
                    callback(self, *given)

        call(CallbacksMP.ON_PRE_RUN)
        options, outs = copy.deepcopy(self.model_options), []
        for sigma in sigmas:
            call(CallbacksMP.ON_PREPARE_STATE, torch.tensor([sigma]), options)
            given = {**options["transformer_options"], "wrappers": self.wrappers, "sigmas": torch.tensor([sigma])}
            with torch.no_grad():
                outs.append(self.model(*args, transformer_options=given, **kwargs))
        return outs


class Model(nn.Module):
    """A transformer of one width; `_forward` puts the tokens in the order of the class that it is named after."""

    patch_size = (1, 2, 2)
    channels, heads, width, layers = 4, 2, 128, 2
    skip_reshape = True

    def __init__(self):
        super().__init__()
        self.steps = (self.patch_size,) * 2 if isinstance(self.patch_size, int) else self.patch_size
        self.embed = nn.Linear(self.channels * math.prod(self.steps), self.width)
        self.blocks = nn.ModuleList(nn.Linear(self.width, 3 * self.width) for _ in range(self.layers))

    def tokens(self, latent):
        """[batch, tokens, width] in raster order, of a latent that is padded to whole patches."""
        axes = len(self.steps)
        sizes = zip(reversed(latent.shape[-axes:]), reversed(self.steps))
        x = F.pad(latent, [side for size, step in sizes for side in (0, -size % step)])
        for axis, step in enumerate(self.steps):
            x = x.unflatten(2 + 2 * axis, (-1, step))
        outer = range(2, 2 + 2 * axes, 2)
        x = x.permute(0, *outer, 1, *[axis + 1 for axis in outer])
        return self.embed(x.flatten(1 + axes).flatten(1, axes))

    def run(self, x, options, mask=None, tells_blocks=False):
        for index, block in enumerate(self.blocks):
            if tells_blocks:
                options["block_index"] = index
            q, k, v = block(x).chunk(3, dim=-1)
            if self.skip_reshape:
                q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
            x = x + optimized_attention(
                q, k, v, self.heads, skip_reshape=self.skip_reshape, mask=mask, transformer_options=options
            )
        return x

    def forward(self, x, timestep, context, transformer_options, **kwargs):
        wrappers = transformer_options.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL, {}).values()
        executor = Executor(self._forward, self, [wrapper for several in wrappers for wrapper in several])
        return executor.execute(x, timestep, context, transformer_options, **kwargs)


class WanModel(Model):
    """tells: as of autumn 2026, the grid and the block."""

    tells, skip_reshape = False, False

    def _forward(self, x, timestep, context, transformer_options, **kwargs):
        tokens = self.tokens(x)
        if self.tells:
            sizes = [math.ceil(size / step) for size, step in zip(x.shape[2:], self.patch_size)]
            transformer_options["grid_sizes"] = torch.Size(sizes)
        q = AttentionTensorContainer(tokens)
        k, v = AttentionTensorContainer(context), AttentionTensorContainer(context)
        tokens = tokens + optimized_attention(q, k, v, heads=self.heads, transformer_options=transformer_options)
        return self.run(tokens, transformer_options, tells_blocks=self.tells)


class Flux(Model):
    patch_size = 2

    def _forward(self, x, timestep, context, transformer_options, ref_latents=None, **kwargs):
        pictures = [self.tokens(latent) for latent in (x, *(ref_latents or ()))]
        return self.run(torch.cat([context, *pictures], dim=1), transformer_options)


class HunyuanVideo(Model):
    def _forward(
        self,
        x,
        timestep,
        context,
        transformer_options,
        attention_mask=None,
        ref_latent=None,
        **kwargs,
    ):
        videos = [self.tokens(latent) for latent in ((x,) if ref_latent is None else (ref_latent, x))]
        tokens, mask = torch.cat([*videos, context], dim=1), None
        if attention_mask is not None:
            mask = torch.zeros(1, 1, tokens.shape[1])
            mask[..., -context.shape[1] :] = (attention_mask - 1) * torch.finfo(mask.dtype).max
        return self.run(tokens, transformer_options, mask)


class LTXVModel(Model):
    patch_size, skip_reshape = (1, 1, 1), False

    def __init__(self):
        super().__init__()
        self.patchifier = types.SimpleNamespace(patch_size=self.patch_size)

    def _forward(self, x, timestep, context, transformer_options, self_attention_mask=None, **kwargs):
        video = x[0] if isinstance(x, list) else x
        return self.run(self.tokens(video), transformer_options, self_attention_mask)


class MiniMaxH3Model(Model):
    """One packed sequence; the layout tells what stands where (autumn 2026)."""

    def _forward(self, x, timestep, context, transformer_options, keyframe=None, **kwargs):
        video, audio = x
        parts = [("text", context), *([] if keyframe is None else [("cond", self.tokens(keyframe))])]
        parts += [("audio", audio), ("video", self.tokens(video))]
        at, segments = 0, []
        for kind, part in parts:
            segments.append((at, at + part.shape[1], kind))
            at += part.shape[1]
        signature = (context.shape[1], *video.shape[2:], audio.shape[1] // 2)
        layout = types.SimpleNamespace(seq_len=at, segments=segments, signature=signature)
        transformer_options["minimax_h3_layout"] = layout
        return self.run(torch.cat([part for _, part in parts], dim=1), transformer_options, tells_blocks=True)


def modules():
    """What `import comfy...` finds."""
    patcher_extension = types.ModuleType("comfy.patcher_extension")
    patcher_extension.CallbacksMP, patcher_extension.WrappersMP = CallbacksMP, WrappersMP
    comfy = types.ModuleType("comfy")
    comfy.patcher_extension = patcher_extension
    return {"comfy": comfy, "comfy.patcher_extension": patcher_extension} | _v3()


def _v3():
    """The part of `comfy_api.latest` that nodes are written with."""

    class Kind:
        def __init__(self, kind):
            self.kind = kind

        def Input(self, name, **options):
            return types.SimpleNamespace(id=name, kind=self.kind, **options)

        def Output(self, **options):
            return types.SimpleNamespace(kind=self.kind, **options)

    io, ui, latest = types.ModuleType("io"), types.ModuleType("ui"), types.ModuleType("comfy_api.latest")
    for kind in ("Model", "Latent", "Float", "Int", "String", "Combo"):
        setattr(io, kind, Kind(kind.upper()))
    io.Schema, io.ComfyNode = types.SimpleNamespace, type("ComfyNode", (), {})
    io.NodeOutput = type(
        "NodeOutput", (), {"__init__": lambda self, *args, ui=None: self.__dict__.update(args=args, ui=ui)}
    )
    ui.PreviewText = lambda text: {"text": (text,)}
    latest.io, latest.ui, latest.ComfyExtension = io, ui, type("ComfyExtension", (), {})
    comfy_api = types.ModuleType("comfy_api")
    comfy_api.latest = latest
    return {"comfy_api": comfy_api, "comfy_api.latest": latest}


def put(monkeypatch):
    """Have `import comfy` and `import comfy_api` find this for the length of a test."""
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    ours = "draftdiff.integrations.comfyui.v3"  # made of this here: before and after the test it is not there
    monkeypatch.setitem(sys.modules, ours, None)
    del sys.modules[ours]
