"""SoftRankPO (MPDF, arXiv 2509.03817, Eq. 2-4): rank -> normal quantile -> standardise, within a group.

Shapes: B rows, L response tokens, G groups, K members of one group.

Only the order of the rewards inside a group matters, so no increasing transform of them changes an advantage. That cuts
both ways: where nobody succeeds, a reward of 0.01 for trying ranks as high above 0 as a success does, and training
follows it (docs/claims.md, "Crumbs"). ``tie_tolerance``, which is ours, takes rewards that close for one.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from rema_verl.algorithms.advantages import group_numbers, read_options, read_rows


def _check_options(tau: float, eps: float, tie_tolerance: float) -> None:
    if not (tau > 0 and math.isfinite(tau)):
        raise ValueError(f"softrankpo's tau must be a positive number, got {tau!r}")
    if not eps > 0:
        raise ValueError(f"softrankpo's eps must be a positive number, got {eps!r}")
    if not (tie_tolerance >= 0 and math.isfinite(tie_tolerance)):
        raise ValueError(f"softrankpo's tie_tolerance must be 0 or a positive number, got {tie_tolerance!r}")


def softrank_advantage(
    rewards: torch.Tensor,
    group_index: Sequence[Hashable],
    tau: float = 0.5,
    eps: float = 1e-6,
    tie_tolerance: float = 0.0,
) -> torch.Tensor:
    """(B,) rewards -> (B,) advantages. For a group of K:

        p = ((rank + 1/2) / K) ** tau,   a = normal quantile of p,   (a - mean of a) / (population std of a + eps)

    Ranks ascend from 0; ties share the mean of their ranks, which is also what makes the result independent of how
    often every member is repeated (several rows per trajectory). A group that is tied throughout, or has one member,
    gives exactly 0. Computed in float64.

    Args:
        rewards: (B,), any real dtype, finite.
        group_index: (B,) hashable group ids, in any order.
        tau: skews the quantiles towards high ranks (below 1: towards low ranks).
        eps: added to the std.
        tie_tolerance: in units of the reward; a reward is tied with the next lower one of its group where it is at most
            this much above it, so a chain of such steps is one tie. Above 0 the result depends on the rewards' scale.

    Returns:
        (B,) in the rewards' dtype; float32 for half precision and integers.

    Raises:
        ValueError: shapes that do not match, a reward that is not finite, ``tau`` or ``eps`` not positive, a
            negative tolerance.

    Example, a group of three and one of one; neither the size nor the spacing of the rewards matters::

        >>> softrank_advantage(torch.tensor([0.0, 1.0, 1000.0, 5.0]), ["a", "a", "a", "b"], tau=1.0)
        tensor([-1.2247,  0.0000,  1.2247,  0.0000])

    One success, one attempt that got 0.01, two failures, without a tolerance and with one::

        >>> for tolerance in (0.0, 0.05):
        ...     softrank_advantage(torch.tensor([1.0, 0.01, 0.0, 0.0]), ["a"] * 4, tie_tolerance=tolerance)
        tensor([ 1.4782,  0.3584, -0.9183, -0.9183])
        tensor([ 1.7320, -0.5773, -0.5773, -0.5773])
    """
    _check_options(tau, eps, tie_tolerance)
    if rewards.dim() != 1 or len(rewards) != len(group_index):
        raise ValueError(
            f"rewards must have shape (rows,) with one group id each, got {tuple(rewards.shape)} and {len(group_index)}"
        )
    finite = rewards.isfinite()
    if not finite.all():
        row = int((~finite).nonzero()[0, 0])
        raise ValueError(f"rewards must be finite, but row {row} (group {group_index[row]!r}) holds {rewards[row]}")
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    group, num_groups = group_numbers(group_index, rewards.device)
    if not num_groups:
        return rewards.to(dtype)

    # Sorted by group and, inside it, by reward: a group is one stretch, and the members of a tie are neighbours.
    order = rewards.argsort()
    order = order[group[order].argsort(stable=True)]
    group, rewards = group[order], rewards[order]
    size = torch.bincount(group, minlength=num_groups)
    starts_tie = torch.ones_like(group, dtype=torch.bool)
    apart = rewards[1:] != rewards[:-1]
    if tie_tolerance:
        apart &= rewards.double().diff() > tie_tolerance
    starts_tie[1:] = apart | (group[1:] != group[:-1])
    tie = starts_tie.cumsum(0) - 1
    tie_size = torch.bincount(tie)
    # Of a tie at places f .. f+n-1 of the sorted batch the mean rank is f + (n-1)/2 less the group's own first place.
    tie_rank = tie_size.cumsum(0) - tie_size + (tie_size - 1).double() / 2
    rank = tie_rank[tie] - (size.cumsum(0) - size)[group]

    # The bounds only matter for a tau so extreme that p rounds to 0 or 1, where the quantile is infinite.
    p = ((rank + 0.5) / size[group]).pow(tau).clamp(torch.finfo(torch.float64).tiny, 1 - torch.finfo(torch.float64).eps)
    quantile = torch.special.ndtri(p)
    mean = quantile.new_zeros(num_groups).index_add(0, group, quantile) / size
    centred = quantile - mean[group]
    # The mean of equal numbers may differ from them in the last bit, and std + eps is tiny there.
    centred = centred.masked_fill(tie_size[tie] == size[group], 0.0)
    std = (quantile.new_zeros(num_groups).index_add(0, group, centred.square()) / size).sqrt()
    advantages = torch.empty_like(centred)
    advantages[order] = centred / (std[group] + eps)
    return advantages.to(dtype)


def compute_softrankpo_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: Sequence[Hashable],
    config: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SoftRankPO advantages of the rows' summed rewards, on every valid token.

    Args:
        token_level_rewards: (B, L); a row's reward is their sum.
        response_mask: (B, L). Rows without a valid token take no part and get 0.
        index: (B,) hashable group ids; in trainer mode ``rema`` one per (prompt, role).
        config: verl's algorithm config. Read: ``softrankpo.tau`` (0.5), ``.eps`` (1e-6) and ``.tie_tolerance`` (0).

    Returns:
        Advantages and returns, one (B, L) tensor twice, as verl's ``grpo``.

    Raises:
        ValueError: see :func:`rema_verl.algorithms.advantages.read_rows`; an unknown or impossible option.

    Example, three rows of one group with four valid tokens in all::

        >>> rewards, mask = torch.tensor([[0.0, 9.0], [0.0, 1.0], [2.0, 0.0]]), torch.tensor([[1, 1], [0, 1], [1, 0]])
        >>> compute_softrankpo_advantage(rewards, mask, ["p", "p", "p"], {"softrankpo": {"tau": 1.0}})[0]
        tensor([[ 1.2247,  1.2247],
                [-0.0000, -1.2247],
                [ 0.0000,  0.0000]])
    """
    options = read_options(config, "softrankpo", {"tau": 0.5, "eps": 1e-6, "tie_tolerance": 0.0})
    rewards, takes_part, index = read_rows(token_level_rewards, response_mask, index)
    advantages = torch.zeros_like(rewards)
    advantages[takes_part] = softrank_advantage(rewards[takes_part], index, **options).to(rewards.dtype)
    advantages = advantages[:, None] * response_mask
    return advantages, advantages


