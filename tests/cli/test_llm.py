"""`draftdiff llm generate` and `draftdiff llm compare` on the embedded pair, and their one-line errors."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

from draftdiff.cli import main
from draftdiff.models.llm import LanguageModel, example_prompts, load
from draftdiff.models.llm_methods import METHODS, generate_options, methods_of
from draftdiff.pipelines.mini.llm import WEIGHTS, load_mini_llm
from tests.cli.one_line import fails_in_one_line
from tests.llm.tiny_models import prompt, tiny_hybrid, tiny_model

TARGET, DRAFT = WEIGHTS / "target", WEIGHTS / "draft"


def run(capsys, *argv: object) -> dict:
    assert main(["llm", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Target and draft as two folders with a tokenizer each, as people have them."""
    home = tmp_path_factory.mktemp("pair")
    target, draft, tokenizer = load_mini_llm()
    for name, model in (("target", target), ("draft", draft)):
        model.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    return home


def test_text_goes_to_standard_output_and_figures_to_standard_error(capfd):
    assert main(["llm", "generate", "--prompt", "def ", "--tokens", "12", "--method", "chain"]) == 0
    printed = capfd.readouterr()
    target, _, tokenizer = load_mini_llm()
    ids = tokenizer("def ", return_tensors="pt").input_ids
    assert printed.out.rstrip("\n") == tokenizer.decode(target.generate(ids, do_sample=False, max_new_tokens=12)[0])
    assert "12 tokens in" in printed.err and "target forwards" in printed.err


def test_lossless_methods_write_what_plain_decoding_writes(capsys):
    plain = run(capsys, "generate", "--prompt", "def ", "--tokens", 20, "--method", "plain")
    assert plain["report"] is None
    for name in methods_of(load(None, None, device="cpu")):
        if METHODS[name].lossless and name != "plain":
            other = run(capsys, "generate", "--prompt", "def ", "--tokens", 20, "--method", name)
            assert other["text"] == plain["text"]
            assert other["report"]["target_forwards"] <= 20


def test_sampling_repeats_with_its_seed(capsys):
    given = ["generate", "--prompt", "def ", "--tokens", 16, "--temperature", 0.9, "--seed", 3, "--method", "sampled"]
    assert run(capsys, *given)["text"] == run(capsys, *given)["text"]
    assert run(capsys, *given)["text"] != run(capsys, *given[:-3], 4, *given[-2:])["text"]


def test_a_pair_of_folders_is_the_embedded_pair(folders, capsys):
    given = ["generate", "--prompt", "import ", "--tokens", 10]
    embedded = run(capsys, *given)
    ours = run(capsys, *given, "--model", folders / "target", "--draft", folders / "draft")
    assert ours["text"] == embedded["text"] and ours["model"] == str(folders / "target")


def test_models_of_other_tokenizers_and_without_a_draft_generate(folders, tmp_path, capsys):
    given = ["generate", "--prompt", "import ", "--tokens", 10]
    plain = run(capsys, *given, "--method", "plain")["text"]
    assert run(capsys, *given, "--model", folders / "target", "--method", "ngram")["text"] == plain
    model = load(None, None, device="cpu")
    model.cross.model.save_pretrained(tmp_path)
    model.cross.vocabularies.tokenizer.save_pretrained(tmp_path)
    pair = ["--model", folders / "target", "--draft", tmp_path]
    for method in [name for name in methods_of(model) if name in ("omnidraft", "universal")]:
        assert run(capsys, *given, *pair, "--method", method)["text"] == plain
    assert run(capsys, *given, *pair, "--same-tokenizer")["text"] == plain


