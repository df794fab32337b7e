"""The bench of the papers' claims: its worlds' optima are what they are said to be, and so are its intervals."""

import doctest
import random
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from claims import __main__ as bench  # noqa: E402
from claims import deliberating, effects, learning, worlds  # noqa: E402
from claims.experiments import EXPERIMENTS, Experiment, metrics, run_in  # noqa: E402
from claims.learning import Arm, Noise, train  # noqa: E402

SEEDS = [3, 4]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def certain(chosen: torch.Tensor, width: int) -> torch.Tensor:
    """(S, C) tokens -> the table of the policy that always says them."""
    table = torch.full((*chosen.shape, width), -torch.inf)
    return table.scatter(2, chosen[..., None], 0.0)


def best(world) -> torch.Tensor:
    """The table of the best policy, written down by hand."""
    count = len(SEEDS)
    if isinstance(world, worlds.Relay):
        code = torch.arange(world.width).repeat(world.rounds).expand(count, -1)
        filler = torch.zeros(count, 2, dtype=torch.long)
        return certain(torch.cat([world.digits.reshape(count, -1), code, filler], dim=1), world.width)
    if isinstance(world, worlds.Handover):
        return certain(torch.zeros(count, 2 * world.need + 2, dtype=torch.long), 2)
    if isinstance(world, worlds.Checks):
        rounds = torch.tensor([world.best_return(size)[1] for size in world.sizes])
        stops = (torch.arange(world.limit) >= rounds[:, None] - 1).long().flatten()
        return certain(torch.cat([stops, torch.zeros(len(rounds), dtype=torch.long)]).expand(count, -1), 2)
    if isinstance(world, worlds.Ramble):
        clear = torch.zeros_like(world.digits)
        return certain(torch.cat([clear, world.digits, clear[:, :1]], dim=1), world.width)
    if isinstance(world, worlds.Pair):
        return certain(world.right.reshape(count, -1), world.symbols)
    if isinstance(world, worlds.Plans):
        return certain(torch.zeros(count, 4, dtype=torch.long), 3)
    assert isinstance(world, worlds.Team)
    return certain(world.quality.argmax(dim=-1).reshape(count, -1), world.actions)


WORLDS = {
    "relay": lambda: worlds.Relay(SEEDS),
    "relay, unequal": lambda: worlds.Relay(SEEDS, lengths="unequal"),
    "handover, late": lambda: worlds.Handover(SEEDS, failing="late"),
    "handover, fast": lambda: worlds.Handover(SEEDS, need=12, failing="fast"),
    "handover, retry": lambda: worlds.Handover(SEEDS, need=12, failing="retry"),
    "checks": lambda: worlds.Checks(SEEDS),
    "ramble": lambda: worlds.Ramble(SEEDS),
    "pair, alike": lambda: worlds.Pair(SEEDS),
    "pair, opposed": lambda: worlds.Pair(SEEDS, roles="opposed", shared=False),
    "plans": lambda: worlds.Plans(SEEDS, knows=0.7),
    "team": lambda: worlds.Team(SEEDS),
    "team, partial": lambda: worlds.Team(SEEDS, rewards="partial", crowd=3),
}


@pytest.mark.parametrize("name", WORLDS)
def test_the_best_policy_gets_the_optimum(name, monkeypatch):
    if name == "plans":  # the function over the answers is the reward manager's, which needs verl
        monkeypatch.setattr(worlds, "agreement", lambda answers: torch.zeros(answers.shape[:-1]))
    world, noise = WORLDS[name](), Noise(SEEDS)
    table = best(world)
    value = torch.stack([world.play(table, noise).value for _ in range(40)]).mean(dim=0)
    torch.testing.assert_close(value, world.optimum.expand(len(SEEDS)), atol=0.025, rtol=0)
    assert (world.play(world.start().table().detach(), noise).value < world.optimum - 0.05).all()


def test_no_policy_of_the_worlds_with_long_dialogues_is_better():
    """Every deterministic policy of a small Handover and every stopping rule of Checks."""
    world = worlds.Handover(SEEDS, need=2, failing="retry")
    for number in range(16):
        choice = torch.tensor([number >> k & 1 for k in range(4)] + [0, 0]).expand(len(SEEDS), -1)
        noise = Noise(SEEDS)
        values = torch.stack([world.play(certain(choice, 2), noise).value for _ in range(20)])
        assert values.mean() <= world.optimum.mean() + 0.02, number
    checks = worlds.Checks(SEEDS)
    for rounds in range(1, checks.limit + 1):
        stops = (torch.arange(checks.limit) >= rounds - 1).long().repeat(len(checks.sizes))
        table = certain(torch.cat([stops, torch.zeros(3, dtype=torch.long)]).expand(len(SEEDS), -1), 2)
        noise = Noise(SEEDS)
        values = torch.stack([checks.play(table, noise).value for _ in range(20)])
        assert values.mean() <= checks.optimum.mean() + 0.02, rounds


