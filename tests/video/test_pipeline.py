"""Whole pipelines: steps, CFG, two transformers, and what users combine us with."""

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from packaging.version import Version

import draftdiff
from draftdiff import DraftAttentionConfig
from tests.rounding import rounded
from tests.video.model_cases import tiny_wan

SPARSE = DraftAttentionConfig(sparsity=0.7, dense_steps=1, dense_layers=0, min_tokens=0)
build_transformer = tiny_wan(layers=3, channels=16)


def build_pipe(two_transformers=False):
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    second = {"transformer_2": build_transformer(), "boundary_ratio": 0.8} if two_transformers else {}
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=build_transformer(),
        vae=vae.eval(),
        scheduler=scheduler,
        **second,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe():
    return build_pipe()


def run(pipe, steps=5, **call):
    embeds = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(1))
    size = {"height": 80, "width": 112, "num_frames": 13} | call
    return pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=-embeds,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(2),
        output_type="latent",
        **size,
    ).frames


@pytest.mark.parametrize(("dense_steps", "expected"), [(2, 2), (0.4, 2), (0.0, 0), (1.0, 5), (9, 5)])
def test_dense_steps_are_counted_in_real_steps(pipe, dense_steps, expected):
    draftdiff.enable(pipe, DraftAttentionConfig(dense_steps=dense_steps, dense_layers=0, min_tokens=0))
    for _ in range(2):
        run(pipe)
        told = draftdiff.report(pipe).transformers[0]
        assert (told.dense_steps, told.sparse_steps) == (expected, 5 - expected)
        assert [f.step for f in told.forwards] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        assert {f.passage for f in told.forwards} == {0}


def test_an_all_dense_run_is_the_stock_run_and_a_sparse_one_is_not(pipe):
    stock = run(pipe)
    draftdiff.enable(pipe, DraftAttentionConfig(dense_steps=1.0, min_tokens=0))
    assert torch.equal(run(pipe), stock)
    draftdiff.enable(pipe, SPARSE)
    assert float((run(pipe) - stock).abs().max()) > 1e-3
    draftdiff.disable(pipe)
    assert torch.equal(run(pipe), stock)


def test_two_transformers_share_one_count_of_steps():
    pipe = draftdiff.enable(build_pipe(two_transformers=True), SPARSE)
    run(pipe, steps=6)
    high, low = draftdiff.report(pipe).transformers
    assert high.dense_steps == 1
    assert low.dense_steps == 0
    assert high.sparse_steps + low.sparse_steps == 5
    assert low.sparse_steps > 0


def test_a_bare_transformer_takes_its_number_of_steps_from_the_caller(pipe):
    config = DraftAttentionConfig(dense_steps=0.5, dense_layers=0, min_tokens=0)
    draftdiff.enable(pipe.transformer, config, num_steps=4)
    hook_only = draftdiff.report(pipe.transformer)
    assert hook_only.transformers[0].forwards == []
    hidden_states = torch.randn(1, 16, 4, 10, 14)
    for t in (900.0, 700.0, 500.0, 300.0):
        pipe.transformer(hidden_states, torch.tensor([t]), torch.randn(1, 8, 16))
    assert draftdiff.report(pipe.transformer).transformers[0].dense_steps == 2


def test_an_exception_in_the_middle_of_a_run_leaves_a_pipe_that_works(pipe):
    draftdiff.enable(pipe, SPARSE)
    expected = run(pipe)

    def stop(pipe, step, timestep, tensors):
        if step == 2:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        run(pipe, callback_on_step_end=stop)
    assert torch.equal(run(pipe), expected)
    assert draftdiff.report(pipe).transformers[0].dense_steps == 1


