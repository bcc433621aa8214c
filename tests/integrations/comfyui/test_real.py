"""Draft attention in ComfyUI itself: its samplers, patchers and models, small. Where COMFYUI_PATH names its folder."""

import asyncio
import json

import pytest
import torch

from draftdiff.core.grid import LatentGrid
from draftdiff.integrations.comfyui import install
from draftdiff.integrations.comfyui.patch import apply, patch_of
from tests.integrations.comfyui import real
from tests.integrations.comfyui.test_nodes import widgets_of
from tests.integrations.comfyui.test_patch import ALL, HOOK, SPARSE, padded, reference
from tests.integrations.comfyui.workflow import as_prompt

pytestmark = pytest.mark.skipif(real.folder() is None, reason="COMFYUI_PATH is not set")

_JOINT = {"in_channels": 16, "out_channels": 16, "vec_in_dim": 8, "context_in_dim": 16, "hidden_size": 128}
_JOINT |= {"mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 2, "axes_dim": [16, 24, 24]}
_JOINT |= {"theta": 256, "qkv_bias": True, "guidance_embed": True}
_WAN = {"dim": 128, "ffn_dim": 128, "num_heads": 2, "num_layers": 2, "text_dim": 32, "freq_dim": 32}
_LTX = {"in_channels": 128, "cross_attention_dim": 128, "attention_head_dim": 64, "num_attention_heads": 2}

# Name in comfy.supported_models, its configuration, the latent, the text, what else a node puts into conditioning; and
# where its tokens stand.
FAMILIES = {
    "Wan": (
        "WAN21_T2V",
        {"image_model": "wan2.1", "model_type": "t2v", **_WAN},
        (1, 16, 5, 15, 22),
        (7, 32),
        {},
        (LatentGrid(5, 8, 11), 0, (), None),
    ),
    "Flux": (
        "Flux",
        {"image_model": "flux", "patch_size": 2, **_JOINT},
        (1, 16, 40, 50),
        (9, 16),
        {"pooled_output": torch.zeros(1, 8), "reference_latents": [torch.zeros(1, 16, 20, 30)]},
        (LatentGrid(1, 20, 25), 9, ((509, LatentGrid(1, 10, 15)),), None),
    ),
    "HunyuanVideo": (
        "HunyuanVideo",
        {"image_model": "hunyuan_video", "patch_size": [1, 2, 2], "byt5": False, "meanflow": False, **_JOINT},
        (1, 16, 5, 16, 22),
        (9, 16),
        {"pooled_output": torch.zeros(1, 8), "attention_mask": padded(9, 6)},
        (LatentGrid(5, 8, 11), 0, (), padded(9, 6).bool()),
    ),
    "LTX": (
        "LTXV",
        {"image_model": "ltxv", "caption_channels": 16, "num_layers": 2, **_LTX},
        (1, 128, 5, 9, 13),
        (9, 16),
        {"attention_mask": padded(9, 9)},
        (LatentGrid(5, 9, 13), 0, (), None),
    ),
}


@pytest.fixture(autouse=True)
def _comfy():
    real.load()


def build(family):
    import comfy.supported_models

    name, settings, latent, text, given, places = FAMILIES[family]
    patcher = real.patcher(getattr(comfy.supported_models, name)(dict(settings)))
    return patcher, latent, torch.randn(1, *text), given, places


@pytest.mark.parametrize("family", FAMILIES)
def test_with_every_tile_kept_it_is_dense_attention(family):
    patcher, latent, context, given, places = build(family)
    patched = apply(patcher, ALL, 0.3, 1.0)
    dense = real.sample(patcher, latent, context, **given)
    out = real.sample(patched, latent, context, **given)
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5 * float(dense.abs().max()))
    log = patch_of(patched).log
    assert log.steps == (2, 2) and log.means[0] == 1 and log.grid == places[0] and not log.reasons


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_is_chosen_over_the_models_own_grid(family):
    patcher, latent, context, given, places = build(family)
    out = real.sample(apply(patcher, SPARSE), latent, context, **given)
    dense = real.sample(patcher, latent, context, **given)
    patcher.model_options["transformer_options"][HOOK] = reference(SPARSE, *places)
    assert torch.equal(out, real.sample(patcher, latent, context, **given)) and not torch.equal(out, dense)


