"""Original checkpoints: what is read from them, and what is said of those that do not fit."""

import json

import pytest
import torch
from safetensors.torch import save_file

from draftdiff.pipelines.var import VARPipeline
from draftdiff.var.checkpoint import read_checkpoint
from draftdiff.var.transformer_var import VARTransformer2DModel
from draftdiff.var.vq_model import VQModel
from tests.var import tiny


def original_var(model):
    """What VAR's authors save: with the buffers that follow from the configuration."""
    tensors = tiny.to_original(model)
    for name in [name for name in tensors if name.endswith("scale_mul_1H11")]:
        tensors[name] = tensors[name].view(1, -1, 1, 1)
    tensors["pos_start"], tensors["pos_1LC"] = tensors["pos_start"][None], tensors["pos_1LC"][None]
    levels = torch.repeat_interleave(torch.arange(len(model.lengths)), torch.tensor(model.lengths))
    tensors["lvl_1L"] = levels[None]
    tensors["attn_bias_for_masking"] = torch.zeros(1, 1, len(levels), len(levels))
    return tensors


@pytest.fixture
def model():
    # Key biases are zero in every released model; the format has no place for others.
    model = tiny.transformer(shared_adaln=True)
    for block in model.blocks:
        block.attn.to_qkv.bias.data.chunk(3)[1].zero_()
    return model


def test_an_original_file_gives_the_model_that_it_holds(model, tmp_path):
    torch.save(original_var(model), tmp_path / "var.pth")
    loaded = VARTransformer2DModel.from_single_file(tmp_path / "var.pth")
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(a, b), name
    assert loaded.config.patch_nums == tiny.PATCH_NUMS and loaded.config.shared_adaln
    half = VARTransformer2DModel.from_single_file(tmp_path / "var.pth", torch_dtype=torch.float16)
    assert half.dtype == torch.float16


@pytest.mark.parametrize("num_phi", [0, 1, 4])
def test_an_original_vq_model_loads_whole_with_any_number_of_convolutions(tmp_path, num_phi):
    model = tiny.vq_model(num_phi=num_phi)
    tensors = tiny.to_original(model)
    if num_phi != 4:
        for name in [name for name in tensors if ".quant_resi." in name]:
            other = "qresi." + name.split(".")[-1] if num_phi == 1 else ".".join(name.split(".")[-2:])
            tensors[f"quantize.quant_resi.{other}"] = tensors.pop(name)
    tensors["quantize.ema_vocab_hit_SV"] = torch.zeros(6, 32)
    torch.save(tensors, tmp_path / "vae.pth")
    loaded = VQModel.from_single_file(tmp_path / "vae.pth", patch_nums=tiny.PATCH_NUMS, norm_num_groups=4)
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(a, b), name
    picture = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(model(picture).sample, loaded(picture).sample)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: {"trainer": {"var_wo_ddp": tensors}, "epoch": 3},
        lambda tensors: {"state_dict": {f"module.{name}": t for name, t in tensors.items()}},
    ],
    ids=["trainer", "module"],
)
def test_a_training_checkpoint_is_opened_up_to_its_weights(model, tmp_path, wrap):
    torch.save(wrap(original_var(model)), tmp_path / "nested.pth")
    assert VARTransformer2DModel.from_single_file(tmp_path / "nested.pth").config.num_layers == 2


def test_a_folder_of_shards_is_read_through_its_index(model, tmp_path):
    tensors = {name: t.contiguous() for name, t in original_var(model).items()}
    names = sorted(tensors)
    placed = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(names)}
    for file in set(placed.values()):
        save_file({name: tensors[name] for name in names if placed[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    assert sorted(read_checkpoint(tmp_path)) == names
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*part-1.safetensors"):
        read_checkpoint(tmp_path)


def test_two_files_make_a_pipeline_and_three_a_collaborative_one(model, tmp_path):
    torch.save(original_var(model), tmp_path / "var.pth")
    vae = VQModel(block_out_channels=(32, 32), layers_per_block=1, latent_channels=4, num_vq_embeddings=32)
    torch.save(tiny.to_original(vae), tmp_path / "vae.pth")
    pipe = VARPipeline.from_single_file(
        tmp_path / "var.pth", tmp_path / "vae.pth", refiner=tmp_path / "var.pth", draft_scales=3
    )
    pipe.set_progress_bar_config(disable=True)
    assert pipe([1]).images[0].size == (16, 16)
    assert pipe.config.draft_scales == 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("blocks.1.attn.q_bias"), r"missing: blocks\.1\.attn\.q_bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected: extra"),
        (lambda t: t.update({"head.bias": torch.zeros(7)}), r"wrong shape: head\.bias is \(7,\) instead of \(32,\)"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_as_it_stands_in_the_file(model, tmp_path, damage, message):
    tensors = original_var(model)
    damage(tensors)
    torch.save(tensors, tmp_path / "var.pth")
    with pytest.raises(ValueError, match=message) as error:
        VARTransformer2DModel.from_single_file(tmp_path / "var.pth")
    assert "var.pth" in str(error.value) and "\n" not in str(error.value)


def test_a_file_of_another_model_is_named(model, tmp_path):
    torch.save(original_var(model), tmp_path / "var.pth")
    with pytest.raises(ValueError, match=r"var.pth: it holds a VARTransformer2DModel, not a VQModel"):
        VQModel.from_single_file(tmp_path / "var.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth: not a checkpoint of VAR.*it holds weight"):
        VQModel.from_single_file(tmp_path / "other.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_named(model, tmp_path, suffix):
    whole, part = tmp_path / f"whole{suffix}", tmp_path / f"part{suffix}"
    if suffix == ".pth":
        torch.save(original_var(model), whole)
    else:
        save_file(tiny.to_original(tiny.vq_model()), whole)
    part.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"part{suffix} is not a readable checkpoint") as error:
        read_checkpoint(part)
    assert "\n" not in str(error.value)


def test_code_in_a_file_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))

    torch.save({"weights": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match=r"trap.pth is not a readable checkpoint"):
        read_checkpoint(tmp_path / "trap.pth")
    assert not (tmp_path / "trapped").exists()


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere.pth"):
        read_checkpoint(tmp_path / "nowhere.pth")
