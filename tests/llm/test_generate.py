"""The loop inside transformers' generate: everything that plain decoding takes, with drafts."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
)

from draftdiff.hosts.transformers import cache_argument
from draftdiff.llm import Chain, ModelDrafter, PearlDrafter, Sampled, report, speculative
from draftdiff.pipelines.mini.llm import load_mini_llm
from tests.llm.generation import SHAPES, EndsWith, both, family, relative
from tests.llm.rounding import assert_rounded
from tests.llm.tiny_models import VOCABULARY, prompt, tiny_model


@pytest.mark.parametrize("name", ["llama", "mistral sliding", "gemma3_text"])
def test_rows_of_a_padded_batch_advance_on_their_own(name):
    target = family(name)
    ids = prompt(30, batch=3)
    mask = torch.ones_like(ids)
    mask[0, :11] = mask[2, :27] = 0
    drafter = ModelDrafter(relative(target), SHAPES["best"])
    plain, fast = both(target, drafter, ids * mask, attention_mask=mask, max_new_tokens=30)
    assert torch.equal(plain, fast)
    done = report(drafter)
    assert done.rounds < done.tokens and done.target_forwards < done.rounds


@pytest.mark.parametrize("name", ["llama", "mistral sliding", "gemma3_text"])
def test_the_cache_of_a_batch_stays_about_as_long_as_its_longest_row(name):
    class Watching(ModelDrafter):
        def propose(self, context):
            layers = context.target.cache.layers
            longest = max(ids.shape[1] - padding for ids, padding in zip(context.ids, context.padding)) - 1
            for layer in layers:
                most = 2 * layer.window if hasattr(layer, "window") else 1.25 * longest + 16
                assert layer.keys.shape[-2] <= most
            return super().propose(context)

    target = family(name)
    ids = prompt(20, batch=3)
    mask = torch.ones_like(ids)
    mask[1, :15] = 0
    drafter = Watching(relative(target), SHAPES["chain"])
    plain, fast = both(target, drafter, ids * mask, attention_mask=mask, max_new_tokens=120)
    assert torch.equal(plain, fast)


def test_processors_that_know_a_rows_padding_or_number_do_so_for_drafts_too(pair):
    target, draft = pair
    ids = prompt(12, batch=3)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :7] = 0

    def allowed(row, tokens):
        return [i for i in range(1, VOCABULARY) if (i + len(tokens) + row) % 3]

    for options in ({"repetition_penalty": 1.3}, {"prefix_allowed_tokens_fn": allowed}):
        for rows in (slice(None), slice(1)):
            drafter, given = ModelDrafter(draft, SHAPES["best"]), {"attention_mask": mask[rows], **options}
            plain, fast = both(target, drafter, (ids * mask)[rows], **given)
            assert torch.equal(plain, fast)
            assert not torch.equal(plain, target.generate(ids[rows], max_new_tokens=24, do_sample=False))


def test_rows_that_end_early_leave_an_output_of_its_own(pair):
    target, draft = pair
    ids = prompt(12, batch=2)
    end = target.generate(ids, do_sample=False, max_new_tokens=6)[:, -1].tolist()
    _, fast = both(target, ModelDrafter(draft), ids, max_new_tokens=400, eos_token_id=end)
    assert fast.shape[1] <= 18 and fast.is_contiguous()


@pytest.mark.parametrize("make", [lambda draft: ModelDrafter(draft, SHAPES["best"]), PearlDrafter])
def test_a_draft_whose_positions_end_proposes_nothing_from_there_on(pair, make):
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model("gpt2", vocab_size=VOCABULARY, max_position_embeddings=24, **sizes)
    drafter = make(AutoModelForCausalLM.from_config(config).eval())
    plain, fast = both(pair[0], drafter, prompt(12), max_new_tokens=40)
    assert torch.equal(plain, fast) and report(drafter).draft_forwards > 4
    for length in (24, 25, 30):
        plain, fast = both(pair[0], drafter, prompt(length))
        assert torch.equal(plain, fast) and report(drafter).draft_forwards == 0


def test_the_drafts_cache_is_let_go_at_the_end(pair):
    drafter = ModelDrafter(pair[1])
    both(pair[0], drafter, prompt(6))
    assert not any(isinstance(x, torch.Tensor) or hasattr(x, "cache") for x in vars(drafter).values())


@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_ends_at_the_end_token_in_the_middle_of_a_tree(pair, shape):
    target, draft = pair
    ids = prompt(12, batch=2)
    plain = target.generate(ids, do_sample=False, max_new_tokens=30)
    end = int(plain[0, 12 + 9])
    plain, fast = both(target, ModelDrafter(draft, SHAPES[shape]), ids, max_new_tokens=30, eos_token_id=end)
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("sampler", ["with_replacement", "without_replacement", "greedy"])
def test_a_token_that_the_draft_does_not_have_may_be_forced(pair, sampler):
    target = tiny_model(vocab_size=128)
    draft = tiny_model(vocab_size=64)
    verifier = "greedy" if sampler == "greedy" else "rrs"
    drafter = ModelDrafter(draft, Sampled((3, 2, 1), sampler, verifier))
    options = {"do_sample": True, "forced_eos_token_id": 100, "max_new_tokens": 6}
    out = target.generate(prompt(6, vocab_size=64), custom_generate=speculative, drafter=drafter, **options)
    assert out[0, -1] == 100


@pytest.mark.parametrize("shape", SHAPES)
def test_the_target_may_write_tokens_that_the_draft_does_not_have(shape):
    target = tiny_model(vocab_size=128)
    plain, fast = both(target, ModelDrafter(tiny_model(vocab_size=64), SHAPES[shape]), prompt(6, vocab_size=128))
    assert plain.max() >= 64 and torch.equal(plain, fast)


@pytest.mark.parametrize("size", [VOCABULARY + 1, VOCABULARY + 1023, 2000])
def test_vocabularies_may_differ_by_added_tokens_or_whatever_one_takes_for_granted(pair, size):
    for make in (ModelDrafter, PearlDrafter):
        drafter = make(tiny_model(vocab_size=size), same_tokenizer=size == 2000)
        plain, fast = both(pair[0], drafter, prompt(9))
        assert torch.equal(plain, fast)


def test_more_branches_than_tokens_are_all_of_them():
    small = tiny_model(vocab_size=8)
    plain, fast = both(small, ModelDrafter(small, Sampled((9, 1))), prompt(6, vocab_size=8))
    assert torch.equal(plain, fast)


def test_own_stopping_criteria_see_every_token(pair):
    target, draft = pair
    plain = target.generate(prompt(12), do_sample=False, max_new_tokens=30)
    criteria = StoppingCriteriaList([EndsWith(plain[0, 20:22].tolist())])
    plain, fast = both(target, ModelDrafter(draft), prompt(12), stopping_criteria=criteria)
    assert torch.equal(plain, fast) and plain.shape[1] == 22


def test_the_text_may_grow_far_below_its_limit(pair):
    target, draft = pair
    plain = target.generate(prompt(12), do_sample=False, max_new_tokens=600)
    criteria = StoppingCriteriaList([EndsWith(plain[0, 590:592].tolist())])
    plain, fast = both(
        target, ModelDrafter(draft, SHAPES["best"]), prompt(12), max_new_tokens=10**12, stopping_criteria=criteria
    )
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_no_token_too_many(pair, limit):
    target, draft = pair
    plain, fast = both(target, ModelDrafter(draft, Chain(4)), prompt(7), max_new_tokens=limit)
    assert torch.equal(plain, fast) and fast.shape[1] == 7 + limit


def test_logits_processors_see_the_tokens_of_their_branch(pair):
    target, draft = pair
    for shape in SHAPES.values():
        options = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "min_new_tokens": 6, "eos_token_id": 5}
        plain, fast = both(target, ModelDrafter(draft, shape), prompt(12), max_new_tokens=40, **options)
        assert torch.equal(plain, fast)


def test_stop_strings_are_found_in_the_middle_of_a_tree():
    target, draft, tokenizer = load_mini_llm()
    ids = tokenizer("def __init__(self", return_tensors="pt").input_ids
    whole = target.generate(ids, do_sample=False, max_new_tokens=30)[0]
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [tokenizer.decode(whole[-9:-6])])])
    plain, fast = both(target, ModelDrafter(draft, SHAPES["best"]), ids, stopping_criteria=criteria, max_new_tokens=30)
    assert torch.equal(plain, fast) and fast.shape[1] < len(whole)


class Words:
    """The least of a tokenizer that a streamer needs."""

    def decode(self, ids, **kwargs):
        return " ".join(str(int(i)) for i in ids) + " "


def test_a_streamer_gets_every_token_and_the_end(pair):
    target, draft = pair
    streamer = TextIteratorStreamer(Words(), skip_prompt=True, timeout=5)
    _, fast = both(target, ModelDrafter(draft), prompt(6), max_new_tokens=9)
    target.generate(
        prompt(6),
        do_sample=False,
        max_new_tokens=9,
        custom_generate=speculative,
        drafter=ModelDrafter(draft),
        streamer=streamer,
    )
    assert "".join(streamer).split() == [str(i) for i in fast[0, 6:].tolist()]


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_cache_may_hold_a_part_of_the_prompt_already(name):
    target = family(name)
    ids = prompt(30)
    plain = target.generate(ids, do_sample=False, max_new_tokens=20)
    for held in (1, 20, 29):
        cache = DynamicCache(config=target.config)
        argument = cache_argument(target)
        target(ids[:, :held], **{argument: cache})
        drafter = ModelDrafter(relative(target), SHAPES["best"])
        options = {"do_sample": False, "max_new_tokens": 20, argument: cache}
        fast = target.generate(ids, custom_generate=speculative, drafter=drafter, **options)
        assert torch.equal(plain, fast)


def test_the_returned_cache_holds_all_but_the_last_token_and_goes_on(pair):
    target, draft = pair
    out = target.generate(
        prompt(12),
        do_sample=False,
        max_new_tokens=15,
        custom_generate=speculative,
        drafter=ModelDrafter(draft, SHAPES["best"]),
        return_dict_in_generate=True,
    )
    cache = getattr(out, cache_argument(target))
    assert cache.get_seq_length() == out.sequences.shape[1] - 1
    more = target.generate(out.sequences, do_sample=False, max_new_tokens=8, **{cache_argument(target): cache})
    assert torch.equal(more, target.generate(prompt(12), do_sample=False, max_new_tokens=23))


def test_the_cache_of_a_batch_has_gaps_and_is_not_returned(pair):
    options = {"return_dict_in_generate": True, "custom_generate": speculative, "drafter": ModelDrafter(pair[1])}
    out = pair[0].generate(prompt(12, batch=2), do_sample=False, max_new_tokens=9, **options)
    assert getattr(out, cache_argument(pair[0])) is None


def test_scores_and_logits_are_those_of_plain_decoding(pair):
    target, draft = pair
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.2}
    plain, fast = both(target, ModelDrafter(draft, SHAPES["best"]), prompt(12), **options)
    for name in ("scores", "logits"):
        a, b = torch.cat(getattr(plain, name)), torch.cat(getattr(fast, name))
        assert torch.equal(a.isneginf(), b.isneginf())
        assert_rounded(a.nan_to_num(neginf=0), b.nan_to_num(neginf=0), target, plain.sequences)


def test_a_prompt_in_chunks_is_the_same_prompt(pair):
    target, draft = pair
    plain = target.generate(prompt(30), do_sample=False, max_new_tokens=12)
    _, fast = both(target, ModelDrafter(draft), prompt(30), max_new_tokens=12, prefill_chunk_size=7)
    assert torch.equal(plain, fast)


def test_a_perfect_draft_is_always_accepted(pair):
    target, _ = pair
    drafter = ModelDrafter(target, Chain(4))
    both(target, drafter, prompt(12), max_new_tokens=25)
    done = report(drafter)
    assert done.acceptance == [1, 1, 1, 1]
    assert (done.tokens, done.target_forwards, done.tokens_per_forward) == (25, 5, 5)
    assert done.draft_forwards == 4 * 5
    assert done.mbsu == pytest.approx(5 / (4 + 1))
    for key in ("tokens_per_forward", "mbsu", "acceptance", "seconds"):
        assert key in done.to_dict()
    assert "25 tokens in 5 target forwards" in str(done)


def test_a_draft_of_the_end_token_counts_as_accepted(pair):
    target, _ = pair
    plain = target.generate(prompt(12), do_sample=False, max_new_tokens=30)
    drafter = ModelDrafter(target, Chain(4))
    both(target, drafter, prompt(12), eos_token_id=int(plain[0, 12 + 2]))
    assert (report(drafter).tokens, report(drafter).acceptance) == (3, [1, 1, 1])


def test_an_unsure_draft_stops_early(pair):
    target, draft = pair
    fixed, adaptive = ModelDrafter(draft, Chain(8)), ModelDrafter(draft, Chain(8, confidence=0.5))
    for drafter in (fixed, adaptive):
        both(target, drafter, prompt(12), max_new_tokens=60)
    assert report(adaptive).draft_forwards < report(fixed).draft_forwards
    share = [report(d).tokens / report(d).drafted for d in (fixed, adaptive)]
    assert share[1] > share[0]


def test_allowed_tokens_are_asked_for_row_0_whatever_the_drafts(pair):
    target, draft = pair
    for shape in SHAPES.values():
        options = {"prefix_allowed_tokens_fn": lambda row, ids: [[5, 9, 11, 20, 33]][row]}
        plain, fast = both(target, ModelDrafter(draft, shape), prompt(12), **options)
        assert torch.equal(plain, fast)


def test_the_hosts_own_assisted_decoding_goes_wrong_where_ours_does_not(pair):
    """With a cache that holds a part of the prompt the host feeds the whole prompt again (transformers 5.8 to 5.24).
    When this fails the host has been mended, and the README may say so."""
    target, draft = pair
    ids = prompt(30)
    plain = target.generate(ids, do_sample=False, max_new_tokens=12)

    def from_cache(**options):
        cache = DynamicCache(config=target.config)
        target(ids[:, :20], **{cache_argument(target): cache})
        return target.generate(ids, do_sample=False, max_new_tokens=12, **{cache_argument(target): cache}, **options)

    assert torch.equal(from_cache(), plain)
    assert torch.equal(from_cache(custom_generate=speculative, drafter=ModelDrafter(draft)), plain)
    unused = next(token for token in range(VOCABULARY) if token not in plain[0, 30:])
    assert not torch.equal(from_cache(prompt_lookup_num_tokens=3, eos_token_id=unused), plain)


class Counting(LogitsProcessor):
    """Allows other tokens each time it is called, whatever the text."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        allowed = [(self.calls * 7 + i) % VOCABULARY for i in range(20)]
        self.calls += 1
        return torch.full_like(scores, -torch.inf).index_copy(1, torch.tensor(allowed), scores[:, allowed])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_processor_of_ones_own_may_keep_state(pair, shape):
    """It is called once a token, in order; drafts do not see it."""
    plain = pair[0].generate(prompt(12), do_sample=False, max_new_tokens=24, logits_processor=[Counting()])
    assert not torch.equal(plain, pair[0].generate(prompt(12), do_sample=False, max_new_tokens=24))
    counting = Counting()
    options = {"do_sample": False, "max_new_tokens": 24, "logits_processor": [counting]}
    drafter = ModelDrafter(pair[1], SHAPES[shape])
    assert torch.equal(plain, pair[0].generate(prompt(12), custom_generate=speculative, drafter=drafter, **options))
    assert counting.calls == 24 and report(drafter).draft_forwards > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_that_has_ended_is_drafted_for_no_more(pair, shape):
    """The draft's distributions of such a row are none, also where processors would see them."""
    target, draft = pair
    ids = prompt(12, batch=2)
    options = {"repetition_penalty": 1.2, "max_new_tokens": 30}
    plain = target.generate(ids, do_sample=False, **options)
    end = int(plain[0, 14])
    drafter = ModelDrafter(draft, SHAPES[shape])
    plain, fast = both(target, drafter, ids, eos_token_id=end, **options)
    assert torch.equal(plain, fast)
    lengths = [row.tolist().index(end) + 1 if end in row else 30 for row in plain[:, 12:]]
    assert min(lengths) == 3 < max(lengths)
    done = report(drafter)
    assert done.tokens == sum(lengths) and done.rounds < done.tokens < done.rounds + done.drafted


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "ids", [[[5, 6, 7, 0]], [[5, 0, 0]], [[0]], [[0, 5, 0]], [[5, 6, 7, 0], [0, 5, 6, 7]], [[0, 0], [5, 0]]], ids=str
)
def test_a_prompt_may_hold_the_padding_token_anywhere_if_no_mask_is_given(pair, shape, ids):
    """generate then guesses a mask that hides it, also the last one."""
    plain, fast = both(pair[0], ModelDrafter(pair[1], SHAPES[shape]), torch.tensor(ids))
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("name", ["mistral sliding", "gemma3_text"])
def test_windows_count_the_padding_in_the_middle_of_a_prompt(name):
    target = family(name)
    ids = prompt(30, batch=2)
    ids[0, 12:20] = ids[1, 25:] = 0
    plain, fast = both(target, ModelDrafter(relative(target), SHAPES["best"]), ids, max_new_tokens=30)
    assert torch.equal(plain, fast)
