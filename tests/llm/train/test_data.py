"""Text that the target writes: the target's own continuations, whatever the batch, and files that load again."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from draftdiff.errors import UserError
from draftdiff.llm.train.data import DistillationSet, collate, generate_distillation_set, mix_in_text, packed_text
from tests.llm.tiny_models import VOCABULARY, prompt, tiny_model

PROMPTS = [prompt(length, seed=length)[0] for length in (3, 11, 7, 5, 2)]


@pytest.fixture
def target():
    return tiny_model(layers=2)


def written_by(target, prompts=PROMPTS, **options):
    options = {"max_new_tokens": 9, "batch_size": 3, "progress": False, **options}
    return generate_distillation_set(target, prompts, **options)


def rows_of(dataset):
    return [row["input_ids"].tolist() for row in dataset]


def test_greedy_rows_are_what_the_target_says_to_each_prompt_alone(target):
    dataset = written_by(target, temperatures=(0.0,))
    assert len(dataset) == len(PROMPTS)
    for row, ids in zip(dataset, PROMPTS):
        alone = target.generate(ids[None], max_new_tokens=9, do_sample=False)[0]
        assert torch.equal(row["input_ids"], alone)
        assert row["written"].tolist() == [False] * len(ids) + [True] * 9
        assert row["distil"].item() is True


def test_rows_go_by_temperature_and_then_by_prompt(target):
    dataset = written_by(target, temperatures=(0.0, 1.0))
    beginnings = [row[: len(ids)] for row, ids in zip(rows_of(dataset), PROMPTS * 2)]
    assert beginnings == [ids.tolist() for ids in PROMPTS * 2]
    assert rows_of(dataset)[:5] == rows_of(written_by(target, temperatures=(0.0,)))
    assert rows_of(dataset)[5:] != rows_of(dataset)[:5]


def test_sampling_repeats_with_its_seed_and_leaves_the_global_generator_alone(target):
    state = torch.get_rng_state()
    first, second, third = (rows_of(written_by(target, temperatures=(1.0,), seed=seed)) for seed in (1, 1, 2))
    assert first == second != third
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_come_from_the_whole_distribution_whatever_the_generation_config_says(target):
    target.generation_config.top_k, target.generation_config.top_p = 1, 0.1  # would make every sample the likeliest
    dataset = written_by(target, [PROMPTS[0]] * 600, temperatures=(1.0,), max_new_tokens=1, batch_size=600)
    drawn = torch.bincount(torch.tensor([row[-1] for row in rows_of(dataset)]), minlength=VOCABULARY) / 600
    with torch.no_grad():
        law = target(PROMPTS[0][None]).logits[0, -1].softmax(-1)
    assert (drawn - law).abs().sum() / 2 < 0.15


@pytest.mark.parametrize(
    "setting",
    [
        {"repetition_penalty": 3.0},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"return_dict_in_generate": True},
    ],
)
def test_rows_are_the_targets_own_law_whatever_its_generation_config_says(setting, target):
    plain = rows_of(written_by(target, temperatures=(0.0, 1.0)))
    target.generation_config.update(**setting)
    assert rows_of(written_by(target, temperatures=(0.0, 1.0))) == plain


def test_a_target_in_train_mode_writes_as_in_eval_mode_and_stays_in_train_mode(target):
    plain = rows_of(written_by(target, temperatures=(0.0,)))
    target.config.attention_dropout = 0.5
    for layer in target.model.layers:
        layer.self_attn.attention_dropout = 0.5
    target.train()
    target.model.norm.eval()  # as where a part is frozen
    assert rows_of(written_by(target, temperatures=(0.0,))) == plain
    assert target.training and target.model.layers[0].training and not target.model.norm.training


def test_a_row_ends_with_its_end_token(target):
    long = written_by(target, temperatures=(0.0,))
    end = rows_of(long)[1][len(PROMPTS[1]) + 4]
    target.generation_config.eos_token_id = [end, VOCABULARY - 1]
    for row, whole, ids in zip(written_by(target, temperatures=(0.0,)), rows_of(long), PROMPTS):
        new = whole[len(ids) :]
        new = new[: new.index(end) + 1] if end in new else new
        assert row["input_ids"].tolist() == ids.tolist() + new
        assert int(row["written"].sum()) == len(new)


def test_strings_go_through_the_tokenizer(target):
    def tokenizer(text):
        return SimpleNamespace(input_ids=[ord(c) % VOCABULARY for c in text])

    by_text = written_by(target, ["abc", "d"], tokenizer=tokenizer, temperatures=(0.0,))
    by_ids = written_by(target, [tokenizer("abc").input_ids, tokenizer("d").input_ids], temperatures=(0.0,))
    assert rows_of(by_text) == rows_of(by_ids)


def test_what_is_saved_loads_again_and_nothing_else_does(target, tmp_path):
    dataset = written_by(target, temperatures=(0.0, 1.0))
    dataset.save(tmp_path / "set.safetensors")
    again = DistillationSet.load(tmp_path / "set.safetensors")
    assert len(again) == len(dataset) and again.distil
    assert all(torch.equal(a[key], b[key]) for a, b in zip(again, dataset) for key in a)
    assert [file.name for file in tmp_path.iterdir()] == ["set.safetensors"]
    (tmp_path / "other").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="other is not a readable saved distillation set"):
        DistillationSet.load(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"no saved distillation set at .*nowhere$"):
        DistillationSet.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lengths": torch.tensor([2, 2])}, "its lengths, ids and written do not fit together"),
        ({"lengths": torch.tensor([6, -1])}, "its lengths, ids and written do not fit together"),
        ({"written": torch.ones(4, dtype=torch.bool)}, "its lengths, ids and written do not fit together"),
        ({"ids": torch.tensor([1, 2, -3, 4, 5])}, "it holds negative ids"),
        ({"ids": torch.arange(5.0)}, "ids is torch.float32 [5] instead of torch.int64 [any]"),
        ({"written": torch.ones(5)}, "written is torch.float32 [5] instead of torch.bool [any]"),
        ({"lengths": torch.tensor([[2, 3]])}, "lengths is torch.int64 [1, 2] instead of torch.int64 [any]"),
        ({"distil": torch.ones(2, dtype=torch.bool)}, "distil is torch.bool [2] instead of torch.bool [1]"),
        ({"distil": None}, "it lacks distil"),
    ],
)
def test_a_file_of_another_program_is_no_set(tmp_path, change, said):
    tensors = {
        "ids": torch.tensor([1, 2, 3, 4, 5]),
        "written": torch.ones(5, dtype=torch.bool),
        "lengths": torch.tensor([2, 3]),
        "distil": torch.tensor([True]),
    }
    save_file(tensors, tmp_path / "set")
    assert [len(row["input_ids"]) for row in DistillationSet.load(tmp_path / "set")] == [2, 3]
    save_file({name: t for name, t in (tensors | change).items() if t is not None}, tmp_path / "set")
    with pytest.raises(UserError) as error:
        DistillationSet.load(tmp_path / "set")
    assert f"{tmp_path / 'set'} is not a readable saved distillation set: {said}" in str(error.value)


def test_packed_text_is_cut_into_windows_of_plain_text():
    windows = packed_text(torch.arange(23), 5)
    assert rows_of(windows) == [list(range(i, i + 5)) for i in (0, 5, 10, 15)]
    assert all(row["written"].all() and not row["distil"] for row in windows)
    assert packed_text(torch.arange(23), 5, distil=True)[0]["distil"]
    with pytest.raises(ValueError, match="window of 24, got 23"):
        packed_text(torch.arange(23), 24)


def test_a_mix_has_the_share_of_plain_text_asked_for(target):
    distillation, text = written_by(target, temperatures=(0.0, 1.0)), packed_text(torch.arange(200), 5)
    assert [bool(row["distil"]) for row in mix_in_text(distillation, text, 0.5)].count(False) == 10
    assert [bool(row["distil"]) for row in mix_in_text(distillation, text, 0.0)] == [True] * 10
    assert rows_of(mix_in_text(distillation, text, 0.3)) == rows_of(mix_in_text(distillation, text, 0.3))
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\), got 1.0"):
        mix_in_text(distillation, text, 1.0)


def test_batches_are_padded_on_the_right_and_padding_is_not_written():
    rows = DistillationSet([torch.tensor([4, 5, 6]), torch.tensor([7])], [torch.ones(3).bool(), torch.ones(1).bool()])
    batch = collate(list(rows), pad=9)
    assert batch["input_ids"].tolist() == [[4, 5, 6], [7, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert torch.equal(batch["written"], batch["attention_mask"].bool())
    assert batch["distil"].tolist() == [True, True]


def test_mistakes_are_named_in_one_line(target):
    with pytest.raises(ValueError, match="strings need a tokenizer, got 'abc'"):
        written_by(target, ["abc"])
    with pytest.raises(ValueError, match="must be a list of prompts, got the one string 'abc'"):
        written_by(target, "abc", tokenizer=lambda text: SimpleNamespace(input_ids=[1]))
    with pytest.raises(ValueError, match="at least one id, got 0 of them"):
        written_by(target, [])
    with pytest.raises(ValueError, match="at least one id"):
        written_by(target, [[]])
    with pytest.raises(ValueError, match=r"numbers from 0 on, got \(0.5, -1\)"):
        written_by(target, temperatures=(0.5, -1))
    with pytest.raises(ValueError, match="max_new_tokens and batch_size must be at least 1, got 0 and 3"):
        written_by(target, max_new_tokens=0)
    with pytest.raises(ValueError, match="same lengths"):
        DistillationSet([torch.arange(3)], [torch.ones(2, dtype=torch.bool)])
