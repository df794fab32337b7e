"""Modes `rema` and `rema_separate` for real, with four updates a step: the ratio leaves 1 and clips act, a resumed run
ends where it would have ended, two data-parallel workers make the steps of one, and who is frozen stays frozen.

Two small models; in `rema_separate`, meta_thinking learns in the first two of four steps, reasoning in the last two.
One run of two models takes about 10 GiB, which is why these tests are in one file: they run one after the other.
"""

import hashlib
import importlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from common import check_ratios_leave_1, read_metrics
from conftest import REPO, Command
from safetensors.torch import load_file

from rema_verl.dialogue import META_THINKING, REASONING, ROLES
from rema_verl.report.trajectories import read_step, step_files

pytestmark = pytest.mark.slow
SEPARATE, TURN = 4, 2  # steps, and steps a role learns before it is the other's turn
SHARED = 2  # steps
UPDATES = 4  # a step


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Sums, a model per role that talks about them, and a reward that depends on every letter of the last message."""
    folder = tmp_path_factory.mktemp("separate")
    rows = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"{n} + {n % 7}?"}],
            "reward_model": {"style": "rule", "ground_truth": str(n + n % 7)},
        }
        for n in range(16)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "sums.parquet")
    (folder / "recipe.txt").write_text("rema.max_turns=2\n")
    for seed, role in enumerate(ROLES):
        files = [f"--{split}={folder}/sums.parquet" for split in ("train", "val")]
        arguments = [f"--overrides={folder}/recipe.txt", f"--out={folder}/{role}", f"--seed={seed}", "--rows=16"]
        importlib.import_module("build_smoke").main([*files, *arguments, "--steps=60"])
    (folder / "reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):\n"
        "    return sum(map(ord, solution_str)) % 97 / 97\n"
    )
    return folder


def command(inputs: Path, run: Path, mode: str, **more) -> list[str]:
    separate = mode == "rema_separate"
    config = {
        "data.train_files": inputs / "sums.parquet",
        "data.val_files": inputs / "sums.parquet",
        "data.train_batch_size": 4,
        "data.max_prompt_length": 768,
        "data.max_response_length": 32,
        "data.seed": 0,
        "rema.max_turns": 2,
        "rema.seed": 0,
        "reward.custom_reward_function.path": inputs / "reward.py",
        "rema.trajectories.folder": run / "trajectories",
        "actor_rollout_ref.actor.ppo_mini_batch_size": 4 // UPDATES,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 2,
        "actor_rollout_ref.actor.optim.lr": 1e-3,
        "actor_rollout_ref.rollout.n": 4,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 8,
        "actor_rollout_ref.rollout.max_num_batched_tokens": 2048,
        "trainer.v1.trainer_mode": mode,
        "trainer.total_training_steps": SEPARATE if separate else SHARED,
        "trainer.total_epochs": 100,
        "trainer.save_freq": 1,
        "trainer.test_freq": -1,
        "trainer.val_before_train": "false",
        "trainer.default_local_dir": run / "checkpoints",
        "trainer.rollout_data_dir": run / "rollouts",
        "hydra.run.dir": run / "hydra",
    }
    if separate:
        config |= {
            "rema.roles.meta_thinking.model_path": inputs / META_THINKING / "model",
            "rema.roles.reasoning.model_path": inputs / REASONING / "model",
            "rema.switch.start": META_THINKING,
            "rema.switch.freq": TURN,
        }
    else:
        config["actor_rollout_ref.model.path"] = inputs / META_THINKING / "model"
    config |= more
    start = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-name", "rema_trainer", "+device=cpu"]
    return start + [f"{key}={value}" for key, value in config.items()]


def environment(run: Path, launch: int = 0) -> dict[str, str]:
    (run / "metrics").mkdir(parents=True, exist_ok=True)
    return {
        "VERL_FILE_LOGGER_PATH": str(run / "metrics" / f"{launch}.jsonl"),
        "PYTHONPATH": f"{REPO}:{REPO / 'tests/runs'}",
        "VERL_USE_EXTERNAL_MODULES": "probe_separate",
        "PROBE": str(run / "said.jsonl"),
        "OMP_NUM_THREADS": "1",
        "TQ_NUM_THREADS": "2",
        "RAY_AUTH_MODE": "disabled",
        "TORCHDYNAMO_DISABLE": "1",
    }


def digest(value, into=None) -> str:
    """Of every bit of a checkpoint's content."""
    sha = into or hashlib.sha256()
    if isinstance(value, torch.Tensor):
        value = getattr(value, "to_local", lambda: value)()  # of one worker: the whole
        sha.update(value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        sha.update(value.tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            sha.update(str(key).encode())
            digest(value[key], sha)
    elif isinstance(value, list | tuple):
        for item in value:
            digest(item, sha)
    else:
        sha.update(repr(value).encode())
    return sha.hexdigest()


def load(run: Path, step: int, role: str | None, name: str, rank: str = "1_rank_0") -> dict:
    """A piece of a checkpoint; ``role`` is None where both share a model."""
    folder = run / "checkpoints" / f"global_step_{step}" / "actor" / (role or "")
    return torch.load(folder / f"{name}_world_size_{rank}.pt", map_location="cpu", weights_only=False)


def parts(run: Path, step: int, role: str | None) -> dict[str, str]:
    """Digests of weights, optimiser, learning-rate schedule and random-number generators at a step."""
    state = {name: load(run, step, role, name) for name in ("model", "optim", "extra_state")}
    return {name: digest(value) for name, value in (state | state.pop("extra_state")).items()}


def weights(run: Path, step: int, role: str | None, workers: int) -> dict[str, torch.Tensor]:
    """FSDP2 cuts each tensor along its first dimension."""
    shards = [load(run, step, role, "model", f"{workers}_rank_{rank}") for rank in range(workers)]
    return {name: torch.cat([shard[name].to_local() for shard in shards]) for name in shards[0]}


def wait_for_checkpoint(run: Path, step: int, process) -> None:
    """Until the step's checkpoint is complete."""
    tracker = run / "checkpoints" / "latest_checkpointed_iteration.txt"
    for _ in range(6000):
        if tracker.exists() and tracker.read_text() == str(step):
            return
        assert process.process.poll() is None, process.text()[-3000:]
        time.sleep(0.1)
    raise AssertionError(f"no checkpoint of step {step}: {process.text()[-3000:]}")


def go_through(inputs: Path, run: Path, mode: str, **more) -> Path:
    run.mkdir(exist_ok=True)
    process = Command(command(inputs, run, mode, **more), run / "log.txt", **environment(run))
    assert process.wait(1800) == 0, process.text()[-3000:]
    return run


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Path:
    """A run of `rema_separate` that goes through."""
    return go_through(inputs, tmp_path_factory.mktemp("whole"), "rema_separate")


@pytest.fixture(scope="module")
def shared(inputs, tmp_path_factory) -> Path:
    """A run of `rema` that goes through."""
    return go_through(inputs, tmp_path_factory.mktemp("shared"), "rema")


def check_updates(run: Path, metrics: dict, prefix: str) -> None:
    """Updates after a step's first do not start from the policy that sampled: turns leave ratio 1 and are clipped."""
    ratios = [metrics[f"{prefix}actor/turn_ratio_{side}"] for side in ("min", "max")]
    print(f"{run.name} {prefix} ratios of turns {ratios}, clipped {metrics[f'{prefix}actor/pg_clipfrac']:.3f}")
    assert ratios[0] < 0.9 or ratios[1] > 1.1
    assert 0 < metrics[f"{prefix}actor/pg_clipfrac"] < 1


def check_turns_clipped(run: Path) -> None:
    """The trajectories on the disk say of each turn whether the update clipped it."""
    files = step_files(run / "trajectories")
    turns = [turn for file in files.values() for dialogue in read_step(file) for turn in dialogue["turns"]]
    known = [turn for turn in turns if turn["update_log_ratio"] is not None]
    assert known and {turn["clipped"] for turn in known} == {True, False}
    assert max(abs(turn["update_log_ratio"]) for turn in known) > 0.1


def check_two_workers(inputs: Path, one: Path, run: Path, mode: str, role: str | None) -> None:
    """The same dialogues, the same four mini-batches, the same weights within float error."""
    step = {"trainer.n_gpus_per_node": 2, "trainer.total_training_steps": 1}
    go_through(inputs, run, mode, **step)

    def said(folder):
        rows = map(json.loads, (folder / "rollouts" / "1.jsonl").read_text().splitlines())
        return sorted((row["input"], row["output"], row["role"], row["score"]) for row in rows)

    assert said(run) == said(one)
    before = load_file(inputs / (role or META_THINKING) / "model" / "model.safetensors")
    after, expected = weights(run, 1, role, workers=2), weights(one, 1, role, workers=1)
    assert before.keys() <= expected.keys() == after.keys()
    moved = sum(float((expected[name] - before[name]).square().sum()) for name in before) ** 0.5
    apart = sum(float((expected[name] - after[name]).square().sum()) for name in before) ** 0.5
    print(f"{mode}: four updates moved the weights by {moved:.3g}, two workers and one are {apart:.2g} apart")
    # Adam makes full steps of gradients that are mere rounding; other mini-batches would leave them 0.5 moves apart
    assert moved > 0.01 and apart < 0.02 * moved


def test_frozen_stays_frozen(whole):
    at = {role: [parts(whole, step, role) for step in range(1, SEPARATE + 1)] for role in ROLES}
    said: dict[str, list] = {role: [] for role in ROLES}
    for line in map(json.loads, (whole / "said.jsonl").read_text().splitlines()):
        said[line["role"]].append((line["ids"], line["log_probs"]))
    frozen = {META_THINKING: slice(TURN - 1, SEPARATE), REASONING: slice(0, TURN)}
    for role in ROLES:
        assert all(state == at[role][frozen[role]][0] for state in at[role][frozen[role]])
        assert all(answer == said[role][frozen[role]][0] for answer in said[role][frozen[role]])
        learnt = slice(0, TURN) if role == META_THINKING else slice(TURN - 1, SEPARATE)
        for name in ("model", "optim"):
            assert len({state[name] for state in at[role][learnt]}) == len(at[role][learnt])
        assert len({json.dumps(log_probs) for _, log_probs in said[role][learnt]}) == len(said[role][learnt])

    metrics = read_metrics(whole / "metrics")
    for step in range(1, SEPARATE + 1):
        learning, idle = ROLES if step <= TURN else ROLES[::-1]
        assert metrics[step]["switch/phase"] == (step - 1) // TURN
        assert metrics[step][f"switch/{learning}"] == 1 and metrics[step][f"switch/{idle}"] == 0
        assert metrics[step][f"{learning}/actor/grad_norm"] > 0
        check_updates(whole, metrics[step], f"{learning}/")
        assert not any(key.startswith(f"{idle}/actor/") for key in metrics[step])
        assert metrics[step]["training/rollout_probs_diff_max"] < 1e-4
    check_turns_clipped(whole)
    assert os.listdir(whole / "checkpoints" / f"global_step_{SEPARATE}" / "actor" / REASONING / "huggingface")


def check_same_end(run: Path, whole: Path, step: int, *roles: str | None) -> None:
    """Bit by bit; generators apart, which verl does not seed in its workers and nothing draws from."""
    resumed, expected = (read_metrics(folder / "metrics") for folder in (run, whole))
    for at in resumed:
        assert resumed[at]["critic/score/mean"] == expected[at]["critic/score/mean"]
    for role in roles:
        end = parts(whole, step, role)
        for name, value in parts(run, step, role).items():
            assert name == "rng" or value == end[name]


def resume(inputs: Path, whole: Path, run: Path, mode: str) -> Path:
    """From the checkpoint of the first step of a run that went through."""
    run.mkdir()
    shutil.copytree(whole / "checkpoints" / "global_step_1", run / "checkpoints" / "global_step_1")
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("1")
    return go_through(inputs, run, mode)


def test_a_run_resumed_in_a_turn_ends_where_it_would_have(inputs, whole, tmp_path):
    """From the checkpoint in the middle of the first turn, through the change of turns, to the end."""
    run = resume(inputs, whole, tmp_path / "resumed", "rema_separate")
    assert sorted(read_metrics(run / "metrics")) == list(range(2, SEPARATE + 1))
    check_same_end(run, whole, SEPARATE, *ROLES)


def test_two_workers_make_the_updates_of_one_with_a_model_per_role(inputs, whole, tmp_path):
    check_two_workers(inputs, whole, tmp_path / "two", "rema_separate", META_THINKING)


def test_four_updates_a_step_clip_turns(shared):
    metrics = read_metrics(shared / "metrics")
    for step in range(1, SHARED + 1):
        check_updates(shared, metrics[step], "")
        assert all(0 < metrics[step][f"{role}/pg_clipfrac"] < 1 for role in ROLES)
        assert metrics[step]["training/rollout_probs_diff_max"] < 1e-4
    check_turns_clipped(shared)


def test_a_run_of_shared_weights_resumed_ends_where_it_would_have(inputs, shared, tmp_path):
    run = resume(inputs, shared, tmp_path / "resumed", "rema")
    assert sorted(read_metrics(run / "metrics")) == list(range(2, SHARED + 1))
    check_same_end(run, shared, SHARED, None)


def test_two_workers_make_the_updates_of_one(inputs, shared, tmp_path):
    check_two_workers(inputs, shared, tmp_path / "two", "rema", None)


@pytest.mark.long
def test_a_run_killed_in_either_turn_ends_where_it_would_have(inputs, whole, tmp_path, start):
    run = tmp_path / "killed"
    run.mkdir()
    for launch, step in enumerate((1, TURN + 1)):
        process = start(command(inputs, run, "rema_separate"), **environment(run, launch))
        wait_for_checkpoint(run, step, process)
        process.kill()  # in the step after it, the second of the role's turn
    last = start(command(inputs, run, "rema_separate"), **environment(run, launch=2))
    assert last.wait(1800) == 0, last.text()[-3000:]
    assert set(range(1, SEPARATE + 1)) <= set(read_metrics(run / "metrics"))
    check_same_end(run, whole, SEPARATE, *ROLES)


def test_smoke_of_a_recipe_with_a_model_per_role(tmp_path, shared_data, start):
    """Reasoning's run, then meta_thinking's, which is played against what the first one left."""
    recipe = "rema_separate_qwen25_7b_math"
    process = start(
        ["bash", f"recipes/{recipe}.sh"],
        RUNS=tmp_path,
        SMOKE=1,
        DATA_DIR=tmp_path / "none",
        REMA_SHARED_DATA=shared_data,
    )
    assert process.wait(1800) == 0, process.text()[-3000:]
    runs = {role: tmp_path / f"smoke_{recipe}_1_{role}" for role in ROLES}
    for role, other in (ROLES, ROLES[::-1]):
        run = runs[role]
        metrics = read_metrics(run / "metrics")
        # the second role plays against what four quick updates made of the first: now and then all is wrong in a step
        assert any(metrics[step][f"{role}/actor/grad_norm"] > 0 for step in (1, 2))
        check_ratios_leave_1(metrics, f"{role}/")
        assert not any(key.startswith(f"{other}/actor/") for step in metrics for key in metrics[step])
        assert [path.name for path in (run / "checkpoints/global_step_2/actor").iterdir()] == [role]
        before, after = (load_file(run / m / "model.safetensors") for m in ("inputs/model", "model"))
        assert [name for name, weight in before.items() if torch.equal(weight, after[name].float())] == []
    assert json.loads((runs[META_THINKING] / "inputs/manifest.json").read_text())["kind_of_rows"] == "real"
    overrides = (runs[META_THINKING] / "inputs/recipe.txt").read_text()
    assert f"rema.roles.reasoning.model_path={runs[REASONING]}/model" in overrides
