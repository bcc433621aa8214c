"""Transformer classes of diffusers that have no row, and why in a few words."""

from __future__ import annotations

_AUDIO = "audio: short sequences of no grid"
_LINEAR = "linear attention"

NOTHING_TO_WIN: dict[str, str] = {
    "AceStepTransformer1DModel": _AUDIO,
    "DiTTransformer2DModel": "256 to 1,024 tokens",
    "DreamLiteTransformer2DModel": "a block of a U-Net",
    "LatteTransformer3DModel": "attention within frames or across them, never over all",
    "LongCatAudioDiTTransformer": _AUDIO,
    "MiniMaxMusic3RVQDepthDecoder": _AUDIO,
    "MiniMaxMusic3Transformer1DModel": _AUDIO,
    "OmniGenTransformer2DModel": "causal text and images in one sequence, by a mask over pairs of tokens",
    "PriorTransformer": "text and image embeddings: some 80 tokens",
    "RFD4ProteinaTransformer": "proteins",
    "SanaTransformer2DModel": _LINEAR,
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaWMTransformer3DModel": _LINEAR,
    "SanaWMLTX2RefinerTransformer3DModel": "blocks of three frames behind a cache, 2,640 tokens a call",
    "StableAudio3DiTModel": _AUDIO,
    "StableAudioDiTModel": _AUDIO,
    "T5FilmDecoder": _AUDIO,
    "Transformer2DModel": "a block of a U-Net",
    "TransformerTemporalModel": "a block of a U-Net",
}
