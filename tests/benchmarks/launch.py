"""What a launch costs: every process of a command, when it came and went, its CPU seconds and what it had loaded.

    python tests/benchmarks/launch.py                                # SMOKE=1 of a recipe, in a folder that it keeps
    python tests/benchmarks/launch.py -- bash recipes/quickstart.sh  # any other command

Processes are found by a variable in their environment, so Ray's daemons and workers count although they are nobody's
children, and are read from /proc every 50 ms: what lives shorter is only in the machine's total, and so is what a
process used after its last reading. What a process has loaded is read off the shared libraries in its memory map.
"""

import argparse
import os
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
MARK = "REMA_BENCH_LAUNCH"
TICK = os.sysconf("SC_CLK_TCK")
LIBRARIES = {  # a part of a mapped file's name -> what it says is loaded
    "libtorch_cpu": "torch",
    "_raylet": "ray",
    "/tokenizers": "tokenizers",
    "/pyarrow/": "pyarrow",
    "/vllm/_": "vllm",
    "/pandas/": "pandas",
    "/scipy/": "scipy",
    "/llvmlite/": "numba",
}


@dataclass
class Seen:
    """One process: seconds since the launch, CPU seconds, largest resident set in bytes."""

    name: str
    began: float
    ended: float = 0.0
    cpu: float = 0.0
    memory: int = 0
    loaded: set[str] = field(default_factory=set)


def name_of(command: list[str]) -> str:
    """What a row is called: a Ray actor's title, a module, a script, or the program."""
    if not command:
        return "?"
    if command[0].startswith(("ray::", "VLLM")):
        return command[0].strip()
    words = [word for word in command if word]
    for at, word in enumerate(words):
        if word == "-m" and at + 1 < len(words):
            return f"python -m {words[at + 1]}"
        if word.endswith((".py", ".sh")):
            return f"{Path(words[0]).name} {Path(word).name}"
    return f"{Path(words[0]).name} {words[1][:24] if len(words) > 1 else ''}".strip()


def machine_cpu() -> float:
    """CPU seconds the whole machine has been busy."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq, *_ = map(int, file.readline().split()[1:])
    return (user + nice + system + irq + softirq) / TICK


def look(pids: dict[int, bool], seen: dict[tuple[int, str], Seen], mark: bytes, now: float, maps: bool) -> None:
    """Read every process of the launch once; ``pids`` remembers which are ours."""
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        pid = int(entry)
        try:
            if pid not in pids:
                pids[pid] = mark in Path(f"/proc/{pid}/environ").read_bytes()
            if not pids[pid]:
                continue
            stat = Path(f"/proc/{pid}/stat").read_text()
            values = stat[stat.rindex(")") + 2 :].split()
            process = seen.setdefault((pid, values[19]), Seen("?", now))
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            process.name = name_of(command) if any(command) else process.name
            process.cpu = (int(values[11]) + int(values[12])) / TICK
            process.memory = max(process.memory, int(values[21]) * os.sysconf("SC_PAGE_SIZE"))
            process.ended = now
            if maps:
                text = Path(f"/proc/{pid}/maps").read_text()
                process.loaded |= {name for part, name in LIBRARIES.items() if part in text}
        except (OSError, ValueError, IndexError):  # it ended while we looked
            continue


def measure(command: list[str], log: Path, **environment: str) -> tuple[list[Seen], float, float, int]:
    """Run a command; its processes, wall seconds, CPU seconds of the whole machine, and exit code."""
    mark = uuid.uuid4().hex
    environment = {**os.environ, **environment, MARK: mark}
    pids: dict[int, bool] = {}
    seen: dict[tuple[int, str], Seen] = {}
    before, start = machine_cpu(), time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=REPO, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
        count = 0
        while process.poll() is None:
            look(pids, seen, f"{MARK}={mark}".encode(), time.monotonic() - start, maps=count % 10 == 0)
            count += 1
            time.sleep(0.05)
    wall = time.monotonic() - start
    return list(seen.values()), wall, machine_cpu() - before, process.returncode


def table(processes: list[Seen], wall: float, machine: float, least: float) -> str:
    """A line per process that used at least ``least`` CPU seconds, in order of their beginning."""
    lines = ["| process | from s | to s | CPU s | MiB | loaded |", "|---|---|---|---|---|---|"]
    small = [p for p in processes if p.cpu < least]
    for p in sorted((p for p in processes if p.cpu >= least), key=lambda p: p.began):
        loaded = " ".join(sorted(p.loaded))
        lines.append(f"| {p.name} | {p.began:.1f} | {p.ended:.1f} | {p.cpu:.1f} | {p.memory >> 20} | {loaded} |")
    lines.append(f"| {len(small)} more below {least} s | | | {sum(p.cpu for p in small):.1f} | | |")
    python = sum("torch" in p.loaded for p in processes)
    lines.append(
        f"\n{len(processes)} processes, {python} with torch, {sum(p.cpu for p in processes):.1f} CPU s; machine "
        f"{machine:.1f}, wall {wall:.1f} s"
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--least", type=float, default=0.3, help="CPU seconds from which a process has its own line")
    parser.add_argument("--log", type=Path, default=Path("runs/bench_launch.log"), help="what the command prints")
    parser.add_argument("command", nargs="*", help="default: SMOKE=1 bash recipes/rema_llama8b_math.sh")
    args = parser.parse_args(argv)
    log = args.log if args.log.is_absolute() else REPO / args.log
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {} if args.command else {"SMOKE": "1"}
    command = args.command or ["bash", "recipes/rema_llama8b_math.sh"]
    processes, wall, machine, code = measure(command, log, **environment)
    print(table(processes, wall, machine, args.least))
    if code:
        print(f"the command ended with exit code {code}: see {log}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
