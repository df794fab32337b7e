"""Whole runs with real verl, Ray and vLLM, started with the commands of the README."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import REPO, Command
from safetensors.torch import load_file

from rema_verl import cli
from rema_verl.dialogue import ROLES
from rema_verl.report.trajectories import read_step, step_files

sys.path.insert(0, str(REPO / "recipes"))
from watch import read_metrics, val_accuracy

pytestmark = pytest.mark.slow
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


# ------------------------------------------------------------------------------------------------- quickstart


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The quickstart, killed with SIGKILL in the middle of RL and started again with the same command.

    Of the seeds in the README, number 1 gains the most: what is tested here is that the machinery learns at all.
    """
    runs = tmp_path_factory.mktemp("quickstart")
    run = runs / "quickstart_seed1"
    command = ["bash", "recipes/quickstart.sh"]
    first = Command(command, runs / "first.log", RUNS=runs, SEED=1)
    wait_until(lambda: last_checkpoint(run / "checkpoints") == 5, first, 900, "checkpoint of step 5")
    wait_until(lambda: max(read_metrics(run / "metrics"), default=0) >= 6, first, 120, "step 6")
    first.kill()
    second = Command(command, runs / "second.log", RUNS=runs, SEED=1)
    assert second.wait(900) == 0, second.text()[-3000:]
    third = Command(command, runs / "third.log", RUNS=runs, SEED=1)
    assert third.wait(60) == 0, third.text()[-3000:]
    return run, second, third


def test_quickstart_learns_and_survives_a_kill(quickstart):
    run, second, _ = quickstart
    result = json.loads(second.text().splitlines()[-1])
    print(result)
    assert {"accuracy_before", "accuracy_after", "steps", "seconds", "run_dir"} <= result.keys()
    assert 0.2 <= result["accuracy_before"] <= 0.6
    assert result["accuracy_after"] - result["accuracy_before"] >= 0.20
    assert result["steps"] == 15 and last_checkpoint(run / "checkpoints") == 15
    launches = sorted((run / "metrics").glob("*.jsonl"))
    assert len(launches) == 2
    resumed = [json.loads(line)["step"] for line in launches[1].read_text().splitlines()]
    assert resumed[0] in (5, 6) and resumed[-1] == 15  # from the last checkpoint, not from the start


def test_validation_is_logged_before_during_and_after(quickstart):
    metrics = read_metrics(quickstart[0] / "metrics")
    assert {0, 5, 10, 15} <= {step for step, m in metrics.items() if val_accuracy(m) is not None}


def test_second_run_reuses_what_is_there(quickstart):
    _, second, third = quickstart
    first_result, again = (json.loads(c.text().splitlines()[-1]) for c in (second, third))
    assert again["accuracy_after"] == first_result["accuracy_after"] and again["seconds"] < 30


def test_log_probs_agree_with_untied_embeddings(quickstart):
    check_log_probs_agree(read_metrics(quickstart[0] / "metrics"))


def test_metrics_per_role(quickstart):
    metrics = read_metrics(quickstart[0] / "metrics")
    last = metrics[15]
    for role in ROLES:
        for name in ("turns/mean", "tokens", "entropy", "pg_clipfrac", "reward/mean"):
            assert f"{role}/{name}" in last
    assert last["dialogue/finish_rate"] > 0.5
    assert sum(v for k, v in last.items() if k.startswith("dialogue/stop_reason/")) == 16 * 8
    assert last["rollout/failed_trajectories"] == last["rollout/skipped_trajectories"] == 0
    # the bad habit went away: dialogues grew
    turns = [metrics[step]["dialogue/turns/mean"] for step in range(1, 16)]
    assert sum(turns[-5:]) / 5 > turns[0] + 0.2


def test_trajectories_on_disk(quickstart):
    rows = [json.loads(line) for line in (quickstart[0] / "rollouts" / "15.jsonl").read_text().splitlines()]
    assert len(rows) == 16 * 8 * 2
    by_trajectory: dict[str, list[dict]] = {}
    for row in rows:
        by_trajectory.setdefault(row["trajectory_id"], []).append(row)
    assert all(sorted(r["role"] for r in pair) == sorted(ROLES) for pair in by_trajectory.values())
    assert all(pair[0]["stop_reason"] == pair[1]["stop_reason"] for pair in by_trajectory.values())


