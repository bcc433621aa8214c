"""The layout table against the real transformer classes: a probe watches what reaches scaled dot-product attention."""

from __future__ import annotations

import inspect
import re
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import draftdiff
from draftdiff.video.layouts import LAYOUTS, Layout, layout_for, register_layout, supported_models
from tests.rounding import rounded
from tests.video.model_cases import MODEL_CASES, ModelCase, bound_arguments, flux_ids, output_of, tiny

each_case = pytest.mark.parametrize("case", MODEL_CASES, ids=str)


@dataclass
class Call:
    module: str | None
    query: torch.Tensor
    key: torch.Tensor


@dataclass
class Probe(TorchFunctionMode):
    """Records every attention call with the matched module it happened in; may replace results by zeros."""

    silence: bool = False
    current: str | None = None
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.calls.append(
                Call(self.current, args[0] if args else kwargs["query"], args[1] if len(args) > 1 else kwargs["key"])
            )
            if self.silence and self.current:
                return torch.zeros_like(result)
        return result


def matched_modules(model: nn.Module) -> dict[str, nn.Module]:
    pattern = re.compile(layout_for(model).attention)
    return {name: module for name, module in model.named_modules() if pattern.fullmatch(name)}


@contextmanager
def watching(model: nn.Module, silence: bool = False):
    probe = Probe(silence)

    def entering(name):
        return lambda *_: setattr(probe, "current", name)

    handles = []
    for name, module in matched_modules(model).items():
        handles.append(module.register_forward_pre_hook(entering(name)))
        handles.append(module.register_forward_hook(entering(None)))
    with probe:
        yield probe
    for handle in handles:
        handle.remove()


def grid_of(model: nn.Module, inputs: dict):
    return layout_for(model).grid(model, bound_arguments(model, inputs))


def text_of(case: ModelCase, module: str) -> tuple[int, int]:
    """Tokens outside the grid in a module's call, for even and odd batch items."""
    apart = [text for pattern, text in case.apart.items() if re.fullmatch(pattern, module)]
    return (apart[0], apart[0]) if apart else case.text


@each_case
def test_the_grid_counts_the_tokens_of_the_forward_call(case):
    model = case.build()
    for shape in (case.grid, case.fits((case.grid[0], 4, 7))):
        grid = grid_of(model, case.inputs(model, shape, 1))
        assert (grid.frames, grid.height, grid.width) == shape


@each_case
def test_every_video_self_attention_is_matched_and_sees_grid_and_text_tokens(case):
    model, batch = case.build(), 2
    inputs = case.inputs(model, case.grid, batch)
    with watching(model) as probe:
        output_of(model, inputs)

    tokens = grid_of(model, inputs).tokens
    calls = {name: [call for call in probe.calls if call.module == name] for name in matched_modules(model)}
    assert len(calls) == case.layers
    for module, in_module in calls.items():
        texts = text_of(case, module)
        items = [(1, text) for text in texts] if case.per_item else [(batch if case.batched else 1, texts[0])]
        seen = [(call.query.shape[0], call.key.shape[2]) for call in in_module]
        assert all(item in seen for item in [(size, tokens + text) for size, text in items])
        absent = {call.key.shape[2] - call.query.shape[2] for call in in_module}
        assert case.absent in absent if case.absent else absent == {0}


@each_case
def test_no_self_attention_outside_the_matched_modules_is_over_the_whole_video(case):
    model = case.build()
    inputs = case.inputs(model, case.grid, 2)
    with watching(model) as probe:
        output_of(model, inputs)

    tokens = grid_of(model, inputs).tokens
    for call in probe.calls:
        queries, keys = call.query.shape[2], call.key.shape[2]
        assert call.module or not queries == keys >= tokens


