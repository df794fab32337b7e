"""Stage 3: meta-policies and the baselines, on the same servers and the same questions.

    python -m rema_verl.deliberation.evaluate --model MODEL --questions FILE... --out FOLDER \\
        --policy supervised=FILE softrankpo=FILE [-- k=v ...]

    NAME               each --policy: its actions are drawn; with --greedy also "NAME, greedy"
    majority           always Persist: a vote over the first solutions, ties by the critic's confidence
    vanilla, cot       one agent, one call
    self_consistency   a vote over as many chains of thought as the last --policy made calls per question, rounded up
    debate             fixed debate: every agent answers again in every round, having read the others; then a vote

Teams begin with the same solutions and verdicts (the calls have the same seeds), so methods are compared in pairs.
FOLDER gets ``results.json`` and ``results.md``. Intervals are 95 % bootstrap intervals over the questions.
"""

import asyncio
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rema_verl.deliberation import collect, team
from rema_verl.deliberation.collect import (
    Job,
    Question,
    add_options,
    check_policy,
    load_policy,
    one_thread,
    or_exit,
    prepare,
    write_text,
)
from rema_verl.deliberation.protocol import ACTIONS
from rema_verl.deliberation.serving import Client, load_tokenizer, serve
from rema_verl.deliberation.state import LAYOUT
from rema_verl.deliberation.team import Deliberation, Policy, PromptTooLong
from rema_verl.errors import Parser, UserError

BASELINES = ("majority", "vanilla", "cot", "self_consistency", "debate")
RESAMPLES = 10_000
STATES = 1_000  # whose inference is timed

Play = Callable[[Question, int], Awaitable[Deliberation]]


@dataclass
class Method:
    """What one method did on all questions. ``correct``: question id -> one 0 or 1 per sample."""

    name: str
    correct: dict[str, list[int]] = field(default_factory=dict)
    calls: list[team.Call] = field(default_factory=list)
    mix: list[Counter] = field(default_factory=list)  # per round: actions
    counts: Counter = field(default_factory=Counter)
    skipped: int = 0  # questions without room in the context; they count as wrong

    def accuracies(self) -> np.ndarray:
        """(questions,) share of correct samples."""
        return np.array([statistics.fmean(samples) for _, samples in sorted(self.correct.items())])

    def deliberations(self) -> int:
        return sum(map(len, self.correct.values()))

    def add(self, question: Question, found: Deliberation | None, correct: bool) -> None:
        self.correct.setdefault(question.id, []).append(int(correct))
        if found is None:
            self.skipped += 1
            return
        self.calls += found.calls
        self.counts += found.counts
        for t, now in enumerate(found.rounds):
            if t == len(self.mix):
                self.mix.append(Counter())
            self.mix[t].update(now.actions)

    def result(self, seed: int) -> dict[str, Any]:
        """Everything that is reported of it."""
        number, accuracies = self.deliberations(), self.accuracies()
        low, high = interval(accuracies, seed)
        return {
            "accuracy": float(accuracies.mean()),
            "low": low,
            "high": high,
            "questions": len(accuracies),
            "skipped": self.skipped,
            "calls": len(self.calls) / number,
            "prompt_tokens": sum(c.prompt_tokens for c in self.calls) / number,
            "tokens": sum(c.tokens for c in self.calls) / number,
            "total_tokens": sum(c.prompt_tokens + c.tokens for c in self.calls) / number,
            "by_kind": spent(self.calls, number, "kind"),
            "by_agent": spent(self.calls, number, "agent"),
            "by_round": spent(self.calls, number, "round"),
            "actions": [{a: mix[a] / mix.total() for a in ACTIONS} for mix in self.mix],
            "counts": {key: count for key, count in sorted(self.counts.items()) if count},
            "correct": dict(sorted(self.correct.items())),
        }


def spent(calls: Sequence[team.Call], number: int, by: str) -> dict[str, dict[str, float]]:
    """Calls and tokens per deliberation, by a field of the calls."""
    table: dict[str, dict[str, float]] = {}
    for call in calls:
        row = table.setdefault(str(getattr(call, by)), {"calls": 0, "prompt_tokens": 0, "tokens": 0})
        row["calls"] += 1 / number
        row["prompt_tokens"] += call.prompt_tokens / number
        row["tokens"] += call.tokens / number
    return dict(sorted(table.items()))


def interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean.

    >>> interval(np.array([1.0, 1.0, 1.0]), seed=0)
    (1.0, 1.0)
    """
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


# --- playing --------------------------------------------------------------------------------------------------------


async def play(title: str, job: Job, plan: Play) -> Method:
    """One method on all questions."""
    method = Method(title)
    found: dict[tuple[str, int], tuple[Deliberation | None, bool]] = {}

    async def one(item: tuple[Question, int]) -> None:
        question, sample = item
        try:
            deliberation = await plan(question, sample)
        except PromptTooLong:
            found[question.id, sample] = (None, False)
            return
        correct = await asyncio.to_thread(job.grader(question).correct, deliberation.answer)
        found[question.id, sample] = (deliberation, correct)

    items = [(question, sample) for question in job.questions for sample in range(job.args.samples)]
    await collect.each(title, items, one, job.args.in_flight)
    for question, sample in items:
        method.add(question, *found[question.id, sample])
    return method


async def evaluate(job: Job, policies: dict[str, Policy], client: Client) -> dict[str, Method]:
    """Every method, in the order of the table."""

    def deliberate(policy: Policy, greedy: bool = False) -> Play:
        return lambda question, sample: team.deliberate(
            question.text,
            policy,
            client,
            job.team,
            job.grader(question).same,
            key=question.id,
            sample=sample,
            greedy=greedy,
        )

    def by_question(method, *args) -> Play:
        return lambda question, sample: method(
            question.text, *args, client, job.team, job.grader(question).same, key=question.id, sample=sample
        )

    def single(kind: str) -> Play:
        return lambda question, sample: team.single(
            kind, question.text, client, job.team, key=question.id, sample=sample
        )

    plans = {name: deliberate(policy) for name, policy in policies.items()}
    if job.args.greedy:
        plans |= {f"{name}, greedy": deliberate(policy, greedy=True) for name, policy in policies.items()}
    methods = {name: await play(name, job, plan) for name, plan in plans.items()}
    last = methods[list(policies)[-1]]
    job.settings["self_consistency_calls"] = calls = math.ceil(len(last.calls) / last.deliberations())
    baselines = {
        "majority": deliberate(team.always("persist")),
        "vanilla": single("vanilla"),
        "cot": single("cot"),
        "self_consistency": by_question(team.self_consistency, calls),
        "debate": by_question(team.debate),
    }
    chosen = [name for name in BASELINES if name in job.args.baselines]
    return methods | {name: await play(name, job, baselines[name]) for name in chosen}


async def timing(job: Job, client: Client) -> dict[str, float]:
    """Seconds of the meta-policy for 1,000 states, and of one LLM call with nothing else in flight; medians."""
    import torch

    from rema_verl.deliberation.policy import MetaPolicy

    network = MetaPolicy().eval()
    own = torch.rand(STATES, len(LAYOUT))
    peers = torch.rand(STATES, job.team.agents - 1, len(LAYOUT))
    inference = []
    with torch.no_grad():
        for _ in range(12):
            start = time.perf_counter()
            network(own, peers)
            inference.append(time.perf_counter() - start)
    calls = []
    for i in range(7):
        start = time.perf_counter()
        try:
            await team.single("cot", job.questions[0].text, client, job.team, key="timing", sample=i)
        except PromptTooLong:
            break
        calls.append(time.perf_counter() - start)
    return {
        "policy_seconds_per_1000_states": statistics.median(inference[2:]),
        "llm_call_seconds": statistics.median(calls[2:]) if len(calls) > 2 else float("nan"),
    }


# --- reporting ------------------------------------------------------------------------------------------------------


def differences(methods: dict[str, Method], of: str, seed: int) -> dict[str, dict[str, float]]:
    """Accuracy of ``of`` less that of every other method, in pairs of the same question."""
    found = {}
    for name, method in methods.items():
        if name != of:
            pairs = methods[of].accuracies() - method.accuracies()
            low, high = interval(pairs, seed)
            found[name] = {"difference": float(pairs.mean()), "low": low, "high": high}
    return found


def tables(results: dict[str, Any]) -> str:
    """results.md."""

    def percent(values: dict[str, float], key: str = "accuracy") -> str:
        return f"{100 * values[key]:.1f} [{100 * values['low']:.1f}, {100 * values['high']:.1f}]"

    def line(*cells) -> str:
        return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"

    methods, settings = results["methods"], results["settings"]
    of = results["compared"]
    lines = [
        f"# MPDF on {results['asked']:,} questions of {', '.join(results['sources'])}",
        "",
        f"{results['model']}: {settings['agents']} agents, {settings['rounds']} rounds, temperature "
        f"{settings['temperature']}, seed {settings['seed']}, {settings['samples']} sample(s). Percent with 95 % "
        f"bootstrap intervals; tokens of input and output per question.",
        "",
        line("Method", "Accuracy", f"{of} is better by", "Calls", "Input tokens", "Output tokens", "Tokens"),
        line("---", "---:", "---:", "---:", "---:", "---:", "---:"),
    ]
    for name, m in methods.items():
        better = "" if name == of else percent(results["differences"][name], "difference")
        tokens = (f"{m[key]:,.1f}" for key in ("prompt_tokens", "tokens", "total_tokens"))
        lines.append(line(name, percent(m), better, f"{m['calls']:.1f}", *tokens))
    lines += ["", line("Actions", "Round", *ACTIONS), line("---", "---:", *["---:"] * len(ACTIONS))]
    for name, m in methods.items():
        for t, mix in enumerate(m["actions"], start=1):
            lines.append(line(name, t, *(f"{100 * mix[a]:.1f}" for a in ACTIONS)))
    if "debate" in methods:
        saved = 1 - methods[of]["total_tokens"] / methods["debate"]["total_tokens"]
        lines += ["", f"- {of} needs {abs(saved):.1%} {'fewer' if saved >= 0 else 'more'} tokens than debate."]
    seconds = results["timing"]
    lines += [
        f"- The meta-policy takes {1000 * seconds['policy_seconds_per_1000_states']:.2f} ms for 1,000 states, one LLM "
        f"call {1000 * seconds['llm_call_seconds']:.1f} ms.",
    ]
    for name, m in methods.items():
        if m["counts"] or m["skipped"]:
            counted = m["counts"] | ({"skipped": m["skipped"]} if m["skipped"] else {})
            lines.append(f"- {name}: {', '.join(f'{n:,} {key}'.replace('_', ' ') for key, n in counted.items())}.")
    return "\n".join([*lines, ""])


def report(job: Job, policies: dict[str, Policy], methods: dict[str, Method], seconds: dict[str, float]) -> str:
    """Write results.json and results.md; the latter's text."""
    of = list(policies)[-1]
    results = {
        "model": job.args.model,
        "policies": {name: str(file) for name, file in job.args.policy},
        "asked": len(job.questions),
        "sources": sorted({question.source for question in job.questions}),
        "compared": of,
        "methods": {name: method.result(job.team.seed) for name, method in methods.items()},
        "differences": differences(methods, of, job.team.seed),
        "timing": seconds,
        "settings": job.settings,
    }
    text = tables(results)
    write_text(job.args.out / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_text(job.args.out / "results.md", text)
    return text


# --- main -----------------------------------------------------------------------------------------------------------


def options() -> Parser:
    def named(text: str) -> tuple[str, str]:
        name, equals, file = text.partition("=")
        return (name, file) if equals else (Path(text).stem, text)

    parser = Parser(prog="rema_verl.deliberation.evaluate", description=__doc__.split("\n")[0])
    add_options(parser)
    add = parser.add_argument
    add("--policy", type=named, nargs="+", required=True, metavar="NAME=FILE", help="meta-policies; or uniform")
    add("--greedy", action="store_true", help="evaluate each also with its most likely actions")
    add("--baselines", nargs="*", choices=BASELINES, default=BASELINES, help="default: all")
    return parser


def check_policies(args) -> None:
    """Names and files of --policy."""
    names: list[str] = [*BASELINES]
    for name, file in args.policy:
        if name in names:
            raise UserError(f"--policy {name}={file}: the name {name!r} is taken")
        check_policy(file)
        names.append(name)


def prepare_evaluate(argv: Sequence[str]) -> tuple[Job, dict[str, Policy]]:
    job = prepare(options(), argv, check_policies)
    job.tokenizer = load_tokenizer(job.args.model)
    return job, {name: load_policy(file) for name, file in job.args.policy}


def main(argv: Sequence[str] | None = None) -> None:
    job, policies = or_exit(prepare_evaluate, list(sys.argv[1:] if argv is None else argv))
    one_thread()

    async def run() -> str:
        async with serve(job.serving, job.tokenizer) as client:
            methods = await evaluate(job, policies, client)
            return report(job, policies, methods, await timing(job, client))

    print(asyncio.run(run()))
    print(f"written to {job.args.out}: results.json, results.md")


if __name__ == "__main__":
    main()
