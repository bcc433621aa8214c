"""Several processes that share one model (diffusers' Ulysses, ring and both) give what one process gives."""

import gc
import traceback
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers.models import attention_dispatch

import draftdiff
from draftdiff import DraftAttentionConfig
from draftdiff.bench.parallel import Share as Cost
from draftdiff.core.budget import Budget
from draftdiff.hosts import dispatcher
from draftdiff.hosts.dispatcher import Share
from draftdiff.video import calls, patch
from tests.rounding import rounded
from tests.video.model_cases import MODEL_CASES, output_of, tiny_wan

SPARSE = DraftAttentionConfig(sparsity=0.7, dense_steps=0, dense_layers=0, min_tokens=0)
PER_HEAD = replace(SPARSE, sparsity=Budget(0.7, heads=(0.5, 1.0, 1.2, 1.3)))
CASES = {case.name: case for case in MODEL_CASES}


@dataclass(frozen=True)
class Job:
    """A model under a `ContextParallelConfig` of these degrees. odd: tokens that processes cannot share evenly."""

    model: str
    ulysses: int = 1
    ring: int = 1
    odd: bool = False
    per_head: bool = False
    enabled_first: bool = False

    def __str__(self) -> str:
        words = [self.model, f"ulysses {self.ulysses}", f"ring {self.ring}"]
        return " ".join(words + [name for name in ("odd", "per_head", "enabled_first") if getattr(self, name)])

    @property
    def degrees(self):
        anything = {"ulysses_anything" if self.ulysses > 1 else "ring_anything": True} if self.odd else {}
        return {"ulysses_degree": self.ulysses, "ring_degree": self.ring} | anything

    def build(self):
        return tiny_wan(layers=2, heads=4)() if self.model == "wan_t2v" else CASES[self.model].build()

    def inputs(self, model):
        grid = (4, 6, 9) if self.model == "wan_t2v" else (1, 14, 18)
        inputs = CASES[self.model].inputs(model, (5, 7, 9) if self.odd else grid, 1)
        if self.model == "ltx":  # diffusers cannot share the heads of its text attention with a mask
            inputs["encoder_attention_mask"] = None
        return inputs

    @property
    def config(self):
        return PER_HEAD if self.per_head else SPARSE


TWO = [
    Job("wan_t2v", ulysses=2),
    Job("wan_t2v", ulysses=2, per_head=True, enabled_first=True),
    Job("wan_t2v", ulysses=2, odd=True),
    Job("wan_t2v", ring=2, enabled_first=True),
    Job("wan_t2v", ring=2, odd=True),
    Job("flux", ulysses=2),
    Job("flux", ring=2),
    Job("qwen_image", ulysses=2),
    Job("qwen_image", ring=2),
    Job("ltx", ulysses=2),  # LTX-2 does not run so without us either (diffusers 0.42.1)
    Job("ltx", ring=2),
    Job("minimax_h3", ulysses=2),
    Job("minimax_h3", ring=2),
]
FOUR = [Job("wan_t2v", ulysses=2, ring=2), Job("wan_t2v", ring=4), Job("minimax_h3", ulysses=2, ring=2)]


def runs_here(job):
    """Not all that the newest diffusers can the oldest can."""
    from diffusers import ContextParallelConfig

    known = CASES.get(job.model) is not None or job.model == "wan_t2v"
    return known and set(job.degrees) <= set(ContextParallelConfig.__dataclass_fields__)


def all_gather_of_any_size(parts, tensor, group=None, stock=dist.all_gather):
    """As NCCL has it; gloo gathers tensors of one size only."""
    axis = odd_axis(parts)
    most = max(part.shape[axis] for part in parts)
    room = tensor.new_zeros(*tensor.shape[:axis], most, *tensor.shape[axis + 1 :])
    room.narrow(axis, 0, tensor.shape[axis]).copy_(tensor)
    found = [torch.empty_like(room) for _ in parts]
    stock(found, room, group=group)
    for part, full in zip(parts, found):
        part.copy_(full.narrow(axis, 0, part.shape[axis]))


def odd_axis(parts):
    """Where tensors differ in size, 0 if nowhere."""
    shapes = torch.tensor([part.shape for part in parts])
    return int((shapes != shapes[0]).any(0).int().argmax()) if shapes.numel() else 0


