"""One short run of real pipelines of several families: steps counted, sparse after the warm-up, restored at the end."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import (
    AllegroPipeline,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    HunyuanVideoPipeline,
    LTXPipeline,
    MochiPipeline,
    SkyReelsV2Pipeline,
    UniPCMultistepScheduler,
    ZImagePipeline,
)

import draftdiff
from draftdiff import DraftAttentionConfig
from tests.video.model_cases import MODEL_CASES, TEXT, TEXT_WIDTH

MODELS = {case.name: case for case in MODEL_CASES}
STEPS = 4
SECOND_ENCODER = {"text_encoder_2": None, "tokenizer_2": None}


def embeds(seed: int) -> torch.Tensor:
    return torch.randn(1, TEXT, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def pair() -> dict[str, torch.Tensor]:
    """Prompt and negative prompt, the latter with padding."""
    mask = torch.ones(1, TEXT, dtype=torch.bool)
    padded = mask.clone()
    padded[:, 4:] = False
    return {
        "prompt_embeds": embeds(1),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": embeds(2),
        "negative_prompt_attention_mask": padded,
    }


@dataclass(frozen=True)
class Family:
    """pipeline class, model case, scheduler, call, expected grid, and transformer calls per step, and tokens of
    text where they are many."""

    pipeline: Any
    model: str
    scheduler: Callable[[], Any]
    call: dict[str, Any]
    grid: tuple[int, int, int]
    calls: int = 1
    text: int = 0
    parts: dict[str, Any] | None = None


FAMILIES = [
    Family(
        LTXPipeline,
        "ltx",
        FlowMatchEulerDiscreteScheduler,
        pair() | {"height": 256, "width": 256, "num_frames": 25},
        (4, 8, 8),
    ),
    Family(
        HunyuanVideoPipeline,
        "hunyuan_video",
        FlowMatchEulerDiscreteScheduler,
        {
            "prompt_embeds": embeds(1),
            "prompt_attention_mask": torch.tensor([[1] * 7 + [0] * 3]),
            "height": 128,
            "width": 256,
            "num_frames": 17,
        },
        (5, 8, 16),
        parts=SECOND_ENCODER,
    ),
    Family(  # its timesteps rise
        MochiPipeline,
        "mochi",
        lambda: FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        pair() | {"height": 128, "width": 256, "num_frames": 19},
        (4, 8, 16),
    ),
    Family(  # it names no CFG branch
        AllegroPipeline,
        "allegro",
        EulerAncestralDiscreteScheduler,
        pair() | {"negative_prompt": None, "height": 128, "width": 256, "num_frames": 20, "clean_caption": False},
        (5, 8, 16),
    ),
    Family(
        SkyReelsV2Pipeline,
        "skyreels_v2",
        lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0),
        {
            "prompt_embeds": embeds(1),
            "negative_prompt_embeds": embeds(2),
            "height": 128,
            "width": 256,
            "num_frames": 17,
        },
        (5, 8, 16),
        calls=2,
    ),
    Family(
        FluxPipeline,
        "flux",
        FlowMatchEulerDiscreteScheduler,
        {"prompt_embeds": embeds(1), "height": 512, "width": 384},
        (1, 32, 24),
        parts=SECOND_ENCODER,
    ),
    Family(  # it calls its transformer without names, with lists
        ZImagePipeline,
        "z_image",
        FlowMatchEulerDiscreteScheduler,
        {"prompt_embeds": [embeds(1)[0]], "negative_prompt_embeds": [embeds(2)[0]], "height": 528, "width": 384},
        (1, 33, 24),
        text=40,
    ),
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.pipeline.__name__)
def test_a_run_warms_up_dense_goes_sparse_and_can_be_undone(family):
    transformer = MODELS[family.model].build()
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, **(family.parts or {})}
    pipe = family.pipeline(transformer=transformer, scheduler=family.scheduler(), **parts)
    pipe.set_progress_bar_config(disable=True)
    call = dict(family.call)
    if family.parts:  # a second text encoder, whose output is pooled
        call["pooled_prompt_embeds"] = torch.ones(1, transformer.config.pooled_projection_dim)

    def run():
        generator = torch.Generator().manual_seed(0)
        return pipe(**call, num_inference_steps=STEPS, generator=generator, output_type="latent")[0]

    stock = run()
    draftdiff.enable(pipe, DraftAttentionConfig(dense_steps=0.25, dense_layers=0, min_tokens=0))
    for _ in range(2):
        sparse = run()
        told = draftdiff.report(pipe).transformers[0]
        assert told.grid == family.grid
        assert (told.dense_steps, told.sparse_steps) == (1, STEPS - 1)
        assert len(told.forwards) == STEPS * family.calls
        # The least of few tiles is one, and single tokens are a sixteenth of the keys.
        visual = (math.prod(family.grid) / (math.prod(family.grid) + family.text)) ** 2  # share of all pairs
        assert told.mean_density == pytest.approx(1 - 0.75 * visual, abs=0.0626)
    assert float((sparse - stock).abs().max()) > 1e-3
    draftdiff.disable(pipe)
    assert torch.equal(run(), stock)
