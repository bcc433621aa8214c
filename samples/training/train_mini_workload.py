"""Train the pair of a workload that ships with draftdiff, from nothing, on one CPU core.

Target and draft learn to answer a workload's compact prompts (draftdiff.llm.workloads): what an instruction names is
copied into tool calls, what tables list into plans. Only answers count in the loss. The draft begins with heads that
copy, the target as the draft with more layers, which do nothing at first. Every phase trains for a number of minutes,
saves a checkpoint once a minute and when interrupted, and resumes from it:

    python samples/training/train_mini_workload.py tokenizer --workload travel
    python samples/training/train_mini_workload.py draft --workload travel --minutes 50
    python samples/training/train_mini_workload.py target --workload travel --minutes 15
    python samples/training/train_mini_workload.py export --workload travel
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
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
from draftdiff.llm.workloads.base import Case, Workload
from draftdiff.llm.workloads.named import WORKLOADS, named_workload
from draftdiff.pipelines.mini.llm import WORKLOAD_WEIGHTS, load_mini_llm

END = "<|endoftext|>"
# Words without the space before them, and each digit on its own: what is copied is the same token wherever it stands.
PIECES = r"[A-Za-z_]+|\d|[^A-Za-z_\d]+"
KINDS = ("draft", "target")
RATES = {"draft": (3e-3, 0.02), "target": (2e-3, 0.01)}  # at their peak, of Adam and Muon
TRAINING, HELD_OUT = 1_000_000, 999_999  # seeds of cases; smaller ones are for comparisons
LENGTH = 5  # of the draft's chains
WRITTEN, JUDGED = 24, 48  # cases whose tokens are counted, cases of the scores


@dataclass(frozen=True)
class Pair:
    """A workload and the shapes of its models. layers: of the draft and of the target.  batch: cases of a step.
    about: what the pair is."""

    name: str
    about: str
    vocabulary: int
    context: int
    batch: int
    width: int
    mlp: int
    layers: tuple[int, int]

    @property
    def workload(self) -> Workload:
        return named_workload(self.name, compact=True)

    def new_model(self, kind: str) -> LlamaForCausalLM:
        """A target or a draft in fp32."""
        return copying_model(self.width, self.layers[KINDS.index(kind)], self.mlp, self.vocabulary, self.context)

    def file(self, work: Path, what: str) -> Path:
        """Where a work folder has a model's checkpoint, or the tokenizer."""
        return work / f"{self.name}_{what}"


PAIRS = {
    "drawing": Pair(
        "drawing", "answers the compact prompts of the drawing-revision workload", 776, 512, 16, 64, 128, (2, 4)
    ),
    "travel": Pair(
        "travel", "answers the compact prompts of the travel-planning workload", 776, 1024, 12, 128, 192, (2, 3)
    ),
}


def train_tokenizer(pair: Pair, work: Path, texts: int = 6000) -> None:
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
        vocab_size=pair.vocabulary, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    cases = pair.workload.cases(TRAINING - 2, texts)
    tokenizer.train_from_iterator((case.prompt + case.gold for case in cases), trainer)
    work.mkdir(parents=True, exist_ok=True)
    with replacing(pair.file(work, "tokenizer.json")) as partial:
        tokenizer.save(str(partial))


def load_tokenizer(pair: Pair, work: Path) -> PreTrainedTokenizerFast:
    file = existing(pair.file(work, "tokenizer.json"), "tokenizer")
    return PreTrainedTokenizerFast(
        tokenizer_file=str(file), eos_token=END, pad_token=END, model_max_length=pair.context, padding_side="left"
    )


class Rows:
    """Cases as padded rows of ids, of like lengths in a batch."""

    def __init__(self, pair: Pair, tokenizer: Any, seed: int) -> None:
        self.pair, self.tokenizer, self.seed = pair, tokenizer, seed
        self.ready: list[tuple[Tensor, Tensor]] = []

    def batch(self) -> tuple[Tensor, Tensor]:
        """Ids int64 [batch, tokens], padded on the right, and bool of the same shape: what belongs to answers."""
        if not self.ready:
            batch = self.pair.batch
            cases = self.pair.workload.cases(self.seed, 16 * batch)
            rows = sorted(map(self._row, cases), key=lambda row: len(row[0]))
            self.seed += 1
            for start in torch.randperm(16).tolist():
                part = rows[start * batch : (start + 1) * batch]
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

    def __init__(self, pair: Pair, kind: str, work: Path) -> None:
        torch.manual_seed(0)
        model = pair.new_model(kind)
        if kind == "target":
            grow(model, trained(pair, "draft", work))
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        adam, muon = RATES[kind]
        optimizer = Optimizer(model.parameters(), adam, matrices, muon)
        super().__init__(pair.file(work, f"{kind}.pt"), model, optimizer, average=True)
        self.rows = Rows(pair, load_tokenizer(pair, work), TRAINING + 10_000 * KINDS.index(kind) + self.step)

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


