"""Trajectories on disk: a JSON-lines file per training step, a part of the step's dialogues, never more than a size.

    FOLDER/step_000012.jsonl        one object per line and trajectory, schema 1:

    schema          1; a reader refuses a number it does not know
    step            training step (from 1)
    id              the trajectory's id (rollout dumps of verl: ``trajectory_id``)
    uid             the prompt's id in this step: the trajectories of one group share it
    picked          why it is here: some of best, worst, longest, truncated, or sampled
    data_source     the row's data source
    question        the question as the data set has it
    truth           the right answer, as text
    stop_reason     finished, max_turns, truncated, context_exhausted, empty_message or no_token
    acc             1.0 if it counts as correct, else 0.0
    grade_status    how grading went: graded, no_answer, timeout, memory, error, custom
    prompt_tokens, cached_tokens    prompt tokens of all calls, and how many of them vLLM's prefix cache served
    flags           some of wrong, truncated, lazy, echo, leak, timeout (rema_verl/report/health.py)
    turns           in the order spoken, each:
        role        meta_thinking or reasoning
        text        the message, as the partner read it
        tokens      how many tokens were sampled
        reward      this turn's reward
        advantage   mean over the turn's tokens; null where the role did not learn in this step
        log_ratio   nats, mean over the turn's tokens: trainer's minus vLLM's log-prob, before the update; null where
                    unknown
        update_log_ratio, clipped    the same for the policy being updated against the one before, in the update's last
                    pass over the turn, and whether it was clipped there (``trainers.losses.turns_of``); null where the
                    role did not learn in this step

Numbers that are not finite are null. Every number of the file is what the trainer had; nothing is computed again.
"""

import json
import logging
import math
import os
import queue
import random
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rema_verl.dialogue import ROLES, StopReason

logger = logging.getLogger(__name__)
SCHEMA = 1
QUEUED_STEPS = 8  # steps that may wait for the disk; then they are dropped, and counted
PATTERN = "step_*.jsonl"
CUT_OFF = (StopReason.TRUNCATED, StopReason.CONTEXT_EXHAUSTED)


class SchemaError(ValueError):
    """A file that is no trajectory file, or one of another schema. The message is one line."""


# ---------------------------------------------------------------------------------------- what is written


def trajectory(step: int, uid: str, rows: Mapping[str, Mapping], **about) -> dict[str, Any]:
    """One trajectory from its two rows.

    Args:
        rows: role -> the row's ``extra_fields`` of agent loop ``rema``, with what the trainer adds: ``advantages`` and
            ``log_ratios``, one number per turn of the role.
        about: ``question``, ``truth``, ``data_source``, where known.
    """
    dialogue = rows[ROLES[0]]
    info = dialogue["reward_extra_info"]
    rewards = json.loads(info["turn_rewards"]) if "turn_rewards" in info else {}
    turns = []
    for i, text in enumerate(dialogue["messages"]):
        role, turn = ROLES[i % 2], i // 2
        row = rows[role]
        start, end = row["turn_spans"][turn]
        columns = {
            "reward": rewards.get(role),
            "advantage": row.get("advantages"),
            "log_ratio": row.get("log_ratios"),
            "update_log_ratio": row.get("update_log_ratios"),
        }
        clipped = row.get("clipped")
        turns.append(
            {
                "role": role,
                "text": text,
                "tokens": int(end - start),
                **{name: None if values is None else finite(values[turn]) for name, values in columns.items()},
                "clipped": None if clipped is None else bool(clipped[turn]),
            }
        )
    return {
        "schema": SCHEMA,
        "step": step,
        "id": dialogue["trajectory_id"],
        "uid": uid,
        "picked": [],
        "data_source": about.get("data_source"),
        "question": about.get("question"),
        "truth": about.get("truth"),
        "stop_reason": str(dialogue["stop_reason"]),
        "acc": finite(info.get("acc")),
        "grade_status": info.get("grade_status"),
        "prompt_tokens": dialogue["prompt_tokens"],
        "cached_tokens": dialogue["cached_tokens"],
        "flags": [],
        "turns": turns,
    }


def finite(value: Any) -> float | None:
    """As a float; None for None, NaN and infinities, which JSON does not have."""
    return float(value) if value is not None and math.isfinite(value) else None


def reward_of(t: Mapping) -> float:
    """The trajectory's reward: both roles' turns together."""
    return sum(turn["reward"] or 0.0 for turn in t["turns"])


def length_of(t: Mapping) -> int:
    """Sampled tokens of both roles."""
    return sum(turn["tokens"] for turn in t["turns"])


def pick(trajectories: list[dict], per_step: int, step: int) -> list[dict]:
    """At most ``per_step`` of them, each with why in ``picked``: the extremes, then a sample seeded with the step.

    Best is the largest reward with the fewest tokens, worst the smallest with the most. The same trajectory may be
    several extremes. The order is that of the input.
    """
    if not trajectories or per_step < 1:
        return []
    order = range(len(trajectories))
    keys = {
        "best": min(order, key=lambda i: (-reward_of(trajectories[i]), length_of(trajectories[i]))),
        "worst": min(order, key=lambda i: (reward_of(trajectories[i]), -length_of(trajectories[i]))),
        "longest": max(order, key=lambda i: length_of(trajectories[i])),
    }
    cut = [i for i in order if trajectories[i]["stop_reason"] in CUT_OFF]
    if cut:
        keys["truncated"] = max(cut, key=lambda i: length_of(trajectories[i]))
    picked: dict[int, list[str]] = {}
    for why, i in keys.items():
        if i in picked or len(picked) < per_step:
            picked.setdefault(i, []).append(why)
    rest = [i for i in order if i not in picked]
    for i in random.Random(step).sample(rest, min(len(rest), per_step - len(picked))):
        picked[i] = ["sampled"]
    for i, reasons in picked.items():
        trajectories[i]["picked"] = reasons
    return [trajectories[i] for i in sorted(picked)]


