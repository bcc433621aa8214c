"""The losses' values against their formulas, their gradients against autograd, and what they do at the edges."""

import math

import pytest
import torch

from draftdiff.llm.metrics import acceptance_rate
from draftdiff.llm.train.losses import LOSSES, ce, jsd, kl, lk, named_loss, rkl, tvd, tvd_pp

SHAPE = (2, 5, 11)


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    draft, target = (2 * torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    return draft.requires_grad_(True), target


def gradient(loss, draft):
    return torch.autograd.grad(loss.sum(), draft)[0]


def test_the_divergences_are_those_of_torchs_distributions(logits):
    draft, target = logits
    q, p = (torch.distributions.Categorical(logits=x.float()) for x in (draft, target))
    between = torch.distributions.kl_divergence
    middle = torch.distributions.Categorical(probs=(p.probs + q.probs) / 2)
    torch.testing.assert_close(kl(draft, target), between(p, q))
    torch.testing.assert_close(rkl(draft, target), between(q, p))
    torch.testing.assert_close(jsd(draft, target), (between(p, middle) + between(q, middle)) / 2)
    assert jsd(40 * draft, 40 * target).max() <= math.log(2) + 1e-6


def test_total_variation_is_one_less_the_acceptance_rate(logits):
    draft, target = logits
    acceptance = acceptance_rate(target.float().softmax(-1), draft.float().softmax(-1))
    torch.testing.assert_close(1 - tvd(draft, target), acceptance)
    torch.testing.assert_close(lk(draft, target, form="log"), -acceptance.log())
    weight = torch.exp(-3 * acceptance)
    torch.testing.assert_close(lk(draft, target), weight * kl(draft, target) + (1 - weight) * (1 - acceptance))


def test_cross_entropy_takes_the_targets_likeliest_token_or_the_one_it_wrote(logits):
    draft, target = logits
    expected = torch.nn.functional.cross_entropy(
        draft.float().flatten(0, 1), target.argmax(-1).flatten(), reduction="none"
    )
    torch.testing.assert_close(ce(draft, target).flatten(), expected)
    torch.testing.assert_close(ce(draft, target), ce(draft, target.argmax(-1)))


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"ce"}))
def test_a_draft_like_its_target_has_no_loss_and_nothing_to_learn(name, logits):
    target = logits[1]
    draft = target.clone().requires_grad_(True)
    loss = LOSSES[name](draft, target)
    assert loss.shape == SHAPE[:-1] and loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-6, rtol=0)
    assert gradient(loss, draft).abs().max() < 1e-6


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_steps_along_the_gradient_raise_acceptance(name, logits):
    draft, target = logits[0].detach().clone(), logits[1]
    before = tvd(draft, target).mean()
    for _ in range(50):
        draft.requires_grad_(True)
        draft = draft.detach() - 0.3 * gradient(LOSSES[name](draft, target), draft)
    assert tvd(draft, target).mean() < before - 0.05


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_masked_positions_have_neither_loss_nor_gradient_nor_influence(name, logits):
    draft, target = logits
    mask = torch.ones(SHAPE[:-1], dtype=torch.bool)
    mask[0, 2:] = False
    loss = LOSSES[name](draft, target, mask)
    slope = gradient(loss, draft)
    assert not loss[~mask].any() and not slope[~mask].any()
    other = torch.where(mask[..., None], draft, -draft).detach().requires_grad_(True)
    again = LOSSES[name](other, target, mask)
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(gradient(again, other), slope)
    nothing = LOSSES[name](draft, target, torch.zeros_like(mask))
    assert not nothing.any() and not gradient(nothing, draft).any()


@pytest.mark.parametrize("loss", [*LOSSES.values(), lambda d, t: lk(d, t, form="log")])
def test_tokens_that_a_trimmed_draft_cannot_emit_make_no_nan(loss, logits):
    draft, target = logits
    blocked = torch.zeros(SHAPE[-1], dtype=torch.bool)
    blocked[[1, 4, 5]] = True
    trimmed = draft.masked_fill(blocked, -torch.inf)
    value = loss(trimmed, target)
    slope = gradient(value, draft)
    assert value.isfinite().all() and slope.isfinite().all() and not slope[..., blocked].any()
    assert slope[..., ~blocked].abs().max() > 1e-3


