"""Two processes that share the heads of one model (Ulysses) give what one process gives."""

import gc
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import draftdiff
from draftdiff import DraftAttentionConfig
from draftdiff.video import patch
from tests.rounding import rounded
from tests.video.model_cases import MODEL_CASES, output_of, tiny_wan

SPARSE = DraftAttentionConfig(sparsity=0.7, dense_steps=0, dense_layers=0, min_tokens=0)
CASES = {case.name: case for case in MODEL_CASES}


def build(name):
    return tiny_wan(layers=2, heads=4)() if name == "wan_t2v" else CASES[name].build()


def inputs_of(name, model):
    return CASES[name].inputs(model, (4, 6, 9) if name == "wan_t2v" else (1, 14, 18), 1)


def share_heads(rank, folder, name, ring):
    from diffusers import ContextParallelConfig

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = build(name)
    degrees = {"ring_degree": 2} if ring else {"ulysses_degree": 2}
    # diffusers counts accelerators to place a process; a CPU has none.
    with mock.patch("torch.accelerator.device_count", return_value=1):
        model.enable_parallelism(config=ContextParallelConfig(**degrees))
    draftdiff.enable(model, SPARSE)
    try:
        out = output_of(model, inputs_of(name, model))
        # plain numbers: the gathered output may be of a tensor class of its own
        result = torch.tensor(out.tolist()), dict(draftdiff.report(model).transformers[0].reasons)
    except ValueError as error:
        result = str(error)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    # The model holds the mesh, and so gloo's threads: one that drops a tensor while Python shuts down aborts it.
    del model
    gc.collect()


def run_two(tmp_path, name="wan_t2v", ring=False):
    mp.spawn(share_heads, args=(str(tmp_path), name, ring), nprocs=2)
    return [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", ["wan_t2v", "flux", "qwen_image"])
def test_ulysses_equals_one_process_also_where_text_is_shared_by_itself(tmp_path, name):
    model = build(name)
    dense = output_of(model, inputs_of(name, model))
    draftdiff.enable(model, SPARSE)
    expected = rounded(lambda: output_of(model, inputs_of(name, model)))
    assert float((output_of(model, inputs_of(name, model)) - dense).abs().max()) > 1e-3
    for result, reasons in run_two(tmp_path, name):
        assert not reasons
        expected.check(result)


def test_ring_is_refused_in_one_line(tmp_path):
    for result in run_two(tmp_path, ring=True):
        assert "ring context parallelism is not supported" in result
        assert "\n" not in result


@pytest.mark.parametrize(
    ("text", "behind", "width", "even"),
    [(10, 0, 18, True), (9, 0, 18, False), (10, 0, 17, False), (0, 0, 17, True), (10, 4, 18, False)],
)
def test_streams_that_cannot_be_shared_evenly_are_dense(text, behind, width, even):
    model = draftdiff.enable(CASES["flux"].build(), SPARSE)
    layer = patch._hook_of(model).layers[0]
    layer.here.value = SimpleNamespace(shape=torch.empty(1, 15, width, text, 0))
    query = torch.empty(1, text + 15 * width + behind, 2, 8)  # a reference behind the image
    options = dict.fromkeys(("mask", "scale", "dropout", "causal", "gqa"))
    reason = patch.reason_for_dense(layer, query, query, options, 2, eager=True)
    assert (reason is None) == even
    assert even or "share evenly" in reason