def test_an_exception_inside_attention_leaves_a_pipe_that_works(pipe, monkeypatch):
    draftdiff.enable(pipe, SPARSE)
    expected = run(pipe)
    with monkeypatch.context() as patch:
        patch.setattr("draftdiff.video.calls.attend", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(pipe)
    assert torch.equal(run(pipe), expected)
    draftdiff.disable(pipe)
    assert "forward" not in pipe.transformer.__dict__


def test_a_new_size_gets_a_new_grid(pipe):
    draftdiff.enable(pipe, SPARSE)
    run(pipe)
    assert draftdiff.report(pipe).transformers[0].grid == (4, 5, 7)
    run(pipe, height=64, width=64, num_frames=5)
    assert draftdiff.report(pipe).transformers[0].grid == (2, 4, 4)


def test_budgets_may_fall_over_the_steps(pipe):
    from draftdiff.core.budget import Budget

    config = DraftAttentionConfig(Budget(0.6, steps=(2.0, 0.8)), dense_steps=1, dense_layers=0, min_tokens=0)
    draftdiff.enable(pipe, config)
    run(pipe, height=160, width=160)
    density = draftdiff.report(pipe).transformers[0].density.mean(1)
    assert density[0] == 1
    assert float(density[1:3].min()) > float(density[3:].max())


def test_first_block_cache_skips_our_layers_and_the_report_says_so(pipe):
    from diffusers.hooks import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    cached = rounded(lambda: run(pipe))
    draftdiff.enable(pipe, DraftAttentionConfig(selection="full", dense_steps=0, dense_layers=0, min_tokens=0))
    cached.check(run(pipe))
    draftdiff.enable(pipe, SPARSE)
    run(pipe)
    density = draftdiff.report(pipe).transformers[0].density
    assert density[2:, 1:].isnan().all()
    assert not density[:, 0].isnan().any()
    draftdiff.disable(pipe)
    assert torch.equal(run(pipe), cached.out)
    pipe.transformer.disable_cache()


@pytest.mark.parametrize("first", ["draftdiff", "lora"])
def test_lora_changes_the_sparse_result_and_leaves_with_its_adapter(pipe, first):
    from peft import LoraConfig

    adapter = LoraConfig(r=4, lora_alpha=64, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    draftdiff.enable(pipe, SPARSE)
    plain = rounded(lambda: run(pipe))
    if first == "lora":
        draftdiff.disable(pipe)
    pipe.transformer.add_adapter(adapter)
    if first == "lora":
        draftdiff.enable(pipe, SPARSE)
    assert float((run(pipe) - plain.out).abs().max()) > 1e-3
    draftdiff.enable(pipe, DraftAttentionConfig(selection="full", dense_steps=0, dense_layers=0, min_tokens=0))
    with_full = rounded(lambda: run(pipe))
    with_full.check(run(draftdiff.disable(pipe)))
    draftdiff.enable(pipe, SPARSE)
    pipe.transformer.disable_adapters()
    plain.check(run(pipe))


@pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.41") and not torch.accelerator.is_available(),
    reason="group offload of diffusers before 0.41 needs an accelerator",
)
@pytest.mark.parametrize("first", ["draftdiff", "offload"])
def test_group_offload_and_draft_attention_do_not_disturb_each_other(pipe, first, tmp_path):
    expected = run(draftdiff.enable(pipe, SPARSE))
    if first == "offload":
        draftdiff.disable(pipe)
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    draftdiff.enable(pipe, SPARSE)
    assert torch.equal(run(pipe), expected)


def test_fused_projections_give_the_same_result(pipe):
    draftdiff.enable(pipe, SPARSE)
    expected = rounded(lambda: run(pipe))
    pipe.transformer.fuse_qkv_projections()
    expected.check(run(pipe))


@pytest.mark.parametrize("runs_between", [0, 1])
def test_a_processor_set_after_us_is_made_sparse_and_kept_on_disable(pipe, runs_between):
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    expected = run(draftdiff.enable(pipe, SPARSE))
    later = WanAttnProcessor()
    pipe.transformer.blocks[0].attn1.set_processor(later)
    for _ in range(runs_between):
        assert torch.equal(run(pipe), expected)
    draftdiff.disable(pipe)
    assert pipe.transformer.blocks[0].attn1.processor is later


def test_a_backend_chosen_after_us_serves_the_dense_calls_and_stays(pipe):
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    active = _AttentionBackendRegistry.get_active_backend()[0]
    draftdiff.enable(pipe, SPARSE)
    expected = rounded(lambda: run(pipe))
    try:
        pipe.transformer.set_attention_backend("_native_math")
        expected.check(run(pipe))
        assert draftdiff.report(pipe).transformers[0].mean_density is not None
        draftdiff.disable(pipe)
        chosen = {block.attn1.processor._attention_backend for block in pipe.transformer.blocks}
        assert chosen == {AttentionBackendName._NATIVE_MATH}
    finally:
        _AttentionBackendRegistry.set_active_backend(active)


@pytest.mark.parametrize("first", ["draftdiff", "accelerate"])
def test_accelerates_hook_survives_ours(pipe, first):
    from accelerate.hooks import ModelHook, add_hook_to_module

    calls = []

    class Count(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(1)
            return args, kwargs

    stock = run(pipe)
    if first == "draftdiff":
        draftdiff.enable(pipe, SPARSE)
    add_hook_to_module(pipe.transformer, Count())
    draftdiff.enable(pipe, SPARSE) if first == "accelerate" else None
    sparse = run(pipe)
    assert float((sparse - stock).abs().max()) > 1e-3
    assert len(calls) == 10
    draftdiff.disable(pipe)
    assert torch.equal(run(pipe), stock)
    assert len(calls) == 20
    assert torch.equal(run(draftdiff.enable(pipe, SPARSE)), sparse)


def test_cross_attention_and_other_backends_are_not_touched(pipe):
    draftdiff.enable(pipe, SPARSE)
    for block in pipe.transformer.blocks:
        assert block.attn2.processor._attention_backend is None
        assert "draftdiff" in block.attn1.processor._attention_backend


def test_a_pipeline_without_a_known_transformer_is_named(pipe):
    pipe.transformer = torch.nn.Identity()
    pipe.register_modules(transformer=torch.nn.Identity())
    with pytest.raises(ValueError, match="WanPipeline has no supported transformer; supported transformers: Wan"):
        draftdiff.enable(pipe)
