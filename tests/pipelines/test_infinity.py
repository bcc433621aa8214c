"""The text-to-image pipeline as its users call it."""

import numpy as np
import pytest
import torch

from draftdiff.errors import UserError
from draftdiff.pipelines.infinity import InfinityPipeline
from draftdiff.var.schedules import SCHEDULES
from tests.rounding import rounded
from tests.var import tiny_infinity

SMALL = {"size": "0.06M", "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe():
    return tiny_infinity.infinity_pipeline()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_output_type_is_the_same_picture(pipe):
    call = {"prompt": "a red circle", "height": 336, "width": 224}
    pt, array, pictures, latents = (
        pipe(**call, generator=seeded(), output_type=kind).images for kind in ("pt", "np", "pil", "latent")
    )
    assert pt.shape == (1, 3, 336, 224) and latents.shape == (1, 6, 21, 14) and pictures[0].size == (224, 336)
    np.testing.assert_allclose(array, pt.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    rounded(lambda: pipe.vae.decode(latents).sample / 2 + 0.5).check(pt)


@pytest.mark.parametrize("ratio", SCHEDULES)
def test_every_aspect_ratio_gives_its_size(pipe, ratio):
    latents = pipe("a red circle", aspect_ratio=ratio, **SMALL, generator=seeded()).images
    assert latents.shape[-2:] == SCHEDULES[ratio][6]


def test_a_batch_of_different_prompts_is_its_pictures_alone(pipe):
    prompts = ["a red circle", "the green square on the left"]
    together = pipe(prompts, generator=[seeded(1), seeded(2)], **SMALL).images
    for index, prompt in enumerate(prompts):
        alone = rounded(lambda: pipe(prompt, generator=[seeded(index + 1)], **SMALL).images)  # noqa: B023
        alone.check(together[index : index + 1])


def test_several_pictures_per_prompt_stand_next_to_each_other(pipe):
    generators = [seeded(n) for n in range(4)]
    prompts = ["a red circle", "a green square"]
    four = pipe(prompts, num_images_per_prompt=2, generator=generators, **SMALL).images
    rounded(lambda: pipe(prompts[1], generator=[seeded(2)], **SMALL).images).check(four[2:3])


def test_prompts_and_their_embeddings_mean_the_same(pipe):
    prompts = ["a red circle", "the green square on the left"]
    embeds, mask = pipe.encode_prompt(prompts)
    negative, negative_mask = pipe.encode_prompt("a red square")
    by_text = pipe(prompts, negative_prompt="a red square", generator=seeded(), **SMALL).images
    by_embeds = pipe(
        prompt_embeds=embeds,
        prompt_mask=mask,
        negative_prompt_embeds=negative,
        negative_prompt_mask=negative_mask,
        generator=seeded(),
        **SMALL,
    ).images
    assert torch.equal(by_text, by_embeds)
    assert not torch.equal(by_text, pipe(prompts, generator=seeded(), **SMALL).images)


def test_guidance_one_is_the_conditional_model_alone(pipe):
    almost = rounded(lambda: pipe("a red circle", guidance_scale=1 + 1e-9, generator=seeded(), **SMALL).images)
    almost.check(pipe("a red circle", guidance_scale=1, generator=seeded(), **SMALL).images)


def test_patchified_models_have_two_by_two_cells_per_token():
    pipe = tiny_infinity.infinity_pipeline(patchify=True)
    image = pipe("a red circle", size="0.06M", generator=seeded(), output_type="pt").images
    assert image.shape == (1, 3, 256, 256)


def test_a_saved_pipeline_comes_back_whole(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "whole")
    loaded = InfinityPipeline.from_pretrained(tmp_path / "whole")
    loaded.set_progress_bar_config(disable=True)
    expected = pipe("a red circle", generator=seeded(), **SMALL).images
    assert torch.equal(loaded("a red circle", generator=seeded(), **SMALL).images, expected)

    bare = InfinityPipeline(pipe.transformer, pipe.vae, pipe.scheduler)
    bare.save_pretrained(tmp_path / "bare")
    assert InfinityPipeline.from_pretrained(tmp_path / "bare").text_encoder is None


@pytest.mark.slow
def test_compiled_blocks_give_the_same_picture_without_a_graph_per_layer_and_scale():
    pipe = tiny_infinity.infinity_pipeline(num_layers=3)
    pipe.enable_scale_kv(0.2, scoring="upstream")
    plain = pipe("a red circle", generator=seeded(), **SMALL).images
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=4):
        pipe.transformer.compile_repeated_blocks(backend="eager", dynamic=True)
        assert torch.equal(pipe("a red circle", generator=seeded(), **SMALL).images, plain)


def test_half_precision_works(pipe):
    half = tiny_infinity.infinity_pipeline().to(torch.bfloat16)
    assert half("a red circle", size="0.06M", generator=seeded(), output_type="pt").images.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": ["a", "  "]}, "prompt is empty"),
        ({"prompt": []}, r"prompt must be a text or a list of texts, got \[\]"),
        ({"prompt": 3}, "prompt must be a text or a list of texts, got 3"),
        ({"prompt": None}, "give either prompt or prompt_embeds"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 3, 7)}, r"must be \[prompts, tokens, 128\], got \(1, 3, 7\)"),
        ({"negative_prompt": ["a", "b", "c"]}, "1 prompts need 1 or as many negative ones: 3"),
        ({"aspect_ratio": 1.1}, r"unknown aspect ratio \(height / width\) 1.1"),
        ({"size": "4M"}, "size must be one of"),
        ({"height": 1000, "width": 1000}, "no schedule ends at 1000x1000 pixels"),
        ({"height": 1024}, "give both height and width or neither"),
        (
            {"guidance_scale": [3.0, 3.0]},
            r"guidance_scale must be one number or one for each of 7 scales, got \[3.0, 3.0\]",
        ),
        ({"generator": [seeded(), seeded()]}, "1 pictures need one generator or a list of 1, got 2"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number, at least 1"),
        ({"output_type": "jpeg"}, "output_type must be"),
        ({"temperature": 0}, "temperature must be positive, from 1e-06 to 1e.06, got 0"),
        ({"top_p": -1}, "top_p must be from 0 to 1, got -1"),
        ({"rng": "slow"}, "rng must be one of fast, upstream"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback tensors must be of"),
        ({"generator": 42}, r"generator must be a torch.Generator, .*, got 42"),
        ({"num_images_per_prompt": True}, "num_images_per_prompt must be a whole number, at least 1, got True"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be from -1e.06 to 1e.06, got nan"),
        ({"guidance_scale": torch.full((7,), torch.inf)}, "guidance_scale must be from -1e.06 to 1e.06, got inf"),
        ({"guidance_scale": None}, "guidance_scale must be one number or one for each of 7 scales, got None"),
        ({"temperature": float("nan")}, "temperature must be positive, .*, got nan"),
        ({"top_p": "most"}, "top_p must be one number, got 'most'"),
        ({"cache_key_dtype": "int8"}, "cache_key_dtype must be one of float32, float16, bfloat16, got 'int8'"),
        ({"aspect_ratio": "16:9"}, "aspect_ratio must be one number, height / width, so 9 / 16 for 16:9, got '16:9'"),
        ({"aspect_ratio": float("nan")}, "aspect_ratio must be one number, .*, got nan"),
        ({"size": ["1M"]}, "size must be one of"),
        ({"height": "256", "width": 256}, "height and width must be positive numbers of pixels, got '256' x 256"),
        ({"prompt_mask": torch.ones(1, 3)}, "prompt_mask is of prompt_embeds, which are not given"),
        ({"negative_prompt_mask": torch.ones(1, 3)}, "negative_prompt_mask is of negative_prompt_embeds, which are"),
    ],
)
def test_what_cannot_be_is_named_in_one_line(pipe, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        pipe(**{"prompt": "a red circle", "size": "0.06M", **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
@pytest.mark.parametrize(
    ("embeds", "mask", "message"),
    [
        ([[[0.0]]], None, "embeds must be a tensor, got a list"),
        (torch.zeros(3, 128), None, r"embeds must be \[prompts, tokens, 128\], got \(3, 128\)"),
        (torch.zeros(1, 0, 128), None, r"embeds must be \[prompts, tokens, 128\], got \(1, 0, 128\)"),
        (torch.zeros(1, 17, 128), None, "embeds must have at most 16 tokens, got 17"),
        (torch.zeros(1, 5, 128, dtype=torch.int64), None, "embeds must be of floating-point numbers, got torch.int64"),
        (torch.full((1, 5, 128), torch.nan), None, "embeds hold NaN or inf"),
        (torch.zeros(1, 5, 128), [1] * 5, "mask must be a tensor, got a list"),
        (torch.zeros(1, 5, 128), torch.ones(1, 4), r"mask must be \(1, 5\) like its embeddings, got \(1, 4\)"),
        (torch.zeros(1, 5, 128), torch.full((1, 5), 0.5), "mask must hold 1 for tokens and 0 for padding, or"),
        (torch.zeros(1, 5, 128), torch.full((1, 5), torch.nan), "mask must hold 1 for tokens and 0 for padding, or"),
        (torch.zeros(1, 5, 128), torch.zeros(1, 5), "mask leaves a prompt without any token"),
    ],
)
def test_embeddings_and_masks_that_cannot_be_are_named(pipe, name, embeds, mask, message):
    call = {f"{name}_embeds": embeds, f"{name}_mask": mask}
    call |= {} if name == "prompt" else {"prompt": "a red circle"}
    with pytest.raises(UserError, match=rf"^{name}_{message}") as error:
        pipe(**call, **SMALL)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8])
def test_a_mask_of_0_and_1_is_one_of_false_and_true(pipe, dtype):
    embeds, mask = torch.randn(1, 5, 128), torch.tensor([[True, True, True, False, False]])
    expected = pipe(prompt_embeds=embeds, prompt_mask=mask, generator=seeded(), **SMALL).images
    found = pipe(prompt_embeds=embeds, prompt_mask=mask.to(dtype), generator=seeded(), **SMALL).images
    assert torch.equal(found, expected)
    assert not torch.equal(pipe(prompt_embeds=embeds, generator=seeded(), **SMALL).images, expected)


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(pipe, monkeypatch):
    said = []
    monkeypatch.setattr("draftdiff.pipelines.infinity.logger.warning", said.append)
    pipe("red " * 16, **SMALL, generator=seeded())
    assert not said
    pipe("red " * 17, **SMALL, generator=seeded())
    assert len(said) == 1 and "17 tokens, of which only 16 are read" in said[0]


def test_guidance_per_scale_may_be_a_list_a_tensor_or_an_array(pipe):
    each = [1.0, 2.0, 3.0, 4.0, 3.0, 2.0, 1.0]
    expected = pipe("a red circle", guidance_scale=each, generator=seeded(), **SMALL).images
    for kind in (torch.tensor, np.array):
        found = pipe("a red circle", guidance_scale=kind(each), generator=seeded(), **SMALL).images
        assert torch.equal(found, expected)


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_a_saved_pipeline_loads_in_a_dtype_by_name(pipe, tmp_path, argument):
    InfinityPipeline(pipe.transformer, pipe.vae, pipe.scheduler).save_pretrained(tmp_path)
    loaded = InfinityPipeline.from_pretrained(tmp_path, **{argument: "half"})
    assert loaded.transformer.dtype == loaded.vae.dtype == torch.float16


def test_parts_that_do_not_fit_together_are_named(pipe):
    other = tiny_infinity.transformer(bits=5)
    with pytest.raises(ValueError, match="5 bits per token, but latent_channels 6 with patchify=False are 6"):
        InfinityPipeline(other, pipe.vae, pipe.scheduler)
    with pytest.raises(ValueError, match="no text encoder: pass prompt_embeds"):
        InfinityPipeline(pipe.transformer, pipe.vae, pipe.scheduler)("a red circle", **SMALL)


def test_model_offload_changes_no_picture():
    pipe = tiny_infinity.infinity_pipeline()
    plain = pipe("a red circle", generator=seeded(), **SMALL).images
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(pipe("a red circle", generator=seeded(), **SMALL).images, plain)
