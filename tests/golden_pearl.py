"""PEARL's steps against those of the original."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from draftdiff.llm import PearlDrafter, speculative
from tests.golden_cases import Case, load_file, widened


def check_pearl(case: Case) -> None:
    """Every step, the logits of both models, and the tokens: ours are all verified, the original's but for a tail."""
    info = case.info
    target, draft = (_model(case, part) for part in ("target", "draft"))
    prompt, returned, greedy = (case[name].long() for name in ("prompt", "returned_ids", "greedy_ids"))
    with torch.no_grad():
        case.same(target(returned).logits, "target_logits", "logits")
        case.same(draft(returned).logits, "draft_logits", "logits")
    drafter = Recorder(draft, info["gamma"])
    given = {"do_sample": False, "custom_generate": speculative, "drafter": drafter, "pace": None}
    # The original's steps are cut by no limit, so ours must not be either.
    ids = target.generate(prompt, **given, max_new_tokens=greedy.shape[1] - prompt.shape[1] + 8 * info["gamma"])
    assert drafter.steps[: len(info["steps"])] == info["steps"]
    case.same(ids[:, : greedy.shape[1]], greedy, "tokens")
    verified = returned.shape[1] - info["unverified_tail"]
    assert torch.equal(ids[:, :verified], returned[:, :verified])
    ids = target.generate(prompt, **given, max_new_tokens=info["max_tokens"])
    case.same(ids, greedy[:, : prompt.shape[1] + info["max_tokens"]], "tokens")


class Recorder(PearlDrafter):
    """That writes down its steps as the cases have them."""

    def __init__(self, draft, gamma):
        super().__init__(draft, gamma)
        self.steps = []

    def propose(self, context):
        trees = super().propose(context)
        prefix = context.ids[0][0].tolist() + self._session._chains[0]
        if context.trees:
            step = self.steps[-1]
            step["accepted"] = len(context.paths[0])
            rejected = len(context.paths[0]) < len(step["verified"])
            step["target_token"] = int(context.ids[0][0, -1]) if rejected else None
            step["next_prefix"] = prefix
            step["next_mode"] = "post-verify" if trees[0].tokens else "pre-verify"
        self.steps.append({"mode": "post-verify" if trees[0].tokens else "pre-verify", "prefix_len": len(prefix)})
        return trees

    def beside(self, context):
        join, tree, step = super().beside(context), self._session._trees[0], self.steps[-1]
        step["pending"] = len(tree.tokens)

        def joined():
            join()
            step["drafted"] = self._session._chains[0][step["pending"] :]
            step["verified"] = list(tree.tokens)

        return joined


def _model(case: Case, part: str):
    config = dict(case.info[f"{part}_config"])
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config.pop("model_type"), **config), dtype=torch.float32, attn_implementation="sdpa"
    )
    weights = widened(load_file(case.folder / f"{case.name}_{part}_state.safetensors"))
    model.load_state_dict(weights, strict=True)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model.eval()
