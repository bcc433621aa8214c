"""Parity of one golden case of VAR or CoDe."""

from __future__ import annotations

from typing import Any

import torch

from draftdiff.pipelines.var import VARPipeline
from draftdiff.var.checkpoint import fill
from draftdiff.var.sampling import Draws, filter_logits
from draftdiff.var.scheduler_var import VARScheduler
from draftdiff.var.transformer_var import VARTransformer2DModel
from draftdiff.var.vq_model import VQModel
from tests.golden_cases import Case, digests


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
    steps: list[dict] = []

    def record(_pipe, _scale, _step, tensors):
        steps.append(dict(tensors))
        return {}

    image = pipe(
        given_labels(pipe, call),
        num_images_per_prompt=call["B"] if call["label_B"] is None else 1,
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


def given_labels(pipe: VARPipeline, call: dict[str, Any]) -> list[int] | None:
    """Classes of a call, which may name one for all, or by -1 none; None where they are drawn."""
    labels = call["label_B"]
    if isinstance(labels, int):
        return [labels if labels >= 0 else pipe.transformer.config.num_classes] * call["B"]
    return labels


def var_results(case: Case, run_name: str) -> dict[str, torch.Tensor]:
    """Every result that a case may have of a call."""
    call = case.info["calls"][run_name]
    image, steps = run(pipeline(case, "transformer"), call, torch.Generator().manual_seed(call["g_seed"]))
    logits = [step["logits"] for step in steps]
    return {
        "idx": torch.cat([step["indices"] for step in steps], dim=1),
        "f_hat": steps[-1]["latents"],
        "logits": torch.cat(logits, dim=1),
        **{f"logits_scales0to{n}": torch.cat(logits[: n + 1], dim=1) for n in range(len(logits))},
        **digests(image),
    }


def check_var(case: Case) -> None:
    """Indices, and what else there is of logits, latents and pictures, of every call."""
    for run_name in case.info["calls"]:
        case.compare(var_results(case, run_name), "idx", prefix=f"{run_name}.")


def code_results(case: Case) -> dict[str, torch.Tensor]:
    """Every result that a case of CoDe may have."""
    drafted = case.info["N"]
    draft, refine = case.info["calls"]["draft"], case.info["calls"]["refine"]
    # One call of ours: the settings of each scale are those of the model that draws it, the others must be the same.
    per_scale = {name: draft[name][:drafted] + refine[name][drafted:] for name in ("top_k", "temp")}
    for name in ("B", "label_B", "g_seed", "cfg", "top_p", "more_smooth"):
        assert draft[name] == refine[name], f"drafter and refiner differ in {name}"
    pipe, refiner = pipeline(case, "drafter"), transformer(case, "refiner")
    pipe.enable_collaborative(refiner, drafted)
    image, steps = run(pipe, draft | per_scale, torch.Generator().manual_seed(draft["g_seed"]))
    indices, logits = ([step[name] for step in steps] for name in ("indices", "logits"))
    read = pipe.scheduler.scale_model_input
    inputs = [read(steps[n - 1]["latents"], n, pipe.scheduler.scales) for n in range(1, drafted + 1)]
    hub = torch.cat(inputs, dim=1)
    return {
        "token_hub": hub,
        "f_hat_draft": steps[drafted - 1]["latents"],
        "f_hat": steps[-1]["latents"],
        "idx_draft": torch.cat(indices[:drafted], dim=1),
        "idx_refine": torch.cat(indices[drafted:], dim=1),
        "idx_refine_prefix": thrown_away(pipe, hub, drafted, refine),
        "logits_draft_last": logits[drafted - 1],
        "logits_refine_first": logits[drafted],
        "logits_refine_last": logits[-1],
        **digests(image),
    }


@torch.no_grad()
def thrown_away(pipe: VARPipeline, hub: torch.Tensor, drafted: int, call: dict[str, Any]) -> torch.Tensor:
    """The indices of the drafted scales that the original's refiner draws, from its own logits without guidance."""
    draws, model = Draws(torch.Generator().manual_seed(call["g_seed"])), pipe.refiner
    labels = pipe._labels(given_labels(pipe, call), call["B"] if call["label_B"] is None else 1, draws)
    logits = model(hub[:, : model.starts[drafted] - 1] if drafted > 1 else None, labels).sample
    indices = []
    for scale in range(drafted):
        rows = logits[:, model.starts[scale] : model.starts[scale + 1]]
        indices.append(draws.codes(filter_logits(rows, call["top_k"][scale], call["top_p"]) / call["temp"][scale]))
    return torch.cat(indices, dim=1)


def check_code(case: Case) -> None:
    """Indices of both models, and what else there is: what is handed over, logits, latents and picture."""
    case.compare(code_results(case), "idx_draft", "idx_refine")
