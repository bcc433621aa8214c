"""Every private name of diffusers and torch that our hosts of diffusers rest on, used once on the installed version."""

import inspect
import sys

import pytest
import torch
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models import attention_dispatch as dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

import draftdiff
from draftdiff import DraftAttentionConfig
from draftdiff.hosts import diffusers as host
from draftdiff.hosts import dispatcher
from tests.video.model_cases import MODEL_CASES, output_of, tiny_wan

CASES = {case.name: case for case in MODEL_CASES}
TABLES = ("_backends", "_constraints", "_supported_arg_names", "_supports_context_parallel")


def tables():
    """What diffusers knows of attention backends and processors."""
    names = (AttentionBackendName._member_map_, AttentionBackendName._value2member_map_)
    return [
        *(set(map(str, table)) for table in names),
        list(AttentionBackendName._member_names_),
        *(set(map(str, getattr(_AttentionBackendRegistry, table))) for table in TABLES),
        set(AttentionProcessorRegistry._registry),
    ]


def test_the_dispatcher_has_the_tables_that_a_backend_is_entered_in():
    assert isinstance(AttentionBackendName.NATIVE, str)
    for table in TABLES:
        assert hasattr(_AttentionBackendRegistry, table), f"diffusers' attention registry has no {table} any more"
    wanted = {"query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "_parallel_config"}
    native = inspect.signature(_AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]).parameters
    ours = inspect.signature(dispatcher._Backend.__call__).parameters
    assert set(native) - {"return_lse"} <= wanted | {"self"}, f"the dispatcher passes more than we take: {set(native)}"
    assert wanted <= set(ours)


def test_the_dispatcher_is_called_as_we_call_it():
    parameters = set(inspect.signature(dispatch.dispatch_attention_fn).parameters)
    assert {"backend", "parallel_config", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"} <= parameters
    parameters = set(inspect.signature(dispatch._templated_context_parallel_attention).parameters)
    assert {"forward_op", "backward_op", "_parallel_config", "return_lse"} <= parameters


@pytest.mark.parametrize("name", ["wan_t2v", "qwen_image", "cogvideox_2b", "hunyuan_video_15"])
def test_tables_are_what_they_were_after_the_last_model_lets_go(name):
    case = CASES[name]
    first, second = case.build(), case.build()
    AttentionProcessorRegistry._register()
    draftdiff.disable(draftdiff.enable(first))
    before = tables()
    for model in (first, second):
        draftdiff.enable(model, DraftAttentionConfig(dense_steps=0, dense_layers=0, min_tokens=0))
        output_of(model, case.inputs(model, case.grid, 1))
    draftdiff.disable(first)
    output_of(second, case.inputs(second, case.grid, 1))
    draftdiff.disable(second)
    assert tables() == before


def test_layers_are_known_to_layer_skip_as_their_processors_are():
    model = CASES["qwen_image"].build()
    attention = model.transformer_blocks[0].attn
    stock = AttentionProcessorRegistry.get(type(attention.processor))
    draftdiff.enable(model)
    assert AttentionProcessorRegistry.get(attention.processor.__class__) is stock
    draftdiff.disable(model)


def test_what_is_set_on_a_stand_in_is_set_on_the_processor_and_a_backend_on_that_alone():
    model = draftdiff.enable(tiny_wan(layers=1)())
    mine = model.blocks[0].attn1.processor
    stock = mine.draft_stock
    mine._parallel_config, mine.scale = "config", [0.5]
    assert (stock._parallel_config, stock.scale) == ("config", [0.5])
    mine._attention_backend = AttentionBackendName._NATIVE_MATH
    assert stock._attention_backend is AttentionBackendName._NATIVE_MATH
    assert mine._attention_backend == dispatcher.BACKEND
    draftdiff.disable(model)
    assert model.blocks[0].attn1.processor is stock


def test_heads_and_head_dim_are_read_from_every_attention():
    for case in MODEL_CASES:
        model = draftdiff.enable(case.build())
        hook = draftdiff.video.patch._hook_of(model)
        for layer in hook.layers:
            heads, head_dim = host.heads_of(layer.module), host.head_dim_of(layer.module)
            assert heads >= 1, case.name
            assert head_dim >= 8, case.name


def test_gradient_checkpointing_is_found_by_the_name_it_has():
    model = tiny_wan(layers=1)()
    model.enable_gradient_checkpointing()
    stock = model._gradient_checkpointing_func
    kept = []
    with host.checkpoints_through(model, lambda block: kept.append(block) or block):
        assert model._gradient_checkpointing_func is not stock
        model._gradient_checkpointing_func(torch.nn.Identity(), torch.ones(1, requires_grad=True))
    assert model._gradient_checkpointing_func is stock
    assert len(kept) == 1


def test_the_pipelines_that_are_calling_are_found_innermost_first():
    from diffusers import DiffusionPipeline

    class Inner(DiffusionPipeline):
        def __init__(self):
            super().__init__()

        def __call__(self):
            return host.running_pipelines()

    class Outer(Inner):
        @torch.no_grad()
        def __call__(self, inner):
            return inner()

    outer, inner = Outer(), Inner()
    found = outer(inner)
    assert [pipeline for _, pipeline in found] == [inner, outer]
    assert host.running_pipelines() == []


def test_a_frame_takes_an_object_that_lives_as_long_as_it():
    """Python's promise that a run rests on: the trace function of a frame is set, kept and let go with the frame."""
    import weakref

    class Token:
        def __call__(self, *_):
            return None

    def call():
        token = sys._getframe().f_trace = Token()
        return weakref.ref(token), sys._getframe().f_trace is token

    alive, kept = call()
    assert kept
    assert alive() is None


def test_function_modes_of_others_are_seen_and_devices_are_not():
    from torch.overrides import TorchFunctionMode

    assert not host.is_watched()
    with torch.device("cpu"):
        assert not host.is_watched()
    with TorchFunctionMode():
        assert host.is_watched()
