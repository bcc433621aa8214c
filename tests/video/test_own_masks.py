"""Models that restrict attention themselves: causal blocks of frames, a sparse attention of their own, and masks that
are added to the scores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import draftdiff
from draftdiff import DraftAttentionConfig
from tests.rounding import rounded
from tests.video.cases import ltx
from tests.video.cases.base import Asked
from tests.video.model_cases import MODEL_CASES, output_of

CASES = {case.name: case for case in MODEL_CASES}
GRID = (6, 10, 12)
SPARSE = DraftAttentionConfig(sparsity=0.7, dense_steps=0, dense_layers=0, min_tokens=0)
FULL = DraftAttentionConfig(selection="full", dense_steps=0, dense_layers=0, min_tokens=0)


@pytest.fixture(name="causal")
def _causal():
    model = CASES["skyreels_v2_forcing"].build()
    model.register_to_config(num_frame_per_block=2)
    return model


@pytest.fixture(name="nabla")
def _nabla():
    """A model and the inputs by which its pipeline asks for its own sparse attention, over rows and columns of 8."""
    case = CASES["kandinsky5"]
    model = case.build()
    sta = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    asked = {"sparse_params": {"to_fractal": True, "sta_mask": sta, "P": 0.9}}
    return model, case.inputs(model, (2, 16, 16), 1), asked


def forcing(model):
    return CASES["skyreels_v2_forcing"].inputs(model, GRID, 2)


def test_causal_blocks_with_everything_kept_are_the_models_own(causal):
    dense = rounded(lambda: output_of(causal, forcing(causal)))
    draftdiff.enable(causal, FULL)
    dense.check(output_of(causal, forcing(causal)))
    report = draftdiff.report(causal).transformers[0]
    assert report.sparse_steps == 1 and report.mean_density == 1 and not report.reasons


@pytest.mark.parametrize("selection", ["error", "draft"])
def test_no_block_reads_a_later_one_in_tiles_tail_or_single_tokens(causal, selection):
    draftdiff.enable(causal, replace(SPARSE, selection=selection))
    inputs = forcing(causal)
    before = output_of(causal, inputs)
    inputs["hidden_states"][:, :, 4:] += 1  # the last block, of three
    after = output_of(causal, inputs)
    assert torch.equal(before[:, :, :4], after[:, :, :4]) and not torch.equal(before[:, :, 4:], after[:, :, 4:])
    assert 0.25 < draftdiff.report(causal).transformers[0].mean_density < 0.5


def test_causal_blocks_are_the_same_in_a_graph(causal):
    draftdiff.enable(causal, SPARSE)
    eager = rounded(lambda: output_of(causal, forcing(causal)))
    causal.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    eager.check(output_of(causal, forcing(causal)))
    torch.compiler.reset()


def test_a_forward_that_stays_dense_keeps_the_models_own_sparse_attention(nabla, monkeypatch):
    model, inputs, asked = nabla
    seen = []
    for block in model.visual_transformer_blocks:
        monkeypatch.setattr(block, "forward", lambda x, *rest: (seen.append(rest[-1]), x)[1])
    draftdiff.enable(model, replace(SPARSE, min_tokens=100_000))
    with pytest.warns(UserWarning, match="fewer than min_tokens"):
        output_of(model, inputs | asked)
    assert seen == 2 * [asked["sparse_params"]]


@pytest.mark.parametrize("by_position", [False, True])
def test_the_models_own_sparse_attention_is_replaced_where_ours_is_on(nabla, by_position):
    model, inputs, asked = nabla
    draftdiff.enable(model, SPARSE)
    without = output_of(model, inputs)
    if by_position:
        names = ("hidden_states", "encoder_hidden_states", "timestep", "pooled_projections", "visual_rope_pos")
        given = [inputs[name] for name in (*names, "text_rope_pos")]
        with torch.no_grad():
            found = model(*given, (1.0, 1.0, 1.0), asked["sparse_params"], False)
        found = found if isinstance(found, torch.Tensor) else found[0]
    else:
        found = output_of(model, inputs | asked)
    assert torch.equal(found, without)
    report = draftdiff.report(model).transformers[0]
    assert report.sparse_steps == 1 and not report.reasons


WEIGHED = [CASES[name] for name in ("chroma_weighed", "ltx2_strengths") if name in CASES]


@pytest.mark.parametrize("case", WEIGHED, ids=str)
def test_numbers_that_a_mask_adds_matter_and_are_told(case):
    model = case.build()
    inputs = case.inputs(model, case.grid, 2)
    name = next(name for name in ("attention_mask", "video_self_attention_mask") if name in inputs)
    draftdiff.enable(model, FULL)
    weighed = output_of(model, inputs)
    report = draftdiff.report(model).transformers[0]
    assert report.sparse_steps == 1 and not report.reasons
    assert f"the mask adds a number to each of {report.groups} groups of keys" in str(report)
    assert float((output_of(model, inputs | {name: None}) - weighed).abs().max()) > 1e-3


@pytest.mark.parametrize("case", WEIGHED, ids=str)
def test_a_mask_of_too_many_numbers_is_dense_and_told(case):
    model = case.build()
    inputs = case.inputs(model, case.grid, 1)
    name = next(name for name in ("attention_mask", "video_self_attention_mask") if name in inputs)
    inputs[name] = torch.linspace(0.9, 1, inputs[name].shape[-1]).expand(inputs[name].shape)
    dense = output_of(model, inputs)
    draftdiff.enable(model, SPARSE)
    assert torch.equal(output_of(model, inputs), dense)
    report = draftdiff.report(model).transformers[0]
    reason = "a mask that adds more numbers than one for each of a few groups of keys"
    assert report.sparse_steps == 0 and report.reasons == {reason: 1}


def test_strengths_are_those_of_the_hosts_pipeline():
    pipelines = pytest.importorskip("diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora")
    asked = Asked(None, (2, 3, 4), 1)
    mask = ltx.strengths(asked)
    video, few = 24, ltx.APPENDED
    first, second = mask[:, 0, video + few : -few], mask[:, 0, -few:]
    made = pipelines.LTX2InContextPipeline._build_video_self_attention_mask(
        video, video + few, [first, second], torch.device("cpu")
    )
    assert torch.equal(mask, made)


def test_blocks_that_are_made_behind_a_cache_are_sparse_and_those_that_fill_it_dense():
    if "anyflow_far" not in CASES:
        pytest.skip("this version of diffusers has no such model")
    from diffusers import AnyFlowFARPipeline, FlowMapEulerDiscreteScheduler

    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "scheduler": FlowMapEulerDiscreteScheduler()}
    pipe = AnyFlowFARPipeline(transformer=CASES["anyflow_far"].build(), **parts)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 128, "width": 256, "num_frames": 33, "num_inference_steps": 2, "output_type": "latent"}
    call |= {"chunk_partition": [1, 2, 3, 2, 1], "prompt_embeds": torch.randn(1, 10, 16), "guidance_scale": 1.0}

    def run():
        return pipe(**call, generator=torch.Generator().manual_seed(0))[0]

    dense = rounded(run)
    draftdiff.enable(pipe, FULL)
    dense.check(run())
    report = draftdiff.report(pipe).transformers[0]
    told = "the grid of a call's tokens cannot be told (see the model's note)"
    assert (report.passes, report.sparse_steps, report.reasons) == (5, 10, {told: 4})