@each_case
def test_a_video_token_stands_in_raster_order_where_attention_takes_the_grid_to_be(case, monkeypatch):
    """Where attention adds nothing all is per token: changing the pixels of one token changes one row of keys."""
    taken = []

    def adds_nothing(q, k, v, density, rule, *, lead, **_):
        taken.append((k, lead))
        return torch.zeros_like(q), torch.ones(2)

    monkeypatch.setattr("draftdiff.video.calls.attend", adds_nothing)
    model = draftdiff.enable(case.build(), {"dense_steps": 0, "dense_layers": 0, "min_tokens": 0})

    def calls(inputs):
        taken.clear()
        output_of(model, inputs)
        return list(taken)

    before = calls(case.inputs(model, case.grid, 1))
    assert len(before) == case.layers
    frames, height, width = case.grid
    for frame, row, column in ((0, 0, 0), (frames // 2, 2, 5), (frames - 1, height - 1, width - 1)):
        changed = case.inputs(model, case.grid, 1)
        case.pixels(changed, case.grid, (frame, row, column)).add_(1.0)
        for (keys, lead), (moved, _) in zip(before, calls(changed)):
            rows = (moved - keys).abs().amax(dim=(0, 2, 3))
            assert rows.gt(1e-4).nonzero().flatten().tolist() == [lead + (frame * height + row) * width + column]


@each_case
def test_the_processor_can_be_reached_by_the_declared_route(case):
    model = case.build()
    route = layout_for(model).route
    for module in matched_modules(model).values():
        named = getattr(module.processor, "_attention_backend", "none")
        assert named in {"sdpa": ["none"], "flex": ["none", "flex", None]}.get(route, [None])


@each_case
def test_the_tiny_model_depends_on_its_video_attention(case):
    """Guards the other model tests: with a dead attention they could not fail."""
    model = case.build()
    inputs = case.inputs(model, case.grid, 2)
    with watching(model) as probe:
        output = output_of(model, inputs)
    with watching(model, silence=True):
        without = output_of(model, inputs)

    assert (output - without).norm() > 0.05 * output.norm()
    for call in probe.calls:
        if call.module:
            logits = call.query.double() @ call.key.double().mT * call.query.shape[-1] ** -0.5
            assert 0.5 < logits.std() < 6.0
    if output.shape[0] == 2:
        assert (output[0] - output[1]).abs().max() > 0.1


def test_every_row_of_the_table_has_a_model_case():
    assert {type(case.build()).__name__ for case in MODEL_CASES} == {
        name for name in LAYOUTS if hasattr(diffusers, name)
    }


def test_a_second_attention_over_the_image_alone_is_sparse_too():
    """Stable Diffusion 3.5 medium has one beside the joint attention of some blocks."""
    case = next(case for case in MODEL_CASES if case.name == "sd3")
    config = {**case.build().config, "dual_attention_layers": (0,)}
    model = tiny(diffusers.SD3Transformer2DModel, **{k: v for k, v in config.items() if not k.startswith("_")})()
    inputs = case.inputs(model, case.grid, 2)
    dense = rounded(lambda: output_of(model, inputs))
    draftdiff.enable(model, {"sparsity": 0, "selection": "full", "dense_steps": 0, "dense_layers": 0, "min_tokens": 0})
    dense.check(output_of(model, inputs))
    assert len(draftdiff.report(model).transformers[0].layers) == 3


def test_only_rows_with_tokens_on_both_sides_say_how_many_lead():
    for layout in LAYOUTS.values():
        assert (layout.lead is not None) == (layout.text == "around")


def test_an_unknown_transformer_is_refused_in_one_line_that_names_the_supported_ones():
    with pytest.raises(ValueError, match=r"^Linear is not supported") as error:
        layout_for(nn.Linear(2, 2))
    message = str(error.value)
    assert "\n" not in message
    assert all(name in message for name in LAYOUTS)


def test_a_subclass_and_a_compiled_transformer_have_the_layout_of_their_class():
    class Finetuned(diffusers.WanTransformer3DModel):
        pass

    model = MODEL_CASES[0].build()
    assert layout_for(torch.compile(model, backend="eager")) is LAYOUTS["WanTransformer3DModel"]
    model.__class__ = Finetuned
    assert layout_for(model) is LAYOUTS["WanTransformer3DModel"]


def test_the_table_of_supported_models_names_a_diffusers_class_in_every_row():
    rows = supported_models()
    assert len(rows) == len(LAYOUTS)
    for family, class_name, note in rows:
        assert family and class_name.endswith(("Model", "OmniTransformer"))
        assert "\n" not in note


def whole(model, arguments):
    return tuple(arguments["hidden_states"].shape[2:])


ROW = Layout("Mine", r"blocks\.\d+\.attn1", whole)


def test_a_row_can_be_given_and_taken_away_again():
    class MineModel(nn.Module):
        pass

    with pytest.raises(ValueError, match="MineModel is not supported"):
        layout_for(MineModel())
    undo = register_layout("MineModel", ROW)
    assert layout_for(MineModel()) is ROW
    again = register_layout("MineModel", replace(ROW, note="another"))
    assert layout_for(MineModel()).note == "another"
    again()
    assert layout_for(MineModel()) is ROW
    undo()
    undo()
    assert "MineModel" not in LAYOUTS


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("no class", ROW, "name must be that of a transformer class, got 'no class'"),
        ("Model", "blocks", "layout must be a draftdiff.Layout, got str"),
        ("Model", replace(ROW, attention="(blocks"), r"attention must be a regular expression, got '\(blocks'"),
        ("Model", replace(ROW, text="around"), "lead goes with text='around' and with nothing else, got text='around'"),
    ],
)
def test_what_cannot_be_a_row_is_refused(name, row, told):
    with pytest.raises(ValueError, match=f"^{told}"):
        register_layout(name, row)
    assert name not in LAYOUTS


