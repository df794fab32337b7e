"""One training loop for all worlds: many seeds side by side, the package's own estimators and losses.

Shapes: S seeds, D dialogues of a step, N rows of a step (one per dialogue and role or agent), L tokens of a row,
C cells (all that a policy can tell apart), V tokens to choose from.

Every tensor has the seeds in front. They never mix: each seed has its own generator, its own parameters, its own
group ids and its own norm of the gradient, and a loss that is a sum over rows divided by one seed's row count is a sum
of the seeds' losses. A seed's figures are therefore the same whatever other seeds run beside it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from rema_verl.algorithms.advantages import compute_role_grpo_advantage
from rema_verl.algorithms.softrankpo import compute_softrankpo_advantage
from rema_verl.algorithms.turn_clip import TurnClipOptions, compute_policy_loss_turn_clip, turn_ratios
from rema_verl.algorithms.turns import find_turns, to_tokens
from rema_verl.trainers.order import fair_order


class Noise:
    """Uniform numbers, (S, *shape), from one generator per seed."""

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def rand(self, *shape: int) -> Tensor:
        return torch.stack([torch.rand(shape, generator=generator) for generator in self.generators])

    def randn(self, *shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=generator) for generator in self.generators])

    def below(self, most: int, *shape: int) -> Tensor:
        """Integers 0 .. most - 1."""
        return (self.rand(*shape) * most).long().clamp(max=most - 1)

    def __len__(self) -> int:
        return len(self.generators)


@dataclass
class Batch:
    """What a step sampled.

    Args:
        cells, tokens: (S, N, L) int64; masked places hold 0.
        mask: (S, N, L) bool, True for tokens that the policy sampled; its runs are the turns.
        rewards: (S, N), each row's outcome as its estimator sees it.
        group: (N,) or (S, N) int64: the rows that are compared with one another.
        role: (N,) int64, 0 or 1 (agents of a team: 0).
        length: (S, N), turns of the row's dialogue; what arrival order goes by.
        value: (S,), what is really wanted: the mean return of the step, without noise on the reward.
        seen: name -> (S,), other things worth a curve.
        state: (S, N) int64 below C, what a learned value may see.
    """

    cells: Tensor
    tokens: Tensor
    mask: Tensor
    rewards: Tensor
    group: Tensor
    role: Tensor
    length: Tensor
    value: Tensor
    seen: dict[str, Tensor] = field(default_factory=dict)
    state: Tensor | None = None


class Policy(Protocol):
    """(S, C, V) log-probabilities, and the parameters of each of the sets that can be frozen apart."""

    def table(self) -> Tensor: ...

    def parameter_sets(self) -> list[list[Tensor]]: ...


class Tables:
    """One logit per cell and token. Roles with cells of their own share nothing."""

    def __init__(self, logits: Tensor):
        self.logits = logits.clone().requires_grad_()

    def table(self) -> Tensor:
        return self.logits.log_softmax(dim=-1)

    def parameter_sets(self) -> list[list[Tensor]]:
        return [[self.logits]]


class World(Protocol):
    """What :func:`train` needs of a world; see worlds.py."""

    optimum: Tensor  # (S,) or a scalar: value of the best policy

    def start(self) -> Policy: ...

    def play(self, table: Tensor, noise: Noise) -> Batch: ...


def choose(table: Tensor, cells: Tensor, uniform: Tensor) -> Tensor:
    """Tokens drawn by inverting the distribution function: (S, C, V), (S, ...), (S, ...) -> (S, ...) int64."""
    flat = cells.reshape(len(cells), -1)
    cumulated = table.exp().cumsum(dim=-1).gather(1, flat[..., None].expand(-1, -1, table.shape[-1]))
    drawn = (uniform.reshape(flat.shape)[..., None] > cumulated).sum(dim=-1)
    return drawn.clamp(max=table.shape[-1] - 1).view(cells.shape)


def log_probs(table: Tensor, cells: Tensor, tokens: Tensor) -> Tensor:
    """(S, C, V), (S, N, L), (S, N, L) -> (S, N, L)."""
    seeds, _, width = table.shape
    flat = (cells * width + tokens).view(seeds, -1)
    return table.reshape(seeds, -1).gather(1, flat).view(cells.shape)


class ActorLike(dict):
    """The few keys of verl's actor config that a policy loss reads, as attributes and as keys."""

    __getattr__ = dict.__getitem__


