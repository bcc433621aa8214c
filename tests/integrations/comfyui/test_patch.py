"""Draft attention on models of ComfyUI, by its contract stated again (`contract.py`)."""

import types

import pytest
import torch

from draftdiff.attention.attend import attend
from draftdiff.core.grid import LatentGrid
from draftdiff.integrations.comfyui.patch import apply, patch_of
from draftdiff.video.config import DraftAttentionConfig
from tests.integrations.comfyui import contract

ALL = DraftAttentionConfig(selection="full", dense_layers=0, backend="torch")
SPARSE = DraftAttentionConfig(sparsity=0.75, dense_layers=0, backend="torch")
HOOK = "optimized_attention_override"


@pytest.fixture(autouse=True)
def _comfy(monkeypatch):
    contract.put(monkeypatch)


def text(tokens: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, tokens, contract.Model.width)


def telling_wan() -> contract.Model:
    model = contract.WanModel()
    model.tells = True
    return model


def padded(tokens: int, real: int) -> torch.Tensor:
    return (torch.arange(tokens) < real).long()[None]


# Model, its latent, its text, what else it is given; the grid, the tokens in front, further grids, flags of the text.
VIDEO = (1, 4, 5, 15, 22)  # no whole patches: the grid is 5 x 8 x 11
GRID = LatentGrid(5, 8, 11)
FAMILIES = {
    "Wan": (contract.WanModel, (2, *VIDEO[1:]), text(7, 2), {}, GRID, 0, (), None),
    "Wan, which tells the grid": (telling_wan, VIDEO, text(7), {}, GRID, 0, (), None),
    "Flux": (contract.Flux, (1, 4, 39, 30), text(9), {}, LatentGrid(1, 20, 15), 9, (), None),
    "Flux with references": (
        contract.Flux,
        (1, 4, 40, 30),
        text(9),
        {"ref_latents": [torch.randn(1, 4, 20, 30), torch.randn(1, 4, 10, 11)]},
        LatentGrid(1, 20, 15),
        9,
        ((309, LatentGrid(1, 10, 15)), (459, LatentGrid(1, 5, 6))),
        None,
    ),
    "HunyuanVideo": (contract.HunyuanVideo, VIDEO, text(9), {}, GRID, 0, (), None),
    "HunyuanVideo with padded text": (
        contract.HunyuanVideo,
        VIDEO,
        text(9),
        {"attention_mask": padded(9, 6)},
        GRID,
        0,
        (),
        padded(9, 6).bool(),
    ),
    "HunyuanVideo with a reference": (
        contract.HunyuanVideo,
        VIDEO,
        text(9),
        {"ref_latent": torch.randn(1, 4, 1, 15, 22)},
        GRID,
        88,
        ((0, LatentGrid(1, 8, 11)),),
        None,
    ),
    "LTX": (contract.LTXVModel, (1, 4, 5, 9, 13), text(7), {}, LatentGrid(5, 9, 13), 0, (), None),
    "MiniMax-H3": (
        contract.MiniMaxH3Model,
        (1, 4, 5, 16, 22),
        text(9),
        {"keyframe": torch.randn(1, 4, 1, 16, 22)},
        GRID,
        9 + 88 + 6,
        ((9, LatentGrid(1, 8, 11)),),
        None,
    ),
}


def inputs(model: contract.Model, shape: tuple[int, ...]) -> torch.Tensor | list[torch.Tensor]:
    latent = torch.randn(shape)
    return [latent, torch.randn(1, 6, model.width)] if isinstance(model, contract.MiniMaxH3Model) else latent


def reference(config, grid, lead, others, flags):
    """An override that knows where the tokens stand."""

    def override(func, q, k, v, heads, *args, skip_reshape=False, **kwargs):
        if q.shape[-2] != k.shape[-2] or q.shape[-2] < grid.tokens:
            return func(q, k, v, heads, *args, skip_reshape=skip_reshape, **kwargs)
        q, k, v = (x.transpose(1, 2) if skip_reshape else x.unflatten(-1, (heads, -1)) for x in (q, k, v))
        density = torch.full((heads,), 1 - config.budget.sparsity, dtype=torch.float64)
        where = {"grid": grid, "lead": lead, "others": others, "text_mask": flags}
        return attend(q, k, v, density, config.rule, **where)[0].flatten(2)

    return override


