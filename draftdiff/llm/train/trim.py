"""VocabTrim (arXiv 2506.22694): a draft that can only emit the tokens its target really uses.

The output layer is most of what a small draft reads per token. Trimmed to the commonest tokens it proposes a little
worse and much cheaper; speculation stays lossless, because the target is untouched.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from draftdiff.errors import UserError, one_line
from draftdiff.files import new_folder, replacing

TOKEN_MAP_FILE = "token_map.json"


class TrimmedHead(nn.Module):
    """Output layer for some of the vocabulary: the logits [..., vocabulary] of the other tokens are -inf.

    weight [size, hidden], bias [size] or None.  ids: which tokens, int64 [size], ascending.  soft_cap: of the logits,
    for families such as Gemma, which would make numbers of the -inf if they capped them afterwards.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, ids: Tensor, vocabulary: int, soft_cap: float | None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.register_buffer("ids", ids, persistent=False)
        self.vocabulary, self.soft_cap = vocabulary, soft_cap

    ids: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.weight, self.bias)
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        whole = logits.new_full((*logits.shape[:-1], self.vocabulary), -torch.inf)
        return whole.index_copy(-1, self.ids, logits)


def count_tokens(dataset: Dataset, vocabulary: int) -> Tensor:
    """How often each token was `written` in a DistillationSet, int64 [vocabulary].

    Raises ValueError for rows that are no such set's, and for ids that are not of the vocabulary.
    """
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    for row in dataset:  # type: ignore[attr-defined]
        if not isinstance(row, Mapping):
            raise UserError(f"counts must be a tensor or a dataset of rows with input_ids and written, got {row!r}")
        ids = torch.as_tensor(row["input_ids"])[torch.as_tensor(row["written"])]
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocabulary:
            raise UserError(f"ids must be from 0 to {vocabulary - 1}, got {int(ids.min())} to {int(ids.max())}")
        counts += torch.bincount(ids, minlength=vocabulary)
    return counts


def trim(draft: Any, counts: Tensor | Dataset, size: int = 32_000, *, keep: Iterable[int] = ()) -> Any:
    """A copy of a draft whose output layer has the `size` commonest tokens only.

    draft: a causal language model; tied embeddings are untied, the input embedding stays whole.  counts: how often
    each token occurs, [vocabulary], or a dataset to count in; best is text that the target wrote
    (`generate_distillation_set`).  keep: ids to keep whatever their counts, besides the end, begin and padding tokens;
    give a tokenizer's `all_special_ids` if it has others. Equal counts are kept in the order of their ids.

    The copy has buffers as EAGLE-3's drafts do: `d2t` int64 [size], with target_id = i + d2t[i], and `t2d` bool
    [vocabulary]. Its logits have the whole vocabulary, -inf where trimmed, so that their softmax is the distribution
    it drafts from. Raises ValueError for a draft already trimmed, a size or counts that do not fit, and a family that
    makes numbers of the -inf.
    """
    if "d2t" in dict(draft.named_buffers()):
        raise UserError("draft is trimmed already: trim the draft it was made from")
    head = draft.get_output_embeddings()
    vocabulary = head.weight.shape[0]
    if not isinstance(counts, Tensor):
        counts = count_tokens(counts, vocabulary)
    if counts.shape != (vocabulary,):
        raise UserError(f"counts must have shape ({vocabulary},), got {tuple(counts.shape)}")
    kept = sorted(_special_ids(draft) | set(keep))
    if kept and not (kept[0] >= 0 and kept[-1] < vocabulary):
        raise UserError(f"ids to keep must be from 0 to {vocabulary - 1}, got {kept[0]} to {kept[-1]}")
    least = max(1, len(kept))
    if not least <= size <= vocabulary:
        raise UserError(
            f"size must be from {least}, the tokens always kept, to the vocabulary of {vocabulary}, got {size}"
        )
    rank = counts.cpu().to(torch.float64)
    rank[kept] = torch.inf
    ids = rank.argsort(descending=True, stable=True)[:size].sort().values
    trimmed = _with_head(copy.deepcopy(draft), ids)
    with torch.no_grad():
        logits = trimmed(ids.new_zeros(1, 1).to(trimmed.device), use_cache=False).logits
    if not logits[..., ~trimmed.t2d].isneginf().all():
        name = type(draft).__name__
        raise UserError(f"{name} changes logits after its output layer so that trimmed tokens stay possible")
    return trimmed


def trimmed_ids(draft: Any) -> Tensor:
    """The tokens that a trimmed draft can emit, int64 [size], ascending."""
    return torch.arange(len(draft.d2t), device=draft.d2t.device) + draft.d2t


