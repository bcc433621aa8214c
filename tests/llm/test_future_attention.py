"""SpecKV's keys against what the trained pair's target really looks at afterwards, and the measures themselves."""

import argparse
import configparser
import difflib
import inspect
import random
import shutil
import statistics
import tarfile
import zipfile

import pytest
import torch

from draftdiff.llm import SpecKVConfig, speckv
from draftdiff.llm.future_attention import future_attention, kept_mass, kept_recall
from draftdiff.pipelines.mini_llm import load_mini_llm
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


def test_the_drafts_lookahead_keeps_more_of_what_will_be_read_than_the_window_alone():
    """Against SnapKV, the same without a lookahead, on the trained pair and real text."""
    target, draft, tokenizer = load_mini_llm()
    ahead, window_only = (SpecKVConfig(capacity=32, window=8, lookahead=count) for count in (32, 0))
    ours, theirs = [], []
    for module in (argparse, configparser, difflib, random, shutil, statistics, tarfile, zipfile):
        ids = tokenizer(inspect.getsource(module)[2000:5000], return_tensors="pt").input_ids[:, :400]
        paid = future_attention(target, ids, 32)[1]
        for config, masses in ((ahead, ours), (window_only, theirs)):
            masses.append(kept_mass(paid, speckv(target, draft, ids, config, return_indices=True)[1].indices))
    assert statistics.mean(ours) > statistics.mean(theirs) + 0.01
    assert sum(a > b for a, b in zip(ours, theirs)) >= 6
