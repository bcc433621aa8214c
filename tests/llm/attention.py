"""Attention written out, in place of the host's: what the tests of draftdiff.llm hold results against."""

import torch


def attend(call, readable):
    """[batch, queries, heads, head_dim] of an AttentionCall; readable: bool [batch, heads or 1, queries, keys]."""
    groups = call.query.shape[1] // call.key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (call.key, call.value))
    scores = call.query @ key.transpose(-1, -2) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    weights = scores.masked_fill(~readable, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ value).transpose(1, 2)


def causal(queries, keys):
    """bool [queries, keys], the last query reading all."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
