"""SpecPC's selection by hand, its scores against the host's attention maps, and the cascade with SpecKV."""

import pytest
import torch

from draftdiff.hosts.transformers import cache_argument
from draftdiff.llm import SpecKVConfig, SpecPCConfig, speckv, speckv_pc, specpc
from draftdiff.llm.spec_pc import counted_layers, observed, select_tokens
from tests.llm.tiny_models import FAMILIES, prompt, tiny_model

SMALL = SpecPCConfig(capacity=20, window=5, kernel=4)
NEEDLE = 95


def scores(tokens, **given):
    made = torch.zeros(tokens)
    for index, value in given.items():
        made[int(index[1:])] = value
    return made


@pytest.mark.parametrize(
    ("importance", "capacity", "kernel", "expected"),
    [
        # A peak, then those around it, nearest and left first; 14 and 15 are the window.
        (scores(16, t6=1.0), 3, 3, [6, 14, 15]),
        (scores(16, t6=1.0), 4, 3, [5, 6, 14, 15]),
        (scores(16, t6=1.0), 5, 3, [5, 6, 7, 14, 15]),
        # An even kernel reaches one further to the right: 5, 6, 7 and 8.
        (scores(16, t6=1.0), 6, 4, [5, 6, 7, 8, 14, 15]),
        # Once 6 and its own neighbours are in, its neighbours are next, as pooling made them as important: 5 brings 4.
        (scores(16, t6=1.0), 6, 3, [4, 5, 6, 7, 14, 15]),
        # The higher peak comes first, whichever side it is on; the other gets what is left.
        (scores(16, t3=1.0, t10=2.0), 6, 3, [8, 9, 10, 11, 14, 15]),
        (scores(16, t3=1.0, t10=2.0), 8, 3, [3, 8, 9, 10, 11, 12, 14, 15]),
        # Nothing is before the first token or after the last.
        (scores(16, t0=1.0), 5, 5, [0, 1, 2, 14, 15]),
        (scores(16, t15=1.0, t14=2.0), 5, 5, [11, 12, 13, 14, 15]),
        # A kernel of one keeps single tokens, by importance; of equals the first.
        (scores(16, t4=1.0, t9=3.0, t2=2.0), 4, 1, [2, 9, 14, 15]),
        (scores(16), 5, 1, [0, 1, 2, 14, 15]),
        # The window is all there is room for.
        (scores(16, t6=1.0), 2, 3, [14, 15]),
        # What fits is kept whole.
        (scores(5, t1=1.0), 5, 3, [0, 1, 2, 3, 4]),
        (scores(5, t1=1.0), 9, 3, [0, 1, 2, 3, 4]),
    ],
)
def test_the_selection_is_the_written_out_list(importance, capacity, kernel, expected):
    assert select_tokens(importance, SpecPCConfig(capacity=capacity, window=2, kernel=kernel)).tolist() == expected


def test_any_selection_is_sorted_unique_full_and_has_the_window():
    for seed in range(20):
        torch.manual_seed(seed)
        chosen = select_tokens(torch.rand(100).round(decimals=1), SMALL)
        assert chosen.dtype == torch.int64 and len(chosen) == 20
        assert chosen.tolist() == sorted(set(chosen.tolist())) and chosen[-5:].tolist() == [95, 96, 97, 98, 99]


def expected_scores(draft, ids, config):
    """From the host's attention maps: later queries of the window count for more, those of the draft's tokens fully."""
    draft.set_attn_implementation("eager")
    tokens = ids.shape[1]
    count = config.lookahead
    said = draft.generate(ids, max_new_tokens=count, do_sample=False)
    with torch.no_grad():
        maps = draft(said[:, :-1], output_attentions=True).attentions
    most = torch.zeros(tokens)
    for layer in sorted(counted_layers(draft, config.start)):
        for query in range(tokens - config.window, tokens + count - 1):
            place = query - (tokens - config.window)
            weight = place / (config.window - 1) if query < tokens else 1.0
            most = torch.maximum(most, weight * maps[layer][0, :, query, :tokens].amax(0))
    return most


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 4])
def test_tokens_are_chosen_by_the_drafts_attention(family, count):
    draft, ids = tiny_model(family), prompt(60)
    config = SpecPCConfig(capacity=20, window=5, kernel=4, lookahead=count)
    keep = specpc(draft, ids, config)
    assert keep.tolist() == select_tokens(expected_scores(draft, ids, config), config).tolist()


