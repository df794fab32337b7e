"""Stage 0: deliberate with frozen agents and write down what every action would have earned in every visited state.

    python -m rema_verl.deliberation.collect --model MODEL --questions FILE... --out FOLDER [--policy FILE] [-- k=v ...]

The agents act by a behaviour policy (uniform, or a trained meta-policy); Refine is executed for every agent in every
round all the same, as its reward cannot be known otherwise. What the other agents do stays as it was taken.

FOLDER gets ``settings.json`` and the corpus (:mod:`rema_verl.deliberation.corpus`). Killed, the same command goes on
with the trajectories that are not there yet; with the same seed the corpus is the same. What follows ``--`` is verl's.
"""

import argparse
import asyncio
import hashlib
import json
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rema_verl.checks import check_row, is_missing
from rema_verl.config.mpdf import MPDFConfig
from rema_verl.deliberation.protocol import ACTIONS, REFINE, AgentState, Same, action_rewards
from rema_verl.deliberation.serving import Client, Serving, fingerprint, load_tokenizer, serve
from rema_verl.deliberation.state import LAYOUT, SCHEMA, team_features
from rema_verl.deliberation.team import Deliberation, Policy, PromptTooLong, Team, always, deliberate, uniform
from rema_verl.errors import Parser, UserError, die
from rema_verl.rewards.grading import grade

if TYPE_CHECKING:
    from rema_verl.deliberation.policy import MetaPolicy  # imports torch: not before the command line is checked

T = TypeVar("T")
SHARD = 32  # trajectories that a kill can cost


@dataclass(frozen=True)
class Question:
    """``id`` names the question for ever; ``truth`` is its final answer."""

    id: str
    text: str
    truth: str
    source: str


class Grader:
    """Right or wrong, and equal or not, for one question. Slow: call it in a thread."""

    def __init__(self, truth: str, timeout: float):
        self.truth, self.timeout = truth, timeout

    def correct(self, answer: str | None) -> bool:
        return answer is not None and grade(f"\\boxed{{{answer}}}", self.truth, self.timeout).correct

    def same(self, a: str, b: str) -> bool:
        return a == b or grade(f"\\boxed{{{a}}}", b, self.timeout).correct


# --- what collect and evaluate have in common -----------------------------------------------------------------------


def or_exit(prepare: Callable[..., T], *args) -> T:
    """``prepare(*args)``; a user's mistake is one line and exit code 2."""
    try:
        return prepare(*args)
    except ValueError as e:
        die(e)