def rank_matching_loss(log_ratio: torch.Tensor, advantage: torch.Tensor, beta: float) -> torch.Tensor:
    """MPDF's Eq. 4: regression of centred implicit rewards on centred advantages, a scalar.

        mean over states of  1/K sum_i (beta l_i - mean_j beta l_j - A_i + mean_j A_j)^2,   l = log(pi / pi_ref)

    Over policies on the K candidates its only minimiser is pi = pi_ref exp(A / beta) / Z (the loss is then 0). Eq. 4
    prints the raw reward for A and calls it the ranked one; only the latter is independent of the rewards' scale.

    Args:
        log_ratio: (..., K), nats; candidates last, any number of states before them.
        advantage: (..., K), from :func:`softrank_advantage`; no gradient flows into it.
        beta: positive; the strength of the pull towards pi_ref.

    Raises:
        ValueError: shapes that differ, ``beta`` <= 0.

    Example, one state with four candidates: a policy with l = A, and one that still is pi_ref::

        >>> advantage = torch.tensor([[-1.0, 0.0, 0.0, 1.0]])
        >>> rank_matching_loss(advantage, advantage, 1.0), rank_matching_loss(torch.zeros(1, 4), advantage, 1.0)
        (tensor(0.), tensor(0.5000))
    """
    if log_ratio.shape != advantage.shape or log_ratio.dim() == 0:
        raise ValueError(
            f"log_ratio and advantage must have one shape (..., candidates), got {tuple(log_ratio.shape)} and "
            f"{tuple(advantage.shape)}"
        )
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta!r}")
    difference = beta * log_ratio - advantage.detach()
    return (difference - difference.mean(dim=-1, keepdim=True)).square().mean()