def test_with_guidance_both_branches_are_sparse():
    patcher, latent, context, given, _ = build("Wan")
    patched = apply(patcher, SPARSE)
    real.sample(patched, latent, context, cfg=3.0, **given)
    log = patch_of(patched).log
    assert log.steps == (4, 0) and all(forward.calls == 2 for forward in log.forwards) and not log.reasons


def test_a_cache_of_comfyui_that_skips_steps_is_no_obstacle():
    from comfy_extras.nodes_easycache import EasyCacheNode

    patcher, latent, context, given, _ = build("Wan")
    patched = EasyCacheNode.execute(apply(patcher, SPARSE), 100.0, 0.3, 1.0, False).result[0]
    real.sample(patched, latent, context, steps=6, **given)
    log = patch_of(patched).log
    ((reason, count),) = log.reasons.items()
    assert "by a cache" in reason and 0 < len(log.forwards) == 6 - count < 6
    assert all(forward.calls == 2 for forward in log.forwards)


def test_compiled_by_comfyuis_node_it_computes_the_same():
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    patcher, latent, context, given, _ = build("Wan")
    patched = apply(patcher, SPARSE)
    expected = real.sample(patched, latent, context, **given)
    compiled = patched.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    out = real.sample(compiled, latent, context, **given)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert patch_of(compiled).log.steps == (4, 0) and patch_of(compiled).log.forwards[0].calls == 2


@pytest.fixture
def nodes(tmp_path):
    """ComfyUI's table of nodes, with ours as it loads them from an installed folder."""
    import nodes

    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "models").mkdir()
    folder = install.install(tmp_path)
    assert asyncio.run(nodes.load_custom_node(str(folder)))
    for name in ("hunyuan", "lt", "flux", "sd3", "model_advanced", "custom_sampler", "images"):
        assert asyncio.run(
            nodes.load_custom_node(str(real.folder() / "comfy_extras" / f"nodes_{name}.py"), "comfy_extras")
        )
    return nodes


def test_the_installed_folder_gives_both_nodes(nodes):
    patcher, latent, context, given, _ = build("Wan")
    attention, report = (nodes.NODE_CLASS_MAPPINGS[f"Draftdiff{name}"] for name in ("Attention", "AttentionReport"))
    settings = {
        name: options[1]["default"] for name, options in attention.INPUT_TYPES()["required"].items() if name != "model"
    }
    (patched,) = attention.EXECUTE_NORMALIZED(model=patcher, **settings | {"min_tokens": 0, "backend": "torch"}).result
    out = real.sample(patched, latent, context, **given)
    told = report.EXECUTE_NORMALIZED(model=patched, latent={"samples": out})
    assert told.result[0]["samples"] is out and "3 sparse and 1 dense steps" in told.result[1]
    assert told.ui.as_dict()["text"] == (told.result[1],)


@pytest.mark.parametrize("name", sorted(install.workflows()))
def test_a_workflow_fits_comfyuis_nodes(name, nodes):
    workflow = json.loads(install.workflows()[name])
    types = {node["type"] for node in workflow["nodes"]}
    ours = {kind for kind in types if kind.startswith("Draftdiff")}
    if newer := sorted(types - ours - set(nodes.NODE_CLASS_MAPPINGS)):
        pytest.skip(f"this ComfyUI has no {', '.join(newer)}")
    classes = {kind: nodes.NODE_CLASS_MAPPINGS[kind] for kind in types}
    prompt = as_prompt(workflow, {kind: widgets_of(node.INPUT_TYPES()) for kind, node in classes.items()})
    for node in prompt.values():
        inputs = classes[node["class_type"]].INPUT_TYPES()
        allowed = {**inputs["required"], **inputs.get("optional", {})}
        assert set(inputs["required"]) <= set(node["inputs"]) <= set(allowed)
        for key, given in node["inputs"].items():
            kind = allowed[key][0]
            if isinstance(given, list):
                assert classes[prompt[given[0]]["class_type"]].RETURN_TYPES[given[1]] == kind
            elif isinstance(kind, list) and (key == "sampler_name" or "_name" not in key):  # others are files
                assert given in kind, f"{key} of {node['class_type']}"
