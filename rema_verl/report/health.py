"""Health signals: does training go wrong in one of the ways that two roles, or GRPO, are known for?

Pure functions on plain data, then :class:`Start` (what the first steps were like) and :data:`LIMITS` (from which value
on a signal is a warning). Every signal is a metric ``health/...``, listed in docs/metrics.md.

A dialogue here is a trajectory as :mod:`rema_verl.report.trajectories` describes it: ``question``, ``truth``, ``turns``
(``role``, ``text``, ``tokens``) and ``stop_reason``.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rema_verl.dialogue import META_THINKING, REASONING, ROLES
from rema_verl.rewards.grading import last_boxed
from rema_verl.rewards.judge import verdict

RUN = 4  # words of an n-gram
ECHO = 0.5  # a dialogue echoes if more than this share of its n-grams was there before
LAZY = 0.25  # reasoning is lazy in a dialogue if it samples less than this part of what it sampled at the start
START_STEPS = 5  # steps whose mean is the start of training
ZERO = 1e-8
EXPLODED = 1e6  # nats; what a log-ratio that is no finite number is reported as

# an ideograph is a word: Chinese has no spaces
_WORD = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]|[^\W\u3400-\u9fff\uf900-\ufaff]+|[^\w\s]")


@dataclass(frozen=True)
class Limit:
    """A signal is a warning when it is above (or below) ``value``."""

    above: bool
    value: float
    words: str

    def crossed(self, value: float) -> bool:
        return value > self.value if self.above else value < self.value


LIMITS = {
    "health/lazy_share": Limit(True, 0.5, f"dialogues in which reasoning wrote under {LAZY:.0%} of its start"),
    "health/reasoning_tokens_vs_start": Limit(False, 0.5, "reasoning's tokens per dialogue, against the start"),
    "health/turns_vs_start": Limit(False, 0.5, "turns per dialogue, against the start"),
    "health/echo/within": Limit(True, 0.3, f"share of {RUN}-word runs that a message repeats from itself"),
    "health/echo/between": Limit(True, 0.5, f"share of {RUN}-word runs that a message repeats from earlier messages"),
    "health/leak_share": Limit(True, 0.3, "dialogues in which meta_thinking gives an answer before reasoning does"),
    "health/zero_advantage_groups": Limit(True, 0.8, "groups without any advantage: nothing to learn from"),
    **{f"health/entropy_vs_start/{role}": Limit(False, 0.2, f"entropy of {role}, against the start") for role in ROLES},
    "health/log_ratio/rollout_max": Limit(True, 1.0, "a turn's |log-ratio| between trainer and vLLM, in nats"),
    "health/log_ratio/update_max": Limit(True, 1.0, "a turn's |log-ratio| within the update, in nats"),
    "health/grading_timeout_share": Limit(True, 0.02, "answers whose grading ran out of time"),
}


# ------------------------------------------------------------------------------------------------- one dialogue


def _runs(text: str) -> list[tuple[str, ...]]:
    words = _WORD.findall(text.casefold())
    return list(zip(*(words[i:] for i in range(RUN)), strict=False))


def echo(messages: Iterable[str]) -> tuple[float, float]:
    """(within, between): share of all runs of four words that their own message, or an earlier one, had before.

    0 where no message has four words. A run that both had counts as between.

    >>> echo(["one two three four", "one two three four", "a b c d a b c d"])
    (0.14285714285714285, 0.14285714285714285)
    """
    heard: set[tuple[str, ...]] = set()
    total = within = between = 0
    for message in messages:
        own: set[tuple[str, ...]] = set()
        runs = _runs(message)
        for run in runs:
            if run in heard:
                between += 1
            elif run in own:
                within += 1
            own.add(run)
        total += len(runs)
        heard |= own
    return (within / total, between / total) if total else (0.0, 0.0)


def _says(text: str, answer: str) -> bool:
    """Whether ``answer`` stands in ``text`` on its own, not as a part of a longer number or word."""
    return re.search(rf"(?<![\w.]){re.escape(answer)}(?!\w|\.\w)", text) is not None


def leaks(trajectory: Mapping) -> bool:
    """Whether meta_thinking gives an answer that reasoning has not given before.

    An answer is a box, a verdict, or the truth itself where it has at least two characters and is not in the question.

    >>> turn = lambda role, text: {"role": role, "text": text}
    >>> leaks({"question": "6 * 7?", "truth": "42", "turns": [turn("meta_thinking", "Say 42.")]})
    True
    >>> leaks({"question": "6 * 7?", "truth": "42", "turns": [turn("reasoning", "42"), turn("meta_thinking", "42!")]})
    False
    """
    truth, question = str(trajectory.get("truth") or "").strip(), str(trajectory.get("question") or "")
    telling = len(truth) >= 2 and not _says(question, truth)
    said: list[str] = []
    for turn in trajectory["turns"]:
        text = turn["text"]
        if turn["role"] == REASONING:
            said.append(text)
            continue
        answers = [a for a in (last_boxed(text), verdict(text)) if a]
        answers += [truth] if telling and _says(text, truth) else []
        if any(not any(_says(earlier, answer) for earlier in said) for answer in answers):
            return True
    return False


def tokens_of(trajectory: Mapping, role: str) -> int:
    return sum(turn["tokens"] for turn in trajectory["turns"] if turn["role"] == role)


# ------------------------------------------------------------------------------------------- against the start


@dataclass
class Start:
    """What the first steps of training were like; kept in a file, so that a resumed run knows it.

    ``steps``: step -> name -> value, for the first :data:`START_STEPS` steps seen.
    """

    path: Path | None = None
    steps: dict[int, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def at(cls, path: Path) -> "Start":
        """From the file, if it is there and can be read."""
        try:
            steps = {int(step): dict(values) for step, values in json.loads(path.read_text()).items()}
        except (OSError, ValueError, AttributeError, TypeError):
            steps = {}
        return cls(path, steps)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Count ``values`` in, while the start is not over. Step 1 begins a new run."""
        if step == 1:
            self.steps = {}
        if step not in self.steps and len(self.steps) >= START_STEPS:
            return
        self.steps[step] = {name: value for name, value in values.items() if math.isfinite(value)}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.write_text(json.dumps(self.steps))
            os.replace(temporary, self.path)

    def mean(self, name: str) -> float | None:
        found = [values[name] for values in self.steps.values() if name in values]
        return sum(found) / len(found) if found else None

    def ratio(self, name: str, value: float) -> float | None:
        """``value`` / its mean at the start; None where there is none, or it was 0.

        >>> start = Start(); start.add(1, {"turns": 2.0}); start.add(2, {"turns": 4.0}); start.ratio("turns", 6.0)
        2.0
        """
        mean = self.mean(name)
        return value / mean if mean else None


