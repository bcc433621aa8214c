"""DraftRec (arXiv 2204.12750) on a synthetic league: champions recommended in a draft, and who will win.

Trains the player and the match network on the first matches of a season and scores them on the last, beside what is
popular in a role, what a player picks most, and the best possible, which the league's own rules give. Real matches and
the paper's figures are out of reach here; nothing is claimed about them. A few minutes on two cores:

    python samples/draftrec/draftrec.py --json draftrec.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from league import ORDER, PLAYERS, ROLES, Rules, Season, play
from network import LOST, PAD, SPECIAL, WON, DraftRec, Sizes, loss
from torch import Tensor
from tqdm import tqdm

from draftdiff.bench.runner import write_json
from draftdiff.cli import run
from draftdiff.cli.options import Parser, new_file, whole

RANKS = (1, 5, 10)
BATCH = 32  # matches, of twelve views each
RATE = 4e-3


def histories(season: Season, matches: slice) -> tuple[Tensor, ...]:
    """What the player network reads of every player of some matches: champions, roles, outcomes, int64 [matches *
    players, length], and stats [matches * players, length, STATS]."""
    places = season.history[matches].flatten(0, 1)
    none, flat = places < 0, places.clamp(min=0)
    match, turn = flat // PLAYERS, flat % PLAYERS
    won = season.blue[match] == (torch.tensor(ORDER)[turn] == 0)
    ids = (
        season.champions[match, turn] + SPECIAL,
        torch.tensor(ROLES)[turn] + SPECIAL,
        torch.where(won, WON, LOST),
    )
    return (*(x.masked_fill(none, PAD) for x in ids), season.stats[match, turn].masked_fill(none[..., None], 0))


def views(model: DraftRec, season: Season, matches: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of all twelve views of some matches, ten turns and two of the finished draft: logits of picks [matches, 12,
    champions], logits of wins [matches, 12], what was picked, negative where there is none, and who won."""
    champions = season.champions[matches]
    count = len(champions)
    players = model.players(*histories(season, matches)).view(count, PLAYERS, -1)
    turn = torch.tensor([*range(PLAYERS), PLAYERS, PLAYERS])
    team = torch.tensor([*ORDER, 0, 1])

    def each(x: Tensor) -> Tensor:
        return x.repeat_interleave(len(turn), 0)

    policy, value = model(each(champions), each(players), turn.repeat(count), team.repeat(count))
    picked = torch.cat([champions, torch.full((count, 2), PAD - SPECIAL)], dim=1)
    won = season.blue[matches].float()[:, None].expand(-1, len(turn))
    return policy.unflatten(0, (count, -1)), value.view(count, -1), picked, won


