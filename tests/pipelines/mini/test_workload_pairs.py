"""The shipped pairs of the workloads: small, offline, above the floor, and worse for keeping less."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from draftdiff.compare.llm_workload import Judgement
from draftdiff.llm.workloads.named import WORKLOADS, named_workload
from draftdiff.models.llm import encode, load
from draftdiff.models.llm_methods import METHODS, generate_options, methods_of
from draftdiff.pipelines.mini.llm import FILES, HEADS, WORKLOAD_WEIGHTS, mini_llm_defaults

CUT = {"drawing": 48, "travel": 128}  # tokens of a prompt that are too few to answer it


@pytest.fixture(scope="module", params=WORKLOADS)
def pair(request) -> Any:
    """A workload, its model, and what three methods answer to six cases."""
    name = request.param
    work, model = named_workload(name, compact=True), load(None, None, device="cpu", workload=name)
    cases, said = work.cases(11, 6), {}
    options = generate_options(work.tokens, 0.0)
    for method in ("plain", "chain", "specpc"):
        runs = [METHODS[method].run(model, encode(model, case.prompt), options, CUT[name]) for case in cases]
        said[method] = [model.tokenizer.decode(run.tokens, skip_special_tokens=True) for run in runs]
    return SimpleNamespace(name=name, work=work, model=model, cases=cases, said=said)


def test_both_models_are_two_megabytes_with_what_is_known_of_them(pair):
    model, folder = pair.model, WORKLOAD_WEIGHTS[pair.name]
    assert model.name == f"mini-{pair.name}" and {p.dtype for p in model.target.parameters()} == {torch.float32}
    assert sum((folder / name).stat().st_size for name in FILES if name.endswith(".safetensors")) < 2e6
    known = mini_llm_defaults(folder)
    assert len(known["token_counts"]) == model.target.config.vocab_size >= len(model.tokenizer)
    assert known["workload"]["target"]["exact"] > 0


def test_all_prompts_and_answers_fit_into_its_context(pair):
    for case in pair.work.cases(12, 240):
        prompt, answer = (encode(pair.model, text).shape[1] for text in (case.prompt, case.gold))
        assert answer < pair.work.tokens and prompt + answer < pair.model.target.config.max_position_embeddings


def test_it_answers_far_better_than_whoever_has_not_read(pair):
    made = Judgement.of(pair.work, pair.cases, pair.said)
    assert made.refusal() is None
    assert made.mean("plain") > made.floor + 20


def test_a_chain_says_the_same_and_a_prompt_cut_short_costs_points(pair):
    assert pair.said["chain"] == pair.said["plain"]
    found = Judgement.of(pair.work, pair.cases, pair.said).difference("specpc")
    assert found is not None and found.high < 0


def test_it_has_all_methods_but_those_of_heads(pair):
    assert set(METHODS) - set(methods_of(pair.model)) == set(HEADS)
