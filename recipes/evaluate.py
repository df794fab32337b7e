"""Measure a model on the evaluation suite, as a two-role team or as a single agent, beside the paper's numbers.

    python recipes/evaluate.py MODEL --questions data/eval_suite/eval_suite.parquet --out runs/eval/mine
    python recipes/evaluate.py MODEL ... --mode mrp --paper qwen25_7b/mrp_rl        one agent that plans first
    python recipes/evaluate.py MODEL ... --samples 16 --temperature 0.6 --k 4 16    avg@16, pass@4, pass@16

`recipes/eval_math.sh` and `recipes/eval_judge.sh` call this with the benchmarks' settings. MODEL is a Hugging Face
folder or name, or a verl checkpoint (.../global_step_N), of one model or of a model per role (--reasoning-model gives
the second one by hand). What stands after "--" goes to verl as it is.

Generation and grading are verl's validation (`rollouts.py`); a run that was killed goes on with the same command, and
when nothing is missing the same command only prints the table. Written to --out: results.json, results.md.

- A question's samples that never arrived count as wrong, and are shown: "too long" (the question does not fit
  --max-context), "failed" (exit code 1; the same command tries them again).
- An answer counts if it is right and the dialogue finished, as in ReMA's reward; "right, unfinished" counts the rest.
- avg@N is the mean over questions of the share of right samples; pass@k the unbiased 1 - C(N-c, k) / C(N, k) for c
  right samples of N. Both have a 95 % bootstrap interval over questions: it speaks of other questions of this kind, not
  of another training run.
- The average is the paper's: the plain mean over the paper's sets (AIME25 is not one of them).
"""

import json
import math
import sys
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data_prep"))
from _common import Parser, UserError, positive_int, run_main
from rollouts import (
    MODES,
    Job,
    RunFailed,
    add_options,
    is_correct,
    job_options,
    read_journal,
    read_questions,
    roll_out,
    split_overrides,
    split_team,
    write_text,
)

from rema_verl.dialogue import StopReason

PAPER = Path(__file__).with_name("paper_results.json")
TABLE_OF = {"math": "math", "judge": "judge_strict"}  # the paper's table where --paper does not name one
RESAMPLES = 10_000
ONE_AGENT = "one agent"  # stands where a dialogue has its stop reason


