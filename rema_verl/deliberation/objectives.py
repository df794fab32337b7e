"""What a meta-policy is trained on: losses over the states of a corpus.

B states, K = len(ACTIONS) actions. Every state comes with the rewards of all K actions, so nothing has to be sampled,
except where a control is defined by sampling.

========== =============================================================================================================
supervised cross-entropy to the best-reward action; ties share the target evenly (MPDF stage 1)
softrankpo Eq. 4, :func:`rema_verl.algorithms.softrankpo.rank_matching_loss` (stage 2). Its minimiser is
           pi_ref exp(A / beta) / Z with A averaged over states that look alike
expected   the same optimum as a maximum: sum_a pi(a) A(a) - beta KL(pi || pi_ref)
grpo       control. The group is the state's K actions; A = (R - mean) / (std + eps), population std; PPO's clipped
           surrogate, expected over pi_old instead of sampled, + beta KL(pi || pi_ref)
ppo        control. One action per state, drawn from pi_old; A = R - V(state), V a network of the same shape trained
           on the squared error, A whitened over the batch; clipped surrogate + beta KL(pi || pi_ref)
========== =============================================================================================================

The paper names the controls and does not define them. Here pi_old is the policy at the beginning of an epoch, which so
plays the part of a PPO iteration on the same, static states. KL is exact, over the K actions; all losses can have an
entropy bonus.
"""

import torch
from torch import Tensor

from rema_verl.algorithms.softrankpo import rank_matching_loss, softrank_advantage
from rema_verl.deliberation.protocol import ACTIONS


def best_actions(rewards: Tensor) -> Tensor:
    """(B, K) rewards -> (B, K) target distribution: even over the best actions.

    >>> best_actions(torch.tensor([[0.0, 2.0, 2.0], [0.0, 0.0, -1.0]]))
    tensor([[0.0000, 0.5000, 0.5000],
            [0.5000, 0.5000, 0.0000]])
    """
    best = (rewards == rewards.amax(dim=1, keepdim=True)).float()
    return best / best.sum(dim=1, keepdim=True)


def rank_advantages(rewards: Tensor, tau: float = 0.5, eps: float = 1e-6) -> Tensor:
    """(B, K) rewards -> (B, K) float32 SoftRankPO advantages, a group per state; all 0 where all actions tie.

    >>> rank_advantages(torch.tensor([[0.0, 5.0, 0.0], [1.0, 1.0, 1.0]]))
    tensor([[-0.7071,  1.4142, -0.7071],
            [ 0.0000,  0.0000,  0.0000]])
    """
    states = torch.arange(len(rewards)).repeat_interleave(rewards.shape[1]).tolist()
    return softrank_advantage(rewards.reshape(-1), states, tau, eps).view(rewards.shape).float()


def standard_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """(B, K) rewards -> (B, K) float32: (R - mean) / (population std + eps) of each state's actions (GRPO).

    >>> standard_advantages(torch.tensor([[0.0, 5.0, 0.0], [1.0, 1.0, 1.0]]))
    tensor([[-0.7071,  1.4142, -0.7071],
            [ 0.0000,  0.0000,  0.0000]])
    """
    centred = rewards.double() - rewards.double().mean(dim=1, keepdim=True)
    return (centred / (centred.square().mean(dim=1, keepdim=True).sqrt() + eps)).float()


def supervised_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of (B, K) logits against :func:`best_actions`, a scalar."""
    return -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()


def softrankpo_loss(logits: Tensor, reference: Tensor, advantages: Tensor, beta: float) -> Tensor:
    """Eq. 4 over (B, K) logits of the policy and of the frozen reference, a scalar."""
    return rank_matching_loss(logits.log_softmax(dim=1) - reference.log_softmax(dim=1), advantages, beta)


def expected_loss(logits: Tensor, reference: Tensor, advantages: Tensor, beta: float) -> Tensor:
    """-(sum_a pi(a) A(a) - beta KL(pi || pi_ref)), mean over states. Same optimum as :func:`softrankpo_loss`."""
    return -(logits.softmax(dim=1) * advantages).sum(dim=1).mean() + beta * kl(logits, reference)


def clipped_loss(log_ratio: Tensor, advantages: Tensor, weights: Tensor, clip: float) -> Tensor:
    """PPO's surrogate, negated: -sum_a w min(r A, clamp(r, 1 - clip, 1 + clip) A), r = exp(log_ratio), mean over B.

    All (B, actions). ``weights`` are pi_old's probabilities for an expectation, 1 for one drawn action.

    >>> clipped_loss(torch.tensor([[1.5, 0.5]]).log(), torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, 0.5]]), 0.2)
    tensor(-0.2000)
    """
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -(weights * surrogate).sum(dim=1).mean()


def kl(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(pi || pi_ref) in nats, mean over states."""
    log_p = logits.log_softmax(dim=1)
    return (log_p.exp() * (log_p - reference.log_softmax(dim=1))).sum(dim=1).mean()


def entropy(logits: Tensor) -> Tensor:
    """Entropy of (B, K) logits in nats, mean over states."""
    log_p = logits.log_softmax(dim=1)
    return -(log_p.exp() * log_p).sum(dim=1).mean()


def scores(logits: Tensor, rewards: Tensor) -> dict[str, float]:
    """How good a policy is on states with known rewards (B, K).

    Returns:
        ``accuracy``: share of states whose likeliest action is one of the best; ``greedy_reward`` and
        ``expected_reward``: mean reward of the likeliest action and of a drawn one; ``best_reward`` and
        ``persist_reward`` for comparison; ``action/<name>``: share of states whose likeliest action it is.
    """
    greedy = logits.argmax(dim=1, keepdim=True)
    rewards, p = rewards.double(), logits.double().softmax(dim=1)
    found = {
        "accuracy": (best_actions(rewards).gather(1, greedy) > 0).double().mean(),
        "greedy_reward": rewards.gather(1, greedy).mean(),
        "expected_reward": (p * rewards).sum(dim=1).mean(),
        "best_reward": rewards.amax(dim=1).mean(),
        "persist_reward": rewards[:, 0].mean(),
        **{f"action/{name}": (greedy == k).double().mean() for k, name in enumerate(ACTIONS)},
    }
    return {name: float(value) for name, value in found.items()}
