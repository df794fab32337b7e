"""The recorder: from the trainer's rows of a step to health metrics, one warning per crossing, and files."""

import json
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from rema_verl.config import ReMAConfig
from rema_verl.dialogue import META_THINKING, REASONING, ROLES
from rema_verl.report.recorder import START_FILE, Recorder, note_turns, note_update
from rema_verl.report.trajectories import read_step, step_files


def config(tmp_path, **trajectories):
    return OmegaConf.create(
        {"rema": {"trajectories": trajectories}, "trainer": {"default_local_dir": str(tmp_path / "checkpoints")}}
    )


def rows(prompts: int = 2, n: int = 2, length: int = 10, advantage: float = 1.0, plan: str = "plan it") -> dict:
    """A step's rows, both roles, one turn each of ``length`` tokens for reasoning."""
    found = {}
    for key in (f"p{p}_{session}" for p in range(prompts) for session in range(n)):
        shared = {
            "trajectory_id": f"id {key}",
            "stop_reason": "finished",
            "messages": [plan, "work"],
            "prompt_tokens": 8,
            "cached_tokens": 4,
            "reward_extra_info": {
                "acc": 1.0, "grade_status": "graded", "turn_rewards": json.dumps({r: [1.0] for r in ROLES}),
            },
        }  # fmt: skip
        for i, role in enumerate(ROLES):
            size = length if role == REASONING else 4
            found[f"{key}_{i}"] = row = {**shared, "role": role, "turn_spans": [(0, size)]}
            note_turns(row, torch.full((size,), advantage), torch.zeros(size), torch.full((size,), 0.25))
    return found


def about(keys: list[str]) -> list[dict]:
    return [{"question": f"question {key}", "truth": "99", "data_source": "toy"} for key in keys]


def test_turns_are_the_spans_of_the_row():
    row = {"turn_spans": [(0, 2), (4, 5)]}
    advantages, old, rollout = torch.tensor([1.0, 3, 9, 9, -1]), torch.tensor([0.5, 0.5, 9, 9, 1]), torch.zeros(5)
    note_turns(row, advantages, old, rollout)
    assert row["advantages"] == [2.0, -1.0] and row["log_ratios"] == [0.5, 1.0]


def test_an_update_is_noted_turn_by_turn():
    """Two passes over row 1, whose second turn is empty; row 0 did not learn; -1 is verl's padding."""
    rows = [{"turn_spans": [(0, 1)]}, {"turn_spans": [(0, 2), (2, 2), (4, 5)]}]
    turns = {
        "row": torch.tensor([1, 1, -1, 1, 1]),
        "turn": torch.tensor([0, 1, 0, 0, 1]),
        "log_ratio": torch.tensor([0.0, 0.0, 9.0, 0.5, -0.25]),
        "clipped": torch.tensor([False, False, True, True, False]),
    }
    note_update(rows, turns)
    assert rows[1]["update_log_ratios"] == [0.5, 0.0, -0.25] and rows[1]["clipped"] == [True, False, False]
    assert "clipped" not in rows[0]


def test_a_turn_that_was_rejected_whole_has_no_ratio():
    """verl's rejection sampling took the first and the last turn; the second one still is the second."""
    rows = [{"turn_spans": [(0, 2), (2, 2), (4, 6), (7, 9)]}, {"turn_spans": [(0, 2)]}]
    turns = {
        "row": torch.tensor([0]), "turn": torch.tensor([1]), "log_ratio": torch.tensor([0.5]),
        "clipped": torch.tensor([True]),
    }  # fmt: skip
    note_update(rows, turns)
    assert rows[0]["update_log_ratios"] == [0.0, 0.0, 0.5, 0.0] and rows[0]["clipped"] == [False, False, True, False]
    assert "clipped" not in rows[1]


def test_without_vllm_s_log_probs_there_is_no_ratio():
    row = {"turn_spans": [(0, 1)]}
    note_turns(row, torch.ones(1), torch.ones(1), None)
    assert "log_ratios" not in row


def test_a_step_becomes_metrics_and_a_file(tmp_path):
    with Recorder(config(tmp_path, folder=str(tmp_path / "t"), per_step=3)) as recorder:
        found = recorder.step(1, rows(), {"reasoning/entropy": 0.5, "reward/grading_timeouts": 0}, about)
    assert found["health/lazy_share"] == 0 and found["health/warnings"] == 0
    assert found["health/zero_advantage_groups"] == 0
    assert found["health/log_ratio/rollout_max"] == 0.25
    assert found["health/entropy_vs_start/reasoning"] == 1.0
    kept = list(read_step(step_files(tmp_path / "t")[1]))
    assert len(kept) == 3 and {t["uid"] for t in kept} <= {"p0", "p1"}
    assert all(t["question"] == f"question {t['id'][3:]}_0" and t["truth"] == "99" for t in kept)
    assert all(turn["log_ratio"] == -0.25 and turn["advantage"] == 1.0 for t in kept for turn in t["turns"])


