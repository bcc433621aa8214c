"""Train the drawing pair that ships with draftdiff, from nothing, on one CPU core.

Target and draft learn to answer the compact prompts of the drawing-revision workload (draftdiff.llm.workloads.drawing):
what an instruction names is copied into tool calls. Only answers count in the loss. The draft begins with heads that
copy, the target as the draft with more layers, which do nothing at first. Every phase trains for a number of minutes,
saves a checkpoint once a minute and when interrupted, and resumes from it:

    python samples/training/train_mini_drawing.py tokenizer
    python samples/training/train_mini_drawing.py draft --minutes 31
    python samples/training/train_mini_drawing.py target --minutes 8
    python samples/training/train_mini_drawing.py export
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from loop import Optimizer, Phase, existing, parser, spent, write_settings
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from draftdiff.cli import run
from draftdiff.files import replacing, replacing_folder
from draftdiff.llm import evaluate_draft, generate_distillation_set
from draftdiff.llm.train.copying import copying_model
from draftdiff.llm.train.data import left_padded
from draftdiff.llm.train.trim import count_tokens
from draftdiff.llm.workloads.base import Case
from draftdiff.llm.workloads.drawing.workload import DrawingWorkload
from draftdiff.pipelines.mini.llm import DRAWING_WEIGHTS, load_mini_llm

VOCABULARY, CONTEXT, BATCH = 776, 512, 16
END = "<|endoftext|>"
# Words without the space before them, and each digit on its own: what is copied is the same token wherever it stands.
PIECES = r"[A-Za-z_]+|\d|[^A-Za-z_\d]+"
SIZES: dict[str, dict[str, int]] = {
    "draft": {"width": 64, "layers": 2, "mlp": 128},
    "target": {"width": 64, "layers": 4, "mlp": 128},
}
RATES = {"draft": (3e-3, 0.02), "target": (2e-3, 0.01)}  # at their peak, of Adam and Muon
TRAINING, HELD_OUT = 1_000_000, 999_999  # seeds of cases; smaller ones are for comparisons
LENGTH = 5  # of the draft's chains
WRITTEN, JUDGED, ANSWER = 24, 48, 256  # cases whose tokens are counted, cases of the scores, tokens of an answer


def new_model(kind: str) -> LlamaForCausalLM:
    """A target or a draft in fp32."""
    return copying_model(**SIZES[kind], vocabulary=VOCABULARY, context=CONTEXT)


def train_tokenizer(file: Path, texts: int = 6000) -> None:
    """Byte-level BPE over prompts and answers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    cases = DrawingWorkload(compact=True).cases(TRAINING - 2, texts)
    tokenizer.train_from_iterator((case.prompt + case.gold for case in cases), trainer)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        tokenizer.save(str(partial))


def load_tokenizer(work: Path) -> PreTrainedTokenizerFast:
    file = existing(work / "drawing_tokenizer.json", "tokenizer")
    return PreTrainedTokenizerFast(
        tokenizer_file=str(file), eos_token=END, pad_token=END, model_max_length=CONTEXT, padding_side="left"
    )


