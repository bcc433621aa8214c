"""A whole Wan pipeline with random weights, text encoder and tokenizer included: a second per call on a CPU."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "green", "circle", "square", "moves", "left", "right")
# 192 video tokens, three tiles of 64: the least that leaves a choice.
TINY_CALL = {
    "num_frames": 9,
    "height": 128,
    "width": 128,
    "num_inference_steps": 3,
    "guidance_scale": 2.0,
    "max_sequence_length": 8,
}


def tiny_wan_pipeline(seed: int = 0) -> WanPipeline:
    """Two layers of two heads, 16 pixels and 4 frames per token."""
    torch.manual_seed(seed)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    parts = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder}
    pipeline = WanPipeline(tokenizer=tokenizer, scheduler=scheduler, **{k: p.eval() for k, p in parts.items()})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
