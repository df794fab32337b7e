"""MPDF's own setting: rewards of all K actions in every state, collected beforehand, and the package's losses on them.

Shapes: S seeds, X states, K actions, R rewards collected per state and action.

States: X = 32, of which the policy (one logit per state and action, from uniform) can tell all apart. Actions: K, of
quality uniform in [0, 1]. Rewards are collected 8 times each and disturbed as in :class:`.worlds.Team` (here the noise
of one state's actions is independent, and "rescaled" has a factor for each collected vector). "partial": one action is
right with 0.3 (reward 1), one gets 0.01 for trying, the others 0. The best policy takes the best action of each state;
figures are exact, without sampling.

Why objectives can differ: SoftRankPO averages normal quantiles of ranks, GRPO z-scores, PPO sees one drawn action and
a learned value.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rema_verl.deliberation import objectives
from rema_verl.deliberation.train import Options

from .learning import Noise, Run
from .worlds import student

STATES, COLLECTED = 32, 8


def collect(seeds: Sequence[int], kind: str, actions: int) -> tuple[Tensor, Tensor]:
    """(S, X, K) qualities, and (S, X, R, K) collected rewards."""
    noise = Noise(seeds)
    quality = noise.rand(STATES, actions)
    if kind == "partial":
        order = quality.argsort(dim=-1).argsort(dim=-1)
        quality = torch.where(order == 0, 0.3, torch.where(order == 1, 0.01, 0.0))
    shape = (STATES, COLLECTED, actions)
    reward = quality[:, :, None] + 0.1 * noise.randn(*shape)
    if kind == "rescaled":
        reward = reward * 10 ** (4 * noise.rand(STATES, COLLECTED, 1) - 2)
    elif kind == "exponential":
        reward = (10 * reward).exp()
    elif kind == "heavy-tailed":
        reward = reward + 0.3 * student(noise, *shape)
    elif kind == "tied":
        reward = (2 * reward).round() / 2
    elif kind == "partial":
        tried = (quality == 0.01)[:, :, None]
        reward = torch.where(tried, 0.01, (noise.rand(*shape) < quality[:, :, None]).float())
    return quality, reward


def train(
    seeds: Sequence[int], kind: str, actions: int, stage: str, lr: float, tolerance: float = 0.0, epochs: int = 20
) -> Run:
    """Stage 2 on tables, with the defaults of ``rema_verl.deliberation.train`` but for rate and batch size (those are
    for a network and thousands of states).

    Returns:
        Curves of the exact return per epoch, of drawn ("value") and of likeliest actions, in units of the best.
    """
    options = Options(stage=stage, lr=lr, batch_size=64, epochs=epochs)
    quality, rewards = collect(seeds, kind, actions)
    if tolerance:
        rewards = (rewards / tolerance).round() * tolerance
    count, rows = len(seeds), STATES * COLLECTED
    rewards = rewards.reshape(count, rows, actions)
    state = torch.arange(STATES).repeat_interleave(COLLECTED)
    flat = rewards.reshape(-1, actions)
    make = {"softrankpo": objectives.rank_advantages, "grpo": objectives.standard_advantages}.get(stage, Tensor.float)
    target = make(flat).view(rewards.shape)
    logits = torch.zeros(count, STATES, actions, requires_grad=True)
    values = torch.zeros(count, STATES, requires_grad=True)
    noise, reference = Noise([10_000 + seed for seed in seeds]), torch.zeros(count, STATES, actions)
    optimiser = torch.optim.Adam([logits, values], lr=lr)
    batches = -(-rows // options.batch_size)
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / (options.epochs * batches))
    curves: dict[str, list[Tensor]] = {"value": [], "likeliest": []}
    best = quality.amax(dim=2).mean(dim=1)

    def pick(tensor: Tensor, index: Tensor) -> Tensor:
        """(S, rows, ...) at (S, b) -> (S * b, ...)."""
        return torch.stack([t[i] for t, i in zip(tensor, index, strict=True)]).flatten(0, 1)

    for _ in range(options.epochs):
        with torch.no_grad():
            old = logits.log_softmax(dim=2)[:, state]
        drawn = (noise.rand(rows, 1) > old.exp().cumsum(dim=2)).sum(dim=2, keepdim=True).clamp(max=actions - 1)
        for index in noise.rand(rows).argsort(dim=1).split(options.batch_size, dim=1):
            now, ref = pick(logits[:, state], index), pick(reference[:, state], index)
            goal, before = pick(target, index), pick(old, index)
            if stage == "softrankpo":
                loss = objectives.softrankpo_loss(now, ref, goal, options.beta)
            else:
                log_ratio = now.log_softmax(dim=1) - before
                weights = before.exp()
                if stage == "ppo":
                    action = pick(drawn, index)
                    error = goal.gather(1, action) - pick(values[:, state], index)[:, None]
                    whole = error.detach().view(count, -1)
                    whole = whole - whole.mean(dim=1, keepdim=True)
                    goal = (whole / (whole.square().mean(dim=1, keepdim=True).sqrt() + 1e-6)).view(-1, 1)
                    log_ratio, weights = log_ratio.gather(1, action), torch.ones_like(goal)
                loss = objectives.clipped_loss(log_ratio, goal, weights, options.clip)
                loss = loss + options.beta * objectives.kl(now, ref)
                if stage == "ppo":
                    loss = loss + 0.5 * error.square().mean()
            optimiser.zero_grad()
            (loss * count).backward()
            optimiser.step()
            decay.step()
        with torch.no_grad():
            drawn_return = (logits.softmax(dim=2) * quality).sum(dim=2)
            likeliest = quality.gather(2, logits.argmax(dim=2, keepdim=True))[..., 0]
            for name, value in (("value", drawn_return), ("likeliest", likeliest)):
                curves[name].append(value.mean(dim=1) / best)
    return Run({name: torch.stack(values, dim=1).double() for name, values in curves.items()})