@pytest.mark.parametrize("family", FAMILIES)
def test_with_every_tile_kept_it_is_dense_attention(family):
    build, shape, context, given, grid, *_ = FAMILIES[family]
    patcher = contract.ModelPatcher(build())
    x = inputs(patcher.model, shape)
    (dense,) = patcher.sample([0.5], x, None, context, **given)
    patched = apply(patcher, ALL)
    (out,) = patched.sample([0.5], x, None, context, **given)
    # Two ways through fp32: of one softmax each, per layer, and the layers' sums.
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)
    log = patch_of(patched).log
    assert log.steps == (1, 0) and log.means[0] == 1 and log.grid == grid and not log.reasons


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_is_chosen_over_the_models_own_grid(family):
    build, shape, context, given, *places = FAMILIES[family]
    patcher = contract.ModelPatcher(build())
    x = inputs(patcher.model, shape)
    patched = apply(patcher, SPARSE)
    (out,) = patched.sample([0.5], x, None, context, **given)
    (dense,) = patcher.sample([0.5], x, None, context, **given)
    patcher.model_options["transformer_options"][HOOK] = reference(SPARSE, *places)
    (expected,) = patcher.sample([0.5], x, None, context, **given)
    assert torch.equal(out, expected) and not torch.allclose(out, dense, atol=1e-5)
    log = patch_of(patched).log
    assert 0.24 <= log.means[0] < 0.55 and log.forwards[0].calls == patcher.model.layers and not log.reasons


def call(given: dict, patch=None, tells=(5, 8, 11), **tensors):
    """One attention call inside a forward of a model that tells its grid."""

    class Teller(torch.nn.Module):
        def _forward(self, x, transformer_options):
            transformer_options["grid_sizes"] = torch.Size(tells)
            held = tensors["q"], tensors["k"], tensors["v"]
            return contract.optimized_attention(*held, x, transformer_options=transformer_options, **given)

    options = {} if patch is None else {"sigmas": torch.tensor([0.5])}
    model = Teller()
    executor = contract.Executor(model._forward, model, [] if patch is None else [patch])
    return executor.execute(4, options)


@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize(("key_heads", "scale"), [(4, None), (2, 0.3)])
def test_every_form_of_tensors(skip_reshape, skip_output_reshape, key_heads, scale):
    shapes = {"q": (2, 4, 450, 64), "k": (2, key_heads, 450, 64), "v": (2, key_heads, 450, 64)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    if not skip_reshape:
        tensors = {name: x.transpose(1, 2).flatten(2) for name, x in tensors.items()}
    given = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape, "enable_gqa": key_heads < 4}
    given |= {} if scale is None else {"scale": scale}
    patch = patch_of(apply(contract.ModelPatcher(contract.WanModel()), ALL))
    out, dense = call(given, patch, **tensors), call(given, **tensors)
    assert patch.log.forwards[0].calls == 1
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)


