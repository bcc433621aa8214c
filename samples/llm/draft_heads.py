"""Heads for a target, trained on its own law: Hydra (arXiv 2402.05109), Medusa (2401.10774), LongSpec (2502.17421) or
Falcon (2412.12639).

The target runs over the Python standard library and over what it has written itself; its states are what the heads
read, its law is what they learn. Then, for Hydra and Medusa, a tree is grown from what they were right about. With the
embedded target it takes half an hour on one core; the same command carries on where a killed one has stopped:

    python samples/llm/draft_heads.py --kind hydra --heads 3 --rank 48 -o my-heads

The folder, in half precision, is for `draftdiff.llm.HydraDrafter.from_pretrained` or that of another kind.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from recipe import check_new_folder
from torch import Tensor
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from draftdiff.bench.runner import write_json
from draftdiff.cli import run
from draftdiff.cli.options import Parser, new_file, whole
from draftdiff.llm import (
    AnchorOffset,
    DistillationSet,
    FalconDrafter,
    FalconTrainer,
    HeadsTrainer,
    HydraDrafter,
    LongSpecDrafter,
    LongSpecTrainer,
    MedusaDrafter,
    StaticTree,
    generate_distillation_set,
    mix_in_text,
    packed_text,
    rank_acceptance,
    report,
    speculative,
)
from draftdiff.llm.train.stdlib_corpus import PYTHON, corpus_texts, def_prompts
from draftdiff.models.devices import device_name, find_device
from draftdiff.models.llm import pretrained
from draftdiff.pipelines.mini.llm import load_mini_llm

WINDOW = 256
TEXT_SHARE = 0.85  # of the rows, beside what the target wrote
KINDS: dict[str, Any] = {
    "hydra": HydraDrafter,
    "medusa": MedusaDrafter,
    "longspec": LongSpecDrafter,
    "falcon": FalconDrafter,
}
RANKED = ("hydra", "medusa")  # whose trees are grown from what is right by rank


def arguments() -> Parser:
    parser = Parser(prog="draft_heads", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--target", help="hub repository or folder of the target (default: the embedded one)")
    parser.add_argument("--kind", choices=KINDS, default="hydra", help="of heads (default hydra)")
    parser.add_argument("--heads", type=whole(1), default=4, help="tokens that are guessed (default 4)")
    parser.add_argument("--k", type=whole(1), default=2, help="tokens of a pass of Falcon's (default 2)")
    parser.add_argument("--layers", type=whole(1), default=1, help="blocks of a head (default 1; Hydra++ has 4)")
    parser.add_argument("--prefix", action="store_true", help="Hydra++: attention over the states before")
    parser.add_argument("--rank", type=whole(1), help="of what a Hydra head's first block learns (default: full)")
    parser.add_argument("--own-output", action="store_true", help="an output layer for each head, not the target's")
    parser.add_argument("--nodes", type=whole(1), default=16, help="nodes of the tree (default 16)")
    parser.add_argument("--steps", type=whole(1), default=1000, help="training steps (default 1000)")
    parser.add_argument("--batch", type=whole(1), default=16, help="rows of a step (default 16)")
    parser.add_argument("--prompts", type=whole(1), default=192, help="prompts the target continues (default 192)")
    parser.add_argument("--new-tokens", type=whole(1), default=160, help="tokens of a continuation (default 160)")
    parser.add_argument("--threads", type=whole(1), default=1, help="CPU threads (default 1)")
    parser.add_argument("--work", type=Path, default=Path("heads-work"), help="folder to carry on from (heads-work)")
    parser.add_argument("--json", type=new_file(), help="file for the scores")
    parser.add_argument("-o", "--output", type=Path, default=Path("draft-heads"), help="new folder (draft-heads)")
    return parser


@dataclass
class Texts:
    """What the target writes after function heads: written, to learn from; judge, greedily after unseen ones. And all
    of the corpus's training side."""

    written: DistillationSet
    judge: DistillationSet
    text: DistillationSet


def load_texts(target: Any, tokenizer: Any, prompts: list[str], options: argparse.Namespace) -> Texts:
    """Those of the work folder, which are written once."""
    options.work.mkdir(parents=True, exist_ok=True)

    def written(name: str, prompts: list[str], temperatures: tuple[float, ...]) -> DistillationSet:
        file = options.work / f"{name}.safetensors"
        if not file.exists():
            generate_distillation_set(
                target,
                prompts,
                temperatures=temperatures,
                max_new_tokens=options.new_tokens,
                batch_size=64,
                tokenizer=tokenizer,
            ).save(file)
        return DistillationSet.load(file)

    end = tokenizer.eos_token or ""
    rows = tokenizer([text + end for text in corpus_texts()], verbose=False).input_ids
    return Texts(
        written("written", prompts, (0.0, 0.6, 1.0)),
        written("judge", def_prompts(48), (0.0,)),
        packed_text(torch.tensor([i for row in rows for i in row]), WINDOW, distil=True),
    )


