"""What else goes on inside a model: adapters, guidance by skipped layers, masks, the user's attention backend."""

import pytest
import torch
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.models.attention_dispatch import attention_backend

import draftdiff
from draftdiff import DraftAttentionConfig
from tests.rounding import rounded
from tests.video.model_cases import output_of
from tests.video.test_hook import AT_ONCE, CASES, FULL, inputs
from tests.video.test_pipeline import build_pipe, build_transformer, run


def test_adapters_that_use_the_same_processor_pass_through():
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    case = CASES["flux"]
    model = case.build()
    given = case.inputs(model, case.grid, 1)
    torch.manual_seed(0)
    adapters = {
        name: stock if name.startswith("single") else FluxIPAdapterAttnProcessor(64, 64, num_tokens=(4,), scale=[0.7])
        for name, stock in model.attn_processors.items()
    }
    model.set_attn_processor(adapters)
    given["joint_attention_kwargs"] = {"ip_hidden_states": [torch.randn(1, 4, 64)]}
    stock = rounded(lambda: output_of(model, given))
    stock.check(output_of(draftdiff.enable(model, FULL), given))
    assert not draftdiff.report(model).transformers[0].reasons
    draftdiff.enable(model, AT_ONCE)
    assert float((output_of(model, given) - stock.out).abs().max()) > 1e-3
    for processor in model.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.1]
    draftdiff.disable(model)
    assert all(p.scale == [0.1] for p in model.attn_processors.values() if hasattr(p, "scale"))


@pytest.mark.parametrize("name", ["qwen_image", "hunyuan_video", "cogvideox_2b", "ltx"])
@pytest.mark.parametrize("first", ["guidance", "draftdiff"])
def test_layer_skip_hooks_work_before_and_after_enable(name, first):
    case = CASES[name]
    scores = name == "qwen_image"
    skip = {"indices": [1], "skip_attention": not scores, "skip_attention_scores": scores, "skip_ff": not scores}
    guided = case.build()
    given = case.inputs(guided, case.grid, 1)
    plain = output_of(guided, given)
    apply_layer_skip(guided, LayerSkipConfig(**skip))
    expected = rounded(lambda: output_of(guided, given))
    assert float((expected.out - plain).abs().max()) > 1e-3
    model = case.build()
    if first == "draftdiff":
        draftdiff.enable(model, FULL)
    apply_layer_skip(model, LayerSkipConfig(**skip))
    if first == "guidance":
        draftdiff.enable(model, FULL)
    expected.check(output_of(model, given))
    assert ("layer-skip hook" in str(draftdiff.report(model))) == scores
    draftdiff.disable(model)
    assert torch.equal(output_of(model, given), expected.out)


def test_a_function_mode_that_watches_attention_gets_it():
    from torch.overrides import TorchFunctionMode

    model = build_transformer()

    class Values(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if (
                func is torch.nn.functional.scaled_dot_product_attention
                and kwargs["query"].shape == kwargs["value"].shape
            ):
                return kwargs["value"]
            return func(*args, **(kwargs or {}))

    with Values():
        stock = output_of(model, inputs())
        draftdiff.enable(model, AT_ONCE)
        assert torch.equal(output_of(model, inputs()), stock)
    assert "function mode watches attention" in str(draftdiff.report(model))
    with torch.device("cpu"):
        output_of(model, inputs())
    assert draftdiff.report(model).transformers[0].mean_density < 0.9


def test_a_mask_over_pairs_of_tokens_is_dense_and_told():
    case = CASES["cosmos"]
    model = case.build()
    layer = next(m for name, m in model.named_modules() if name.endswith("blocks.0.attn1"))
    real = layer.forward
    pairs = torch.ones(1, 1, 270, 270, dtype=torch.bool).tril()
    layer.forward = lambda x, **kwargs: real(x, **kwargs | {"attention_mask": pairs})
    given = case.inputs(model, case.grid, 1)
    stock = rounded(lambda: output_of(model, given))
    draftdiff.enable(model, FULL)
    stock.check(output_of(model, given))
    assert draftdiff.report(model).transformers[0].reasons == {"a mask that is not one flag per text token": 1}


def test_the_users_attention_backend_reaches_dense_calls_and_nothing_leaks():
    from diffusers.models import attention_dispatch as dispatch

    pipe = build_pipe()

    seen = []
    real = dispatch._AttentionBackendRegistry._backends[dispatch.AttentionBackendName._NATIVE_MATH]

    def noted(*args, **kwargs):
        seen.append(1)
        return real(*args, **kwargs)

    active = dispatch._AttentionBackendRegistry.get_active_backend()[0]
    draftdiff.enable(pipe, DraftAttentionConfig(dense_steps=5, min_tokens=0))
    table = dispatch._AttentionBackendRegistry._backends
    table[dispatch.AttentionBackendName._NATIVE_MATH] = noted
    dispatch._AttentionBackendRegistry._supported_arg_names[dispatch.AttentionBackendName._NATIVE_MATH] |= set()
    try:
        with attention_backend("_native_math"):
            run(pipe)
        in_context = len(seen)
        run(pipe)
    finally:
        table[dispatch.AttentionBackendName._NATIVE_MATH] = real
    # three layers, each with self- and cross-attention, ten forwards
    assert in_context == 60
    assert len(seen) == in_context
    assert dispatch._AttentionBackendRegistry.get_active_backend()[0] is active
    assert all(block.attn1.processor.draft_stock._attention_backend is None for block in pipe.transformer.blocks)
