"""The class-conditional pipeline as its users call it."""

import numpy as np
import PIL.Image
import pytest
import torch

from draftdiff.errors import UserError
from draftdiff.pipelines.var import VARPipeline
from draftdiff.var.scheduler_var import VARScheduler
from draftdiff.var.transformer_var import VARTransformer2DModel
from draftdiff.var.vq_model import VQModel
from tests.rounding import rounded
from tests.var import tiny

NAMES = {0: "circle", 1: "square", 2: "triangle", 3: "star", 4: "cross"}


@pytest.fixture(scope="module")
def pipe():
    pipe = VARPipeline(
        tiny.transformer(), tiny.vq_model(), VARScheduler(tiny.PATCH_NUMS, top_k=20, top_p=0.9), id2label=NAMES
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_output_type_is_the_same_picture(pipe):
    pt = pipe([1], generator=seeded(), output_type="pt").images
    array = pipe([1], generator=seeded(), output_type="np").images
    picture = pipe([1], generator=seeded()).images[0]
    latents = pipe([1], generator=seeded(), output_type="latent").images
    assert pt.shape == (1, 3, 16, 16) and latents.shape == (1, 4, 8, 8) and picture.size == (16, 16)
    np.testing.assert_allclose(array, pt.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert np.abs(np.asarray(picture) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6
    rounded(lambda: pipe.vae.decode(latents).sample / 2 + 0.5).check(pt)
    assert isinstance(pipe([1], generator=seeded(), return_dict=False), tuple)


def test_names_and_numbers_of_classes_mean_the_same(pipe):
    by_name = pipe(["star", 1], generator=seeded(), output_type="latent").images
    by_number = pipe(torch.tensor([3, 1]), generator=seeded(), output_type="latent").images
    assert torch.equal(by_name, by_number)
    assert pipe.get_label_ids("cross") == [4]


def test_a_batch_with_a_generator_each_is_its_pictures_alone(pipe):
    batch = pipe([3, 1], generator=[seeded(5), seeded(6)], output_type="latent").images
    for index, (label, seed) in enumerate([(3, 5), (1, 6)]):
        alone = rounded(lambda: pipe(label, generator=[seeded(seed)], output_type="latent").images)  # noqa: B023
        alone.check(batch[index : index + 1])


def test_several_pictures_per_class_stand_next_to_each_other(pipe):
    generators = [seeded(n) for n in range(4)]
    four = pipe([3, 1], num_images_per_prompt=2, generator=generators, output_type="latent").images
    rounded(lambda: pipe([1], generator=[seeded(2)], output_type="latent").images).check(four[2:3])


def test_guidance_zero_is_the_conditional_model_alone(pipe):
    almost = rounded(lambda: pipe([1], guidance_scale=1e-9, generator=seeded(), output_type="latent").images)
    almost.check(pipe([1], guidance_scale=0, generator=seeded(), output_type="latent").images)


def test_the_doubled_batch_of_guidance_is_two_single_runs(pipe):
    seen = []
    call = {"output_type": "latent", "callback_on_step_end_tensor_inputs": ["latents", "logits"]}

    def record(_pipe, scale, _step, tensors):
        seen.append((scale, tensors["latents"], tensors["logits"]))

    pipe([2], guidance_scale=3.0, generator=seeded(), callback_on_step_end=record, **call)

    @torch.no_grad()
    def two_runs(scale):
        scales = pipe.scheduler.scales
        history = [pipe.scheduler.scale_model_input(seen[n][1], n + 1, scales) for n in range(scale)]
        inputs = torch.cat(history, dim=1)
        yes, no = (pipe.transformer(inputs, torch.tensor([label]), logits_from=scale).sample for label in (2, 5))
        t = 3.0 * scale / 5
        return (1 + t) * yes - t * no

    for scale, _, logits in seen[1:]:
        rounded(lambda: two_runs(scale)).check(logits)  # noqa: B023


def test_without_labels_the_generator_chooses_the_classes(pipe):
    twice = [pipe(num_images_per_prompt=3, generator=seeded(), output_type="latent").images for _ in range(2)]
    assert torch.equal(*twice) and len(twice[0]) == 3


def test_more_smooth_mixes_codes(pipe):
    smooth = [
        pipe([1], more_smooth=True, generator=seeded(), output_type="latent", rng=rng).images
        for rng in ("fast", "upstream")
    ]
    assert not torch.equal(*smooth)  # the originals' extra draws shift the noise
    assert smooth[0].isfinite().all()


def test_in_painting_keeps_the_picture_outside_the_hole(pipe):
    picture = PIL.Image.fromarray((np.random.default_rng(0).random((16, 16, 3)) * 255).astype(np.uint8))
    mask = PIL.Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 16))
    kept = pipe.vae.quantize.latents_by_scale(
        pipe.vae.encode(pipe.image_processor.preprocess(picture), tiny.PATCH_NUMS)
    )[-1]
    painted = pipe([2], image=picture, mask_image=mask, generator=seeded(), output_type="latent").images
    assert torch.equal(painted[..., 4:], kept[..., 4:])
    assert not torch.equal(painted[..., :4], kept[..., :4])
    other = pipe([2], image=picture, mask_image=mask, generator=seeded(1), output_type="latent").images
    assert not torch.equal(painted[..., :4], other[..., :4])


def test_a_callback_sees_every_scale_and_may_change_the_latents(pipe):
    scales = []

    def callback(_pipe, step, scale, tensors):
        scales.append((step, scale, tensors["logits"].shape[1]))
        return {"latents": torch.zeros_like(tensors["latents"])}

    images = pipe(
        [1],
        generator=seeded(),
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "logits"],
    ).images
    assert scales == [(n, n, side**2) for n, side in enumerate(tiny.PATCH_NUMS)]
    assert not images.any()


