import random
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file

from draftdiff.errors import UserError
from draftdiff.llm import NGramCandidates, NGramDrafter, NGramTable, assisted, report, speculative
from draftdiff.llm.tree import ROOT
from tests.llm.tabular import tabular_model

SEARCHES = ("best_first", "puct")


def test_a_corpus_gives_shares_of_what_followed():
    table = NGramTable([[1, 2, 3, 1, 2, 3, 1, 2, 4]])
    assert table.follow(1, 2) == [(pytest.approx(2 / 3), 3), (pytest.approx(1 / 3), 4)]
    assert table.follow(2, 1) == []


def test_only_the_most_frequent_successors_are_kept():
    table = NGramTable([[1, 2, c] for c in (5, 5, 5, 6, 6, 7)], successors=2)
    assert [token for _, token in table.follow(1, 2)] == [5, 6]
    assert table.follow(1, 2)[0][0] == pytest.approx(0.5)


def test_every_step_adds_to_the_last_trigrams_up_to_a_ceiling():
    table = NGramTable(rate=0.04, window=4, ceiling=0.1)
    for _ in range(2):
        table.learn_step([9, 9, 9, 1, 2, 3])
    assert table.follow(9, 1) == [(pytest.approx(0.08), 2)]
    assert table.follow(1, 2) == [(pytest.approx(0.08), 3)]
    assert table.follow(9, 9) == []  # out of the window
    table.learn_step([1, 2, 3])
    assert table.follow(1, 2) == [(0.1, 3)]


def test_a_prompt_counts_as_if_decoded():
    table = NGramTable(rate=0.04, window=16)
    table.learn_prompt([1, 2, 3])
    assert table.follow(1, 2) == [(pytest.approx(0.04 * 14), 3)]


def test_the_table_stays_bounded_and_forgets_what_was_seen_longest_ago():
    table = NGramTable(max_pairs=100, successors=3)
    draws = random.Random(0)
    for _ in range(300):
        table.learn_step([draws.randrange(50) for _ in range(16)])
    assert len(table) == 100
    assert max(len(table.follow(a, b)) for a in range(50) for b in range(50)) <= 3
    table.learn_step([1, 1, 7])
    for a in range(99):
        table.learn_step([60, a, a])
    assert table.follow(1, 1)
    table.learn_step([70, 1, 1])
    assert not table.follow(1, 1)


def test_a_new_successor_takes_the_place_of_the_lightest():
    table = NGramTable(successors=2)
    for token in (5, 5, 6, 7):
        table.learn_step([1, 2, token])
    assert [token for _, token in table.follow(1, 2)] == [5, 7]


def test_a_saved_table_is_the_same_table(tmp_path):
    table = NGramTable([[1, 2, 3, 1, 2, 4]])
    table.learn_step([5, 6, 7])
    table.save(tmp_path / "table.safetensors")
    again = NGramTable.load(tmp_path / "table.safetensors")
    for pair in ((1, 2), (2, 3), (5, 6)):
        assert again.follow(*pair) == table.follow(*pair)
    assert [file.name for file in tmp_path.iterdir()] == ["table.safetensors"]


def doubles(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": doubles(0.5)}, "2 trigrams have 1 weights"),
        ({"weights": doubles(0.5, torch.nan)}, "its weights must be positive numbers"),
        ({"weights": doubles(0.5, torch.inf)}, "its weights must be positive numbers"),
        ({"weights": doubles(0.5, -1)}, "its weights must be positive numbers"),
        ({"weights": doubles(0.5, 1).float()}, "weights is torch.float32 [2] instead of torch.float64 [any]"),
        ({"trigrams": torch.tensor([[1, 2, 3], [1, -2, 4]])}, "its ids go from -2 to 4"),
        ({"trigrams": torch.tensor([[1, 2, 3], [1, 2, 2**32]])}, "its ids go from 1 to 4294967296"),
        ({"trigrams": torch.ones(2, 4).long()}, "trigrams is torch.int64 [2, 4] instead of torch.int64 [any, 3]"),
        ({"trigrams": torch.ones(2, 3)}, "trigrams is torch.float32 [2, 3] instead of torch.int64 [any, 3]"),
        ({"trigrams": None}, "it lacks trigrams"),
    ],
)
def test_a_file_of_another_program_is_no_table(tmp_path, change, said):
    tensors = {"trigrams": torch.tensor([[1, 2, 3], [1, 2, 2**32 - 1]]), "weights": doubles(0.5, 1)}
    save_file(tensors, tmp_path / "table")
    assert NGramTable.load(tmp_path / "table").follow(1, 2) == [(1.0, 2**32 - 1), (0.5, 3)]
    save_file({name: t for name, t in (tensors | change).items() if t is not None}, tmp_path / "table")
    with pytest.raises(UserError) as error:
        NGramTable.load(tmp_path / "table")
    assert f"{tmp_path / 'table'} is not a readable saved n-gram table: {said}" in str(error.value)