def save_trimmed(draft: Any, folder: str | Path) -> None:
    """Write a trimmed draft to a new folder, whole or not at all.

    `model.safetensors` is laid out as EAGLE-3's: an `lm_head.weight` of the trimmed size, `d2t` and `t2d` beside the
    other weights; `config.json` has `draft_vocab_size`; `token_map.json` is the plain list of ids. `load_trimmed`
    reads it, and so it does what a Trainer saved. Raises FileExistsError.
    """
    with new_folder(Path(folder)) as partial:
        draft.save_pretrained(partial)
        (partial / TOKEN_MAP_FILE).write_text(json.dumps(trimmed_ids(draft).tolist()) + "\n", encoding="utf-8")


def load_trimmed(folder: str | Path) -> Any:
    """Load a trimmed draft from a folder of `save_trimmed` or of its own `save_pretrained`, in its saved dtype.

    Raises FileNotFoundError for a missing file and ValueError for a folder of something else.
    """
    folder = Path(folder)
    file = folder / "model.safetensors"
    for needed in (file, folder / "config.json"):
        if not needed.is_file():
            raise FileNotFoundError(f"there is no {needed}")
    d2t = _saved_d2t(file)
    ids = torch.arange(len(d2t)) + d2t
    with _loading(folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            bare = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    family, vocabulary = type(bare), bare.get_output_embeddings().weight.shape[0]
    if not len(ids) or not 0 <= ids.min() <= ids.max() < vocabulary or (ids.diff() <= 0).any():
        raise UserError(
            f"{folder} holds no trimmed draft: d2t names no ascending tokens of a vocabulary of {vocabulary}"
        )

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        family.__init__(self, *args, **kwargs)
        _with_head(self, ids)

    # The host's own loading, because it knows by which other names a family's weights are saved; it goes by these two.
    trimmed_family: Any = type(family.__name__, (family,), {"__module__": family.__module__, "__init__": build})
    with _loading(folder):
        model, found = trimmed_family.from_pretrained(
            folder, config=config, dtype=config.dtype, local_files_only=True, output_loading_info=True
        )
    if found["missing_keys"]:
        raise UserError(f"{folder} holds no whole draft: {file.name} lacks {', '.join(sorted(found['missing_keys']))}")
    model.__class__ = family
    model.get_output_embeddings().ids.copy_(ids)  # not saved, so the host left it empty
    return model.eval()


def _saved_d2t(file: Path) -> Tensor:
    """The d2t int64 [size] in a file of weights, which is not read whole."""
    try:
        with safe_open(file, "pt") as saved:
            d2t = saved.get_tensor("d2t") if "d2t" in saved.keys() else None  # noqa: SIM118  # it is no dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable file of weights: {one_line(error)}") from None
    if d2t is None:
        raise UserError(f"{file.parent} holds no trimmed draft: {file.name} has no d2t")
    if d2t.dtype != torch.int64 or d2t.ndim != 1:
        raise UserError(f"{file.parent} holds no trimmed draft: its d2t is {d2t.dtype} {list(d2t.shape)}")
    return d2t


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Around the host's loading of a folder: whatever it raises becomes one line."""
    try:
        yield
    except Exception as error:  # transformers and safetensors each have their own
        raise UserError(f"{folder} holds no readable draft: {one_line(error)}") from error


def export_token_map(draft: Any, file: str | Path) -> None:
    """Write the ids of a trimmed draft as a list that torch.load reads, SGLang's `--speculative-token-map`."""
    with replacing(Path(file)) as partial:
        torch.save(trimmed_ids(draft).tolist(), partial)


def _with_head(model: Any, ids: Tensor) -> Any:
    head, config = model.get_output_embeddings(), model.config
    soft_cap = getattr(config, "draft_soft_cap", None) or getattr(config, "final_logit_softcapping", None)
    if soft_cap is not None:
        config.draft_soft_cap, config.final_logit_softcapping = soft_cap, None  # the new head applies it
    vocabulary, ids = head.weight.shape[0], ids.to(head.weight.device)
    bias = getattr(head, "bias", None)
    model.set_output_embeddings(
        TrimmedHead(
            head.weight.detach()[ids].clone(),
            None if bias is None else bias.detach()[ids].clone(),
            ids,
            vocabulary,
            soft_cap,
        )
    )
    config.tie_word_embeddings, config.draft_vocab_size = False, len(ids)
    emitted = torch.zeros(vocabulary, dtype=torch.bool, device=ids.device)
    emitted[ids] = True
    model.register_buffer("d2t", ids - torch.arange(len(ids), device=ids.device))
    model.register_buffer("t2d", emitted)
    return model


def _special_ids(draft: Any) -> set[int]:
    found: set[int] = set()
    for config in (draft.config.get_text_config(), draft.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            found |= set() if value is None else {value} if isinstance(value, int) else set(value)
    return {i for i in found if i >= 0}
