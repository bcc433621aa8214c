"""Draft attention in vLLM-Omni's own classes (0.30.0), on a CPU: its plugin loader, registry, configuration, attention
layer and forward context. Only the platform is the test's, as the server has none for a CPU. `make test-servers` gets
the wheels; without them nothing here runs."""

import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

import draftdiff
from draftdiff.attention.attend import attend
from draftdiff.core.grid import LatentGrid
from draftdiff.integrations import call, vllm_omni
from draftdiff.integrations.call import Places

pytestmark = pytest.mark.skipif(find_spec("vllm_omni") is None, reason="no vllm_omni here: make test-servers")

GRID, HEADS, DIM = (4, 32, 33), 2, 64  # more than the 4,096 tokens below which a call stays dense
VIDEO = 4 * 32 * 33
SPEC = {"backend": "RAINFUSION_ATTN", "block_sparse": {"sparsity": 0.75}}


@pytest.fixture(autouse=True)
def _server(monkeypatch):
    import vllm_omni.diffusion.attention.layer  # noqa: F401
    from vllm_omni import plugins
    from vllm_omni.diffusion.attention import selector
    from vllm_omni.diffusion.attention.backends import registry
    from vllm_omni.platforms.interface import OmniPlatformEnum, UnspecifiedOmniPlatform

    class Platform(UnspecifiedOmniPlatform):
        _omni_enum = OmniPlatformEnum.CUDA

        @classmethod
        def get_diffusion_attn_backend_cls(cls, selected_backend, head_size, allow_trtllm_default=True):
            name = (selected_backend or "TORCH_SDPA").upper()
            cls.validate_diffusion_attn_backend(name)
            return registry.DiffusionAttentionBackendEnum[name].get_path()

    monkeypatch.setattr("vllm_omni.platforms._current_omni_platform", platform := Platform())
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm_omni") and "current_omni_platform" in vars(module):
            monkeypatch.setattr(module, "current_omni_platform", platform)
    monkeypatch.setattr(plugins, "omni_plugins_loaded", False)
    monkeypatch.setattr(registry, "_DIFFUSION_ATTN_OVERRIDES", {})
    selector._cached_get_backend_cls.cache_clear()
    plugins.load_omni_general_plugins()
    call.say_once.cache_clear()
    yield
    selector._cached_get_backend_cls.cache_clear()


def layer(spec=SPEC, prefix="blocks.1.attn1", parallel=None, **given):
    """The server's attention layer, as its models make it."""
    from vllm_omni.diffusion.attention.layer import Attention
    from vllm_omni.diffusion.config import set_current_diffusion_config
    from vllm_omni.diffusion.data import AttentionConfig

    degrees = {"ring_degree": 1, "ulysses_degree": 1, "allgather_degree": 1, "sequence_parallel_size": 1}
    config = SimpleNamespace(
        diffusion_attention_config=AttentionConfig(per_role={"self": spec}),
        parallel_config=SimpleNamespace(**degrees | (parallel or {})),
        model_class_name="WanPipeline",
    )
    shape = {"num_heads": HEADS, "head_size": DIM, "causal": False, "softmax_scale": DIM**-0.5, "qkv_layout": "BSND"}
    with set_current_diffusion_config(config):
        return Attention(**shape | given, prefix=prefix)


def at_step(step, steps=10):
    """The server's forward context at this step of a run."""
    from vllm_omni.diffusion import forward_context

    context = forward_context.ForwardContext(denoise_step_idx=step, total_denoise_steps=steps)
    context.sp_plan_hooks_applied = True  # no sequence parallelism
    return forward_context.override_forward_context(context)


def metadata(**given):
    from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata, VideoTokenLayout

    layout = given.pop("layout", {"prefix_len": 0, "latent_grid": GRID, "used_len": VIDEO})
    return AttentionMetadata(video_layout=VideoTokenLayout(**layout) if layout else None, **given)


def qkv(tokens=VIDEO, batch=1):
    torch.manual_seed(0)
    return torch.randn(3, batch, tokens, HEADS, DIM).unbind()


