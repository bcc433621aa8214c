"""DraftRec (arXiv 2204.12750): which champion to pick next and who will win, from players' histories and the draft.

A player network reads each player's past matches; a match network reads the ten turns with the players of the own team.
The policy head scores champions by the tied embedding, the value head tells the first team's chance. Where the
published code departs from what the paper describes or from what one would expect, this is what is done here:

- padding: attended there, masked here (a player without a past is one padding token);
- champions picked already: can be recommended there (bans alone are masked), masked here;
- the mean over a team divides by all ten players there, by its five here;
- kept as there: the champion of the current turn is zero, not a mask token; the opposing team's players are zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from league import ORDER, PLAYERS, ROLES, STATS
from torch import Tensor, nn

PAD, MASK, CLS, UNK = range(4)
SPECIAL = 4
LOST, WON = SPECIAL, SPECIAL + 1


@dataclass(frozen=True)
class Sizes:
    """dim: of all vectors.  layers, heads: of both networks."""

    champions: int
    dim: int = 32
    layers: int = 2
    heads: int = 2
    dropout: float = 0.1


def blocks(sizes: Sizes) -> nn.ModuleList:
    """Pre-normalised transformer blocks."""
    return nn.ModuleList(
        nn.TransformerEncoderLayer(
            sizes.dim,
            sizes.heads,
            4 * sizes.dim,
            sizes.dropout,
            activation=nn.GELU(approximate="tanh"),
            batch_first=True,
            norm_first=True,
        )
        for _ in range(sizes.layers)
    )


def sinusoidal(length: int, dim: int) -> Tensor:
    """Positions [length, dim] (Vaswani et al., arXiv 1706.03762)."""
    angles = torch.arange(length)[:, None] * torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class DraftRec(nn.Module):
    """sizes: see Sizes."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        dim = sizes.dim
        self.champion = nn.Embedding(sizes.champions + SPECIAL, dim, padding_idx=PAD)
        self.role = nn.Embedding(len(set(ROLES)) + SPECIAL, dim, padding_idx=PAD)
        self.team = nn.Embedding(2 + SPECIAL, dim)
        self.outcome = nn.Embedding(2 + SPECIAL, dim, padding_idx=PAD)
        self.stats = nn.Linear(STATS, dim)
        self.player_blocks, self.match_blocks = blocks(sizes), blocks(sizes)
        self.player_norm, self.match_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.policy = nn.Sequential(nn.Linear(dim, dim), nn.GELU(approximate="tanh"))
        self.policy_bias = nn.Parameter(torch.zeros(sizes.champions))
        self.value = nn.Sequential(nn.Linear(dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, 1))
        self.order, self.roles = torch.tensor(ORDER), torch.tensor(ROLES) + SPECIAL
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.3)  # champions must be told apart beside positions

    def players(self, champions: Tensor, roles: Tensor, outcomes: Tensor, stats: Tensor) -> Tensor:
        """What a history tells of its player, [players, dim]: champions, roles and outcomes int64 [players, length],
        oldest first, PAD where there is none; stats fp32 [players, length, STATS]."""
        padding = champions == PAD
        x = self.champion(champions) + self.role(roles) + self.outcome(outcomes)
        x = x + self.stats(stats).masked_fill(padding[..., None], 0) + sinusoidal(*x.shape[1:])
        padding = padding.clone()
        padding[:, -1] = False  # of a player without a past
        for block in self.player_blocks:
            x = block(x, src_key_padding_mask=padding)
        return self.player_norm(x[:, -1])

    def forward(self, champions: Tensor, players: Tensor, turn: Tensor, team: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the champion to pick, [views, champions], and of the first team's win, [views].

        champions: int64 [views, 10] from 0 on, of which those at `turn` and later are not seen.  players: [views, 10,
        dim], of which those opposing `team` are not seen.  turn: int64 [views], 10 once the draft is finished.
        team: int64 [views], which sees the draft.
        """
        turns = torch.arange(PLAYERS)
        known = turns < turn[:, None]
        own = self.order == team[:, None]
        x = self.champion(champions + SPECIAL) * known[..., None] + players * own[..., None]
        x = x + self.role(self.roles) + self.team(self.order + SPECIAL) + sinusoidal(PLAYERS, x.shape[-1])
        for block in self.match_blocks:
            x = block(x)
        x = self.match_norm(x)
        current = x[torch.arange(len(x)), turn.clamp(max=PLAYERS - 1)]
        logits = self.policy(current) @ self.champion.weight[SPECIAL:].T + self.policy_bias
        taken = F.one_hot(champions, logits.shape[-1]).mul(known[..., None]).any(1)
        blue = (self.order == 0).float()[:, None]
        means = (x * blue).sum(1) / blue.sum() - (x * (1 - blue)).sum(1) / (1 - blue).sum()
        return logits.masked_fill(taken, -1e9), self.value(means)[:, 0]


def loss(policy: Tensor, value: Tensor, picked: Tensor, won: Tensor) -> Tensor:
    """0.1 times the cross-entropy of picks, without finished drafts (picked PAD - SPECIAL, below 0), and 0.9 times the
    binary cross-entropy of the first team's win."""
    picks = F.cross_entropy(policy, picked.where(picked >= 0, torch.full_like(picked, -100)))
    return 0.1 * picks + 0.9 * F.binary_cross_entropy_with_logits(value, won)
