"""A world of deliberation that is known completely, so that the best policy can be computed and not only trained.

Three agents, three possible answers (one right), five confidences, one round. An agent's answer is right with its own
``accuracy``; its confidence depends on nothing but whether the answer is right (``confidence``). Refine mends a wrong
answer or breaks a right one with known probabilities, and gets a new confidence; Concede adopts the most confident
peer's answer and confidence. The other agents act uniformly at random, in the corpus and in the exact figures alike.

The return of a policy is the expected reward (:func:`rema_verl.deliberation.protocol.rewards`) of one agent, drawn
uniformly, that acts by it. Exactly, without sampling:

    Q(s, i, a)   from the 15^3 joint states s (answer x confidence, per agent), all outcomes enumerated
    the best     sum over what agent i can see, in no order of its peers, of P(seen) max_a E[Q | seen]

    python tests/deliberation/simulator.py        # the table of stages, worlds and disturbed rewards, three seeds
"""

import copy
import functools
import itertools
import random
from dataclasses import dataclass

import numpy as np
import torch

from rema_verl.deliberation.corpus import States
from rema_verl.deliberation.policy import MetaPolicy, collate
from rema_verl.deliberation.protocol import (
    ACTIONS,
    CONCEDE,
    PERSIST,
    REFINE,
    VERDICTS,
    AgentState,
    Profile,
    action_rewards,
    adopted_peer,
    rewards,
)
from rema_verl.deliberation.state import LAYOUT, team_features
from rema_verl.deliberation.train import Options, train

N = 3  # agents
RIGHT, *WRONG = range(3)  # answers
LEVELS = tuple(i / (len(VERDICTS) - 1) for i in range(len(VERDICTS)))
SEATS = [(answer, level) for answer in (RIGHT, *WRONG) for level in range(len(LEVELS))]  # one agent's state
JOINT = list(itertools.product(range(len(SEATS)), repeat=N))
NAMES = list(itertools.permutations(("1", "2", "3")))  # how the three answers may be written; says nothing
SHAPE = len(LAYOUT)
PROFILE = Profile(steps=3, operators=("arithmetic",), confidence=0.5, malformed=False)


@dataclass(frozen=True)
class World:
    """``confidence_right[k]`` = P(level k | the answer is right); ``confidence_wrong`` likewise."""

    accuracy: tuple[float, float, float] = (0.5, 0.6, 0.7)
    confidence_right: tuple[float, ...] = (0.02, 0.05, 0.13, 0.30, 0.50)
    confidence_wrong: tuple[float, ...] = (0.50, 0.30, 0.13, 0.05, 0.02)
    mends: float = 0.3  # P(right after Refine | wrong before); else the answer stays
    breaks: float = 0.1  # P(wrong after Refine | right before), either wrong answer

    def seat(self, answer: int, level: int) -> float:
        """P(level | answer)."""
        return (self.confidence_right if answer == RIGHT else self.confidence_wrong)[level]

    def refined(self, answer: int) -> dict[int, float]:
        """Answer after Refine -> probability."""
        if answer == RIGHT:
            return {RIGHT: 1 - self.breaks, **dict.fromkeys(WRONG, self.breaks / len(WRONG))}
        return {RIGHT: self.mends, answer: 1 - self.mends}


FLAT = (0.2,) * 5
WORLDS = {
    "informative": World(),
    "uninformative": World(confidence_right=FLAT, confidence_wrong=FLAT),
    # any answer is as likely as any other, however many give it, and Refine breaks more than it mends
    "nothing to gain": World(
        confidence_right=FLAT, confidence_wrong=FLAT, mends=0.05, breaks=0.5, accuracy=(1 / 3, 1 / 3, 1 / 3)
    ),
    "overconfident": World(  # surer when wrong
        confidence_right=(0.35, 0.25, 0.2, 0.1, 0.1), confidence_wrong=(0.1, 0.1, 0.2, 0.25, 0.35)
    ),
}


def conceded(seats: tuple[tuple[int, int], ...], i: int) -> tuple[int, int]:
    return seats[adopted_peer([LEVELS[level] for _, level in seats], i)]


# --- exact figures --------------------------------------------------------------------------------------------------


@functools.cache
def outcome_table() -> np.ndarray:
    """(N, 15, 15, 15): agent i's reward after a round, less what it had before; for every joint state after it."""
    table = np.zeros((N, *(len(SEATS),) * N))
    for joint in JOINT:
        answers, levels = zip(*(SEATS[seat] for seat in joint), strict=True)
        correct = [answer == RIGHT for answer in answers]
        found = rewards([False] * N, [str(a) for a in answers], correct, [LEVELS[k] for k in levels], str.__eq__)
        table[(slice(None), *joint)] = found
    return table