def dense(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def close(a, b):
    return (a - b).abs().max() < 1e-5


def test_a_call_with_the_servers_metadata_is_draft_attention():
    q, k, v = qkv(batch=2)
    out = layer()(q, k, v, metadata())
    assert close(out, draftdiff.draft_attention(q, k, v, grid=GRID, config=0.75))
    assert (out - dense(q, k, v)).abs().max() > 1e-3


def test_the_plugin_is_found_by_its_entry_point():
    from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum

    assert DiffusionAttentionBackendEnum.RAINFUSION_ATTN.get_class().__module__.startswith("draftdiff.")
    others = [member for member in DiffusionAttentionBackendEnum if member.is_overridden()]
    assert others == [DiffusionAttentionBackendEnum.RAINFUSION_ATTN]


def test_on_ascend_rainfusion_stays_what_it_is(monkeypatch):
    from vllm_omni import platforms
    from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum

    member = DiffusionAttentionBackendEnum.RAINFUSION_ATTN
    member.clear_override()
    monkeypatch.setattr(type(platforms.current_omni_platform), "is_npu", lambda self: True)
    vllm_omni.register()
    assert not member.is_overridden()


def test_text_in_front_and_padding_behind_are_kept_apart():
    """As MiniMax-H3 packs it: [text and audio | video | padding]."""
    text, padding = 70, 58
    q, k, v = qkv(text + VIDEO + padding)
    extra = {"max_seqlen_q": text + VIDEO, "valid_kv_length": text + VIDEO}
    out = layer()(q, k, v, metadata(layout={"prefix_len": text, "latent_grid": GRID}, extra=extra))
    real = [x[:, : text + VIDEO] for x in (q, k, v)]
    assert close(out[:, : text + VIDEO], draftdiff.draft_attention(*real, grid=GRID, lead=text, config=0.75))
    assert close(out[:, :text], dense(*real)[:, :text]), "text is exact"
    assert out.shape == q.shape and not out[:, text + VIDEO :].any()


def test_reference_videos_are_further_grids():
    from vllm_omni.diffusion.attention.backends.abstract import VideoTokenSpan

    from draftdiff.integrations.vllm_omni.backend import places_of

    reference, audio = (3, 16, 20), 5
    start = 3 * 16 * 20 + audio
    spans = (VideoTokenSpan(0, reference, "reference"), VideoTokenSpan(start, GRID, "target"))
    given = metadata(layout={"used_len": start + VIDEO, "video_spans": spans})
    assert places_of(given.video_layout) == Places(LatentGrid(*GRID), start, ((0, LatentGrid(*reference)),))
    q, k, v = qkv(start + VIDEO)
    attention = layer()
    config = attention.attention.config
    wanted, _ = attend(
        q,
        k,
        v,
        torch.full((HEADS,), 0.25, dtype=torch.float64),
        config.rule,
        grid=LatentGrid(*GRID),
        lead=start,
        others=[(0, LatentGrid(*reference))],
    )
    assert close(attention(q, k, v, given), wanted)


@pytest.mark.parametrize(("step", "sparse"), [(0, False), (1, False), (2, True), (8, True), (9, False), (None, False)])
def test_first_and_last_steps_are_dense(step, sparse):
    q, k, v = qkv()
    settings = {"sparsity": 0.75, "start_step": 2, "end_step": 1}
    attention = layer({"backend": "RAINFUSION_ATTN", "block_sparse": settings})
    with at_step(step):
        out = attention(q, k, v, metadata())
    assert close(out, dense(q, k, v)) is not sparse


@pytest.mark.parametrize(
    ("prefix", "skip", "sparse"),
    [
        ("blocks.0.attn1", None, False),
        ("blocks.3.attn1", None, True),
        ("blocks.0.attn1", "2-3", True),
        ("blocks.3.attn1", "2-3", False),
    ],
)
def test_blocks_that_are_named_are_dense_and_else_the_first(prefix, skip, sparse):
    q, k, v = qkv()
    settings = {"sparsity": 0.75, "skip_layers": skip}
    out = layer({"backend": "RAINFUSION_ATTN", "block_sparse": settings}, prefix)(q, k, v, metadata())
    assert close(out, dense(q, k, v)) is not sparse


@pytest.mark.parametrize(
    ("given", "tokens", "reason"),
    [
        ({"layout": None}, VIDEO, "does not tell where its video stands"),
        ({"layout": {"prefix_len": 0, "latent_grid": (2, 8, 8)}}, 128, "fewer than min_tokens"),
        ({"attn_mask": torch.ones(1, 1, VIDEO, VIDEO, dtype=torch.bool)}, VIDEO, "mask over pairs"),
        ({"layout": {"prefix_len": 9, "latent_grid": GRID}}, VIDEO, "without a target"),
    ],
)
def test_what_cannot_be_sparse_is_dense_and_says_why(given, tokens, reason, caplog):
    q, k, v = qkv(tokens)
    out = layer()(q, k, v, metadata(**given))
    assert close(out, dense(q, k, v))
    assert reason in caplog.text


def test_a_call_without_metadata_is_dense():
    q, k, v = qkv(100)
    assert close(layer()(q, k, v), dense(q, k, v))


@pytest.mark.parametrize("degree", ["ring_degree", "allgather_degree"])
def test_parallel_forms_that_hide_keys_are_refused(degree):
    with pytest.raises(ValueError, match=f"{degree} must be 1, got 2"):
        layer(parallel={degree: 2})


def test_precisions_of_ascend_are_refused():
    settings = {"sparsity": 0.75, "precision": "mix"}
    with pytest.raises(ValueError, match="'bf16' alone, got 'mix'"):
        layer({"backend": "RAINFUSION_ATTN", "block_sparse": settings})