def whole(least: int) -> Callable[[str], int]:
    """argparse type: a whole number of at least ``least``."""

    def read(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least {least}")
        return int(text)

    return read


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of both commands."""
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder or name: the frozen agents")
    add("--questions", type=Path, nargs="+", required=True, metavar="FILE", help="parquet in verl's RL format")
    add("--limit", type=whole(1), help="only so many questions, the first ones")
    add("--out", type=Path, required=True, help="folder for this run and no other")
    add("--agents", type=int, default=3, help="of a team (default: 3)")
    add("--rounds", type=int, default=3, help="of actions (default: 3)")
    add("--samples", type=whole(1), default=1, help="deliberations on each question (default: 1)")
    add("--temperature", type=float, default=1.0, help="of every call (default: 1.0)")
    add("--max-tokens", type=whole(1), default=1024, help="of one message (default: 1024)")
    add("--context", type=whole(2), default=8192, help="tokens of prompt and message (default: 8192)")
    add("--prompts", type=Path, metavar="FILE", help="JSON: system messages by kind of call, in place of the defaults")
    add("--grading-timeout", type=float, default=5.0, help="CPU seconds for one answer (default: 5)")
    add("--seed", type=int, default=0)
    add("--in-flight", type=whole(1), default=32, help="deliberations at a time (default: 32)")
    add("--device", choices=("gpu", "cpu"), default="gpu", help="cpu: a machine without accelerator")
    add("--gpus", type=whole(1), default=1, help="GPUs per node (default: 1)")
    add("--nodes", type=whole(1), default=1)
    add("--tensor", type=whole(1), default=1, help="GPUs that share one copy of the model (default: 1)")


@dataclass
class Job:
    """A checked command line: everything that can be wrong has been looked at, and no model is loaded yet."""

    args: argparse.Namespace
    team: Team
    questions: list[Question]
    serving: Serving
    tokenizer: Any  # loaded last: that imports transformers
    settings: dict[str, Any]  # what decides the outcome

    def grader(self, question: Question) -> Grader:
        return Grader(question.truth, self.args.grading_timeout)


MACHINE = ("out", "questions", "prompts", "in_flight", "device", "gpus", "nodes", "tensor", "model", "policy")


def prepare(parser: argparse.ArgumentParser, argv: Sequence[str], check: Callable[[argparse.Namespace], None]) -> Job:
    """Read and check a command line, as far as neither torch nor transformers is needed for it.

    Args:
        check: of the command's own options.

    Raises:
        ValueError: for the first mistake found, in one line.
    """
    ours = list(argv[: argv.index("--")] if "--" in argv else argv)
    theirs = tuple(argv[len(ours) + 1 :])
    args = parser.parse_args(ours)
    check(args)
    config = MPDFConfig(
        agents=args.agents,
        rounds=args.rounds,
        prompts=dict(read_prompts(args.prompts)) if args.prompts else {},
        grading_timeout=args.grading_timeout,
    )
    if not 0 <= args.temperature < float("inf"):
        raise ValueError(f"--temperature {args.temperature} is not 0 or above")
    if args.max_tokens >= args.context:
        raise ValueError(f"--max-tokens {args.max_tokens} leaves no room for a prompt in --context {args.context}")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: not a folder")
    if is_missing(args.model):
        raise UserError(f"--model {args.model}: cannot load it (no such folder)")
    serving = Serving(
        args.model, args.device, args.gpus, args.nodes, args.tensor, context=args.context, overrides=theirs
    )
    if theirs:
        serving.compose()
    questions = read_questions(args.questions)[: args.limit]
    team = Team(config.agents, config.rounds, args.temperature, args.max_tokens, args.seed, config.texts)
    settings = {key: value for key, value in vars(args).items() if key not in MACHINE}
    settings |= {
        "schema": SCHEMA,
        "prompts": vars(config.texts),
        "weights": fingerprint(args.model),
        "asked": hashlib.sha256(repr(questions).encode()).hexdigest()[:16],
        "overrides": list(theirs),
    }
    return Job(args, team, questions, serving, None, settings)


def read_prompts(path: Path) -> dict[str, str]:
    """The --prompts file."""
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"--prompts {path}: not a readable JSON file ({e})") from None
    if not isinstance(prompts, dict):
        raise ValueError(f"--prompts {path}: expected an object with one text per kind of call")
    return prompts


def read_questions(files: Iterable[Path]) -> list[Question]:
    """The rows of verl's RL files. A question that is there again, word for word and with the same truth, counts once.

    Raises:
        ValueError: naming file and row.
    """
    for path in files:
        if not path.is_file():
            raise UserError(f"--questions {path}: no such file")
    import pyarrow as pa
    import pyarrow.parquet as pq

    found: dict[str, Question] = {}
    for path in files:
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException) as e:
            raise ValueError(
                f"--questions {path}: not a readable parquet file ({str(e).splitlines()[0][:120]})"
            ) from None
        for column in ("prompt", "reward_model"):
            if column not in table.column_names:
                raise ValueError(f"--questions {path}: no column '{column}'")
        for number, row in enumerate(table.to_pylist(), start=1):
            check_row(row, f"--questions {path}: row {number}", "prompt")
            text = [str(m["content"]) for m in row["prompt"] if m["role"] == "user"][-1]
            source, truth = str(row.get("data_source")), str(row["reward_model"]["ground_truth"])
            name = (row.get("extra_info") or {}).get("id")
            name = str(name) if name is not None else hashlib.sha256(f"{source}\n{text}".encode()).hexdigest()[:16]
            question = Question(name, text, truth, source)
            if found.setdefault(name, question) != question:
                raise ValueError(f"--questions {path}: row {number}: id {name!r} again, with another question or truth")
    if not found:
        raise ValueError(f"--questions {', '.join(map(str, files))}: no rows")
    return list(found.values())


def load_policy(name: str | Path) -> Policy:
    """ "uniform", "persist", or the file of a trained meta-policy.

    Raises:
        ValueError: no such file, or a meta-policy of another schema.
    """
    if str(name) == "uniform":
        return uniform
    if str(name) == "persist":
        return always("persist")
    check_policy(name)
    from rema_verl.deliberation.policy import MetaPolicy

    return learned(MetaPolicy.load(name))


def check_policy(name: str | Path) -> None:
    """What can be said of a policy's name without torch."""
    if str(name) not in ("uniform", "persist") and not Path(name).is_file():
        raise UserError(f"{name}: no such file")


def learned(network: "MetaPolicy") -> Policy:
    """A meta-policy's distributions."""
    import torch

    from rema_verl.deliberation.policy import collate

    def probabilities(states: list[AgentState], progress: float, same: Same) -> list[list[float]]:
        rows = team_features(states, same, progress)
        with torch.no_grad():
            logits = network(*collate([rows] * len(rows), range(len(rows))))
        return logits.double().softmax(dim=1).tolist()

    return probabilities


def one_thread() -> None:
    """torch's: the network is small; and sums in one order."""
    import torch

    torch.set_num_threads(1)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


async def each(title: str, items: Sequence[T], work: Callable[[T], Awaitable[None]], at_a_time: int, before: int = 0):
    """``await work(item)`` for every item, some at a time, with a progress bar. The first exception ends it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console, todo = Console(), iter(items)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(title, total=before + len(items), completed=before)
        shown = done = 0

        async def worker() -> None:
            nonlocal shown, done
            for item in todo:
                await work(item)
                done += 1
                progress.advance(task)
                if not console.is_terminal and done >= shown + max(1, len(items) // 10):  # a bar shows in no file
                    shown = done
                    print(f"   {title}: {before + done:,} of {before + len(items):,}", flush=True)

        workers = [asyncio.ensure_future(worker()) for _ in range(min(at_a_time, len(items)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for one in workers:
                one.cancel()


# --- stage 0 --------------------------------------------------------------------------------------------------------


def visited(deliberation: Deliberation, question: Question, grader: Grader, name: str, seed: int) -> list[dict]:
    """The corpus rows of one deliberation in which every Refine was executed. Grades: call it in a thread."""
    rows = []
    for t, now in enumerate(deliberation.rounds):
        states = team_features(now.before, grader.same, t / len(deliberation.rounds))
        before = [grader.correct(s.answer) for s in now.before]

        def judged(state: AgentState) -> tuple[str | None, bool, float]:
            return state.answer, grader.correct(state.answer), state.confidence

        after = [judged(s) for s in now.after]
        for i in range(len(states)):
            spent = [c for c in deliberation.calls if c.agent == i and c.round == t + 1]  # a Refine and its critic
            rows.append(
                {
                    "trajectory": name,
                    "question_id": question.id,
                    "seed": seed,
                    "round": t,
                    "agent": i,
                    "n_agents": len(states),
                    "own": states[i],
                    "peers": [row for j, row in enumerate(states) if j != i],
                    "action_taken": ACTIONS.index(now.actions[i]),
                    "rewards": action_rewards(
                        i, before, after, [judged(s) for s in now.outcomes(i) if s is not None], grader.same
                    ),
                    "correct_before": before[i],
                    "tokens": [(a == REFINE) * sum(c.tokens for c in spent) for a in ACTIONS],
                    "prompt_tokens": [(a == REFINE) * sum(c.prompt_tokens for c in spent) for a in ACTIONS],
                }
            )
    return rows


async def collect(job: Job, policy: Policy, client: Client) -> int:
    """Deliberate on what is not in the corpus yet; the number of trajectories whose question was too long."""
    from rema_verl.deliberation import corpus

    folder, seed = job.args.out, job.team.seed
    done = corpus.done_keys(folder)
    todo = [
        (f"{question.id}/{sample}/{seed}", question, sample)
        for sample in range(job.args.samples)
        for question in job.questions
    ]
    left = [item for item in todo if item[0] not in done]
    waiting: list[list[dict]] = []
    skipped = 0

    def flush() -> None:
        if waiting:
            corpus.append_shard(folder, [row for rows in waiting for row in rows])
            waiting.clear()

    async def one(item) -> None:
        nonlocal skipped
        name, question, sample = item
        grader = job.grader(question)
        try:
            found = await deliberate(
                question.text, policy, client, job.team, grader.same, key=question.id, sample=sample, explore=True
            )
        except PromptTooLong:
            skipped += 1
            return
        waiting.append(await asyncio.to_thread(visited, found, question, grader, name, seed))
        client.forget()  # nothing is asked twice here
        if len(waiting) >= SHARD:
            flush()

    try:
        await each("trajectories", left, one, job.args.in_flight, before=len(todo) - len(left))
    finally:
        flush()
    return skipped


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on in a folder that was begun with other settings.

    Raises:
        ValueError: naming the first setting that differs.
    """
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path}: not readable; use another --out") from None
    for key in sorted(settings.keys() | before.keys()):
        if settings.get(key) != before.get(key):
            raise ValueError(f"{path.parent}: was begun with another {key.replace('_', '-')}; use another --out")


