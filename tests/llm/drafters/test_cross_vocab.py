"""A draft of another tokenizer: merging, learning, stopping and training, beside drafting for the same tokenizer."""

import copy
import threading

import pytest
import torch
from transformers import StoppingCriteriaList

from draftdiff.llm import (
    AcceptanceHead,
    CrossVocabDistiller,
    CrossVocabDrafter,
    NGramCache,
    Vocabularies,
    distil_cross_vocab,
    report,
)
from draftdiff.llm.drafters.length_head import acceptance_loss, chance
from draftdiff.llm.train.cross_vocab import Example, hybrid_loss
from tests.llm.generation import EndsWith, both
from tests.llm.tabular import tabular_model
from tests.llm.tiny_models import prompt, tiny_model
from tests.llm.toy_tokenizers import byte_level, greedy_tokenizer, sentence_piece

WORDS = ["a", "b", "ab", "ba", "c", "bc", "abc"]
LETTERS = ["a", "b", "c", "ba"]


def tokenizers():
    return greedy_tokenizer(LETTERS), greedy_tokenizer(WORDS)


@pytest.fixture(name="models", scope="module")
def _models():
    """A target that writes words of its own, and a draft of a smaller vocabulary."""
    return tabular_model(0, len(WORDS) + 1), tabular_model(1, len(LETTERS) + 1)


def drafter_of(models, **options):
    return CrossVocabDrafter(models[1], *tokenizers(), **options)


def oracle(target, ids, new, tokenizers):
    """A draft that knows the target's greedy text, by a table of the draft's last two tokens, where that is enough."""
    whole = target.generate(ids, do_sample=False, max_new_tokens=new)[0].tolist()
    text = "".join(WORDS[token] for token in whole)
    letters = tokenizers[0](text, add_special_tokens=False).input_ids
    draft = tabular_model(0, len(LETTERS) + 1)
    draft.table.data.zero_()
    for a, b, c in zip(letters, letters[1:], letters[2:]):
        draft.table.data[a, b, c] = 20.0
    return draft


def test_what_only_several_draft_tokens_spell_is_proposed_and_accepted():
    """Where drafts of the common tokens alone could not be."""
    target = tabular_model(0, len(WORDS) + 1)
    target.table.data[..., -1] = -9.0
    target.table.data[:, :, 6] = 9.0  # abc, abc, abc, ...
    draft = oracle(target, torch.tensor([[6, 6]]), 30, tokenizers())
    drafter = CrossVocabDrafter(draft, *tokenizers(), length=6)
    assert drafter.vocabularies.direct[:3] == [0, 1, 4] and 6 not in drafter.vocabularies.direct
    plain, fast = both(target, drafter, torch.tensor([[6, 6]]), max_new_tokens=21)
    assert torch.equal(plain, fast)
    assert report(drafter).acceptance == [1, 1] and report(drafter).target_forwards == 7
    forgetful = CrossVocabDrafter(draft, *tokenizers(), length=6, cache=NGramCache(1))
    forgetful.cache.learn(1, [1, 1])
    forgetful.cache.learn = lambda *_: False
    both(target, forgetful, torch.tensor([[6, 6]]), max_new_tokens=21)
    assert report(forgetful).acceptance[0] == 0


def test_the_cache_learns_from_the_prompt_and_while_decoding(models):
    drafter = drafter_of(models)
    both(models[0], drafter, torch.tensor([[2, 6, 5]]), max_new_tokens=2)
    # "ababcbc" is a, ba, b, c, b, c: of the target's tokens the last one alone is a number of them.
    assert drafter.cache.merge([0, 1, 2], drafter.vocabularies.direct)[1].token == 5 and len(drafter.cache) == 1
    known = len(drafter.cache)
    both(models[0], drafter, torch.tensor([[0, 1]]), max_new_tokens=60)
    assert len(drafter.cache) > known


