"""Keep the questions that a model sometimes solves: filtered.parquet, success_rates.json and manifest.json.

    python data_prep/filter_difficulty.py --data data/math/train.parquet --role meta_thinking --run MODEL
    python data_prep/filter_difficulty.py --data data/math/train.parquet --role reasoning --run MODEL --out data/for_ra
    python data_prep/filter_difficulty.py --data data/math/train.parquet --journal FOLDER    # rollouts that are there

The paper's curriculum (ReMA, Alg. 1): before a role is trained, the questions are filtered with the models as they are.
A question stays if --min <= success rate <= --max, over --rollouts single-turn rollouts that vary what the role does:

    meta_thinking   10 plans at temperature 1, one answer to each at temperature 0
    reasoning       one plan at temperature 0, 10 answers to it at temperature 1 (the plan is generated for each answer;
                    the manifest counts the questions whose greedy plans were not all the same)

--run generates and grades with verl (recipes/rollouts.py) into --work. Killed, the same command goes on; nothing
appears in --out before everything is there. What stands after "--" goes to verl. --journal takes the trajectories that
any run of ours wrote with `rema.journal=FOLDER`; of a question with more than --rollouts of them the first ones count.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from _common import Parser, UserError, positive_int, run_main, sha256_file, write_outputs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))
from rollouts import (
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
)

from rema_verl.dialogue import ROLES


def role_overrides(role: str) -> tuple[str, ...]:
    """The role's rollouts vary what it does itself; its partner is greedy. (The job's temperature is 1.)"""
    return tuple(f"rema.roles.{r}.temperature={1.0 if r == role else 0.0}" for r in ROLES)


def success_rates(names: list[str], journal: dict[str, list[dict]], rollouts: int) -> dict[str, float | None]:
    """Share of right answers among a question's first ``rollouts``; None where there are fewer."""
    rates = {}
    for name in names:
        entries = journal.get(name, [])[:rollouts]
        rates[name] = sum(map(is_correct, entries)) / rollouts if len(entries) == rollouts else None
    return rates


def plans_differ(names: list[str], journal: dict[str, list[dict]], rollouts: int) -> int:
    """Questions whose plans are not all the same."""
    return sum(len({entry["plan"] for entry in journal.get(name, [])[:rollouts]}) > 1 for name in names)


def histogram(rates: list[float], rollouts: int) -> dict[str, int]:
    """Questions by number of right answers: "3/10" -> how many.

    >>> histogram([0.5, 0.5, 1.0], 2)
    {'0/2': 0, '1/2': 2, '2/2': 1}
    """
    counts = Counter(round(rate * rollouts) for rate in rates)
    return {f"{right}/{rollouts}": counts[right] for right in range(rollouts + 1)}


def count(names: list[str], rates: dict[str, float | None], keep: list[bool], args) -> dict[str, int]:
    """Rows that stay, and why the others do not."""
    known = [rates[name] for name in names if rates[name] is not None]
    return {
        "questions": len(names),
        "kept": sum(keep),
        "too_hard": sum(rate < args.min for rate in known),
        "too_easy": sum(rate > args.max for rate in known),
        "missing_rollouts": len(names) - len(known),
    }


def check_complete(rates: dict[str, float | None], too_long: set[str], args) -> None:
    """Stop where questions lack rollouts, unless --allow-missing leaves them out."""
    missing = [name for name, rate in rates.items() if rate is None]
    if missing and not args.allow_missing:
        fits = f"; {len(too_long):,} do not fit --max-context" if too_long else ""
        failed = "; the same command tries what failed again" if args.run and len(missing) > len(too_long) else ""
        raise UserError(
            f"{args.data}: {len(missing):,} of {len(rates):,} questions have fewer than {args.rollouts} rollouts (the "
            f"first: id {missing[0]!r}){fits}{failed} (--allow-missing leaves them out)"
        )


