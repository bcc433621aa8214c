"""DraftRec on a small league: the rules are known, views see what they may, losses are as written, and it learns."""

import importlib
import json
from pathlib import Path

import pytest
import torch

SAMPLES = Path(__file__).resolve().parents[2] / "samples" / "draftrec"


@pytest.fixture
def parts(monkeypatch):
    """The modules: league, network, draftrec."""
    monkeypatch.syspath_prepend(str(SAMPLES))
    return [importlib.import_module(name) for name in ("league", "network", "draftrec")]


@pytest.fixture
def season(parts):
    league, _, _ = parts
    return league.play(league.Rules(champions=14, users=24, seed=3), 60, 5, progress=False)


def test_picks_follow_the_rules_and_nobody_picks_what_is_taken(parts, season):
    league, _, _ = parts
    rules = league.Rules(champions=14, users=24, seed=3)
    assert all(len(set(match)) == 10 for match in season.champions.tolist())
    assert all(len(set(match)) == 10 for match in season.users.tolist())
    match, turn = 7, 6
    users, picked = season.users[match], season.champions[match]
    logits = rules.fits[league.ROLES[turn]] + rules.taste * rules.preference[users[turn]]
    for before in range(turn):
        if league.ORDER[before] == league.ORDER[turn]:
            logits = logits + rules.synergy * rules.pairs[picked[before]]
        else:
            logits = logits - rules.counter * rules.beats[picked[before]]
    logits[picked[:turn]] = -torch.inf
    torch.testing.assert_close(season.odds[match, turn], logits.softmax(-1))
    torch.testing.assert_close(season.odds.sum(-1), torch.ones(60, 10))


def test_teams_that_change_sides_change_their_chances(parts, season):
    """Blue has turns 0, 3, 4, 7, 8, red the others: with turns exchanged in pairs the odds are exchanged."""
    league, _, _ = parts
    rules = league.Rules(champions=14, users=24, seed=3)
    blue, red = ([t for t in range(10) if league.ORDER[t] == team] for team in (0, 1))
    swapped = torch.empty(10, dtype=torch.long)
    swapped[torch.tensor(blue)], swapped[torch.tensor(red)] = torch.tensor(red), torch.tensor(blue)
    other = rules.win(season.users[:, swapped], season.champions[:, swapped])
    torch.testing.assert_close(season.chance + other, torch.ones(60))
    assert season.chance.std() > 0.1


def test_histories_are_the_latest_earlier_appearances(season):
    for match in (0, 5, 59):
        for turn in range(10):
            user = season.users[match, turn]
            past = (season.users[:match] == user).nonzero()
            places = (past[:, 0] * 10 + past[:, 1]).tolist()[-5:]
            assert season.history[match, turn].tolist() == [-1] * (5 - len(places)) + places


@torch.no_grad()
def test_a_view_sees_the_turns_before_it_and_the_players_of_its_team(parts, season):
    league, network, _ = parts
    torch.manual_seed(0)
    model = network.DraftRec(network.Sizes(14, 16)).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    champions, players = season.champions[:1], torch.randn(1, 10, 16)
    order = torch.tensor(league.ORDER)

    def out(champions, players, turn, team):
        return model(champions, players, torch.tensor([turn]), torch.tensor([team]))

    for turn in (0, 4, 9, 10):
        team = league.ORDER[turn] if turn < 10 else 1
        policy, value = out(champions, players, turn, team)
        later = champions.clone()
        later[:, turn:] = (later[:, turn:] + 3) % 14
        hidden = torch.where((order == team)[:, None], players, torch.randn(1, 10, 16))
        for same in (out(later, players, turn, team), out(champions, hidden, turn, team)):
            assert torch.equal(same[0], policy) and torch.equal(same[1], value)
        if turn:
            assert (policy[0, champions[0, :turn]] == -1e9).all() and (policy > -1e8).sum() == 14 - turn
            earlier = champions.clone()
            earlier[:, 0] = (earlier[:, 0] + 1) % 14
            assert not torch.equal(out(earlier, players, turn, team)[1], value)
        seen = torch.where((order == team)[:, None], torch.randn(1, 10, 16), players)
        assert not torch.equal(out(champions, seen, turn, team)[1], value)