CALLS_LEFT_DENSE = [
    ("ltx", "coordinates instead of a grid", {}, {"num_frames": None, "height": None, "width": None}),
    ("allegro", "a mask over video tokens", {}, {"attention_mask": torch.ones(1, 5, 12, 18)}),
    ("flux", "a part of the image", {}, {"img_ids": flux_ids(15, 18)[135:]}),
    ("minimax_h3", "positions that are no raster", {}, {"position_ids": torch.arange(870).view(290, 3)}),
    ("flux2", "references that attend to themselves", {}, {"kv_cache_mode": "extract"}),
    ("qwen_image_21", "causal text", {}, {"kv_cache_mode": "extract"}),
    ("z_image", "pictures of two sizes", {}, {"x": [torch.zeros(4, 1, 30, 36), torch.zeros(4, 1, 36, 30)]}),
    ("lumina2", "texts of two lengths", {}, {"encoder_attention_mask": torch.tensor([[1, 1], [1, 0]])}),
    ("bria_fibo2", "texts of two lengths", {}, {"encoder_attention_mask": torch.tensor([[1, 1], [1, 0]])}),
    ("joy_image_edit_plus", "items of two shapes", {}, {"shape_list": [[(1, 4, 4)], [(1, 2, 8)]]}),
    ("hunyuan_image", "a video", {}, {"hidden_states": torch.zeros(1, 4, 1, 15, 18)}),
]


@pytest.mark.parametrize(
    ("name", "config", "changes"),
    [(name, config, changes) for name, _, config, changes in CALLS_LEFT_DENSE],
    ids=[f"{name}: {reason}" for name, reason, *_ in CALLS_LEFT_DENSE],
)
def test_a_call_that_does_not_fit_a_grid_is_left_dense(name, config, changes):
    case = next((case for case in MODEL_CASES if case.name == name), None)
    if case is None:
        pytest.skip(f"this version of diffusers has no model for {name}")
    model = case.build()
    model.register_to_config(**config)
    inputs = case.inputs(model, case.grid, 1) | changes
    missing = set(inputs) - set(inspect.signature(type(model).forward).parameters)
    if missing:
        pytest.skip(f"this version of {type(model).__name__} takes no {', '.join(missing)}")
    assert layout_for(model).grid(model, bound_arguments(model, inputs)) is None


def test_qwen_image_shapes_may_come_without_the_list_per_batch_item():
    case = next(case for case in MODEL_CASES if case.name == "qwen_image")
    model = case.build()
    inputs = case.inputs(model, case.grid, 2) | {"img_shapes": [(1, 15, 18)] * 2}
    assert grid_of(model, inputs).tokens == 270
