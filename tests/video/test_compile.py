"""Compiled repeated blocks: one graph for dense and one for sparse per kind of block, never broken, never growing."""

import pytest
import torch
from torch._dynamo.utils import counters

import draftdiff
from draftdiff import DraftAttentionConfig
from draftdiff.attention.rule import Rule
from draftdiff.core.budget import Budget
from draftdiff.video.layouts import layout_for
from draftdiff.video.tasks import attentions_of
from tests.rounding import rounded
from tests.video.model_cases import MODEL_CASES, OF_EACH_KIND, output_of, tiny_wan

# Mochi selects valid text by its content, HiDream an expert's tokens, and Wan Animate 2 reads its grid off a tensor,
# which no full graph can, with us or without.
BY_CONTENT = ("mochi", "hidream", "wan_animate2")
COMPILABLE = [kind for kind in OF_EACH_KIND if kind.values[0].name not in BY_CONTENT]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compile_blocks(model, backend="eager"):
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
    else:
        names = {name.rpartition(".")[0] for name, _ in attentions_of(model, layout_for(model).attention)}
        for name in names:
            model.get_submodule(name).compile(fullgraph=True, backend=backend)


def at(inputs, share, name="timestep"):
    """The same call at a later timestep."""
    return inputs | {name: inputs[name] * share}


@pytest.mark.parametrize("case", COMPILABLE, ids=str)
def test_compiled_blocks_do_what_eager_ones_do_in_as_many_graphs_as_need_be(case):
    config = DraftAttentionConfig(sparsity=0.7, dense_steps=1, dense_layers=0, min_tokens=0)
    model = draftdiff.enable(case.build(), config)
    inputs = case.inputs(model, case.grid, 1)
    shares, time = (1.0, 0.5), layout_for(model).inputs[1]
    expected = rounded(lambda: [output_of(model, at(inputs, share, time)) for share in shares])
    draftdiff.disable(model)

    compile_blocks(model)
    draftdiff.enable(model, config)
    expected.check([output_of(model, at(inputs, share, time)) for share in shares])
    graphs = counters["stats"]["unique_graphs"]
    for share in (0.4, 0.3, 1.0, 0.2):  # a second run begins at 1.0
        output_of(model, at(inputs, share, time))
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    density = draftdiff.report(model).transformers[0].mean_density
    assert density is not None
    assert 0 < density < 0.8


def test_twelve_layers_with_budgets_of_their_own_share_two_graphs():
    build = tiny_wan(layers=12)
    case = MODEL_CASES[0]
    weights = tuple(0.5 + 0.1 * i for i in range(12))
    config = DraftAttentionConfig(Budget(0.7, layers=weights), dense_steps=1, dense_layers=3, min_tokens=0)
    model = draftdiff.enable(build(), config)
    inputs = case.inputs(model, case.grid, 2)
    shares = (1.0, 0.5, 0.3)
    expected = rounded(lambda: [output_of(model, at(inputs, share)) for share in shares])
    draftdiff.disable(model)
    compile_blocks(model, backend="aot_eager")
    draftdiff.enable(model, config)
    expected.check([output_of(model, at(inputs, share)) for share in shares])
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_the_fake_of_the_custom_op_tells_shape_and_type():
    from draftdiff.attention.attend import attend_op, packed_places

    q, k, v = (torch.randn(1, 70, 2, 32, dtype=torch.bfloat16) for _ in range(3))
    density = torch.full((2,), 0.5, dtype=torch.float64)
    rule = Rule(tile=(1, 4, 4), block_size=64, backend="torch").packed
    call = (q, k, v, density, None, packed_places([1, 8, 8], 6), None, rule)
    torch.library.opcheck(attend_op, call, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("tile", [None, (1, 8, 8)])
def test_draft_attention_alone_is_one_node_of_a_full_graph(tile):
    q, k, v = torch.randn(3, 1, 3 * 10 * 20 + 7, 2, 16)
    config = DraftAttentionConfig(sparsity=0.5, tile=tile)

    def layer(q, k, v):
        return draftdiff.draft_attention(q * 2, k, v, grid=(3, 10, 20), config=config) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    rounded(lambda: layer(q, k, v)).check(compiled(q, k, v))
