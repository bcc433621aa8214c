"""What people already run in their pipelines goes together with draft attention, whichever is enabled first.

Each guest alone gives what it gives beside a full selection; beside a sparse one something else, with sparse layers;
and after `disable` what it gave alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import diffusers.hooks as hooks
import pytest
import torch

import draftdiff
from draftdiff import DraftAttentionConfig
from tests.rounding import rounded
from tests.video.test_pipeline import build_pipe, run

FULL = DraftAttentionConfig(selection="full", dense_steps=0, dense_layers=0, min_tokens=0)
SPARSE = DraftAttentionConfig(sparsity=0.7, dense_steps=0, dense_layers=0, min_tokens=0)


@dataclass(frozen=True)
class Guest:
    """enter: puts it into a pipeline.  needs: a class of diffusers' hooks or a package that it comes from."""

    name: str
    enter: Callable[[Any], Any]
    needs: str = "FirstBlockCacheConfig"
    steps: int = 5

    def __str__(self) -> str:
        return self.name

    @property
    def is_here(self) -> bool:
        return hasattr(hooks, self.needs) or (self.needs.islower() and find_spec(self.needs) is not None)


def cached(name: str, **settings: Any) -> Callable[[Any], Any]:
    def enter(pipe: Any) -> None:
        given = dict(settings)
        if "current_timestep_callback" in getattr(hooks, name).__dataclass_fields__:
            given["current_timestep_callback"] = lambda: pipe.current_timestep
        pipe.transformer.enable_cache(getattr(hooks, name)(**given))

    return enter


def of_a_class_of_its_own(pipe: Any) -> Any:
    """These guests patch the class of a pipeline, for good."""
    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {})
    return pipe


def dbcache(pipe: Any) -> None:
    import cache_dit

    # The last of three blocks is skipped where the first changes little.
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, residual_diff_threshold=0.9
    )
    cache_dit.enable_cache(of_a_class_of_its_own(pipe), cache_config=config)


def para_attn(pipe: Any) -> None:
    from para_attn.first_block_cache.diffusers_adapters.wan import apply_cache_on_pipe

    apply_cache_on_pipe(of_a_class_of_its_own(pipe), residual_diff_threshold=10.0)


def layerwise(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def quantised(pipe: Any) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(pipe.transformer, Int8WeightOnlyConfig())


def gguf_weights(pipe: Any) -> None:
    """Linear layers as diffusers has them from a GGUF file of 8 bits."""
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0
    for name, layer in list(pipe.transformer.blocks.named_modules()):
        if isinstance(layer, torch.nn.Linear) and layer.in_features % 32 == 0:  # a block of this kind
            packed = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, torch.float32)
            weight = torch.from_numpy(gguf.quantize(layer.weight.detach().numpy(), kind))
            packed.weight = GGUFParameter(weight, quant_type=kind)
            packed.bias = layer.bias
            parent, _, own = name.rpartition(".")
            setattr(pipe.transformer.blocks.get_submodule(parent), own, packed)


BROADCAST = {
    "spatial_attention_block_skip_range": 2,
    "cross_attention_block_skip_range": 3,
    "spatial_attention_timestep_skip_range": (100, 950),
    "cross_attention_timestep_skip_range": (100, 950),
}
PAB, MAG, TAYLOR = "PyramidAttentionBroadcastConfig", "MagCacheConfig", "TaylorSeerCacheConfig"
GUESTS = [
    Guest("first-block cache", cached("FirstBlockCacheConfig", threshold=10.0)),
    Guest("pyramid attention broadcast", cached(PAB, **BROADCAST), PAB),
    Guest("MagCache", cached(MAG, mag_ratios=[1.0] * 10, num_inference_steps=5), MAG),
    Guest("TaylorSeer", cached(TAYLOR, cache_interval=2, disable_cache_before_step=1), TAYLOR),
    Guest("DBCache of cache-dit", dbcache, "cache_dit"),
    Guest("first-block cache of para-attn", para_attn, "para_attn"),
    Guest("layerwise casting", layerwise),
    Guest("int8 weights of torchao", quantised, "torchao"),
    Guest("weights of a GGUF file", gguf_weights, "gguf"),
    Guest("VAE tiling", lambda pipe: pipe.vae.enable_tiling()),
    Guest("another attention backend", lambda pipe: pipe.transformer.set_attention_backend("_native_math")),
]


@pytest.mark.usefixtures("own_attention_backend")
@pytest.mark.parametrize("guest", GUESTS, ids=str)
@pytest.mark.parametrize("first", ["guest", "draftdiff"])
def test_a_guest_and_draft_attention_do_not_disturb_each_other(guest, first):
    if not guest.is_here:
        pytest.skip(f"{guest.needs} is not here")
    alone = build_pipe()
    guest.enter(alone)
    expected = rounded(lambda: run(alone, guest.steps))

    pipe = build_pipe()
    if first == "draftdiff":
        draftdiff.enable(pipe, FULL)
    guest.enter(pipe)
    if first == "guest":
        draftdiff.enable(pipe, FULL)
    expected.check(run(pipe, guest.steps))

    draftdiff.enable(pipe, SPARSE)
    sparse = run(pipe, guest.steps)
    assert float((sparse - expected.out).abs().max()) > 1e-3
    told = draftdiff.report(pipe).transformers[0]
    assert told.mean_density < 0.9 and not told.reasons
    draftdiff.disable(pipe)
    expected.check(run(pipe, guest.steps))
