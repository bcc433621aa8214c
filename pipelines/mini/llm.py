"""The mini language-model pair that ships with draftdiff: a target and its draft, which continue Python programs.

`load_mini_llm()` loads both with their tokenizer from the folder beside this file, without a network. The target is a
Llama of 6 layers and 2.3 million parameters, the draft one layer with a fifth of that, and both have seen up to 512
tokens of the Python standard library's sources. `load_mini_heads` loads small Hydra, Medusa, LongSpec or Falcon heads
for the target. Weights are stored in half precision. `samples/training/train_mini_llm.py` and
`samples/llm/draft_heads.py` are how they were made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from draftdiff.core.devices import chosen_dtype
from draftdiff.errors import UserError
from draftdiff.pipelines.mini import weights

WEIGHTS = Path(__file__).with_name("llm_weights")
WORKLOAD_WEIGHTS = {name: Path(__file__).with_name(f"{name}_weights") for name in ("drawing", "travel")}  # pairs, alike
TITLE = "mini language-model"
MODELS, HEADS = ("target", "draft"), ("hydra", "medusa", "longspec", "falcon")
FILES = (
    "tokenizer/tokenizer.json",
    *(f"{model}/{name}" for model in MODELS for name in ("config.json", "model.safetensors")),
)


def load_mini_llm(
    dtype: str | torch.dtype | None = None, folder: Path = WEIGHTS, *, torch_dtype: str | torch.dtype | None = None
) -> tuple[LlamaForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load target, draft and tokenizer, the models for inference.

    dtype, or by its old name torch_dtype: float32 if None.
    A missing file raises FileNotFoundError and a damaged one ValueError, each naming the file.
    """

    wanted = chosen_dtype(dtype, torch_dtype) or torch.float32

    def trio() -> tuple[LlamaForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast]:
        target, draft = (
            LlamaForCausalLM.from_pretrained(folder / model, dtype=wanted, local_files_only=True).eval()
            for model in MODELS
        )
        return target, draft, PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer", local_files_only=True)

    return weights.load(TITLE, folder, FILES, trio)


def load_mini_heads(kind: str, target: LlamaForCausalLM, folder: Path = WEIGHTS) -> Any:
    """The drafter of the target's heads of a kind, such as a `HydraDrafter`, on its device in its dtype.

    kind: one of HEADS.  Raises ValueError for others, and as `load_mini_llm` does for missing and damaged files.
    """
    from draftdiff.llm import FalconDrafter, HydraDrafter, LongSpecDrafter, MedusaDrafter

    if kind not in HEADS:
        raise UserError(f"kind must be one of {', '.join(HEADS)}, got {kind!r}")
    drafters: dict[str, Any] = dict(zip(HEADS, (HydraDrafter, MedusaDrafter, LongSpecDrafter, FalconDrafter)))
    files = [f"{kind}/config.json", f"{kind}/model.safetensors"]
    return weights.load(TITLE, folder, files, lambda: drafters[kind].from_pretrained(folder / kind, target))


def mini_llm_defaults(folder: Path = WEIGHTS) -> dict[str, Any]:
    """What is known about the pair: `length`, the chain length that suits the draft; `prompt`, an example; scores;
    `token_counts`, how often the target wrote each token of its vocabulary, for VocabTrim."""
    return weights.settings(TITLE, folder)
