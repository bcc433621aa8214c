"""Training a Falcon layer by coupled sequential glancing distillation (arXiv 2412.12639).

The layer guesses once without learning; the more of it is wrong, the more of its inputs are replaced, token and state
together, by those that it should have guessed; and then it guesses again and learns. Fewer are replaced with time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from draftdiff.llm.checks import require
from draftdiff.llm.train.heads import HeadsTrainer, read_target

GLANCING = ("code", "paper", "none")
TEMPERATURE = 0.95  # of both laws inside the logarithm of the soft loss
WEIGHTS = {"states": 1.0, "soft": 0.09, "hard": 0.01}


def glance_share(progress: float, glancing: str = "code") -> float:
    """Which share of the wrong guesses is replaced after a share of the training.

    glancing: "paper" says 0.4 at first and nothing in the end, the original's "code" 0.45 and 0.1; "none" is plain
    distillation.
    """
    require(glancing in GLANCING, f"glancing must be one of {', '.join(GLANCING)}, got {glancing!r}")
    if glancing == "none":
        return 0.0
    return 0.4 * (1 - progress) if glancing == "paper" else 0.35 * (1 - progress) + 0.1


def glanced_positions(
    counted: Tensor, number: float, k: int, glancing: str = "code", generator: torch.Generator | None = None
) -> list[int]:
    """Positions whose inputs are replaced, of those that count, bool [tokens].

    number: of them, about.  glancing: "paper" replaces as many one after the other. The original's "code" draws from
    every k-th; with k of 3 and more a k-th as many, each with up to k - 2 after it.
    """

    def below(end: int) -> int:
        return int(torch.randint(max(end, 1), (), generator=generator))

    allowed, count = counted.nonzero().flatten().tolist(), int(number)
    if glancing == "paper":
        start = below(len(allowed) - count + 1)
        return allowed[start : start + count]
    candidates = allowed[::k]
    order = torch.randperm(len(candidates), generator=generator).tolist()
    if k < 3:
        return [candidates[i] for i in order[:count]]
    runs = (range(candidates[i], candidates[i] + 1 + below(k - 1)) for i in order[: count // k])
    return sorted({position for run in runs for position in run} & set(allowed))


def glance(ids: Tensor, states: Tensor, row: int, positions: list[int], k: int) -> None:
    """Replace, in place, what a row reads at some positions by what it reads k further on, as should have been guessed.

    ids: int64 [rows, n].  states: [rows, n, width].
    """
    where = torch.tensor(positions, dtype=torch.int64, device=ids.device)
    later = where + k
    ids[row, where], states[row, where] = ids[row, later].clone(), states[row, later].clone()


def distillation_sums(
    states: Tensor, logits: Tensor, target_states: Tensor, target_logits: Tensor, hard: Tensor, counted: Tensor
) -> dict[str, Tensor]:
    """The three losses, each summed over the counted positions: of states, smooth L1; soft, the target's law over the
    layer's; hard, cross-entropy with tokens int64 [rows, n] that the target has drawn.

    states, target_states: [rows, n, width].  logits, target_logits: [rows, n, vocabulary].  counted: bool [rows, n].
    """
    states, logits, target_states, target_logits = (
        x[counted].float() for x in (states, logits, target_states, target_logits)
    )
    p = target_logits.softmax(-1)
    cold_p, cold_q = ((x / TEMPERATURE).softmax(-1) for x in (target_logits, logits))
    # A law that gives a token no chance at all counts nothing there.
    ratio = cold_p.clamp_min(torch.finfo(p.dtype).tiny).log() - (cold_q + 1e-8).log()
    return {
        "states": F.smooth_l1_loss(states, target_states, reduction="none").mean(-1).sum(),
        "soft": (p * ratio).sum(),
        "hard": F.cross_entropy(logits, hard[counted], reduction="sum"),
    }


def guess(model: Any, head: Any, ids: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer makes of whole texts: guessed states and logits, [rows, n, ...]. ids: the tokens after the states.
    model: the layer, or what the Trainer has wrapped it in."""
    read, _ = head.read(ids, states)
    places = torch.arange(ids.shape[1], device=ids.device)[None]
    output = model(None, None, places, states=read)
    return output.hidden_states[0], output.logits


class FalconTrainer(HeadsTrainer):
    """A DraftTrainer whose model is a `FalconHead`: the target, which is frozen, runs on every batch.

    On rows with `distil` the hard loss is against a token that the target draws, on the others against the text's. The
    loss is the mean over the positions whose guessed token is `written`. In training the states are noisy, too; in
    evaluation nothing is replaced and nothing is drawn.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        target: Any,
        glancing: str = "code",
        noise: float = 0.1,
        **kwargs: Any,
    ) -> None:
        """As HeadsTrainer's, without a loss to choose. glancing: how inputs are replaced, see `glanced_positions`.
        noise: most that is added to a state of a text of 512 tokens, and less in longer ones."""
        glance_share(0.0, glancing)
        require(noise >= 0, f"noise must be at least 0, got {noise}")
        self.glancing, self.noise = glancing, noise
        super().__init__(model, args, target=target, loss="kl", **kwargs)

    def ahead(self, model: Any) -> list[int]:
        """One guess, of the token k + 1 further on than a state's own."""
        return [model.settings.k + 1]

    def progress(self) -> float:
        """Share of the training that is done."""
        return min(self.state.global_step / max(self.state.max_steps, 1), 1.0)

    def _sums(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Any]:
        ids, head = inputs["input_ids"], self.model
        k = head.settings.k
        states, target_logits = read_target(self.target, ids, inputs["attention_mask"], inputs.get("position_ids"))
        counted, labels = inputs["written"][:, k + 1 :], ids[:, k + 1 :]
        rows = counted.shape[1]
        read_ids, read_states, hard = ids[:, 1:].clone(), states[:, :-1].clone(), labels
        if model.training:
            drawn = draw(target_logits[:, k:-1])
            hard = torch.where(inputs["distil"][:, None], drawn, labels)
            read_states += self.noise * (2 * torch.rand_like(read_states) - 1) * min(512 / ids.shape[1], 1.0)
            share = glance_share(self.progress(), self.glancing)
            if share > 0:
                with torch.no_grad():
                    _, first = guess(model, head, read_ids, read_states)
                wrong = ((first[:, :rows].argmax(-1) != labels) & counted).sum(-1)
                for row, number in enumerate((share * wrong).tolist()):
                    glance(read_ids, read_states, row, glanced_positions(counted[row], number, k, self.glancing), k)
        guessed, logits = (x[:, :rows] for x in guess(model, head, read_ids, read_states))
        sums = distillation_sums(guessed, logits, states[:, k:-1], target_logits[:, k:-1], hard, counted)
        total = sum((weight * sums[name] for name, weight in WEIGHTS.items()), start=logits.new_zeros(()))
        return total[None], counted.sum()[None], CausalLMOutput(logits=logits)


def draw(logits: Tensor) -> Tensor:
    """A token of each law, int64 [...] of logits [..., vocabulary]."""
    return (logits.float() - torch.empty_like(logits, dtype=torch.float32).exponential_().log()).argmax(-1)
