"""Each claim as arms that differ in one thing, and the comparisons that decide it.

Fixed before any arm but the baseline had been run (exceptions: docs/claims.md): worlds, steps, and one rate for each,
the smallest of ``RATES`` with which the baseline arm's area under the curve is within two points of the best, on seeds
1000-1004 that no table uses (``--sweep``).
All arms of a setting have the same start, dialogues, steps and updates a step, unless the arm's name says otherwise.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from . import deliberating, worlds
from .learning import Arm, Run, area, final, steps_to, train, worst_drop

RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
Start = Callable[[Sequence[int]], Run]


@dataclass(frozen=True)
class Comparison:
    """Claim: by ``metric``, arm ``better`` lies above arm ``worse`` (below, if ``sign`` is -1).

    Over several settings, each seed's mean over them is compared.
    """

    settings: tuple[str, ...]
    better: str
    worse: str
    metric: str = "area"
    sign: int = 1

    def values(self, arm: str, figures: dict[str, dict[str, list[float]]]) -> list[float]:
        """The arm's figure of each seed."""
        columns = [figures[f"{setting}: {arm}"][self.metric] for setting in self.settings]
        return [sum(seed) / len(columns) for seed in zip(*columns, strict=True)]


@dataclass
class Experiment:
    """One claim. ``arms`` and ``comparisons`` are by setting: an arm's full name is "setting: arm"."""

    claim: str
    controls: str
    show: tuple[str, ...]  # metrics of the table of arms
    arms: dict[str, Start] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    sweep: Callable[[float], Start] | None = None  # baseline arm by learning rate

    def add(self, setting: str, name: str, start: Start) -> None:
        self.arms[f"{setting}: {name}"] = start

    def compare(
        self, settings: str | tuple[str, ...], better: str, worse: str, *metrics: str | tuple[str, int]
    ) -> None:
        settings = (settings,) if isinstance(settings, str) else settings
        for metric in metrics:
            name, sign = metric if isinstance(metric, tuple) else (metric, 1)
            self.comparisons.append(Comparison(settings, better, worse, name, sign))


def run_in(world: Callable, arm: Arm, **options) -> Start:
    """An arm in a world made with ``options``."""

    def start(seeds: Sequence[int]) -> Run:
        return train(world(seeds, **options), arm, seeds)

    return start


def metrics(run: Run) -> dict[str, list[float]]:
    """Every figure of a run, one per seed. Returns and drops in percent of the optimum, shares in percent."""
    value = run["value"]
    found = {"area": 100 * area(value), "end": 100 * final(value), "drop": 100 * worst_drop(value)}
    found["steps to 90 %"] = steps_to(value)
    for name, curve in run.curves.items():
        if name == "clipped":
            found[name] = 100 * area(curve)
        elif name in ("turns", "last mini-batch's advantage"):
            found[name] = final(curve) if name == "turns" else area(curve)
        elif name != "value":
            found[name] = 100 * final(curve)
    return {name: values.tolist() for name, values in found.items()}


def margin(metric: str) -> float:
    """Effects within this are called equal: a point, half a step, a tenth of a turn."""
    return {"steps to 90 %": 0.5, "turns": 0.1, "last mini-batch's advantage": 0.01}.get(metric, 1.0)


# --- the claims -----------------------------------------------------------------------------------------------------


