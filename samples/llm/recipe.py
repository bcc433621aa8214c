"""What the draft recipes share: the pair, text, stages of training with scores in between, and the closing check."""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, TrainingArguments

from draftdiff.bench.runner import write_json
from draftdiff.cli.options import Parser, new_file, whole
from draftdiff.errors import UserError
from draftdiff.files import new_folder, prepare_folder
from draftdiff.llm import (
    DistillationSet,
    DraftTrainer,
    draft_config,
    evaluate_draft,
    generate_distillation_set,
    packed_text,
)
from draftdiff.llm.checks import check_vocabularies
from draftdiff.llm.train.stdlib_corpus import PYTHON, corpus_texts, def_prompts
from draftdiff.models.devices import device_name, find_device
from draftdiff.models.llm import pretrained
from draftdiff.pipelines.mini.llm import load_mini_llm

WINDOW = 256


def arguments(name: str, doc: str, output: str) -> Parser:
    """The options that all recipes have."""
    parser = Parser(prog=name, description=doc.split("\n\n")[0])
    parser.add_argument("--target", help="hub repository or folder of the target (default: the embedded one)")
    parser.add_argument("--draft", help="hub repository or folder of a draft to start from (default: a new one)")
    parser.add_argument("--params", type=float, default=4e5, help="parameters of a new draft (default 4e5)")
    parser.add_argument("--pretrain-steps", type=whole(0), default=250, help="steps on plain text (default 250)")
    parser.add_argument(
        "--align-steps", type=whole(0), default=150, help="steps on what the target wrote (default 150)"
    )
    parser.add_argument("--prompts", type=whole(1), default=96, help="prompts the target continues (default 96)")
    parser.add_argument("--new-tokens", type=whole(1), default=160, help="tokens of a continuation (default 160)")
    parser.add_argument("--threads", type=whole(1), default=1, help="CPU threads (default 1)")
    parser.add_argument("--json", type=new_file(), help="file for the scores")
    parser.add_argument("-o", "--output", type=Path, default=Path(output), help=f"new folder of the draft ({output})")
    return parser


def check_new_folder(path: Path) -> None:
    """Raise UserError if there is something at `path`, or no folder can be made there."""
    if path.exists():
        raise UserError(f"{path} exists: choose a new folder with -o")
    prepare_folder(path.absolute().parent)


class Recipe:
    """A target, a draft in training and the scores after every stage, on what the target writes after unseen heads."""

    judge: DistillationSet

    def __init__(self, options: argparse.Namespace) -> None:
        check_new_folder(options.output)
        self.prompts = def_prompts(options.prompts, held_out=False)
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        self.options = options
        if options.target is None:
            self.target, _, self.tokenizer = load_mini_llm()
        else:
            self.target = pretrained("AutoModelForCausalLM", options.target)
            self.tokenizer = pretrained("AutoTokenizer", options.target)
        if options.draft is None:
            self.draft = AutoModelForCausalLM.from_config(draft_config(self.target.config, options.params))
        else:
            self.draft = pretrained("AutoModelForCausalLM", options.draft, dtype=torch.float32)
        device = find_device(None)
        self.target.to(device)
        self.draft.to(device)
        check_vocabularies(self.target, self.draft)
        self.scores: dict[str, dict[str, float]] = {}
        self.seconds: dict[str, float] = {}

    @classmethod
    def begin(cls, parser: Parser, argv: list[str] | None) -> Recipe:
        """The recipe of a command line; a mistake in it ends the script before any work."""
        recipe = cls(parser.parse_args(argv))
        recipe.judge = recipe.written(def_prompts(48), (0.0,))
        recipe.score("before")
        return recipe

    def written(self, prompts: list[str], temperatures: tuple[float, ...]) -> DistillationSet:
        """What the target writes after these prompts."""
        tokens = self.options.new_tokens
        return generate_distillation_set(
            self.target,
            prompts,
            temperatures=temperatures,
            max_new_tokens=tokens,
            batch_size=64,
            tokenizer=self.tokenizer,
        )

    def plain_text(self) -> DistillationSet:
        """The training side of the corpus in windows."""
        end = self.tokenizer.eos_token or ""
        rows = self.tokenizer([text + end for text in corpus_texts()], verbose=False).input_ids
        return packed_text(torch.tensor([i for row in rows for i in row]), WINDOW)

    def train(self, stage: str, dataset: Dataset, steps: int, loss: str, rate: float) -> None:
        """One stage of training, then its scores."""
        if steps < 1:
            return
        settings = TrainingArguments(
            output_dir=tempfile.gettempdir(),  # nothing is written there
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(20, steps // 5),
            weight_decay=0.0,
            adam_beta2=0.98,
            save_strategy="no",
            logging_steps=50,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        )
        start = time.perf_counter()
        DraftTrainer(self.draft, settings, target=self.target, loss=loss, train_dataset=dataset).train()
        self.seconds[stage] = round(time.perf_counter() - start, 1)
        self.score(stage)

    def score(self, stage: str) -> None:
        scores = evaluate_draft(self.target, self.draft, self.judge)
        self.scores[stage] = {name: round(value, 4) for name, value in asdict(scores).items()}
        print(
            f"{stage}: acceptance {scores.acceptance:.3f} at temperature 1, {scores.agreement:.3f} greedily, "
            f"{scores.block_efficiency:.2f} tokens per target forward with chains of {scores.length}"
        )

    def finish(self) -> None:
        """Save the draft as a plain model with its tokenizer, load it again and let it assist the target."""
        output = self.options.output
        with new_folder(output) as partial:
            self.draft.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)
        assistant = AutoModelForCausalLM.from_pretrained(output).to(self.target.device)
        for prompt in def_prompts(4):
            inputs = self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(self.target.device)
            plain, assisted = (
                self.target.generate(**inputs, max_new_tokens=64, do_sample=False, **extra)
                for extra in ({}, {"assistant_model": assistant})
            )
            if not torch.equal(plain, assisted):
                raise SystemExit(f"with the draft as assistant the target said something else after {prompt!r}")
        print(f"{output}: a plain Hugging Face model; as assistant_model= it leaves the target's greedy text as it is")
        if self.options.json:
            result: dict[str, Any] = {
                "scores": self.scores,
                "seconds": self.seconds,
                "draft_parameters": self.draft.num_parameters(),
                "target_parameters": self.target.num_parameters(),
                "settings": {
                    name: str(value) if isinstance(value, Path) else value
                    for name, value in vars(self.options).items()
                    if name not in ("json", "output")
                },
                "device": device_name(self.target.device),
                "python": PYTHON,
            }
            write_json(self.options.json, result)