@dataclass(frozen=True)
class Arm:
    """One way to train; the fields are what claims differ in. Everything else is the same in all arms of a claim.

    Args:
        loss: "turn" (turn_clip), or "token": verl's ``vanilla`` with turn_clip's weights (each turn 1, each of its
            tokens 1/length, each row 1/turns), so that ratio and clip alone differ; "token-mean": verl's default.
        ratio, agg, scale: turn_clip's options.
        estimator: "role_grpo", "dr_grpo" (no std), "softrankpo", "ppo" (learned value, whitened over the batch).
        tolerance: 0, or: rewards closer than that are tied before the estimator sees them. ``ties``: "rounded" to
            multiples of it, or "chained": each within it of the next.
        silent: rows without a token: "out" of the baseline (the package), or "zero": counted with their reward.
        updates: mini-batches of a step.
        order: "fair" (the package's), or "arrival": short dialogues first.
        alternate: steps after which the other role learns; 0: both in every step.
        lr, steps: Adam's rate, constant; training steps.
    """

    lr: float
    steps: int
    loss: str = "turn"
    ratio: str = "geometric"
    agg: str = "trajectory"
    scale: float = 1.0
    estimator: str = "role_grpo"
    tolerance: float = 0.0
    ties: str = "rounded"
    silent: str = "out"
    updates: int = 4
    order: str = "fair"
    alternate: int = 0
    clip: float = 0.2
    max_norm: float = 1.0

    @property
    def config(self) -> ActorLike:
        turn = TurnClipOptions(turn_ratio=self.ratio, turn_agg=self.agg, turn_scale=self.scale)
        clip = {"clip_ratio": self.clip, "clip_ratio_low": self.clip, "clip_ratio_high": self.clip, "clip_ratio_c": 3.0}
        return ActorLike(**clip, policy_loss=turn)


@dataclass
class Run:
    """Curves of one arm: name -> (S, steps). ``value`` is in units of the optimum."""

    curves: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.curves[name]


def tie(rewards: Tensor, group: Tensor, tolerance: float, how: str) -> Tensor:
    """(S, N) rewards, (N,) equally large groups -> rewards in which those closer than ``tolerance`` are equal.

    >>> tie(torch.tensor([[0.0, 0.04, 0.08, 1.0]]), torch.zeros(4), 0.05, "chained")
    tensor([[0., 0., 0., 1.]])
    """
    if how == "rounded":
        return ((rewards.double() / tolerance).round() * tolerance).float()
    order = group.argsort(stable=True)
    size = int((group == group[0]).sum())
    values, place = rewards[:, order].unflatten(1, (-1, size)).sort(dim=2)
    begins = values.diff(dim=2, prepend=values[..., :1] - 2 * tolerance) > tolerance
    lowest = values.masked_fill(~begins, -torch.inf).cummax(dim=2).values
    tied = torch.empty_like(values).scatter(2, place, lowest).flatten(1)
    return torch.empty_like(rewards).index_copy(1, order, tied)


def advantages(arm: Arm, batch: Batch, critic: "Critic | None") -> Tensor:
    """(S, N, L), by the package's estimators; seeds are told apart by their group ids."""
    seeds, rows, _ = batch.mask.shape
    rewards = batch.rewards.float()
    if arm.tolerance:
        rewards = tie(rewards, batch.group, arm.tolerance, arm.ties)
    if critic is not None:
        return critic.advantages(rewards, batch)[..., None] * batch.mask
    group = batch.group.expand(seeds, rows)
    group = group + torch.arange(seeds)[:, None] * (int(group.max()) + 1)
    spoke = batch.mask.any(dim=2)
    takes_part = spoke if arm.silent == "out" else torch.ones_like(spoke)
    estimate: Callable[..., Any] = compute_softrankpo_advantage
    options: dict[str, Any] = {}
    if arm.estimator != "softrankpo":
        estimate, options = compute_role_grpo_advantage, {"norm_adv_by_std_in_grpo": arm.estimator == "role_grpo"}
    # one token a row is enough: these estimators see rows
    column = rewards.reshape(-1, 1)
    found, _ = estimate(column, takes_part.reshape(-1, 1).float(), group.flatten(), options)
    return found.view(seeds, rows, 1) * batch.mask