def parse_args(argv: list[str]):
    """The command line."""
    parser = Parser(prog="filter_difficulty.py", description="Keep the questions that a model sometimes solves.")
    parser.add_argument("--data", type=Path, required=True, help="the questions: a parquet file in verl's RL format")
    parser.add_argument("--role", choices=ROLES, help="whose training set this is; needed with --run")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--run", metavar="MODEL", help="generate with this model (Hugging Face, or a verl checkpoint)")
    parser.add_argument(
        "--reasoning-model", metavar="MODEL", help="reasoning's own model; MODEL is then meta_thinking's"
    )
    where.add_argument("--journal", type=Path, metavar="FOLDER", help="take the rollouts in this journal")
    parser.add_argument("--rollouts", type=positive_int, default=10, help="per question (default: 10)")
    parser.add_argument("--min", type=float, default=0.2, help="lowest success rate that stays (default: 0.2)")
    parser.add_argument("--max", type=float, default=0.8, help="highest (default: 0.8)")
    parser.add_argument("--allow-missing", action="store_true", help="leave out questions without enough rollouts")
    parser.add_argument("--out", type=Path, default=Path("data/filtered"), help="output folder (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="folder of --run's rollouts (default: --out with _rollouts appended)")
    add_options(parser, max_turns=1, max_message=2048, max_context=4096)
    args = parser.parse_args(argv)
    if not 0 <= args.min <= args.max <= 1:
        raise UserError(f"--min {args.min} and --max {args.max}: expected 0 <= min <= max <= 1")
    if args.run and not args.role:
        raise UserError("--run needs --role: it decides what is sampled and what is greedy")
    if args.data.suffix != ".parquet":
        raise UserError(f"{args.data}: expected a .parquet file")
    if args.journal and not args.journal.is_dir():
        raise UserError(f"{args.journal}: no such folder")
    return args


def generate(args, overrides: tuple[str, ...], rows: list[dict]) -> tuple[Path, set[str]]:
    """Run what is missing; (the journal, ids of the questions that do not fit)."""
    model, reasoning_model = (args.run, args.reasoning_model) if args.reasoning_model else split_team(args.run)
    job = Job(
        folder=(args.work or args.out.with_name(f"{args.out.name}_rollouts")).resolve(),
        model=model,
        reasoning_model=reasoning_model,
        files=(args.data,),
        samples=args.rollouts,
        temperature=1.0,
        overrides=(*role_overrides(args.role), *overrides),
        **job_options(args),
    )
    return job.folder / "journal", roll_out(job, rows, title="rollouts")


def main(argv: list[str] | None = None) -> None:
    """Roll out or read rollouts, filter, write, print."""
    ours, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    args = parse_args(ours)
    if overrides and args.journal:
        raise UserError("--journal starts nothing: there is no run for verl's options")
    rows = read_questions([args.data])
    names = [row["extra_info"]["id"] for row in rows]
    too_long: set[str] = set()
    try:
        folder, too_long = generate(args, overrides, rows) if args.run else (args.journal, too_long)
    except RunFailed as error:
        sys.exit(str(error))
    journal = read_journal(folder)
    rates = success_rates(names, journal, args.rollouts)
    check_complete(rates, too_long, args)

    import pyarrow as pa
    import pyarrow.parquet as pq

    keep = [rates[name] is not None and args.min <= rates[name] <= args.max for name in names]
    counts = count(names, rates, keep, args) | {
        "too_long": sum(name in too_long for name in names),
        "questions_whose_plans_differ": plans_differ(list(rates), journal, args.rollouts),
        "trajectories_of_other_questions": sum(len(found) for name, found in journal.items() if name not in rates),
    }
    if not any(keep):
        raise UserError(
            f"{args.data}: no question has a success rate from {args.min} to {args.max} "
            f"({counts['too_hard']:,} are below, {counts['too_easy']:,} above)"
        )
    manifest = {
        "script": "data_prep/filter_difficulty.py",
        "arguments": {"role": args.role, "rollouts": args.rollouts, "min": args.min, "max": args.max},
        "source": {"data": str(args.data), "sha256": sha256_file(args.data)},
        "rollouts": account(args, folder, overrides),
        "counts": counts,
        "histogram": histogram([rates[name] for name in names if rates[name] is not None], args.rollouts),
        "versions": {"python": sys.version.split()[0], "pyarrow": pa.__version__},
    }
    table = pq.read_table(args.data).filter(pa.array(keep))
    write_outputs(args.out, {"filtered.parquet": table}, manifest, {"success_rates.json": rates})
    print(
        f"kept {counts['kept']:,} of {len(rows):,} questions ({counts['too_hard']:,} below {args.min}, "
        f"{counts['too_easy']:,} above {args.max}, {counts['missing_rollouts']:,} without enough rollouts); "
        f"wrote filtered.parquet to {args.out}"
    )


def account(args, folder: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Where the rollouts come from, for the manifest."""
    files = {str(file.relative_to(folder)): sha256_file(file) for file in sorted(folder.rglob("*.jsonl"))}
    how = {"journal": str(args.journal)} if args.journal else {"model": args.run, "overrides": list(overrides)}
    settings = folder.parent / "settings.json"  # of a run of rollouts.py
    return how | {"settings": json.loads(settings.read_text()) if settings.exists() else None, "files": files}


if __name__ == "__main__":
    run_main(main)
