"""Two-role rollout on eight GPUs, simulated: what our Python costs there, and what waiting at every half-turn costs.

    python tests/benchmarks/rollout_at_scale.py [--trajectories 1024] [--gpus 8] [--python-ms 2] [--json FILE]

SIMULATED, no GPU is involved. What is measured: the turn lengths (dialogues drawn from the 804 real ones, in tokens of
a byte-level BPE trained on them) and, on this machine, the CPU time that our agent loop takes for a turn. What is
assumed, and can be given: an engine's step takes ``--step-ms`` plus ``--sequence-ms`` for every running sequence, and
prefills ``--prefill`` tokens a second; the defaults stand for an 8 B model in bfloat16 on a GPU with 3 TB/s (weights
16 GB a step; keys and values of 2,000 tokens, 0.26 GB a sequence). Of a context an engine prefills what is new.

Ours: each dialogue goes on by itself. Its Python runs in one of ``--workers`` processes (verl's
``rollout.agent.num_workers``), each doing one thing at a time, so dialogues queue for it. Lock-step: all dialogues wait
for each other at every half-turn, and its Python is free. A role of a dialogue stays at the engine with the fewest
sequences when it first spoke, as verl routes it.
"""

import argparse
import asyncio
import heapq
import itertools
import json
import os
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rollout import ROOT, byte_tokenizer, null_engine, real_dialogues, real_plans

from rema_verl.dialogue import META_THINKING, REASONING, ROLES


@dataclass
class Hardware:
    step: float  # seconds of an engine step
    sequence: float  # seconds a running sequence adds to it
    prefill: float  # seconds a prefilled token takes


@dataclass
class Engine:
    """Continuous batching: every step gives each running sequence one token."""

    hardware: Hardware
    now: float = 0.0
    steps: float = 0.0
    ends: list[tuple[float, int]] = field(default_factory=list)  # heap: (step of its last token, dialogue)

    def pace(self) -> float:
        return self.hardware.step + self.hardware.sequence * len(self.ends)

    def advance(self, time: float) -> None:
        if time > self.now:  # it may still be at a prefill
            self.steps += (time - self.now) / self.pace() if self.ends else 0.0
            self.now = time

    def add(self, time: float, dialogue: int, new: int, length: int) -> None:
        self.advance(time)
        self.now += new * self.hardware.prefill  # the others wait
        heapq.heappush(self.ends, (self.steps + length, dialogue))

    def next_end(self) -> float:
        return self.now + (self.ends[0][0] - self.steps) * self.pace() if self.ends else float("inf")


Turns = Sequence[tuple[int, int]]  # of one dialogue, half-turn by half-turn: (tokens to prefill, tokens to decode)


def half_turns(plan, opening: int) -> list[tuple[int, int]]:
    """meta_thinking and reasoning in turns; each prefills what the other wrote, its first half-turn the opening too."""
    said = [plan.lengths[role][t] for t in range(len(plan.lengths[META_THINKING])) for role in ROLES]
    return [((opening if i < 2 else 0) + (said[i - 1] if i else 0), length) for i, length in enumerate(said)]


def independent(dialogues: list[Turns], gpus: int, hardware: Hardware, workers: int, python: float) -> float:
    """Seconds until the last dialogue ends. ``python``: seconds of a worker's time before each half-turn."""
    engines = [Engine(hardware) for _ in range(gpus)]
    home: dict[tuple[int, int], Engine] = {}  # of (dialogue, role)
    done = [0] * len(dialogues)  # half-turns
    free = [0.0] * workers
    ready: list[tuple[float, int]] = []  # heap: (when its Python is done, dialogue)

    def ask(time: float, dialogue: int) -> None:
        worker = dialogue % workers
        free[worker] = max(free[worker], time) + python
        heapq.heappush(ready, (free[worker], dialogue))

    for dialogue in range(len(dialogues)):
        ask(0.0, dialogue)
    last = 0.0
    while True:
        first = min(engines, key=Engine.next_end)
        if ready and ready[0][0] <= first.next_end():
            time, dialogue = heapq.heappop(ready)
            seat = dialogue, done[dialogue] % 2
            if seat not in home:
                home[seat] = min(engines, key=lambda engine: len(engine.ends))
            home[seat].add(time, dialogue, *dialogues[dialogue][done[dialogue]])
        elif first.ends:
            last = first.next_end()
            first.advance(last)
            _, dialogue = heapq.heappop(first.ends)
            done[dialogue] += 1
            if done[dialogue] < len(dialogues[dialogue]):
                ask(last, dialogue)
        else:
            return last


