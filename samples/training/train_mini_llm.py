"""Train the mini language-model pair that ships with draftdiff, from nothing, on one CPU core.

Target and draft learn to continue the Python standard library's sources: a deep, narrow Llama with grouped queries, and
a draft of one layer. The draft is first trained on the text, then aligned with the target on text that the target
wrote, by the library's own `DraftTrainer`. Target and draft train for a number of minutes rather than steps, save a
checkpoint once a minute and when interrupted, and resume from it; the alignment resumes from the Trainer's checkpoints:

    python samples/training/train_mini_llm.py tokenizer
    python samples/training/train_mini_llm.py target --minutes 60
    python samples/training/train_mini_llm.py draft --minutes 9
    python samples/training/train_mini_llm.py align --steps 850
    python samples/training/train_mini_llm.py export

Its heads are trained for the exported target, and then added to the pair:

    python samples/llm/draft_heads.py --kind hydra --heads 3 --rank 48 --steps 600 -o .train/llm_hydra
    python samples/llm/draft_heads.py --kind medusa --heads 3 --steps 600 -o .train/llm_medusa
    python samples/llm/draft_heads.py --kind longspec --steps 350 -o .train/llm_longspec
    python samples/llm/draft_heads.py --kind falcon --k 2 --steps 350 -o .train/llm_falcon
    python samples/training/train_mini_llm.py heads
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from loop import Optimizer, Phase, existing, parser, spent, write_settings
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from draftdiff.cli import run
from draftdiff.files import replacing, replacing_folder
from draftdiff.llm import (
    DistillationSet,
    DraftScores,
    DraftTrainer,
    evaluate_draft,
    generate_distillation_set,
    mix_in_text,
    packed_text,
)
from draftdiff.llm.train.stdlib_corpus import PYTHON, corpus_texts, def_prompts
from draftdiff.llm.train.trim import count_tokens
from draftdiff.pipelines.mini.llm import HEADS, WEIGHTS, load_mini_heads, load_mini_llm, mini_llm_defaults

VOCABULARY, CONTEXT, BATCH = 2048, 512, 8
END = "<|endoftext|>"
# Line breaks with the indent that follows, words, numbers, signs: indented code in few tokens.
PIECES = r"\n+ *| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
SIZES: dict[str, dict[str, int]] = {
    "target": {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2},
    "draft": {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2},
}
# Of the alignment: prompts, each continued at four temperatures; share of corpus text beside them; loss; learning rate.
WRITTEN, TEXT_SHARE, ALIGN_LOSS, ALIGN_RATE = 256, 0.85, "lk", 1.5e-3
LENGTH = 4  # of the draft's chains


def new_model(kind: str) -> LlamaForCausalLM:
    """A target or a draft in fp32."""
    config = LlamaConfig(
        **SIZES[kind],
        vocab_size=VOCABULARY,
        intermediate_size=384,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def train_tokenizer(file: Path) -> None:
    """Byte-level BPE over the training side of the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(corpus_texts(), trainer)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        tokenizer.save(str(partial))


def load_tokenizer(work: Path) -> PreTrainedTokenizerFast:
    file = existing(work / "llm_tokenizer.json", "tokenizer")
    return PreTrainedTokenizerFast(
        tokenizer_file=str(file), eos_token=END, pad_token=END, model_max_length=CONTEXT, padding_side="left"
    )


def corpus_tokens(work: Path, held_out: bool = False) -> Tensor:
    """One side of the corpus as one row of ids int64 [tokens], each file closed by the end token."""
    tokenizer = Tokenizer.from_file(str(existing(work / "llm_tokenizer.json", "tokenizer")))
    ids = [i for text in corpus_texts(held_out) for i in (*tokenizer.encode(text).ids, 0)]
    return torch.tensor(ids)