def test_report_of_a_real_run(quickstart, tmp_path):
    run = quickstart[0]
    files = step_files(run / "trajectories")
    assert sorted(files) == list(range(1, 16))
    kept = list(read_step(files[15]))
    assert {"best", "worst", "longest"} <= {why for t in kept for why in t["picked"]}
    assert all(turn["advantage"] is not None and abs(turn["log_ratio"]) < 1e-3 for t in kept for turn in t["turns"])
    metrics = read_metrics(run / "metrics")
    assert metrics[15]["trajectories/dropped"] == 0 and "health/lazy_share" in metrics[15]
    assert cli.main(["report", str(run), "-o", str(tmp_path / "report.html")]) == 0


# ------------------------------------------------------------------------------------------------ SMOKE=1


def build_math(shared_data: Path, out: Path) -> dict[str, Path]:
    subprocess.run(
        [
            sys.executable, "data_prep/build_math.py", "--out", out, "--limit", "500", "--val-limit", "50",
            "--source", shared_data / "math_train_l3to5_8523.parquet", "--val-source", shared_data / "math500.parquet",
        ],
        cwd=REPO,
        check=True,
    )  # fmt: skip
    return {"TRAIN_FILES": out / "train.parquet", "VAL_FILES": out / "val.parquet"}


@pytest.fixture(scope="module")
def smoke(shared_data, tmp_path_factory):
    runs = tmp_path_factory.mktemp("smoke")
    command = Command(
        ["bash", "recipes/rema_llama8b_math.sh"],
        runs / "log.txt",
        RUNS=runs,
        SMOKE=1,
        **build_math(shared_data, runs / "math"),
    )
    assert command.wait(240) == 0, command.text()[-3000:]
    return runs / "smoke_rema_llama8b_math"


def test_smoke_makes_two_steps_that_change_the_weights(smoke):
    metrics = read_metrics(smoke / "metrics")
    assert max(metrics) == 2 and all(metrics[step]["actor/grad_norm"] > 0 for step in (1, 2))
    state = torch.load(
        smoke / "checkpoints/global_step_2/actor/model_world_size_1_rank_0.pt", map_location="cpu", weights_only=False
    )
    before = load_file(smoke / "inputs/model/model.safetensors")
    changed = [
        n for n, w in before.items() if not torch.equal(w, getattr(state[n], "full_tensor", lambda n=n: state[n])())
    ]
    assert len(changed) == len(before)


