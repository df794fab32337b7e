"""Can the papers' claims be seen where the optimum is known? Small worlds, the package's own losses and estimators.

    PYTHONPATH=tests/benchmarks python -m claims [--only ratio,lazy] [--seeds 50] [--jobs 2] [--json FILE]
    PYTHONPATH=tests/benchmarks python -m claims --sweep        # how each world's learning rate was chosen

For each claim: a table of the arms (means over the seeds) and one of the comparisons, paired by seed, with 95 %
intervals and a verdict: supported (the interval lies on the claim's side of 0), not supported (equal: within 1 % of the
optimum either way; opposite: on the other side of 0), not separable. ``*``: still different from 0 after Holm's
correction over all comparisons of the run. All is seeded; a seed's figures do not depend on how many seeds run.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from rema_verl.errors import Parser, UserError, die

if TYPE_CHECKING:  # torch is imported when the command line is right
    from .experiments import Experiment


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("python -m claims", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", metavar="NAME,...", help="these experiments alone")
    parser.add_argument("--seeds", type=int, default=50, help="seeds 0 .. N-1 (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one core each (%(default)s)")
    parser.add_argument("--lr-factor", type=float, default=1.0, help="times every learning rate (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every seed's figures there")
    parser.add_argument("--sweep", action="store_true", help="only: the baseline arms over the learning rates")
    args = parser.parse_args(argv)
    from .experiments import EXPERIMENTS

    args.only = list(EXPERIMENTS) if args.only is None else args.only.split(",")
    if unknown := [name for name in args.only if name not in EXPERIMENTS]:
        raise UserError(f"--only: no experiment {unknown[0]!r}; there are {', '.join(EXPERIMENTS)}")
    if args.seeds < 2:
        raise UserError(f"--seeds: an interval needs at least 2, got {args.seeds}")
    if not 0 < args.lr_factor < float("inf"):
        raise UserError(f"--lr-factor must be a positive number, got {args.lr_factor}")
    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {args.jobs}")
    if args.json is not None and not (args.json.parent.is_dir() and os.access(args.json.parent, os.W_OK)):
        raise UserError(f"--json {args.json}: no folder that can be written to")
    return args


def run_arm(experiment: str, arm: str, seeds: range, factor: float) -> tuple[dict[str, list[float]], float]:
    """In a worker: an arm's figures by metric and seed, and its seconds."""
    import torch

    from .experiments import EXPERIMENTS, metrics

    torch.set_num_threads(1)
    start = time.perf_counter()
    return metrics(EXPERIMENTS[experiment](factor).arms[arm](seeds)), time.perf_counter() - start


def run_rate(experiment: str, rate: float) -> dict[str, list[float]]:
    """In a worker: the baseline arm with another learning rate, on the seeds of the sweep."""
    import torch

    from .experiments import EXPERIMENTS, metrics

    torch.set_num_threads(1)
    sweep = EXPERIMENTS[experiment]().sweep
    assert sweep is not None
    return metrics(sweep(rate)(range(1000, 1005)))


def show_sweep(names: list[str], pool: ProcessPoolExecutor) -> None:
    from .experiments import RATES

    tasks = {(name, rate): pool.submit(run_rate, name, rate) for name in names for rate in RATES}
    print("Area under the baseline's curve in % of the optimum, by learning rate\n")
    rows = [[name, *(f"{fmean(tasks[name, rate].result()['area']):.1f}" for rate in RATES)] for name in names]
    table(["world", *map(str, RATES)], rows)


