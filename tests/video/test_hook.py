"""A call's state lives for that call, in that thread: what hosts drop, replace, share, copy or break off can cost
speed, never correctness, and the report says so."""

import copy
import math
import sys
import threading
import types

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, WanVideoToVideoPipeline

import draftdiff
from draftdiff import DraftAttentionConfig
from tests.rounding import rounded
from tests.video.model_cases import MODEL_CASES, output_of
from tests.video.test_pipeline import build_pipe, build_transformer, run

ALWAYS = {"dense_steps": 0, "dense_layers": 0, "min_tokens": 0}
SPARSE = DraftAttentionConfig(sparsity=0.7, dense_steps=1, dense_layers=0, min_tokens=0)
AT_ONCE = DraftAttentionConfig(sparsity=0.7, **ALWAYS)
FULL = DraftAttentionConfig(selection="full", **ALWAYS)
CASES = {case.name: case for case in MODEL_CASES}


@pytest.fixture
def pipe():
    return build_pipe()


@pytest.fixture
def model():
    return build_transformer()


def inputs(seed=0, frames=4, height=10, width=14):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 16, frames, height, width, generator=generator)
    return {
        "hidden_states": noise,
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 8, 16, generator=generator),
        "return_dict": False,
    }


def counts(target):
    return [(t.dense_steps, t.sparse_steps, len(t.forwards), t.grid) for t in draftdiff.report(target).transformers]


# --- hosts that drop or replace the forward


@pytest.mark.parametrize("two", [False, True], ids=["one transformer", "two"])
@pytest.mark.parametrize("first", ["offload", "draftdiff"])
def test_model_offload_changes_nothing_over_three_calls_and_a_new_size(monkeypatch, first, two):
    from draftdiff.video import calls

    plain = draftdiff.enable(build_pipe(two), SPARSE)
    expected, small = run(plain), run(plain, height=64, width=64, num_frames=5)
    stock = run(build_pipe(two))
    pipe = build_pipe(two)
    if first == "draftdiff":
        draftdiff.enable(pipe, SPARSE)
    pipe.enable_model_cpu_offload(device="cpu")
    if first == "offload":
        draftdiff.enable(pipe, SPARSE)
    sparse_calls, attend = [], calls.attend
    monkeypatch.setattr(calls, "attend", lambda *a, **k: (sparse_calls.append(1), attend(*a, **k))[1])
    for _ in range(3):
        sparse_calls.clear()
        assert torch.equal(run(pipe), expected)
        assert len(sparse_calls) == 24
        assert sum(len(t.forwards) for t in draftdiff.report(pipe).transformers) == 10
    assert torch.equal(run(pipe, height=64, width=64, num_frames=5), small)
    assert counts(pipe)[0][3] == (2, 4, 4)
    assert torch.equal(run(draftdiff.disable(pipe)), stock)


def test_lora_loaded_under_model_offload_does_not_switch_us_off(pipe, monkeypatch):
    from peft import LoraConfig, get_peft_model_state_dict

    donor = build_transformer()
    donor.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    lora = {"transformer." + k: v for k, v in get_peft_model_state_dict(donor).items()}
    real = type(pipe).enable_model_cpu_offload
    monkeypatch.setattr(type(pipe), "enable_model_cpu_offload", lambda self, *a, **k: real(self, device="cpu"))
    pipe.enable_model_cpu_offload()
    draftdiff.enable(pipe, SPARSE)
    plain = run(pipe)
    pipe.load_lora_weights(lora, adapter_name="a")
    assert float((run(pipe) - plain).abs().max()) > 1e-3
    assert counts(pipe) == [(1, 4, 10, (4, 5, 7))]
    pipe.unload_lora_weights()
    run(pipe)
    assert counts(pipe) == [(1, 4, 10, (4, 5, 7))]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", ["instance", "class"])
def test_a_forward_replaced_from_outside_is_seen_and_runs(pipe, monkeypatch, when, where):
    expected = run(draftdiff.enable(build_pipe(), SPARSE))
    calls = []
    real = type(pipe.transformer).forward

    def replaced(self, *args, **kwargs):
        calls.append(1)
        return real(self, *args, **kwargs)

    if when == "after":
        draftdiff.enable(pipe, SPARSE)
    if where == "class":
        monkeypatch.setattr(type(pipe.transformer), "forward", replaced)
    else:
        pipe.transformer.forward = types.MethodType(replaced, pipe.transformer)
    if when == "before":
        draftdiff.enable(pipe, SPARSE)
    assert torch.equal(run(pipe), expected)
    assert len(calls) == 10
    assert counts(pipe) == [(1, 4, 10, (4, 5, 7))]