def test_without_a_folder_there_are_metrics_only(tmp_path):
    with Recorder(config(tmp_path)) as recorder:
        found = recorder.step(1, rows(), {}, about)
    assert "health/lazy_share" in found and not any(name.startswith("trajectories/") for name in found)
    assert recorder.writer is None and [p.name for p in tmp_path.iterdir()] == ["checkpoints"]


def test_a_signal_warns_when_it_crosses_and_not_again(tmp_path, caplog):
    recorder = Recorder(config(tmp_path))
    recorder.step(1, rows(), {}, about)
    assert caplog.text == ""
    found = [recorder.step(step, rows(advantage=0.0), {}, about) for step in (6, 7)]
    assert [f["health/warnings"] for f in found] == [1, 1]
    assert caplog.text.count("health/zero_advantage_groups = 1 is above 0.8") == 1
    recorder.step(8, rows(), {}, about)
    recorder.step(9, rows(advantage=0.0), {}, about)
    assert caplog.text.count("health/zero_advantage_groups") == 2  # back, and beyond it again


def test_a_resumed_run_remembers_the_start(tmp_path):
    for step in range(1, 6):
        Recorder(config(tmp_path)).step(step, rows(length=100), {}, about)
    assert (tmp_path / "checkpoints" / START_FILE).exists()
    found = Recorder(config(tmp_path)).step(50, rows(length=10), {}, about)
    assert found["health/reasoning_tokens_vs_start"] == 0.1 and found["health/lazy_share"] == 1.0


def test_flags_are_on_the_trajectories(tmp_path):
    with Recorder(config(tmp_path, folder=str(tmp_path / "t"))) as recorder:
        for step in range(1, 6):
            recorder.step(step, rows(length=100), {}, about)
        step = rows(length=10, plan="the number to give is 99 I say the number to give is 99")
        for row in step.values():
            row["reward_extra_info"] = {**row["reward_extra_info"], "acc": 0.0, "grade_status": "timeout"}
            row["stop_reason"] = "truncated"
        recorder.step(6, step, {}, about)
    files = step_files(tmp_path / "t")
    assert all(t["flags"] == [] for t in read_step(files[1]))
    assert all(set(t["flags"]) == {"wrong", "truncated", "lazy", "leak", "timeout"} for t in read_step(files[6]))


def test_rows_that_did_not_learn_form_no_groups(tmp_path):
    step = rows()
    for row in step.values():
        if row["role"] == META_THINKING:  # rema_separate: reasoning's turn
            del row["advantages"], row["log_ratios"]
    found = Recorder(config(tmp_path)).step(1, step, {}, about)
    assert found["health/zero_advantage_groups"] == 0 and found["health/log_ratio/rollout_max"] == 0.25


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"rema\.trajectories\.folder: .*file/t: Not a directory"):
        Recorder(config(tmp_path, folder=str(tmp_path / "file" / "t")))


def test_an_empty_step_is_no_error(tmp_path):
    with Recorder(config(tmp_path, folder=str(tmp_path / "t"))) as recorder:
        assert recorder.step(1, {}, {}, about)["health/warnings"] == 0


@pytest.mark.parametrize(
    "key, value",
    [
        ("per_step", 0),
        ("per_step", 1.5),
        ("max_mib", 0),
        ("max_mib", "many"),
        ("folder", ""),
        ("folder", 3),
        ("fold", "x"),
    ],
)
def test_a_wrong_option_is_named(tmp_path, key, value):
    with pytest.raises(ValueError, match=f"rema.trajectories.{key}"):
        ReMAConfig.of(config(tmp_path, **{key: value}))


def test_every_metric_is_in_the_documentation(tmp_path):
    """docs/metrics.md names what the recorder and the trainer report, and no health signal that does not exist."""
    from rema_verl.report.health import LIMITS
    from rema_verl.trainers.rema import ReMATrainer

    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    names = [
        name
        for line in text.splitlines()
        if line.startswith("| `")
        for name in re.findall("`([^`]+)`", line.split("|")[1])
    ]
    known = [re.compile(re.sub("<[a-z]+>", "[A-Za-z_0-9]+", re.escape(name))) for name in names]

    trainer = ReMATrainer.__new__(ReMATrainer)
    trainer.rows = {key: {**row, "dialogue_turns": 1} for key, row in rows().items()}
    with Recorder(config(tmp_path, folder=str(tmp_path / "t"))) as recorder:
        found = trainer._dialogue_metrics()
        found |= {"reasoning/entropy": 0.1, "meta_thinking/entropy": 0.1, "actor/turn_ratio_max": 1.0}
        found |= recorder.step(1, trainer.rows, found, about)
    assert [name for name in found if not any(k.fullmatch(name) for k in known)] == []
    documented = {n for name in names if name.startswith("health/") for n in (name.replace("<role>", r) for r in ROLES)}
    assert documented == {name for name in found if name.startswith("health/")} and set(LIMITS) <= documented
    for name, limit in LIMITS.items():
        line = next(x for x in text.splitlines() if name.removesuffix("meta_thinking").removesuffix("reasoning") in x)
        assert f"| {'above' if limit.above else 'below'} {limit.value:g} |" in line, name
