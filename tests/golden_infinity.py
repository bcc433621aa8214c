"""Parity of one golden case of Infinity."""

from __future__ import annotations

import torch

from draftdiff.pipelines.infinity import InfinityPipeline
from draftdiff.var.autoencoder_bsq import AutoencoderBSQ
from draftdiff.var.checkpoint import fill
from draftdiff.var.scheduler_infinity import InfinityScheduler
from draftdiff.var.schedules import scales_for_pixels
from draftdiff.var.transformer_infinity import InfinityTransformer2DModel
from tests.golden_cases import Case, digests


def infinity_pipeline(case: Case) -> InfinityPipeline:
    settings, vae_settings = case.info["config"]["transformer"], case.info["config"]["vae"]
    cells = 4 if settings["apply_spatial_patchify"] else 1
    transformer = InfinityTransformer2DModel(
        num_layers=settings["depth"],
        num_attention_heads=settings["num_heads"],
        attention_head_dim=settings["embed_dim"] // settings["num_heads"],
        bits=vae_settings["codebook_dim"] * cells,
        text_dim=settings["text_channels"],
        text_tokens=settings["text_maxlen"],
        mlp_ratio=settings["mlp_ratio"],
        norm_eps=settings["norm_eps"],
    )
    fill(transformer, case.weights("transformer"))
    vae = AutoencoderBSQ(
        block_out_channels=[vae_settings["base_ch"] * multiple for multiple in vae_settings["decoder_ch_mult"]],
        layers_per_block=vae_settings["num_res_blocks"],
        latent_channels=vae_settings["codebook_dim"],
    )
    if "vae_decoder" in case.info["state_dicts"]:
        fill(vae, case.weights("vae_decoder"), optional=("encoder.",))
    pipe = InfinityPipeline(transformer.eval(), vae.eval(), InfinityScheduler(patchify=cells == 4))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: InfinityPipeline, case: Case, call: dict, output_type: str) -> tuple[torch.Tensor, list[dict]]:
    """The picture of an original's call, and latents, logits and bits of every scale."""
    assert call["cfg_insertion_layer"] == [0]  # guidance acts on logits
    steps: list[dict] = []

    def record(_pipe, _scale, _step, tensors):
        steps.append(dict(tensors))

    negative = case.tensors.get("negative_text")
    batch, schedule = call["B"], [tuple(scale[1:]) for scale in call["scale_schedule"]]
    height, width = schedule[-1]
    assert list(scales_for_pixels(16 * height, 16 * width)) == schedule
    image = pipe(
        prompt_embeds=case["text"].float().expand(batch, -1, -1),
        negative_prompt_embeds=None if negative is None else negative.float()[None],
        height=height * 16,
        width=width * 16,
        guidance_scale=call["cfg_list"],
        temperature=call["tau_list"],
        top_p=call["top_p"],
        generator=torch.Generator().manual_seed(call["g_seed"]),
        rng="upstream",
        output_type=output_type,
        callback_on_step_end=record,
        callback_on_step_end_tensor_inputs=["latents", "logits", "bits"],
    ).images
    return image, steps


def infinity_results(case: Case) -> dict[str, torch.Tensor]:
    """Every result that a case may have."""
    (call,) = case.info["calls"].values()
    pictures = "vae_decoder" in case.info["state_dicts"]
    image, steps = run(infinity_pipeline(case), case, call, "pt" if pictures else "latent")
    results = {
        "bits": torch.cat([step["bits"] for step in steps], dim=1)[0],
        "logits": torch.cat([step["logits"] for step in steps], dim=1)[0],
        "latent": steps[-1]["latents"],
    }
    if pictures:
        results |= digests(image)
        # The original returns its channels the other way round.
        results["image_bgr_crop"] = (results["image_crop"][0] * 255).round().flip(0).permute(1, 2, 0)
    return results


def check_infinity(case: Case) -> None:
    """Bits, and what else there is of logits, latents and picture."""
    case.compare(infinity_results(case), "bits")