class Rows:
    """Cases as padded rows of ids, of like lengths in a batch."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.ready: list[tuple[Tensor, Tensor]] = []

    def batch(self) -> tuple[Tensor, Tensor]:
        """Ids int64 [batch, tokens], padded on the right, and bool of the same shape: what belongs to answers."""
        if not self.ready:
            rows = sorted(
                map(self._row, DrawingWorkload(compact=True).cases(self.seed, 16 * BATCH)), key=lambda r: len(r[0])
            )
            self.seed += 1
            for start in torch.randperm(16).tolist():
                part = rows[start * BATCH : (start + 1) * BATCH]
                ids, answers = ([row[i] for row in part] for i in range(2))
                pad = torch.nn.utils.rnn.pad_sequence
                self.ready.append((pad(ids, batch_first=True), pad(answers, batch_first=True)))
        return self.ready.pop()

    def _row(self, case: Case) -> tuple[Tensor, Tensor]:
        prompt, gold = (self.tokenizer(text).input_ids for text in (case.prompt, case.gold))
        ids = torch.tensor([*prompt, *gold, 0])
        return ids, torch.arange(len(ids)) >= len(prompt)


@torch.no_grad()
def grow(model: LlamaForCausalLM, smaller: LlamaForCausalLM) -> None:
    """Make a deeper model say what a smaller one says: its layers first, then new ones that add nothing yet."""
    model.load_state_dict(smaller.state_dict(), strict=False)
    for layer in model.model.layers[len(smaller.model.layers) :]:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()


class Pretraining(Phase):
    """A model on gold answers."""

    def __init__(self, kind: str, work: Path) -> None:
        torch.manual_seed(0)
        model = new_model(kind)
        if kind == "target":
            grow(model, trained("draft", work))
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        adam, muon = RATES[kind]
        optimizer = Optimizer(model.parameters(), adam, matrices, muon)
        super().__init__(work / f"drawing_{kind}.pt", model, optimizer, average=True)
        self.rows = Rows(load_tokenizer(work), TRAINING + 10_000 * list(SIZES).index(kind) + self.step)

    def train_step(self, part: float) -> str:
        ids, answers = self.rows.batch()
        counted = answers[:, 1:]
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(ids[:, :-1]).logits
        guessed = logits.float()[counted]
        loss = F.cross_entropy(guessed, ids[:, 1:][counted])
        self.descend(loss)
        right = (guessed.argmax(-1) == ids[:, 1:][counted]).float().mean().item()
        return f"loss={self.smoothed(loss.item()):.4f} right={right:.3f}"


def trained(kind: str, work: Path) -> LlamaForCausalLM:
    """The averaged model of a work folder, frozen."""
    model = new_model(kind)
    model.load_state_dict(torch.load(existing(work / f"drawing_{kind}.pt", kind))["average"])
    return model.requires_grad_(False).eval()


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: list[str], batch: int = 48) -> list[str]:
    """Greedy answers."""
    found = []
    for start in range(0, len(prompts), batch):
        rows = [torch.tensor(tokenizer(prompt).input_ids) for prompt in prompts[start : start + batch]]
        ids, mask = left_padded(rows, 0)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=ANSWER, do_sample=False)
        found += tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return found


def held_out_summary(model: Any, tokenizer: Any, n: int) -> dict[str, float]:
    """Scores of a model's greedy answers to unseen cases."""
    work = DrawingWorkload(compact=True)
    cases = work.cases(HELD_OUT, n)
    said = answers(model, tokenizer, [case.prompt for case in cases])
    scores = [work.score(case, text) for case, text in zip(cases, said)]
    exact = sum(one["score"] == 100 for one in scores) / n
    return {name: round(value, 2) for name, value in work.summary(cases, scores).items()} | {"exact": round(exact, 4)}


def export(work: Path, folder: Path) -> None:
    """Save the pair in half precision with its tokenizer and settings, whole or not at all."""
    target, draft, tokenizer = trained("target", work), trained("draft", work), load_tokenizer(work)
    with replacing_folder(folder) as new:
        tokenizer.save_pretrained(new / "tokenizer")
        for name, model in (("target", target), ("draft", draft)):
            model.half().save_pretrained(new / name)
            model.float()  # what is scored is what is loaded
        prompts = [case.prompt for case in DrawingWorkload(compact=True).cases(HELD_OUT - 1, WRITTEN)]
        written = generate_distillation_set(
            target, prompts, temperatures=(0.0,), max_new_tokens=ANSWER, batch_size=48, tokenizer=tokenizer
        )
        scores = evaluate_draft(target, draft, written, length=LENGTH)
        settings = {
            "about": "A mini pair that answers the compact prompts of the drawing-revision workload.",
            "prompt": prompts[0],
            "length": LENGTH,
            "held_out": {name: round(value, 4) for name, value in asdict(scores).items()},
            "workload": {
                "target": held_out_summary(target, tokenizer, JUDGED),
                "draft": held_out_summary(draft, tokenizer, JUDGED),
            },
            "training": {kind: spent(work / f"drawing_{kind}.pt") for kind in SIZES},
        }
        write_settings(new, settings, long={"token_counts": count_tokens(written, VOCABULARY).tolist()})
    print(json.dumps({name: settings[name] for name in ("held_out", "workload", "training")}))


def main() -> None:
    options = parser(__doc__, ["tokenizer", *SIZES], minutes=60, threads=1)
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    work = arguments.work
    try:
        if arguments.phase == "tokenizer":
            train_tokenizer(work / "drawing_tokenizer.json")
        elif arguments.phase == "export":
            export(work, DRAWING_WEIGHTS)
            load_mini_llm(folder=DRAWING_WEIGHTS)
        else:
            Pretraining(arguments.phase, work).run(arguments.minutes)
            print(json.dumps(held_out_summary(trained(arguments.phase, work), load_tokenizer(work), 24)))
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; the same command carries on from {work}") from None


if __name__ == "__main__":
    sys.exit(run(main, "train_mini_drawing"))