def lock_step(dialogues: list[Turns], gpus: int, hardware: Hardware) -> float:
    """Seconds, all dialogues waiting for each other at every half-turn."""
    longest = max(map(len, dialogues))
    halves = ([d[i : i + 1] for d in dialogues if i < len(d)] for i in range(longest))
    return sum(independent(half, gpus, hardware, workers=1, python=0.0) for half in halves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("REMA_SHARED_DATA") or ROOT.parent / "shared/data")
    )
    parser.add_argument("--trajectories", type=int, default=1024)
    parser.add_argument("--gpus", type=int, default=8, help="one engine each")
    parser.add_argument("--workers", type=int, default=8, help="agent-loop workers")
    parser.add_argument("--python-ms", type=float, help="our Python time for a turn; by default measured here")
    parser.add_argument("--step-ms", type=float, default=8.0)
    parser.add_argument("--sequence-ms", type=float, default=0.1)
    parser.add_argument("--prefill", type=float, default=20_000.0, help="tokens a second and GPU")
    parser.add_argument("--opening", type=int, default=300, help="tokens of instructions and question")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    console = Console(width=150)
    real = real_dialogues(args.data)
    tokenizer = byte_tokenizer([t for q, said in real for t in (q, *said[META_THINKING], *said[REASONING])])
    if args.python_ms is None:
        asyncio.run(null_engine(real, tokenizer, 16))
        runs = [asyncio.run(null_engine(real, tokenizer, 256)) for _ in range(3)]
        args.python_ms = statistics.median(run["cpu_seconds"] / run["turns"] for run in runs) * 1e3
    rng = random.Random(args.seed)
    plans = real_plans(real, tokenizer, len(real), 1.0, rng)
    dialogues = [half_turns(plan, args.opening) for plan in itertools.islice(itertools.cycle(plans), args.trajectories)]
    tokens = sum(length for dialogue in dialogues for _, length in dialogue)
    console.print(
        f"SIMULATED: {args.trajectories:,} dialogues, {sum(map(len, dialogues)) // 2:,} turns, {tokens:,} tokens to "
        f"decode, {args.gpus} engines, {args.workers} agent-loop workers; our Python {args.python_ms:.2f} ms a turn"
    )
    table = Table("an engine's step", "ours, s", "our Python adds", "lock-step / ours", title_justify="left")
    figures = []
    for factor in (0.5, 1.0, 2.0):  # GPUs twice as fast, as given, half as fast
        hardware = Hardware(args.step_ms / 1e3 * factor, args.sequence_ms / 1e3 * factor, factor / args.prefill)
        common = (dialogues, args.gpus, hardware)
        seconds = independent(*common, args.workers, args.python_ms / 2e3)
        free, waiting = independent(*common, args.workers, 0.0), lock_step(*common)
        figures.append({"factor": factor, "ours": seconds, "python_free": free, "lock_step": waiting})
        table.add_row(
            f"{args.step_ms * factor:g} ms + {args.sequence_ms * factor:g} ms a sequence",
            f"{seconds:.1f}",
            f"{seconds / free - 1:+.1%}",
            f"{waiting / seconds:.2f}",
        )
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps({"arguments": {k: str(v) for k, v in vars(args).items()}, "runs": figures}))


if __name__ == "__main__":
    main()
