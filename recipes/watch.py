"""Run a training command with its output in a file and one line of progress on the screen.

    python recipes/watch.py --title "RL" --log FILE [--metrics FOLDER] [--steps N] -- COMMAND...

verl prints several hundred lines a step. Here they go to ``--log``; the screen shows the step (read from verl's JSON
metrics in ``--metrics``, or from its console lines in the log), the latest accuracy and the time. When the command
fails, its own error lines and the log's path are shown, and its exit code is passed on.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rema_verl.errors import PREFIX, Parser, UserError, die

POLL = 0.5  # seconds


def read_metrics(folder: Path) -> dict[int, dict[str, float]]:
    """step -> metrics over all launches of a run (one JSON-lines file each); a later launch's step wins."""
    steps: dict[int, dict[str, float]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the last line of a killed run may be cut
                continue
            steps.setdefault(row["step"], {}).update(row["data"])
    return steps


def val_accuracy(metrics: dict[str, float]) -> float | None:
    """The validation accuracy (mean over data sources) in one step's metrics, if it has one."""
    found = [v for k, v in metrics.items() if re.fullmatch(r"val-core/.*/acc/mean@\d+", k)]
    return sum(found) / len(found) if found else None


def describe(log: Path, metrics: Path | None) -> tuple[int, str]:
    """(steps done, a few words)."""
    if metrics is not None:
        steps = read_metrics(metrics)
        if not steps:
            return 0, "starting Ray and vLLM"
        last = steps[max(steps)]
        accuracy = [a for a in (val_accuracy(steps[s]) for s in sorted(steps)) if a is not None]
        words = [f"reward {last['reward/acc/mean']:.2f}"] if "reward/acc/mean" in last else []
        words += [f"validation {' > '.join(f'{a:.2f}' for a in accuracy)}"] if accuracy else []
        return max(steps), ", ".join(words)
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        steps = re.findall(r"step:(\d+) - .*?train/loss:([\d.]+)", file.read().decode(errors="replace"))
    return (int(steps[-1][0]), f"loss {float(steps[-1][1]):.3f}") if steps else (0, "starting")


def parse_args():
    """The command line."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--title", required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--metrics", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    if shutil.which(args.command[0]) is None:
        raise UserError(f"{args.command[0]}: no such command")
    return args


def main() -> int:
    try:
        args = parse_args()
    except UserError as e:
        die(e)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console()
    args.log.parent.mkdir(parents=True, exist_ok=True)
    columns = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[words]}"),
    ]
    with args.log.open("wb") as log, Progress(*columns, console=console) as progress:
        process = subprocess.Popen(args.command, stdout=log, stderr=subprocess.STDOUT)
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        task, shown = progress.add_task(args.title, total=args.steps, words=""), -1
        while process.poll() is None:
            time.sleep(POLL)
            done, words = describe(args.log, args.metrics)
            progress.update(task, completed=done, words=words)
            if not console.is_terminal and done > shown:  # a bar does not show in a file: a line per step does
                shown = done
                print(f"   {args.title}: step {done}{f' of {args.steps}' if args.steps else ''} {words}", flush=True)
        done, words = describe(args.log, args.metrics)
        progress.update(task, completed=done, words=words)
    if process.returncode:
        text = re.sub(r"\x1b\[[0-9;]*m", "", args.log.read_text(errors="replace"))
        lines = [line for line in text.splitlines() if PREFIX in line]
        tail = list(dict.fromkeys(lines)) or text.splitlines()[-15:]
        print("\n".join(tail), file=sys.stderr)
        print(f"{args.title} failed (exit {process.returncode}); full log: {args.log}", file=sys.stderr)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
