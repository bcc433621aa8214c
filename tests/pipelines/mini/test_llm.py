"""The shipped mini language-model pair: it loads offline, drafts well, looks far back, and names damaged files."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from safetensors import safe_open

from draftdiff.llm import Chain, ModelDrafter, report, speculative
from draftdiff.llm.metrics import bytes_per_forward
from draftdiff.llm.train import stdlib_corpus
from draftdiff.llm.train.data import left_padded
from draftdiff.pipelines.mini.llm import HEADS, MODELS, WEIGHTS, load_mini_heads, load_mini_llm, mini_llm_defaults


@pytest.fixture(scope="module")
def pair():
    return load_mini_llm()


def test_both_models_are_ready_for_inference_in_full_precision(pair) -> None:
    target, draft, tokenizer = pair
    for model in (target, draft):
        assert model.dtype == torch.float32 and not model.training
        assert model.config.vocab_size == len(tokenizer)
        assert model.config.eos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert {p.dtype for p in load_mini_llm(torch.bfloat16)[1].parameters()} == {torch.bfloat16}


def test_the_target_is_deep_with_grouped_queries_and_the_draft_is_cheap(pair) -> None:
    target, draft, _ = pair
    assert target.config.num_hidden_layers >= 6 * draft.config.num_hidden_layers
    assert target.config.num_key_value_heads < target.config.num_attention_heads
    assert bytes_per_forward(draft) < 0.25 * bytes_per_forward(target)


@pytest.mark.parametrize("kind", HEADS)
def test_the_targets_heads_draft_for_it_in_its_own_dtype(pair, kind) -> None:
    target, _, tokenizer = pair
    drafter = load_mini_heads(kind, target)
    heads = drafter.heads if hasattr(drafter, "heads") else drafter.head
    assert {p.dtype for p in heads.parameters()} == {torch.float32} and not heads.training
    ids = tokenizer(mini_llm_defaults()["prompt"], return_tensors="pt").input_ids
    given = {"do_sample": False, "max_new_tokens": 40}
    fast = target.generate(ids, custom_generate=speculative, drafter=drafter, pace=None, **given)
    assert torch.equal(fast, target.generate(ids, **given))
    assert report(drafter).tokens_per_forward > 1.3
    with pytest.raises(ValueError, match="kind must be one of hydra, medusa, longspec, falcon, got 'eagle'"):
        load_mini_heads("eagle", target)


def test_text_survives_the_tokenizer(pair) -> None:
    text = "def f(x):\n\tif x:\n        return {'é': x ** 2}  # ünï\n\n\n"
    tokenizer = pair[2]
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text and len(ids) < len(text)
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id is not None


def test_the_draft_gives_two_tokens_a_forward_and_the_targets_own_text(pair) -> None:
    target, draft, tokenizer = pair
    ids, mask = left_padded([torch.tensor(tokenizer(p).input_ids) for p in stdlib_corpus.def_prompts(12)], 0)
    options = {"attention_mask": mask, "max_new_tokens": 64, "do_sample": False}
    drafter = ModelDrafter(draft, Chain(4))
    out = target.generate(ids, custom_generate=speculative, drafter=drafter, pace=None, **options)
    assert torch.equal(out, target.generate(ids, **options))
    assert report(drafter).tokens_per_forward >= 2


@torch.no_grad()
def test_both_predict_unseen_files_far_better_than_chance_and_the_target_better_than_the_draft(pair) -> None:
    target, draft, tokenizer = pair
    ids = unseen_windows(tokenizer, 4)
    losses = [model(ids, labels=ids).loss.item() for model in (target, draft)]
    assert losses[0] < losses[1] - 0.3 < 4.2  # by chance: 7.6


@torch.no_grad()
def test_the_target_makes_use_of_what_is_hundreds_of_tokens_back(pair) -> None:
    target, _, tokenizer = pair
    ids = unseen_windows(tokenizer, 8)
    labels = ids[:, -64:]

    def loss(context: int) -> float:
        logits = target(ids[:, -64 - context :]).logits[:, -65:-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()

    assert loss(448) < loss(64) - 0.03


def unseen_windows(tokenizer, count: int) -> torch.Tensor:
    texts = sorted(stdlib_corpus.corpus_texts(held_out=True), key=len)[-count:]
    return torch.tensor([tokenizer(text[:20000], verbose=False).input_ids[:512] for text in texts])


def test_unseen_files_are_a_twentieth_and_in_a_fixed_order() -> None:
    seen, unseen = stdlib_corpus.corpus_files(), stdlib_corpus.corpus_files(held_out=True)
    assert not set(seen) & set(unseen)
    assert 0.02 < len(unseen) / len(seen) < 0.1
    assert unseen == sorted(unseen) and unseen == stdlib_corpus.corpus_files(held_out=True)
    assert not any("site-packages" in file.parts or "test" in file.parts for file in seen)


def test_prompts_are_heads_of_unseen_functions() -> None:
    prompts = stdlib_corpus.def_prompts(20)
    assert len(set(prompts)) == 20 and prompts == stdlib_corpus.def_prompts(20)
    assert all(prompt.startswith("def ") and prompt.endswith("):") for prompt in prompts)
    with pytest.raises(ValueError, match=r"count must be from 1 to \d+, the function heads there are, got 0"):
        stdlib_corpus.def_prompts(0)


def test_loading_prints_warns_and_logs_nothing(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_mini_llm()
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == "" and caplog.messages == []


def test_the_weights_are_half_precision_and_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) <= 9_500_000
    assert sum((WEIGHTS / kind / "model.safetensors").stat().st_size for kind in HEADS) <= 3_600_000
    for model in (*MODELS, *HEADS):
        with safe_open(WEIGHTS / model / "model.safetensors", "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118


def test_nothing_in_the_folder_names_a_machine() -> None:
    for file in WEIGHTS.rglob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"(?:^|[\s\"'=:,(\[])/\w+/", text)  # no absolute path


def test_the_settings_tell_what_the_pair_is_worth() -> None:
    settings = mini_llm_defaults()
    assert settings["length"] == settings["held_out"]["length"] == 4
    assert settings["held_out"]["block_efficiency"] >= 2
    assert settings["prompt"].startswith("def ")
    counts = settings["token_counts"]
    assert len(counts) == 2048 and min(counts) >= 0 and sum(counts) > 50_000
