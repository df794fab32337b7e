"""Does it learn, and what changes if one piece is exchanged? Measured on the quickstart's synthetic task.

    python tests/benchmarks/learning.py                    # every variant, seeds 0, 1 and 2: hours on two cores
    python tests/benchmarks/learning.py --only vanilla,turn_clip --seeds 0
    python tests/benchmarks/learning.py --report           # print the tables of what is on the disk

Every variant of a seed starts from the same cold start and trains for the same number of steps on the same questions.
Runs that are done are kept; a killed run goes on from its checkpoint. ``--jobs 2`` runs two at a time, each on a core
of its own. The tables give the mean over seeds and the lowest and highest seed; ``--json`` writes every figure.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes"))
from watch import read_metrics, val_accuracy  # noqa: E402

LOSS = "actor_rollout_ref.actor.policy_loss"
SEPARATE = [
    "trainer.v1.trainer_mode=rema_separate",
    "rema.switch.start=meta_thinking",
    "rema.switch.freq=3",
]
SOFTRANKPO = ["algorithm.adv_estimator=softrankpo"]


def reward(**options) -> list[str]:
    return [f"+reward.custom_reward_function.reward_kwargs.{key}={value}" for key, value in options.items()]


# Each variant is what it changes in the quickstart (turn_clip, turn_agg=trajectory, role_grpo) with a graded reward.
VARIANTS: dict[str, list[str]] = {
    "turn_clip": [],
    "vanilla": [f"{LOSS}.loss_mode=vanilla"],
    "turn_agg_sum": [f"{LOSS}.turn_agg=sum", f"{LOSS}.turn_scale=2.0"],  # the cold start's dialogues have 1.9 turns
    "softrankpo": SOFTRANKPO,
    "role_grpo_flipped": reward(flip=0.1),
    "softrankpo_flipped": SOFTRANKPO + reward(flip=0.1),
    "role_grpo_cubed": reward(power=3),
    "softrankpo_cubed": SOFTRANKPO + reward(power=3),
    "role_grpo_x1000": reward(scale=1000),
    "softrankpo_x1000": SOFTRANKPO + reward(scale=1000),
    "separate": SEPARATE,
    "separate_both": [*SEPARATE, "rema.switch.level=none"],
    "separate_served": [*SEPARATE, "rema.roles.meta_thinking.trainable=false", "rema.switch.start=reasoning"],
}
EXPERIMENTS = {
    "one clip decision per token or per turn": ["vanilla", "turn_clip"],
    "turns averaged or summed per row": ["turn_clip", "turn_agg_sum"],
    "GRPO or ranks": [
        name for kind in ("", "_cubed", "_x1000", "_flipped") for name in (f"role_grpo{kind}", f"softrankpo{kind}")
    ],
    "one model or one per role": ["shared", "separate", "separate_both", "separate_served"],
}
SAME = {"role_grpo": "turn_clip", "shared": "turn_clip"}  # under another name in another table


def train(variant: str, seed: int, runs: Path, steps: int, core: int | None) -> None:
    """One quickstart with a variant's overrides; quickstart.sh skips what is already there."""
    name = f"learning_{variant}_seed{seed}"
    env = os.environ | {"RUNS": str(runs), "SEED": str(seed), "NAME": name, "STEPS": str(steps)}
    pin = []
    if core is not None:
        pin = ["taskset", "-c", str(core)]
        env["OMP_NUM_THREADS"] = "1"
    overrides = [
        f"reward.custom_reward_function.path={ROOT}/tests/benchmarks/learning_reward.py",
        f"+reward.custom_reward_function.reward_kwargs.seed={seed}",
        "trainer.save_freq=-1",
        *VARIANTS[variant],
    ]
    (runs / name).mkdir(parents=True, exist_ok=True)
    with (runs / name / "console.log").open("a") as log:
        run = subprocess.Popen(
            [*pin, "bash", "recipes/quickstart.sh", *overrides], cwd=ROOT, env=env, stdout=log, stderr=log
        )
        start, peak = time.monotonic(), 0
        while run.poll() is None:
            time.sleep(10)  # a look costs CPU time of its own
            peak = max(peak, memory(run.pid))
        resources = {"seconds": round(time.monotonic() - start, 1), "peak_gib": round(peak / 2**30, 2)}
        with (runs / name / "resources.jsonl").open("a") as file:
            file.write(json.dumps(resources) + "\n")
    print(f"{name}: {'done' if run.returncode == 0 else f'FAILED, see {runs / name}/console.log'}", flush=True)