def ratio(factor: float = 1.0) -> Experiment:
    found = Experiment(
        "One ratio a turn instead of one a token: more sample-efficient and stabler (ReMA, Sec. 3.3 and ablations); "
        "geometric (camera-ready) instead of arithmetic (preprint)",
        "Weights of the tokens are the same in turn and token; 'token-mean' is verl's default, other weights too. 64 "
        "dialogues and 80 steps everywhere, cut into 1, 4 or 16 mini-batches; '5 x lr': beyond the best learning rate",
        ("area", "end", "drop", "steps to 90 %", "clipped"),
    )
    base = Arm(lr=factor * 0.2, steps=80, loss="token")
    arms = {
        "token": base,
        "geometric": replace(base, loss="turn"),
        "arithmetic": replace(base, loss="turn", ratio="arithmetic"),
        "token-mean": replace(base, loss="token-mean"),
    }
    for lengths in ("equal", "unequal"):
        for updates, times in ((1, 1), (4, 1), (16, 1), (16, 5)):
            setting = f"{lengths} turns, {updates} updates" + (f", {times} x lr" if times > 1 else "")
            for name, arm in arms.items():
                changed = replace(arm, updates=updates, lr=times * arm.lr)
                found.add(setting, name, run_in(worlds.Relay, changed, lengths=lengths))
            found.compare(setting, "geometric", "token", "area", ("drop", -1))
            found.compare(setting, "geometric", "arithmetic", "area", ("drop", -1))
    # Added after the single settings had been seen: all four leant one way, and none could be told from chance.
    pooled = tuple(f"{lengths} turns, {updates} updates" for lengths in ("equal", "unequal") for updates in (4, 16))
    found.compare(pooled, "geometric", "token", "area", ("drop", -1), "end")
    found.compare(pooled, "geometric", "arithmetic", "area", ("drop", -1), "end")
    found.sweep = lambda lr: run_in(worlds.Relay, replace(base, lr=lr))
    return found


def lazy(factor: float = 1.0) -> Experiment:
    found = Experiment(
        "1/T makes reasoning fall silent, the sum over turns does not (Dr. MAMR, Theorem 1 and its lazy agent)",
        "turn_scale = need + 1, the turns of a dialogue worked through, so that losses are of one size; 4 updates",
        ("area", "end", "silent", "taken over", "turns"),
    )
    base = Arm(lr=factor * 0.1, steps=60)
    for alone in (0.6, 0.75, 0.8):
        for failing in ("late", "fast", "retry"):
            for need in (4, 12):
                setting = f"alone {alone}, {failing}, {need} pieces"
                options = {"need": need, "failing": failing, "alone": alone}
                found.add(setting, "1/T", run_in(worlds.Handover, base, **options))
                total = replace(base, agg="sum", scale=need + 1.0)
                found.add(setting, "sum", run_in(worlds.Handover, total, **options))
                found.compare(setting, "sum", "1/T", ("taken over", -1), "end", "area")
    found.sweep = lambda lr: run_in(worlds.Handover, replace(base, lr=lr))
    return found


def order(factor: float = 1.0) -> Experiment:
    found = Experiment(
        "Mini-batches in arrival order (short dialogues first) disturb training, a fair draw does not (fault A1)",
        "The same rows, cut in another order; 128 dialogues a step. In checks the shortest dialogues are wrong and the "
        "longest broken off, in handover with retries the longest are mostly wrong",
        ("area", "end", "drop", "turns", "unfinished", "last mini-batch's advantage"),
    )
    base = Arm(lr=factor * 0.1, steps=80)
    handover = {"need": 12, "failing": "retry"}
    for name, world, options in (("checks", worlds.Checks, {}), ("handover, retry", worlds.Handover, handover)):
        found.add(f"{name}, 1 update", "any order", run_in(world, replace(base, updates=1), **options))
        for updates in (4, 8, 16):
            setting = f"{name}, {updates} updates"
            for order in ("fair", "arrival"):
                found.add(setting, order, run_in(world, replace(base, updates=updates, order=order), **options))
            found.compare(setting, "fair", "arrival", "area", "end", ("drop", -1), "turns")
    found.sweep = lambda lr: run_in(worlds.Checks, replace(base, lr=lr))
    return found


KINDS = ("clean", "rescaled", "exponential", "heavy-tailed", "tied", "partial")


