"""Text to train drafts on: what the target itself writes, and packed windows of any other text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset
from tqdm import tqdm

from draftdiff.errors import UserError
from draftdiff.files import replacing
from draftdiff.llm.plain_config import own_law
from draftdiff.llm.train.modes import in_eval_mode
from draftdiff.stored import read_tensors

TEMPERATURES = (0.0, 0.6, 0.8, 1.0)  # of FastDraft (arXiv 2411.11055)


class DistillationSet(Dataset[dict[str, Tensor]]):
    """Rows of ids with what the target wrote of them.

    A row is `input_ids` int64 [tokens], `written` bool [tokens], and `distil` bool []: whether a trainer is to compare
    draft and target on it, or to take it as plain text.
    """

    def __init__(self, ids: Sequence[Tensor], written: Sequence[Tensor], distil: bool = True) -> None:
        if [len(row) for row in ids] != [len(row) for row in written]:
            raise UserError("ids and written must have rows of the same lengths")
        self.ids, self.written, self.distil = list(ids), list(written), distil

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "input_ids": self.ids[index],
            "written": self.written[index],
            "distil": torch.tensor(self.distil),
        }

    def save(self, file: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        lengths = torch.tensor([len(row) for row in self.ids])
        tensors = {"ids": torch.cat(self.ids), "written": torch.cat(self.written), "lengths": lengths}
        with replacing(Path(file)) as partial:
            save_file(tensors | {"distil": torch.tensor([self.distil])}, partial)

    @classmethod
    def load(cls, file: str | Path) -> DistillationSet:
        """Read what `save` wrote. Raises FileNotFoundError or, for any other file, ValueError."""
        what, any_length = "saved distillation set", (None,)
        saved = read_tensors(
            file,
            what,
            {
                "ids": (torch.int64, any_length),
                "written": (torch.bool, any_length),
                "lengths": (torch.int64, any_length),
                "distil": (torch.bool, (1,)),
            },
        )
        lengths = saved["lengths"].tolist()
        if min(lengths, default=0) < 0 or not sum(lengths) == len(saved["ids"]) == len(saved["written"]):
            raise UserError(f"{file} is not a readable {what}: its lengths, ids and written do not fit together")
        if (saved["ids"] < 0).any():
            raise UserError(f"{file} is not a readable {what}: it holds negative ids")
        return cls(saved["ids"].split(lengths), saved["written"].split(lengths), bool(saved["distil"]))


@torch.no_grad()
def generate_distillation_set(
    target: Any,
    prompts: Sequence[Sequence[int] | Tensor | str],
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    tokenizer: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> DistillationSet:
    """Let the target continue every prompt once at every temperature (0: greedily), with its whole distribution.

    target: a causal language model.  prompts: rows of ids, or strings if there is a tokenizer.  max_new_tokens: a
    continuation ends there or with an end token, which is kept.  seed: of the sampling; the global generator is left
    as it was.

    Returns the rows by temperature, then in the order of the prompts. Raises ValueError for no or empty prompts, one
    bare string, strings without a tokenizer and negative temperatures.
    """
    rows = _as_ids(prompts, tokenizer)
    if not temperatures or min(temperatures) < 0:
        raise UserError(f"temperatures must be one or more numbers from 0 on, got {tuple(temperatures)}")
    if max_new_tokens < 1 or batch_size < 1:
        raise UserError(f"max_new_tokens and batch_size must be at least 1, got {max_new_tokens} and {batch_size}")
    ends = _end_ids(target)
    pad = next((i for i in (target.generation_config.pad_token_id, *ends) if i is not None and i >= 0), 0)
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # so that little is padded
    batches = [by_length[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    done: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    with (
        torch.random.fork_rng(),
        in_eval_mode(target),
        tqdm(total=len(rows) * len(temperatures), unit="text", disable=not progress) as bar,
    ):
        torch.manual_seed(seed)
        for turn, temperature in enumerate(temperatures):
            sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
            law = own_law(target, max_new_tokens=max_new_tokens, pad_token_id=pad, **sampling)
            for batch in batches:
                ids, attention_mask = left_padded([rows[i] for i in batch], pad)
                there = {"attention_mask": attention_mask.to(target.device), "generation_config": law}
                out = target.generate(ids.to(target.device), **there).cpu()
                for i, continuation in zip(batch, out[:, ids.shape[1] :]):
                    new = _until_end(continuation, ends)
                    written = torch.zeros(len(rows[i]) + len(new), dtype=torch.bool)
                    written[len(rows[i]) :] = True
                    done[turn, i] = torch.cat([rows[i], new]), written
                bar.update(len(batch))
    ordered = [done[key] for key in sorted(done)]
    return DistillationSet([ids for ids, _ in ordered], [written for _, written in ordered])


def packed_text(ids: Tensor, length: int, distil: bool = False) -> DistillationSet:
    """One row of ids int64 [tokens] cut into windows of `length`; the rest is dropped. distil: as in DistillationSet,
    whether to learn what the target thinks of the text rather than the text."""
    if len(ids) < length:
        raise UserError(f"ids must be at least as long as a window of {length}, got {len(ids)}")
    windows = list(ids[: len(ids) // length * length].view(-1, length))
    return DistillationSet(windows, [torch.ones(length, dtype=torch.bool)] * len(windows), distil)


def mix_in_text(
    distillation: DistillationSet, pretraining: DistillationSet, share: float = 0.1, seed: int = 0
) -> Dataset:
    """Both in one set, the second cut at random so that it makes `share` of all rows (or all of it, if there is less).

    The mix of Direct Alignment (arXiv 2403.00858): the draft learns from its target and stays a language model.
    """
    if not 0 <= share < 1:
        raise UserError(f"share must be in [0, 1), got {share}")
    count = min(len(pretraining), round(len(distillation) * share / (1 - share)))
    chosen = torch.randperm(len(pretraining), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return ConcatDataset([distillation, Subset(pretraining, chosen)])


def collate(rows: Sequence[dict[str, Tensor]], pad: int = 0) -> dict[str, Tensor]:
    """Rows of a DistillationSet, padded on the right, with their `attention_mask`; padding is not `written`.

    Rows may also be lists, as `datasets` gives them.
    """

    def padded(name: str, dtype: torch.dtype, value: int) -> Tensor:
        columns = [torch.as_tensor(row[name], dtype=dtype) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=value)

    ids = padded("input_ids", torch.int64, pad)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        "written": padded("written", torch.bool, False),
        "distil": torch.tensor([bool(row["distil"]) for row in rows]),
    }


def left_padded(rows: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Ids int64 [batch, longest] of rows that end together, and their attention mask int64 [batch, longest]."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
    return ids, mask


def _as_ids(prompts: Sequence[Sequence[int] | Tensor | str], tokenizer: Any) -> list[Tensor]:
    if isinstance(prompts, str):
        raise UserError(f"prompts must be a list of prompts, got the one string {prompts[:40]!r}")
    rows = []
    for prompt in prompts:
        if isinstance(prompt, str):
            if tokenizer is None:
                raise UserError(f"prompts that are strings need a tokenizer, got {prompt[:40]!r} without one")
            prompt = tokenizer(prompt).input_ids
        rows.append(torch.as_tensor(prompt, dtype=torch.int64).cpu())
    if not rows or any(row.ndim != 1 or len(row) == 0 for row in rows):
        raise UserError(f"prompts must be one or more rows of at least one id, got {len(rows)} of them")
    return rows


def _end_ids(target: Any) -> list[int]:
    ends = target.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _until_end(ids: Tensor, ends: Iterable[int]) -> Tensor:
    found = torch.isin(ids, torch.tensor(list(ends), dtype=ids.dtype)).nonzero()
    return ids[: int(found[0]) + 1] if len(found) else ids