def is_lazy(trajectory: Mapping, start: Start) -> bool:
    """Reasoning sampled less than a quarter of its mean at the start of training (Dr. MAMR's lazy agent)."""
    mean = start.mean("reasoning_tokens")
    return mean is not None and tokens_of(trajectory, REASONING) < LAZY * mean


# --------------------------------------------------------------------------------------------------- one step


def step_values(trajectories: Sequence[Mapping], metrics: Mapping[str, float]) -> dict[str, float]:
    """What :class:`Start` keeps of a step: reasoning's tokens and the turns per dialogue, and each role's entropy."""
    values = {}
    if trajectories:
        values["reasoning_tokens"] = sum(tokens_of(t, REASONING) for t in trajectories) / len(trajectories)
        turns = [sum(turn["role"] == META_THINKING for turn in t["turns"]) for t in trajectories]
        values["turns"] = sum(turns) / len(turns)
    for role in ROLES:
        if (entropy := metrics.get(f"{role}/entropy")) is not None:
            values[f"entropy/{role}"] = float(entropy)
    return values


def zero_advantage_groups(rows: Iterable[tuple[str, Iterable[float]]]) -> float | None:
    """Share of groups in which every advantage is 0; ``rows`` are (group, the row's advantages). None without rows.

    >>> zero_advantage_groups([("a", [0.0, 0.0]), ("a", [0.0]), ("b", [0.0]), ("b", [0.5])])
    0.5
    """
    learns: dict[str, bool] = {}
    for group, advantages in rows:
        learns[group] = learns.get(group, False) or any(abs(a) > ZERO for a in advantages)
    return sum(not some for some in learns.values()) / len(learns) if learns else None