def train(drafter: Any, target: Any, texts: Texts, options: argparse.Namespace, glancing: str = "code") -> None:
    """All steps, from the last checkpoint of the work folder on. glancing: of Falcon's."""
    folder = options.work / (options.kind if glancing == "code" else f"{options.kind}-{glancing}")
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, options.steps // 5),
        weight_decay=0.0,
        adam_beta2=0.98,
        save_steps=50,
        save_total_limit=1,
        logging_steps=50,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        bf16=True,
    )
    rows = mix_in_text(texts.written, texts.text, TEXT_SHARE)
    given: dict[str, Any] = {"target": target, "train_dataset": rows}
    if options.kind == "longspec":
        reach = target.config.get_text_config().max_position_embeddings
        trainer = LongSpecTrainer(drafter.head, settings, loss="kl", data_collator=AnchorOffset(reach), **given)
    elif options.kind == "falcon":
        trainer = FalconTrainer(drafter.head, settings, glancing=glancing, **given)
    else:
        trainer = HeadsTrainer(drafter.heads, settings, loss="kl", **given)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.exists() else None)


def score(drafter: Any, target: Any, texts: Texts, tokenizer: Any, tokens: int) -> dict[str, Any]:
    """What the heads' trees gain on unseen text of the target's, which must be its own, and how often they are right
    there: each of Hydra's and Medusa's heads, else the drafts at each depth of the last text."""
    written = forwards = 0
    for prompt in def_prompts(8):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(target.device)
        given = {**inputs, "max_new_tokens": tokens, "do_sample": False}
        plain = target.generate(**given)
        # Every draft at its whole length, or the acceptance would depend on what the clock says.
        drafted = target.generate(**given, custom_generate=speculative, drafter=drafter, pace=None)
        if not torch.equal(drafted, plain):
            raise SystemExit(f"with these heads the target said something else after {prompt!r}")
        done = report(drafter)
        written, forwards = written + done.tokens, forwards + done.target_forwards
    if isinstance(drafter, HydraDrafter | MedusaDrafter):
        acceptance = rounded(rank_acceptance(drafter.heads, target, texts.judge, ranks=1)[:, 0])
    else:
        acceptance = [round(share, 4) for share in done.acceptance]
    return {"acceptance": acceptance, "tokens_per_forward": round(written / forwards, 4)}


def rounded(numbers: Tensor) -> list[float]:
    return [round(float(number), 4) for number in numbers]


def main(argv: list[str] | None = None) -> None:
    options = arguments().parse_args(argv)
    check_new_folder(options.output)
    prompts = def_prompts(options.prompts, held_out=False)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.target is None:
        target, _, tokenizer = load_mini_llm()
    else:
        target = pretrained("AutoModelForCausalLM", options.target)
        tokenizer = pretrained("AutoTokenizer", options.target)
    target.to(find_device(None))
    given: dict[str, Any] = {}
    if options.kind in RANKED:
        given = {"heads": options.heads, "layers": options.layers, "own_output": options.own_output}
    if options.kind == "falcon":
        given = {"k": options.k}
    if options.kind == "hydra":
        given |= {"prefix": options.prefix, "rank": options.rank}
    drafter = KINDS[options.kind].from_target(target, **given)
    texts = load_texts(target, tokenizer, prompts, options)
    train(drafter, target, texts, options)
    heads = drafter.heads if options.kind in RANKED else drafter.head
    heads.eval().half().float()  # what is scored is what is stored
    if options.kind in RANKED:
        tree = StaticTree.learned(rank_acceptance(heads, target, texts.written), options.nodes)
        drafter = KINDS[options.kind](heads, tree)
    scores = score(drafter, target, texts, tokenizer, options.new_tokens)
    heads.half()
    drafter.save_pretrained(options.output)
    parameters = sum(p.numel() for p in heads.parameters())
    print(
        f"{options.output}: {parameters:,} parameters, right {scores['acceptance']}, "
        f"{scores['tokens_per_forward']:.2f} tokens per target forward"
    )
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "output", "work")}
        where = {"device": device_name(target.device), "python": PYTHON}
        write_json(options.json, {**scores, "parameters": parameters, "settings": settings, **where})


if __name__ == "__main__":
    sys.exit(run(main, "draft_heads"))
