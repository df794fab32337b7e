"""What the trainer calls: health metrics and trajectories of every step.

The trainer keeps its rows (``extra_fields`` by TransferQueue key ``<prompt uid>_<session>_<role's number>``). The
recorder adds each turn's advantage and log-ratio to them, and at the end of a step makes trajectories of them.
"""

import itertools
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from rema_verl.config import ReMAConfig
from rema_verl.dialogue import ROLES
from rema_verl.report import health
from rema_verl.report.trajectories import CUT_OFF, Writer, pick, trajectory

logger = logging.getLogger(__name__)
TEXTS = 128  # dialogues of a step whose texts are searched for echoes and leaks; a sample where there are more
START_FILE = "health_start.json"  # beside the checkpoints


class Recorder:
    """One per trainer. ``with recorder:`` writes what is still waiting when the run ends."""

    def __init__(self, config):
        options = ReMAConfig.of(config).trajectories
        self.per_step = options.per_step
        try:
            self.writer = Writer(Path(options.folder), options.max_mib) if options.folder else None
        except OSError as e:
            raise ValueError(f"rema.trajectories.folder: {options.folder}: {e.strerror or e}") from None
        self.start = health.Start.at(Path(config.trainer.default_local_dir) / START_FILE)
        self.warned: set[str] = set()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_) -> None:
        if self.writer is not None:
            self.writer.close()

    def step(self, step: int, rows: Mapping[str, dict], metrics: Mapping[str, float], fetch: Callable) -> dict:
        """Health metrics of a step; its trajectories go to the writer.

        Args:
            rows: the trainer's, with :func:`note_turns` done.
            metrics: the step's, so far.
            fetch: keys -> list of ``question``, ``truth``, ``data_source`` dicts.
        """
        dialogues: dict[str, dict[str, Mapping]] = {}
        for key, row in rows.items():
            dialogues.setdefault(key.rsplit("_", 1)[0], {})[row["role"]] = row
        made = {}  # session -> trajectory
        for session, pair in dialogues.items():
            if len(pair) == len(ROLES):
                made[session] = trajectory(step, session.rsplit("_", 1)[0], pair)
        everything = list(made.values())
        self.start.add(step, health.step_values(everything, metrics))

        looked_at = list(made)
        if len(looked_at) > TEXTS:
            looked_at = random.Random(step).sample(looked_at, TEXTS)
        picked = pick(everything, self.per_step, step) if self.writer else []
        chosen = {t["id"] for t in picked}
        wanted = [s for s, t in made.items() if t["id"] in chosen or s in set(looked_at)]
        for session, about in zip(wanted, fetch([f"{s}_0" for s in wanted]) if wanted else [], strict=True):
            made[session].update(about)

        found = health.health_metrics(
            everything,
            [made[s] for s in looked_at],
            self.start,
            metrics,
            # a group is one role's answers to one prompt (role_grpo)
            [(f"{k.rsplit('_', 2)[0]}-{row['role']}", row["advantages"]) for k, row in rows.items() if _learns(row)],
            [ratio for row in rows.values() for ratio in row.get("log_ratios") or ()],
        )
        self._warn(step, found)
        found["health/warnings"] = len(self.warned)
        if self.writer is not None:
            for t in picked:
                t["flags"] = flags(t, self.start)
            self.writer.put(step, picked)
            found |= self.writer.metrics()
        return found

    def _warn(self, step: int, found: Mapping[str, float]) -> None:
        """Once when a signal crosses its limit, not in every step it stays there."""
        now = health.warnings(found)
        for name in sorted(set(now) - self.warned):
            logger.warning("step %d: health: %s = %s", step, name, now[name])
        self.warned = set(now)


def _learns(row: Mapping) -> bool:
    return bool(row.get("advantages"))


def note_turns(row: dict, advantages: torch.Tensor, old: torch.Tensor | None, rollout: torch.Tensor | None) -> None:
    """Write each turn's mean advantage and mean log-ratio into ``row``; the tensors are (L,) over its response."""
    row["advantages"] = _span_means(advantages, row["turn_spans"])
    if old is not None and rollout is not None:
        row["log_ratios"] = _span_means(old.float() - rollout.float(), row["turn_spans"])


def note_update(rows: Sequence[dict], turns: Mapping[str, torch.Tensor]) -> None:
    """Write what the update saw of each turn into ``rows``.

    Args:
        rows: the trainer's; ``turns["row"]`` counts them, and verl's padding rows are negative.
        turns: :func:`rema_verl.trainers.losses.turns_of`'s, of the whole update. A later pass over a turn replaces an
            earlier one; a turn that no loss saw (without tokens, or all of them rejected) gets 0 and False.
    """
    seen: dict[int, dict[int, tuple[float, bool]]] = {}
    columns = (turns[name].tolist() for name in ("row", "turn", "log_ratio", "clipped"))
    for i, turn, log_ratio, clipped in zip(*columns, strict=True):
        if i >= 0:
            seen.setdefault(i, {})[turn] = (log_ratio, clipped)
    for i, of_row in seen.items():
        pairs, spoken = [], itertools.count()
        for start, end in rows[i]["turn_spans"]:
            pairs.append(of_row.get(next(spoken), (0.0, False)) if end > start else (0.0, False))
        rows[i]["update_log_ratios"], rows[i]["clipped"] = map(list, zip(*pairs, strict=True))


def _span_means(values: torch.Tensor, spans: list[tuple[int, int]]) -> list[float]:
    """The mean of ``values`` (L,) over each [start, end); 0 for an empty one. In one go: a step has many turns."""
    edges = np.array(spans, dtype=np.int64).reshape(-1, 2)
    if not len(edges):
        return []
    # reduceat sums from each index to the next: every other sum is a turn's, the rest lie between turns
    sums = np.add.reduceat(np.append(values.double().numpy(), 0.0), edges.ravel())[::2]
    lengths = edges[:, 1] - edges[:, 0]
    return np.where(lengths > 0, sums / np.maximum(lengths, 1), 0.0).tolist()


def flags(t: Mapping, start: health.Start) -> list[str]:
    """What a reader may want to filter by."""
    echoes = health.echo(turn["text"] for turn in t["turns"])
    found = {
        "wrong": not t["acc"],
        "truncated": t["stop_reason"] in CUT_OFF,
        "lazy": health.is_lazy(t, start),
        "echo": max(echoes) > health.ECHO,
        "leak": health.leaks(t),
        "timeout": t["grade_status"] == "timeout",
    }
    return [name for name, holds in found.items() if holds]
