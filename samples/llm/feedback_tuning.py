"""Feedback-aware fine-tuning (FAFT, arXiv 2408.06318) against fine-tuning on gold plans alone, at equal steps.

A small model trained from nothing on a reduced sandbox, three days without noise, is the planner: half of the plans
that it saw have a mistake. It samples plans for a few wishes; the rules write of each which of the eight rules of
common sense hold and why not; then it is tuned on reference, wish, feedback and plan, good plans and bad, the gold ones
marked as all success. The other arm is tuned on the gold plans of the same wishes for as many steps. Both are judged on
wishes that they have not seen, FAFT asked with eight times success. Only plans count in the loss, where the study's
counts all.

    python samples/llm/feedback_tuning.py --json feedback.json
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from draftdiff.bench.runner import write_json
from draftdiff.cli import run
from draftdiff.cli.options import Parser, made_folder, new_file, whole
from draftdiff.compare.paired import mean_interval
from draftdiff.files import replacing_folder
from draftdiff.llm import DistillationSet, DraftTrainer, generate_distillation_set
from draftdiff.llm.train.copying import copying_model
from draftdiff.llm.train.data import left_padded
from draftdiff.llm.workloads.base import Case, Score
from draftdiff.llm.workloads.travel.feedback import all_success, feedback
from draftdiff.llm.workloads.travel.generator import LEVELS, World, world
from draftdiff.llm.workloads.travel.mutations import MUTATIONS, mutate
from draftdiff.llm.workloads.travel.plan import NoPlan, parse, written
from draftdiff.llm.workloads.travel.rules import Trip
from draftdiff.llm.workloads.travel.workload import TravelWorkload, reference
from draftdiff.models.devices import device_name, versions

VOCABULARY, CONTEXT, BATCH, PLAN_TOKENS = 768, 1024, 8, 260
END = "<|endoftext|>"
PIECES = r"[A-Za-z_]+|\d|[^A-Za-z_\d]+"  # each digit on its own, so that all numbers are copied alike
JUDGED = ("delivered", "commonsense_micro", "hard_micro", "grounded", "hallucination")


@dataclass(frozen=True)
class Row:
    """A wish and a plan for it. said: what the rules say of the plan, None outside of FAFT."""

    world: World
    plan: str
    said: str | None = None

    @property
    def prompt(self) -> str:
        return asked(self.world, self.said)


def asked(made: World, said: str | None) -> str:
    lines = "" if said is None else f"\nfeedback\n{said}"
    return f"{reference(made.query, made.sandbox)}{lines}\nplan: "


def worlds(name: str, count: int) -> list[World]:
    """Reduced sandboxes: three days, one city, three levels of wishes in turn."""
    return [world(f"faft {name} {number}", 3, LEVELS[number % 3], 0, rows=6, others=0) for number in range(count)]


def flawed(made: World, chance: random.Random) -> str:
    """The gold plan, or one with a mistake."""
    plan = mutate(chance.choice(list(MUTATIONS)), made, chance) if chance.random() < 0.5 else None
    return written(plan or made.gold)


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over sandboxes, feedback and plans."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    chance = random.Random(0)
    texts = []
    for made in worlds("tokenizer", 600):
        plan = mutate(chance.choice(list(MUTATIONS)), made, chance) or made.gold
        texts.append(asked(made, feedback(Trip(made.query, made.sandbox, plan))) + written(plan))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, padding_side="left")


class Study:
    """The planner, its tokenizer, and the two arms."""

    def __init__(self, options: Any) -> None:
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        self.options, self.tokenizer = options, new_tokenizer()
        self.judge = worlds("judge", options.judged)

    def rows(self, rows: Sequence[Row]) -> DistillationSet:
        ids, plans = [], []
        for row in rows:
            before, after = (self.tokenizer(text).input_ids for text in (row.prompt, row.plan))
            ids.append(torch.tensor([*before, *after, 0]))
            plans.append(torch.arange(len(ids[-1])) >= len(before))
        return DistillationSet(ids, plans, distil=False)

    def train(self, model: Any, rows: Sequence[Row], steps: int, rate: float, seed: int = 0) -> None:
        """Steps of the shared trainer on rows as plain text."""
        settings = TrainingArguments(
            output_dir=tempfile.gettempdir(),  # nothing is written there
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(20, steps // 5),
            weight_decay=0.0,
            adam_beta2=0.98,
            save_strategy="no",
            logging_steps=25,
            report_to=[],
            use_cpu=True,
            bf16=True,
            seed=seed,
        )
        DraftTrainer(model, settings, loss="ce", train_dataset=self.rows(rows)).train()

    def planner(self) -> LlamaForCausalLM:
        """The model that both arms begin with; from the work folder if it is there."""
        folder = self.options.work / f"faft_planner_{self.options.planner_steps}"
        if folder.is_dir():
            return LlamaForCausalLM.from_pretrained(folder)
        model = copying_model(128, 3, 256, VOCABULARY, CONTEXT)
        chance = random.Random(1)
        seen = [Row(made, flawed(made, chance)) for made in worlds("planner", BATCH * self.options.planner_steps)]
        self.train(model, seen, self.options.planner_steps, 3e-3)
        with replacing_folder(folder) as partial:
            model.save_pretrained(partial)
        return model

    def sampled(self, model: Any, made: Sequence[World]) -> list[Row]:
        """Plans of the planner at temperature 1 with what the rules say of them, without texts that are no plan."""
        prompts = [asked(one, None) for one in made]
        found = generate_distillation_set(
            model, prompts, temperatures=(1.0,) * self.options.samples, max_new_tokens=PLAN_TOKENS, batch_size=24,
            tokenizer=self.tokenizer,
        )  # fmt: skip
        rows = []
        for one, ids, plan in zip(cycle(made), found.ids, found.written):
            text = self.tokenizer.decode(ids[plan], skip_special_tokens=True)
            try:
                trip = Trip(one.query, one.sandbox, parse(text, 3))
            except NoPlan:
                continue
            rows.append(Row(one, written(trip.plan), feedback(trip)))
        return rows

    def score(self, model: Any, said: str | None) -> list[Score]:
        """Scores of greedy plans for the judge's wishes."""
        model.eval()
        work, scores = TravelWorkload(noise=0), []
        for start in tqdm(range(0, len(self.judge), 24), desc="judge", unit="batch"):
            part = self.judge[start : start + 24]
            ids, mask = left_padded([torch.tensor(self.tokenizer(asked(one, said)).input_ids) for one in part], 0)
            out = model.generate(ids, attention_mask=mask, max_new_tokens=PLAN_TOKENS, do_sample=False)
            texts = self.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            scores += [work.score(Case("", "", one), text) for one, text in zip(part, texts)]
        return scores

    def run(self) -> dict[str, list[Score]]:
        options = self.options
        start = self.planner()
        few = worlds("few", options.wishes)
        samples = self.sampled(start, few)
        gold = [Row(one, written(one.gold)) for one in few]
        marked = [Row(one, written(one.gold), all_success()) for one in few]
        good = sum(row.said == all_success() for row in samples)
        print(f"{len(samples)} of {options.wishes * options.samples} samples are plans, {good} without a mistake")
        scores = {"planner": self.score(start, None)}
        for name, rows, said in (("SFT", gold, None), ("FAFT", samples + marked, all_success())):
            model = LlamaForCausalLM(start.config)
            model.load_state_dict(start.state_dict())
            self.train(model, rows, options.steps, 5e-4)
            scores[name] = self.score(model, said)
        return scores


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="feedback_tuning", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--planner-steps", type=whole(1), default=400, help="from nothing (default 400)")
    parser.add_argument("--steps", type=whole(1), default=120, help="of each arm (default 120)")
    parser.add_argument("--wishes", type=whole(1), default=48, help="that the arms are tuned on (default 48)")
    parser.add_argument("--samples", type=whole(1), default=4, help="plans for each of them (default 4)")
    parser.add_argument("--judged", type=whole(2), default=96, help="unseen wishes (default 96)")
    parser.add_argument("--threads", type=whole(1), default=1, help="CPU threads (default 1)")
    parser.add_argument("--work", type=made_folder, default=".train", help="folder for the planner (default .train)")
    parser.add_argument("--json", type=new_file(".json"), help="file for the figures")
    options = parser.parse_args(argv)
    scores = Study(options).run()
    rows: list[dict[str, Any]] = []
    for metric in JUDGED:
        values = {name: [one[metric] for one in found] for name, found in scores.items()}
        means = {name: mean_interval([v for v in found if v is not None] or [0.0]) for name, found in values.items()}
        pairs = [(a, b) for a, b in zip(values["FAFT"], values["SFT"]) if a is not None and b is not None]
        gain = mean_interval([a - b for a, b in pairs] or [0.0])
        rows.append({"metric": metric, **{name: vars(found) for name, found in means.items()}, "gain": vars(gain)})
        shown = "  ".join(
            f"{name} {found.mean:5.1f} ({found.low:.1f} to {found.high:.1f})" for name, found in means.items()
        )
        print(f"{metric:<18}{shown}  FAFT over SFT {gain}")
    if options.json:
        kept = ("planner_steps", "steps", "wishes", "samples", "judged")
        settings = {name: getattr(options, name) for name in kept}
        where = {"device": device_name(torch.device("cpu")), "versions": versions()}
        write_json(options.json, {"rows": rows, "settings": settings, **where})
        print(json.dumps(settings))


if __name__ == "__main__":
    sys.exit(run(main, "feedback_tuning"))