def test_with_a_trimmed_draft_kl_and_ce_are_about_what_it_can_emit_and_tvd_about_everything(logits):
    draft, target = logits
    blocked = torch.arange(SHAPE[-1]) % 3 == 0
    trimmed = draft.masked_fill(blocked, -torch.inf)
    torch.testing.assert_close(kl(trimmed, target), kl(draft[..., ~blocked], target[..., ~blocked]))
    torch.testing.assert_close(ce(trimmed, target), ce(draft[..., ~blocked], target[..., ~blocked]))
    acceptance = acceptance_rate(target.float().softmax(-1), trimmed.float().softmax(-1))
    torch.testing.assert_close(1 - tvd(trimmed, target), acceptance)
    assert not ce(trimmed, torch.zeros(SHAPE[:-1], dtype=torch.int64)).any()  # id 0 is blocked


def test_the_policy_gradient_with_plain_rewards_is_the_gradient_of_total_variation(logits):
    draft, target = logits
    q, p = draft.float().softmax(-1), target.float().softmax(-1)
    expectation = (q.detach() * -(p > q).float() * q.log()).sum(-1)
    torch.testing.assert_close(gradient(expectation, draft), gradient(tvd(draft, target), draft))


def test_exact_tvd_pp_over_a_batch_is_total_variation_over_the_deviation(logits):
    draft, target = logits
    q, p = draft.float().softmax(-1), target.float().softmax(-1)
    mean = (q * (p > q)).sum(-1).mean()
    expected = gradient(tvd(draft, target), draft) / (mean * (1 - mean)).sqrt().item()
    # Both compute in fp32, with two sums over the vocabulary.
    rounding = 2 * draft.shape[-1] * torch.finfo(torch.float32).eps * float(expected.abs().max())
    torch.testing.assert_close(gradient(tvd_pp(draft, target), draft), expected, rtol=0, atol=rounding)
    torch.testing.assert_close(tvd_pp(draft, target), tvd(draft, target))


def test_tvd_pp_by_position_weighs_each_position_by_its_own_deviation(logits):
    draft, target = logits
    q, p = draft.float().softmax(-1), target.float().softmax(-1)
    mean = (q * (p > q)).sum(-1, keepdim=True)
    expected = gradient(tvd(draft, target), draft) / (mean * (1 - mean)).sqrt()
    torch.testing.assert_close(
        gradient(tvd_pp(draft, target, baseline="position"), draft), expected.detach(), atol=1e-6, rtol=1e-5
    )


def test_sampled_tvd_pp_is_right_on_average_and_the_baseline_steadies_it(logits):
    draft, target = (x[:1, :1].detach().expand(8000, 1, -1).contiguous() for x in logits)
    draft.requires_grad_(True)
    exact = gradient(tvd_pp(draft, target), draft)[0]
    sampled = tvd_pp(draft, target, estimator="sample", generator=torch.Generator().manual_seed(1))
    slopes = gradient(sampled, draft)
    torch.testing.assert_close(slopes.mean(0), exact, atol=0.03, rtol=0)
    q, p = draft.float().softmax(-1), target.float().softmax(-1)
    mean = (q * (p > q)).sum(-1).mean()
    drawn = torch.multinomial(q[:, 0].detach(), 1, generator=torch.Generator().manual_seed(1))[:, None]
    plain = -((p > q).float() * q.log()).gather(-1, drawn) / (mean * (1 - mean)).sqrt().detach()
    assert slopes.var(0).sum() < gradient(plain, draft).var(0).sum()


def test_half_precision_logits_are_computed_in_full(logits):
    draft, target = (x.detach().to(torch.bfloat16) for x in logits)
    for loss in LOSSES.values():
        torch.testing.assert_close(loss(draft, target), loss(draft.float(), target.float()))


def test_mistakes_are_named_in_one_line(logits):
    draft, target = logits
    with pytest.raises(ValueError, match=r"one shape, got \(2, 5, 11\) and \(2, 5, 7\)"):
        kl(draft, target[..., :7])
    with pytest.raises(ValueError, match=r"shape \(2, 5\), got \(2, 4\)"):
        ce(draft, torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="baseline must be one of batch, position, got 'global'"):
        tvd_pp(draft, target, baseline="global")
    with pytest.raises(ValueError, match="form must be one of hybrid, log, got 'sum'"):
        lk(draft, target, form="sum")
    with pytest.raises(ValueError, match="one of kl, rkl, jsd, ce, tvd, tvd_pp, lk, got 'mse'"):
        named_loss("mse")
    assert named_loss("kl") is kl and named_loss(rkl) is rkl
