"""Code that a model's folder brings with it is never run, whatever is answered on the terminal."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

from draftdiff.hosts.custom_code import never_asked
from draftdiff.var.autoencoder_bsq import AutoencoderBSQ
from tests.var import tiny, tiny_infinity

ROOT = Path(__file__).resolve().parents[2]
AUTO = {"AutoTokenizer", "AutoConfig", "AutoModel", "AutoModelForCausalLM", "DiffusionPipeline"}
CODE = """
from pathlib import Path
Path({marker!r}).write_text("it ran")
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
class Config(PretrainedConfig):
    model_type = "custom"
class Model(PreTrainedModel):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
# How a folder of a stranger comes in, and what is then said.
LOADERS = {
    "draftdiff.models.llm.load({model!r}, {model!r})": "it needs code of its own, which is not run",
    "draftdiff.models.image.load({pipeline!r})": "cannot be loaded: ",
    "draftdiff.models.video.load({pipeline!r})": "cannot be loaded: ",
    "draftdiff.llm.train.trim.load_trimmed({model!r})": "it needs code of its own, which is not run",
    "InfinityPipeline.from_single_file({transformer!r}, {vae!r}, text_encoder={encoder!r})": ("cannot be loaded: "),
}
MANY = """
import json, sys
from draftdiff.pipelines.infinity import InfinityPipeline
import draftdiff.llm.train.trim, draftdiff.models.image, draftdiff.models.llm, draftdiff.models.video
said = {}
for call in json.loads(sys.argv[1]):
    try:
        said[call] = repr(eval(call))
    except Exception as error:
        said[call] = f"{type(error).__name__}: {error}"
print("SAID", json.dumps(said))
"""


def custom_folder(folder: Path, marker: Path) -> None:
    """A folder whose model and tokenizer are classes of its own, by a module that leaves a mark when it is run."""
    folder.mkdir(exist_ok=True)
    (folder / "custom.py").write_text(CODE.format(marker=str(marker)))
    kinds = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model", "AutoModel": "custom.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "custom", "auto_map": kinds}))
    tokenizer = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["custom.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Where the code of custom folders would leave a mark, and a folder for every way in."""
    home = tmp_path_factory.mktemp("custom")
    marker, folder, pipeline = home / "marker", home / "model", home / "pipeline"
    custom_folder(folder, marker)
    save_file({"d2t": torch.zeros(4, dtype=torch.int64)}, folder / "model.safetensors")
    pipe = tiny_infinity.infinity_pipeline()
    pipe.save_pretrained(pipeline)
    custom_folder(pipeline / "tokenizer", marker)
    index = json.loads((pipeline / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "AutoTokenizer"]
    (pipeline / "model_index.json").write_text(json.dumps(index))
    torch.save(tiny.to_original(pipe.transformer), home / "transformer.pth")
    torch.save(tiny.to_original(AutoencoderBSQ((32,) * 5, 1, latent_channels=6)), home / "vae.pth")
    encoder = home / "encoder"
    pipe.text_encoder.save_pretrained(encoder)
    config = json.loads((encoder / "config.json").read_text())
    custom_folder(encoder, marker)
    (encoder / "config.json").write_text(json.dumps(config))  # T5's own model, a tokenizer of the folder's
    files = {"transformer": home / "transformer.pth", "vae": home / "vae.pth", "pipeline": pipeline}
    files |= {"model": folder, "encoder": encoder}
    return marker, {name: str(path) for name, path in files.items()}


def test_a_folders_own_code_is_not_run_even_if_somebody_says_yes(places):
    marker, files = places
    calls = {call.format(**files): expected for call, expected in LOADERS.items()}
    run = [sys.executable, "-c", MANY, json.dumps(list(calls))]
    done = subprocess.run(run, input="y\n" * 30, cwd=ROOT, capture_output=True, text=True, check=True)
    assert not marker.exists() and "[y/N]" not in done.stdout + done.stderr
    said = json.loads(done.stdout.partition("SAID ")[2])
    for call, expected in calls.items():
        line = said[call]
        assert line.startswith("UserError: ") and expected in line and "trust_remote_code" not in line, (call, line)


@pytest.mark.parametrize("kind", [AutoTokenizer, AutoConfig, AutoModelForCausalLM])
def test_a_library_that_leaves_the_question_open_gets_a_no(places, kind, monkeypatch):
    marker, files = places
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    with pytest.raises(ValueError, match="custom code"), never_asked():
        kind.from_pretrained(files["model"])
    assert not marker.exists()


def test_the_question_is_asked_again_afterwards():
    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    with pytest.raises(KeyError), never_asked():
        raise KeyError
    assert dynamic_module_utils.TIME_OUT_REMOTE_CODE == before > 0


def calls_without_a_no(tree: ast.AST) -> list[int]:
    """Lines of calls that load by a class of the folder's choice and do not refuse its code."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        chosen = owner.split(".")[-1] in AUTO or "getattr(" in owner
        refused = any(
            word.arg == "trust_remote_code" and getattr(word.value, "value", None) is False for word in node.keywords
        )
        if name in ("from_pretrained", "from_config") and chosen and not refused:
            found.append(node.lineno)
    return found


def test_every_load_by_a_class_of_the_folders_choice_refuses_its_code():
    loose = "AutoTokenizer.from_pretrained(a)\nt.AutoConfig.from_pretrained(a, x=1)"
    assert calls_without_a_no(ast.parse(loose)) == [1, 2]
    assert not calls_without_a_no(ast.parse("AutoTokenizer.from_pretrained(a, trust_remote_code=False)"))
    files = [file for folder in ("draftdiff", "kernels", "pipelines") for file in (ROOT / folder).rglob("*.py")]
    loose = {str(file): lines for file in files if (lines := calls_without_a_no(ast.parse(file.read_text())))}
    assert len(files) > 100 and not loose