def update_log_ratio(metrics: Mapping[str, float]) -> float | None:
    """The largest |log| of a turn's ratio that ``turn_clip`` saw in this update, over all models trained.

    >>> update_log_ratio({"actor/turn_ratio_min": 0.5, "actor/turn_ratio_max": 1.5})
    0.6931471805599453
    """
    extremes = [v for k, v in metrics.items() if k.endswith(("actor/turn_ratio_min", "actor/turn_ratio_max"))]
    logs = (math.log(ratio) if ratio > 0 and math.isfinite(ratio) else math.inf for ratio in extremes)
    return max((_size(log) for log in logs), default=None)


def _size(log_ratio: float) -> float:
    """|log_ratio|; :data:`EXPLODED` for NaN and infinities, which max() or a JSON file would hide."""
    return abs(log_ratio) if math.isfinite(log_ratio) else EXPLODED


def health_metrics(
    trajectories: Sequence[Mapping],
    texts: Sequence[Mapping],
    start: Start,
    metrics: Mapping[str, float],
    advantages: Iterable[tuple[str, Iterable[float]]] = (),
    log_ratios: Iterable[float] = (),
) -> dict[str, float]:
    """The signals of one step.

    Args:
        trajectories: all of the step.
        texts: those whose texts are looked at (echo and leaks cost time).
        start: with this step already in it, if it is one of the first.
        metrics: the step's other metrics.
        advantages: (group, the row's advantages) of every row that learns.
        log_ratios: of every turn that learns, trainer against vLLM, nats.
    """
    found: dict[str, float | None] = {}
    if trajectories:
        found["health/lazy_share"] = sum(is_lazy(t, start) for t in trajectories) / len(trajectories)
        spoken = {role: sum(tokens_of(t, role) for t in trajectories) for role in ROLES}
        found["health/reasoning_token_share"] = spoken[REASONING] / max(sum(spoken.values()), 1)
        if "reward/grading_timeouts" in metrics:
            found["health/grading_timeout_share"] = metrics["reward/grading_timeouts"] / len(trajectories)
    now = step_values(trajectories, metrics)
    for name in ("reasoning_tokens", "turns"):
        if name in now:
            found[f"health/{name}_vs_start"] = start.ratio(name, now[name])
    for role in ROLES:
        if f"entropy/{role}" in now:
            found[f"health/entropy_vs_start/{role}"] = start.ratio(f"entropy/{role}", now[f"entropy/{role}"])
    if texts:
        echoes = [echo(turn["text"] for turn in t["turns"]) for t in texts]
        for i, name in enumerate(("within", "between")):
            found[f"health/echo/{name}"] = sum(e[i] for e in echoes) / len(echoes)
        found["health/leak_share"] = sum(leaks(t) for t in texts) / len(texts)
    found["health/zero_advantage_groups"] = zero_advantage_groups(advantages)
    found["health/log_ratio/rollout_max"] = max((_size(r) for r in log_ratios), default=None)
    found["health/log_ratio/update_max"] = update_log_ratio(metrics)
    return {name: float(value) for name, value in found.items() if value is not None}


def warnings(metrics: Mapping[str, float]) -> dict[str, str]:
    """signal -> one clause, for every signal of ``metrics`` that is beyond its limit.

    >>> warnings({"health/zero_advantage_groups": 0.9, "health/lazy_share": 0.1})
    {'health/zero_advantage_groups': '0.9 is above 0.8 (groups without any advantage: nothing to learn from)'}
    """
    return {
        name: f"{metrics[name]:.3g} is {'above' if limit.above else 'below'} {limit.value:g} ({limit.words})"
        for name, limit in LIMITS.items()
        if isinstance(metrics.get(name), int | float) and limit.crossed(metrics[name])
    }