def test_added_tokens_are_no_other_tokenizer(folders, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(folders / "draft")
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(tmp_path)
    _, draft, _ = load_mini_llm()
    draft.resize_token_embeddings(2050)
    draft.save_pretrained(tmp_path)
    pair = ["--model", folders / "target", "--draft", tmp_path]
    given = ["generate", "--prompt", "import ", "--tokens", 10]
    assert run(capsys, *given, *pair)["text"] == run(capsys, *given)["text"]


def test_every_method_is_measured_beside_plain_decoding(tmp_path, capsys):
    out = tmp_path / "compared"
    given = ["compare", "-o", out, "--examples", 2, "--prompt-tokens", 160, "--tokens", 16, "--capacity", 48]
    result = run(capsys, *given, "--repeat", 1)
    assert json.loads((out / "results.json").read_text()) == result
    rows = {row["name"]: row for row in result["methods"]}
    assert list(rows) == methods_of(load(None, None, device="cpu"))
    for name, row in rows.items():
        assert row["repeats"], name
        if METHODS[name].lossless and name != "plain":
            assert row["same_text"] == 1.0 and row["next_token"] == 1.0, name
            assert row["cache_share"] == 1.0
    assert rows["plain"]["speedup"] is None and rows["plain"]["tokens_per_forward"] == 1
    for name in ("tree", "chain", "hydra", "medusa", "speckv-chain"):  # drafts may not have paid
        assert rows[name]["tokens_per_forward"] >= 1 and rows[name]["mbsu"] > 0
    for name in ("speckv", "specpc", "speckv-pc", "speckv-chain"):
        assert rows[name]["cache_share"] < 0.45, name
        assert 0.3 < rows[name]["next_token"] <= 1
    page = (out / "report.html").read_text()
    assert "tree of best paths" in page and "<svg" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_a_prompt_may_be_shorter_than_what_is_kept_of_it(tmp_path, capsys):
    methods = ("speckv", "specpc", "speckv-pc", "speckv-chain")
    given = [part for name in methods for part in ("--method", name)]
    result = run(capsys, "compare", *given, "-o", tmp_path / "out", "--prompt", "x", "--tokens", 4, "--repeat", 1)
    assert {row["name"]: row["same_text"] for row in result["methods"][1:]} == dict.fromkeys(methods, 1.0)


def test_the_table_is_printed(tmp_path, capsys):
    given = ["llm", "compare", "--prompt", "def f(", "--method", "chain", "--tokens", "8", "--repeat", "1"]
    assert main([*given, "-o", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["method", "lossless"]
    assert [line.split("  ")[0] for line in lines[2:4]] == ["plain decoding", "chain"]
    assert lines[-1] == str(tmp_path / "out" / "report.html")


def test_a_cache_of_layers_without_keys_has_a_size():
    hybrid = tiny_hybrid()
    model = LanguageModel("hybrid", hybrid, tiny_model(), None)
    options = generate_options(6, 0.0)
    plain, chain = (METHODS[name].run(model, prompt(8), options, 4) for name in ("plain", "chain"))
    assert plain.cache == chain.cache > 0 and torch.equal(plain.tokens, chain.tokens)


def test_example_prompts_are_unseen_program_text_of_the_asked_length():
    model = load(None, None, device="cpu")
    prompts = example_prompts(model, 3, 100)
    assert [list(prompt.shape) for prompt in prompts] == [[1, 100]] * 3
    assert not torch.equal(prompts[0], prompts[1])


def test_mistakes_are_one_line(folders, tmp_path, capsys):
    def fails(*argv: object) -> str:
        return fails_in_one_line(capsys, "llm", *argv)

    assert "give --prompt TEXT or --prompt-file FILE" in fails("generate")
    assert "is empty" in fails("generate", "--prompt", "")
    assert "method must be one of plain, chain" in fails("generate", "--prompt", "x", "--method", "magic")
    assert "tokens must be at least 1, got 0" in fails("generate", "--prompt", "x", "--tokens", 0)
    assert "temperature must be at least 0" in fails("generate", "--prompt", "x", "--temperature", -1)
    assert "finite, got nan" in fails("generate", "--prompt", "x", "--temperature", "nan")
    assert "0 or at least 1e-06, got 1e-40" in fails("generate", "--prompt", "x", "--temperature", 1e-40)
    assert "(module statistics), got 10000000" in fails("compare", "-o", tmp_path / "a", "--prompt-tokens", 10**7)
    assert "capacity must be at least 1" in fails("generate", "--prompt", "x", "--method", "speckv", "--capacity", 0)
    assert "--draft comes with --model, got 'x' alone" in fails("generate", "--prompt", "x", "--draft", "x")
    alone = fails("generate", "--prompt", "x", "--model", folders / "target")
    assert "method 'chain' needs a draft with the target's tokenizer, by --draft" in alone
    theirs = ("--model", folders / "target", "--draft", folders / "draft")
    assert "method 'hydra' needs hydra heads, which" in fails("generate", "--prompt", "x", *theirs, "--method", "hydra")
    assert "method 'trimmed' needs to know how often" in fails(
        "compare", "-o", tmp_path / "a", *theirs, "--method", "trimmed"
    )
    assert "cannot be read" in fails("generate", "--prompt-file", tmp_path / "none.txt")
    assert f"from -1 to {2**63 - 1}, got '9e9'" in fails("generate", "--prompt", "x", "--seed", "9e9")
    assert f"from -1 to {2**63 - 1}, got" in fails("generate", "--prompt", "x", "--seed", 10**30)
    assert "device 'meta' cannot be used" in fails("generate", "--prompt", "x", "--device", "meta")
    assert "is not valid UTF-8" in fails("generate", "--prompt", "\udcff")
    assert "at least 1 token, got 0" in fails("compare", "-o", tmp_path / "a", "--prompt-tokens", 0)
    assert "cannot be loaded" in fails("generate", "--prompt", "x", "--model", tmp_path, "--draft", tmp_path)
    assert "dtype must be one of" in fails("generate", "--prompt", "x", "--dtype", "int3")
    assert "there are 1 to 8 example prompts, got 9" in fails("compare", "-o", tmp_path / "a", "--examples", 9)
    assert "capacity must be at least 1" in fails("compare", "-o", tmp_path / "b", "--capacity", 0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    assert "holds other files" in fails("compare", "-o", tmp_path / "full")
    other = tmp_path / "other"
    tiny_model(vocab_size=2048).save_pretrained(other)
    tokenizer = AutoTokenizer.from_pretrained(folders / "target")
    tokenizer.add_tokens(["a token of its own"])
    tokenizer.save_pretrained(other)
    tokenizer.add_tokens([f"and {i} more" for i in range(1023)])
    tokenizer.save_pretrained(tmp_path / "foreign")
    tiny_model(vocab_size=3072).save_pretrained(tmp_path / "foreign")
    both = ("generate", "--prompt", "x", "--model", folders / "target", "--draft", tmp_path / "foreign")
    assert "omnidraft and universal take others" in fails(*both)


@pytest.mark.parametrize(
    "argv", [["--help"], *(["llm", "generate", "--prompt", "x", "--tokens", "2", *more] for more in ([], ["--json"]))]
)
def test_a_reader_that_has_enough_ends_it_quietly(argv, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(argv) == 141
    assert capsys.readouterr().err == ""


def test_the_commands_do_without_diffusers():
    code = (
        "import sys; from draftdiff.cli import main\n"
        "assert main(['llm', 'generate', '--prompt', 'x', '--tokens', '2', '--json']) == 0\n"
        "assert 'diffusers' not in sys.modules, 'diffusers'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_workload_is_scored_beside_speed_and_memory(tmp_path, capsys):
    given = ["compare", "--workload", "drawing", "--cases", 2, "--tokens", 24, "--capacity", 40]
    result = run(capsys, *given, "--method", "ngram", "--method", "specpc", "-o", tmp_path / "out")
    assert result["model"] == "mini-drawing" and result["workload"]["name"] == "drawing"
    plain, ngram, specpc = result["methods"]
    assert ngram["verdict"] == "same tokens" and ngram["tokens_per_forward"] >= 1 and ngram["difference"] is None
    assert plain["score"] == 0 and specpc["verdict"] == "refused"  # no answer fits into 24 tokens
    assert "no verdict on lossy methods" in (tmp_path / "out" / "report.html").read_text()


def test_mistakes_about_workloads_are_one_line(tmp_path, capsys):
    def fails(*argv: object) -> str:
        return fails_in_one_line(capsys, "llm", "compare", "-o", tmp_path / "out", *argv)

    assert "--cases goes with --workload" in fails("--cases", 3)
    assert "noise goes with the travel workload and a model of your own, got 0.5 for" in fails(
        "--workload", "drawing", "--noise", 0.5
    )
    assert "noise must be from 0 to 1, got 3" in fails("--workload", "travel", "--noise", 3, "--model", "any")
    assert "cases must be at least 2, got 1" in fails("--workload", "travel", "--cases", 1)
    assert "leave --prompt and --prompt-file out" in fails("--workload", "travel", "--prompt", "x")
    assert "invalid choice: 'chess'" in fails("--workload", "chess")