def trained(pair: Pair, kind: str, work: Path) -> LlamaForCausalLM:
    """The averaged model of a work folder, frozen."""
    model = pair.new_model(kind)
    model.load_state_dict(torch.load(existing(pair.file(work, f"{kind}.pt"), kind))["average"])
    return model.requires_grad_(False).eval()


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: list[str], tokens: int, batch: int = 48) -> list[str]:
    """Greedy answers."""
    found = []
    for start in range(0, len(prompts), batch):
        rows = [torch.tensor(tokenizer(prompt).input_ids) for prompt in prompts[start : start + batch]]
        ids, mask = left_padded(rows, 0)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
        found += tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return found


def held_out_summary(pair: Pair, model: Any, tokenizer: Any, n: int) -> dict[str, float]:
    """Scores of a model's greedy answers to unseen cases; exact: the share with all points."""
    work = pair.workload
    cases = work.cases(HELD_OUT, n)
    said = answers(model, tokenizer, [case.prompt for case in cases], work.tokens)
    scores = [work.score(case, text) for case, text in zip(cases, said)]
    headline = sum(one[work.headline] or 0.0 for one in scores) / n
    exact = sum(one[work.headline] == 100 for one in scores) / n
    found = {work.headline: headline, **work.summary(cases, scores)}
    return {name: round(value, 2) for name, value in found.items()} | {"exact": round(exact, 4)}


def export(pair: Pair, work: Path, folder: Path) -> None:
    """Save the pair in half precision with its tokenizer and settings, whole or not at all."""
    tokenizer = load_tokenizer(pair, work)
    models = {kind: trained(pair, kind, work) for kind in KINDS}
    with replacing_folder(folder) as new:
        tokenizer.save_pretrained(new / "tokenizer")
        for kind, model in models.items():
            model.half().save_pretrained(new / kind)
            model.float()  # what is scored is what is loaded
        prompts = [case.prompt for case in pair.workload.cases(HELD_OUT - 1, WRITTEN)]
        written = generate_distillation_set(
            models["target"],
            prompts,
            temperatures=(0.0,),
            max_new_tokens=pair.workload.tokens,
            batch_size=48,
            tokenizer=tokenizer,
        )
        scores = evaluate_draft(models["target"], models["draft"], written, length=LENGTH)
        settings = {
            "about": f"A mini pair that {pair.about}.",
            "prompt": prompts[0],
            "length": LENGTH,
            "held_out": {name: round(value, 4) for name, value in asdict(scores).items()},
            "workload": {kind: held_out_summary(pair, model, tokenizer, JUDGED) for kind, model in models.items()},
            "training": {kind: spent(pair.file(work, f"{kind}.pt")) for kind in KINDS},
        }
        write_settings(new, settings, long={"token_counts": count_tokens(written, pair.vocabulary).tolist()})
    print(json.dumps({name: settings[name] for name in ("held_out", "workload", "training")}))


def main() -> None:
    options = parser(__doc__, ["tokenizer", *KINDS], minutes=60, threads=1)
    options.add_argument("--workload", choices=WORKLOADS, required=True, help="whose pair")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    work, pair = arguments.work, PAIRS[arguments.workload]
    try:
        if arguments.phase == "tokenizer":
            train_tokenizer(pair, work)
        elif arguments.phase == "export":
            export(pair, work, WORKLOAD_WEIGHTS[pair.name])
            load_mini_llm(folder=WORKLOAD_WEIGHTS[pair.name])
        else:
            Pretraining(pair, arguments.phase, work).run(arguments.minutes)
            model = trained(pair, arguments.phase, work)
            print(json.dumps(held_out_summary(pair, model, load_tokenizer(pair, work), 24)))
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; the same command carries on from {work}") from None


if __name__ == "__main__":
    sys.exit(run(main, "train_mini_workload"))
