"""When does a draft pay? Measured speed-up beside the memory-bound prediction, while the target grows dearer.

The embedded target is made deeper by layers that pass everything through unchanged: it writes the same text, and drafts
are accepted as often, at the cost of a target 1, 2, 4 and 8 times as deep. Methods run in turn within a round beside
plain decoding of the same target, and must write its text.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from transformers import LlamaForCausalLM

from draftdiff.bench.runner import Routine
from draftdiff.compare.llm import compare_methods
from draftdiff.compare.table import Column, text_table, with_spread
from draftdiff.llm.metrics import bytes_per_forward
from draftdiff.models.llm import example_prompts, load
from draftdiff.models.llm_methods import generate_options

METHODS = ("chain", "adaptive", "tree", "trimmed", "ngram")
COLUMNS: tuple[Column, ...] = (
    ("layers", "layers", str, ""),
    ("cost", "cost", "{:.3f}".format, ""),
    ("method", "method", str, ""),
    ("tokens/forward", "tokens_per_forward", "{:.2f}".format, ""),
    ("MBSU", "mbsu", "{:.2f}x".format, ""),
    ("speed-up", "speedup", with_spread("x", 2), ""),
)


class Speculation(Routine):
    name = "llm speculation"
    file = "llm-speculation"
    picture = "speculation"

    def cases(self) -> list[int]:
        return self.options.times

    def about(self) -> dict[str, Any]:
        self.model = load(None, None, device=str(self.device))
        self.prompts = example_prompts(self.model, self.options.prompts, self.options.prompt_tokens)
        names = ("prompts", "prompt_tokens", "tokens")
        return {"settings": {name: getattr(self.options, name) for name in names}}

    def measure(self, case: int) -> list[dict[str, Any]]:
        """Every method beside a target so many times as deep. cost: bytes of a draft's forward over the target's."""
        deeper = replace(self.model, target=deepened(self.model.target, case))
        comparison = compare_methods(
            deeper,
            self.prompts,
            METHODS,
            capacity=self.options.prompt_tokens,
            options=generate_options(self.options.tokens, 0) | {"pace": None},  # what drafts bring, paying or not
            repeat=self.options.rounds,
            progress=False,
        )
        layers = deeper.target.config.num_hidden_layers
        cost = bytes_per_forward(deeper.draft) / bytes_per_forward(deeper.target)
        rows = comparison.rows()[1:]
        self.failures += [
            f"{row['method']} at {layers} layers wrote something else than plain decoding"
            for row in rows
            if row["same_text"] != 1
        ]
        kept = ("method", "tokens_per_forward", "mbsu", "speedup")
        return [{"layers": layers, "cost": cost} | {name: row[name] for name in kept} for row in rows]

    def table(self, payload: Mapping[str, Any]) -> Iterable[str]:
        return text_table(payload["rows"], COLUMNS)


def deepened(target: Any, times: int) -> Any:
    """The model with `times` as many layers, of which the new ones add nothing to what passes through them."""
    config = copy.deepcopy(target.config)
    layers = config.num_hidden_layers
    config.num_hidden_layers = times * layers
    model = LlamaForCausalLM(config).to(target.device, target.dtype).eval()
    model.load_state_dict(target.state_dict(), strict=False)
    model.tie_weights()
    for layer in model.model.layers[layers:]:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model.generation_config = target.generation_config
    return model