def summary(folder: Path, skipped: int) -> str:
    """What the corpus holds, in lines."""
    import torch

    from rema_verl.deliberation import corpus

    table = corpus.read(folder)
    states = corpus.tensors(table)
    best = states.rewards == states.rewards.max(dim=1, keepdim=True).values
    decided = ~best.all(dim=1)
    wins = (best.double() / best.sum(dim=1, keepdim=True))[decided].mean(dim=0).tolist() if decided.any() else []
    taken = torch.bincount(torch.tensor(table["action_taken"].to_pylist()), minlength=len(ACTIONS)) / len(states)
    share = {name: states.own[:, LAYOUT.index(name)].mean().item() for name in ("profile/malformed", "answer/given")}
    unrated = (states.own[:, [LAYOUT.index(n) for n in LAYOUT if n.startswith("critic/")][:5]] == 0.2).all(dim=1)
    lines = [
        f"{len(states):,} states of {len(set(table['trajectory'].to_pylist())):,} trajectories in {folder}",
        f"correct before acting    {sum(table['correct_before'].to_pylist()) / len(states):.1%}",
        f"actions taken            {', '.join(f'{a} {p:.1%}' for a, p in zip(ACTIONS, taken.tolist(), strict=True))}",
        f"states where it matters  {decided.double().mean().item():.1%}"
        + (f"; best there: {', '.join(f'{a} {p:.1%}' for a, p in zip(ACTIONS, wins, strict=True))}" if wins else ""),
        f"malformed                profiles {share['profile/malformed']:.1%}, verdicts "
        f"{unrated.double().mean().item():.1%}, no answer {1 - share['answer/given']:.1%}",
    ]
    if skipped:
        lines.append(f"skipped                  {skipped:,} trajectories: question longer than --context allows")
    return "\n".join(lines)