@torch.no_grad()
def test_padding_is_not_read_and_a_player_without_a_past_is_one_token(parts, season):
    _, network, draftrec = parts
    model = network.DraftRec(network.Sizes(14, 16)).eval()
    everyone = draftrec.histories(season, slice(0, 40))
    vectors = model.players(*everyone)
    empty = (everyone[0] == network.PAD).all(1)
    assert empty[:10].all() and vectors.isfinite().all() and not empty.all()
    assert torch.allclose(vectors[empty], vectors[empty][:1].expand(int(empty.sum()), -1), atol=1e-6)
    # What stands in the padding of stats changes nothing.
    stats = everyone[3].masked_fill((everyone[0] == network.PAD)[..., None], 100.0)
    torch.testing.assert_close(model.players(*everyone[:3], stats), vectors)
    assert {network.LOST, network.WON} == set(everyone[2].unique().tolist()) - {network.PAD}


def test_the_embedding_is_tied_and_the_loss_is_a_tenth_of_picks_and_nine_of_wins(parts, season):
    _, network, draftrec = parts
    torch.manual_seed(0)
    model = network.DraftRec(network.Sizes(14, 16)).eval()
    policy, value, picked, won = draftrec.views(model, season, slice(10, 14))
    assert policy.shape == (4, 12, 14) and value.shape == picked.shape == won.shape == (4, 12)
    assert (picked[:, 10:] < 0).all() and (won == season.blue[10:14, None]).all()
    chosen = policy[:, :10].log_softmax(-1).gather(-1, picked[:, :10, None])
    right = torch.where(won > 0, value, -value)
    expected = -0.1 * chosen.mean() + 0.9 * torch.nn.functional.softplus(-right).mean()
    wrong = network.loss(policy.flatten(0, 1), value.flatten(), picked.flatten(), won.flatten())
    torch.testing.assert_close(wrong, expected)
    embedding = model.champion.weight.detach().clone()
    with torch.no_grad():
        model.champion.weight[4:] += 0.5 * torch.randn(14, 16)
    assert not torch.equal(model.champion.weight, embedding)
    assert (draftrec.views(model, season, slice(10, 14))[0][:, 0] != policy[:, 0]).any()  # nothing is picked yet


def test_ranks_are_counted_by_hand(parts):
    _, _, draftrec = parts
    scores = torch.tensor([[0.1, 0.5, 0.4, 0.0, 0.2, 0.3], [0.9, 0.1, 0.2, 0.3, 0.4, 0.5]])
    found = draftrec.ranking(scores, torch.tensor([2, 1]))
    assert found["hr@1"] == 0 and found["hr@5"] == 0.5 and found["hr@10"] == 1
    assert found["ndcg@5"] == pytest.approx(0.5 / torch.tensor(3.0).log2().item())
    assert draftrec.bayes(torch.tensor([0.9, 0.2, 0.5])) == pytest.approx((0.9 + 0.8 + 0.5) / 3)


def test_baselines_know_the_past_alone_and_leave_out_what_is_taken(parts, season):
    _, _, draftrec = parts
    scores = draftrec.baselines(season, 50, 14)
    for score in scores.values():
        assert score.shape == (10, 10, 14)
        for match in range(10):
            for turn in range(10):
                taken = season.champions[50 + match, :turn]
                assert (score[match, turn, taken] == -1).all() and (score[match, turn] >= 0).sum() == 14 - turn
    user = season.users[59, 0]
    played = torch.bincount(season.champions[:59][season.users[:59] == user], minlength=14)
    role = torch.bincount(season.champions[:50, :2].flatten(), minlength=14).float()
    expected = (played + 10 * role / role.sum()) / (played.sum() + 10)
    torch.testing.assert_close(scores["player's own picks"][9, 0], expected)


def test_a_run_learns_and_writes_what_it_prints(parts, tmp_path, capsys):
    _, _, draftrec = parts
    argv = ["--matches", "160", "--test", "40", "--epochs", "3", "--history", "4", "--dim", "8", "--threads", "1"]
    draftrec.main([*argv, "--json", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["losses"][-1] < result["losses"][0] and result["settings"]["matches"] == 160
    names = [row["by"] for row in result["rows"]]
    assert names == ["popularity in the role", "player's own picks", "DraftRec", "the league's own rules"]
    assert all(name in printed for name in names)
    rows = {row["by"]: row for row in result["rows"]}
    best = rows["the league's own rules"]
    assert all(best["ndcg@10"] > row["ndcg@10"] for name, row in rows.items() if name != best["by"])
    assert 0.5 < best["expected_win_accuracy"] <= 1 and 0 <= rows["DraftRec"]["win_accuracy"] <= 1
