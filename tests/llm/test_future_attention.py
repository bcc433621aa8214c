"""SpecKV's keys against what the trained pair's target really looks at afterwards, and the measures themselves."""

import pytest
import torch

from draftdiff.llm import SpecKVConfig, speckv
from draftdiff.llm.future_attention import future_attention, kept_mass, kept_recall
from draftdiff.llm.train.stdlib_corpus import corpus_texts
from draftdiff.pipelines.mini.llm import load_mini_llm
from tests.llm.tiny_models import FAMILIES, prompt, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_paid_is_that_of_the_hosts_maps(family):
    model, ids = tiny_model(family), prompt(30)
    said, paid = future_attention(model, ids, 5)
    assert torch.equal(said, model.generate(ids, max_new_tokens=5, do_sample=False)[:, 30:])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(torch.cat([ids, said[:, :-1]], dim=1), output_attentions=True).attentions
    for layer, attention in enumerate(maps):
        expected = attention[:, :, 29:, :29].sum(2).unflatten(1, (2, 2)).sum(2)
        torch.testing.assert_close(paid[layer], expected, rtol=1e-4, atol=1e-5)


def test_mass_and_recall_of_a_written_out_case():
    paid = {0: torch.tensor([[[1.0, 5.0, 2.0, 2.0], [4.0, 4.0, 1.0, 1.0]]]), 1: torch.ones(1, 2, 4)}
    indices = {0: torch.tensor([[[0, 1], [2, 3]]])}
    assert kept_mass(paid, indices) == pytest.approx((0.6 + 0.2) / 2)
    indices = {0: torch.tensor([[[0, 1], [0, 3]]])}
    assert kept_recall(paid, indices) == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_the_drafts_lookahead_finds_more_of_what_will_be_read_than_the_window_alone():
    """Against SnapKV, the same without a lookahead, on the trained pair and program text it has not seen."""
    target, draft, tokenizer = load_mini_llm()
    texts = [tokenizer(text, return_tensors="pt", verbose=False).input_ids for text in corpus_texts(held_out=True)]
    found = []
    for text in [text for text in texts if text.shape[1] > 500][::2]:
        start = (text.shape[1] - 400) * 2 // 5
        ids = text[:, start : start + 400]
        paid = future_attention(target, ids, 32)[1]
        for capacity in (32, 64, 128):
            for lookahead in (32, 0):
                config = SpecKVConfig(capacity=capacity, window=8, lookahead=lookahead, reduce="mean")
                kept = speckv(target, draft, ids, config, return_indices=True)[1].indices
                found.append((kept_mass(paid, kept), kept_recall(paid, kept)))
    ours, theirs = torch.tensor(found).unflatten(0, (-1, 3, 2)).unbind(2)  # [texts, capacities, mass and recall]
    assert (ours.mean(0) > theirs.mean(0) + 0.005).all()
    assert ((ours > theirs).float().mean(0) > 0.5).all()