def test_a_saved_pipeline_comes_back_whole(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "plain")
    loaded = VARPipeline.from_pretrained(tmp_path / "plain")
    loaded.set_progress_bar_config(disable=True)
    expected = pipe(["star"], generator=seeded(), output_type="latent").images
    assert torch.equal(loaded(["star"], generator=seeded(), output_type="latent").images, expected)
    assert loaded.refiner is None

    loaded.enable_collaborative(tiny.transformer(7, num_layers=1), draft_scales=3)
    loaded.save_pretrained(tmp_path / "pair")
    pair = VARPipeline.from_pretrained(str(tmp_path / "pair"))
    pair.set_progress_bar_config(disable=True)
    assert pair.config.draft_scales == 3
    expected = loaded(["star"], generator=seeded(), output_type="latent").images
    assert torch.equal(pair(["star"], generator=seeded(), output_type="latent").images, expected)


def test_compiled_blocks_give_the_same_picture_without_a_graph_per_layer_and_scale():
    pipe = tiny.var_pipeline(num_layers=6)
    plain = pipe([1], generator=seeded(), output_type="latent").images
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        pipe.transformer.compile_repeated_blocks(backend="eager", dynamic=True)
        assert torch.equal(pipe([1], generator=seeded(), output_type="latent").images, plain)


