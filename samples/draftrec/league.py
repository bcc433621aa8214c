"""A synthetic league with known rules: who likes and masters which champion, what goes together, what beats what.

Ten players, five a side, pick a champion each in the order of the draft; then chance decides by the teams' strengths.
Every rule is a number of the generator, so the probability of every pick and result is known, and with it the best that
any model could do (the Bayes rates), which `picks` and `win` return. Nothing in it is a claim about real matches.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

PLAYERS = 10  # in a match
ORDER = (0, 1, 1, 0, 0, 1, 1, 0, 0, 1)  # the team of each turn: blue picks first
ROLES = (0, 0, 1, 1, 2, 2, 3, 3, 4, 4)  # of each turn; every team has each once
STATS = 4


@dataclass
class Rules:
    """champions: how many.  users: of the league.  taste, synergy, counter: how strongly a player's own taste, the
    champions beside and those opposite move a pick.  whim: of a taste what is of the player alone, beside what goes by
    kinds of champions.  edge: how strongly skill, synergies and counters move the result.
    """

    champions: int = 40
    users: int = 600
    taste: float = 1.6
    synergy: float = 1.5
    counter: float = 1.5
    whim: float = 0.4
    edge: float = 1.6
    seed: int = 0
    preference: Tensor = field(init=False)
    skill: Tensor = field(init=False)
    pairs: Tensor = field(init=False)
    beats: Tensor = field(init=False)
    fits: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        # Players and champions of a few kinds: what is liked, mastered and goes together is of low rank.
        kinds, ranks = normal(self.champions, 4), 4
        self.preference = normal(self.users, ranks) @ kinds.T / ranks**0.5 + self.whim * normal(
            self.users, self.champions
        )
        self.skill = 0.6 * self.preference + 0.8 * normal(self.users, self.champions)
        pairs = kinds @ normal(ranks, ranks) @ kinds.T / ranks
        self.pairs = (pairs + pairs.T) / 2
        beats = kinds @ normal(ranks, ranks) @ kinds.T / ranks
        self.beats = (beats - beats.T) / 2
        self.fits = 1.5 * normal(len(set(ROLES)), self.champions)  # of roles, common to all: what popularity sees

    def pick_logits(self, users: Tensor, picked: Tensor, turn: int) -> Tensor:
        """What moves the pick of a turn, [matches, champions]; -inf for what is taken.

        users: int64 [matches, players] by turn.  picked: int64 [matches, turn], champions of the turns before.
        """
        logits = self.fits[ROLES[turn]] + self.taste * self.preference[users[:, turn]]
        for before in range(turn):
            champion = picked[:, before]
            friend = ORDER[before] == ORDER[turn]
            logits = logits + (self.synergy * self.pairs[champion] if friend else -self.counter * self.beats[champion])
        return logits.scatter(1, picked, -torch.inf)

    def win(self, users: Tensor, picked: Tensor) -> Tensor:
        """Probability that blue wins, [matches], of whole drafts int64 [matches, players]."""
        teams = [[t for t in range(PLAYERS) if ORDER[t] == team] for team in (0, 1)]
        strength = []
        for team in teams:
            own = self.skill[users[:, team], picked[:, team]].sum(1)
            beside = sum(self.pairs[picked[:, a], picked[:, b]] for a in team for b in team if a < b)
            strength.append(own + beside)
        against = sum(self.beats[picked[:, a], picked[:, b]] for a in teams[0] for b in teams[1])
        return (self.edge * (strength[0] - strength[1] + against) / PLAYERS**0.5).sigmoid()


@dataclass(frozen=True)
class Season:
    """Many matches in the order of play. users, champions: int64 [matches, players] by turn.  blue: bool [matches],
    whether blue won.  chance: fp32 [matches], the probability of that.  stats: fp32 [matches, players, STATS], noisy
    measures of how a player did.  history: int64 [matches, players, length] of each player's earlier appearances as
    match * PLAYERS + turn, oldest first, -1 where there are fewer.  odds: fp32 [matches, players, champions], the
    probability of each pick."""

    users: Tensor
    champions: Tensor
    blue: Tensor
    chance: Tensor
    stats: Tensor
    history: Tensor
    odds: Tensor


def play(rules: Rules, matches: int, length: int, seed: int = 1, progress: bool = True) -> Season:
    """Matches of random players; length: of the histories."""
    generator = torch.Generator().manual_seed(seed)
    users = torch.stack([torch.randperm(rules.users, generator=generator)[:PLAYERS] for _ in range(matches)])
    picked, odds = torch.empty(matches, 0, dtype=torch.long), []
    for turn in tqdm(range(PLAYERS), desc="drafting", leave=False, disable=not progress):
        odds.append(rules.pick_logits(users, picked, turn).softmax(-1))
        picked = torch.cat([picked, torch.multinomial(odds[-1], 1, generator=generator)], dim=1)
    chance = rules.win(users, picked)
    blue = torch.rand(matches, generator=generator) < chance
    # A player's figures tell of skill on the champion, through noise.
    signal = rules.skill[users, picked][..., None]
    stats = 0.5 * signal + torch.randn(matches, PLAYERS, STATS, generator=generator)
    history = torch.full((matches, PLAYERS, length), -1)
    past: list[list[int]] = [[] for _ in range(rules.users)]
    for match, row in enumerate(users.tolist()):
        for turn, user in enumerate(row):
            recent = past[user][-length:]
            if recent:
                history[match, turn, -len(recent) :] = torch.tensor(recent)
        for turn, user in enumerate(row):
            past[user].append(match * PLAYERS + turn)
    return Season(users, picked, blue, chance, stats, history, torch.stack(odds, dim=1))