class Critic:
    """PPO's value, one number per state, trained on the squared error with the policy's rate and mini-batches."""

    def __init__(self, seeds: int, states: int, lr: float):
        self.values = torch.zeros(seeds, states, requires_grad=True)
        self.optimiser = torch.optim.Adam([self.values], lr=lr)

    def advantages(self, rewards: Tensor, batch: Batch) -> Tensor:
        """Reward less value, whitened over each seed's rows that spoke."""
        assert batch.state is not None
        error = rewards - self.values.detach().gather(1, batch.state)
        spoke = batch.mask.any(dim=2).float()
        count = spoke.sum(dim=1, keepdim=True).clamp(min=1)
        centred = error - (error * spoke).sum(dim=1, keepdim=True) / count
        std = ((centred.square() * spoke).sum(dim=1, keepdim=True) / count).sqrt()
        return centred / (std + 1e-6)

    def update(self, rewards: Tensor, state: Tensor) -> None:
        self.optimiser.zero_grad()
        (0.5 * (rewards - self.values.gather(1, state)).square().mean(dim=1)).sum().backward()
        self.optimiser.step()


def policy_loss(arm: Arm, new: Tensor, old: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """Sum over seeds of each seed's loss of a mini-batch; all (S, n, L)."""
    seeds, rows, width = mask.shape
    flat = (seeds * rows, width)
    mask = mask.reshape(flat)
    config = arm.config
    config["global_batch_info"] = {"dp_size": 1, "global_batch_size": rows}
    inputs = {"old_log_prob": old, "log_prob": new, "advantages": advantage}
    inputs = {name: tensor.reshape(flat) for name, tensor in inputs.items()}
    if arm.loss == "turn":
        return compute_policy_loss_turn_clip(**inputs, response_mask=mask, config=config)[0]
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla

    # verl multiplies the tokens' losses by rollout_is_weights; "token-mean" divides their sum by a number it is told
    config["global_batch_info"] = {"dp_size": 1, "batch_num_tokens": 1}
    if arm.loss == "token":
        turns = find_turns(mask)
        weights = to_tokens(1.0 / (turns.length * turns.per_row[turns.row] * rows).float(), turns)
    else:  # one seed's tokens
        tokens = mask.view(seeds, -1).sum(dim=1).clamp(min=1)
        weights = (mask.view(seeds, rows, width) / tokens[:, None, None]).reshape(flat)
    return compute_policy_loss_vanilla(
        **inputs, response_mask=mask.float(), loss_agg_mode="token-mean", config=config, rollout_is_weights=weights
    )[0]


@torch.no_grad()
def clipped_share(arm: Arm, new: Tensor, old: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """(S,) share of a mini-batch's tokens whose gradient the clip takes away."""
    seeds = len(mask)
    if arm.loss == "turn":
        flat = mask.reshape(-1, mask.shape[-1])
        turns = find_turns(flat)
        ratio, _, _ = turn_ratios(new.reshape(flat.shape), old.reshape(flat.shape), turns, arm.ratio)
        ratio = to_tokens(ratio, turns).view(mask.shape)
    else:
        ratio = (new - old).clamp(-20, 20).exp()
    gone = ((advantage > 0) & (ratio > 1 + arm.clip)) | ((advantage < 0) & ((ratio < 1 - arm.clip) | (ratio > 3.0)))
    return (gone & mask).view(seeds, -1).sum(dim=1) / mask.view(seeds, -1).sum(dim=1).clamp(min=1)


@functools.cache
def fair(rows: int, updates: int, step: int) -> Tensor:
    """(n,): the package's own draw, for one worker; it depends on the step alone and so is the same for every arm."""
    return torch.tensor(fair_order([1] * rows, rows // updates, 1, step))


def order_of(arm: Arm, batch: Batch, step: int) -> Tensor:
    """(S, n): a step's rows in the order in which they are cut into mini-batches; only of the roles that learn."""
    learning = torch.arange(batch.mask.shape[1])
    if arm.alternate:  # the other role's rows train nothing, as in trainer mode rema_separate
        learning = learning[batch.role == step // arm.alternate % 2]
    if arm.order == "arrival":
        return learning[batch.length[:, learning].argsort(dim=1, stable=True)]
    return learning[fair(len(learning), arm.updates, step)].expand(len(batch.mask), -1)


def clip_norms(parameters: Sequence[Tensor], most: float) -> None:
    """verl's ``grad_clip``, each seed by itself."""
    total = sum(p.grad.reshape(len(p), -1).square().sum(dim=1) for p in parameters if p.grad is not None)
    factor = (most / (total.sqrt() + 1e-6)).clamp(max=1.0)
    for p in parameters:
        if p.grad is not None:
            p.grad.mul_(factor.view(-1, *[1] * (p.dim() - 1)))


def train(world: World, arm: Arm, seeds: Sequence[int]) -> Run:
    """Train every seed; the same start, draws and budget in all arms (a draw's outcome depends on the policy)."""
    noise = Noise([10_000 + seed for seed in seeds])
    policy = world.start()
    optimisers = [torch.optim.Adam(parameters, lr=arm.lr) for parameters in policy.parameter_sets()]
    with torch.no_grad():
        seeds_and_cells = policy.table().shape[:2]
    critic = Critic(*seeds_and_cells, arm.lr) if arm.estimator == "ppo" else None
    curves: dict[str, list[Tensor]] = {}
    for step in range(arm.steps):
        with torch.no_grad():
            table = policy.table()
            batch = world.play(table, noise)
            old = log_probs(table, batch.cells, batch.tokens)
            advantage = advantages(arm, batch, critic)
            order = order_of(arm, batch, step)
        learning = [0, 1] if not arm.alternate else [step // arm.alternate % 2]
        clipped = torch.zeros(len(noise))
        for part in order.chunk(arm.updates, dim=1):
            rows = part[..., None].expand(-1, -1, batch.mask.shape[2])
            cells, tokens, mask, before, gain = (
                tensor.gather(1, rows) for tensor in (batch.cells, batch.tokens, batch.mask, old, advantage)
            )
            new = log_probs(policy.table(), cells, tokens)
            chosen = [o for role, o in enumerate(optimisers) if len(optimisers) == 1 or role in learning]
            for optimiser in chosen:
                optimiser.zero_grad()
            policy_loss(arm, new, before, gain, mask).backward()
            for optimiser in chosen:
                clip_norms(optimiser.param_groups[0]["params"], arm.max_norm)
                optimiser.step()
            clipped += clipped_share(arm, new, before, gain, mask)
            if critic is not None:
                critic.update(batch.rewards.gather(1, part).float(), batch.state.gather(1, part))
        found = {"value": batch.value / world.optimum, "clipped": clipped / arm.updates, **batch.seen}
        if arm.order == "arrival" or arm.updates > 1:
            last = order.chunk(arm.updates, dim=1)[-1]
            found["last mini-batch's advantage"] = advantage.sum(dim=2).div(
                batch.mask.sum(dim=2).clamp(min=1)).gather(1, last).mean(dim=1)  # fmt: skip
        for name, value in found.items():
            curves.setdefault(name, []).append(value)
    return Run({name: torch.stack(values, dim=1).double() for name, values in curves.items()})


# --- figures of a curve, each (S, steps) -> (S,) ---------------------------------------------------------------------


def smooth(curve: Tensor, width: int = 5) -> Tensor:
    """Mean over the last ``width`` steps (fewer at the beginning)."""
    total = torch.cat([curve.new_zeros(len(curve), 1), curve.cumsum(dim=1)], dim=1)
    end = torch.arange(1, curve.shape[1] + 1)
    start = (end - width).clamp(min=0)
    return (total[:, end] - total[:, start]) / (end - start)


def area(curve: Tensor) -> Tensor:
    """Mean over all steps: sample efficiency."""
    return curve.mean(dim=1)


def final(curve: Tensor) -> Tensor:
    """Mean of the last tenth."""
    return curve[:, -math.ceil(curve.shape[1] / 10) :].mean(dim=1)


def worst_drop(curve: Tensor) -> Tensor:
    """How far the smoothed curve falls below its highest point so far, at worst."""
    level = smooth(curve)
    return (level.cummax(dim=1).values - level).amax(dim=1)


def steps_to(curve: Tensor, level: float = 0.9) -> Tensor:
    """First step at which the smoothed curve is at ``level``; the number of steps where it never is."""
    there = smooth(curve) >= level
    return torch.where(there.any(dim=1), there.int().argmax(dim=1), curve.shape[1]).double()
