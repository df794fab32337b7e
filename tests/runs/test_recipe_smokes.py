"""SMOKE=1: one recipe of each family makes two real steps (a model per role: test_exact_runs.py)."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from common import check_log_probs_agree, check_ratios_leave_1, read_metrics
from conftest import REPO, Command
from safetensors.torch import load_file

from rema_verl.dialogue import JSON_ACTIONS, ROLES

pytestmark = pytest.mark.slow

# --- the multi-turn family, on rows of MATH ------------------------------------------------------------------------


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
    assert command.wait(900) == 0, command.text()[-3000:]
    return runs / "smoke_rema_llama8b_math"


def rollouts(run: Path) -> list[dict]:
    """The rows of both steps."""
    return [json.loads(line) for step in (1, 2) for line in (run / f"rollouts/{step}.jsonl").read_text().splitlines()]


def test_smoke_makes_two_steps_that_change_the_weights(smoke):
    metrics = read_metrics(smoke / "metrics")
    # the tiny model answers one question in six: now and then all 16 answers of a step are wrong, and move nothing
    assert max(metrics) == 2 and any(metrics[step]["actor/grad_norm"] > 0 for step in (1, 2))
    check_ratios_leave_1(metrics)
    assert all(0 < metrics[step]["rollout/engine_idle_share"] < 1 for step in (1, 2))
    state = torch.load(
        smoke / "checkpoints/global_step_2/actor/model_world_size_1_rank_0.pt", map_location="cpu", weights_only=False
    )
    before = load_file(smoke / "inputs/model/model.safetensors")
    changed = [
        n for n, w in before.items() if not torch.equal(w, getattr(state[n], "full_tensor", lambda n=n: state[n])())
    ]
    assert len(changed) == len(before)


def test_smoke_writes_both_roles_rows_of_real_questions(smoke, shared_data):
    rows = rollouts(smoke)
    assert len(rows) == 2 * 4 * 4 * 2 and {row["role"] for row in rows} == set(ROLES)
    assert len({row["score"] for row in rows}) > 1  # some right, some wrong
    questions = pq.read_table(shared_data / "math_train_l3to5_8523.parquet", columns=["question"])[
        "question"
    ].to_pylist()
    assert all(any(q.strip() in row["input"] for q in questions) for row in rows[:4])


def test_log_probs_agree_with_tied_embeddings(smoke):
    assert json.loads((smoke / "inputs/model/config.json").read_text())["tie_word_embeddings"] is True
    check_log_probs_agree(read_metrics(smoke / "metrics"))


# --- the other families --------------------------------------------------------------------------------------------

FAMILIES = {
    "judge": "mrp_rl_qwen25_7b_judge",
    "JSON plans": "rema_json_llama32_1b_math",
    "cold start": "rema_sft_qwen25_7b",
    "single agent": "vrp_rl_llama3_8b_math",
    "consistency": "rema_consistency_qwen25_7b_math",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_smoke(family, tmp_path, shared_data):
    recipe = FAMILIES[family]
    command = Command(
        ["bash", f"recipes/{recipe}.sh"],
        tmp_path / "log.txt",
        RUNS=tmp_path,
        SMOKE=1,
        DATA_DIR=tmp_path / "none",
        REMA_SHARED_DATA=shared_data,
    )
    assert command.wait(900) == 0, command.text()[-3000:]
    run = tmp_path / f"smoke_{recipe}"
    assert json.loads((run / "inputs/manifest.json").read_text())["kind_of_rows"] == (
        "SYNTHETIC" if family == "judge" else "real"
    )
    before = load_file(run / "inputs/model/model.safetensors")
    metrics = read_metrics(run / "metrics")
    assert max(metrics) == 2
    if family == "cold start":
        assert all(metrics[step]["train/grad_norm"] > 0 for step in (1, 2))
        after = load_file(run / "model/model.safetensors")
    else:
        assert any(metrics[step]["actor/grad_norm"] > 0 for step in (1, 2))
        check_ratios_leave_1(metrics)
        shards = run / "checkpoints/global_step_2/actor/model_world_size_1_rank_0.pt"
        after = torch.load(shards, map_location="cpu", weights_only=False)
    unchanged = [
        name
        for name, weight in before.items()
        if torch.equal(weight, getattr(after[name], "full_tensor", lambda name=name: after[name])())
    ]
    assert not unchanged
    if family == "cold start":
        return

    rows = rollouts(run)
    assert len({row["score"] for row in rows}) > 1  # some right, some wrong
    if family in ("single agent", "judge"):
        assert len(rows) == 2 * 4 * 4
        assert all(metrics[step]["actor/reward_kl_penalty_coeff"] == 1e-2 for step in (1, 2))
        assert {row["score"] for row in rows} <= {1.0, -0.5, -1.0}
        assert abs(metrics[1]["actor/reward_kl_penalty"]) < 1e-4 < 1  # the reference is the model itself
    else:
        assert len(rows) == 2 * 4 * 4 * 2 and {row["role"] for row in rows} == set(ROLES)
    if family == "JSON plans":
        actions = {a: metrics[1][f"dialogue/plan_action/{a}"] for a in JSON_ACTIONS}
        assert sum(actions.values()) == 4 * 4  # structured outputs leave no INVALID one
    if family == "consistency":
        assert "meta_thinking/leak_rate" in metrics[1]
        assert all(0 <= metrics[step]["meta_thinking/reward/mean"] <= 1 for step in (1, 2))
