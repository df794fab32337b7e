"""Terminal viewer of trajectories: `rema-verl show RUN`.

Messages are hostile text: whatever a terminal would obey (escape sequences, control characters, direction overrides)
is shown as its code, and Rich never reads a message as markup.
"""

import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rema_verl.dialogue import ROLES
from rema_verl.report.run import Run, RunError, read_run
from rema_verl.report.trajectories import length_of, read_step, reward_of

FILTERS = ("wrong", "truncated", "lazy", "echo", "leak", "timeout")
QUESTION = 60  # characters of a question in the list
COLOURS = dict(zip(ROLES, ("magenta", "cyan"), strict=True))
HELP = (
    "Enter or n next · p previous · s NUMBER step · t NUMBER trajectory · l list · f wrong,lazy filter (f alone: none)"
    " · /TEXT search (/ alone: none) · q quit"
)


def add_arguments(parser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--step", type=int, help="training step (default: the last on disk)")
    parser.add_argument("--trajectory", type=int, metavar="N", help="show the N-th trajectory of the step (from 1)")
    parser.add_argument(
        "--filter", default="", metavar="FLAG,...", help=f"only trajectories with: {', '.join(FILTERS)}"
    )
    parser.add_argument(
        "--search", default="", metavar="TEXT", help="only trajectories that contain TEXT, in all steps"
    )
    parser.add_argument("--list", action="store_true", help="print the list and end")


def main(args) -> int:
    run = read_run(args.run)
    if not run.trajectories:
        raise RunError(f"{args.run}: no trajectories there (set rema.trajectories.folder to keep some)")
    viewer = Viewer(run, Console(), flags=split_flags(args.filter), wanted=args.search)
    if args.step is not None:
        viewer.go(args.step)
    elif args.search or args.filter:
        viewer.first_match()
    if args.list or (args.trajectory is None and not sys.stdin.isatty()):
        viewer.list()
        return 0
    viewer.choose(args.trajectory or 1)
    viewer.show()
    while sys.stdin.isatty() and args.trajectory is None:
        try:
            command = input("show> ")
        except (EOFError, KeyboardInterrupt):
            break
        try:
            if not viewer.obey(command):
                break
        except RunError as e:
            viewer.console.print(f"{e}", style="red", markup=False, highlight=False)
    return 0


def split_flags(text: str) -> tuple[str, ...]:
    """
    >>> split_flags("wrong, lazy")
    ('wrong', 'lazy')
    """
    flags = tuple(flag.strip() for flag in text.split(",") if flag.strip())
    for flag in flags:
        if flag not in FILTERS:
            raise RunError(f"--filter: {flag!r} is not one of {', '.join(FILTERS)}")
    return flags


def visible(text: str) -> str:
    r"""``text`` with everything that a terminal would act on written as its code; newlines and tabs stay.

    >>> visible("a\x1b[31mb\u202ec\rd")
    'a\\x1b[31mb\\u202ec\\x0dd'
    """
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") else _code(c)
        for c in str(text)
    )


def _code(c: str) -> str:
    return f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}"