def ranks(factor: float = 1.0) -> Experiment:
    found = Experiment(
        "SoftRankPO is more robust than GRPO and PPO to the scale and the tails of rewards (MPDF): groups are sampled",
        "96 dialogues of three agents a step whatever the group's size, 4 updates, the same clipped loss",
        ("area", "end", "tries"),
    )
    base = Arm(lr=factor * 0.2, steps=60)
    for kind in KINDS:
        for crowd in (3, 8, 16):
            setting = f"{kind}, groups of {crowd}"
            for name, arm in {
                "softrankpo": replace(base, estimator="softrankpo"),
                "grpo": base,
                "grpo without std": replace(base, estimator="dr_grpo"),
                "ppo": replace(base, estimator="ppo"),
            }.items():
                found.add(setting, name, run_in(worlds.Team, arm, rewards=kind, crowd=crowd))
            found.compare(setting, "softrankpo", "grpo", "end")
            found.compare(setting, "softrankpo", "ppo", "end")
            if kind not in ("clean", "partial"):
                continue
            for name, arm in {
                "softrankpo, tolerance": replace(base, estimator="softrankpo", tolerance=0.05),
                "softrankpo, chained": replace(base, estimator="softrankpo", tolerance=0.05, ties="chained"),
                "grpo, tolerance": replace(base, tolerance=0.05),
            }.items():
                found.add(setting, name, run_in(worlds.Team, arm, rewards=kind, crowd=crowd))
                found.compare(setting, name, name.partition(",")[0], "end")
    found.sweep = lambda lr: run_in(worlds.Team, replace(base, lr=lr))
    return found


def offline_ranks(factor: float = 1.0) -> Experiment:
    found = Experiment(
        "The same in MPDF's own setting: rewards of all K actions collected beforehand, SoftRankPO as Eq. 4",
        "The same corpus, start, epochs and updates; 'end': drawn actions, 'likeliest': the likeliest ones",
        ("area", "end", "likeliest"),
    )

    def arm(kind: str, actions: int, stage: str, lr: float = factor * 0.2, **options) -> Start:
        return lambda seeds: deliberating.train(seeds, kind, actions, stage, lr, **options)

    for kind in KINDS:
        for actions in (3, 8, 16):
            setting = f"{kind}, {actions} actions"
            for stage in ("softrankpo", "grpo", "ppo"):
                found.add(setting, stage, arm(kind, actions, stage))
            found.compare(setting, "softrankpo", "grpo", "likeliest", "end")
            found.compare(setting, "softrankpo", "ppo", "likeliest", "end")
            if kind in ("clean", "partial"):
                found.add(setting, "softrankpo, tolerance", arm(kind, actions, "softrankpo", tolerance=0.05))
                found.compare(setting, "softrankpo, tolerance", "softrankpo", "likeliest")
    # Added after 20 epochs had been seen: with 8 and 16 actions SoftRankPO's drawn actions were behind GRPO's.
    for actions in (8, 16):
        setting = f"clean, {actions} actions, 80 epochs"
        for stage in ("softrankpo", "grpo"):
            found.add(setting, stage, arm("clean", actions, stage, epochs=80))
        found.compare(setting, "softrankpo", "grpo", "likeliest", "end")
    found.sweep = lambda lr: arm("clean", 3, "grpo", lr)
    return found


def weights(factor: float = 1.0) -> Experiment:
    found = Experiment(
        "Shared weights learn faster than a model per role; both roles at once faster than in turns (ReMA, ablations)",
        "Both roles' networks are copies of one start; 128 dialogues a step, 4 updates of each role that learns. In "
        "turns, a role makes half the updates for the same dialogues; 'twice as long' has as many updates a role, and "
        "twice the dialogues",
        ("area", "end", "steps to 90 %", "drop"),
    )
    base = Arm(lr=factor * 0.05, steps=80)
    for roles in ("alike", "opposed"):
        for name, shared, arm in (
            ("shared", True, base),
            ("separate", False, base),
            ("in turns of 10", False, replace(base, alternate=10)),
            ("in turns of 3", False, replace(base, alternate=3)),
            ("in turns of 10, twice as long", False, replace(base, alternate=10, steps=160)),
            ("shared, in turns of 10", True, replace(base, alternate=10)),
        ):
            found.add(f"roles {roles}", name, run_in(worlds.Pair, arm, roles=roles, shared=shared))
        setting = f"roles {roles}"
        found.compare(setting, "shared", "separate", "area", "end")
        found.compare(setting, "separate", "in turns of 10", "area", "end")
        found.compare(setting, "in turns of 3", "in turns of 10", "area")
        found.compare(setting, "separate", "in turns of 10, twice as long", "end")
        found.compare(setting, "shared", "shared, in turns of 10", "area", "end")
    found.sweep = lambda lr: run_in(worlds.Pair, replace(base, lr=lr))
    return found


