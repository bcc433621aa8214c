"""A model's own law: nothing of its generation config but the special tokens reaches what it writes."""

import pytest
import torch

from draftdiff.llm.plain_config import own_law
from tests.llm.tiny_models import VOCABULARY, prompt, tiny_model

LEAKS = {
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[i] for i in range(1, VOCABULARY)],
    "suppress_tokens": list(range(1, VOCABULARY)),
    "forced_eos_token_id": 5,
    "min_p": 0.9,
    "top_k": 1,
    "top_p": 0.1,
    "top_h": 0.1,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.5,
    "temperature": 0.01,
    "do_sample": True,
    "num_beams": 2,
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
    "output_scores": True,
    "min_new_tokens": 3,
    "max_length": 7,
    "max_time": 0.0,
    "stop_strings": ["a"],
    "penalty_alpha": 0.6,
    "guidance_scale": 2.0,
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "use_cache": False,
    "cache_implementation": "static",
}


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=2)


def written(model, **fields):
    torch.manual_seed(0)
    return model.generate(prompt(5, batch=2), generation_config=own_law(model, max_new_tokens=6, **fields))


@pytest.mark.parametrize("name", LEAKS)
def test_no_setting_of_the_models_own_shows_in_what_it_writes(name, model, monkeypatch):
    plain = [written(model, **law) for law in ({}, {"do_sample": True})]
    monkeypatch.setattr(model.generation_config, name, LEAKS[name])
    before = model.generation_config.to_dict()
    for out, law in zip(plain, ({}, {"do_sample": True})):
        assert torch.equal(written(model, **law), out)
    assert model.generation_config.to_dict() == before


def test_greedy_is_the_likeliest_token_and_the_end_is_the_models(model, monkeypatch):
    out = written(model)
    with torch.no_grad():
        assert torch.equal(model(out[:, :-1]).logits[:, 4:].argmax(-1), out[:, 5:])
    monkeypatch.setattr(model.generation_config, "eos_token_id", sorted(set(out[:, 7].tolist())))
    assert written(model).shape[1] <= 8


def test_fields_come_before_the_models_tokens(model):
    law = own_law(model, pad_token_id=9, suppress_tokens=[3])
    assert (law.pad_token_id, law.suppress_tokens, law.max_new_tokens) == (9, [3], None)