def test_a_silent_handover_is_right_as_often_as_the_planner_alone():
    world, noise = worlds.Handover(SEEDS, need=4, failing="fast", alone=0.6), Noise(SEEDS)
    silent = certain(torch.tensor([0] * 4 + [1] * 4 + [0, 0]).expand(len(SEEDS), -1), 2)
    batch = world.play(silent, noise)
    value = torch.stack([world.play(silent, noise).value for _ in range(40)]).mean(dim=0)
    torch.testing.assert_close(value, torch.full((len(SEEDS),), 0.6), atol=0.025, rtol=0)
    assert (batch.seen["silent"] == 1).all() and (batch.seen["taken over"] == 1).all()
    assert (batch.seen["turns"] == 2).all() and batch.mask[..., ::2].sum() == 2 * 2 * len(SEEDS) * world.dialogues


def test_a_seed_is_the_same_beside_other_seeds():
    arm = Arm(lr=0.05, steps=6, updates=4)
    for world in (worlds.Handover, worlds.Checks, worlds.Team):
        together, alone = (train(world(seeds), arm, seeds) for seeds in ([0, 1], [1]))
        for name in alone.curves:
            torch.testing.assert_close(together[name][1:], alone[name], atol=1e-5, rtol=1e-4)


def test_arms_start_equal_and_learn():
    arms = {name: Arm(lr=0.1, steps=40, agg=name, scale=2.0) for name in ("trajectory", "sum")}
    runs = {name: train(worlds.Ramble(SEEDS), arm, SEEDS)["value"] for name, arm in arms.items()}
    assert (runs["trajectory"][:, 0] == runs["sum"][:, 0]).all()
    assert all((learning.final(value) > value[:, 0] + 0.2).all() for value in runs.values())


def test_the_offline_setting_learns_and_knows_its_optimum():
    run = deliberating.train(SEEDS, "clean", 3, "softrankpo", lr=0.1)
    assert (run["likeliest"][:, -1] > 0.9).all() and (run["likeliest"] <= 1 + 1e-6).all()
    quality, rewards = deliberating.collect(SEEDS, "clean", 3)
    assert (rewards.mean(dim=2) - quality).abs().max() < 0.2


def test_ratios_are_compared_under_the_same_weights():
    """Where nothing has moved yet, one ratio a turn and one a token have the same gradient."""
    noise = Noise(SEEDS)
    mask = noise.rand(6, 12) > 0.4
    old, advantage = -noise.rand(6, 12), noise.randn(6, 1) * mask
    gradients = {}
    for loss in ("turn", "token"):
        new = old.clone().requires_grad_()
        learning.policy_loss(Arm(lr=1.0, steps=1, loss=loss), new, old, advantage, mask).backward()
        gradients[loss] = new.grad
    torch.testing.assert_close(gradients["turn"], gradients["token"])
    new = old + 0.1
    sizes = [learning.policy_loss(Arm(lr=1.0, steps=1, loss=x), new, old, advantage, mask) for x in ("turn", "token")]
    torch.testing.assert_close(*sizes)  # equal ratios in a turn: the two are the same again


def test_figures_of_a_curve():
    curve = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    torch.testing.assert_close(learning.smooth(curve, 2), torch.tensor([[0.0, 0.5, 1.0, 0.5]]))
    rise_and_fall = torch.cat([torch.ones(1, 10), torch.zeros(1, 10)], dim=1)
    assert learning.worst_drop(rise_and_fall).item() == 1 and learning.final(rise_and_fall).item() == 0
    assert learning.steps_to(rise_and_fall).item() == 0 and learning.steps_to(-rise_and_fall).item() == 20


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = random.Random(0)
    covered = 0
    for _ in range(2000):
        pairs = [(rng.gauss(1.0, 2.0), rng.gauss(0.5, 1.0)) for _ in range(10)]
        found = effects.difference([a for a, _ in pairs], [b for _, b in pairs])
        covered += found.low <= 0.5 <= found.high
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)
    assert 0.935 < covered / 2000 < 0.965


def test_examples():
    assert [doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed for module in (effects, learning)] == [0, 0]


def test_a_tiny_experiment_end_to_end():
    experiment = Experiment("out is better", "the same budget", ("area",))
    for name in ("out", "zero"):
        experiment.add("here", name, run_in(worlds.Ramble, Arm(lr=0.05, steps=8, silent=name)))
    experiment.compare("here", "out", "zero", "area", ("drop", -1))
    figures = {name: metrics(start(range(3))) for name, start in experiment.arms.items()}
    area, drop = bench.judged(experiment, figures)
    assert area["means"][0] - area["means"][1] == pytest.approx(area["difference"])
    assert area["interval"][0] <= area["difference"] <= area["interval"][1]
    assert {area["claimed"], drop["claimed"]} == {"above", "below"}


def test_every_comparison_names_arms_that_exist():
    for make in EXPERIMENTS.values():
        experiment = make()
        for c in experiment.comparisons:
            assert {f"{setting}: {arm}" for setting in c.settings for arm in (c.better, c.worse)} <= set(
                experiment.arms
            )


@pytest.mark.parametrize("arguments", [["--only", "x"], ["--seeds", "1"], ["--json", "/no/such/folder/f"], ["--what"]])
def test_a_mistake_is_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(arguments)
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1