def options() -> argparse.ArgumentParser:
    parser = Parser(prog="rema_verl.deliberation.collect", description=__doc__.split("\n")[0])
    add_options(parser)
    parser.add_argument(
        "--policy", default="uniform", help="behaviour: uniform, persist, or a meta-policy's file (default: uniform)"
    )
    return parser


def prepare_collect(argv: Sequence[str]) -> tuple[Job, Policy]:
    job = prepare(options(), argv, lambda args: check_policy(args.policy))
    name, file = job.args.policy, job.args.out / "settings.json"
    job.settings["policy"] = hashlib.sha256(Path(name).read_bytes()).hexdigest() if Path(name).is_file() else name
    check_settings(file, job.settings)
    job.tokenizer = load_tokenizer(job.args.model)
    policy = load_policy(name)
    from rema_verl.deliberation import corpus

    corpus.done_keys(job.args.out)  # refuses shards of another schema
    if not file.exists():
        write_text(file, json.dumps(job.settings, indent=2) + "\n")
    return job, policy


def main(argv: Sequence[str] | None = None) -> None:
    job, policy = or_exit(prepare_collect, list(sys.argv[1:] if argv is None else argv))
    one_thread()

    async def run() -> int:
        async with serve(job.serving, job.tokenizer) as client:
            return await collect(job, policy, client)

    skipped = asyncio.run(run())
    print(or_exit(summary, job.args.out, skipped))


if __name__ == "__main__":
    main()