@functools.cache
def seen() -> np.ndarray:
    """(joint, N) numbers of what agent i sees: its confidence, and of its peers, in no order, their confidences and
    whether they agree with it and with each other."""
    numbers: dict[tuple, int] = {}
    found = np.zeros((len(JOINT), N), dtype=np.int64)
    for s, joint in enumerate(JOINT):
        seats = [SEATS[seat] for seat in joint]
        for i, (answer, level) in enumerate(seats):
            (a, k), (b, m) = (seats[j] for j in range(N) if j != i)
            view = (level, a == b, tuple(sorted([(k, a == answer), (m, b == answer)])))
            found[s, i] = numbers.setdefault(view, len(numbers))
    return found


@functools.cache
def exact(world: World) -> tuple[np.ndarray, np.ndarray]:
    """P(s) (joint,) and Q(s, i, a) (joint, N, K)."""
    p = np.array(
        [
            np.prod(
                [
                    (right if answer == RIGHT else (1 - right) / len(WRONG)) * world.seat(answer, level)
                    for (answer, level), right in zip((SEATS[seat] for seat in joint), world.accuracy, strict=True)
                ]
            )
            for joint in JOINT
        ]
    )
    after = np.zeros((len(JOINT), N, len(ACTIONS), len(SEATS)))  # P(own seat after the action)
    for s, joint in enumerate(JOINT):
        seats = tuple(SEATS[seat] for seat in joint)
        for i, seat in enumerate(joint):
            after[s, i, 0, seat] = 1
            for answer, chance in world.refined(SEATS[seat][0]).items():
                for level in range(len(LEVELS)):
                    after[s, i, 1, SEATS.index((answer, level))] += chance * world.seat(answer, level)
            after[s, i, 2, SEATS.index(conceded(seats, i))] = 1
    others = after.mean(axis=2)  # they act uniformly
    q = np.zeros((len(JOINT), N, len(ACTIONS)))
    for i in range(N):
        j, k = (x for x in range(N) if x != i)
        table = np.moveaxis(outcome_table()[i], i, 0)  # own seat first, the others in order
        q[:, i] = np.einsum("sax,sy,sz,xyz->sa", after[:, i], others[:, j], others[:, k], table, optimize=True)
    before = np.array([[SEATS[seat][0] == RIGHT for seat in joint] for joint in JOINT])
    return p, q - before[:, :, None]


def best_return(world: World) -> float:
    """Of the best policy that sees what an agent sees."""
    p, q = exact(world)
    sums = np.zeros((seen().max() + 1, len(ACTIONS)))
    np.add.at(sums, seen(), p[:, None, None] * q / N)
    return float(sums.max(axis=1).sum())


def constant_return(world: World, action: str) -> float:
    """Of the policy that always takes this action."""
    p, q = exact(world)
    return float((p[:, None] * q[:, :, ACTIONS.index(action)] / N).sum())


@functools.cache
def all_states() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of agent i in every joint state under one way of writing the answers, changing from state to state."""
    teams, agents = [], []
    for s, joint in enumerate(JOINT):
        rows = show([SEATS[seat] for seat in joint], NAMES[s % len(NAMES)])
        teams += [rows] * N
        agents += range(N)
    return collate(teams, agents)


@torch.no_grad()
def policy_return(world: World, policy: MetaPolicy, greedy: bool = True) -> float:
    """Of a meta-policy, exact."""
    p, q = exact(world)
    logits = policy(*all_states()).view(len(JOINT), N, len(ACTIONS)).double()
    chosen = logits.argmax(-1).eq(torch.arange(len(ACTIONS))[:, None, None]).permute(1, 2, 0) if greedy else None
    chance = chosen.double() if greedy else logits.softmax(-1)
    return float((p[:, None, None] * q * chance.numpy()).sum() / N)


# --- a corpus of it -------------------------------------------------------------------------------------------------


def show(seats: list[tuple[int, int]], names: tuple[str, ...]) -> list[list[float]]:
    """The features of a team."""
    states = [
        AgentState(names[answer], PROFILE, tuple(float(k == level) for k in range(len(LEVELS))), LEVELS[level])
        for answer, level in seats
    ]
    return team_features(states, str.__eq__)


def collect(world: World, trajectories: int, seed: int) -> list[dict]:
    """Rows as ``corpus.append_shard`` takes them: every agent's state with the rewards of all actions."""
    draw = random.Random(seed)

    def level_of(answer: int) -> int:
        return draw.choices(range(len(LEVELS)), [world.seat(answer, k) for k in range(len(LEVELS))])[0]

    found = []
    for t in range(trajectories):
        answers = [RIGHT if draw.random() < right else draw.choice(WRONG) for right in world.accuracy]
        seats = tuple((answer, level_of(answer)) for answer in answers)
        candidates = []  # per agent and action: answer, whether it is right, confidence
        for i, (answer, _) in enumerate(seats):
            outcomes = world.refined(answer)
            new = draw.choices(list(outcomes), list(outcomes.values()))[0]
            after = {PERSIST: seats[i], REFINE: (new, level_of(new)), CONCEDE: conceded(seats, i)}
            candidates.append([(str(a), a == RIGHT, LEVELS[k]) for a, k in (after[action] for action in ACTIONS)])
        taken = [draw.randrange(len(ACTIONS)) for _ in range(N)]
        after = [candidates[i][taken[i]] for i in range(N)]
        correct = [answer == RIGHT for answer in answers]
        features = show(list(seats), NAMES[draw.randrange(len(NAMES))])
        for i in range(N):
            found.append(
                {
                    "trajectory": f"q{t}/{seed}",
                    "question_id": f"q{t}",
                    "seed": seed,
                    "round": 0,
                    "agent": i,
                    "n_agents": N,
                    "own": features[i],
                    "peers": features[:i] + features[i + 1 :],
                    "action_taken": taken[i],
                    "rewards": action_rewards(i, correct, after, candidates[i], str.__eq__),
                    "correct_before": correct[i],
                    "tokens": [0, 100, 0],
                    "prompt_tokens": [0, 200, 0],
                }
            )
    return found


