"""The parts of the mini video pipeline, untrained: a small Wan VAE and transformer, and a tiny text encoder."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from draftdiff.pipelines.mini import world as mini_world

LATENT_CHANNELS = 8
TEXT_TOKENS = 20
TEXT_WIDTH = 128
HEADS, LAYERS = 4, 6
# How generation runs: the timestep shift that training follows too, steps, and classifier-free guidance.
SHIFT, STEPS, GUIDANCE = 5.0, 20, 3.0


def new_vae() -> AutoencoderKLWan:
    """A Wan 2.2-style VAE, 8x8 in space and 4x in time; it starts from 2x2 pixel patches, which is much cheaper."""
    return AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def new_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the mini world; anything else is <unk>. Synonyms are folded in before the look-up."""
    words = ["<pad>", "</s>", "<unk>", *mini_world.vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    folds = [normalizers.Replace(Regex(rf"\b{word}\b"), meaning) for word, meaning in mini_world.SYNONYMS.items()]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^a-z]+"), " "), *folds, normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
    )


def new_text_encoder(words: int) -> UMT5EncoderModel:
    """A two-layer text encoder, trained together with the transformer."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=words,
            d_model=TEXT_WIDTH,
            d_kv=32,
            num_heads=4,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            dropout_rate=0.0,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=24,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def new_transformer() -> WanTransformer3DModel:
    """A Wan transformer with one token per latent pixel. Every block starts as the identity, which trains faster."""
    width = 64 * HEADS
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=HEADS,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=4 * width,
        num_layers=LAYERS,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=128,
    )
    with torch.no_grad():
        for block in transformer.blocks:
            for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2]):
                layer.weight.zero_()
                layer.bias.zero_()
            block.scale_shift_table.zero_()
            block.scale_shift_table[:, [2, 5]] = 1.0  # the two gates
        transformer.condition_embedder.time_proj.weight.mul_(0.1)
        transformer.condition_embedder.time_proj.bias.zero_()
        transformer.scale_shift_table.zero_()
        transformer.proj_out.weight.zero_()
        transformer.proj_out.bias.zero_()
    return transformer


def build_pipeline(
    transformer: WanTransformer3DModel,
    text_encoder: UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerFast,
    vae: AutoencoderKLWan,
) -> WanPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    pipe = WanPipeline(tokenizer, text_encoder, vae, scheduler, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe
