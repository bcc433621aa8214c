"""From original checkpoints to diffusers folders."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import T5Config, T5EncoderModel

from draftdiff.errors import UserError
from draftdiff.pipelines.convert import convert
from draftdiff.pipelines.infinity import InfinityPipeline
from draftdiff.pipelines.var import VARPipeline
from draftdiff.var.autoencoder_bsq import AutoencoderBSQ
from draftdiff.var.transformer_var import VARTransformer2DModel
from draftdiff.var.vq_model import VQModel
from tests.var import tiny, tiny_infinity


@pytest.fixture
def files(tmp_path):
    """Original files of every kind; the released autoencoders have 32 groups per norm, so these have 32 channels."""
    vq = VQModel((32, 32), 1, latent_channels=4, num_vq_embeddings=32, patch_nums=tiny.PATCH_NUMS)
    bsq = AutoencoderBSQ((32, 32, 32, 32, 32), 1, latent_channels=6)
    pair = {"drafter_3": tiny.transformer(0), "refiner_3": tiny.transformer(7, num_layers=1)}
    for name, model in {**pair, "vae": vq, "infinity": tiny_infinity.transformer(), "bsq": bsq}.items():
        tensors = tiny.to_original(model)
        for key in [key for key in tensors if key.endswith("pos_1LC")]:
            tensors[key] = tensors[key][None]
            tensors["lvl_1L"] = torch.repeat_interleave(torch.arange(6), torch.tensor(model.lengths))[None]
        torch.save(tensors, tmp_path / f"{name}.pth")
    return tmp_path


def test_a_single_checkpoint_becomes_a_model(files):
    assert convert([files / "drafter_3.pth"], files / "model") == "VARTransformer2DModel"
    assert VARTransformer2DModel.from_pretrained(files / "model").config.num_layers == 2


def test_a_pair_and_its_autoencoder_become_a_collaborative_pipeline(files):
    sources = [files / f"{name}.pth" for name in ("refiner_3", "vae", "drafter_3")]
    assert convert(sources, files / "code") == "VARPipeline"
    pipe = VARPipeline.from_pretrained(files / "code")
    assert pipe.transformer.config.num_layers == 2 and pipe.refiner.config.num_layers == 1
    assert pipe.config.draft_scales == 3


def test_infinity_and_its_autoencoder_become_a_pipeline(files):
    assert convert([files / "infinity.pth", files / "bsq.pth"], files / "text") == "InfinityPipeline"
    pipe = InfinityPipeline.from_pretrained(files / "text")
    pipe.set_progress_bar_config(disable=True)
    image = pipe(prompt_embeds=torch.randn(1, 3, 128), size="0.06M", output_type="pt").images
    assert image.shape == (1, 3, 256, 256)


def test_a_folder_stands_for_its_files(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("var")
    for name in ("drafter_3", "vae"):
        (folder / f"{name}.pth").write_bytes((files / f"{name}.pth").read_bytes())
    assert convert([folder], files / "plain", torch_dtype=torch.float16) == "VARPipeline"
    loaded = VARPipeline.from_pretrained(files / "plain")
    assert loaded.refiner is None


@pytest.mark.parametrize(
    ("sources", "option", "message"),
    [
        (
            ("drafter_3", "vae"),
            {"text_encoder": "nowhere"},
            "text_encoder is for an InfinityPipeline only, got 'nowhere'",
        ),
        (("infinity",), {"text_encoder": "nowhere"}, "text_encoder is for an InfinityPipeline only, got 'nowhere'"),
        (("drafter_3", "vae"), {"draft_scales": 3}, "draft_scales is for a pair of VARTransformer2DModel only, got 3"),
        (("infinity", "bsq"), {"draft_scales": 3}, "draft_scales is for a pair of VARTransformer2DModel only, got 3"),
        (("vae",), {"draft_scales": 3}, "draft_scales is for a pair of VARTransformer2DModel only, got 3 for VQModel"),
    ],
)
def test_an_option_of_another_kind_of_pipeline_is_refused(files, sources, option, message):
    with pytest.raises(UserError, match=f"^{message}"):
        convert([files / f"{name}.pth" for name in sources], files / "out", **option)
    assert not (files / "out").exists()


def test_a_dtype_may_be_a_name(files):
    for option in ({"dtype": "bf16"}, {"torch_dtype": "bfloat16"}):
        folder = files / next(iter(option))
        convert([files / "drafter_3.pth"], folder, **option)
        saved = load_file(folder / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    with pytest.raises(UserError, match=r"^dtype must be one of float32, float16, bfloat16, got 'int8'$"):
        convert([files / "drafter_3.pth"], files / "out", dtype="int8")


def test_files_that_do_not_belong_together_are_named_with_their_facts(files, tmp_path):
    torch.save(tiny.to_original(AutoencoderBSQ((32,) * 5, 1, latent_channels=4)), tmp_path / "other.pth")
    infinity, other = files / "infinity.pth", tmp_path / "other.pth"
    message = f"^{infinity} and {other} do not belong together: the transformer has 6 bits per token, the vae 4 latent"
    with pytest.raises(UserError, match=message):
        InfinityPipeline.from_single_file(infinity, other)
    vq = VQModel((32, 32), 1, latent_channels=4, num_vq_embeddings=16, patch_nums=tiny.PATCH_NUMS)
    torch.save(tiny.to_original(vq), tmp_path / "vq.pth")
    message = (
        f"^{files / 'drafter_3.pth'} and {tmp_path / 'vq.pth'}: transformer and vae must agree: vocab_size is 32, "
    )
    with pytest.raises(UserError, match=message):
        VARPipeline.from_single_file(files / "drafter_3.pth", tmp_path / "vq.pth")


def test_tokens_of_two_by_two_cells_are_told_by_their_bits(files, tmp_path):
    torch.save(tiny.to_original(tiny_infinity.transformer(bits=24)), tmp_path / "large.pth")
    pipe = InfinityPipeline.from_single_file(tmp_path / "large.pth", files / "bsq.pth")
    assert pipe.scheduler.config.patchify
    assert not InfinityPipeline.from_single_file(files / "infinity.pth", files / "bsq.pth").scheduler.config.patchify


def test_a_text_encoder_that_cannot_be_loaded_or_used_is_one_line(files, tmp_path):
    sources = files / "infinity.pth", files / "bsq.pth"
    (tmp_path / "empty").mkdir()
    tokenizer = tiny_infinity.infinity_pipeline().tokenizer
    config = T5Config(vocab_size=12, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    for folder in (tmp_path / "narrow", tmp_path / "damaged"):
        T5EncoderModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"nothing")
    for name, said in (
        ("nowhere", "cannot be loaded: "),
        ("empty", "cannot be loaded: "),
        ("damaged", "cannot be loaded: "),
        ("narrow", "transformer and text_encoder must agree: text_dim is 128, the encoder has 64 channels"),
    ):
        with pytest.raises(UserError, match=said) as error:
            InfinityPipeline.from_single_file(*sources, text_encoder=tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_what_makes_no_pipeline_is_named_and_nothing_is_left(files):
    with pytest.raises(ValueError, match="these make no pipeline: 1 VARTransformer2DModel, 1 AutoencoderBSQ; expected"):
        convert([files / "drafter_3.pth", files / "bsq.pth"], files / "out")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert([files / "nowhere.pth"], files / "out")
    with pytest.raises(ValueError, match="exists: convert writes to a new folder"):
        convert([files / "vae.pth"], files)
    (files / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*empty"):
        convert([files / "empty"], files / "out")
    (files / "half.pth").write_bytes((files / "vae.pth").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"half.pth is not a readable checkpoint"):
        convert([files / "half.pth"], files / "out")
    assert not (files / "out").exists()
    assert not [path for path in files.iterdir() if path.name.startswith(".")]