def reversal(factor: float = 1.0) -> Experiment:
    found = Experiment(
        "The consistency reward brings role reversal: the planner answers, reasoning copies (ReMA, ablations)",
        "The same but for the planner's reward; 64 dialogues with 8 answers a plan, 4 updates",
        ("area", "end", "planner answers", "reasoning copies", "role reversal", "agreement"),
    )
    base = Arm(lr=factor * 0.1, steps=80)
    for knows in (0.5, 0.7):
        setting = f"planner knows {knows}"
        for reward in ("correct", "consistency"):
            found.add(setting, reward, run_in(worlds.Plans, base, reward=reward, knows=knows))
        found.compare(setting, "consistency", "correct", "planner answers", "reasoning copies", "role reversal")
        found.compare(setting, "correct", "consistency", "end")
    found.sweep = lambda lr: run_in(worlds.Plans, replace(base, lr=lr), knows=0.5)
    return found


def silent_rows(factor: float = 1.0) -> Experiment:
    found = Experiment(
        "Rows in which reasoning did not speak are better left out of its baseline than counted as 0 (A12; the authors "
        "count them)",
        "128 dialogues a step, 4 updates",
        ("area", "end", "drop", "steps to 90 %", "silent rows"),
    )
    base = Arm(lr=factor * 0.2, steps=80)
    for silent in (0.5, 0.9):
        for estimator in ("role_grpo", "softrankpo"):
            setting = f"{silent:.0%} silent, {estimator}"
            for name in ("out", "zero"):
                arm = replace(base, estimator=estimator, silent=name)
                found.add(setting, name, run_in(worlds.Ramble, arm, silent=silent))
            found.compare(setting, "out", "zero", "area", "end")
    found.sweep = lambda lr: run_in(worlds.Ramble, replace(base, lr=lr))
    return found


EXPERIMENTS: dict[str, Callable[..., Experiment]] = {
    "ratio": ratio,
    "lazy": lazy,
    "order": order,
    "ranks": ranks,
    "offline-ranks": offline_ranks,
    "weights": weights,
    "reversal": reversal,
    "silent-rows": silent_rows,
}


def crumbs() -> Iterator[tuple[str, list[str]]]:
    """Advantages of a success, an attempt (0.01) and a failure (0), by the package's estimators: rows of a table."""
    from rema_verl.algorithms.advantages import grpo_advantage
    from rema_verl.algorithms.softrankpo import softrank_advantage

    for crowd in (3, 8, 16):
        for best in (1.0, 0.01):
            group = torch.tensor([best, 0.01, *[0.0] * (crowd - 2)])
            names = [0] * crowd
            coarse = (group / 0.05).round() * 0.05
            found = {
                "softrankpo": softrank_advantage(group, names),
                "softrankpo, tolerance": softrank_advantage(coarse, names),
                "grpo": grpo_advantage(group, names),
                "grpo, tolerance": grpo_advantage(coarse, names),
                "grpo without std": grpo_advantage(group, names, norm_by_std=False),
            }
            who = "success, attempt" if best == 1 else "no success, two attempts"
            for name, advantage in found.items():
                values = [f"{advantage[i]:+.3f}" for i in (0, 1, 2)]
                yield f"{who}, {crowd - 2} failures", [name, values[0] if best == 1 else "", *values[1:]]
