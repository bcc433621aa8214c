"""A language model with its draft and tokenizer, and prompts for them."""

from __future__ import annotations

import copy
import importlib.util
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftdiff.errors import UserError
from draftdiff.llm.checks import share_tokens
from draftdiff.llm.drafters.cross_vocab import CrossVocabDrafter
from draftdiff.models.devices import find_device, find_dtype
from draftdiff.models.loading import loading

EMBEDDED = "mini-llm"


@dataclass(frozen=True)
class LanguageModel:
    """A target and its draft.

    draft: None without one that has the target's tokenizer.  length, nodes: of a chain and of a tree that suit them and
    the device.  counts: how often the target writes each token, [vocabulary], None if unknown.  cross: a drafter whose
    draft has another tokenizer, if there is one.  same_tokenizer: if the draft's is taken for the target's whatever its
    size.  heads: drafters of the target's own heads, by kind.  reports: what each kind of drafter did last.
    """

    name: str
    target: Any
    draft: Any
    tokenizer: Any
    length: int = 5
    nodes: int = 48
    counts: Tensor | None = None
    cross: CrossVocabDrafter | None = None
    same_tokenizer: bool = False
    heads: dict[str, Any] = field(default_factory=dict)
    reports: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        return self.target.device


def load(
    target: str | None,
    draft: str | None,
    *,
    dtype: str | None = None,
    device: str | None = None,
    same_tokenizer: bool = False,
    workload: str | None = None,
) -> LanguageModel:
    """Load a pair and put it on its device.

    target, draft: folders or Hugging Face Hub ids; both None is an embedded pair, no draft leaves methods that need
    none.  same_tokenizer: take the draft's for the target's, whatever they say.  workload: whose compact prompts the
    embedded pair answers, "drawing" or "travel"; None is the pair for programs.  dtype: float32, float16 or bfloat16;
    None is bfloat16 on a GPU, and float32 on a CPU and for the embedded pairs.  device: as in torch; None is CUDA if
    there is. Raises UserError, in one line, for what cannot be loaded or does not belong together.
    """
    place = find_device(device)
    wanted = find_dtype(dtype, place, embedded=target is None)
    if target is None:
        if draft is not None:
            raise UserError(f"--draft comes with --model, got {draft!r} alone")
        return _embedded(wanted, place, workload)
    tokenizer = pretrained("AutoTokenizer", target)
    model = LanguageModel(target, _model(target, wanted, place), None, tokenizer, same_tokenizer=same_tokenizer)
    if draft is None:
        return model
    small, its_own = _model(draft, wanted, place), pretrained("AutoTokenizer", draft)
    if same_tokenizer or share_tokens(tokenizer, its_own):
        return replace(model, draft=small)
    return replace(model, cross=CrossVocabDrafter(small, its_own, tokenizer))


def _model(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    return pretrained("AutoModelForCausalLM", name, dtype=dtype).to(device).eval()


def pretrained(kind: str, name: str, **options: Any) -> Any:
    """What an Auto class of transformers, by its name, loads from a folder or the Hub; UserError if it cannot."""
    import transformers

    folder = Path(name).expanduser()
    with loading(name):
        place = folder if folder.is_dir() else name
        return getattr(transformers, kind).from_pretrained(place, trust_remote_code=False, **options)


def _embedded(dtype: torch.dtype, device: torch.device, workload: str | None) -> LanguageModel:
    from draftdiff.pipelines.mini.llm import (
        HEADS,
        WEIGHTS,
        WORKLOAD_WEIGHTS,
        load_mini_heads,
        load_mini_llm,
        mini_llm_defaults,
    )  # fmt: skip

    name, folder = (EMBEDDED, WEIGHTS) if workload is None else (f"mini-{workload}", WORKLOAD_WEIGHTS[workload])
    with loading(name):
        target, draft, tokenizer = load_mini_llm(dtype, folder)
        known = mini_llm_defaults(folder)
        target.to(device)
        heads = {kind: load_mini_heads(kind, target, folder) for kind in HEADS if (folder / kind).is_dir()}
    counts = torch.tensor(known["token_counts"]) if "token_counts" in known else None
    draft = draft.to(device)
    cross = _coarser(draft, tokenizer)
    return LanguageModel(name, target, draft, tokenizer, known["length"], 12, counts, cross, heads=heads)


def _coarser(draft: Any, tokenizer: Any, share: float = 0.5) -> CrossVocabDrafter:
    """The draft with another tokenizer, of the first merges alone: its tokens are shorter than the target's."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    made = json.loads(tokenizer.backend_tokenizer.to_str())
    model, size = made["model"], int(share * len(tokenizer))
    merges = len(model["merges"]) - (len(model["vocab"]) - size)
    model["merges"] = model["merges"][:merges]
    model["vocab"] = {token: id for token, id in model["vocab"].items() if id < size}
    shorter = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(made)), eos_token=tokenizer.eos_token
    )
    small = copy.deepcopy(draft)
    small.resize_token_embeddings(size)
    return CrossVocabDrafter(small, shorter, tokenizer)


# Modules of the standard library that the embedded pair has not seen, nor any file much like them.
UNSEEN = ("statistics", "socket", "trace", "webbrowser", "dataclasses", "ftplib", "modulefinder", "turtle")


def example_prompts(model: LanguageModel, count: int, tokens: int) -> list[Tensor]:
    """Pieces of unseen program text, int64 [1, tokens] each. Raises UserError for more than there are."""
    if not 1 <= count <= len(UNSEEN):
        raise UserError(f"there are 1 to {len(UNSEEN)} example prompts, got {count}")
    if tokens < 1:
        raise UserError(f"prompts must have at least 1 token, got {tokens}")
    prompts = []
    for name in UNSEEN[:count]:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        text = Path(spec.origin).read_text(encoding="utf-8")
        half = text.index("\n", len(text) // 2) + 1
        ids = encode(model, text[half : half + 16 * tokens])[:, :tokens]
        if ids.shape[1] < tokens:
            raise UserError(f"example prompts must have at most {ids.shape[1]} tokens (module {name}), got {tokens}")
        prompts.append(ids)
    return prompts


def encode(model: LanguageModel, text: str) -> Tensor:
    """Token ids int64 [1, tokens] of a prompt. Raises UserError for an empty one, or one that is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"the prompt {text!r} is not valid UTF-8") from None
    ids = model.tokenizer(text, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        raise UserError(f"the prompt {text!r} is empty: at least one token is needed")
    return ids.to(model.device)
