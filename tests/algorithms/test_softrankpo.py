"""softrankpo and the rank-matching loss against plain loops in float64."""

import itertools
import statistics

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

from rema_verl.algorithms.softrankpo import compute_softrankpo_advantage, rank_matching_loss, softrank_advantage


def reference(rewards, groups, tau=0.5, eps=1e-6):
    """papers.md A4, one member at a time; ranks by counting, the quantile from the standard library."""
    result = []
    for reward, group in zip(rewards, groups, strict=True):
        peers = [r for r, g in zip(rewards, groups, strict=True) if g == group]

        def quantile(r, peers=peers):
            rank = sum(p < r for p in peers) + (sum(p == r for p in peers) - 1) / 2
            return statistics.NormalDist().inv_cdf(((rank + 0.5) / len(peers)) ** tau)

        values = [quantile(p) for p in peers]
        result.append((quantile(reward) - statistics.fmean(values)) / (statistics.pstdev(values) + eps))
    return torch.tensor(result, dtype=torch.float64)


def random_groups(seed=0, rows=120):
    rng = np.random.default_rng(seed)
    groups = [f"p{g}" for g in rng.integers(0, 17, rows)]  # interleaved, of unequal size
    rewards = rng.choice([-1.0, -0.5, 0.0, 0.1, 1.0, *rng.normal(size=5)], rows)  # ties and no ties
    return torch.tensor(rewards, dtype=torch.float64), groups


@pytest.mark.parametrize("tau", [0.4, 0.5, 1.0, 5.0])
@pytest.mark.parametrize("seed", range(3))
def test_formula(tau, seed):
    rewards, groups = random_groups(seed)
    got = softrank_advantage(rewards, groups, tau)
    torch.testing.assert_close(got, reference(rewards.tolist(), groups, tau), rtol=0, atol=1e-6)
    assert got.dtype == torch.float64


def test_known_values():
    """papers.md, checks made on K = 3: a two-way tie gives these numbers whatever tau."""
    for tau in (0.4, 1.0, 5.0):
        got = softrank_advantage(torch.tensor([3.0, 3.0, 9.0], dtype=torch.float64), [0, 0, 0], tau)
        torch.testing.assert_close(got, torch.tensor([-1.0, -1.0, 2.0]).double() / 2**0.5, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 1000])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.3e8])
def test_tied_groups_and_groups_of_one_are_exactly_zero(size, value):
    rewards = torch.cat([torch.full((size,), value), torch.tensor([1.0, 2.0])])
    got = softrank_advantage(rewards, ["tied"] * size + ["other"] * 2, tau=0.7, eps=1e-12)
    assert (got[:size] == 0).all()
    assert got[-1] > 0


@pytest.mark.parametrize(
    "transform",
    [
        lambda r: r * 1000,
        lambda r: r**3,
        torch.exp,
        lambda r: 5 * r - 7,
        torch.atan,
        lambda r: r.sign() * r.abs() ** 0.1,
    ],
)
def test_increasing_transforms_change_nothing(transform):
    rewards, groups = random_groups()
    assert torch.equal(softrank_advantage(transform(rewards), groups), softrank_advantage(rewards, groups))


def test_order_of_rows_does_not_matter():
    rewards, groups = random_groups()
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(1))
    shuffled = softrank_advantage(rewards[order], [groups[i] for i in order])
    torch.testing.assert_close(shuffled, softrank_advantage(rewards, groups)[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.uint8, torch.bool])
@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.3, 100.0])
def test_rewards_within_the_tolerance_are_one_tie(dtype, tolerance):
    """Against each tie's rewards replaced by one number, found by walking up the sorted group."""
    rewards, groups = random_groups()
    rewards = rewards.to(dtype) if dtype.is_floating_point else (rewards.abs() * 3).to(dtype)
    tied = rewards.double().clone()
    for group in set(groups):
        members = sorted((i for i, g in enumerate(groups) if g == group), key=lambda i: float(rewards[i]))
        for below, above in itertools.pairwise(members):
            if float(rewards[above]) - float(rewards[below]) <= tolerance:
                tied[above] = tied[below]
    got = softrank_advantage(rewards, groups, tie_tolerance=tolerance)
    torch.testing.assert_close(got.double(), softrank_advantage(tied, groups), rtol=1e-6, atol=1e-6)
    if tolerance == 100.0:
        assert not got.any()