def test_the_cache_forgets_what_was_seen_longest_ago():
    cache = NGramCache(max_items=3, longest=4)
    for token in range(3):
        assert cache.learn(token, [token, 9])
    assert not cache.learn(0, [0, 9]) and cache.learn(7, [7, 9]) and len(cache) == 3
    assert cache.starting(1) == {} and cache.starting(0) == {(0, 9): 0}
    cache.learn(8, [7, 9, 4])
    assert [cache.continues(rest) for rest in ([7], [7, 9], [7, 9, 4], [9])] == [True, True, False, False]
    assert not cache.learn(5, [1]) and not cache.learn(5, [1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match="max_items must be at least 1, longest 2, got 0, 8"):
        NGramCache(0)


def test_a_saved_cache_merges_as_before(tmp_path):
    cache = NGramCache()
    for token, ngram in enumerate([[0, 1], [0, 1, 2], [2, 2]]):
        cache.learn(token, ngram)
    cache.save(tmp_path / "cache.safetensors")
    again = NGramCache.load(tmp_path / "cache.safetensors", max_items=2)
    assert len(again) == 2 and again.starting(0) == {(0, 1, 2): 1}
    (tmp_path / "other").write_bytes(b"no")
    with pytest.raises(ValueError, match="is not a readable saved n-gram cache"):
        NGramCache.load(tmp_path / "other")


def test_threads_may_share_a_cache():
    cache, errors = NGramCache(max_items=50), []

    def learn(seed):
        generator = torch.Generator().manual_seed(seed)
        try:
            for ngram in torch.randint(0, 9, (2000, 3), generator=generator).tolist():
                cache.learn(sum(ngram), ngram)
                cache.starting(ngram[0])
                cache.merge(ngram, [0] * 9)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=learn, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(cache) == 50


@pytest.mark.parametrize(
    ("draft_tokenizer", "target_tokenizer"),
    [(byte_level(300), sentence_piece()), (sentence_piece(), byte_level(330)), (byte_level(330), byte_level(300))],
)
def test_real_kinds_of_tokenizers_draft_for_one_another(draft_tokenizer, target_tokenizer):
    sizes = [len(tokenizer) for tokenizer in (draft_tokenizer, target_tokenizer)]
    draft, target = tiny_model(seed=4, layers=1, vocab_size=sizes[0]), tiny_model(vocab_size=sizes[1])
    drafter = CrossVocabDrafter(draft, draft_tokenizer, target_tokenizer)
    ids = target_tokenizer("def read(self, naïve 漢字 😀 size", return_tensors="pt").input_ids
    plain, fast = both(target, drafter, ids, max_new_tokens=40)
    assert torch.equal(plain, fast) and report(drafter).drafted > 0


def test_processors_criteria_and_end_tokens_work_as_ever(models):
    target, _ = models
    ids = torch.tensor([[2, 6, 5]])
    plain = target.generate(ids, do_sample=False, max_new_tokens=30)
    for options in (
        {"repetition_penalty": 1.4},
        {"eos_token_id": int(plain[0, 12])},
        {"stopping_criteria": StoppingCriteriaList([EndsWith(plain[0, 14:16].tolist())])},
    ):
        plain_now, fast = both(target, drafter_of(models), ids, max_new_tokens=30, **options)
        assert torch.equal(plain_now, fast)


def test_a_head_stops_where_a_rejection_is_likely(models):
    states = tiny_model(layers=1, vocab_size=len(LETTERS) + 1)
    head = AcceptanceHead(64)
    assert chance(head, torch.zeros(64)) == pytest.approx(0.8808, abs=1e-3)
    target = tiny_model(vocab_size=len(WORDS) + 1)
    drafted = []
    for threshold in (0.1, 0.5, 0.99):  # it gives every token 0.88
        drafter = CrossVocabDrafter(states, *tokenizers(), length=8, head=head, threshold=threshold)
        plain, fast = both(target, drafter, prompt(9, vocab_size=7), max_new_tokens=40)
        assert torch.equal(plain, fast)
        drafted.append(report(drafter).draft_forwards / report(drafter).target_forwards)
    assert drafted[0] <= 1 < drafted[1] <= 6 and drafted[1] < drafted[2]


def test_the_weighted_cross_entropy_is_least_at_the_weighted_share():
    accepted, logits = torch.tensor([1.0, 0.0, 0.5]), torch.linspace(-3, 3, 601)[:, None].expand(-1, 3)
    for weight in (1.0, 3.0):
        losses = torch.stack([acceptance_loss(row, accepted, weight) for row in logits])
        best = logits[losses.argmin(), 0].sigmoid()
        assert float(best) == pytest.approx(1.5 / (1.5 + weight * 1.5), abs=0.01)
    with pytest.raises(ValueError, match=r"accepted must be \[3\] like logits, got \[2\]"):
        acceptance_loss(torch.zeros(3), torch.zeros(2))


def test_a_head_learns_what_is_accepted():
    torch.manual_seed(0)
    draft, head = tiny_model(layers=1, vocab_size=len(LETTERS) + 1), AcceptanceHead(8)
    distiller = CrossVocabDistiller(draft, head=head, every=1, lr=1e-2)
    good, bad = torch.randn(2, 8)
    for _ in range(60):
        distiller.add(Example([0, 1], judged=[(good, 1.0), (bad, 0.0)]), Vocabularies(*tokenizers()))
    assert chance(head, good) > 0.8 > 0.2 > chance(head, bad)


def test_the_hybrid_loss_is_reverse_divergence_and_weighted_likelihood():
    torch.manual_seed(0)
    draft_logits, target_logits = torch.randn(5, 5, requires_grad=True), torch.randn(8)
    draft_ids, target_ids = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 4])
    example = Example([0, 1, 0, 1, 2], direct=[(2, target_logits)], merged=[(3, 5)])
    loss = hybrid_loss(draft_logits, example, draft_ids, target_ids, weight=0.3)
    q, p = draft_logits[1][draft_ids].softmax(-1), target_logits[target_ids].softmax(-1)
    log_q = draft_logits.log_softmax(-1)
    expected = (q * (q / p).log()).sum() - 0.3 * (log_q[2, 1] + log_q[3, 2])
    assert torch.isclose(loss, expected / 2)
    loss.backward()
    assert draft_logits.grad[[0, 4]].abs().sum() == 0 < draft_logits.grad[1:4].abs().min(-1).values.max()


