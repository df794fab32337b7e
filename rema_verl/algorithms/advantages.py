"""Advantage estimators ``role_grpo`` and ``turn_reinforce_plus_plus``, and what every estimator of ours shares.

Shapes: B rows, L response tokens, T turns of one row, N turns of all rows together, G groups.

verl calls an estimator with token_level_rewards (B, L), response_mask (B, L), index (B,) and the algorithm's config,
and with nothing else. In trainer mode ``rema`` the index of a row is :func:`role_index`, so a group is one role of one
prompt; everywhere else it is the plain prompt uid, the role is unknown, and a group is a prompt.

A row with no valid token (verl's padding rows; a role that never spoke) takes no part in any statistic and gets 0.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch

from rema_verl.algorithms.turns import find_turns, sum_per_span, to_tokens
from rema_verl.dialogue import ROLES


def role_index(uid: str, role: str) -> str:
    """The index of a row that knows its role.

    >>> role_index("7f3a", "reasoning")
    '7f3a@reasoning'
    """
    if role not in ROLES:
        raise ValueError(f"role must be one of {list(ROLES)}, got {role!r}")
    return f"{uid}@{role}"


def role_of(index: Hashable) -> str | None:
    """The role in a row's index, or ``None`` where there is none.

    >>> role_of("7f3a@reasoning"), role_of("7f3a"), role_of("someone@example.org"), role_of(3)
    ('reasoning', None, None, None)
    """
    role = index.rpartition("@")[2] if isinstance(index, str) and "@" in index else None
    return role if role in ROLES else None


def as_list(index: Sequence[Hashable]) -> list[Hashable]:
    """Group ids as plain Python objects: verl passes an array, and a tensor's own elements hash by identity."""
    return index.tolist() if isinstance(index, np.ndarray | torch.Tensor) else list(index)


def group_numbers(index: Sequence[Hashable], device: torch.device | str | None = None) -> tuple[torch.Tensor, int]:
    """Any hashable group ids -> ((B,) int64 numbers 0..G-1 by first appearance, G).

    Not verl's ``as_torch_index``: that takes anything numeric for a number and rounds it.

    >>> group_numbers(["b", "a", "b", 0.5])
    (tensor([0, 1, 0, 2]), 3)
    """
    first_seen: dict[Hashable, int] = {}
    numbers = [first_seen.setdefault(i, len(first_seen)) for i in as_list(index)]
    return torch.tensor(numbers, dtype=torch.int64, device=device), len(first_seen)


