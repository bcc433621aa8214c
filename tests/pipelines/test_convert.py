"""From original checkpoints to diffusers folders."""

import pytest
import torch

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