def pair_to_train():
    torch.manual_seed(0)
    target = tiny_model(seed=2, layers=2, hidden=32, heads=2, vocab_size=len(WORDS) + 1)
    draft = tiny_model(seed=7, layers=1, hidden=32, heads=2, vocab_size=len(LETTERS) + 1)
    return target, draft


def accepted_share(target, draft, online=None, rounds=6):
    done = []
    for seed in range(rounds):
        drafter = CrossVocabDrafter(draft, *tokenizers(), length=4, online=online)
        plain, fast = both(target, drafter, prompt(9, vocab_size=7, seed=seed % 3), max_new_tokens=50)
        assert torch.equal(plain, fast)
        done.append(report(drafter).tokens_per_forward)
    return done


@pytest.mark.parametrize("lora", [None, 8])
def test_drafts_are_accepted_more_often_the_longer_it_decodes(lora):
    if lora:
        pytest.importorskip("peft")
    target, draft = pair_to_train()
    before = accepted_share(target, draft, rounds=3)
    online = CrossVocabDistiller(draft, lr=2e-3 if lora is None else 1e-2, every=4, lora=lora)
    accepted_share(target, draft, online, rounds=12)
    after = accepted_share(target, draft, rounds=3)
    assert len(online.losses) > 20 and sum(after) > 1.1 * sum(before)


def test_a_draft_learns_from_texts_that_are_there_already():
    target, draft = pair_to_train()
    before = accepted_share(target, draft, rounds=3)
    ids = torch.cat([prompt(9, vocab_size=7, seed=seed) for seed in range(3)])
    rows = target.generate(ids, do_sample=False, max_new_tokens=50)
    distiller = CrossVocabDistiller(draft, lr=2e-3, every=3)
    losses = [distil_cross_vocab(distiller, target, rows, Vocabularies(*tokenizers()))[0] for _ in range(40)]
    assert losses[-1] < 0.8 * losses[0]
    assert sum(accepted_share(target, draft, rounds=3)) > 1.1 * sum(before)


def test_training_leaves_the_targets_text_and_weights_alone():
    target, draft = pair_to_train()
    weights = copy.deepcopy(target.state_dict())
    head = AcceptanceHead(32)
    online = CrossVocabDistiller(draft, head=head, every=2)
    for options in ({"do_sample": True, "top_k": 0}, {"do_sample": False}):
        drafter = CrossVocabDrafter(draft, *tokenizers(), head=head, online=online)
        ids = prompt(9, batch=2, vocab_size=7)
        plain, fast = both(target, drafter, ids, max_new_tokens=20, **options)
        assert options["do_sample"] or torch.equal(plain, fast)
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), target.state_dict().values()))
    assert all(p.grad is None for p in target.parameters()) and online.losses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"verifier": "rrs"}, "verifier must be one of match, reject, got 'rrs'"),
        ({"threshold": 1.0}, r"threshold must be in \(0, 1\), got 1.0"),
    ],
)
def test_numbers_are_checked(models, options, message):
    with pytest.raises(ValueError, match=message):
        drafter_of(models, **options)


def test_a_tokenizer_of_another_model_is_refused(models):
    drafter = CrossVocabDrafter(models[1], greedy_tokenizer(WORDS), greedy_tokenizer(WORDS))
    with pytest.raises(ValueError, match="the draft's tokenizer has 8 tokens, its model 5"):
        both(models[0], drafter, torch.tensor([[2, 6]]))
    with pytest.raises(ValueError, match="online must train the model that drafts"):
        drafter_of(models, online=CrossVocabDistiller(tiny_model(layers=1)))