def table(head: list[str], rows: list[list[str]]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def shown_as(metric: str, figures: dict[str, list[float]]) -> str:
    if metric not in figures:
        return ""
    return f"{fmean(figures[metric]):.{2 if 'advantage' in metric else 1}f}"


def judged(experiment: "Experiment", figures: dict[str, dict]) -> list[dict]:
    """An experiment's comparisons, from the figures of its arms."""
    from . import effects
    from .experiments import margin

    found = []
    for c in experiment.comparisons:
        ours, theirs = c.values(c.better, figures), c.values(c.worse, figures)
        signed = effects.difference([c.sign * a for a in ours], [c.sign * b for b in theirs])
        plain = effects.difference(ours, theirs)
        found.append(
            {
                "setting": " + ".join(c.settings),
                "arms": [c.better, c.worse],
                "metric": c.metric,
                "means": [fmean(ours), fmean(theirs)],
            }
            | {"difference": plain.mean, "interval": [plain.low, plain.high], "p": plain.p}
            | {"claimed": "above" if c.sign > 0 else "below", "verdict": effects.verdict(signed, margin(c.metric))}
        )
    return found


def main(argv: list[str] | None = None) -> None:
    try:
        args = parse(argv)
    except ValueError as e:
        die(e)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from . import effects
    from .experiments import EXPERIMENTS, crumbs

    start, seeds = time.perf_counter(), range(args.seeds)
    with ProcessPoolExecutor(args.jobs) as pool:
        if args.sweep:
            show_sweep(args.only, pool)
            return
        tasks = {
            (name, arm): pool.submit(run_arm, name, arm, seeds, args.lr_factor)
            for name in args.only
            for arm in EXPERIMENTS[name]().arms
        }
        figures: dict[str, dict[str, dict]] = {name: {} for name in args.only}
        seconds = 0.0
        for done, ((name, arm), task) in enumerate(tasks.items(), 1):
            figures[name][arm], took = task.result()
            seconds += took
            if sys.stderr.isatty():
                print(f"\r{done} of {len(tasks)} arms ", end="", file=sys.stderr, flush=True)
    comparisons = {name: judged(EXPERIMENTS[name](), figures[name]) for name in args.only}
    flat = [c for name in args.only for c in comparisons[name]]
    for c, keeps in zip(flat, effects.survives_holm([c["p"] for c in flat]), strict=True):
        c["holm"] = keeps

    for name in args.only:
        experiment = EXPERIMENTS[name]()
        print(f"## {name}\n\nClaim: {experiment.claim}.\n\n{experiment.controls}.\n")
        shown = [m for m in experiment.show if any(m in f for f in figures[name].values())]
        rows = [[arm, *(shown_as(m, f) for m in shown)] for arm, f in figures[name].items()]
        table(["arm", *shown], rows)
        rows = [
            [
                c["setting"],
                f"{c['arms'][0]} {'>' if c['claimed'] == 'above' else '<'} {c['arms'][1]}",
                c["metric"],
                f"{c['difference']:+.2f} [{c['interval'][0]:+.2f}, {c['interval'][1]:+.2f}]{'*' if c['holm'] else ''}",
                c["verdict"],
            ]
            for c in comparisons[name]
        ]
        table(["setting", "claimed", "metric", "difference", "verdict"], rows)
        if name == "ranks":
            print("Advantages in one group, by the package's estimators:\n")
            table(
                ["group", "estimator", "success", "attempt", "failure"],
                [[group, *values] for group, values in crumbs()],
            )
    verdicts = (effects.SUPPORTED, effects.OPPOSITE, effects.EQUAL, effects.OPEN)
    print("## Verdicts, number of comparisons\n")
    counts = {name: Counter(c["verdict"] for c in comparisons[name]) for name in args.only}
    table(["claim", *verdicts], [[name, *(str(counts[name][v]) for v in verdicts)] for name in args.only])
    wall = time.perf_counter() - start
    print(f"{args.seeds} seeds, learning rates x {args.lr_factor:g}, {len(tasks)} arms, {len(flat)} comparisons")
    print(f"{wall:.0f} s with {args.jobs} processes ({seconds:.0f} s in the arms)")
    if args.json is not None:
        report = {
            "arguments": {**vars(args), "json": str(args.json)},
            "python": platform.python_version(),
            "figures": figures,
            "comparisons": comparisons,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