def test_a_damaged_table_and_one_that_is_nowhere_are_named(tmp_path):
    NGramTable([[1, 2, 3]]).save(tmp_path / "table")
    (tmp_path / "half").write_bytes((tmp_path / "table").read_bytes()[:-5])
    with pytest.raises(UserError, match="half is not a readable saved n-gram table "):
        NGramTable.load(tmp_path / "half")
    with pytest.raises(FileNotFoundError, match=r"no saved n-gram table at .*nowhere$"):
        NGramTable.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a folder, not a saved n-gram table"):
        NGramTable.load(tmp_path)


def test_a_table_is_loaded_into_the_room_that_it_gets(tmp_path):
    table = NGramTable([[1, 2, c] for c in (5, 5, 5, 6, 6, 7)])
    for a in range(9):
        table.learn_step([20 + a, 3, 4])
    table.learn_step([1, 2, 8])
    table.save(tmp_path / "table")
    again = NGramTable.load(tmp_path / "table", max_pairs=4, successors=2)
    assert len(again) == 4 and again.follow(1, 2) == table.follow(1, 2)[:2]
    assert not again.follow(25, 3) and again.follow(28, 3)  # those seen last stay
    assert again.largest == 28
    again.learn_step([1, 2, 9])
    assert [token for _, token in again.follow(1, 2)] == [5, 9]


def most_memory(work):
    tracemalloc.start()
    work()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def test_memory_is_bounded_while_a_long_text_is_learned():
    draws = random.Random(0)
    text = [draws.randrange(30_000) for _ in range(20_000)]
    table = NGramTable(max_pairs=100)
    assert most_memory(lambda: table.learn_prompt(text)) < 1_000_000
    assert len(table) == 100 and table.follow(*text[-3:-1]) and not table.follow(*text[:2])
    assert most_memory(lambda: NGramTable([text], max_pairs=100)) < 1_000_000
    assert most_memory(lambda: NGramTable(([1, 2, c] for c in range(20_000)), max_pairs=100)) < 1_000_000


def test_what_is_frequent_survives_in_a_corpus_too_large_to_count():
    draws = random.Random(0)
    texts = ([1, 2, draws.choice((3, 3, 4)), *(draws.randrange(5, 999) for _ in range(9))] for _ in range(3000))
    table = NGramTable(texts, max_pairs=50, successors=4)
    assert len(table) == 50
    assert table.follow(1, 2) == [(pytest.approx(2 / 3, abs=0.05), 3), (pytest.approx(1 / 3, abs=0.05), 4)]


@pytest.mark.parametrize("search", SEARCHES)
def test_the_likeliest_path_comes_first_and_limits_hold(search):
    text = [draw % 7 for draw in (random.Random(0).choices(range(40), k=3000))]
    drafter = NGramDrafter(NGramTable([text]), search=search, depth=4, nodes=20)
    tree = drafter.tree([1, 2], 4)
    assert len(tree.tokens) <= 20
    assert max(tree.depths()) <= 4
    assert tree.child(ROOT, drafter.table.follow(1, 2)[0][1]) is not None
    assert all(parent < node for node, parent in enumerate(tree.parents))
    assert drafter.tree([1, 2], 0).tokens == drafter.tree([3], 4).tokens == []


