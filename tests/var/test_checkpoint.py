"""Original checkpoints: what is read from them, and what is said of those that do not fit."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from draftdiff.errors import UserError
from draftdiff.pipelines.var import VARPipeline
from draftdiff.var.checkpoint import read_checkpoint
from draftdiff.var.transformer_infinity import InfinityTransformer2DModel
from draftdiff.var.transformer_var import VARTransformer2DModel
from draftdiff.var.vq_model import VQModel
from tests.var import tiny, tiny_infinity


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
        lambda tensors: {"model_state_dict": tensors, "optimizer_state_dict": {"lr": 0.1}},
        lambda tensors: {"ema": tensors},
        lambda tensors: {"ema_state_dict": tensors, "step": 7},
        lambda tensors: {"trainer": {"ema": tensors}},
        lambda tensors: {"model": tensors, "ema": {name: t + 1 for name, t in tensors.items()}},
        lambda tensors: {"model": {"depth": 2}, "state_dict": tensors},
        lambda tensors: {"model": tensors, "state_dict": tensors},
        lambda tensors: {f"var.{name}": t for name, t in tensors.items()},
        lambda tensors: {f"_orig_mod.module.model.{name}": t for name, t in tensors.items()},
        lambda tensors: {re.sub(r"(blocks.\d.)", r"\1_fsdp_wrapped_module.", name): t for name, t in tensors.items()},
        lambda tensors: {
            re.sub(r"(blocks.\d.)", r"\1_fsdp_wrapped_module._checkpoint_wrapped_module.", f"_orig_mod.{name}"): t
            for name, t in tensors.items()
        },
    ],
)
def test_a_training_checkpoint_is_opened_up_to_its_weights(model, tmp_path, wrap):
    torch.save(wrap(original_var(model)), tmp_path / "nested.pth")
    loaded = VARTransformer2DModel.from_single_file(tmp_path / "nested.pth")
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(a, b), name


def test_chunks_of_infinity_keep_the_modules_of_their_own_names(tmp_path):
    model = tiny_infinity.transformer()
    for block in model.blocks:
        block.attn1.to_qkv.bias.data.chunk(3)[1].zero_()
        block.attn2.to_kv.bias.data.chunk(2)[0].zero_()
    model.text_pool.to_kv.bias.data.chunk(2)[0].zero_()
    wrapped = r"module.block_chunks.\1._checkpoint_wrapped_module.module.0."
    tensors = {re.sub(r"^blocks\.(\d)\.", wrapped, name): t for name, t in tiny.to_original(model).items()}
    tensors = {name if name.startswith("module.") else f"module.{name}": t for name, t in tensors.items()}
    torch.save(tensors, tmp_path / "infinity.pth")
    loaded = InfinityTransformer2DModel.from_single_file(tmp_path / "infinity.pth")
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32])
def test_the_scales_are_read_from_numbers_that_were_cast_with_the_weights(model, tmp_path, dtype):
    tensors = original_var(model)
    tensors["lvl_1L"] = tensors["lvl_1L"].to(dtype)
    torch.save({name: t.half() if name != "lvl_1L" else t for name, t in tensors.items()}, tmp_path / "half.pth")
    loaded = VARTransformer2DModel.from_single_file(tmp_path / "half.pth")
    assert loaded.config.patch_nums == tiny.PATCH_NUMS and loaded.dtype == torch.float16


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_a_file_loads_in_a_dtype_by_either_name(model, tmp_path, argument):
    torch.save(original_var(model), tmp_path / "var.pth")
    for name in ("bf16", "torch.bfloat16", torch.bfloat16):
        assert VARTransformer2DModel.from_single_file(tmp_path / "var.pth", **{argument: name}).dtype == torch.bfloat16
    with pytest.raises(UserError, match=rf"^{argument} must be one of float32, float16, bfloat16, got 'auto'$"):
        VARTransformer2DModel.from_single_file(tmp_path / "var.pth", **{argument: "auto"})
    with pytest.raises(UserError, match=r"^dtype and torch_dtype are one argument, got half and float$"):
        VARTransformer2DModel.from_single_file(tmp_path / "var.pth", dtype="half", torch_dtype="float")


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


def test_shards_may_hold_wrapped_names(model, tmp_path):
    tensors = {f"_orig_mod.{name}": t.contiguous() for name, t in original_var(model).items()}
    placed = {name: f"part-{'blocks' in name}.safetensors" for name in tensors}
    for file in set(placed.values()):
        save_file({name: t for name, t in tensors.items() if placed[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    assert sorted(read_checkpoint(tmp_path)) == sorted(original_var(model))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"weight_map": []}', "is not a readable index of shards: its weight_map names no files"),
        ('{"weight_map": {}}', "is not a readable index of shards: its weight_map names no files"),
        ('{"weight_map": {"a": 5}}', "is not a readable index of shards: its weight_map names no files"),
        ('{"a": 5}', "is not a readable index of shards: its weight_map names no files"),
        ("[]", "is not a readable index of shards: it holds a list"),
        ("{", "is not a readable index of shards: "),
        ("", "is empty"),
        ('{"weight_map": {"a": "../outside.pth"}}', r"names '../outside.pth', which is not inside it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', r"names '/etc/passwd', which is not inside it"),
        ('{"weight_map": {"a": "link.pth"}}', r"names 'link.pth', which is not inside it"),
        ('{"weight_map": {"a": "."}}', "is a folder, not a checkpoint"),
    ],
)
def test_an_index_that_is_none_or_leads_outside_is_named(tmp_path, content, message):
    folder = tmp_path / "shards"
    folder.mkdir()
    torch.save({"a": torch.zeros(1)}, tmp_path / "outside.pth")
    (folder / "link.pth").symlink_to(tmp_path / "outside.pth")
    (folder / "model.index.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_checkpoint(folder)
    assert str(folder) in str(error.value) and str(error.value).isprintable()


def test_a_folder_without_an_index_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is a folder without an index of shards .*: name a file in it$"):
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
        (
            lambda t: t.update({"head.bias": torch.zeros(32, dtype=torch.int64)}),
            "no weights: head.bias is torch.int64",
        ),
        (
            lambda t: t.update({"head.bias": torch.zeros(32, dtype=torch.cfloat)}),
            "no weights: head.bias is torch.complex64",
        ),
        (lambda t: t.update({"head.bias": torch.zeros(32).to_sparse()}), r"no weights: head\.bias is sparse"),
        (lambda t: t.update({"head.bias": torch.zeros(32, device="meta")}), r"no weights: head\.bias is empty"),
        (lambda t: t.update({"head.bias": torch.full((32,), torch.nan)}), r"no weights: head\.bias holds NaN or inf"),
        (lambda t: t["word_embed.weight"].view(-1)[:1].fill_(-torch.inf), "word_embed.weight holds NaN or inf"),
        (
            lambda t: t.update({"blocks.0.attn.q_bias": torch.zeros(2, 3)}),
            r"blocks.0.attn.q_bias \+ blocks.0.attn.v_bias is \(2, 3\) \+ \(32,\) instead of \(96,\)",
        ),
        (
            lambda t: t.update({"head.weight": torch.zeros(7)}),
            r"head.weight is \(7,\), which is no shape of 2",
        ),
        (lambda t: t.update({"head.weight": torch.zeros(0, 32)}), r"head.weight is \(0, 32\), which is no shape of 2"),
        (lambda t: t.update({"blocks.0.attn.scale_mul_1H11": torch.zeros(0)}), "scale_mul_1H11 is empty"),
        (lambda t: t.update(lvl_1L=torch.tensor([0.0, torch.nan])), "its lvl_1L does not number the tokens by scales"),
        (lambda t: t.update(lvl_1L=torch.tensor([[0, 1, 1]])), "its lvl_1L does not number the tokens by scales"),
        (lambda t: t.update(lvl_1L=torch.tensor([[2**40]])), "its lvl_1L does not number the tokens by scales"),
        (lambda t: t.update({"evil\x1b[31m\nname": torch.zeros(1)}), r"unexpected: evil\?\[31m name"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_as_it_stands_in_the_file(model, tmp_path, damage, message):
    tensors = original_var(model)
    damage(tensors)
    torch.save(tensors, tmp_path / "var.pth")
    with pytest.raises(ValueError, match=message) as error:
        VARTransformer2DModel.from_single_file(tmp_path / "var.pth")
    assert "var.pth" in str(error.value) and str(error.value).isprintable()


def test_a_number_that_half_precision_does_not_have_is_named(model, tmp_path):
    tensors = original_var(model)
    tensors["head.bias"][3] = 1e6
    torch.save(tensors, tmp_path / "var.pth")
    assert VARTransformer2DModel.from_single_file(tmp_path / "var.pth", dtype="bf16").dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"var.pth: .*; no weights: head.bias is too large for torch.float16$"):
        VARTransformer2DModel.from_single_file(tmp_path / "var.pth", dtype="fp16")


def _holding_itself(tensors):
    content = {"epoch": 1}
    content["model"] = content
    return content


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            lambda t: {"model": t, "state_dict": {name: x + 1 for name, x in t.items()}},
            r"holds several state dicts, \['state_dict'\] and \['model'\]: save the one that is meant, as by "
            r"torch.save\(checkpoint\['state_dict'\], 'weights.pth'\)",
        ),
        (
            lambda t: t | {"module.head.bias": t["head.bias"]},
            "holds head.bias twice, as head.bias and",
        ),
        (
            lambda t: {"epoch": 3, "args": {"depth": 16}},
            r"holds no state dict of weights but epoch \(int\), args \(dict\)",
        ),
        (lambda t: {"model": {}}, r"holds no state dict of weights but model \(dict\)"),
        (lambda t: {0: torch.zeros(1)}, r"holds no state dict of weights but 0 \(Tensor\)"),
        (lambda t: torch.zeros(3), "holds no state dict of weights but a Tensor"),
        (lambda t: {}, "holds no state dict of weights but nothing"),
        (_holding_itself, r"holds no state dict of weights but epoch \(int\), model \(dict\)"),
    ],
)
def test_what_holds_no_weights_or_several_is_named(model, tmp_path, wrap, message):
    torch.save(wrap(original_var(model)), tmp_path / "var.pth")
    with pytest.raises(UserError, match=rf"var.pth {message}"):
        read_checkpoint(tmp_path / "var.pth")


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
    with pytest.raises(ValueError, match=r"trap.pth holds a io.open beside its weights, which could run code"):
        read_checkpoint(tmp_path / "trap.pth")
    assert not (tmp_path / "trapped").exists()


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere.pth"):
        read_checkpoint(tmp_path / "nowhere.pth")
