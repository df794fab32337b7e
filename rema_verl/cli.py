"""The command `rema-verl`: doctor, show, report. Each imports what it needs only when it is called."""

import argparse
import os
import sys
from pathlib import Path

from rema_verl.errors import Parser, UserError, complain, die


def parser(doctoring: bool = True) -> argparse.ArgumentParser:
    """The command line; the arguments of ``doctor`` are its module's."""
    from rema_verl.report import show

    top = Parser(prog="rema-verl", description="Look at a machine, at a run, or at what its two roles said.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="is this machine, model or data ready for a recipe?")
    if doctoring:  # its module need not be loaded for the others
        _doctor().add_arguments(doctor)
    show.add_arguments(commands.add_parser("show", help="trajectories of a run, in the terminal"))
    report = commands.add_parser("report", help="one offline HTML page for one or more runs")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, or a metrics file of verl's")
    report.add_argument("-o", "--out", type=Path, help="the page to write (default: RUN/report.html of the first run)")
    return top


def _doctor():
    from rema_verl import doctor

    return doctor


def report(args) -> int:
    """Write the page and say where it is."""
    from rema_verl.report.run import RunError, read_run

    try:
        from rema_verl.report.html import write_report
    except ModuleNotFoundError as e:
        if (e.name or "").split(".")[0] != "plotly":
            raise
        raise RunError("the report needs plotly: pip install 'rema-verl[report]'") from None
    runs = [read_run(path) for path in args.runs]
    first = args.runs[0]
    out = args.out or (first / "report.html" if first.is_dir() else first.with_suffix(".html"))
    try:
        write_report(runs, out)
    except OSError as e:
        raise RunError(f"{out}: cannot write it ({e.strerror or e})") from None
    print(f"{out} ({out.stat().st_size / 2**20:.1f} MiB)")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run a sub-command; a user's mistake is one line and exit code 2."""
    words = sys.argv[1:] if argv is None else argv
    try:
        args = parser(doctoring=words[:1] == ["doctor"]).parse_args(words)
    except UserError as e:
        die(e)
    try:
        if args.command == "doctor":
            return _doctor().main(args)
        from rema_verl.report import show
        from rema_verl.report.run import RunError
        from rema_verl.report.trajectories import SchemaError

        try:
            return report(args) if args.command == "report" else show.main(args)
        except (RunError, SchemaError) as e:
            complain(show.visible(" ".join(str(e).split())))
            return 2
    except BrokenPipeError:  # `rema-verl show RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
