"""A whole Infinity pipeline with lively random weights, text encoder and tokenizer included."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from draftdiff.pipelines.infinity import InfinityPipeline
from draftdiff.var.autoencoder_bsq import AutoencoderBSQ
from draftdiff.var.scheduler_infinity import InfinityScheduler
from draftdiff.var.transformer_infinity import InfinityTransformer2DModel
from tests.var.tiny import enliven

WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "green", "circle", "square", "on", "the", "left", "right")
CHANNELS = (4, 4, 4, 4, 4)


def transformer(seed: int = 0, **changes) -> InfinityTransformer2DModel:
    settings = {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "bits": 6,
        "text_dim": 128,
        "text_tokens": 16,
        "mlp_ratio": 4.0,
    }
    return enliven(InfinityTransformer2DModel(**settings | changes), seed)


def autoencoder(patchify: bool = False) -> AutoencoderBSQ:
    channels = CHANNELS[1:] if patchify else CHANNELS
    return enliven(AutoencoderBSQ(channels, layers_per_block=1, latent_channels=6, norm_num_groups=4), 1)


def infinity_pipeline(seed: int = 0, patchify: bool = False, **changes) -> InfinityPipeline:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    encoder = T5EncoderModel(T5Config(vocab_size=len(WORDS), d_model=128, d_kv=16, d_ff=64, num_layers=1, num_heads=2))
    pipe = InfinityPipeline(
        transformer(seed, **{"bits": 24 if patchify else 6} | changes),
        autoencoder(patchify),
        InfinityScheduler(patchify),
        enliven(encoder, 2),
        tokenizer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