@pytest.mark.parametrize("times", [2, 3])
def test_several_rows_per_trajectory_change_nothing(times):
    rewards, groups = random_groups()
    repeated = softrank_advantage(rewards.repeat(times), groups * times)
    torch.testing.assert_close(repeated, softrank_advantage(rewards, groups).repeat(times), rtol=0, atol=1e-9)


def test_group_ids_may_be_anything_hashable():
    rewards = torch.tensor([0.0, 1.0, 0.0, 1.0])
    expected = softrank_advantage(rewards, [0, 0, 1, 1])
    for ids in (
        ["a", "a", "b", "b"],
        [("p", 1), ("p", 1), ("p", 2), ("p", 2)],
        [0.2, 0.2, 0.4, 0.4],
        ["1", "1", 1, 1],
        np.array(["x", "x", "y", "y"], dtype=object),
        torch.tensor([3, 3, 10**12, 10**12]),
    ):
        assert torch.equal(softrank_advantage(rewards, ids), expected)
        assert torch.equal(
            compute_softrankpo_advantage(rewards[:, None], torch.ones(4, 1), ids)[0], expected[:, None].float()
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_other_dtypes(dtype):
    got = softrank_advantage(torch.tensor([0, 1, 1]).to(dtype), [0, 0, 0])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), reference([0, 1, 1], [0, 0, 0]), rtol=0, atol=1e-6)


def test_extreme_tau_stays_finite():
    for tau in (1e-30, 1e-3, 50.0, 1e6):
        assert softrank_advantage(torch.arange(16.0), [0] * 16, tau).isfinite().all()


# ---------------------------------------------------------------- as verl calls it


def rows():
    rewards = torch.zeros(6, 5)
    rewards[range(6), [4, 4, 1, 3, 4, 4]] = torch.tensor([1.0, 0.0, 0.5, 9.0, 7.0, 2.0])
    mask = torch.tensor(
        [[1, 1, 0, 1, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 1, 0, 0]]
    )
    return rewards, mask, np.array(["p", "p", "p", "p", "q", "q"], dtype=object)


def test_broadcast_over_the_mask_and_padding_rows_take_no_part():
    rewards, mask, index = rows()
    advantages, returns = get_adv_estimator_fn("softrankpo")(
        token_level_rewards=rewards, response_mask=mask, config=None, index=index
    )
    expected = torch.zeros(6, dtype=torch.float64)
    expected[[0, 1, 2]] = reference([1.0, 0.0, 0.5], ["p"] * 3)  # row 3 says nothing and shifts nobody
    expected[[4, 5]] = reference([7.0, 2.0], ["q"] * 2)
    torch.testing.assert_close(advantages.double(), expected[:, None] * mask, rtol=0, atol=1e-6)
    assert torch.equal(returns, advantages)
    assert advantages.dtype == rewards.dtype


@pytest.mark.parametrize("make", [OmegaConf.create, dict], ids=["omegaconf", "dict"])
def test_options_are_read_from_the_algorithm_config(make):
    rewards, mask, index = rows()
    tau = compute_softrankpo_advantage(rewards, mask, index, make({"softrankpo": {"tau": 3.0, "eps": 0.1}}))[0]
    expected = reference([1.0, 0.0, 0.5], ["p"] * 3, 3.0, 0.1)
    torch.testing.assert_close(tau[:3].double(), expected[:, None] * mask[:3], rtol=0, atol=1e-6)
    default = compute_softrankpo_advantage(rewards, mask, index)[0]
    for config in (make({}), make({"softrankpo": None}), make({"softrankpo": {"tau": 0.5}}), AlgoConfig()):
        assert torch.equal(compute_softrankpo_advantage(rewards, mask, index, config)[0], default)