def test_smoke_writes_both_roles_rows_of_real_questions(smoke, shared_data):
    rows = [json.loads(line) for line in (smoke / "rollouts" / "1.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 4 * 2 and {row["role"] for row in rows} == set(ROLES)
    assert len({row["score"] for row in rows}) > 1  # some right, some wrong
    questions = pq.read_table(shared_data / "math_train_l3to5_8523.parquet", columns=["question"])[
        "question"
    ].to_pylist()
    assert all(any(q.strip() in row["input"] for q in questions) for row in rows[:4])


def test_log_probs_agree_with_tied_embeddings(smoke):
    assert json.loads((smoke / "inputs/model/config.json").read_text())["tie_word_embeddings"] is True
    check_log_probs_agree(read_metrics(smoke / "metrics"))


def test_recipe_without_data_says_so(tmp_path):
    result = subprocess.run(
        ["bash", "recipes/rema_llama8b_math.sh"],
        cwd=REPO,
        env={"PATH": "/usr/bin:/bin", "TRAIN_FILES": str(tmp_path / "none.parquet")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "build_math.py" in result.stderr


# ------------------------------------------------------------------------------------- somebody else's recipe


def test_single_pieces_train_in_stock_verl_by_name_alone(start, tiny, tmp_path):
    """verl's own config, sync mode, single-turn loop and naive reward; ours are the estimator and the loss."""
    (tmp_path / "reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):\n"
        "    return sum(c in '0123' for c in solution_str) / 10\n"
    )
    arguments = [
        "python", "-m", "verl.trainer.main_ppo", "--config-name", "ppo_trainer", "+device=cpu",
        f"data.train_files={tiny}/train.parquet", f"data.val_files={tiny}/val.parquet",
        "data.train_batch_size=4", "data.max_prompt_length=512", "data.max_response_length=16",
        f"actor_rollout_ref.model.path={tiny}/model", "actor_rollout_ref.rollout.name=vllm",
        "algorithm.adv_estimator=softrankpo", "actor_rollout_ref.actor.policy_loss.loss_mode=turn_clip",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
        "actor_rollout_ref.rollout.n=4", "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8",
        "actor_rollout_ref.rollout.max_num_batched_tokens=2048",
        f"reward.custom_reward_function.path={tmp_path}/reward.py", "trainer.logger=[console,file]",
        "trainer.total_training_steps=2", "trainer.total_epochs=1000", "trainer.val_before_train=false",
        f"trainer.default_local_dir={tmp_path}/checkpoints", f"hydra.run.dir={tmp_path}",
    ]  # fmt: skip
    (tmp_path / "metrics").mkdir()
    command = start(
        ["bash", "-c", 'source recipes/lib.sh; cpu_environment; "$@"', "run", *arguments],
        VERL_FILE_LOGGER_PATH=tmp_path / "metrics" / "run.jsonl",
    )
    assert command.wait(240) == 0, command.text()[-3000:]
    metrics = read_metrics(tmp_path / "metrics")
    assert max(metrics) == 2
    for step in (1, 2):
        assert metrics[step]["actor/grad_norm"] > 0 and "actor/log_ratio_clipfrac" in metrics[step]  # turn_clip's own
        assert abs(metrics[step]["critic/advantages/mean"]) < 0.5 < metrics[step]["critic/advantages/max"]


# ---------------------------------------------------------------------------------------------- failures


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model and the tiny task, every fourth question too long: enough to train on and to break."""
    out = tmp_path_factory.mktemp("tiny")
    small = ["--sft", "100", "--val", "4", "--train", "64", "--hidden", "64", "--layers", "1"]
    subprocess.run([sys.executable, "data_prep/build_tiny.py", "--out", out, *small], cwd=REPO, check=True)
    rows = pq.read_table(out / "train.parquet").to_pylist()
    for row in rows[::4]:
        row["prompt"][0]["content"] = "1+" * 200 + "1"
    pq.write_table(pa.Table.from_pylist(rows), out / "train.parquet")
    return out


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
            if any(f"RUNS={runs}".encode() in Path(f"/proc/{p.pid}/environ").read_bytes() for p in family):
                found.append(process)
    return found


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


@pytest.mark.parametrize(("victim", "name"), [(r"VLLM::EngineCore", "vLLM"), (r"ray::WorkerDict", "trainer worker")])
def test_killed_process_ends_the_run(start, tiny, tmp_path, victim, name):
    checkpoints = tmp_path / "checkpoints"
    command = start_training(start, tiny, tmp_path, checkpoints)
    wait_until(lambda: last_checkpoint(checkpoints) >= 6, command, 240, "checkpoint")
    metrics = read_metrics(tmp_path / "broken" / "metrics").values()
    assert sum(m["rollout/skipped_trajectories"] for m in metrics) > 0  # the long questions: skipped, counted, no harm
    assert sum(m["rollout/failed_trajectories"] for m in metrics) == 0
    victims = processes_of(tmp_path, victim)
    assert victims
    for process in victims:
        process.kill()
    assert name in check_clean_end(command, checkpoints, victim)


def test_full_disk_while_checkpointing_ends_the_run(start, tiny, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        reason = f"cannot make a small disk (needs root): {mounted.stderr.strip()}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    try:
        command = start_training(start, tiny, tmp_path, disk / "checkpoints")
        wait_until(lambda: last_checkpoint(disk / "checkpoints") >= 1, command, 240, "checkpoint")
        error = check_clean_end(command, disk / "checkpoints", "full disk")
        assert "checkpoint" in error and re.search(r"\([0-2]\.\d MiB were free", error)
        step = last_checkpoint(disk / "checkpoints")
        assert not (disk / f"checkpoints/global_step_{step + 1}").exists()  # nothing half-written
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
