"""SoftRankPO in a world whose best policy is known (see simulator.py, whose table has the controls beside it)."""

import random

import pytest
import simulator
import torch
from simulator import ACTIONS, PERSIST, WORLDS, as_states, best_return, collect, constant_return, policy_return

from rema_verl.deliberation.policy import MetaPolicy


def trained(name: str, trajectories: int, seed: int = 0) -> dict[str, float]:
    """Exact returns of stage 1 and of stage 2: of the likeliest actions and of drawn ones."""
    world = WORLDS[name]
    states = as_states(collect(world, trajectories, seed))
    supervised = simulator.first_stage(states, seed)
    policy = simulator.second_stage(supervised, states, "softrankpo", seed)
    found = {
        "stage 1": policy_return(world, supervised),
        "greedy": policy_return(world, policy),
        "drawn": policy_return(world, policy, greedy=False),
        "best": best_return(world),
        PERSIST: constant_return(world, PERSIST),
    }
    print(f"{name}, seed {seed}: " + ", ".join(f"{key} {value:.4f}" for key, value in found.items()))
    return found


def test_the_exact_figures_are_what_sampling_gives():
    """Q of the enumeration against the mean of sampled reward vectors: two independent ways to the same number."""
    world = WORLDS["informative"]
    rewards = torch.tensor([row["rewards"] for row in collect(world, 4_000, seed=7)], dtype=torch.float64)
    error = rewards.std(dim=0) / len(rewards) ** 0.5
    for k, action in enumerate(ACTIONS):
        assert rewards[:, k].mean().item() == pytest.approx(constant_return(world, action), abs=5 * error[k].item())
    p, _ = simulator.exact(world)
    assert p.sum() == pytest.approx(1)


def test_no_policy_beats_the_best():
    world = WORLDS["informative"]
    best = best_return(world)
    assert all(constant_return(world, action) < best for action in ACTIONS)
    assert all(policy_return(world, MetaPolicy(seed=seed)) < best for seed in range(3))
    # ... and nothing that sees more of the world's truth is compared with it
    p, q = simulator.exact(world)
    assert best < float((p[:, None] * q.max(axis=2) / simulator.N).sum())


def test_the_best_policy_is_no_worse_than_any_rule_on_what_is_seen():
    world, draw = WORLDS["overconfident"], random.Random(0)
    p, q = simulator.exact(world)
    for _ in range(20):
        rule = [draw.randrange(len(ACTIONS)) for _ in range(simulator.seen().max() + 1)]
        value = sum(
            float((p * q[range(len(p)), i, [rule[v] for v in simulator.seen()[:, i]]]).sum()) / simulator.N
            for i in range(simulator.N)
        )
        assert value <= best_return(world) + 1e-12


def test_softrankpo_comes_within_five_percent_of_the_best_where_confidence_informs():
    found = trained("informative", trajectories=2_000)
    assert found["greedy"] >= 0.95 * found["best"]


@pytest.mark.parametrize("seed", range(3))
def test_softrankpo_does_not_fall_below_always_persist_where_confidence_does_not_inform(seed):
    found = trained("uninformative", trajectories=1_000, seed=seed)
    assert found["greedy"] >= found[PERSIST] and found["drawn"] >= found[PERSIST]


@pytest.mark.parametrize("seed", range(3))
def test_where_nothing_is_to_be_gained_softrankpo_loses_next_to_nothing(seed):
    """Best and always-Persist differ by 0.01 here, which is the standard error of a mean reward in this corpus."""
    found = trained("nothing to gain", trajectories=1_000, seed=seed)
    assert found["greedy"] >= found[PERSIST] - 0.02 and found["drawn"] >= found[PERSIST] - 0.02
    assert constant_return(WORLDS["nothing to gain"], "refine") < found[PERSIST] - 0.15  # it could lose much more
