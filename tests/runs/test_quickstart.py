"""The quickstart as the README has it, killed once, and the report of its run."""

import json

import pytest
from common import check_log_probs_agree, last_checkpoint, read_metrics, val_accuracy, wait_until
from conftest import Command

from rema_verl import cli
from rema_verl.dialogue import ROLES
from rema_verl.report.trajectories import read_step, step_files

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The quickstart, killed with SIGKILL in the middle of RL and started again with the same command.

    Of the seeds in the README, number 1 gains the most: what is tested here is that the machinery learns at all.
    """
    runs = tmp_path_factory.mktemp("quickstart")
    run = runs / "quickstart_seed1"
    command = ["bash", "recipes/quickstart.sh"]
    first = Command(command, runs / "first.log", RUNS=runs, SEED=1)
    wait_until(lambda: last_checkpoint(run / "checkpoints") == 5, first, 1800, "checkpoint of step 5")
    wait_until(lambda: max(read_metrics(run / "metrics"), default=0) >= 6, first, 600, "step 6")
    first.kill()
    second = Command(command, runs / "second.log", RUNS=runs, SEED=1)
    assert second.wait(1800) == 0, second.text()[-3000:]
    third = Command(command, runs / "third.log", RUNS=runs, SEED=1)
    assert third.wait(300) == 0, third.text()[-3000:]
    return run, second, third


def test_quickstart_learns_and_survives_a_kill(quickstart):
    run, second, _ = quickstart
    result = json.loads(second.text().splitlines()[-1])
    print(result)
    assert {"accuracy_before", "accuracy_after", "steps", "seconds", "run_dir"} <= result.keys()
    assert 0.2 <= result["accuracy_before"] <= 0.6
    assert result["accuracy_after"] - result["accuracy_before"] >= 0.20
    assert result["steps"] == 10 and last_checkpoint(run / "checkpoints") == 10
    launches = sorted((run / "metrics").glob("*.jsonl"))
    assert len(launches) == 2
    resumed = [json.loads(line)["step"] for line in launches[1].read_text().splitlines()]
    assert resumed[0] in (5, 6) and resumed[-1] == 10  # from the last checkpoint, not from the start


def test_validation_is_logged_before_during_and_after(quickstart):
    metrics = read_metrics(quickstart[0] / "metrics")
    assert {0, 5, 10} <= {step for step, m in metrics.items() if val_accuracy(m) is not None}


def test_second_run_reuses_what_is_there(quickstart):
    _, second, third = quickstart
    first_result, again = (json.loads(c.text().splitlines()[-1]) for c in (second, third))
    assert again["accuracy_after"] == first_result["accuracy_after"]
    assert len(list((quickstart[0] / "metrics").glob("*.jsonl"))) == 2  # nothing was launched a third time


def test_log_probs_agree_with_untied_embeddings(quickstart):
    check_log_probs_agree(read_metrics(quickstart[0] / "metrics"))


def test_metrics_per_role(quickstart):
    metrics = read_metrics(quickstart[0] / "metrics")
    last = metrics[10]
    for role in ROLES:
        for name in ("turns/mean", "tokens", "entropy", "pg_clipfrac", "reward/mean"):
            assert f"{role}/{name}" in last
    assert last["dialogue/finish_rate"] > 0.5
    assert sum(v for k, v in last.items() if k.startswith("dialogue/stop_reason/")) == 16 * 8
    assert last["rollout/failed_trajectories"] == last["rollout/skipped_trajectories"] == 0
    # the bad habit went away: dialogues grew
    turns = [metrics[step]["dialogue/turns/mean"] for step in range(1, 11)]
    assert sum(turns[-5:]) / 5 > turns[0] + 0.2


def test_trajectories_on_disk(quickstart):
    rows = [json.loads(line) for line in (quickstart[0] / "rollouts" / "10.jsonl").read_text().splitlines()]
    assert len(rows) == 16 * 8 * 2
    by_trajectory: dict[str, list[dict]] = {}
    for row in rows:
        by_trajectory.setdefault(row["trajectory_id"], []).append(row)
    assert all(sorted(r["role"] for r in pair) == sorted(ROLES) for pair in by_trajectory.values())
    assert all(pair[0]["stop_reason"] == pair[1]["stop_reason"] for pair in by_trajectory.values())


def test_report_of_a_real_run(quickstart, tmp_path):
    run = quickstart[0]
    files = step_files(run / "trajectories")
    assert sorted(files) == list(range(1, 11))
    kept = list(read_step(files[10]))
    assert {"best", "worst", "longest"} <= {why for t in kept for why in t["picked"]}
    assert all(turn["advantage"] is not None and abs(turn["log_ratio"]) < 1e-3 for t in kept for turn in t["turns"])
    # four updates a step: all but the first start from another policy than the one that sampled
    turns = [turn for file in files.values() for t in read_step(file) for turn in t["turns"]]
    assert max(abs(turn["update_log_ratio"]) for turn in turns) > 0.05
    assert any(turn["clipped"] for turn in turns)
    metrics = read_metrics(run / "metrics")
    assert metrics[10]["trajectories/dropped"] == 0 and "health/lazy_share" in metrics[10]
    assert cli.main(["report", str(run), "-o", str(tmp_path / "report.html")]) == 0