def native_with_lse(ctx, query, key, value, mask=None, dropout=0.0, causal=False, scale=None, *_, **__):
    """diffusers has no dense ring attention on a CPU, which layers that are not ours need."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * (scale or query.shape[-1] ** -0.5)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value), scores.logsumexp(-1).transpose(1, 2)


class Counted:
    """Calls a function and adds up the bytes of its first argument."""

    def __init__(self, function):
        self.function, self.bytes = function, 0

    def __call__(self, x, *args, **kwargs):
        self.bytes += x.numel() * x.element_size()
        return self.function(x, *args, **kwargs)


def share(rank, folder, jobs, processes):
    from diffusers import ContextParallelConfig

    torch.set_num_threads(1)
    given = {"rank": rank, "world_size": processes, "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", **given)
    for number, job in enumerate(jobs):
        model = job.build()
        if job.enabled_first:
            draftdiff.enable(model, job.config)
        # diffusers counts accelerators to place a process; a CPU has none.
        with mock.patch("torch.accelerator.device_count", return_value=1):
            model.enable_parallelism(config=ContextParallelConfig(**job.degrees))
        if not job.enabled_first:
            draftdiff.enable(model, job.config)
        gather = all_gather_of_any_size if job.odd else dist.all_gather
        try:
            with ExitStack() as stack:
                stack.enter_context(mock.patch("torch.distributed.all_gather", gather))
                if job.ring > 1:
                    name = "diffusers.models.attention_dispatch._native_attention_forward_op"
                    stack.enter_context(mock.patch(name, native_with_lse))
                exchanged, gathered = Counted(attention_dispatch._all_to_all_single), Counted(dispatcher._gathered)
                stack.enter_context(mock.patch.object(attention_dispatch, "_all_to_all_single", exchanged))
                stack.enter_context(mock.patch.object(dispatcher, "_gathered", gathered))
                out = output_of(model, job.inputs(model))
            # plain numbers: the gathered output may be of a tensor class of its own
            reasons = dict(draftdiff.report(model).transformers[0].reasons)
            result = torch.tensor(out.tolist()), reasons, (exchanged.bytes, gathered.bytes)
        except Exception:
            result = traceback.format_exc(), {}, (0, 0)
        torch.save(result, f"{folder}/{number}.{rank}.pt")
        # The model holds the mesh, and so gloo's threads: one that drops a tensor while Python shuts down aborts it.
        del model
        gc.collect()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """(job, number of processes) -> what each process made of it, all jobs in one go."""
    found = {}

    def results(job, jobs, processes):
        if processes not in found:
            folder = tmp_path_factory.mktemp("processes")
            jobs = [job for job in jobs if runs_here(job)]
            mp.spawn(share, args=(str(folder), jobs, processes), nprocs=processes)
            ranks = range(processes)
            found[processes] = {
                job: [torch.load(folder / f"{number}.{rank}.pt") for rank in ranks] for number, job in enumerate(jobs)
            }
        return found[processes][job]

    return results


def equals_one_process(job, results):
    model = job.build()
    dense = output_of(model, job.inputs(model))
    draftdiff.enable(model, job.config)
    expected = rounded(lambda: output_of(model, job.inputs(model)))
    assert float((output_of(model, job.inputs(model)) - dense).abs().max()) > 1e-3
    for result, reasons, _ in results:
        assert not isinstance(result, str), result
        assert not reasons
        expected.check(result)


@pytest.mark.parametrize("job", [job for job in TWO if runs_here(job)], ids=str)
def test_two_processes_equal_one(shared, job):
    equals_one_process(job, shared(job, TWO, 2))


@pytest.mark.parametrize("job", [job for job in FOUR if runs_here(job)], ids=str)
def test_four_processes_equal_one(shared, job):
    equals_one_process(job, shared(job, FOUR, 4))


@pytest.mark.parametrize("job", [Job("wan_t2v", ulysses=2), Job("wan_t2v", ring=2, enabled_first=True)], ids=str)
def test_what_goes_over_links_is_what_the_table_of_costs_says(shared, job):
    layers, tokens, heads, head_dim = 2, 216, 4, 32
    expected = Cost(tokens, heads, head_dim, ulysses=job.ulysses, ring=job.ring, bytes_of=4)
    for *_, (exchanged, gathered) in shared(job, TWO, 2):
        # Of what is exchanged each process keeps its own half; of what is gathered it has given its half.
        assert exchanged / 2 == layers * expected.exchanged
        assert gathered == layers * expected.gathered


@pytest.mark.parametrize(
    ("causal", "eager", "reason"),
    [
        (2, True, "causal blocks of frames beside other tokens or over ring processes"),
        (0, False, "ring context parallelism in a compiled graph"),
    ],
)
def test_what_a_ring_cannot_share_is_dense_and_told(causal, eager, reason):
    model = draftdiff.enable(tiny_wan(layers=1)(), SPARSE)
    layer = patch._hook_of(model).layers[0]
    layer.here.value = SimpleNamespace(
        shape=torch.empty(4, 6, 9, 0, causal, 0, 0), keys=None, groups=None, block_size=64
    )
    query, key = torch.empty(1, 108, 2, 8), torch.empty(1, 216, 2, 8)
    options = dict.fromkeys(("mask", "scale", "dropout", "causal", "gqa"))
    assert calls.sequence_of(layer, query, key, options, Share(2, 0, 1), eager=eager) == reason
    layer.here.value.shape = torch.empty(4, 6, 9, 0, 0, 0, 0)
    over = calls.sequence_of(layer, query, key, options, Share(2, 0, 1), eager=True)
    assert over.queries == [(0, 108)]


def test_references_behind_a_picture_are_in_its_stream():
    """A reference that is a grid of its own, or not: what processes bring is put in the model's order."""
    model = draftdiff.enable(CASES["flux"].build(), SPARSE)
    layer = patch._hook_of(model).layers[0]
    text, picture, reference = 9, 15 * 17, 4
    layer.here.value = SimpleNamespace(shape=torch.empty(1, 15, 17, text, 0, 0, 0), keys=None, groups=None)
    query = torch.empty(1, text + picture + reference, 2, 8)
    options = dict.fromkeys(("mask", "scale", "dropout", "causal", "gqa"))
    over = calls.sequence_of(layer, query, query, options, Share(2, 0, 2), eager=True)
    assert over.lead == text
    assert over.pieces == ([(5, 130), (4, 129)], [(5, 130), (4, 129)])
    x = torch.arange(query.shape[1])[None]
    brought = calls._as_brought(x, over.pieces[0])
    assert brought[0, :6].tolist() == [0, 1, 2, 3, 4, text]
    assert torch.equal(calls._in_order(brought, over.pieces[0]), x)