def train(model: DraftRec, season: Season, until: int, epochs: int, seed: int, batch: int = BATCH) -> list[float]:
    """Train on the matches before `until`; the mean loss of each epoch. Adam with weight decay, a cosine to zero and
    gradients clipped at 5, as in the paper's code, at four times its rate after a warm-up: there are few steps."""
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=1e-5)
    steps = epochs * (until // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    generator, losses = torch.Generator().manual_seed(seed), []
    with tqdm(total=steps, unit="step", desc="training") as bar:
        for _ in range(epochs):
            total = 0.0
            for number in torch.randperm(until // batch, generator=generator).tolist():
                policy, value, picked, won = views(model, season, slice(number * batch, (number + 1) * batch))
                wrong = loss(policy.flatten(0, 1), value.flatten(), picked.flatten(), won.flatten())
                optimizer.zero_grad()
                wrong.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                schedule.step()
                total += wrong.item()
                bar.update()
            losses.append(total / (until // batch))
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
    return losses


def ranking(scores: Tensor, picked: Tensor) -> dict[str, float]:
    """HR@k, the share of picks among the k best, and NDCG@k, which also asks how high, of scores [picks, champions]."""
    own = scores.gather(1, picked[:, None])
    place = (scores > own).sum(1) + 1
    found: dict[str, float] = {}
    for k in RANKS:
        hit = place <= k
        found[f"hr@{k}"] = float(hit.float().mean())
        found[f"ndcg@{k}"] = float((hit / (place + 1.0).log2()).mean())
    return found


def baselines(season: Season, until: int, champions: int) -> dict[str, Tensor]:
    """Scores [test matches, players, champions] of what is popular in a role, and of what a player picked before, each
    among what is left."""
    roles = torch.tensor(ROLES)
    seen = torch.nn.functional.one_hot(season.champions[:until], champions).sum(0).float()
    by_role = torch.zeros(len(set(ROLES)), champions).index_add_(0, roles, seen)
    popular = (by_role / by_role.sum(1, keepdim=True))[roles]
    own = torch.zeros(int(season.users.max()) + 1, champions)
    rows = []
    for match, (users, picks) in enumerate(zip(season.users, season.champions)):
        if match >= until:
            rows.append(own[users].clone())
        own[users, picks] += 1  # ten different players
    played = torch.stack(rows)
    player = (played + 10 * popular) / (played.sum(-1, keepdim=True) + 10)  # a few picks say little
    taken = torch.nn.functional.one_hot(season.champions[until:], champions).cumsum(1)
    taken = torch.nn.functional.pad(taken, (0, 0, 1, 0))[:, :-1].bool()
    scores = {"popularity in the role": popular.expand_as(player), "player's own picks": player}
    return {name: score.masked_fill(taken, -1) for name, score in scores.items()}


@torch.no_grad()
def score(model: DraftRec, season: Season, until: int, champions: int) -> list[dict[str, Any]]:
    """A row for each way to recommend, on the matches from `until` on, with the accuracy of who wins where it tells."""
    model.eval()
    policies, values = [], []
    for first in range(until, len(season.users), 100):
        policy, value, _, _ = views(model, season, slice(first, first + 100))
        policies.append(policy[:, :PLAYERS])
        values.append(value)
    blue, chance = season.blue[until:], season.chance[until:]
    won = blue[:, None]
    right = ((torch.cat(values) > 0) == won).float()
    ours = {"win_accuracy": float(right[:, PLAYERS:].mean()), "first_view_accuracy": float(right[:, 0].mean())}
    majority = {"win_accuracy": max(float(blue.float().mean()), 1 - float(blue.float().mean()))}
    best = {"win_accuracy": float(((chance > 0.5) == blue).float().mean()), "expected_win_accuracy": bayes(chance)}
    scores = baselines(season, until, champions)
    known = {"popularity in the role": majority, "DraftRec": ours, "the league's own rules": best}
    scores |= {"DraftRec": torch.cat(policies), "the league's own rules": season.odds[until:]}
    picked = season.champions[until:].flatten()
    return [{"by": name, **ranking(s.flatten(0, 1), picked), **known.get(name, {})} for name, s in scores.items()]


def bayes(chance: Tensor) -> float:
    """The accuracy to expect of who always names the side with the better chance."""
    return float(chance.maximum(1 - chance).mean())


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="draftrec", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--matches", type=whole(40), default=5000, help="of the season (default 5000)")
    parser.add_argument("--test", type=whole(1), default=1000, help="the last ones, to score on (default 1000)")
    parser.add_argument("--epochs", type=whole(1), default=5, help="default 5")
    parser.add_argument("--history", type=whole(1), default=16, help="past matches read of each player (default 16)")
    parser.add_argument("--dim", type=whole(4), default=32, help="of all vectors (default 32)")
    parser.add_argument("--seed", type=whole(0), default=0, help="of league, season and weights (default 0)")
    parser.add_argument("--threads", type=whole(1), default=1, help="CPU threads (default 1)")
    parser.add_argument("--json", type=new_file(".json"), help="file for the rows")
    options = parser.parse_args(argv)
    until = options.matches - options.test
    if until < BATCH:
        parser.error(f"--test must leave {BATCH} matches to train on, got {options.test} of {options.matches}")
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    rules = replace(Rules(), seed=options.seed)
    season = play(rules, options.matches, options.history, options.seed + 1)
    torch.manual_seed(options.seed)
    model = DraftRec(Sizes(rules.champions, options.dim))
    losses = train(model, season, until, options.epochs, options.seed)
    rows = score(model, season, until, rules.champions)
    seconds = time.perf_counter() - started
    names = [f"{metric}@{k}" for metric in ("hr", "ndcg") for k in RANKS]
    print(f"{options.test} matches after {until}, {rules.champions} champions, {seconds:.0f} s")
    print(f"{'recommended by':<24}" + "".join(f"{name:>9}" for name in names) + f"{'win':>9}")
    for row in rows:
        win = f"{row['win_accuracy']:>9.1%}" if "win_accuracy" in row else ""
        print(f"{row['by']:<24}" + "".join(f"{row[name]:>9.3f}" for name in names) + win)
    if options.json:
        given = {name: getattr(options, name) for name in ("matches", "test", "epochs", "history", "dim", "seed")}
        settings = {name: value for name, value in asdict(rules).items() if isinstance(value, (int, float))}
        about = {"settings": given, "rules": settings, "threads": options.threads, "seconds": seconds}
        write_json(options.json, {**about, "losses": losses, "rows": rows})


if __name__ == "__main__":
    sys.exit(run(main, "draftrec"))