MASKS = {
    "flags": (lambda flags: flags[:, None, None], None),
    "flags without a batch": (lambda flags: flags[:1], None),
    "numbers": (lambda flags: torch.where(flags, 0.0, -10_000.0)[:, None], None),
    "weights": (lambda flags: torch.where(flags, 0.0, -1.0)[:, None], "not one flag per text token"),
    "pairs": (lambda flags: flags[:, None, None].expand(-1, -1, 450, -1), "over pairs of tokens"),
    "video": (lambda flags: flags.roll(-20, 1)[:, None, None], "not one flag per text token"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_are_read_as_flags_of_the_text_or_left_to_dense_attention(kind):
    make, reason = MASKS[kind]
    flags = torch.ones(1, 450, dtype=torch.bool)
    flags[:, 446:] = False
    tensors = {name: torch.randn(1, 4, 450, 64) for name in "qkv"}
    given = {"skip_reshape": True, "mask": make(flags)}
    patch = patch_of(apply(contract.ModelPatcher(contract.WanModel()), ALL))
    out, dense = call(given, patch, **tensors), call(given, **tensors)
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)
    assert patch.log.forwards[0].calls == (reason is None)
    assert [reason in told for told in patch.log.reasons] == ([] if reason is None else [True])


def test_calls_that_are_declined_go_through_the_override_that_was_there():
    seen = []

    def previous(func, q, k, v, heads, *args, **kwargs):
        seen.append((q.shape[-2], k.shape[-2]))
        return func(q, k, v, heads, *args, **kwargs)

    patcher = contract.ModelPatcher(contract.WanModel())
    patcher.model_options["transformer_options"][HOOK] = previous
    patched = apply(patcher, DraftAttentionConfig(sparsity=0.75, backend="torch"))
    patched.sample([0.5], torch.randn(VIDEO), None, text(7))
    assert seen == [(440, 7), (440, 440)]  # cross-attention, and the first layer, which is dense
    assert patched.model_options["transformer_options"] == {HOOK: previous}


def test_an_override_that_comes_later_and_stays_on_top_neither_replaces_it_nor_piles_up():
    """As sage nodes, which do not chain, and as ComfyUI's own sparse attention, which comes back at every step."""
    depth = []

    def reinstall(patcher, timestep, options):
        current = options["transformer_options"].get(HOOK)
        depth.append(current)
        options["transformer_options"][HOOK] = lambda func, *args, **kwargs: func(*args, **kwargs)

    patched = apply(contract.ModelPatcher(contract.WanModel()), SPARSE)
    patched.add_callback_with_key(contract.CallbacksMP.ON_PREPARE_STATE, "another", reinstall)
    patched.sample([0.9, 0.5, 0.1], torch.randn(VIDEO), None, text(7))
    log = patch_of(patched).log
    assert log.steps == (3, 0) and [forward.calls for forward in log.forwards] == [2, 2, 2]
    assert depth[0] is None and all(held.__qualname__.endswith("reinstall.<locals>.<lambda>") for held in depth[1:])


def test_nothing_is_left_in_the_options_after_a_forward_that_failed():
    patch = patch_of(apply(contract.ModelPatcher(contract.WanModel()), SPARSE))

    class Failing(torch.nn.Module):
        def _forward(self, x, transformer_options):
            assert HOOK in transformer_options
            raise KeyError("out")

    model, options = Failing(), {"sigmas": torch.tensor([0.5])}
    with pytest.raises(KeyError, match="out"):
        contract.Executor(model._forward, model, [patch]).execute(torch.randn(1, 4, 2, 2), options)
    assert set(options) == {"sigmas"} and not patch.log.forwards


def test_the_window_is_of_the_schedule():
    patched = apply(contract.ModelPatcher(contract.WanModel()), SPARSE, 0.2, 0.7)
    patched.sample([1.0, 0.81, 0.8, 0.5, 0.31, 0.29, 0.1], torch.randn(VIDEO), None, text(7))
    log = patch_of(patched).log
    assert [forward.sigma for forward in log.forwards if forward.calls] == pytest.approx([0.8, 0.5, 0.31])
    assert log.steps == (3, 4) and str(log).startswith("Draft Attention: 3 sparse and 4 dense steps\ngrid 5x8x11, ")


@pytest.mark.parametrize("build", [contract.WanModel, telling_wan])
def test_dense_blocks_are_counted_or_told(build):
    patched = apply(
        contract.ModelPatcher(build()), DraftAttentionConfig.of({"dense_blocks": "1-3", "backend": "torch"})
    )
    patched.sample([0.5], torch.randn(VIDEO), None, text(7))
    assert patch_of(patched).log.forwards[0].calls == 1


def test_single_blocks_are_counted_on_from_the_double_ones():
    def sparse(index: int, kind: str) -> int:
        config = DraftAttentionConfig.of({"dense_blocks": "3", "sparsity": 0.75, "backend": "torch"})
        patch = patch_of(apply(contract.ModelPatcher(contract.WanModel()), config))

        class Flux(contract.Flux):
            double_blocks = (None, None)

            def _forward(self, x, timestep, context, transformer_options, **kwargs):
                transformer_options |= {"block_index": index, "block_type": kind}
                del self.blocks[1]
                return super()._forward(x, timestep, context, transformer_options, **kwargs)

        model, options = Flux(), {"sigmas": torch.tensor([0.5])}
        with torch.no_grad():
            contract.Executor(model._forward, model, [patch]).execute(torch.randn(1, 4, 32, 32), None, text(3), options)
        return patch.log.forwards[0].calls

    assert (sparse(1, "single"), sparse(1, "double"), sparse(3, "double"), sparse(0, "single")) == (0, 1, 0, 1)


REASONS = {
    "few": (contract.WanModel, {"min_tokens": 441}, {}, "440 video tokens are fewer than min_tokens, here 441"),
    "not worth it": (contract.WanModel, {"dense_above": 0.2}, {}, "faster one at density 0.25 with the backend torch"),
    "guides": (
        contract.LTXVModel,
        {},
        {"self_attention_mask": torch.zeros(1, 1, 1650, 1650)},
        "a mask over pairs of tokens",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_a_call_that_could_be_sparse_and_is_not_says_why(case):
    build, settings, given, reason = REASONS[case]
    patcher = contract.ModelPatcher(build())
    x, context = torch.randn(VIDEO), text(7)
    patched = apply(patcher, DraftAttentionConfig.of({"dense_blocks": "", "backend": "torch", **settings}))
    (out,) = patched.sample([0.5], x, None, context, **given)
    assert torch.equal(out, patcher.sample([0.5], x, None, context, **given)[0])
    log = patch_of(patched).log
    assert log.steps == (0, 1) and log.means is None
    ((told, count),) = log.reasons.items()
    assert reason in told and count == 2 and str(log).endswith(f"\nnot sparse, 2 times: {told}")


def test_a_model_that_is_not_in_the_table_stays_dense_unless_it_tells_its_grid():
    class Another(contract.Model):
        tells = False
        _forward = contract.WanModel._forward

    model = Another()
    patched = apply(contract.ModelPatcher(model), SPARSE)
    patched.sample([0.5], torch.randn(VIDEO), None, text(7))
    assert "Another is not in the table of models" in str(patch_of(patched).log)
    model.tells = True
    patched.sample([0.5], torch.randn(VIDEO), None, text(7))
    assert patch_of(patched).log.forwards[0].calls == 2 and not patch_of(patched).log.reasons


def test_a_model_of_another_call_is_dense_and_told():
    patch = patch_of(apply(contract.ModelPatcher(contract.WanModel()), SPARSE))
    model = types.SimpleNamespace(_forward=lambda *args: args)
    assert contract.Executor(model._forward, model, [patch]).execute(1, 2) == (1, 2)
    assert "without names for its arguments" in str(patch.log)


def test_the_model_that_was_given_stays_what_it_is_and_the_last_settings_count():
    patcher = contract.ModelPatcher(contract.WanModel())
    first = apply(patcher, SPARSE)
    second = apply(first, ALL)
    assert patch_of(patcher) is None and not patcher.wrappers and not patcher.callbacks
    assert patch_of(first).config is SPARSE and patch_of(second).config is ALL
    assert patch_of(second.clone()) is patch_of(second)
    second.sample([0.5], torch.randn(VIDEO), None, text(7))
    assert patch_of(second).log.means[0] == 1 and not patch_of(first).log.forwards


def test_the_report_is_of_the_last_run():
    patched = apply(contract.ModelPatcher(contract.WanModel()), SPARSE)
    assert str(patch_of(patched).log) == "Draft Attention: no run yet"
    for steps in (3, 2):
        patched.sample([0.5 / step for step in range(1, 1 + steps)], torch.randn(VIDEO), None, text(7))
        assert patch_of(patched).log.steps == (steps, 0)


def test_gradients_reach_the_weights_also_after_a_run_without():
    """ComfyUI runs its nodes in inference mode, those that train apart."""
    patched = apply(contract.ModelPatcher(contract.WanModel()), SPARSE)
    with torch.inference_mode():
        patched.sample([0.5], torch.randn(VIDEO), None, text(7))
    assert patch_of(patched).log.forwards[0].calls == 2
    patch = patch_of(apply(contract.ModelPatcher(contract.WanModel()), SPARSE))
    model, options = contract.WanModel(), {"sigmas": torch.tensor([0.5])}
    executor = contract.Executor(model._forward, model, [patch])
    executor.execute(torch.randn(VIDEO), None, text(7), options).sum().backward()
    assert patch.log.forwards[0].calls == 2 and all(p.grad.abs().sum() > 0 for p in model.parameters())