# --- statistics ----------------------------------------------------------------------------------------------------


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate, from ``n`` samples of which ``correct`` are right, that one of ``k`` samples is right.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def resample(values: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Bootstrap means of ``values`` (one per question); (resamples,).

    Only how often each distinct value is drawn matters for a mean, and few are distinct: one multinomial draw per
    resample instead of an index per question, with the same distribution.
    """
    distinct, counts = np.unique(values, return_counts=True)
    return rng.multinomial(len(values), counts / len(values), size=resamples) @ distinct / len(values)


def interval(means: np.ndarray) -> list[float]:
    """95 % percentile interval."""
    return [float(edge) for edge in np.percentile(means, (2.5, 97.5))]


@dataclass
class Score:
    """What the journal says about one benchmark."""

    name: str
    correct: list[int] = field(default_factory=list)  # right samples of each question
    samples: int = 0  # asked for
    turns: int = 0
    dialogues: int = 0
    stops: Counter = field(default_factory=Counter)
    grades: Counter = field(default_factory=Counter)
    unfinished: int = 0  # right, but not finished
    too_long: int = 0
    failed: int = 0


def tally(rows: Iterable[dict], journal: dict[str, list[dict]], samples: int, too_long: set[str]) -> list[Score]:
    """Count per benchmark, in the order in which they appear. Of a question's trajectories the first ``samples`` count:
    a kill in the middle can leave a few more."""
    scores: dict[str, Score] = {}
    for row in rows:
        name, source = row["extra_info"]["id"], row["data_source"]
        score = scores.setdefault(source, Score(source))
        entries = journal.get(name, [])[:samples]
        score.correct.append(sum(map(is_correct, entries)))
        score.samples += samples
        score.stops.update(entry["stop_reason"] or ONE_AGENT for entry in entries)
        score.grades.update(entry["grade_status"] or "not said" for entry in entries)
        score.unfinished += sum(entry["acc"] >= 1 and not is_correct(entry) for entry in entries)
        score.turns += sum(entry["dialogue_turns"] or 0 for entry in entries)
        score.dialogues += sum(entry["dialogue_turns"] is not None for entry in entries)
        missing = samples - len(entries)
        score.too_long += missing * (name in too_long)
        score.failed += missing * (name not in too_long)
    return list(scores.values())


def measure(scores: list[Score], samples: int, ks: list[int], paper_sets: Iterable[str], seed: int) -> dict[str, Any]:
    """Shares, intervals and counts of each benchmark, and the average over the paper's sets that were measured."""
    draws: dict[str, dict[str, np.ndarray]] = {}
    benchmarks = {}
    for score in scores:
        # a stream of its own for each set: its interval does not depend on which others are measured
        rng = np.random.default_rng([seed, zlib.crc32(score.name.encode())])
        correct = np.array(score.correct)
        figures = {f"avg@{samples}": correct / samples}
        for k in ks:
            of_count = np.array([pass_at_k(samples, c, k) for c in range(samples + 1)])
            figures[f"pass@{k}"] = of_count[correct]
        draws[score.name] = {name: resample(values, rng, RESAMPLES) for name, values in figures.items()}
        benchmarks[score.name] = {
            "questions": len(score.correct),
            "samples": score.samples,
            "figures": {
                name: {"mean": float(values.mean()), "interval": interval(draws[score.name][name])}
                for name, values in figures.items()
            },
            "turns_per_dialogue": score.turns / score.dialogues if score.dialogues else None,
            "stop_reasons": dict(score.stops),
            "grade_status": dict(score.grades),
            "right_but_unfinished": score.unfinished,
            "missing": {"too_long": score.too_long, "failed": score.failed},
        }
    names = [name for name in paper_sets if name in benchmarks] or list(benchmarks)
    average = {
        figure: {
            "mean": float(np.mean([benchmarks[name]["figures"][figure]["mean"] for name in names])),
            "interval": interval(np.mean([draws[name][figure] for name in names], axis=0)),
        }
        for figure in (next(iter(benchmarks.values()))["figures"] if benchmarks else {})
    }
    return {"benchmarks": benchmarks, "average": {"of": names, "figures": average}}


# --- the paper -----------------------------------------------------------------------------------------------------


def paper_column(choice: str | None, task: str) -> dict[str, Any]:
    """{"label", "sets", "questions", "values"} of one row block of the paper's tables; no values without a choice.

    Args:
        choice: MODEL/METHOD, or TABLE/MODEL/METHOD; see ``paper_results.json``.
    """
    tables = json.loads(PAPER.read_text())["tables"]
    parts = (choice or "").split("/")
    name = parts.pop(0) if len(parts) == 3 else TABLE_OF[task]
    if choice is not None:
        known = [f"{t}/{m}/{k}" for t, table in tables.items() for m, r in table["results"].items() for k in r]
        if "/".join([name, *parts]) not in known:
            raise UserError(f"--paper '{choice}': the paper has {', '.join(known)}")
    table = tables[name]
    values = table["results"][parts[0]][parts[1]] if choice else {}
    label = f"paper, {table['name']} {'/'.join(parts)}" if choice else ""
    return {"label": label, "sets": list(table["questions"]), "questions": table["questions"], "values": values}


def paper_average(paper: dict[str, Any], names: list[str]) -> float | None:
    """The published average, or the same mean over the sets that were measured."""
    values = paper["values"]
    if not values or not set(names) <= values.keys():
        return None
    if names == paper["sets"]:
        return values["average"]
    return sum(values[name] for name in names) / len(names)


# --- tables --------------------------------------------------------------------------------------------------------

Rows = list[list[str]]


def percent(figure: dict[str, Any]) -> list[str]:
    low, high = figure["interval"]
    return [f"{100 * figure['mean']:.2f}", f"{100 * low:.1f} to {100 * high:.1f}"]


def result_table(result: dict[str, Any], paper: dict[str, Any]) -> tuple[list[str], Rows]:
    """Header and rows: each benchmark, then the average where there is more than one."""
    figures = list(result["average"]["figures"])
    header = ["benchmark", "questions", paper["label"] or "paper", *(h for f in figures for h in (f, "95 %"))]
    rows = []
    for name, measured in result["benchmarks"].items():
        published = paper["values"].get(name)
        cells = [cell for figure in figures for cell in percent(measured["figures"][figure])]
        rows.append([name, f"{measured['questions']:,}", "" if published is None else f"{published:.2f}", *cells])
    names = result["average"]["of"]
    if len(result["benchmarks"]) > 1:
        published = paper_average(paper, names)
        cells = [cell for figure in figures for cell in percent(result["average"]["figures"][figure])]
        label = "average" if len(names) == len(result["benchmarks"]) else f"average of {len(names)} sets"
        rows.append([label, "", "" if published is None else f"{published:.2f}", *cells])
    return header, rows


def failure_table(result: dict[str, Any]) -> tuple[list[str], Rows]:
    """How trajectories ended and what went wrong, in trajectories."""
    benchmarks = result["benchmarks"]
    present = {reason for measured in benchmarks.values() for reason in measured["stop_reasons"]}
    stops = [*(reason for reason in map(str, StopReason) if reason in present), *sorted(present - set(StopReason))]
    header = ["benchmark", "samples", "turns", *(s.replace("_", " ") for s in stops), "right, unfinished"]
    known = {"no_answer": "no answer", "timeout": "grading time-out", "error": "grading error"}
    seen = {status for measured in benchmarks.values() for status in measured["grade_status"]}
    known |= {status: status for status in sorted(map(str, seen)) if status not in (*known, "graded", "custom")}
    header += [*known.values(), "too long", "failed"]
    rows = []
    for name, measured in benchmarks.items():
        turns, grades, missing = measured["turns_per_dialogue"], measured["grade_status"], measured["missing"]
        counts = [measured["stop_reasons"].get(stop, 0) for stop in stops]
        counts += [measured["right_but_unfinished"], *(grades.get(status, 0) for status in known)]
        counts += [missing["too_long"], missing["failed"]]
        shown = "" if turns is None else f"{turns:.1f}"
        rows.append([name, f"{measured['samples']:,}", shown, *(f"{count:,}" for count in counts)])
    return header, rows


def notes(result: dict[str, Any], paper: dict[str, Any], job: Job) -> list[str]:
    """What a reader has to know to take the numbers for what they are."""
    said = [f"95 %: percentile bootstrap over questions, {RESAMPLES:,} resamples, seed {job.seed}."]
    benchmarks = result["benchmarks"]
    flat = [n for n, m in benchmarks.items() for low, high in [next(iter(m["figures"].values()))["interval"]]
            if low == high]  # fmt: skip
    if flat:
        said.append(f"An interval without width ({', '.join(flat)}) says only that all questions came out the same.")
    if len(benchmarks) > 1:
        said.append(f"Average: plain mean over {', '.join(result['average']['of'])}, as in the paper.")
    if odd := [f"{n} ({m['questions']:,} of {paper['questions'][n]:,})" for n, m in benchmarks.items()
               if m["questions"] != paper["questions"].get(n, m["questions"])]:  # fmt: skip
        said.append(f"Not the published number of questions: {', '.join(odd)}.")
    if paper["values"]:
        differs = [f"--max-turns {job.max_turns}"] if job.mode == "rema" and job.max_turns > 1 else []
        differs += [f"{job.samples} samples at temperature {job.temperature}"] if job.temperature else []
        said.append(
            "The paper's numbers are one greedy answer per question, single-turn, one training run"
            + (f"; here: {', '.join(differs)}." if differs else ".")
        )
    if lost := sum(sum(m["missing"].values()) for m in benchmarks.values()):
        said.append(f"{lost:,} trajectories are missing and count as wrong.")
    return said


def markdown(title: str, about: str, tables: list[tuple[list[str], Rows]], said: list[str]) -> str:
    lines = [f"# {title}", "", about, ""]
    for header, rows in tables:
        rule = ["---"] + ["---:"] * (len(header) - 1)
        cells = ([cell.replace("|", "\\|") for cell in row] for row in (header, rule, *rows))
        lines += [*(f"| {' | '.join(row)} |" for row in cells), ""]
    return "\n".join([*lines, *(f"- {line}" for line in said), ""])


def show(title: str, tables: list[tuple[list[str], Rows]], said: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console = console if console.is_terminal else Console(width=160)  # a file has no width
    for (header, rows), caption in zip(tables, (title, "trajectories"), strict=True):
        console.print(f"\n{caption}", highlight=False, markup=False)
        table = Table()
        for i, head in enumerate(header):
            table.add_column(head, justify="right" if i else "left", no_wrap=i == 0)
        for row in rows:
            table.add_row(*map(Text, row))  # Text: brackets in a name are no markup
        console.print(table)
    for line in said:
        console.print(line, highlight=False, markup=False)


def report(job: Job, rows: list[dict], too_long: set[str], ks: list[int], paper: dict[str, Any]) -> int:
    """Print and write the tables; return how many trajectories failed."""
    scores = tally(rows, read_journal(job.folder / "journal"), job.samples, too_long)
    result = measure(scores, job.samples, ks, paper["sets"], job.seed)
    said = notes(result, paper, job)
    tables = [result_table(result, paper), failure_table(result)]
    title = f"{job.task}, {job.mode}: " + " + ".join(model for model in (job.model, job.reasoning_model) if model)
    how = "greedy" if job.temperature == 0 else f"temperature {job.temperature}, top-p {job.top_p}"
    turns = f", at most {job.max_turns} turns" if job.mode == "rema" else ""
    about = f"{job.samples} sample(s) per question, {how}{turns}, {job.max_message} tokens a message"
    result |= {"settings": job.settings(), "paper": paper, "notes": said}
    write_text(job.folder / "results.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    write_text(job.folder / "results.md", markdown(title, f"{about}. Percent.", tables, said))
    show(f"{title} ({about})", tables, said)
    print(f"written to {job.folder}: results.json, results.md")
    return sum(score.failed for score in scores)


# --- main ----------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str]):
    """The command line."""
    parser = Parser(prog="evaluate.py", description=__doc__.split("\n")[0])
    parser.add_argument("model", help="Hugging Face folder or name, or a verl checkpoint")
    parser.add_argument("--questions", type=Path, nargs="+", required=True, metavar="FILE", help="verl's RL format")
    parser.add_argument("--out", type=Path, required=True, help="folder for this run and no other")
    parser.add_argument(
        "--reasoning-model", metavar="MODEL", help="reasoning's own model; MODEL is then meta_thinking's"
    )
    parser.add_argument("--mode", choices=MODES, default="rema", help="the team, or one agent (default: rema)")
    parser.add_argument("--samples", type=positive_int, default=1, help="per question (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--k", type=positive_int, nargs="*", help="pass@k (default: 4, 16, ... up to --samples)")
    parser.add_argument("--only", nargs="*", default=[], metavar="SET", help="these data sources only")
    parser.add_argument("--paper", metavar="[TABLE/]MODEL/METHOD", help="the paper's numbers to show beside ours")
    add_options(parser, max_turns=30, max_message=512, max_context=4096)
    return parser.parse_args(argv)


def check_args(args) -> list[int]:
    """The k of pass@k; combinations that make no sense are mistakes."""
    if not 0 <= args.temperature < math.inf:
        raise UserError(f"--temperature {args.temperature} is not 0 or above")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p} is not above 0 and at most 1")
    if args.samples > 1 and args.temperature == 0:
        raise UserError(f"--samples {args.samples} needs a --temperature above 0: greedy samples are all the same")
    if args.task == "judge" and args.mode == "rema" and args.max_turns > 1:
        raise UserError("--task judge is single-turn: use --max-turns 1")
    ks = [k for k in (4**i for i in range(1, 20)) if k <= args.samples] if args.k is None else sorted(set(args.k))
    if too_large := [k for k in ks if k > args.samples]:
        raise UserError(f"--k {too_large[0]} is more than --samples {args.samples}")
    return ks


def main(argv: list[str] | None = None) -> None:
    """Roll out what is missing, then print and write the tables."""
    ours, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    args = parse_args(ours)
    ks, paper = check_args(args), paper_column(args.paper, args.task)
    rows = read_questions(args.questions, tuple(args.only))
    model, reasoning_model = (args.model, args.reasoning_model) if args.reasoning_model else split_team(args.model)
    if reasoning_model and args.mode != "rema":
        raise UserError(f"--mode {args.mode} is one agent, and here are two models: {model}, {reasoning_model}")
    job = Job(
        folder=args.out.resolve(),
        model=model,
        reasoning_model=reasoning_model,
        files=tuple(args.questions),
        mode=args.mode,
        samples=args.samples,
        temperature=args.temperature,
        top_p=args.top_p,
        only=tuple(sorted(args.only)),
        overrides=overrides,
        **job_options(args),
    )
    try:
        too_long = roll_out(job, rows)
    except RunFailed as error:
        sys.exit(str(error))
    if failed := report(job, rows, too_long, ks, paper):
        sys.exit(f"{failed:,} trajectories failed (see {job.folder / 'log'}); the same command tries them again")


if __name__ == "__main__":
    run_main(main)
