"""Losses of the meta-policy against their definitions."""

import math

import pytest
import torch

from rema_verl.deliberation import objectives
from rema_verl.deliberation.objectives import (
    best_actions,
    clipped_loss,
    entropy,
    expected_loss,
    kl,
    rank_advantages,
    scores,
    softrankpo_loss,
    standard_advantages,
    supervised_loss,
)

REWARDS = torch.tensor([[0.0, 2.0, -1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, -2.0, 1.0]], dtype=torch.float64)


def logits(seed, n=len(REWARDS)):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


def minimised(loss, start):
    x = start.double().clone().requires_grad_()
    optimiser = torch.optim.LBFGS([x], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimiser.zero_grad()
        value = loss(x)
        value.backward()
        return value

    optimiser.step(closure)
    return x.detach()


def test_best_actions_share_ties():
    expected = [[0, 1, 0], [0, 0.5, 0.5], [1 / 3] * 3, [0.5, 0, 0.5]]
    torch.testing.assert_close(best_actions(REWARDS), torch.tensor(expected))
    target = best_actions(REWARDS)
    torch.testing.assert_close(minimised(lambda x: supervised_loss(x, target), logits(0)).softmax(1).float(), target,
                               rtol=0, atol=2e-3)  # fmt: skip


def test_rank_advantages_see_the_order_alone():
    advantages = rank_advantages(REWARDS)
    half = math.sqrt(0.5)
    torch.testing.assert_close(advantages[1], torch.tensor([-2 * half, half, half]), rtol=0, atol=1e-5)
    assert advantages[2].tolist() == [0.0] * 3
    for increasing in (lambda r: 0.1 * r, lambda r: 1000 * r + 7, lambda r: r**3, torch.exp):
        assert torch.equal(rank_advantages(increasing(REWARDS)), advantages)
    expected = (REWARDS - REWARDS.mean(1, keepdim=True)) / (REWARDS.std(1, correction=0, keepdim=True) + 1e-6)
    torch.testing.assert_close(standard_advantages(REWARDS), expected.float())


@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_softrankpo_ends_in_the_tilted_reference(beta):
    reference, advantages = logits(1).double(), rank_advantages(REWARDS).double()
    best = (reference.log_softmax(1) + advantages / beta).softmax(1)
    assert softrankpo_loss(best.log(), reference, advantages, beta) < 1e-10
    for seed in (2, 3):
        found = minimised(lambda x: softrankpo_loss(x, reference, advantages, beta), logits(seed))
        torch.testing.assert_close(found.softmax(1), best, rtol=0, atol=1e-5)
    # the form with an expected advantage has the same optimum
    for where, optimum in ((best.log(), True), (reference, False)):
        x = where.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(expected_loss(x, reference, advantages, beta), x)
        assert (gradient.abs().max() < 1e-6) == optimum
    # an entropy bonus moves it towards even
    found = minimised(lambda x: softrankpo_loss(x, reference, advantages, beta) - 0.1 * entropy(x), reference)
    assert entropy(found) > entropy(best.log())


def test_states_that_look_alike_get_the_mean_advantage():
    reference, advantages = logits(1).double(), rank_advantages(REWARDS).double()
    reference = reference[:1].expand(4, -1)
    found = minimised(lambda x: softrankpo_loss(x.expand(4, -1), reference, advantages, 0.5), logits(2, 1))
    best = (reference[0].log_softmax(0) + advantages.mean(0) / 0.5).softmax(0)
    torch.testing.assert_close(found[0].softmax(0), best, rtol=0, atol=1e-5)


def test_clipped_loss():
    ratio = torch.tensor([[0.5, 1.0, 1.5], [0.5, 1.0, 1.5]])
    advantages = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]])
    weights = torch.tensor([[0.2, 0.3, 0.5], [0.2, 0.3, 0.5]])
    expected = -(0.2 * 0.5 + 0.3 + 0.5 * 1.2 - (0.2 * 0.8 + 0.3 + 0.5 * 1.5)) / 2
    assert clipped_loss(ratio.log(), advantages, weights, 0.2).item() == pytest.approx(expected)
    # at pi = pi_old, its gradient is that of the expected advantage
    x = logits(4).requires_grad_()
    old, advantages = x.detach().log_softmax(1), standard_advantages(REWARDS)
    (surrogate,) = torch.autograd.grad(clipped_loss(x.log_softmax(1) - old, advantages, old.exp(), 0.2), x)
    (direct,) = torch.autograd.grad(-(x.softmax(1) * advantages).sum(1).mean(), x)
    torch.testing.assert_close(surrogate, direct)


def test_kl_and_entropy():
    p, q = logits(5).double(), logits(6).double()
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    torch.testing.assert_close(kl(p, q), expected.mean())
    torch.testing.assert_close(entropy(p), torch.distributions.Categorical(logits=p).entropy().mean())


def test_scores():
    chosen = torch.tensor([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 9.0], [0.0, 0.0, 9.0]])
    found = scores(chosen, REWARDS)
    assert found["accuracy"] == 0.75 and found["greedy_reward"] == (2 + 0 + 0 + 1) / 4
    assert found["best_reward"] == 1.0 and found["persist_reward"] == 0.25
    assert [found[f"action/{a}"] for a in objectives.ACTIONS] == [0.25, 0.25, 0.5]
    assert found["expected_reward"] == pytest.approx(found["greedy_reward"], abs=1e-2)