def as_states(rows: list[dict]) -> States:
    """Without the way over the disk."""
    own, peers, mask = collate([[row["own"], *row["peers"]] for row in rows], [0] * len(rows))
    return States(own, peers, mask, torch.tensor([row["rewards"] for row in rows], dtype=torch.float64))


def disturb(states: States, seed: int, noise: float = 0.0, outliers: float = 0.0, size: float = 100.0) -> States:
    """Normal noise on every reward, and on a share of the states one reward that is off by ``size``, up or down."""
    draw = torch.Generator().manual_seed(seed)
    disturbed = states.rewards + noise * torch.randn(states.rewards.shape, generator=draw, dtype=torch.float64)
    hit = torch.rand(len(states), generator=draw) < outliers
    action = torch.randint(len(ACTIONS), (len(states), 1), generator=draw)
    sign = torch.randint(2, (len(states), 1), generator=draw).double() * 2 - 1
    disturbed = disturbed.scatter_add(1, action, sign * size * hit[:, None])
    return States(states.own, states.peers, states.mask, disturbed)


def first_stage(states: States, seed: int) -> MetaPolicy:
    """The supervised policy."""
    policy = MetaPolicy(seed=seed)
    train(policy, states, Options(stage="supervised", seed=seed))
    return policy


def second_stage(supervised: MetaPolicy, states: States, stage: str, seed: int) -> MetaPolicy:
    """What offline RL makes of it."""
    policy = copy.deepcopy(supervised)
    train(policy, states, Options(stage=stage, seed=seed))
    return policy


def disturbances(states: States, seed: int) -> dict[str, States]:
    """The same states with rewards as a real grader might give them."""
    return {
        "clean": states,
        "x 1000": States(states.own, states.peers, states.mask, states.rewards * 1000),
        "noise 0.5": disturb(states, seed, noise=0.5),
        "1% off by 100": disturb(states, seed, outliers=0.01),
        "both": disturb(states, seed, noise=0.5, outliers=0.01),
    }


def main(trajectories: int = 2_000, seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    print(f"{trajectories} trajectories, seeds {seeds}; exact expected return in % of the best policy's:")
    print("of the likeliest actions / of drawn ones, per seed")
    for name, world in WORLDS.items():
        best, persist = best_return(world), constant_return(world, PERSIST)
        print(
            f"\n{name}: best {best:.4f}; " + ", ".join(f"always {a} {constant_return(world, a):.4f}" for a in ACTIONS)
        )
        found: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for seed in seeds:
            for disturbance, states in disturbances(as_states(collect(world, trajectories, seed)), seed).items():
                if disturbance != "clean" and name != "informative":
                    continue
                supervised = first_stage(states, seed)
                policies = {"supervised": supervised}
                policies |= {s: second_stage(supervised, states, s, seed) for s in ("softrankpo", "grpo", "ppo")}
                for stage, policy in policies.items():
                    returns = tuple(policy_return(world, policy, greedy) for greedy in (True, False))
                    found.setdefault((disturbance, stage), []).append(returns)
        for (disturbance, stage), returns in found.items():
            shown = "   ".join(f"{100 * greedy / best:6.1f} / {100 * drawn / best:6.1f}" for greedy, drawn in returns)
            below = sum(greedy < persist for greedy, _ in returns)
            print(f"  {disturbance:14} {stage:11} {shown}   below always-persist: {below}", flush=True)


if __name__ == "__main__":
    main()
