"""Trimmed drafts: rows of the full logits, a real distribution, EAGLE-3's buffers, and files that load again."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from draftdiff.errors import UserError
from draftdiff.llm.metrics import bytes_per_forward
from draftdiff.llm.train.data import DistillationSet
from draftdiff.llm.train.trim import count_tokens, export_token_map, load_trimmed, save_trimmed, trim, trimmed_ids
from tests.llm.tiny_models import FAMILIES, VOCABULARY, prompt, tiny_model

COUNTS = (torch.arange(VOCABULARY) * 37) % VOCABULARY


@pytest.fixture
def draft():
    return tiny_model(layers=1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_trimmed_logits_are_rows_of_the_full_ones_and_the_rest_is_impossible(family):
    draft, ids = tiny_model(family, layers=2), prompt(9, batch=2)
    full, trimmed = draft(ids).logits, trim(draft, COUNTS, 40)
    logits, kept = trimmed(ids).logits, trimmed_ids(trimmed)
    torch.testing.assert_close(logits[..., kept], full[..., kept])
    assert logits[..., ~trimmed.t2d].isneginf().all() and int((~trimmed.t2d).sum()) == VOCABULARY - 40
    torch.testing.assert_close(logits.softmax(-1).sum(-1), torch.ones(2, 9))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_the_whole_vocabulary_is_the_same_draft_bit_for_bit(family):
    draft, ids = tiny_model(family), prompt(9)
    assert torch.equal(trim(draft, COUNTS, VOCABULARY)(ids).logits, draft(ids).logits)


def test_the_commonest_tokens_are_kept_with_the_special_ones_and_ties_go_by_id(draft):
    counts = torch.zeros(VOCABULARY)
    counts[[90, 30, 31]] = torch.tensor([5.0, 2.0, 2.0])
    draft.config.eos_token_id, draft.generation_config.eos_token_id = 7, [7, 8]
    # The tiny models' generation config pads with 0.
    assert trimmed_ids(trim(draft, counts, 4)).tolist() == [0, 7, 8, 90]
    assert trimmed_ids(trim(draft, counts, 5)).tolist() == [0, 7, 8, 30, 90]
    assert trimmed_ids(trim(draft, counts, 5, keep=[95])).tolist() == [0, 7, 8, 90, 95]


def test_the_buffers_are_those_of_eagle_3(draft):
    trimmed = trim(draft, COUNTS, 24)
    assert trimmed.d2t.dtype == torch.int64 and trimmed.d2t.shape == (24,)
    assert trimmed.t2d.dtype == torch.bool and trimmed.t2d.shape == (VOCABULARY,)
    targets = torch.arange(24) + trimmed.d2t
    assert targets.tolist() == trimmed.t2d.nonzero().flatten().tolist()
    assert set(targets.tolist()) == {0, *COUNTS.argsort(descending=True)[:23].tolist()}


@torch.no_grad()
def test_tied_embeddings_are_untied_and_the_draft_is_left_as_it_was(draft):
    draft.config.tie_word_embeddings = True
    draft.tie_weights()
    ids = prompt(5)
    before, keys = draft(ids).logits, set(draft.state_dict())
    trimmed = trim(draft, COUNTS, 24)
    trimmed.get_output_embeddings().weight.zero_()
    assert trimmed.get_input_embeddings().weight.abs().sum() > 0
    assert torch.equal(draft(ids).logits, before) and set(draft.state_dict()) == keys
    assert draft.config.tie_word_embeddings and not trimmed.config.tie_word_embeddings


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_per_forward_fall_by_the_trimmed_rows(draft, tied):
    draft.config.tie_word_embeddings = tied
    draft.tie_weights()
    row = 4 * draft.config.hidden_size
    for size in (VOCABULARY, 24):
        assert bytes_per_forward(trim(draft, COUNTS, size)) == bytes_per_forward(draft) - row * (VOCABULARY - size)


def test_counts_come_from_what_the_target_wrote():
    ids = [torch.tensor([1, 2, 2, 3]), torch.tensor([2, 5])]
    written = [torch.tensor([False, True, True, False]), torch.tensor([False, True])]
    assert count_tokens(DistillationSet(ids, written), 6).tolist() == [0, 0, 2, 0, 0, 1]


def test_a_dataset_counts_as_its_counts(draft):
    dataset = DistillationSet([prompt(50)[0]], [torch.ones(50, dtype=torch.bool)])
    by_dataset, by_counts = (trim(draft, x, 20) for x in (dataset, count_tokens(dataset, VOCABULARY)))
    assert torch.equal(by_dataset.d2t, by_counts.d2t)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_what_is_saved_loads_again(family, dtype, tmp_path):
    trimmed = trim(tiny_model(family).to(dtype), COUNTS, 24)
    save_trimmed(trimmed, tmp_path / "draft")
    trimmed.save_pretrained(tmp_path / "plain")
    for folder in ("draft", "plain"):
        again = load_trimmed(tmp_path / folder)
        again.set_attn_implementation(trimmed.config._attn_implementation)  # which no folder says
        assert again.dtype == dtype and not again.training
        expected, found = trimmed.state_dict(), again.state_dict()
        assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in found)
        if dtype == torch.float32:  # a model that `to` made half has rounded rotary frequencies, too
            again.set_attn_implementation(trimmed.config._attn_implementation)
            assert torch.equal(again(prompt(6)).logits, trimmed(prompt(6)).logits)


@torch.no_grad()
def test_a_family_that_the_host_saves_under_other_names_loads_again_too(tmp_path):
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=1
    )
    trimmed = trim(AutoModelForCausalLM.from_config(config).eval(), COUNTS, 24)
    save_trimmed(trimmed, tmp_path / "draft")
    again = load_trimmed(tmp_path / "draft")
    assert type(again) is type(trimmed) and torch.equal(again(prompt(6)).logits, trimmed(prompt(6)).logits)


def test_the_generation_config_loads_again(draft, tmp_path):
    draft.generation_config.eos_token_id, draft.generation_config.num_assistant_tokens = [3, 4, 5], 7
    save_trimmed(trim(draft, COUNTS, 24), tmp_path / "draft")
    again = load_trimmed(tmp_path / "draft").generation_config
    assert (again.eos_token_id, again.num_assistant_tokens) == ([3, 4, 5], 7)


def test_the_files_are_laid_out_as_other_hosts_read_them(draft, tmp_path):
    trimmed = trim(draft, COUNTS, 24)
    save_trimmed(trimmed, tmp_path / "draft")
    weights = load_file(tmp_path / "draft" / "model.safetensors")
    assert weights["lm_head.weight"].shape == (24, 64) and weights["d2t"].dtype == torch.int64
    assert torch.equal(weights["t2d"], trimmed.t2d)
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert (config["draft_vocab_size"], config["vocab_size"]) == (24, VOCABULARY)
    kept = trimmed_ids(trimmed).tolist()
    assert json.loads((tmp_path / "draft" / "token_map.json").read_text()) == kept
    export_token_map(trimmed, tmp_path / "hot.pt")
    assert torch.load(tmp_path / "hot.pt", weights_only=True) == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft", "hot.pt"]


@torch.no_grad()
def test_a_trimmed_draft_assists_generate_and_changes_nothing(draft):
    target, ids = tiny_model(), prompt(6)
    plain = target.generate(ids, max_new_tokens=12, do_sample=False)
    assisted = target.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=trim(draft, COUNTS, 24))
    assert torch.equal(plain, assisted)


def test_mistakes_are_named_in_one_line(draft, tmp_path):
    draft.generation_config.eos_token_id = [3, 4]
    for size in (2, VOCABULARY + 1):
        with pytest.raises(ValueError, match=f"size must be from 3, .* vocabulary of {VOCABULARY}, got {size}"):
            trim(draft, COUNTS, size)
    with pytest.raises(ValueError, match=rf"counts must have shape \({VOCABULARY},\), got \(5,\)"):
        trim(draft, COUNTS[:5], 20)
    with pytest.raises(ValueError, match=f"from 0 to {VOCABULARY - 1}, got 0 to 999"):
        trim(draft, COUNTS, 20, keep=[999])
    with pytest.raises(ValueError, match="tensor or a dataset of rows with input_ids and written, got 1"):
        trim(draft, [1] * VOCABULARY, 20)
    beyond = DistillationSet([torch.tensor([1, VOCABULARY])], [torch.ones(2, dtype=torch.bool)])
    with pytest.raises(ValueError, match=f"ids must be from 0 to {VOCABULARY - 1}, got 1 to {VOCABULARY}"):
        trim(draft, beyond, 20)
    with pytest.raises(ValueError, match="trimmed already"):
        trim(trim(draft, COUNTS, 20), COUNTS, 10)
    with pytest.raises(FileExistsError, match="exists"):
        save_trimmed(trim(draft, COUNTS, 20), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_trimmed(tmp_path)
    save_trimmed(trim(draft, COUNTS, 20), tmp_path / "part")
    weights = load_file(tmp_path / "part" / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "o_proj" not in k}, tmp_path / "part" / "model.safetensors")
    with pytest.raises(ValueError, match=r"no whole draft: model.safetensors lacks model.layers.0.self_attn.o_proj"):
        load_trimmed(tmp_path / "part")
    draft.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="no trimmed draft"):
        load_trimmed(tmp_path / "whole")
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "whole"), type(draft))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda w: w.update(d2t=w["d2t"] - 50), "d2t names no ascending tokens of a vocabulary of"),
        (lambda w: w.update(d2t=w["d2t"] + 90), "d2t names no ascending tokens of a vocabulary of"),
        (lambda w: w.update(d2t=-torch.arange(20)), "d2t names no ascending tokens of a vocabulary of"),
        (
            lambda w: w.update(d2t=torch.zeros(0, dtype=torch.int64)),
            "d2t names no ascending tokens of a vocabulary of",
        ),
        (lambda w: w.update(d2t=w["d2t"].float()), r"its d2t is torch.float32 \[20\]"),
        (lambda w: w.update(d2t=w["d2t"][None]), r"its d2t is torch.int64 \[1, 20\]"),
        (lambda w: w.update({"lm_head.weight": torch.zeros(7, 32)}), "holds no readable draft: "),
    ],
)
def test_a_file_of_a_draft_that_is_none_is_one_line(draft, tmp_path, damage, said):
    save_trimmed(trim(draft, COUNTS, 20), tmp_path / "draft")
    file = tmp_path / "draft" / "model.safetensors"
    weights = load_file(file)
    damage(weights)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=said) as error:
        load_trimmed(tmp_path / "draft")
    assert str(tmp_path / "draft") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.safetensors", b"", "is not a readable file of weights"),
        ("model.safetensors", b"nothing of the kind", "is not a readable file of weights"),
        ("config.json", b"{", "holds no readable draft: "),
        ("config.json", b"{}", "holds no readable draft: "),
        ("config.json", b'{"model_type": "llama", "vocab_size": "many"}', "holds no readable draft: "),
    ],
)
def test_a_damaged_file_of_a_draft_is_one_line(draft, tmp_path, name, content, said):
    save_trimmed(trim(draft, COUNTS, 20), tmp_path / "draft")
    (tmp_path / "draft" / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        load_trimmed(tmp_path / "draft")
    assert str(tmp_path / "draft") in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "draft" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"^there is no .*{name}$"):
        load_trimmed(tmp_path / "draft")


def test_a_family_that_would_make_numbers_of_trimmed_logits_is_refused():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model("recurrent_gemma", vocab_size=VOCABULARY, head_dim=16, lru_width=64, **sizes)
    with pytest.raises(ValueError, match="RecurrentGemmaForCausalLM changes logits after its output layer"):
        trim(AutoModelForCausalLM.from_config(config), COUNTS, 40)