class Pretraining(Phase):
    """A model on packed windows of the corpus."""

    def __init__(self, kind: str, work: Path) -> None:
        torch.manual_seed(0)
        model = new_model(kind)
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        super().__init__(work / f"llm_{kind}.pt", model, Optimizer(model.parameters(), 3e-3, matrices))
        self.tokens = corpus_tokens(work)

    def train_step(self, part: float) -> str:
        starts = torch.randint(len(self.tokens) - CONTEXT, (BATCH,))
        windows = self.tokens[starts[:, None] + torch.arange(CONTEXT + 1)]
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(windows[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
        self.descend(loss)
        return f"cross-entropy={self.smoothed(loss.item()):.4f}"


def trained(kind: str, work: Path) -> LlamaForCausalLM:
    """A model of a work folder as its phase has left it, frozen."""
    model = new_model(kind)
    model.load_state_dict(torch.load(existing(work / f"llm_{kind}.pt", kind))["model"])
    return model.requires_grad_(False).eval()


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: Tensor, windows: int = 32) -> float:
    """Nats per token over windows spread evenly over held-out text."""
    starts = torch.linspace(0, len(tokens) - CONTEXT - 1, windows).long()
    batch = tokens[starts[:, None] + torch.arange(CONTEXT + 1)]
    losses = [
        F.cross_entropy(model(part[:, :-1]).logits.flatten(0, 1), part[:, 1:].flatten()) for part in batch.split(8)
    ]
    return torch.stack(losses).mean().item()


def alignment_prompts(tokens: Tensor, count: int, seed: int = 0) -> list[Tensor]:
    """Beginnings for the target to go on from: pieces of 16 to 96 tokens from anywhere in the text."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - 96, (count,), generator=generator).tolist()
    lengths = torch.randint(16, 97, (count,), generator=generator).tolist()
    return [tokens[start : start + length] for start, length in zip(starts, lengths)]


def align(work: Path, steps: int) -> None:
    """Bring the draft closer to the target, on what the target wrote and on the corpus itself."""
    target, draft, tokens = trained("target", work), trained("draft", work), corpus_tokens(work)
    file = work / "llm_written.safetensors"
    if not file.exists():
        generate_distillation_set(target, alignment_prompts(tokens, WRITTEN), max_new_tokens=192, batch_size=64).save(
            file
        )
    written = DistillationSet.load(file)
    text = packed_text(tokens, 256, distil=True)
    arguments = TrainingArguments(
        output_dir=str(work / "llm_align"),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=ALIGN_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        weight_decay=0.0,
        adam_beta2=0.98,
        save_steps=50,
        save_total_limit=1,
        logging_steps=50,
        report_to=[],
        use_cpu=True,
        bf16=True,
    )
    trainer = DraftTrainer(
        draft.requires_grad_(True),
        arguments,
        target=target,
        loss=ALIGN_LOSS,
        train_dataset=mix_in_text(written, text, TEXT_SHARE),
    )
    trainer.train(
        resume_from_checkpoint=get_last_checkpoint(arguments.output_dir) if (work / "llm_align").exists() else None
    )
    trainer.save_model(str(work / "llm_aligned"))


def held_out_scores(target: LlamaForCausalLM, draft: LlamaForCausalLM, tokenizer: Any) -> DraftScores:
    """The draft against what the target writes greedily after function heads that neither has seen."""
    written = generate_distillation_set(
        target, def_prompts(64), temperatures=(0.0,), max_new_tokens=128, batch_size=64, tokenizer=tokenizer
    )
    return evaluate_draft(target, draft, written, length=LENGTH)


def export(work: Path, folder: Path) -> None:
    """Save the pair in half precision with its tokenizer and settings, whole or not at all."""
    target = trained("target", work)
    draft = LlamaForCausalLM.from_pretrained(existing(work / "llm_aligned", "align"), dtype=torch.float32)
    tokenizer = load_tokenizer(work)
    with replacing_folder(folder) as new:
        tokenizer.save_pretrained(new / "tokenizer")
        for name, model in (("target", target), ("draft", draft)):
            model.half().save_pretrained(new / name)
            model.float()  # what is scored is what is loaded
        scores = held_out_scores(target, draft, tokenizer)
        training = {}
        for kind in SIZES:
            loss = held_out_loss(trained(kind, work), corpus_tokens(work, held_out=True))
            training[kind] = spent(work / f"llm_{kind}.pt") | {"held_out_cross_entropy": round(loss, 4)}
        settings = {
            "about": "A mini language-model pair for draftdiff, trained on the Python standard library's sources.",
            "prompt": "def read_lines(path):",
            "length": LENGTH,
            "held_out": {name: round(value, 4) for name, value in asdict(scores).items()},
            "training": training,
            "python": PYTHON,
        }
        written = DistillationSet.load(work / "llm_written.safetensors")
        write_settings(new, settings, long={"token_counts": count_tokens(written, VOCABULARY).tolist()})
    print(json.dumps(settings["held_out"]), json.dumps(training))


def add_heads(work: Path, folder: Path) -> None:
    """Put the heads of a work folder beside the pair that they were trained for, whole or not at all."""
    settings = mini_llm_defaults(folder)
    counts = settings.pop("token_counts")
    del settings["sha256"]
    with replacing_folder(folder) as new:
        shutil.copytree(folder, new, dirs_exist_ok=True)
        for kind in HEADS:
            shutil.copytree(existing(work / f"llm_{kind}", "heads"), new / kind, dirs_exist_ok=True)
        write_settings(new, settings, long={"token_counts": counts})


def main() -> None:
    options = parser(__doc__, ["tokenizer", *SIZES, "align", "heads"], minutes=9, threads=1)
    options.add_argument("--steps", type=int, default=850, help="how many steps the alignment takes (default 850)")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    work = arguments.work
    try:
        if arguments.phase == "tokenizer":
            train_tokenizer(work / "llm_tokenizer.json")
        elif arguments.phase == "align":
            align(work, arguments.steps)
        elif arguments.phase == "export":
            export(work, WEIGHTS)
            load_mini_llm()
        elif arguments.phase == "heads":
            add_heads(work, WEIGHTS)
            target, _, _ = load_mini_llm()
            for kind in HEADS:
                load_mini_heads(kind, target)
        else:
            Pretraining(arguments.phase, work).run(arguments.minutes)
            loss = held_out_loss(trained(arguments.phase, work), corpus_tokens(work, held_out=True))
            print(f"held-out cross-entropy {loss:.4f}")
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; the same command carries on from {work}") from None


if __name__ == "__main__":
    sys.exit(run(main, "train_mini_llm"))
