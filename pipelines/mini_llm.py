"""The mini language-model pair that ships with draftdiff: a target and its draft, which continue Python programs.

`load_mini_llm()` loads both with their tokenizer from the folder beside this file, without a network. The target is a
Llama of 6 layers and 2.3 million parameters, the draft one layer with a fifth of that, and both have seen up to 512
tokens of the Python standard library's sources. Weights are stored in half precision.
`samples/llm/train_mini_llm.py` is how they were made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

WEIGHTS = Path(__file__).with_name("mini_llm_weights")
DEFAULTS_FILE = "draftdiff.json"
MODELS = ("target", "draft")


def load_mini_llm(
    dtype: torch.dtype = torch.float32, folder: Path = WEIGHTS
) -> tuple[LlamaForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load target, draft and tokenizer, the models for inference.

    A missing file raises FileNotFoundError and a damaged one ValueError, each naming the file.
    """
    weights = [folder / model / "model.safetensors" for model in MODELS]
    for file in [*weights, *(folder / model / "config.json" for model in MODELS), folder / "tokenizer/tokenizer.json"]:
        if not file.is_file():
            raise FileNotFoundError(f"mini language-model weights are missing: {file}")
    digests = mini_llm_defaults(folder).get("sha256", {})
    for file in weights:
        if hashlib.sha256(file.read_bytes()).hexdigest() != digests.get(file.relative_to(folder).as_posix()):
            raise ValueError(
                f"mini language-model weights are damaged: {file} does not match its checksum in {DEFAULTS_FILE}"
            )
    try:
        with _no_progress_bars():
            target, draft = (
                LlamaForCausalLM.from_pretrained(folder / model, dtype=dtype, local_files_only=True).eval()
                for model in MODELS
            )
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer", local_files_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"mini language-model weights cannot be loaded: {folder}: {reason}") from error
    return target, draft, tokenizer


def mini_llm_defaults(folder: Path = WEIGHTS) -> dict[str, Any]:
    """What is known about the pair: `length`, the chain length that suits the draft; `prompt`, an example; scores;
    `token_counts`, how often the target wrote each token of its vocabulary, for VocabTrim."""
    file = folder / DEFAULTS_FILE
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"mini language-model settings are missing: {file}") from None
    except ValueError as error:
        raise ValueError(f"mini language-model settings are unreadable: {file}: {error}") from None


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Loading takes a fraction of a second; a bar for it would only clutter the terminal."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