def test_a_soft_cap_bounds_the_scores():
    draft, ids = tiny_model("gemma2", layers=4), prompt(60)
    config = SpecPCConfig(capacity=20, window=5, kernel=1)
    loose = specpc(draft, ids, config)
    for layer in draft.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.05  # nearly uniform
    keep = specpc(draft, ids, config)
    assert keep.tolist() == select_tokens(expected_scores(draft, ids, config), config).tolist() != loose.tolist()


def test_full_attention_counts_alone_where_there_is_any_from_the_start_on():
    assert counted_layers(tiny_model(layers=6), 1 / 3) == {2, 3, 4, 5}
    assert counted_layers(tiny_model(layers=1), 0.9) == {0}
    assert counted_layers(tiny_model("gemma2", layers=6), 1 / 3) == {3, 5}
    assert counted_layers(tiny_model("gemma2", layers=3), 0.7) == {2}
    assert counted_layers(tiny_model("mistral sliding"), 0) == {0, 1, 2}


def test_what_fits_is_kept_whole_without_the_drafts_work():
    draft = tiny_model()
    draft.forward = None
    assert specpc(draft, prompt(20), SMALL).tolist() == list(range(20))
    assert specpc(draft, prompt(1), SMALL).tolist() == [0]


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral sliding"])
@pytest.mark.parametrize("count", [1, 4])
def test_padded_rows_keep_what_they_would_alone(family, count):
    draft = tiny_model(family)
    config = SpecPCConfig(capacity=20, window=5, kernel=4, lookahead=count)
    rows = [prompt(60), prompt(41, seed=1), prompt(15, seed=2), prompt(3, seed=3)]
    ids = torch.cat([torch.nn.functional.pad(row, (60 - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (60 - row.shape[1], 0)) for row in rows])
    together = specpc(draft, ids, config, attention_mask=mask)
    assert isinstance(together, list)
    for row, keep in zip(rows, together):
        pad = 60 - row.shape[1]
        assert (keep - pad).tolist() == specpc(draft, row, config).tolist()
    fitting = specpc(draft, ids[2:], config, attention_mask=mask[2:])
    assert [keep.tolist() for keep in fitting] == [list(range(45, 60)), list(range(57, 60))]


def test_what_follows_an_end_of_sequence_does_not_count():
    draft, both = tiny_model(), prompt(60, batch=2)
    said = draft.generate(both, max_new_tokens=6, do_sample=False)[:, 60:].tolist()
    end = next(i for i in range(1, 5) if said[0][i] not in said[0][:i] + said[1])
    draft.generation_config.eos_token_id = said[0][end]
    kept = observed(draft, both, torch.ones_like(both), SpecPCConfig(20, 5, 4, lookahead=6), 96)[0]
    draft.generation_config.eos_token_id = None
    # All but the last of the draft's tokens count, and the end of sequence, which is read, counts.
    assert kept[0].tolist() == specpc(draft, both[:1], SpecPCConfig(20, 5, 4, lookahead=end + 2)).tolist()
    assert kept[1].tolist() == specpc(draft, both[1:], SpecPCConfig(20, 5, 4, lookahead=6)).tolist()


def needle_model():
    """One layer whose every query looks for the needle: constant queries, and keys that are large for it alone, along
    the dimension that the rotation turns least."""
    model = tiny_model("qwen2", layers=1)
    attention, slow = model.model.layers[0].self_attn, 16 // 2 - 1
    with torch.no_grad():
        for projection, heads in ((attention.q_proj, 4), (attention.k_proj, 2)):
            projection.weight.zero_()
            projection.bias.zero_()
            for head in range(heads):
                if projection is attention.q_proj:
                    projection.bias[16 * head + slow] = 10
                else:
                    projection.weight[16 * head + slow, 0] = 10
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[NEEDLE, 0] = 5
    return model


@pytest.mark.parametrize("place", [0, 1, 77, 190])
def test_a_needle_is_found(place):
    model, ids = needle_model(), prompt(200, vocab_size=NEEDLE)
    ids[0, place] = NEEDLE
    keep = specpc(model, ids, SpecPCConfig(capacity=12, window=8, kernel=3, start=0.0))
    assert {i for i in (place - 1, place, place + 1) if i >= 0} <= set(keep.tolist())
    config = SpecKVConfig(capacity=12, window=8, kernel=3, lookahead=2)
    _, info = speckv(model, model, ids, config, return_indices=True)
    assert bool((info.indices[0] == place).any(-1).all())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_cascade_is_speckv_on_what_specpc_left(family):
    model, draft, ids = tiny_model(family), tiny_model(family, layers=2, seed=1), prompt(120)
    compress, evict = SpecPCConfig(capacity=50, window=5, kernel=4, lookahead=6), SpecKVConfig(capacity=20, window=5)
    short, cache, info = speckv_pc(model, draft, ids, evict, compress, return_indices=True)
    keep = specpc(draft, ids, compress)
    assert info.prompt_indices.tolist() == keep.tolist() and torch.equal(short, ids[:, keep])
    assert (info.logical, info.physical, cache.get_seq_length()) == (49, 20, 49)
    said = draft.generate(ids, max_new_tokens=6, do_sample=False)[:, 120:]
    assert torch.equal(info.lookahead, said)  # of the whole prompt
    assert info.to_dict()["prompt_indices"] == keep.tolist()

    def go_on(prompt_ids, past):
        return model.generate(prompt_ids, max_new_tokens=8, do_sample=False, **{cache_argument(model): past})

    # With room for all that SpecPC left, what is generated is the shorter prompt's own continuation.
    roomy = speckv_pc(model, draft, ids, SpecKVConfig(capacity=50, window=5), compress)
    assert torch.equal(go_on(roomy[0], roomy[1]), model.generate(short, max_new_tokens=8, do_sample=False))
    assert go_on(short, cache).shape == (1, 58)


def test_a_short_prompt_goes_straight_to_speckv():
    model, ids = tiny_model(), prompt(40)
    compress, evict = SpecPCConfig(capacity=50, window=5, lookahead=4), SpecKVConfig(capacity=20, window=5)
    short, _, info = speckv_pc(model, model, ids, evict, compress, return_indices=True)
    _, plain = speckv(model, model, ids, SpecKVConfig(capacity=20, window=5, lookahead=4), return_indices=True)
    assert torch.equal(short, ids) and torch.equal(info.lookahead, plain.lookahead)
    assert all(torch.equal(kept, plain.indices[layer]) for layer, kept in info.indices.items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"capacity": 8, "window": 9}, "capacity must be at least the window of 9, got 8"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"kernel": 0}, "kernel must be at least 1, got 0"),
        ({"lookahead": 0}, "lookahead must be at least 1, got 0"),
        ({"start": 1.0}, "start must be a share of the depth, at least 0 and below 1, got 1.0"),
        ({"start": 8}, "start must be a share of the depth, at least 0 and below 1, got 8"),
    ],
)
def test_settings_out_of_range_are_errors(given, message):
    with pytest.raises(ValueError, match=message):
        SpecPCConfig(**given)


def test_a_users_mistakes_are_errors_of_one_line():
    model = tiny_model()
    for call, message in (
        (lambda: specpc(model, prompt(0)), "at least one token, got ids of shape"),
        (lambda: specpc(model, torch.full((1, 9), 96)), "from 0 to 95, the vocabulary of LlamaForCausalLM, got 96"),
        (lambda: speckv_pc(model, model, prompt(60, batch=2)), "one prompt at a time, got 2"),
        (
            lambda: speckv_pc(model, tiny_model(vocab_size=2000), prompt(60)),
            "vocabulary of 2000 tokens is not the target",
        ),
        (lambda: speckv_pc(model, model, prompt(60), SpecKVConfig(lookahead=4)), "lookahead of evict must be None"),
        (lambda: speckv_pc(model, model, prompt(9), SpecKVConfig(capacity=4096)), "of compress, 2048, got 4096"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)