def memory(pid: int) -> int:
    """Bytes held by a process and all its children, shared pages counted once (PSS)."""
    total = 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total


def read(variant: str, seed: int, runs: Path, steps: int) -> dict | None:
    """What one finished run came to, or None."""
    run = runs / f"learning_{variant}_seed{seed}"
    if not (run / f"done_{steps}").exists():
        return None
    metrics = read_metrics(run / "metrics")
    accuracy = {step: a for step in sorted(metrics) if (a := val_accuracy(metrics[step])) is not None}
    share, turns, seconds = {}, {}, []
    resources = [json.loads(line) for line in (run / "resources.jsonl").read_text().splitlines()]
    for step in sorted(metrics):
        row = metrics[step]
        if "timing_s/step" in row:
            seconds.append(row["timing_s/step"])
        if "reasoning/tokens" in row:
            share[step] = row["reasoning/tokens"] / (row["reasoning/tokens"] + row["meta_thinking/tokens"])
            turns[step] = row["dialogue/turns/mean"]
    return {
        "accuracy": accuracy,
        "reasoning_token_share": share,
        "turns": turns,
        "step_seconds": statistics.median(seconds),
        "peak_gib": max(r["peak_gib"] for r in resources),
        "run_seconds": resources[-1]["seconds"],  # with the start of all processes; with the cold start if it was made
    }


def spread(values: list[float], percent: bool = True) -> str:
    """mean (lowest to highest)."""
    scale, unit, digits = (100, " %", 1) if percent else (1, "", 2)
    low, mean, high = (scale * f(values) for f in (min, statistics.mean, max))
    return f"{mean:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"


def report(results: dict[str, dict[int, dict]], steps: int) -> None:
    console = Console(width=140)
    for title, names in EXPERIMENTS.items():
        table = Table(title=f"{title}: held-out accuracy, mean over seeds (lowest to highest)")
        for column in ("variant", "seeds", "start", *(f"step {s}" for s in range(5, steps + 1, 5)), "gain"):
            table.add_column(column)
        for name in names:
            runs = list(results[SAME.get(name, name)].values())
            if not runs:
                continue
            at = {s: [r["accuracy"][s] for r in runs] for s in range(0, steps + 1, 5)}
            gain = [end - start for start, end in zip(at[0], at[steps], strict=True)]
            table.add_row(name, str(len(runs)), *(spread(v) for v in at.values()), spread(gain))
        console.print(table)
    table = Table(title="reasoning's share of sampled tokens, and turns per dialogue: first and last three steps")
    for column in ("variant", "share, first", "share, last", "turns, first", "turns, last"):
        table.add_column(column)
    for name in ("turn_clip", "turn_agg_sum", "vanilla"):
        runs = list(results[name].values())
        if runs:
            cells = []
            for key, percent in (("reasoning_token_share", True), ("turns", False)):
                for part in (slice(None, 3), slice(-3, None)):
                    cells.append(spread([statistics.mean(list(r[key].values())[part]) for r in runs], percent))
            table.add_row(name, *cells)
    console.print(table)
    table = Table(title="time and memory (all processes of the run, shared pages counted once)")
    for column in ("variant", "seconds a step (median)", "seconds in all", "peak, GiB"):
        table.add_column(column)
    for name in EXPERIMENTS["one model or one per role"]:
        if runs := list(results[SAME.get(name, name)].values()):
            cells = [spread([r[key] for r in runs], False) for key in ("step_seconds", "run_seconds", "peak_gib")]
            table.add_row(name, *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default=",".join(VARIANTS))
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    seeds, names = [int(s) for s in args.seeds.split(",")], args.only.split(",")
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"unknown variant {unknown.pop()!r}; known: {', '.join(VARIANTS)}")
    runs = args.runs.resolve()

    if not args.report:
        cores = sorted(os.sched_getaffinity(0))[: args.jobs]
        free = list(cores)

        def job(pair: tuple[str, int]) -> None:
            variant, seed = pair
            core = free.pop()
            try:
                train(variant, seed, runs, args.steps, core if args.jobs > 1 else None)
            finally:
                free.append(core)

        def queue(which: list[tuple[str, int]]) -> None:
            with ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(job, which))

        queue([(names[0], seed) for seed in seeds])  # these make the cold starts
        queue([(name, seed) for name in names[1:] for seed in seeds])

    results = {v: {s: r for s in seeds if (r := read(v, s, runs, args.steps))} for v in VARIANTS}
    report(results, args.steps)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