class Viewer:
    """Where a reader is in a run: a step, the trajectories of it that pass the filters, one of those."""

    def __init__(self, run: Run, console: Console, flags: tuple[str, ...] = (), wanted: str = ""):
        self.run, self.console, self.flags, self.wanted = run, console, flags, wanted
        self.steps = list(run.trajectories)
        self.step, self.at = self.steps[-1], 0
        self.found: list[dict] = []
        self.go(self.step)

    # ------------------------------------------------------------------------------------------- where we are

    def _matching(self, step: int) -> list[dict]:
        return [t for t in read_step(self.run.trajectories[step]) if self._passes(t)]

    def _passes(self, t: dict) -> bool:
        texts = [t["question"], t["truth"], t["id"], *(turn["text"] for turn in t["turns"])]
        wanted = self.wanted.casefold()
        return all(f in t["flags"] for f in self.flags) and any(wanted in (text or "").casefold() for text in texts)

    def go(self, step: int) -> None:
        """To another step.

        Raises:
            RunError: it is not on disk.
        """
        if step not in self.run.trajectories:
            raise RunError(
                f"step {step} is not on disk; there are {len(self.steps)}, {self.steps[0]} to {self.steps[-1]}"
            )
        self.step, self.at, self.found = step, 0, self._matching(step)

    def first_match(self, steps: Iterator[int] | None = None) -> bool:
        """To the first step (of ``steps``; by default of all) that has a trajectory to show."""
        for step in steps if steps is not None else self.steps:
            if found := self._matching(step):
                self.step, self.at, self.found = step, 0, found
                return True
        return False

    def choose(self, number: int) -> None:
        """The ``number``-th trajectory of those shown of this step, counted from 1."""
        if not self.found:
            raise RunError(f"no trajectory of step {self.step} passes the filters")
        if not 1 <= number <= len(self.found):
            raise RunError(f"step {self.step} has {len(self.found)} such trajectories, not {number}")
        self.at = number - 1

    def move(self, by: int) -> bool:
        """To the next or previous trajectory that passes, over the ends of steps; False where there is none."""
        if 0 <= self.at + by < len(self.found):
            self.at += by
            return True
        here = self.steps.index(self.step)
        others = self.steps[here + 1 :] if by > 0 else reversed(self.steps[:here])
        moved = self.first_match(iter(others))
        if moved and by < 0:
            self.at = len(self.found) - 1
        return moved

    def obey(self, command: str) -> bool:
        """Do what was typed; False to end."""
        word, _, rest = command.strip().partition(" ")
        if command.startswith("/"):
            self.wanted = command[1:].strip()
            self._refresh()
        elif word in ("q", "quit"):
            return False
        elif word in ("", "n", "p"):
            if not self.move(-1 if word == "p" else 1):
                self.console.print("no more that way", style="yellow")
                return True
        elif word == "f":
            self.flags = split_flags(rest)
            self._refresh()
        elif word in ("s", "t") and rest.strip().isdecimal():
            (self.go if word == "s" else self.choose)(int(rest))
        elif word == "l":
            self.list()
            return True
        else:
            self.console.print(HELP, style="dim", markup=False)
            return True
        self.show()
        return True

    def _refresh(self) -> None:
        self.go(self.step)
        if not self.found:
            self.first_match()

    # --------------------------------------------------------------------------------------------- what is shown

    def _filters(self) -> str:
        parts = [*self.flags, *([f'"{visible(self.wanted)}"'] if self.wanted else [])]
        return f" · only {', '.join(parts)}" if parts else ""

    def list(self) -> None:
        """The trajectories of this step that pass; of every step while searching."""
        steps = self.steps if self.wanted else [self.step]
        table = Table(
            title=Text(f"{visible(self.run.name)} · steps {self.steps[0]} to {self.steps[-1]}{self._filters()}")
        )
        for head in ("step", "#", "right", "reward", "end", "tokens", "picked", "flags"):
            table.add_column(
                head, no_wrap=True, justify="right" if head in ("step", "#", "reward", "tokens") else "left"
            )
        table.add_column("question")
        for step in steps:
            for number, t in enumerate(self.found if step == self.step else self._matching(step), start=1):
                right = Text("yes", style="green") if t["acc"] else Text("no", style="red")
                table.add_row(
                    str(step), str(number), right, f"{reward_of(t):g}", _text(t["stop_reason"]), str(length_of(t)),
                    _text(", ".join(map(str, t["picked"]))), _text(", ".join(map(str, t["flags"]))),
                    _text(" ".join((t["question"] or "").split())[:QUESTION]),
                )  # fmt: skip
        self.console.print(table)

    def show(self) -> None:
        """The current trajectory, both roles side by side."""
        if not self.found:
            self.console.print(f"no trajectory of step {self.step} passes the filters", style="yellow")
            return
        t = self.found[self.at]
        head = f"step {self.step} · {self.at + 1} of {len(self.found)}{self._filters()} · trajectory {t['id']}"
        facts = [
            "right" if t["acc"] else "wrong",
            t["stop_reason"],
            f"grading {t['grade_status']}",
            *t["picked"],
            *t["flags"],
        ]
        facts.append(f"{t['cached_tokens']} of {t['prompt_tokens']} prompt tokens cached")
        about = Text(visible(" · ".join(map(str, facts))), style="green" if t["acc"] else "red")
        for name in ("question", "truth"):
            about.append(f"\n{name:10}", style="dim").append(visible(t[name] or "-"), style="default")
        self.console.print(Panel(about, title=_text(head), title_align="left"))
        if self.console.width < 80:  # no room for two columns
            panels = [_panel(turn, i) for i, turn in enumerate(t["turns"])]
            self.console.print(Group(*panels))
            return
        grid = Table.grid(expand=True, padding=(0, 1))
        grid.add_column(ratio=1)
        grid.add_column(ratio=1)
        for i in range(0, len(t["turns"]), 2):
            pair = [_panel(turn, i + k) for k, turn in enumerate(t["turns"][i : i + 2])]
            grid.add_row(*pair, *([""] * (2 - len(pair))))
        self.console.print(grid)


def _text(text: str) -> Text:
    return Text(visible(text))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _panel(turn: dict, i: int) -> Panel:
    facts = [
        f"{turn['tokens']} tokens",
        f"reward {_number(turn['reward'], '+g')}",
        f"advantage {_number(turn['advantage'], '+.3g')}",
        f"log-ratio {_number(turn['log_ratio'], '.2g')}",
    ]
    if turn["update_log_ratio"] is not None:
        facts.append(f"in the update {turn['update_log_ratio']:.2g}")
    if turn["clipped"] is not None:
        facts.append("clipped" if turn["clipped"] else "not clipped")
    colour = COLOURS[turn["role"]]
    line = Text(" · ".join(facts), style="dim")
    title = Text(f"{turn['role']} {i // 2 + 1}", style=f"bold {colour}")
    return Panel(Group(_text(turn["text"]), line), title=title, title_align="left", border_style=colour)
