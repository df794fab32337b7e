"""What the tests of whole runs share."""

import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from conftest import REPO, Command

sys.path.insert(0, str(REPO / "recipes"))
from watch import read_metrics, val_accuracy

__all__ = [
    "check_log_probs_agree",
    "check_ratios_leave_1",
    "last_checkpoint",
    "make_tiny",
    "read_metrics",
    "val_accuracy",
    "wait_until",
]
SYNC_TOLERANCE = 1e-3  # probability; float32 on CPU stays below 1e-4, stale or garbled weights are above 0.1


def wait_until(condition, command: Command, timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert command.process.poll() is None, f"ended before {what}:\n{command.text()[-3000:]}"
        assert time.monotonic() < deadline, f"no {what} within {timeout} s:\n{command.text()[-3000:]}"
        time.sleep(0.5)


def last_checkpoint(folder: Path) -> int:
    """The step verl would resume from, 0 if none."""
    tracker = folder / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() and tracker.read_text() else 0


def check_log_probs_agree(metrics: dict[int, dict]) -> None:
    """vLLM's log-probs and the trainer's are of the same weights, after every weight sync."""
    differences = [
        m["training/rollout_probs_diff_max"] for m in metrics.values() if "training/rollout_probs_diff_max" in m
    ]
    print(f"largest rollout / trainer probability difference over {len(differences)} steps: {max(differences):.2g}")
    assert differences and max(differences) < SYNC_TOLERANCE


def check_ratios_leave_1(metrics: dict[int, dict], prefix: str = "") -> None:
    """Four updates a step: the later ones start from another policy than the one that sampled."""
    kl = [m[f"{prefix}actor/ppo_kl"] for m in metrics.values() if f"{prefix}actor/ppo_kl" in m]
    print(f"{prefix}actor/ppo_kl {kl}")
    assert max(map(abs, kl)) > 1e-3  # rounding alone: below 1e-5


def make_tiny(out: Path) -> Path:
    """A random model and the tiny task, every fourth question too long: enough to train on and to break."""
    small = ["--sft", "100", "--val", "4", "--train", "64", "--hidden", "64", "--layers", "1"]
    subprocess.run([sys.executable, "data_prep/build_tiny.py", "--out", out, *small], cwd=REPO, check=True)
    rows = pq.read_table(out / "train.parquet").to_pylist()
    for row in rows[::4]:
        row["prompt"][0]["content"] = "1+" * 200 + "1"
    pq.write_table(pa.Table.from_pylist(rows), out / "train.parquet")
    return out
