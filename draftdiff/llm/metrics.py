"""What a draft is worth: acceptance, tokens per target forward, and the speed-up by memory traffic alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def acceptance_rate(p: Tensor, q: Tensor) -> Tensor:
    """Chance that one token drawn from q is accepted, sum of min(p, q) over the last dimension.

    p, q: probabilities of target and draft [..., vocabulary].
    """
    return torch.minimum(p, q).sum(-1)


def mbsu(tokens_per_forward: float, cost: float, drafts: float) -> float:
    """Memory-bound speed-up (arXiv 2403.00858): tau / (c * gamma + 1).

    tokens_per_forward: tau.  cost: bytes that one draft forward reads over those of a target forward.  drafts: draft
    forwards of a round, one after the other.
    """
    return tokens_per_forward / (cost * drafts + 1)


def bytes_per_forward(model: nn.Module) -> int:
    """Bytes of weights that a forward of one token reads: all but an input embedding that is not also the output's.

    Of a mixture's experts as many as a token goes to, `num_experts_per_tok` of the config; several tokens read more.
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    output = model.get_output_embeddings()  # type: ignore[operator]
    tied = output is not None and any(p is embedding.weight for p in output.parameters())
    skipped = set() if tied else {id(embedding.weight)}
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    share = (getattr(config, "num_experts_per_tok", None) or experts) / experts
    parts = ((p, share if ".experts." in name else 1) for name, p in model.named_parameters() if id(p) not in skipped)
    return round(sum(p.numel() * p.element_size() * read for p, read in parts))