def test_arguments_that_cannot_be_told_apart_stay_dense_with_one_warning(model, monkeypatch):
    stock, real = output_of(model, inputs()), type(model).forward
    draftdiff.enable(model, AT_ONCE)
    monkeypatch.setattr(type(model), "forward", lambda self, *args, **kwargs: real(self, *args, **kwargs))
    given = inputs()

    def without_names():
        with torch.no_grad():
            return model(given["hidden_states"], given["timestep"], given["encoder_hidden_states"], return_dict=False)

    with pytest.warns(UserWarning, match="call it with names to make it sparse") as told:
        outs = [without_names() for _ in range(2)]
    assert all(torch.equal(out[0], stock) for out in outs)
    assert len(told) == 1
    assert "called without names" in str(draftdiff.report(model))


def test_a_layer_reached_outside_a_forward_is_dense_and_told(model):
    layer = model.blocks[0].attn1
    tokens = torch.randn(1, 140, 64)
    stock = layer(tokens)
    draftdiff.enable(model, AT_ONCE)
    output_of(model, inputs())
    assert torch.equal(layer(tokens), stock)
    assert "outside a forward that draftdiff saw" in str(draftdiff.report(model))


def test_a_forward_that_ends_in_an_error_leaves_no_task(model, monkeypatch):
    draftdiff.enable(model, AT_ONCE)
    with monkeypatch.context() as patch:
        patch.setattr("draftdiff.video.calls.attend", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            output_of(model, inputs())
    tokens = torch.randn(1, 140, 64)
    inside = model.blocks[1].attn1(tokens)
    assert torch.equal(inside, draftdiff.disable(model).blocks[1].attn1(tokens))


def test_ctrl_c_inside_a_forward_does_not_reach_the_next(model, monkeypatch):
    expected = output_of(draftdiff.enable(model, AT_ONCE), inputs())

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("draftdiff.video.calls.attend", interrupted)
        with pytest.raises(KeyboardInterrupt):
            output_of(model, inputs())
    for _ in range(2):
        assert torch.equal(output_of(model, inputs()), expected)
    tokens = torch.randn(1, 140, 64)
    dense = model.blocks[1].attn1(tokens)
    assert torch.equal(dense, draftdiff.disable(model).blocks[1].attn1(tokens))


# --- one transformer, several users of it


def test_a_pipeline_made_from_another_counts_its_own_steps(pipe):
    config = DraftAttentionConfig(dense_layers=0, min_tokens=0)
    run(draftdiff.enable(pipe, config), steps=20)
    assert counts(pipe)[0][:2] == (4, 16)
    other = WanVideoToVideoPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    embeds = torch.randn(1, 8, 16)
    call = {"prompt_embeds": embeds, "negative_prompt_embeds": -embeds, "height": 80, "width": 112}
    video = [torch.rand(13, 80, 112, 3).numpy()]
    for _ in range(2):
        other(video=video, num_inference_steps=5, strength=0.8, output_type="latent", **call)
        assert counts(other)[0][:3] == (1, 3, 8)
        pipe = None
    assert pipe is None


@pytest.mark.parametrize("sizes", [[(4, 10, 14)] * 2, [(4, 10, 14), (3, 12, 8)]], ids=["one size", "two sizes"])
def test_threads_that_share_a_transformer_do_not_mix(model, sizes):
    draftdiff.enable(model, DraftAttentionConfig(sparsity=0.7, dense_steps=0, dense_layers=1, min_tokens=0))
    given = [inputs(seed, *size) for seed, size in enumerate(sizes)]
    expected = [rounded(lambda x=x: output_of(model, x)) for x in given]
    wrong = []

    def work(i):
        outs = [output_of(model, given[i]) for _ in range(30)]
        wrong.extend(i for out in outs if not expected[i].holds(out))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_the_steps_at_both_ends_may_stay_dense(pipe):
    config = DraftAttentionConfig(dense_steps=0.2, dense_end=0.4, dense_layers=0, min_tokens=0)
    run(draftdiff.enable(pipe, config), steps=5)
    told = draftdiff.report(pipe).transformers[0]
    assert [forward.sparse for forward in told.forwards[::2]] == [0, 1, 1, 0, 0]
    assert told.tokens == round(0.25 * 0.25 * math.prod(told.grid))
    assert f"reads tiles by 'error' and {told.tokens} single tokens exactly" in str(told)


def test_two_pipelines_in_threads_count_their_own_steps(pipe):
    config = DraftAttentionConfig(dense_steps=0.5, dense_layers=0, min_tokens=0)
    draftdiff.enable(pipe, config)
    other = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    other.set_progress_bar_config(disable=True)
    expected = [rounded(lambda: run(pipe, steps=4)), rounded(lambda: run(other, steps=8, height=64, width=64))]
    results = [None, None]

    def work(i, target, **call):
        results[i] = run(target, **call)

    calls = ((pipe, {"steps": 4}), (other, {"steps": 8, "height": 64, "width": 64}))
    threads = [threading.Thread(target=work, args=(i, target), kwargs=call) for i, (target, call) in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, wanted in zip(results, expected):
        wanted.check(result)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: __import__("pickle").loads(__import__("pickle").dumps(m))])