def read_options(config: Any, block: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """``algorithm.<block>`` laid over its defaults; ``config`` is verl's algorithm config, or ``None``.

    Raises:
        ValueError: a key that is not among the defaults.

    >>> read_options({"softrankpo": {"tau": 0.8}}, "softrankpo", {"tau": 0.5, "eps": 1e-6})
    {'tau': 0.8, 'eps': 1e-06}
    """
    given = dict((config.get(block) if config is not None else None) or {})
    if unknown := sorted(set(given) - set(defaults)):
        raise ValueError(f"algorithm.{block} has no option {unknown}; it has {sorted(defaults)}")
    return defaults | given


def read_rows(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: Sequence[Hashable]
) -> tuple[torch.Tensor, torch.Tensor, list[Hashable]]:
    """Check an estimator's inputs and reduce them to rows.

    Returns:
        (B,) summed rewards; (B,) bool, the rows with a valid token, which alone take part; those rows' group ids.

    Raises:
        ValueError: shapes that do not match, a reward that is not finite (the message names the row and its group),
            or a batch without a single valid token.

    Example, four tokens; the second row is padding::

        >>> read_rows(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([[1, 1], [0, 0]]), ["p", "pad"])
        (tensor([1., 0.]), tensor([ True, False]), ['p'])
    """
    if response_mask.dim() != 2 or token_level_rewards.shape != response_mask.shape:
        raise ValueError(
            "token_level_rewards and response_mask must have one shape (rows, tokens), got "
            f"{tuple(token_level_rewards.shape)} and {tuple(response_mask.shape)}"
        )
    if len(index) != len(response_mask):
        raise ValueError(f"index must name a group for each of the {len(response_mask)} rows, got {len(index)}")
    index = as_list(index)
    rewards = token_level_rewards.sum(dim=1)
    finite = rewards.isfinite()  # a sum is finite only if all its terms are, and far cheaper to look at
    if not finite.all():
        row = int((~finite).nonzero()[0, 0])
        raise ValueError(f"rewards must be finite, but those of row {row} (index {index[row]!r}) sum to {rewards[row]}")
    # amax, not any: several times faster over the tokens.
    takes_part = response_mask.amax(dim=1) > 0 if response_mask.numel() else torch.zeros_like(finite)
    if not takes_part.any():
        raise ValueError(f"response_mask marks no valid token in any of the {len(index)} rows; expected at least one")
    return rewards, takes_part, [i for i, use in zip(index, takes_part.tolist(), strict=True) if use]


def grpo_advantage(
    scores: torch.Tensor,
    group_index: Sequence[Hashable],
    *,
    norm_by_std: bool = True,
    eps: float = 1e-6,
) -> torch.Tensor:
    """(B,) scores -> (B,) group-relative advantages, verl's GRPO: (score - mean) / (unbiased std + eps).

    As in verl, a group of one keeps its score (mean 0, std 1). Computed in float64, so that equal scores give exactly
    0 (in float32 the rounding of their mean, divided by eps, does not).

    Args:
        scores: (B,), one outcome per row.
        group_index: (B,) hashable group ids.
        norm_by_std: ``False``: only subtract the mean (Dr. GRPO).
        eps: in units of the score.

    Example, a group of three and a group of one::

        >>> grpo_advantage(torch.tensor([1.0, 0.0, 2.0, 5.0]), ["a", "a", "a", "b"])
        tensor([ 0.0000, -1.0000,  1.0000,  5.0000])
    """
    if scores.dim() != 1 or len(scores) != len(group_index):
        raise ValueError(
            f"scores must have shape (rows,) with one group id each, got {tuple(scores.shape)} and {len(group_index)}"
        )
    group, num_groups = group_numbers(group_index, scores.device)
    values = scores.double()
    per_group = values.new_zeros(num_groups)
    count = per_group.index_add(0, group, torch.ones_like(values))
    alone = count == 1
    mean = (per_group.index_add(0, group, values) / count).masked_fill(alone, 0.0)
    centred = values - mean[group]
    # Equal scores have a mean that may differ from them in the last bit.
    lowest = per_group.scatter_reduce(0, group, values, "amin", include_self=False)
    highest = per_group.scatter_reduce(0, group, values, "amax", include_self=False)
    centred = centred.masked_fill(((lowest == highest) & ~alone)[group], 0.0)
    if norm_by_std:
        variance = per_group.index_add(0, group, centred.square()) / (count - 1)
        centred = centred / (variance.sqrt().masked_fill(alone, 1.0)[group] + eps)
    return centred.to(scores.dtype)


def compute_role_grpo_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: Sequence[Hashable],
    config: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GRPO per (prompt, role) (ReMA, Sec. 3.3): numerically verl's ``grpo`` inside each group.

    Where the index carries no role, groups are prompts. A trajectory that brings several rows with one reward (the
    ``rema`` loop under verl's sync trainer: two) would then be counted several times by the unbiased std;
    :func:`rema_verl.compat.role_grpo_per_session` has verl count it once, as it does for ``grpo``.

    Args:
        token_level_rewards: (B, L); a row's score is their sum.
        response_mask: (B, L).
        index: (B,), see the module's head.
        config: verl's algorithm config. Read: ``norm_adv_by_std_in_grpo``.

    Returns:
        Advantages and returns, one (B, L) tensor twice, as verl's ``grpo``.

    Raises:
        ValueError: see :func:`read_rows`.

    Example, two roles of one prompt, two trajectories of two tokens each::

        >>> rewards = torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, 0.0], [0.0, 2.0]])
        >>> index = [role_index("p", role) for role in ("meta_thinking", "meta_thinking", "reasoning", "reasoning")]
        >>> mask = torch.tensor([[1, 1], [0, 1], [1, 1], [1, 1]])
        >>> compute_role_grpo_advantage(rewards, mask, index, {"norm_adv_by_std_in_grpo": False})[0].tolist()
        [[-1.0, -1.0], [0.0, 1.0], [-1.0, -1.0], [1.0, 1.0]]
    """
    norm_by_std = True if config is None else config.get("norm_adv_by_std_in_grpo", True)
    scores, takes_part, index = read_rows(token_level_rewards, response_mask, index)
    advantages = torch.zeros_like(scores)
    advantages[takes_part] = grpo_advantage(scores[takes_part], index, norm_by_std=norm_by_std)
    advantages = advantages[:, None] * response_mask
    return advantages, advantages


def turn_returns(token_level_rewards: torch.Tensor, response_mask: torch.Tensor, gamma_turn: float = 1.0):
    """Each turn's discounted return, on every token of the turn; (B, L), 0 on masked tokens.

    The reward of a turn is everything between its first token and the next turn's (a row's first turn also takes what
    lies before it), so a reward on a masked token is not lost. Its return is its reward plus ``gamma_turn`` times the
    row's next turn's return: discounted per turn, not per token.

    Example, two turns with rewards 1 and 4 (2 of it on a masked token)::

        >>> turn_returns(torch.tensor([[0.0, 1.0, 0.0, 2.0, 2.0]]), torch.tensor([[1, 1, 0, 1, 0]]), gamma_turn=0.5)
        tensor([[3., 3., 0., 4., 0.]])
    """
    turns = find_turns(response_mask)
    reward = sum_per_span(token_level_rewards, turns)
    if not turns.num:
        return torch.zeros_like(token_level_rewards)
    # (B, T) holds each row's turns from column 0; T is the longest row's number of turns.
    place = torch.arange(turns.num, device=reward.device) - (turns.per_row.cumsum(0) - turns.per_row)[turns.row]
    returns = reward.new_zeros(len(turns.per_row), int(turns.per_row.max()) + 1)
    returns[turns.row, place] = reward
    for t in range(returns.shape[1] - 2, -1, -1):
        returns[:, t] += gamma_turn * returns[:, t + 1]
    return to_tokens(returns[turns.row, place], turns)


def compute_turn_reinforce_plus_plus_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: Sequence[Hashable] | None = None,
    config: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """REINFORCE++ (arXiv 2501.03262) with turns as steps: turn returns, whitened over each role's valid tokens.

    The baseline is the mean of the role's returns over tokens, as in verl's ``reinforce_plus_plus``: it knows nothing
    of a trajectory's number of turns, and with ``gamma_turn=1`` and an outcome reward neither do the returns.

    Args:
        token_level_rewards: (B, L); a turn's reward anywhere inside it, usually on its last token.
        response_mask: (B, L).
        index: (B,), see the module's head; rows without a role, or no index at all, are whitened together.
        config: verl's algorithm config. Read: ``turn_reinforce_plus_plus.gamma_turn`` (1.0), discount per turn.

    Returns:
        Advantages (B, L), and the returns before whitening (B, L); both 0 on masked tokens.

    Raises:
        ValueError: see :func:`read_rows`; an unknown option, ``gamma_turn`` outside [0, 1].

    Example, two rows of one turn each and four tokens in all; the one with two tokens weighs double in the mean::

        >>> rewards, mask = torch.tensor([[0.0, 0.0, 1.0], [4.0, 0.0, 0.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
        >>> advantages, returns = compute_turn_reinforce_plus_plus_advantage(rewards, mask)
        >>> returns
        tensor([[1., 1., 1.],
                [4., 0., 0.]])
        >>> advantages
        tensor([[-0.5000, -0.5000, -0.5000],
                [ 1.5000,  0.0000,  0.0000]])
    """
    gamma_turn = read_options(config, "turn_reinforce_plus_plus", {"gamma_turn": 1.0})["gamma_turn"]
    if not 0 <= gamma_turn <= 1:
        raise ValueError(f"algorithm.turn_reinforce_plus_plus.gamma_turn must be in [0, 1], got {gamma_turn}")
    index = [None] * len(response_mask) if index is None else as_list(index)
    read_rows(token_level_rewards, response_mask, index)
    returns = turn_returns(token_level_rewards, response_mask, gamma_turn)

    valid = response_mask.bool()
    role = torch.tensor([ROLES.index(r) if (r := role_of(i)) else len(ROLES) for i in index], device=returns.device)
    advantages = torch.zeros_like(returns)
    for number in range(len(ROLES) + 1):
        chosen = valid & (role == number)[:, None]
        values = returns[chosen].double()
        if not values.numel():
            continue
        # verl's masked_whiten; a single token has no variance and is its own baseline.
        variance = values.var() if values.numel() > 1 else values.new_zeros(())
        advantages[chosen] = ((values - values.mean()) * torch.rsqrt(variance + 1e-8)).to(returns.dtype)
    return advantages, returns
