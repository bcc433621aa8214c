"""Gradients through sparse layers, and autocast."""

import pytest
import torch

import draftdiff
from draftdiff import DraftAttentionConfig
from tests.rounding import rounded
from tests.video.model_cases import output_of
from tests.video.test_hook import ALWAYS, AT_ONCE, inputs
from tests.video.test_pipeline import build_transformer


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_gradients_reach_every_weight_as_through_the_reference(backend, checkpointing):
    def gradients(backend, checkpointing):
        model = build_transformer().requires_grad_(True).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        draftdiff.enable(model, DraftAttentionConfig(sparsity=0.7, backend=backend, **ALWAYS))
        model(**inputs())[0].square().mean().backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    rounded(lambda: gradients("reference", False)).check(gradients(backend, checkpointing))


def test_gradients_pass_compiled_blocks():
    def gradients(compiled):
        torch._dynamo.reset()
        model = draftdiff.enable(build_transformer().requires_grad_(True), AT_ONCE)
        if compiled:
            model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        model(**inputs())[0].square().mean().backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    rounded(lambda: gradients(False)).check(gradients(True))
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["auto", "torch", "reference", "flex"])
def test_autocast_works_with_every_backend(backend, bf16_attention):
    model = build_transformer()
    with torch.autocast("cpu", torch.bfloat16):
        stock = output_of(model, inputs())
        config = DraftAttentionConfig(selection="full", backend=backend, **ALWAYS)
        out = output_of(draftdiff.enable(model, config), inputs())
    assert out.dtype == stock.dtype
    # bf16 keeps 8 bits: a few roundings of the largest value
    assert float((out - stock).abs().max()) <= 4 * 2**-8 * float(stock.abs().max())
