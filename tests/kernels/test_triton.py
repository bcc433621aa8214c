"""The Triton kernels in Triton's interpreter: every way of reading memory, every configuration, lists and the draft."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from draftdiff.core.draft import draft_map, pool
from draftdiff.core.grid import LatentGrid, tiling_for
from draftdiff.core.select import select_draft
from draftdiff.kernels import triton_backend, triton_configs, triton_draft, triton_lists
from draftdiff.kernels.autotune import DoesNotCompile
from draftdiff.kernels.problem import PRECISIONS
from draftdiff.kernels.triton_lists import BOX, FULL, PARTIAL, list_tiles, tables_for
from tests.kernels.cases import KERNEL_CASES, SEVERAL_GRIDS, KernelCase, assert_attends, make
from tests.rounding import rounded

TEXT_AROUND = KernelCase("strips, text around", (2, 12, 20), (1, 8, 16), 128, 40, lead=5, padded=True, heads=1)
NO_AXIS_DIVIDES = KernelCase("no axis divides", (3, 7, 9), (2, 4, 8), 64, batch=1, heads=1)
ONE_TILE = KernelCase("one tile", (1, 8, 8), (1, 8, 8), 64, batch=1)
SMALL_BOXES = KernelCase("bricks of 64, text last", (3, 6, 12), (2, 4, 8), 64, text=40, heads=1)


def launch(case, config, *, head_dim=64, dtype=torch.float16, tail=True, precision="full", arrange=lambda x: x):
    """The call of one configuration, what it gives, and its problem."""
    problem = make(case, head_dim, dtype, tail)
    q, k, v = (arrange(x) for x in (problem.q, problem.k, problem.v))
    problem = replace(problem, q=q, k=k, v=v, precision=precision)
    ready = triton_backend.Call.prepare(problem, want_lse=True)
    return ready, ready.launch(config), problem


# Warps, stages and registers mean nothing to the interpreter: one configuration of each other kind.
KINDS = {
    (access, sizes, config.keys): config
    for access, table in triton_configs.CONFIGS.items()
    for sizes, configs in table.items()
    for config in configs
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: " ".join(map(str, kind)))
def test_every_configuration_equals_the_reference(monkeypatch, kind):
    access, sizes, _ = kind
    config = KINDS[kind]
    monkeypatch.setattr(triton_backend, "_architecture", lambda device: access)
    head_dim, block = sizes
    case = TEXT_AROUND if block == 128 else SMALL_BOXES
    precision = "int8" if access == "int8" else "full"
    call, found, problem = launch(case, config, head_dim=head_dim, precision=precision)
    assert call.access == access
    assert_attends(*found, problem)


@pytest.mark.parametrize("case", SEVERAL_GRIDS, ids=lambda case: case.name)
@pytest.mark.parametrize("access", ["hopper", "strided", "gather", "int8"])
def test_every_way_of_reading_reads_further_grids(monkeypatch, access, case):
    monkeypatch.setattr(triton_backend, "_architecture", lambda device: access)
    if access == "gather":  # for tiles that are no boxes of powers of two
        case = replace(case, tile=(1, 7, 9))
    config = triton_configs.configs_for(access, torch.float16, 64, case.block_size)[0]
    precision = "int8" if access == "int8" else "full"
    call, found, problem = launch(case, config, precision=precision)
    assert call.access == access
    assert_attends(*found, problem)


@pytest.mark.parametrize("access", ["hopper", "strided"])
@pytest.mark.parametrize("head_dim", [64, 96])
@pytest.mark.parametrize("tail", [False, True], ids=["drop", "tail"])
def test_both_ways_of_reading_agree_without_text_and_with_odd_head_sizes(monkeypatch, access, head_dim, tail):
    monkeypatch.setattr(triton_backend, "_architecture", lambda device: access)
    call, found, problem = launch(NO_AXIS_DIVIDES, triton_configs.Config(32, 4, 2), head_dim=head_dim, tail=tail)
    assert call.access == access
    assert_attends(*found, problem)


ARRANGEMENTS = {
    "heads after one another": (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "hopper"),
    "a slice of fused projections": (lambda x: torch.cat([x, x], dim=2)[:, :, : x.shape[2]], "hopper"),
    "tokens that are not side by side": (lambda x: torch.stack([x, x], dim=-2)[..., 0, :], "strided"),
    "an odd address": (lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape), "strided"),
}


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_memory_layouts_are_read_in_place(name):
    arrange, access = ARRANGEMENTS[name]
    case = replace(SMALL_BOXES, heads=2)  # an axis of one could lie any way
    call, found, problem = launch(case, triton_configs.Config(64, 4, 2), arrange=arrange)
    assert call.access == access
    assert_attends(*found, problem)


def test_keys_and_values_may_lie_differently():
    problem = make(SMALL_BOXES, 64, torch.float16, False)
    wide = torch.cat([problem.v, problem.v], dim=2)[:, :, :1]
    call = triton_backend.Call.prepare(replace(problem, v=wide), want_lse=True)
    assert call.access == "strided" and call.k.stride(1) != call.v.stride(1)
    assert_attends(*call.launch(triton_configs.Config(32, 4, 2)), problem)


def test_tiles_that_are_no_boxes_are_gathered():
    call, found, problem = launch(KERNEL_CASES[2], triton_configs.Config(64, 4, 2))
    assert call.access == "gather"
    assert_attends(*found, problem)


def test_boxes_that_span_more_than_32_bits_can_count_are_gathered(monkeypatch):
    """Offsets inside a box are 32 bits wide."""
    monkeypatch.setattr(triton_backend, "_architecture", lambda device: "strided")
    problem = make(SMALL_BOXES, 64, torch.float16, False)
    span = ((2 - 1) * 6 + 4 - 1) * 12 + 8
    monkeypatch.setattr(triton_backend, "_INT32", span * 64 + 1)
    assert triton_backend.access_to(problem.k, problem.v, problem.tiling) == "strided"
    monkeypatch.setattr(triton_backend, "_INT32", span * 64)
    assert triton_backend.access_to(problem.k, problem.v, problem.tiling) == "gather"


def test_lists_hold_the_kept_tiles_by_kind_and_rows_longest_first():
    problem = make(TEXT_AROUND, 64, torch.float16, False)
    tiling = problem.tiling
    tables = tables_for(tiling)
    assert set(tables.kinds.tolist()) == {BOX, FULL, PARTIAL}
    numbers = torch.arange(tiling.tiles, dtype=torch.int32)
    lists = list_tiles(problem.keep, tiling, entries=numbers, tail=True)
    keep = problem.keep.flatten(0, 2)
    for row in range(len(keep)):
        expected = [numbers[keep[row] & (tables.kinds == kind)] for kind in (BOX, FULL, PARTIAL)]
        assert lists.counts[row].tolist() == [*map(len, expected), 0]
        assert lists.lists[row, : int(keep[row].sum())].tolist() == torch.cat(expected).tolist()
    video = tiling.video_tiles
    skipped = tiling.counts[:video].log2().where(~keep[:, :video], -torch.inf)
    torch.testing.assert_close(lists.tail_bias, skipped)
    lengths = keep.sum(-1).view(-1, tiling.tiles).gather(1, lists.order.long())
    assert bool((lengths.diff(dim=1) <= 0).all())
    assert lists.order.sort(dim=1).values.tolist() == [list(range(tiling.tiles))] * len(lists.order)


def test_lists_hold_single_tokens_and_means_stand_for_the_others(monkeypatch):
    monkeypatch.setattr(triton_lists, "_SCAN", 32)
    problem = make(next(case for case in KERNEL_CASES if case.singles == 40), 64, torch.float32, False)
    tiling = problem.tiling
    tokens = problem.tokens.clone()
    tokens[:, :, ::2, ::3] = -1  # in between as well as at the end
    problem = replace(problem, tokens=tokens)
    numbers = torch.arange(tiling.tiles, dtype=torch.int32)
    lists = list_tiles(problem.keep, tiling, entries=numbers, tail=True, tokens=tokens)
    for row, given in enumerate(tokens.flatten(0, 2)):
        expected = given[given >= 0].tolist()
        assert lists.counts[row, 3] == len(expected)
        assert lists.singles[row, : len(expected)].tolist() == expected
    log2_counts = (problem.log_counts / math.log(2)).masked_fill(problem.keep, -torch.inf)
    torch.testing.assert_close(lists.tail_bias.view_as(log2_counts), log2_counts)
    lengths = problem.keep.sum(-1) * tiling.block_size + (tokens >= 0).sum(-1)
    lengths = lengths.view(-1, tiling.tiles).gather(1, lists.order.long())
    assert bool((lengths.diff(dim=1) <= 0).all())


@pytest.mark.parametrize("access", ["hopper", "strided"])
@pytest.mark.parametrize("count", [31, 32, 33, 64])
def test_single_tokens_fill_blocks_or_not(monkeypatch, access, count):
    monkeypatch.setattr(triton_backend, "_architecture", lambda device: access)
    case = KernelCase("singles", (2, 10, 20), (2, 4, 8), 64, batch=1, heads=2, singles=count)
    _, found, problem = launch(case, triton_configs.Config(32, 4, 2), head_dim=96)
    assert int((problem.tokens[0, 0, 0] >= 0).sum()) == count
    assert_attends(*found, problem)


@pytest.mark.parametrize(
    ("grid", "tile", "text", "lead"), [((3, 9, 18), (2, 4, 8), 7, 3), ((2, 8, 32), (1, 8, 16), 0, 0)]
)
def test_pooling_equals_cores(grid, tile, text, lead):
    tiling = tiling_for(LatentGrid(*grid), tile, 64 if tile[0] == 2 else 128, text, lead)
    x = torch.randn(2, 3, tiling.tokens, 48, dtype=torch.bfloat16).transpose(1, 2)
    rounded(lambda: pool(x, tiling)).check(triton_draft.pool(x, tiling))


TILES = 19


@pytest.mark.parametrize(
    ("row_floor", "density"), [(0.0, (0.02, 0.25)), (0.5, (0.1, 0.6)), (0.5, (0.9, 1.0)), (1.0, (0.25, 0.3))]
)
def test_selection_equals_cores(row_floor, density):
    probabilities = draft_map(torch.randn(1, 2, TILES, 16) * 2, torch.randn(1, 2, TILES, 16))
    share = torch.tensor(density, dtype=torch.float64)
    keep = triton_draft.select_draft(probabilities, share, row_floor=row_floor)
    expected = select_draft(probabilities, share, row_floor=row_floor)
    # Running sums are formed in another order, so an entry that lies on a threshold may fall on either side.
    assert int((keep != expected).sum()) <= 2
    assert bool((keep.sum((-1, -2)) <= (share * TILES**2).clamp(min=TILES)).all())
    assert bool(keep.diagonal(dim1=-2, dim2=-1).all())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_row_of_nan_keeps_its_own_tile_and_other_heads_are_as_they_were(sign):
    probabilities = draft_map(torch.randn(1, 2, TILES, 16) * 2, torch.randn(1, 2, TILES, 16))
    share = torch.full((2,), 0.3, dtype=torch.float64)
    expected = triton_draft.select_draft(probabilities, share)
    probabilities[0, 1, 4] = torch.copysign(torch.tensor(torch.nan), torch.tensor(sign))
    keep = triton_draft.select_draft(probabilities, share)
    assert torch.equal(keep[0, 0], expected[0, 0])
    assert bool(keep.diagonal(dim1=-2, dim2=-1).all())
    assert keep[0, 1, 4].sum() == int(0.5 * 0.3 * TILES)


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        ("PassManager::run failed", DoesNotCompile),  # the compiler's words, Triton 3.4 to 3.9
        ("CUDA error: an illegal memory access", RuntimeError),
    ],
)
def test_only_a_failure_of_the_compiler_rules_a_configuration_out(monkeypatch, failure, raised):
    def fail(*_args, **_options):
        raise RuntimeError(failure)

    monkeypatch.setattr(triton_backend.triton_attention, "forward", {(2,): fail})
    call = triton_backend.Call.prepare(make(ONE_TILE, 64, torch.float16, False), want_lse=False)
    with pytest.raises(raised, match=failure) as error:
        call.launch(triton_configs.Config(64, 4, 2))
    assert error.type is raised


def test_a_tuned_choice_is_measured_once_and_kept(monkeypatch, tmp_path):
    from draftdiff.kernels import autotune

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU 80 GB")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    seconds = {"slow": 2.0, "fast": 1.0, "wrong": 0.5}
    monkeypatch.setattr(autotune, "_time", lambda call, device: (seconds[call()], call()))
    launched = []

    def run(config):
        launched.append(config)
        if config == "broken":
            raise autotune.DoesNotCompile("no such instruction")
        return config

    def right(found):
        return found != "wrong"

    device = torch.device("cpu")
    for _ in range(2):
        autotune._known.cache_clear()
        assert autotune.fastest("a key", ["broken", "slow", "wrong", "fast"], run, device, right) == "fast"
    assert launched == ["broken", *["slow"] * 3, *["wrong"] * 3, *["fast"] * 3]  # the first, timed, the last
    assert [path.name for path in (tmp_path / "draftdiff").iterdir()] == ["triton-some-gpu-80-gb.json"]
    with pytest.raises(
        RuntimeError, match="and is right for another: broken: no such instruction; wrong: wrong results"
    ):
        autotune.fastest("another", ["broken", "wrong"], run, device, right)
    autotune._known.cache_clear()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_result_that_is_wrong_is_noticed_before_a_configuration_is_used(precision):
    for case in (TEXT_AROUND, next(case for case in KERNEL_CASES if case.singles)):
        problem = replace(make(case, 64, torch.bfloat16, tail=True), precision=precision)
        out, _ = triton_backend.run(problem, False)
        assert triton_backend.is_right(problem, out)
        last_tile = problem.tiling.slots[-1][problem.tiling.slots[-1] >= 0]
        wrong = out.clone()
        wrong[:, last_tile] = 0.0  # the last query is always among those that are looked at
        assert not triton_backend.is_right(problem, wrong)
        assert not triton_backend.is_right(problem, out * math.nan)
        dropped = replace(problem, keep=problem.keep & (torch.rand(problem.keep.shape) < 0.5), precision="full")
        assert not triton_backend.is_right(problem, triton_backend.run(dropped, False)[0])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_single_tokens_that_are_counted_already_give_the_same(precision):
    case = next(case for case in KERNEL_CASES if case.singles and case.text)
    problem = replace(make(case, 64, torch.float16, tail=True), precision=precision)
    behind = (problem.tokens < 0).int().argsort(dim=-1, stable=True)
    tokens = F.pad(problem.tokens.gather(-1, behind), (0, -problem.tokens.shape[-1] % 128), value=-1)
    tile_of = F.pad(problem.tile_of, (0, 1), value=-1)[tokens]
    taken = (tile_of[..., None] == torch.arange(problem.tiling.video_tiles)).sum(-2).to(torch.uint8)
    counted = replace(problem, tokens=tokens, taken=taken)
    assert torch.equal(counted.log_counts, problem.log_counts)
    for own, same in zip(triton_backend.run(counted, True), triton_backend.run(problem, True)):
        assert torch.equal(own, same)
