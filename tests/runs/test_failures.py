"""A run whose parts die ends soon, with one line that says why, and with a checkpoint to go on from."""

import os
import re
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from common import last_checkpoint, make_tiny, read_metrics, wait_until
from conftest import Command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def start_training(start, tiny: Path, runs: Path, checkpoints: Path, *overrides: str) -> Command:
    arguments = [
        "train", "broken", "+device=cpu",
        f"data.train_files={tiny}/train.parquet", f"data.val_files={tiny}/val.parquet",
        "data.train_batch_size=4", "data.max_prompt_length=160", "data.max_response_length=16", "rema.max_turns=2",
        f"actor_rollout_ref.model.path={tiny}/model",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
        "rema.prompts.meta_thinking=plan", "rema.prompts.reasoning=solve",
        "rema.prompts.first_instruction='{question}|{instruction}'",
        "actor_rollout_ref.rollout.n=2", "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8",
        "actor_rollout_ref.rollout.max_num_batched_tokens=2048",
        "trainer.total_training_steps=500", "trainer.total_epochs=1000", "trainer.save_freq=1",
        "trainer.val_before_train=false", f"trainer.default_local_dir={checkpoints}", *overrides,
    ]  # fmt: skip
    script = 'source recipes/lib.sh; cpu_environment; "$@"'
    return start(["bash", "-c", script, "run", *arguments], RUNS=runs)


def processes_of(runs: Path, pattern: str) -> list[psutil.Process]:
    """The run's processes whose title matches. Ray's are no children of the command, but inherit its environment."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if re.search(pattern, " ".join(process.info["cmdline"] or [])):
            # a process that renames itself writes over its environment: ask its parents too
            family = [process, *process.parents()]
            if any(f"RUNS={runs}".encode() in environment_of(p) for p in family):
                found.append(process)
    return found


def environment_of(process: psutil.Process) -> bytes:
    """Nothing for a process that is gone or not ours: another test's engines may be running."""
    try:
        return Path(f"/proc/{process.pid}/environ").read_bytes()
    except OSError:
        return b""


def check_clean_end(command: Command, checkpoints: Path, what: str) -> str:
    """Ends within 90 seconds with one error line, a non-zero exit and a checkpoint to go on from."""
    started = time.monotonic()
    assert command.wait(90) != 0
    print(f"{what}: ended after {time.monotonic() - started:.0f} s")
    text = re.sub(r"\x1b\[[0-9;]*m", "", command.text())
    lines = {line.split("rema-verl: error:", 1)[1] for line in text.splitlines() if "rema-verl: error:" in line}
    assert len(lines) == 1, lines or text[-3000:]
    (error,) = lines
    step = last_checkpoint(checkpoints)
    said = int(re.search(r"go on from step (\d+) ", error)[1])
    assert 1 <= said <= step  # the step in progress may have saved its checkpoint after the line was written
    assert (checkpoints / f"global_step_{step}" / "data.pt").exists()
    return error


@pytest.mark.parametrize(
    ("victim", "name"),
    [
        (r"VLLM::EngineCore", "vLLM"),
        pytest.param(r"ray::WorkerDict", "trainer worker", marks=pytest.mark.long),
    ],
    ids=["vLLM", "trainer worker"],
)
def test_killed_process_ends_the_run(start, tiny, tmp_path, victim, name):
    checkpoints = tmp_path / "checkpoints"
    command = start_training(start, tiny, tmp_path, checkpoints)
    wait_until(lambda: last_checkpoint(checkpoints) >= 6, command, 900, "checkpoint")
    metrics = read_metrics(tmp_path / "broken" / "metrics").values()
    assert sum(m["rollout/skipped_trajectories"] for m in metrics) > 0  # the long questions: skipped, counted, no harm
    assert sum(m["rollout/failed_trajectories"] for m in metrics) == 0
    victims = processes_of(tmp_path, victim)
    assert victims
    for process in victims:
        process.kill()
    assert name in check_clean_end(command, checkpoints, victim)


@pytest.mark.long
def test_full_disk_while_checkpointing_ends_the_run(start, tiny, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        reason = f"cannot make a small disk (needs root): {mounted.stderr.strip()}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    try:
        command = start_training(start, tiny, tmp_path, disk / "checkpoints")
        wait_until(lambda: last_checkpoint(disk / "checkpoints") >= 1, command, 900, "checkpoint")
        error = check_clean_end(command, disk / "checkpoints", "full disk")
        assert "checkpoint" in error and re.search(r"\([0-2]\.\d MiB were free", error)
        step = last_checkpoint(disk / "checkpoints")
        assert not (disk / f"checkpoints/global_step_{step + 1}").exists()  # nothing half-written
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
