"""A start for small models that must copy: half the heads of the first two layers as an induction circuit.

A head of the first layer looks one token back and writes that token into dimensions kept for it; one of the second
looks where the token before is the present one, and adds the token there to what comes next (arXiv 2209.11895). From
random weights such heads take most of a small budget to appear: 550 steps on drawing revisions had not brought them.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

HEAD, THETA = 32, 1e6  # size of a head; of its rotations, slow enough that half the pairs hardly turn in a prompt


def copying_model(width: int, layers: int, mlp: int, vocabulary: int, context: int) -> LlamaForCausalLM:
    """A Llama in fp32 that copies from the start; its end token is 0."""
    config = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        head_dim=HEAD,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    begin_to_copy(model)
    return model


@torch.no_grad()
def begin_to_copy(model: LlamaForCausalLM, scale: float = 0.1) -> None:
    """Set the circuit, and embeddings of standard deviation `scale`. Needs two layers and two heads."""
    width, heads = model.config.hidden_size, model.config.num_attention_heads // 2
    kept, pairs = width // 4 // heads, HEAD // 2  # dimensions for the token before, of each head; rotated pairs of one
    last = width - kept * heads
    table = model.model.embed_tokens.weight
    table.normal_(std=scale)
    table[:, 0], table[:, last:] = 4 * scale, 0  # the first is the same for all tokens
    look, find = (layer.self_attn for layer in model.model.layers[:2])
    turns = THETA ** (-torch.arange(4) / pairs)  # radians a token, of the four pairs that turn fastest
    slow = torch.tensor([*range(pairs - kept // 2, pairs), *range(2 * pairs - kept // 2, 2 * pairs)])
    for head in range(heads):
        rows = slice(head * HEAD, (head + 1) * HEAD)
        for layer in (look, find):
            for part in (layer.q_proj, layer.k_proj, layer.v_proj):
                part.weight[rows] = 0
            layer.o_proj.weight[:, rows] = 0
        place = head * HEAD + torch.arange(4)
        look.q_proj.weight[place, 0], look.q_proj.weight[place + pairs, 0] = 2 * turns.cos(), -2 * turns.sin()
        look.k_proj.weight[place, 0] = 2
        seen = torch.nn.init.orthogonal_(torch.empty(kept, last - 1))
        look.v_proj.weight[head * HEAD + torch.arange(kept), 1:last] = seen
        before = last + head * kept + torch.arange(kept)
        look.o_proj.weight[before, head * HEAD + torch.arange(kept)] = scale
        at = head * HEAD + slow
        find.q_proj.weight[at, 1:last] = 2 * seen
        find.k_proj.weight[at, before] = 2
        copied = torch.nn.init.orthogonal_(torch.empty(min(HEAD, last - 1), last - 1))
        find.v_proj.weight[rows, 1:last] = copied
        find.o_proj.weight[1:last, rows] = 6 * scale * copied.T
