"""Drafters shared by threads, and models whose weights are elsewhere until they are needed."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from draftdiff.llm import (
    CrossVocabDrafter,
    KBest,
    ModelDrafter,
    NGramCache,
    NGramDrafter,
    NGramTable,
    PearlDrafter,
    report,
    speculative,
)
from tests.llm.tiny_models import prompt, tiny_model
from tests.llm.toy_tokenizers import greedy_tokenizer

WORDS = [f"{a}{b}" for a in "abcdefgh" for b in "abcdefghijkl"][:95]


def cross_vocab(draft):
    letters = [*"abcdefghijkl"]
    small = tiny_model(seed=5, layers=1, vocab_size=len(letters) + 1)
    return CrossVocabDrafter(small, greedy_tokenizer(letters), greedy_tokenizer(WORDS))


DRAFTERS = {
    "model": lambda draft: ModelDrafter(draft, KBest(4, 3, 16)),
    "PEARL": lambda draft: PearlDrafter(draft, 3),
    "n-grams": lambda draft: NGramDrafter(nodes=8),
    "another tokenizer": cross_vocab,
}


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_drafter_serves_several_threads_at_once(pair, name):
    target, draft = pair
    drafter = DRAFTERS[name](draft)
    prompts = [prompt(12 + seed, seed=seed) for seed in range(8)]
    options = {"do_sample": False, "max_new_tokens": 30}
    plain = [target.generate(ids, **options) for ids in prompts]

    def generate(ids):
        return target.generate(ids, custom_generate=speculative, drafter=drafter, pace=None, **options)

    with ThreadPoolExecutor(4) as threads:
        fast = list(threads.map(generate, prompts))
    assert all(torch.equal(a, b) for a, b in zip(plain, fast))
    assert report(drafter).tokens == 30 and "_claim" not in vars(drafter)


def test_what_learns_can_be_copied_and_pickled():
    table, cache = NGramTable([[1, 2, 3]]), NGramCache()
    cache.learn(4, [1, 2])
    for again in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        assert again(table).follow(1, 2) == table.follow(1, 2) != []
        assert again(cache).starting(1) == {(1, 2): 4}
        again(table).learn_step([1, 2, 3])
        again(cache).learn(5, [2, 2])


@pytest.mark.parametrize("which", ["target", "draft", "both"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_weights_may_be_elsewhere_until_they_are_needed(pair, name, which):
    accelerate = pytest.importorskip("accelerate")
    target, draft = pair
    plain = target.generate(prompt(12), do_sample=False, max_new_tokens=16)
    target, draft = copy.deepcopy(target), copy.deepcopy(draft)
    for model in ({"target": [target], "draft": [draft], "both": [target, draft]})[which]:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.device.type == "meta"
    given = {"custom_generate": speculative, "drafter": DRAFTERS[name](draft), "pace": None}
    assert torch.equal(plain, target.generate(prompt(12), do_sample=False, max_new_tokens=16, **given))
