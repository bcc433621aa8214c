"""The shipped pair of the drawing workload: small, offline, above the floor, and worse for keeping less."""

from __future__ import annotations

import pytest
import torch

from draftdiff.compare.llm_workload import Judgement
from draftdiff.llm.workloads.drawing.workload import DrawingWorkload
from draftdiff.models.llm import EMBEDDED_DRAWING, encode, load
from draftdiff.models.llm_methods import METHODS, generate_options, methods_of
from draftdiff.pipelines.mini.llm import DRAWING_WEIGHTS, FILES, HEADS, mini_llm_defaults

WORK = DrawingWorkload(compact=True)
CASES = WORK.cases(11, 12)


@pytest.fixture(scope="module")
def model():
    return load(None, None, device="cpu", drawing=True)


@pytest.fixture(scope="module")
def said(model) -> dict[str, list[str]]:
    """What three methods answer."""
    options, found = generate_options(WORK.tokens, 0.0), {}
    for name in ("plain", "chain", "specpc"):
        runs = [METHODS[name].run(model, encode(model, case.prompt), options, 48) for case in CASES]
        found[name] = [model.tokenizer.decode(run.tokens, skip_special_tokens=True) for run in runs]
    return found


def test_both_models_are_two_megabytes_with_what_is_known_of_them(model):
    assert model.name == EMBEDDED_DRAWING and {p.dtype for p in model.target.parameters()} == {torch.float32}
    stored = sum((DRAWING_WEIGHTS / name).stat().st_size for name in FILES if name.endswith(".safetensors"))
    assert stored < 2e6
    known = mini_llm_defaults(DRAWING_WEIGHTS)
    assert len(known["token_counts"]) == model.target.config.vocab_size >= len(model.tokenizer)
    assert known["workload"]["target"]["exact"] > 0


def test_all_prompts_and_answers_fit_into_its_context(model):
    for case in WORK.cases(12, 240):
        prompt, answer = encode(model, case.prompt).shape[1], encode(model, case.gold).shape[1]
        assert answer < WORK.tokens and prompt + answer < model.target.config.max_position_embeddings


def test_it_answers_far_better_than_whoever_has_not_read(said):
    made = Judgement.of(WORK, CASES, said)
    assert made.refusal() is None
    assert made.mean("plain") > made.floor + 20


def test_a_chain_says_the_same_and_a_prompt_cut_to_48_tokens_costs_points(said):
    assert said["chain"] == said["plain"]
    found = Judgement.of(WORK, CASES, said).difference("specpc")
    assert found is not None and found.mean < -5


def test_it_has_all_methods_but_those_of_heads(model):
    assert set(METHODS) - set(methods_of(model)) == set(HEADS)