def test_best_first_takes_paths_in_the_order_of_their_share():
    # After (1, 2): 3 in three of four cases, then always 4; 5 in one of four.
    table = NGramTable([[1, 2, 3, 4]] * 3 + [[1, 2, 5, 6]])
    tree = NGramDrafter(table, nodes=3).tree([1, 2], 5)
    assert tree.tokens == [3, 4, 5]
    assert tree.parents == [ROOT, 0, ROOT]


def test_puct_visits_what_is_likely_more_often():
    table = NGramTable([[1, 2, 3, 4]] * 9 + [[1, 2, 5, 6]])
    tree = NGramDrafter(table, search="puct", nodes=2).tree([1, 2], 3)
    assert tree.tokens == [3, 4]


def test_puct_repeats_with_its_seed():
    text = random.Random(0).choices(range(9), k=3000)
    trees = [NGramDrafter(NGramTable([text]), search="puct", seed=3).tree([1, 2], 5) for _ in range(2)]
    assert trees[0].tokens == trees[1].tokens and trees[0].parents == trees[1].parents


def generate(target, drafter, tokens=60, **options):
    ids = torch.tensor([[3, 5]])
    options = {"do_sample": False, "custom_generate": speculative} | options
    target.generate(ids, max_new_tokens=tokens, drafter=drafter, **options)
    return report(drafter).tokens_per_forward


@pytest.mark.parametrize("search", SEARCHES)
def test_repetition_is_learned_while_decoding(search):
    target = tabular_model()  # greedy decoding soon runs in a circle
    drafter = NGramDrafter(search=search)
    rates = [generate(target, drafter) for _ in range(2)]
    assert rates[0] > 1.5 and rates[1] > rates[0]


@pytest.mark.parametrize("search", SEARCHES)
def test_random_text_is_not_learned(search):
    target = tabular_model(vocab_size=64, spread=0.0)
    rate = generate(target, NGramDrafter(search=search), do_sample=True, top_k=0)
    assert rate < 1.15


def test_the_hosts_assisted_decoding_writes_plain_text_from_n_grams():
    target = tabular_model()
    ids = torch.tensor([[3, 5]])
    options = {"do_sample": False, "max_new_tokens": 40}
    plain = target.generate(ids, **options)
    drafter, forwards = NGramDrafter(depth=4), []
    hook = target.register_forward_hook(lambda *_: forwards.append(1))
    assert torch.equal(target.generate(ids, custom_generate=assisted, drafter=drafter, **options), plain)
    hook.remove()
    assert len(forwards) < 30
    end = int(plain[0, 5])  # now drafted in the midst of a chain
    options |= {"eos_token_id": end, "pad_token_id": 0}
    ended = target.generate(ids, **options)
    assert ended.shape[1] <= 6
    assert torch.equal(target.generate(ids, custom_generate=assisted, drafter=drafter, **options), ended)


def test_the_chain_of_candidates_stops_before_an_end_and_leaves_room_for_the_hosts_token():
    ids = torch.tensor([[9, 1, 2, 3, 4, 5, 6, 1, 2]])
    for given, drafted in (({}, [3, 4, 5, 6]), ({"ends": [5]}, [3, 4]), ({"max_length": 12}, [3, 4])):
        found, logits = NGramCandidates(NGramDrafter(depth=4), **given).get_candidates(ids)
        assert found.tolist() == [[*ids[0].tolist(), *drafted]] and logits is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"search": "beam"}, "search must be one of best_first, puct, got 'beam'"),
        ({"nodes": 0}, "nodes must be at least 1, got 0"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        NGramDrafter(**given)


def test_a_table_of_another_tokenizer_is_refused():
    with pytest.raises(ValueError, match="holds token 50, the target has 8"):
        generate(tabular_model(), NGramDrafter(NGramTable([[1, 2, 50]])))
    with pytest.raises(ValueError, match="holds token 50, the target has 8"):
        generate(tabular_model(), NGramDrafter(NGramTable([[1, 2, 50]])), custom_generate=assisted)
    with pytest.raises(ValueError, match="assisted needs drafter="):
        generate(tabular_model(), None, custom_generate=assisted)


def test_a_table_needs_room():
    with pytest.raises(ValueError, match="must be at least 1"):
        NGramTable(max_pairs=0)