def test_half_precision_stays_close(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    half = VARPipeline.from_pretrained(tmp_path).to(torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.transformer.dtype == torch.bfloat16
    picture = half([1], generator=seeded(), output_type="pt").images
    assert picture.isfinite().all() and picture.shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": [9]}, "class label must be from 0 to 4, or 5 for no class, got 9"),
        ({"class_labels": [-1]}, "class label must be from 0 to 4"),
        ({"class_labels": [1.5]}, "class label must be from 0 to 4"),
        ({"class_labels": "hexagon"}, "unknown class 'hexagon'; this model's classes are: circle, square"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number, at least 1, got 0"),
        ({"generator": [seeded(), seeded()]}, "1 pictures need one generator or a list of 1, got 2"),
        ({"output_type": "jpeg"}, "output_type must be one of pil, np, pt, latent, got 'jpeg'"),
        ({"rng": "original"}, "rng must be one of fast, upstream, got 'original'"),
        ({"rng": "upstream"}, "pass a generator"),
        ({"top_p": 1.5}, "top_p must be from 0 to 1, got 1.5"),
        ({"top_k": [5, 5]}, r"top_k must be one number or one for each of 6 scales, got \[5, 5\]"),
        ({"top_k": -3}, "top_k must be a whole number, 0 for all, got -3"),
        ({"top_k": 5.0}, "top_k must be a whole number, 0 for all, got 5.0"),
        ({"temperature": [1, 1, 1, 1, 1, 0]}, "temperature must be positive, from 1e-06 to 1e.06, got 0"),
        ({"temperature": "hot"}, "temperature must be one number or one for each of 6 scales, got 'hot'"),
        ({"mask_image": PIL.Image.new("L", (8, 8))}, "in-painting needs both image and mask_image"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback tensors must be of .*, got 'noise'"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "callback tensors must be a list of names, got 'latents'"),
        ({"class_labels": 1.5}, "class label must be from 0 to 4, or 5 for no class, got 1.5"),
        ({"num_images_per_prompt": True}, "num_images_per_prompt must be a whole number, at least 1, got True"),
        ({"generator": 42}, r"generator must be a torch.Generator, as torch.Generator\(\).manual_seed\(42\), got 42"),
        ({"generator": [42]}, r"generator must be a torch.Generator, .*, got \[42\]"),
        ({"guidance_scale": [1.0] * 6}, "guidance_scale must be one number, got"),
        ({"more_smooth": 1}, "more_smooth must be True or False, got 1"),
        ({"more_smooth": torch.ones(2, 3)}, "more_smooth must be True or False, got tensor"),
        ({"cache_key_dtype": "int8"}, "cache_key_dtype must be one of float32, float16, bfloat16, got 'int8'"),
        ({"cache_key_dtype": torch.int64}, "cache_key_dtype must be one of .*, got torch.int64"),
    ],
)
def test_what_cannot_be_is_named_in_one_line(pipe, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        pipe(**{"class_labels": [1], **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["guidance_scale", "top_k", "top_p", "temperature", "more_smooth"])
@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        -float("inf"),
        1e300,
        "warm",
        {},
        1 + 2j,
        [1.0, 2.0],
        np.full(6, np.nan),
        np.ones((2, 3)),
    ],
    ids=repr,
)
def test_a_setting_that_is_no_number_of_its_range_is_named_before_any_work(pipe, name, value):
    with pytest.raises(UserError, match=rf"^{name} must be ") as error:
        pipe([1], **{name: value}, callback_on_step_end=lambda *_: pytest.fail("it has begun"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["guidance_scale", "top_k", "top_p", "temperature"])
def test_true_is_no_number_and_none_stands_for_documented_defaults_only(pipe, name):
    with pytest.raises(UserError, match=rf"^{name} must be .*, got True$"):
        pipe([1], **{name: True})
    call = {"generator": seeded(), "output_type": "latent"}
    if name == "guidance_scale":
        with pytest.raises(UserError, match=r"^guidance_scale must be one number, got None$"):
            pipe([1], guidance_scale=None)
    else:
        plain = pipe([1], **call).images
        assert torch.equal(plain, pipe([1], **{**call, "generator": seeded(), name: None}).images)


def test_a_setting_per_scale_may_be_a_list_a_tensor_or_an_array(pipe):
    heats, kept = [1.0, 1.5, 1.0, 0.5, 1.0, 2.0], [20, 5, 20, 3, 20, 0]
    call = {"output_type": "latent"}
    expected = pipe([1], temperature=heats, top_k=kept, generator=seeded(), **call).images
    assert not torch.equal(expected, pipe([1], generator=seeded(), **call).images)
    for kind in (tuple, torch.tensor, np.array):
        found = pipe([1], temperature=kind(heats), top_k=kind(kept), generator=seeded(), **call).images
        assert torch.equal(found, expected)
    one = pipe([1], temperature=torch.tensor(1.5), guidance_scale=np.float32(2), generator=seeded(), **call).images
    assert torch.equal(one, pipe([1], temperature=1.5, guidance_scale=2.0, generator=seeded(), **call).images)


def test_the_dtype_of_cached_keys_may_be_a_name(pipe):
    call = {"output_type": "latent"}
    expected = pipe([1], cache_key_dtype=torch.bfloat16, generator=seeded(), **call).images
    assert torch.equal(pipe([1], cache_key_dtype="bf16", generator=seeded(), **call).images, expected)


@pytest.mark.parametrize("name", ["bf16", "torch.bfloat16", torch.bfloat16])
@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_a_saved_pipeline_and_its_parts_load_in_a_dtype_by_either_name(pipe, tmp_path, name, argument):
    pipe.save_pretrained(tmp_path)
    loaded = VARPipeline.from_pretrained(tmp_path, **{argument: name})
    assert loaded.transformer.dtype == loaded.vae.dtype == torch.bfloat16
    by_part = VARPipeline.from_pretrained(tmp_path, **{argument: {"transformer": name, "default": "fp32"}})
    assert by_part.transformer.dtype == torch.bfloat16 and by_part.vae.dtype == torch.float32
    for kind, part in ((VARTransformer2DModel, "transformer"), (VQModel, "vae")):
        assert kind.from_pretrained(tmp_path / part, **{argument: name}).dtype == torch.bfloat16
        with pytest.raises(UserError, match=rf"^{argument} must be one of float32, float16, bfloat16, got 'auto'$"):
            kind.from_pretrained(tmp_path / part, **{argument: "auto"})
    with pytest.raises(UserError, match=r"^dtype and torch_dtype are one argument, got bf16 and fp16$"):
        VARPipeline.from_pretrained(tmp_path, dtype="bf16", torch_dtype="fp16")


def test_parts_that_do_not_fit_together_are_named():
    with pytest.raises(ValueError, match="vocab_size is 32, num_vq_embeddings is 16"):
        VARPipeline(tiny.transformer(), tiny.vq_model(num_vq_embeddings=16), VARScheduler(tiny.PATCH_NUMS))
    with pytest.raises(ValueError, match="the same patch_nums"):
        VARPipeline(tiny.transformer(), tiny.vq_model(), VARScheduler((1, 2)))


def test_a_path_that_is_nowhere_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^neither a folder nor a repository of the hub "):
        VARPipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no diffusers pipeline"):
        VARPipeline.from_pretrained(tmp_path)
    (tmp_path / "var.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"var.pth is a file: original checkpoints are read by from_single_file$"):
        VARPipeline.from_pretrained(tmp_path / "var.pth")


def test_a_repository_of_the_hub_is_downloaded_and_then_loaded(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path)
    asked = []

    def snapshot_download(name, **arguments):
        asked.append((name, arguments))
        return str(tmp_path)

    monkeypatch.setattr("draftdiff.pipelines.hub.snapshot_download", snapshot_download)
    loaded = VARPipeline.from_pretrained("owner/name", revision="v1")
    assert asked == [("owner/name", {"revision": "v1"})] and loaded.get_label_ids("star") == [3]


def test_model_offload_changes_no_picture_with_two_models():
    pipe = tiny.var_pipeline()
    pipe.enable_collaborative(tiny.transformer(7), 3)
    plain = pipe([1], generator=seeded(), output_type="pt").images
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(pipe([1], generator=seeded(), output_type="pt").images, plain)
