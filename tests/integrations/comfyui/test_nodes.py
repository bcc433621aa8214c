"""The nodes in both of ComfyUI's forms, the folder that imports them, and the workflows that use them."""

import asyncio
import importlib.util
import inspect
import json
import subprocess
import sys
from importlib import import_module

import pytest
import torch

from draftdiff.cli import main
from draftdiff.errors import UserError
from draftdiff.integrations.comfyui import install, nodes, v1
from draftdiff.integrations.comfyui.patch import patch_of
from tests.cli.one_line import fails_in_one_line
from tests.integrations.comfyui import contract
from tests.integrations.comfyui.workflow import as_prompt

DEFAULTS = {given.name: given.options["default"] for given in nodes.NODES[0].inputs[1:]}
_SOCKETS = (
    "MODEL",
    "LATENT",
    "CONDITIONING",
    "CLIP",
    "VAE",
    "IMAGE",
    "SAMPLER",
    "SIGMAS",
    "NOISE",
    "GUIDER",
    "AUDIO",
    "VIDEO",
)


def widgets_of(inputs: dict) -> list[str | None]:
    """Names of a node's widgets, from its INPUT_TYPES; the canvas puts one of its own behind a seed."""
    found: list[str | None] = []
    for name, (kind, *_) in {**inputs["required"], **inputs.get("optional", {})}.items():
        if kind not in _SOCKETS:
            found += [name, None] if name in ("seed", "noise_seed") else [name]
    return found


@pytest.fixture(autouse=True)
def _comfy(monkeypatch):
    contract.put(monkeypatch)


def v3_nodes() -> dict:
    extension = asyncio.run(import_module("draftdiff.integrations.comfyui.v3").comfy_entrypoint())
    return {node.define_schema().node_id: node for node in asyncio.run(extension.get_node_list())}


def test_both_forms_say_the_same():
    assert set(v3_nodes()) == set(v1.NODE_CLASS_MAPPINGS) == set(v1.NODE_DISPLAY_NAME_MAPPINGS)
    for name, node in v3_nodes().items():
        schema, older = node.define_schema(), v1.NODE_CLASS_MAPPINGS[name]
        assert schema.display_name == v1.NODE_DISPLAY_NAME_MAPPINGS[name] and schema.category == older.CATEGORY
        assert [given.kind for given in schema.outputs] == list(older.RETURN_TYPES)
        assert [given.display_name for given in schema.outputs] == list(older.RETURN_NAMES)
        assert schema.is_output_node == older.OUTPUT_NODE
        inputs = older.INPUT_TYPES()["required"]
        assert [given.id for given in schema.inputs] == list(inputs)
        for given in schema.inputs:
            kind, options = inputs[given.id]
            assert kind == (given.options if given.kind == "COMBO" else given.kind)
            assert {key: value for key, value in vars(given).items() if key in options} == options


def test_a_node_takes_what_its_function_takes():
    for node in nodes.NODES:
        assert [given.name for given in node.inputs] == list(inspect.signature(node.execute).parameters)


@pytest.mark.parametrize("form", ["v1", "v3"])
def test_both_forms_patch_a_model_and_report_on_it(form):
    def run(name, **given):
        if form == "v1":
            node = v1.NODE_CLASS_MAPPINGS[name]()
            found = getattr(node, node.FUNCTION)(**given)
            return (found["result"], found["ui"]["text"]) if isinstance(found, dict) else (found, None)
        found = v3_nodes()[name].execute(**given)
        return found.args, None if found.ui is None else list(found.ui["text"])

    patcher = contract.ModelPatcher(contract.WanModel())
    (patched,), _ = run("DraftdiffAttention", model=patcher, **DEFAULTS | {"min_tokens": 440, "backend": "torch"})
    sigmas = [1.0, 0.9, 0.8, 0.5]
    patched.sample(sigmas, torch.randn(1, 4, 5, 16, 22), None, torch.randn(1, 7, 128))
    latent = {"samples": torch.zeros(1)}
    (kept, told), shown = run("DraftdiffAttentionReport", model=patched, latent=latent)
    assert kept is latent and shown == [told] and told.startswith("Draft Attention: 2 sparse and 2 dense steps")
    assert patch_of(patched).log.forwards[-1].calls == 1  # its first block stays dense
    (_, without), _ = run("DraftdiffAttentionReport", model=patcher, latent=latent)
    assert without == "Draft Attention is not on this model"


def test_what_a_user_writes_wrong_is_told():
    patcher = contract.ModelPatcher(contract.WanModel())
    with pytest.raises(UserError, match=r"dense_blocks must be layers as in '0,1,38-39', got '0;1'"):
        nodes.draft_attention(patcher, **DEFAULTS | {"dense_blocks": "0;1"})


@pytest.fixture
def comfyui(tmp_path):
    for name in ("custom_nodes", "comfy"):
        (tmp_path / name).mkdir()
    (tmp_path / "nodes.py").touch()
    return tmp_path


