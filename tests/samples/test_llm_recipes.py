"""The draft recipes and the trimming curve, on a few files and a few steps."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from draftdiff.errors import UserError
from draftdiff.llm import load_trimmed
from draftdiff.llm.train import stdlib_corpus

SAMPLES = Path(__file__).resolve().parents[2] / "samples" / "llm"
FEW = ["--align-steps", "2", "--prompts", "4", "--new-tokens", "12"]


@pytest.fixture
def script(monkeypatch):
    """A script as a module, with a corpus of three files."""
    monkeypatch.syspath_prepend(str(SAMPLES))
    import importlib

    import recipe
    import vocab_trim

    texts = list(stdlib_corpus.corpus_texts(held_out=True))[-4:-1]
    for module in (recipe, vocab_trim):
        monkeypatch.setattr(module, "corpus_texts", lambda: iter(texts))
    return importlib.import_module


@pytest.mark.parametrize("name", ["fast_draft", "direct_alignment"])
def test_a_recipe_ends_in_a_plain_model_with_scores_of_every_stage(name, script, tmp_path, capsys):
    scores = tmp_path / "scores.json"
    script(name).main(["--pretrain-steps", "2", *FEW, "-o", str(tmp_path / "draft"), "--json", str(scores)])
    result = json.loads(scores.read_text())
    assert list(result["scores"]) == ["before", "pretrained", "aligned"]
    assert result["draft_parameters"] < 0.2 * result["target_parameters"]
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    assert draft.num_parameters() == result["draft_parameters"]
    assert AutoTokenizer.from_pretrained(tmp_path / "draft")("def f(x):").input_ids
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft", "scores.json"]
    assert "leaves the target's greedy text as it is" in capsys.readouterr().out


def test_alignment_goes_on_from_a_draft_that_there_is(script, tmp_path):
    from draftdiff.pipelines.mini.llm import WEIGHTS

    options = ["--draft", str(WEIGHTS / "draft"), "--loss", "lk", *FEW, "-o", str(tmp_path / "draft")]
    script("direct_alignment").main([*options, "--json", str(tmp_path / "scores.json")])
    result = json.loads((tmp_path / "scores.json").read_text())
    assert list(result["scores"]) == ["before", "aligned"]
    assert result["scores"]["before"]["block_efficiency"] > 1.5
    assert result["scores"]["aligned"]["acceptance"] > 0.5


def test_an_existing_folder_is_refused(script, tmp_path):
    with pytest.raises(UserError, match="exists: choose a new folder"):
        script("fast_draft").main(["-o", str(tmp_path)])


RECIPE_MISTAKES = [
    (["--params", "10"], "params must be from 74,336, .* got 10"),
    (["--prompts", "0"], "argument --prompts: must be a whole number from 1 on, got '0'"),
    (["--prompts", "100000"], r"count must be from 1 to \d+, the function heads there are, got 100000"),
    (["--new-tokens", "0"], "argument --new-tokens: must be a whole number from 1 on, got '0'"),
    (["--target", "no/such/folder"], "model 'no/such/folder' cannot be loaded"),
    (["--draft", "no/such/folder"], "model 'no/such/folder' cannot be loaded"),
    (["--plain-share", "1"], r"argument --plain-share: must be in \[0, 1\), got '1'"),
    (["--json", "/proc/self/comm/x.json"], "argument --json: output folder '/proc/self/comm' cannot be written: "),
]
TRIM_MISTAKES = [
    (["--calibration", "0"], "argument --calibration: must be a whole number from 1 on, got '0'"),
    (["--prompts", "0"], "argument --prompts: must be a whole number from 1 on, got '0'"),
    (["--prompts", "100000"], "count must be from 1 to .* got 100000"),
    (["--sizes", "64", "100000"], "size must be from 1, .* vocabulary of 2048, got 100000"),
    (["--save", "0"], "argument --save: must be a whole number from 1 on, got '0'"),
    (["--save", "64", "-o", "."], r"\. exists: choose a new folder"),
    (["--plot", "curve.xyz"], "argument --plot: output 'curve.xyz' must end in .png"),
    (["--json", "/proc/self/comm/x.json"], "argument --json: output folder '/proc/self/comm' cannot be written: "),
]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [("direct_alignment", *mistake) for mistake in RECIPE_MISTAKES] + [("vocab_trim", *one) for one in TRIM_MISTAKES],
)
def test_a_mistake_is_one_line_before_any_work(name, given, message, script, tmp_path, monkeypatch):
    def work(*args, **kwargs):
        raise AssertionError("the work began")

    monkeypatch.chdir(tmp_path)
    for module in ("recipe", "vocab_trim"):
        monkeypatch.setattr(script(module), "generate_distillation_set", work)
    with pytest.raises(UserError, match=rf"^{message}") as error:
        script(name).main(given)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_the_curve_trades_tokens_per_forward_for_bytes(script, tmp_path, capsys):
    few = ["--sizes", "64", "2048", "--prompts", "6", "--calibration", "6", "--new-tokens", "16"]
    script("vocab_trim").main([*few, "--json", str(tmp_path / "trim.json"), "--plot", str(tmp_path / "trim.png")])
    rows = json.loads((tmp_path / "trim.json").read_text())["rows"]
    assert [row["size"] for row in rows] == [64, 2048] * 2
    for small, whole in zip(rows[::2], rows[1::2]):
        assert small["bytes"] < whole["bytes"] and small["tokens_per_forward"] <= whole["tokens_per_forward"]
    assert rows[1]["mbsu"] == rows[3]["mbsu"]  # nothing is trimmed
    assert (tmp_path / "trim.png").read_bytes().startswith(b"\x89PNG")
    assert "memory-bound speed-up" in capsys.readouterr().out


def test_a_trimmed_draft_is_saved_with_its_token_maps(script, tmp_path):
    few = ["--calibration", "4", "--new-tokens", "8", "-o", str(tmp_path / "draft")]
    script("vocab_trim").main(["--save", "100", *few])
    draft = load_trimmed(tmp_path / "draft")
    assert draft.get_output_embeddings().weight.shape[0] == 100
    assert len(torch.load(tmp_path / "draft" / "token_map.pt")) == 100
    with pytest.raises(UserError, match=r"^size must be from 1, .* got 3000"):
        script("vocab_trim").main(["--save", "3000", *few])


@pytest.fixture
def heads_script(script, monkeypatch):
    module, texts = script("draft_heads"), list(stdlib_corpus.corpus_texts(held_out=True))[-4:-1]
    monkeypatch.setattr(module, "corpus_texts", lambda: iter(texts))
    return module


def test_heads_are_trained_carried_on_and_loaded_with_a_tree(heads_script, tmp_path, capsys):
    from draftdiff.pipelines.mini.llm import load_mini_llm

    few = ["--heads", "2", "--prompts", "3", "--new-tokens", "8", "--batch", "2", "--nodes", "5"]
    few += ["--work", str(tmp_path / "work")]
    hydra = [*few, "--rank", "4", "-o"]
    heads_script.main([*hydra, str(tmp_path / "first"), "--steps", "2"])
    written = (tmp_path / "work" / "written.safetensors").stat().st_mtime_ns
    heads_script.main([*hydra, str(tmp_path / "second"), "--steps", "3", "--json", str(tmp_path / "scores.json")])
    assert (tmp_path / "work" / "written.safetensors").stat().st_mtime_ns == written
    state = json.loads((tmp_path / "work" / "hydra" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert len(scores["acceptance"]) == 2 and scores["tokens_per_forward"] >= 1
    assert "tokens per target forward" in capsys.readouterr().out
    drafter = heads_script.HydraDrafter.from_pretrained(tmp_path / "second", load_mini_llm()[0])
    assert len(drafter.tree.paths) == 5


def test_glancing_is_judged_text_by_text_beside_the_same_layer_without(heads_script, script, tmp_path, capsys):
    few = ["--steps", "2", "--batch", "2", "--prompts", "3", "--new-tokens", "8", "--judged", "2"]
    script("glancing").main([*few, "--work", str(tmp_path / "work"), "--json", str(tmp_path / "glancing.json")])
    made = json.loads((tmp_path / "glancing.json").read_text())
    assert [row["glancing"] for row in made["rows"]] == ["none", "code", "paper"]
    assert all(len(row["texts"]) == 2 and min(row["texts"]) >= 1 for row in made["rows"])
    assert made["rows"][0]["over_none"]["mean"] == 0 and made["settings"]["steps"] == 2
    assert capsys.readouterr().out.count("tokens per forward") == 3


def test_mistakes_in_training_heads_are_one_line(heads_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, message in (
        (["--kind", "eagle"], "argument --kind: invalid choice: 'eagle'"),
        (["--rank", "0"], "argument --rank: must be a whole number from 1 on, got '0'"),
        (["-o", "."], r"\. exists: choose a new folder"),
        (["--prompts", "100000"], "count must be from 1 to .* got 100000"),
        (["--target", "no/such/folder"], "model 'no/such/folder' cannot be loaded"),
    ):
        with pytest.raises(UserError, match=message):
            heads_script.main(given)
    assert not list(tmp_path.iterdir())
