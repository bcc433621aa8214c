"""Our processor for HunyuanVideo 1.5 against the one of diffusers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from draftdiff.video.hunyuan15 import HunyuanVideo15Processor
from tests.rounding import rounded
from tests.video.model_cases import MODEL_CASES, WIDTH, output_of

CASES = [case for case in MODEL_CASES if case.name.startswith("hunyuan_video_15")]
VIDEO, TEXT = 270, 10


def with_our_processor(model):
    for block in model.transformer_blocks:
        block.attn.set_processor(HunyuanVideo15Processor())
    return model


def attention_inputs(batch: int) -> dict:
    generator = torch.Generator().manual_seed(2)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    angles = noise(VIDEO, 16).repeat_interleave(2, dim=1)
    return {
        "hidden_states": noise(batch, VIDEO, WIDTH),
        "encoder_hidden_states": noise(batch, TEXT, WIDTH),
        "attention_mask": torch.arange(TEXT) < torch.tensor([[TEXT], [6]])[:batch],
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


class WithoutKernel(TorchFunctionMode):
    """Skips the attention kernel, whose own scratch memory is not the processor's."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return kwargs["value"] if "value" in kwargs else args[2]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_model_gives_the_same_video_with_either_processor(case, batch):
    model = case.build()
    inputs = case.inputs(model, case.grid, batch)
    stock = rounded(lambda: output_of(model, inputs))
    stock.check(output_of(with_our_processor(model), inputs))


def test_video_and_valid_text_come_out_of_one_layer_as_from_the_stock_processor():
    attention = CASES[0].build().transformer_blocks[0].attn
    inputs = attention_inputs(batch=2)

    def video_and_valid_text():
        video, text = attention(**inputs)
        return video, text[inputs["attention_mask"]]

    stock = rounded(video_and_valid_text)
    attention.set_processor(HunyuanVideo15Processor())
    stock.check(video_and_valid_text())


def test_padded_text_is_hidden_from_the_video():
    attention = CASES[0].build().transformer_blocks[0].attn
    attention.set_processor(HunyuanVideo15Processor())
    inputs = attention_inputs(batch=2)
    video, _ = attention(**inputs)
    inputs["encoder_hidden_states"][~inputs["attention_mask"]] += 3.0
    assert torch.equal(attention(**inputs)[0], video)
    inputs["encoder_hidden_states"][inputs["attention_mask"]] += 3.0
    assert (attention(**inputs)[0] - video).abs().max() > 1e-2


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "stock"])
def test_only_the_stock_processor_makes_a_tensor_over_all_pairs_of_tokens(ours):
    attention = CASES[0].build().transformer_blocks[0].attn
    if ours:
        attention.set_processor(HunyuanVideo15Processor())
    largest = LargestTensor()
    with WithoutKernel(), largest:
        attention(**attention_inputs(batch=1))
    assert (largest.elements >= (VIDEO + TEXT) ** 2) == (not ours)
