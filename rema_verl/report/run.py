"""A run's folder, read: metrics, configuration and trajectories.

RUN/metrics/*.jsonl          verl's file tracker, one file per launch (also RUN/*.jsonl, or RUN itself a file)
RUN/hydra/.hydra/            the composed configuration and its overrides (also RUN/.hydra/)
RUN/trajectories/            rema.trajectories.folder; another place is read from the configuration
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rema_verl.report.trajectories import step_files


class RunError(ValueError):
    """A folder or file that cannot be used. The message is one line and names it."""


@dataclass
class Run:
    """One run. ``metrics``: step -> name -> number."""

    name: str
    path: Path
    metrics: dict[int, dict[str, float]]
    config: dict[str, Any] = field(default_factory=dict)  # dotted key -> value, interpolations as written
    overrides: list[str] = field(default_factory=list)
    trajectories: dict[int, Path] = field(default_factory=dict)  # step -> file
    unreadable: int = 0  # lines of the metrics files that are not verl's; a killed run may leave one

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a metric, where it has a number."""
        found = [(step, row[name]) for step, row in self.metrics.items() if name in row]
        return [step for step, _ in found], [value for _, value in found]

    def names(self) -> list[str]:
        """All metrics of the run."""
        return sorted({name for row in self.metrics.values() for name in row})


def read_run(path: Path) -> Run:
    """The run at ``path``.

    Raises:
        RunError: nothing of a run is there, or a configuration that cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise RunError(f"{path}: no such file or folder")
    if path.is_file():
        files, folder = [path], path.parent
    else:
        files, folder = sorted((path / "metrics").glob("*.jsonl")) or sorted(path.glob("*.jsonl")), path
    metrics, unreadable = _read_metrics(files)
    config, overrides = _read_config(folder) if path.is_dir() else ({}, [])
    steps = _trajectories(folder, config) if path.is_dir() else {}
    if not metrics and not steps:
        raise RunError(f"{path}: no metrics (metrics/*.jsonl) and no trajectories (trajectories/step_*.jsonl) there")
    name = path.resolve().name if path.is_dir() else path.stem
    return Run(name, path, metrics, config, overrides, steps, unreadable)


def _read_metrics(files: list[Path]) -> tuple[dict[int, dict[str, float]], int]:
    steps: dict[int, dict[str, float]] = {}
    bad = 0
    for file in files:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                    step, data = int(row["step"]), dict(row["data"])
                except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
                    bad += bool(line.strip())
                    continue
                numbers = {k: float(v) for k, v in data.items() if _is_number(v)}
                steps.setdefault(step, {}).update(numbers)  # a later launch's step wins
    return dict(sorted(steps.items())), bad


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_config(folder: Path) -> tuple[dict[str, Any], list[str]]:
    for hydra in (folder / "hydra" / ".hydra", folder / ".hydra"):
        if (hydra / "config.yaml").exists():
            try:
                config = OmegaConf.to_container(OmegaConf.load(hydra / "config.yaml"), resolve=False)
                overrides = hydra / "overrides.yaml"
                given = OmegaConf.to_container(OmegaConf.load(overrides)) if overrides.exists() else []
            except (OSError, OmegaConfBaseException, YAMLError, UnicodeDecodeError) as e:
                raise RunError(f"{hydra}: not a readable configuration ({str(e).splitlines()[0]})") from None
            return flatten(config), [str(item) for item in given]
    return {}, []


def _trajectories(folder: Path, config: dict[str, Any]) -> dict[int, Path]:
    configured = config.get("rema.trajectories.folder")
    places = [folder / "trajectories", *([Path(configured)] if isinstance(configured, str) else [])]
    return next((files for place in places if (files := step_files(place))), {})


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> leaf; lists are leaves.

    >>> flatten({"a": {"b": 1, "c": {}}, "d": [2]})
    {'a.b': 1, 'a.c': {}, 'd': [2]}
    """
    if isinstance(tree, dict) and (tree or not prefix):
        leaves: dict[str, Any] = {}
        for key, value in tree.items():
            leaves |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
        return leaves
    return {prefix: tree}


def config_diff(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """(key, each run's value) of every key in which the runs differ; "-" where a run does not have it."""
    rows = []
    for key in sorted({key for run in runs for key in run.config}):
        values = [json.dumps(run.config[key], default=str) if key in run.config else "-" for run in runs]
        if len(set(values)) > 1:
            rows.append((key, values))
    return rows
