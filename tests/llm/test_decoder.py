"""What a drafter is shown of its target: hidden states and keys of just the tokens that were committed."""

import pytest
import torch
from transformers import DynamicCache

from draftdiff.errors import UserError
from draftdiff.hosts.transformers import cache_argument
from draftdiff.llm import speculative
from draftdiff.llm.drafters.base import Reads
from draftdiff.llm.tree import ROOT, Tree
from tests.llm.generation import both, family
from tests.llm.rounding import assert_rounded
from tests.llm.tabular import tabular_model
from tests.llm.tiny_models import prompt, tiny_hybrid


class Reader:
    """Proposes two next tokens, of which one is often right; keeps what it is shown."""

    forwards = 0

    def __init__(self, reads, layer=-1):
        self.reads, self.layer = reads, layer

    def begin(self, context):
        self.rounds, self.ended = [], False

    def end(self):
        self.ended = True

    def cost(self, target):
        return 0.0

    def propose(self, context):
        target = context.target
        held = target.committed(self.layer)
        if held is not None:
            keys, values, valid = (x.clone() for x in held)
            held = [(keys[row][:, valid[row]], values[row][:, valid[row]]) for row in range(len(valid))]
        self.rounds.append((list(target.states), held, [ids.shape[1] for ids in context.ids]))
        return [
            Tree([int(ids[0, -1]), 7], [ROOT, ROOT]) if left > 0 else Tree()
            for ids, left in zip(context.ids, context.room)
        ]


LAYERS = [(-1,), (1,), (0, 2, 3)]
PADDING = torch.tensor([0, 5, 11])


def padded(length=12):
    ids = prompt(length, batch=3)
    return ids, (torch.arange(length) >= PADDING[:, None]).long()


@pytest.mark.parametrize("layers", LAYERS, ids=str)
@pytest.mark.parametrize("whole", [True, False], ids=["prompt", "last"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_a_drafter_is_shown_the_states_of_each_rows_committed_tokens(layers, whole, chunk):
    target = family("llama")
    ids, mask = padded()
    drafter = Reader(Reads(layers, prompt=whole))
    given = {"attention_mask": mask, "max_new_tokens": 30, "prefill_chunk_size": chunk}
    plain, fast = both(target, drafter, ids * mask, **given)
    assert torch.equal(plain, fast) and drafter.ended
    for row, padding in enumerate(PADDING.tolist()):
        text = fast[row : row + 1, padding:]
        found = target(text, output_hidden_states=True).hidden_states
        expected = torch.cat([found[layer] for layer in layers], dim=-1)[0]
        seen = torch.cat([states[row] for states, _, _ in drafter.rounds if states[row].numel()])
        start = 0 if whole else max(ids.shape[1] - padding - 2, 0)
        assert len(seen) >= 24
        assert_rounded(seen, expected[start : start + len(seen)], target, text)


@pytest.mark.parametrize("name", ["llama", "mistral sliding"])
def test_a_drafter_reaches_the_targets_keys_of_the_committed_tokens(name):
    target = family(name)
    ids, mask = padded()
    drafter = Reader(Reads())
    plain, fast = both(target, drafter, ids * mask, attention_mask=mask, max_new_tokens=40)
    assert torch.equal(plain, fast)
    for row, padding in enumerate(PADDING.tolist()):
        cache = DynamicCache()
        with torch.no_grad():
            target(fast[row : row + 1, padding:], **{cache_argument(target): cache})
        whole = cache.layers[-1]
        for _, held, lengths in drafter.rounds[:: len(drafter.rounds) // 5]:
            keys, values = held[row]
            last = min(lengths[row], fast.shape[1]) - padding - 1
            assert name == "mistral sliding" or keys.shape[1] == last
            for got, expected in ((keys, whole.keys), (values, whole.values)):
                part = expected[0, :, last - got.shape[1] : last]
                torch.testing.assert_close(got, part, atol=1e-4 * float(expected.abs().max()), rtol=0)


def test_what_a_cache_holds_already_is_refused_to_who_reads_the_prompt_and_not_to_others():
    target = family("llama")
    ids = prompt(12)
    for held in (4, 11):
        cache = DynamicCache()
        target(ids[:, :held], **{cache_argument(target): cache})
        given = {"custom_generate": speculative, "pace": None, "max_new_tokens": 6, cache_argument(target): cache}
        with pytest.raises(UserError, match=f"states of the whole prompt, got a cache that holds {held}"):
            target.generate(ids, drafter=Reader(Reads((-1,), prompt=True)), **given)
        drafter = Reader(Reads((-1,)))
        target.generate(ids, drafter=drafter, do_sample=False, **given)
        assert len(drafter.rounds[0][0][0]) == (held < 11)


def test_models_without_what_is_read_are_refused_in_one_line():
    target = tabular_model()
    target.forward = lambda *args, output_hidden_states=None, **kwargs: type(target).forward(target, *args, **kwargs)
    with pytest.raises(UserError, match="TabularModel returns no hidden states"):
        target.generate(prompt(4, vocab_size=8), custom_generate=speculative, drafter=Reader(Reads((-1,))))
    with pytest.raises(UserError, match="layer 0 of Qwen3NextForCausalLM keeps no keys"):
        tiny_hybrid().generate(prompt(4), custom_generate=speculative, drafter=Reader(Reads(), layer=0))