class Writer:
    """Writes steps in a thread of its own. What it cannot write is counted in ``dropped`` and logged, never raised.

    The folder's trajectory files together stay within ``max_mib``: a step that does not fit pushes out the oldest.
    A step's file appears whole or not at all.
    """

    def __init__(self, folder: Path, max_mib: float):
        self.folder, self.limit = Path(folder), int(max_mib * 2**20)
        self.written = self.dropped = self.rotated = 0  # trajectories, since this process started
        self._queue: queue.Queue = queue.Queue(maxsize=QUEUED_STEPS)
        self._thread = threading.Thread(target=self._run, name="rema-verl trajectories", daemon=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".step_*.tmp"):  # of a process that was killed
            left.unlink(missing_ok=True)
        self._thread.start()

    def put(self, step: int, trajectories: list[dict]) -> None:
        """Hand over a step; returns at once."""
        try:
            self._queue.put_nowait((step, trajectories))
        except queue.Full:
            self._drop(step, len(trajectories), f"{QUEUED_STEPS} steps are waiting for the disk already")

    def metrics(self) -> dict[str, int]:
        return {f"trajectories/{name}": getattr(self, name) for name in ("written", "dropped", "rotated")}

    def close(self, timeout: float = 30.0) -> None:
        """Write what is waiting; at most ``timeout`` seconds."""
        try:
            self._queue.put(None, timeout=timeout)
        except queue.Full:
            pass
        self._thread.join(timeout)
        if self._thread.is_alive():
            logger.warning("trajectories: %s still busy after %g s; what waits is lost", self.folder, timeout)

    def _drop(self, step: int, count: int, why: str) -> None:
        self.dropped += count
        logger.warning("step %d: %d trajectories were not written: %s", step, count, why)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            step, trajectories = item
            try:
                self._write(step, trajectories)
            except Exception as e:  # a full disk must not end the training that goes on beside it
                self._drop(step, len(trajectories), f"{type(e).__name__}: {e}")

    def _write(self, step: int, trajectories: list[dict]) -> None:
        final = self.folder / f"step_{step:06d}.jsonl"
        temporary = self.folder / f".step_{step:06d}.tmp"
        # ASCII: a message may hold half of a surrogate pair, which UTF-8 cannot write
        lines = [json.dumps(t, allow_nan=False, separators=(",", ":")).encode() + b"\n" for t in trajectories]
        size, fit = 0, 0
        for line in lines:
            if size + len(line) > self.limit:
                break
            size, fit = size + len(line), fit + 1
        if fit < len(lines):
            self._drop(step, len(lines) - fit, "the step alone is larger than rema.trajectories.max_mib")
        others = {p: p.stat().st_size for p in sorted(self.folder.glob(PATTERN)) if p != final}
        total = sum(others.values()) + size
        for oldest, freed in others.items():
            if total <= self.limit:
                break
            with oldest.open("rb") as file:
                self.rotated += sum(1 for _ in file)
            oldest.unlink()
            total -= freed
        try:
            temporary.write_bytes(b"".join(lines[:fit]))
            os.replace(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)
        self.written += fit


# -------------------------------------------------------------------------------------------- what is read


def step_files(folder: Path) -> dict[int, Path]:
    """step -> file, in order."""
    found = {}
    for path in sorted(Path(folder).glob(PATTERN)):
        number = path.stem.removeprefix("step_")
        if number.isdecimal():
            found[int(number)] = path
    return dict(sorted(found.items()))


def read_step(path: Path) -> Iterator[dict]:
    """The trajectories of a file.

    Raises:
        SchemaError: a line that is not a trajectory of this schema, naming file and line.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}: line {number}"
            try:
                t = json.loads(line)
            except (ValueError, RecursionError):
                raise SchemaError(f"{where}: not valid JSON") from None
            if not isinstance(t, dict) or "schema" not in t:
                raise SchemaError(f"{where}: not a trajectory")
            if t["schema"] != SCHEMA:
                raise SchemaError(f"{where}: schema {t['schema']!r}, but this version reads schema {SCHEMA}")
            if problem := _problem(t):
                raise SchemaError(f"{where}: {problem}")
            yield t


_KINDS: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "id": (str,),
    "uid": (str,),
    "picked": (list,),
    "stop_reason": (str,),
    "question": (str, type(None)),
    "truth": (str, type(None)),
    "acc": (int, float, type(None)),
    "prompt_tokens": (int,),
    "cached_tokens": (int,),
    "flags": (list,),
    "turns": (list,),
}
_TURN_KINDS: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "tokens": (int,),
    **{name: (int, float, type(None)) for name in ("reward", "advantage", "log_ratio", "update_log_ratio")},
    "clipped": (bool, type(None)),
}


def _problem(t: dict) -> str | None:
    for name, kinds in _KINDS.items():
        if not isinstance(t.get(name), kinds):
            return f"field '{name}' is missing or of the wrong kind"
    for turn in t["turns"]:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            return "a turn without a role"
        for name, kinds in _TURN_KINDS.items():
            if not isinstance(turn.get(name), kinds):
                return f"a turn's '{name}' is missing or of the wrong kind"
    return None