def test_verls_config_block_is_a_closed_struct():
    config = OmegaConf.create({"gamma": 1.0})
    OmegaConf.set_struct(config, True)
    compute_softrankpo_advantage(*rows(), config)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_not_finite_names_the_sample(bad):
    rewards, groups = random_groups()
    rewards[41] = bad
    with pytest.raises(ValueError, match=rf"row 41 .*{groups[41]}"):
        softrank_advantage(rewards, groups)
    rewards, mask, index = rows()
    rewards[4, 2] = bad
    with pytest.raises(ValueError, match=r"row 4 \(index 'q'\)"):
        compute_softrankpo_advantage(rewards, mask, index)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, "tau must be a positive"),
        ({"tau": -1.0}, "tau must be a positive"),
        ({"tau": float("nan")}, "tau must be a positive"),
        ({"eps": 0.0}, "eps must be a positive"),
        ({"tie_tolerance": -0.1}, "tie_tolerance must be 0 or a positive"),
        ({"tie_tolerance": float("inf")}, "tie_tolerance must be 0 or a positive"),
        ({"taw": 1.0}, r"no option \['taw'\]; it has \['eps', 'tau', 'tie_tolerance'\]"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        compute_softrankpo_advantage(*rows(), OmegaConf.create({"softrankpo": options}))


def test_bad_shapes_and_an_empty_mask():
    rewards, mask, index = rows()
    with pytest.raises(ValueError, match=r"one shape \(rows, tokens\)"):
        compute_softrankpo_advantage(rewards[:, :-1], mask, index)
    with pytest.raises(ValueError, match="each of the 6 rows, got 5"):
        compute_softrankpo_advantage(rewards, mask, index[:5])
    with pytest.raises(ValueError, match="no valid token in any of the 6 rows"):
        compute_softrankpo_advantage(rewards, mask * 0, index)
    with pytest.raises(ValueError, match=r"shape \(rows,\)"):
        softrank_advantage(rewards, index)
    with pytest.raises(ValueError, match=r"shape \(rows,\)"):
        softrank_advantage(rewards[:, 0], index[:3])


# ---------------------------------------------------------------- MPDF's regression


@pytest.mark.parametrize("beta", [0.1, 1.0, 4.0])
def test_rank_matching_has_the_tilted_reference_as_its_only_minimiser(beta):
    g = torch.Generator().manual_seed(0)
    reference_logits = torch.randn(5, 3, generator=g, dtype=torch.float64)
    advantage = torch.stack(
        [softrank_advantage(r, [0] * 3) for r in torch.randn(5, 3, generator=g, dtype=torch.float64)]
    )
    log_reference = reference_logits.log_softmax(-1)

    def loss(logits):
        return rank_matching_loss(logits.log_softmax(-1) - log_reference, advantage, beta)

    # pi = pi_ref exp(A / beta) / Z reaches 0 ...
    best = (log_reference + advantage / beta).log_softmax(-1)
    assert loss(best) < 1e-25
    # ... everything else is above it ...
    for _ in range(20):
        other = best + 0.1 * torch.randn(best.shape, generator=g, dtype=torch.float64)
        distance = (other.log_softmax(-1) - best).abs().max()
        assert (loss(other) > 1e-6) == (distance > 1e-2)
    # ... and descent from any start ends in it: there is no other stationary point.
    for seed in range(3):
        logits = torch.randn(5, 3, generator=g.manual_seed(seed), dtype=torch.float64).requires_grad_()
        optimiser = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-14, tolerance_change=1e-16)

        def closure(logits=logits, optimiser=optimiser):
            optimiser.zero_grad()
            value = loss(logits)
            value.backward()
            return value

        optimiser.step(closure)
        torch.testing.assert_close(logits.detach().softmax(-1), best.exp(), rtol=0, atol=1e-6)


def test_rank_matching_value_and_bad_input():
    log_ratio = torch.tensor([[0.3, -0.2, 1.0], [0.0, 0.5, -0.5]], dtype=torch.float64)
    advantage = torch.tensor([[1.0, 0.0, -1.0], [-1.2, 0.0, 1.2]], dtype=torch.float64)
    expected = 0.0
    for lr, a in zip(log_ratio.tolist(), advantage.tolist(), strict=True):
        implicit = [2.0 * x for x in lr]
        expected += sum((r - sum(implicit) / 3 - y + sum(a) / 3) ** 2 for r, y in zip(implicit, a, strict=True)) / 3 / 2
    assert rank_matching_loss(log_ratio, advantage, 2.0).item() == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="one shape"):
        rank_matching_loss(log_ratio, advantage[:, :2], 1.0)
    with pytest.raises(ValueError, match="beta must be positive"):
        rank_matching_loss(log_ratio, advantage, 0.0)
