"""Targets that read pictures: the text is theirs, and drafts see the text of a prompt alone."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma3Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from draftdiff.llm import Chain, ModelDrafter, NGramDrafter, PearlDrafter, report
from tests.llm.generation import SHAPES, both
from tests.llm.tiny_models import VOCABULARY, prompt, tiny_model

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
SEEN = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32} | {
    "image_size": 28,
    "patch_size": 14,
}
PICTURE = 90


def gemma():
    config = Gemma3Config(
        text_config={**TEXT, "head_dim": 16, "sliding_window": 16},
        vision_config=SEEN,
        mm_tokens_per_image=4,
        image_token_index=PICTURE,
        tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config), {"pixel_values": torch.randn(1, 3, 28, 28)}


def llava():
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**SEEN),
        image_token_index=PICTURE,
        image_seq_length=4,
    )
    return LlavaForConditionalGeneration(config), {"pixel_values": torch.randn(1, 3, 28, 28)}


def qwen():
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]}
    seen = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_scaling": rope},
        vision_config={**seen, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [0]},
        image_token_id=PICTURE,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    pictures = {"pixel_values": torch.randn(16, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return Qwen2_5_VLForConditionalGeneration(config), pictures


@pytest.fixture(params=[gemma, llava, qwen], ids=lambda make: make.__name__, name="case", scope="module")
def _case(request):
    """(target, prompt with a picture, arguments of generate)."""
    torch.manual_seed(0)
    target, given = request.param()
    for weight in target.parameters():
        if weight.ndim > 1:
            weight.data = 0.2 * torch.randn(weight.shape)
    target.eval().generation_config.pad_token_id = 0
    target.generation_config.eos_token_id = None
    ids = prompt(20, vocab_size=80)
    ids[0, 3], ids[0, 4:8] = 92, PICTURE
    if request.param is not llava:
        name = "token_type_ids" if request.param is gemma else "mm_token_type_ids"
        given[name] = (ids == PICTURE).long()
    return target, ids, given


@pytest.mark.parametrize("shape", SHAPES)
def test_the_text_after_a_picture_is_the_targets_own(case, shape):
    target, ids, given = case
    drafter = ModelDrafter(tiny_model(), SHAPES[shape])
    plain, fast = both(target, drafter, ids, **given)
    assert torch.equal(plain, fast) and report(drafter).draft_forwards > 0
    other = {name: -x if x.is_floating_point() else x for name, x in given.items()}
    assert not torch.equal(plain, target.generate(ids, do_sample=False, max_new_tokens=24, **other))


@pytest.mark.parametrize("make", [lambda: NGramDrafter(nodes=8), lambda: PearlDrafter(tiny_model(), 3)])
def test_other_drafters_take_pictures_too(case, make):
    target, ids, given = case
    plain, fast = both(target, make(), ids, **given)
    assert torch.equal(plain, fast)


def test_a_draft_sees_what_it_would_without_the_picture(case):
    """Of the text alone: the same first drafts."""
    target, ids, given = case
    first = []

    class First(ModelDrafter):
        def propose(self, context):
            trees = super().propose(context)
            first.append(trees[0].tokens)
            return trees

    draft = tiny_model()
    both(target, First(draft, Chain(4)), ids, **given, max_new_tokens=6)
    with_picture = first[0]
    first.clear()
    both(target, First(draft, Chain(4)), ids[ids != PICTURE][None], max_new_tokens=6)
    assert with_picture == first[0]


def test_a_prompt_that_ends_with_a_picture_and_text_models_given_one_are_refused(case):
    target, ids, given = case
    cut = {name: x[:, :8] if x.shape == ids.shape else x for name, x in given.items()}
    with pytest.raises(ValueError, match="a prompt with media must end with text"):
        both(target, NGramDrafter(), ids[:, :8], **cut)