def test_copies_of_an_enabled_model_are_independent(model, how):
    stock = output_of(model, inputs())
    sparse = output_of(draftdiff.enable(model, AT_ONCE), inputs())
    double = how(model)
    assert draftdiff.report(double).transformers[0].forwards == []
    draftdiff.disable(model)
    assert torch.equal(output_of(double, inputs()), sparse)
    assert torch.equal(output_of(model, inputs()), stock)
    draftdiff.disable(double)
    assert torch.equal(output_of(double, inputs()), stock)


# --- runs, passes and steps


def test_a_broken_off_run_is_not_counted_into_the_next(pipe):
    draftdiff.enable(pipe, SPARSE)

    def stop(pipe, step, timestep, tensors):
        if step == 1:
            raise KeyboardInterrupt
        return tensors

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(pipe, callback_on_step_end=stop)
        assert counts(pipe)[0][2] == 4
        run(pipe)
        assert counts(pipe) == [(1, 4, 10, (4, 5, 7))]


def test_passes_of_one_call_are_told_apart_and_added_up():
    from diffusers import SkyReelsV2DiffusionForcingPipeline, SkyReelsV2Transformer3DModel

    from tests.video.model_cases import WAN, tiny

    transformer = tiny(SkyReelsV2Transformer3DModel, **(WAN | {"in_channels": 16, "out_channels": 16}))()
    base = build_pipe()
    pipe = SkyReelsV2DiffusionForcingPipeline(
        tokenizer=None, text_encoder=None, transformer=transformer, vae=base.vae, scheduler=base.scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    calls = []
    transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    draftdiff.enable(pipe, SPARSE)
    embeds = torch.randn(1, 8, 16)
    for _ in range(2):
        calls.clear()
        pipe(
            prompt=None,
            prompt_embeds=embeds,
            negative_prompt_embeds=-embeds,
            num_inference_steps=10,
            output_type="latent",
            height=64,
            width=64,
            num_frames=37,
            base_num_frames=13,
            overlap_history=5,
            addnoise_condition=20,
        )
        told = draftdiff.report(pipe).transformers[0]
        assert len(told.forwards) == len(calls) == 80
        assert (told.passes, told.dense_steps, told.sparse_steps) == (4, 4, 36)
    assert "36 sparse and 4 dense steps in 4 passes" in str(told)


@pytest.mark.parametrize("steps", [10, 50])
def test_shares_of_steps_are_of_the_request_also_where_a_step_has_two_stages(pipe, steps):
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    draftdiff.enable(pipe, DraftAttentionConfig(dense_steps=0.2, dense_layers=0, min_tokens=0))
    run(pipe, steps=steps, height=32, width=32, num_frames=5)
    assert counts(pipe)[0][:2] == (round(0.2 * steps), steps - round(0.2 * steps))


def test_under_a_debugger_runs_are_still_told_apart(pipe):
    draftdiff.enable(pipe, SPARSE)
    before = sys.gettrace()
    sys.settrace(lambda *_: None)
    try:
        for _ in range(2):
            run(pipe)
            assert counts(pipe)[0][:2] == (1, 4)
    finally:
        sys.settrace(before)


# --- what people pass, and what they are told


def test_few_tokens_are_told_once_and_how_to_change_it(pipe):
    draftdiff.enable(pipe, DraftAttentionConfig(dense_steps=0))
    with pytest.warns(UserWarning, match="140 video tokens are fewer than min_tokens, here 1024") as told:
        run(pipe)
    assert len([w for w in told if "min_tokens" in str(w.message)]) == 1
    assert "140 video tokens are fewer than min_tokens" in str(draftdiff.report(pipe))
