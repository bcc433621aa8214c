"""Parity of one golden case of VAR or CoDe."""

from __future__ import annotations

from typing import Any

import torch

from draftdiff.pipelines.var import VARPipeline
from draftdiff.var.checkpoint import fill
from draftdiff.var.scheduler_var import VARScheduler
from draftdiff.var.transformer_var import VARTransformer2DModel
from draftdiff.var.vq_model import VQModel
from tests.golden_cases import Case, assert_image, tolerances


def transformer(case: Case, part: str) -> VARTransformer2DModel:
    settings, vqvae = case.info["config"][part], case.info["config"]["vqvae"]
    model = VARTransformer2DModel(
        num_layers=settings["depth"],
        num_attention_heads=settings["num_heads"],
        attention_head_dim=settings["embed_dim"] // settings["num_heads"],
        in_channels=vqvae["z_channels"],
        vocab_size=vqvae["vocab_size"],
        num_classes=settings["num_classes"],
        patch_nums=case.info["config"]["patch_nums"],
        mlp_ratio=settings["mlp_ratio"],
        shared_adaln=settings["shared_aln"],
        qk_norm=settings["attn_l2_norm"],
        norm_eps=settings["norm_eps"],
    )
    fill(model, case.weights(part))
    return model.eval()


def vq_model(case: Case) -> VQModel:
    settings = case.info["config"]["vqvae"]
    model = VQModel(
        block_out_channels=[settings["ch"] * multiple for multiple in settings["ch_mult"]],
        layers_per_block=settings["num_res_blocks"],
        latent_channels=settings["z_channels"],
        num_vq_embeddings=settings["vocab_size"],
        patch_nums=case.info["config"]["patch_nums"],
        num_phi=settings["share_quant_resi"],
        phi_share=settings["quant_resi"],
        cosine=settings["using_znorm"],
    )
    fill(model, case.weights("vqvae"), optional=("encoder.",))
    return model.eval()


def pipeline(case: Case, part: str) -> VARPipeline:
    scheduler = VARScheduler(patch_nums=case.info["config"]["patch_nums"])
    pipe = VARPipeline(transformer(case, part), vq_model(case), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: VARPipeline, call: dict[str, Any], generator: torch.Generator) -> tuple[torch.Tensor, list[dict]]:
    """The picture in [0, 1] of an original's call, and latents, logits and indices of every scale."""
    labels = call["label_B"]
    if isinstance(labels, int):
        labels = [labels if labels >= 0 else pipe.transformer.config.num_classes] * call["B"]
    steps: list[dict] = []

    def record(_pipe, _scale, _step, tensors):
        steps.append(dict(tensors))
        return {}

    image = pipe(
        labels,
        num_images_per_prompt=call["B"] if labels is None else 1,
        guidance_scale=call["cfg"],
        top_k=call["top_k"],
        top_p=call["top_p"],
        temperature=call.get("temp", 1.0),
        more_smooth=call["more_smooth"],
        generator=generator,
        rng="upstream",
        output_type="pt",
        callback_on_step_end=record,
        callback_on_step_end_tensor_inputs=["latents", "logits", "indices"],
    ).images
    return image, steps


def check_var(case: Case) -> None:
    """Indices, logits, latents and pictures of every call."""
    pipe = pipeline(case, "transformer")
    for run_name, call in case.info["calls"].items():
        table = case.info["tolerance"]
        tolerance = tolerances(table.get(run_name, table))
        generator = torch.Generator().manual_seed(call["g_seed"])
        image, steps = run(pipe, call, generator)
        indices = torch.cat([step["indices"] for step in steps], dim=1)
        assert torch.equal(indices, case[f"{run_name}.idx"].long())
        torch.testing.assert_close(steps[-1]["latents"], case[f"{run_name}.f_hat"], atol=tolerance["f_hat"], rtol=0)
        logits = torch.cat([step["logits"] for step in steps], dim=1)
        for key in case.tensors:
            if key.startswith(f"{run_name}.logits"):
                expected = case[key]
                torch.testing.assert_close(logits[:, : expected.shape[1]], expected, atol=tolerance["logits"], rtol=0)
        assert_image(image, case, f"{run_name}.", tolerance["image"])


def check_code(case: Case) -> None:
    """Indices of both models, what is handed over, logits, latents and picture."""
    drafted = case.info["N"]
    draft, refine = case.info["calls"]["draft"], case.info["calls"]["refine"]
    # One call of ours: the settings of each scale are those of the model that draws it.
    call = refine | {name: draft[name][:drafted] + refine[name][drafted:] for name in ("top_k", "temp")}
    tolerance = tolerances(case.info["tolerance"])
    pipe = pipeline(case, "drafter")
    pipe.enable_collaborative(transformer(case, "refiner"), drafted)
    image, steps = run(pipe, call, torch.Generator().manual_seed(call["g_seed"]))

    indices = [step["indices"] for step in steps]
    assert torch.equal(torch.cat(indices[:drafted], dim=1), case["idx_draft"].long())
    assert torch.equal(torch.cat(indices[drafted:], dim=1), case["idx_refine"].long())
    read = pipe.scheduler.scale_model_input
    inputs = [read(steps[n - 1]["latents"], n, pipe.scheduler.scales) for n in range(1, drafted + 1)]
    close = {
        "token_hub": torch.cat(inputs, dim=1),
        "f_hat_draft": steps[drafted - 1]["latents"],
        "f_hat": steps[-1]["latents"],
        "logits_draft_last": steps[drafted - 1]["logits"],
        "logits_refine_first": steps[drafted]["logits"],
        "logits_refine_last": steps[-1]["logits"],
    }
    for key, ours in close.items():
        allowed = tolerance["logits" if key.startswith("logits") else key.removesuffix("_draft")]
        torch.testing.assert_close(ours, case[key], atol=allowed, rtol=0)
    assert_image(image, case, "", tolerance["image"])
