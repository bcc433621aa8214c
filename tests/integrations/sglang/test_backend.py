"""Draft attention in SGLang's own classes (0.5.23), on a CPU: its plugin loader and hooks, selector, denoising stage
and pipeline of diffusers. `absent.py` stands in for two packages that need CUDA. `make test-servers` gets the wheel;
without it nothing here runs."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanPipeline

import draftdiff
from draftdiff.integrations import call
from tests.integrations.sglang import absent
from tests.tiny_pipeline import tiny_wan_pipeline

pytestmark = pytest.mark.skipif(find_spec("sglang") is None, reason="no sglang here: make test-servers")

GRID, HEADS, DIM = (4, 32, 33), 2, 64
VIDEO = 4 * 32 * 33


@pytest.fixture(scope="module", autouse=True)
def _server():
    if find_spec("sglang") is None:
        return
    absent.stand_in()
    from sglang.multimodal_gen.runtime.platforms.plugins import apply_plugin_hooks

    apply_plugin_hooks()  # finds draftdiff by its entry point


@pytest.fixture
def arguments(monkeypatch):
    """What the server was started with."""
    from sglang.multimodal_gen.runtime.server_args import server_args

    given = SimpleNamespace(attention_backend="rain_fusion_attn", attention_backend_config={}, kv_gather_degree=1)
    given.pipeline_config = SimpleNamespace(dit_config=SimpleNamespace(patch_size=(1, 2, 2)))
    given.is_arg_explicitly_set = lambda name: True
    monkeypatch.setattr(server_args, "_global_server_args", given)
    call.say_once.cache_clear()
    return given


def attention_of(prefix="blocks.1.attn1", **given):
    """The attention that the server's selector gives to a layer."""
    from sglang.multimodal_gen.runtime.layers.attention.selector import get_attn_backend

    backend = get_attn_backend(DIM, torch.float32)
    shape = {"num_heads": HEADS, "head_size": DIM, "softmax_scale": DIM**-0.5, "causal": False}
    return backend, backend.get_impl_cls()(**shape | given, prefix=prefix, is_cross_attention=False)


def metadata_of(backend, arguments, step=20, latents=(1, 16, 4, 64, 66)):
    """What the server's denoising stage makes for a step."""
    from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import DenoisingStage

    stage = object.__new__(DenoisingStage)
    stage.attn_backend = backend
    return stage._build_attn_metadata(step, SimpleNamespace(raw_latent_shape=latents), arguments)


def qkv(tokens=VIDEO):
    torch.manual_seed(0)
    return torch.randn(3, 1, tokens, HEADS, DIM).unbind()


def dense(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def close(a, b):
    return (a - b).abs().max() < 1e-5


def test_a_call_with_the_servers_metadata_is_draft_attention(arguments):
    arguments.attention_backend_config = {"sparsity": 0.75, "tokens": 0}
    backend, attention = attention_of()
    q, k, v = qkv()
    out = attention.forward(q, k, v, metadata_of(backend, arguments))
    assert close(out, draftdiff.draft_attention(q, k, v, grid=GRID, config={"sparsity": 0.75, "tokens": 0}))
    assert (out - dense(q, k, v)).abs().max() > 1e-3


def test_cross_attention_and_other_backends_stay_the_servers(arguments):
    from sglang.multimodal_gen.runtime.layers.attention.selector import get_attn_backend
    from sglang.multimodal_gen.runtime.platforms import AttentionBackendEnum

    assert get_attn_backend(DIM, torch.float32).__module__ == "draftdiff.integrations.sglang.backend"
    cross = get_attn_backend(DIM, torch.float32, is_cross_attention=True)
    assert cross.get_enum() is AttentionBackendEnum.TORCH_SDPA
    arguments.attention_backend = "torch_sdpa"
    assert get_attn_backend(DIM, torch.float32).get_enum() is AttentionBackendEnum.TORCH_SDPA


@pytest.mark.parametrize(("step", "sparse"), [(0, False), (3, False), (4, True)])
def test_the_first_steps_are_dense(arguments, step, sparse):
    arguments.attention_backend_config = {"sparsity": 0.75, "skip_first_steps": 4}
    backend, attention = attention_of()
    q, k, v = qkv()
    assert close(attention.forward(q, k, v, metadata_of(backend, arguments, step)), dense(q, k, v)) is not sparse


@pytest.mark.parametrize(("prefix", "sparse"), [("blocks.0.attn1.impl", False), ("blocks.7.attn1.impl", True)])
def test_the_first_block_is_dense(arguments, prefix, sparse):
    backend, attention = attention_of(prefix)
    q, k, v = qkv()
    assert close(attention.forward(q, k, v, metadata_of(backend, arguments)), dense(q, k, v)) is not sparse


@pytest.mark.parametrize(
    ("tokens", "latents", "reason"),
    [
        (VIDEO + 7, (1, 16, 4, 64, 66), "are not the 4224 of the video"),
        (128, (1, 16, 2, 16, 16), "fewer than min_tokens"),
        (100, (1, 64, 16), "tell no grid"),
    ],
)
def test_what_cannot_be_sparse_is_dense_and_says_why(arguments, tokens, latents, reason, caplog):
    backend, attention = attention_of()
    q, k, v = qkv(tokens)
    out = attention.forward(q, k, v, metadata_of(backend, arguments, latents=latents))
    assert close(out, dense(q, k, v))
    assert reason in caplog.text


def test_a_setting_that_is_none_is_named(arguments):
    arguments.attention_backend_config = {"sparsity": 0.75, "tiles": 3}
    backend, _ = attention_of()
    with pytest.raises(ValueError, match="tiles"):
        metadata_of(backend, arguments)


def applied(pipe, name, **settings):
    """A pipeline of diffusers as the server makes it ready."""
    from sglang.multimodal_gen.runtime.pipelines.diffusers_pipeline import DiffusersPipeline

    given = SimpleNamespace(attention_backend=name, attention_backend_config=settings, pipeline_config=None)
    object.__new__(DiffusersPipeline)._apply_attention_backend(pipe, given)
    return pipe


def test_pipelines_of_diffusers_are_enabled_by_name():
    pipe = tiny_wan_pipeline()
    assert isinstance(applied(pipe, "draftdiff", sparsity=0.5, min_tokens=0), WanPipeline)
    pipe("", num_frames=9, height=32, width=32, num_inference_steps=3, output_type="latent")
    assert "sparse" in str(draftdiff.report(pipe))
    draftdiff.disable(pipe)


def test_other_names_reach_diffusers_as_before():
    pipe = applied(tiny_wan_pipeline(), "native")
    with pytest.raises(ValueError, match="not enabled"):
        draftdiff.report(pipe)
    assert pipe.transformer.blocks[0].attn1.processor._attention_backend == "native"


def test_a_profile_stands_alone(tmp_path):
    with pytest.raises(ValueError, match="sparsity cannot be given beside it"):
        applied(tiny_wan_pipeline(), "draftdiff", profile=str(tmp_path / "profile.json"), sparsity=0.5)