def loaded(folder):
    """The module of a folder of custom nodes, as ComfyUI loads it."""
    spec = importlib.util.spec_from_file_location(str(folder), folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_installs_a_folder_that_imports_the_nodes_and_removes_it(comfyui, capsys, monkeypatch):
    assert main(["comfyui", "install", str(comfyui)]) == 0 == main(["comfyui", "install", str(comfyui)])
    folder = comfyui / "custom_nodes" / "draftdiff"
    assert capsys.readouterr().out == f"installed {folder}\n" * 2
    assert sorted(path.name for path in (folder / "example_workflows").iterdir()) == sorted(install.workflows())
    assert hasattr(loaded(folder), "comfy_entrypoint") and not hasattr(loaded(folder), "NODE_CLASS_MAPPINGS")
    monkeypatch.setitem(sys.modules, "comfy_api.latest", None)  # an older ComfyUI
    assert set(loaded(folder).NODE_CLASS_MAPPINGS) == {node.node_id for node in nodes.NODES}
    assert main(["comfyui", "uninstall", str(comfyui), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"uninstall": str(folder)} and not folder.exists()
    assert list((comfyui / "custom_nodes").iterdir()) == []


def test_mistakes_are_told_in_one_line_and_nothing_of_others_is_touched(comfyui, tmp_path, capsys):
    for action in ("install", "uninstall"):
        assert "is no ComfyUI" in fails_in_one_line(capsys, "comfyui", action, tmp_path / "comfy")
    assert "nothing to uninstall" in fails_in_one_line(capsys, "comfyui", "uninstall", comfyui)
    folder = install.install(comfyui)
    (folder / "mine.txt").touch()
    assert "was not written by" in fails_in_one_line(capsys, "comfyui", "uninstall", comfyui)
    (folder / "mine.txt").unlink()
    (folder / "__init__.py").write_text("# another\n")
    assert "was not written by" in fails_in_one_line(capsys, "comfyui", "install", comfyui)
    assert (folder / "__init__.py").read_text() == "# another\n"


def test_nothing_here_needs_comfyui():
    code = (
        "import sys, draftdiff.integrations.comfyui.v1, draftdiff.integrations.comfyui.install\n"
        "print({'comfy', 'comfy_api', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ComfyUI's own nodes in the workflows: sockets, widgets (None: one of the canvas), outputs. From its code at a125cd8;
# those of LTX-2 and MiniMax-H3 from comfyui-embedded-docs 0.5.15, and their order on the canvas from the graphs in
# comfyui-workflow-templates-json 0.1.123 (October 2026).
NODES = {
    "UNETLoader": ([], ["unet_name", "weight_dtype"], ["MODEL"]),
    "CheckpointLoaderSimple": ([], ["ckpt_name"], ["MODEL", "CLIP", "VAE"]),
    "CLIPLoader": ([], ["clip_name", "type", "device"], ["CLIP"]),
    "DualCLIPLoader": ([], ["clip_name1", "clip_name2", "type", "device"], ["CLIP"]),
    "VAELoader": ([], ["vae_name"], ["VAE"]),
    "CLIPTextEncode": (["clip"], ["text"], ["CONDITIONING"]),
    "ConditioningZeroOut": (["conditioning"], [], ["CONDITIONING"]),
    "FluxGuidance": (["conditioning"], ["guidance"], ["CONDITIONING"]),
    "LTXVConditioning": (["positive", "negative"], ["frame_rate"], ["CONDITIONING", "CONDITIONING"]),
    "ModelSamplingSD3": (["model"], ["shift"], ["MODEL"]),
    "EmptyHunyuanLatentVideo": ([], ["width", "height", "length", "batch_size"], ["LATENT"]),
    "EmptyLTXVLatentVideo": ([], ["width", "height", "length", "batch_size"], ["LATENT"]),
    "EmptySD3LatentImage": ([], ["width", "height", "batch_size"], ["LATENT"]),
    "KSampler": (
        ["model", "positive", "negative", "latent_image"],
        ["seed", None, "steps", "cfg", "sampler_name", "scheduler", "denoise"],
        ["LATENT"],
    ),
    "KSamplerSelect": ([], ["sampler_name"], ["SAMPLER"]),
    "LTXVScheduler": (["latent"], ["steps", "max_shift", "base_shift", "stretch", "terminal"], ["SIGMAS"]),
    "SamplerCustom": (
        ["model", "positive", "negative", "sampler", "sigmas", "latent_image"],
        ["add_noise", "noise_seed", None, "cfg"],
        ["LATENT", "LATENT"],
    ),
    "VAEDecode": (["samples", "vae"], [], ["IMAGE"]),
    "SaveImage": (["images"], ["filename_prefix"], []),
    "SaveAnimatedWEBP": (["images"], ["filename_prefix", "fps", "lossless", "quality", "method"], []),
    "LTXAVTextEncoderLoader": ([], ["text_encoder", "ckpt_name", "device"], ["CLIP"]),
    "LTXVAudioVAELoader": ([], ["ckpt_name"], ["VAE"]),
    "LTXVEmptyLatentAudio": (["audio_vae"], ["frames_number", "frame_rate", "batch_size"], ["LATENT"]),
    "LTXVConcatAVLatent": (["video_latent", "audio_latent"], [], ["LATENT"]),
    "LTXVSeparateAVLatent": (["av_latent"], [], ["LATENT", "LATENT"]),
    "LTXVAudioVAEDecode": (["samples", "audio_vae"], [], ["AUDIO"]),
    "MiniMaxH3ImageToVideo": (
        ["clip", "vae", "first_frame", "last_frame"],
        ["prompt", "width", "height", "length"],
        ["CONDITIONING", "LATENT"],
    ),
    "VAEDecodeAudio": (["samples", "vae"], [], ["AUDIO"]),
    "BasicGuider": (["model", "conditioning"], [], ["GUIDER"]),
    "CFGGuider": (["model", "positive", "negative"], ["cfg"], ["GUIDER"]),
    "RandomNoise": ([], ["noise_seed", None], ["NOISE"]),
    "BasicScheduler": (["model"], ["scheduler", "steps", "denoise"], ["SIGMAS"]),
    "SamplerCustomAdvanced": (["noise", "guider", "sampler", "sigmas", "latent_image"], [], ["LATENT", "LATENT"]),
    "CreateVideo": (["images", "audio"], ["fps"], ["VIDEO"]),
    "SaveVideo": (["video"], ["filename_prefix", "format", "codec"], []),
}
OPTIONAL = ("first_frame", "last_frame")
for _name, _node in v1.NODE_CLASS_MAPPINGS.items():
    _inputs = _node.INPUT_TYPES()
    _sockets = [name for name in _inputs["required"] if name not in widgets_of(_inputs)]
    NODES[_name] = (_sockets, widgets_of(_inputs), list(_node.RETURN_TYPES))


@pytest.mark.parametrize("name", sorted(install.workflows()))
def test_a_workflows_nodes_links_and_widgets_fit_together(name):
    workflow = json.loads(install.workflows()[name])
    by_id = {node["id"]: node for node in workflow["nodes"]}
    assert len(by_id) == len(workflow["nodes"]) and max(by_id) == workflow["last_node_id"]
    assert max(link[0] for link in workflow["links"]) == workflow["last_link_id"]
    held, given = set(), set()
    for node in by_id.values():
        sockets, _, outputs = NODES[node["type"]]
        assert [socket["name"] for socket in node["inputs"]] == sockets
        assert [output["type"] for output in node["outputs"]] == outputs
        linked = [at for at, name in enumerate(sockets) if node["inputs"][at]["link"] or name not in OPTIONAL]
        held |= {(node["inputs"][at]["link"], node["id"], at) for at in linked}
        given |= {(link, node["id"], at) for at, output in enumerate(node["outputs"]) for link in output["links"]}
    assert held == {(number, target, at) for number, _, _, target, at, _ in workflow["links"]}
    assert given == {(number, source, at) for number, source, at, *_ in workflow["links"]}
    for _, source, output, target, socket, kind in workflow["links"]:
        assert by_id[source]["outputs"][output]["type"] == kind == by_id[target]["inputs"][socket]["type"]
    prompt = as_prompt(workflow, {kind: widgets for kind, (_, widgets, _) in NODES.items()})
    (attention,) = (node for node in prompt.values() if node["class_type"] == "DraftdiffAttention")
    assert {key: value for key, value in attention["inputs"].items() if key != "model"} == DEFAULTS
    (report,) = (node for node in prompt.values() if node["class_type"] == "DraftdiffAttentionReport")
    assert (
        prompt[report["inputs"]["model"][0]] is attention
        and "Sampler" in prompt[report["inputs"]["latent"][0]]["class_type"]
    )


def test_there_are_workflows_of_videos_and_pictures():
    families = ("wan", "flux", "hunyuan_video", "ltx_video", "ltx_2", "minimax_h3")
    assert set(install.workflows()) == {f"{name}.json" for name in families}


@pytest.mark.parametrize(
    ("name", "kind", "unit", "past"),
    [("ltx_2", "EmptyLTXVLatentVideo", 8, 1), ("minimax_h3", "MiniMaxH3ImageToVideo", 17, 5)],
)
def test_sizes_are_ones_that_the_models_take_and_sound_goes_with_the_video(name, kind, unit, past):
    workflow = json.loads(install.workflows()[f"{name}.json"])
    prompt = as_prompt(workflow, {kind: widgets for kind, (_, widgets, _) in NODES.items()})
    given = {node["class_type"]: node["inputs"] for node in prompt.values()}
    size, rate = given[kind], given["CreateVideo"]["fps"]
    assert size["width"] % 32 == size["height"] % 32 == 0 and size["length"] % unit == past
    assert rate == 24
    if name == "ltx_2":
        sound = given["LTXVEmptyLatentAudio"]
        assert (sound["frames_number"], sound["frame_rate"]) == (size["length"], rate)
        assert given["LTXVConditioning"]["frame_rate"] == rate
