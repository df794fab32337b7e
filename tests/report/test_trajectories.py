"""Trajectories on disk: what is written, how much of it, and what is refused when read."""

import contextlib
import json
import logging
import math
import threading

import pytest
from synthetic import trajectory, turn, write_step

from rema_verl.dialogue import META_THINKING, REASONING
from rema_verl.report import trajectories
from rema_verl.report.trajectories import SchemaError, Writer, pick, read_step, step_files


def rows(**more) -> dict[str, dict]:
    """Both rows of a dialogue of three messages, as the trainer holds them."""
    shared = {
        "trajectory_id": "abc",
        "stop_reason": "truncated",
        "messages": ["plan", "work", "again"],
        "prompt_tokens": 30,
        "cached_tokens": 10,
        "reward_extra_info": {
            "acc": 0.0,
            "grade_status": "graded",
            "turn_rewards": json.dumps({META_THINKING: [0.5, -1.0], REASONING: [1.0]}),
        },
    }
    return {
        META_THINKING: {**shared, "turn_spans": [(0, 4), (9, 12)], "advantages": [0.1, 0.2], "log_ratios": [0.0, 0.3]},
        REASONING: {**shared, "turn_spans": [(0, 6)], **more},
    }


def test_a_trajectory_puts_each_number_on_its_turn():
    t = trajectories.trajectory(7, "p1", rows(advantages=[-0.4]), question="q", truth="t", data_source="toy")
    assert [(x["role"], x["text"], x["tokens"], x["reward"], x["advantage"]) for x in t["turns"]] == [
        (META_THINKING, "plan", 4, 0.5, 0.1),
        (REASONING, "work", 6, 1.0, -0.4),
        (META_THINKING, "again", 3, -1.0, 0.2),
    ]
    assert (t["step"], t["id"], t["uid"], t["stop_reason"], t["truth"]) == (7, "abc", "p1", "truncated", "t")


def test_what_the_trainer_does_not_know_is_null():
    t = trajectories.trajectory(1, "p", rows())  # reasoning did not learn in this step
    reasoning = t["turns"][1]
    assert reasoning["advantage"] is None and reasoning["log_ratio"] is None
    assert all(x["clipped"] is None and x["update_log_ratio"] is None for x in t["turns"])
    known = trajectories.trajectory(1, "p", rows(clipped=[True], update_log_ratios=[0.7]))
    assert known["turns"][1]["clipped"] is True and known["turns"][1]["update_log_ratio"] == 0.7


def test_numbers_that_are_not_finite_become_null():
    t = trajectories.trajectory(1, "p", rows(advantages=[math.nan], log_ratios=[math.inf]))
    assert t["turns"][1]["advantage"] is None and t["turns"][1]["log_ratio"] is None
    json.dumps(t, allow_nan=False)


# ---------------------------------------------------------------------------------------------------------- pick


def dialogue(id: str, reward: float, tokens: int, stop: str = "finished") -> dict:
    return trajectory(id=id, turns=[turn(REASONING, "x", reward=reward, tokens=tokens)], stop_reason=stop, picked=[])


STEP = [
    dialogue("right", 1.0, 50),
    dialogue("right and short", 1.0, 20),
    dialogue("wrong", -1.0, 30),
    dialogue("wrong and long", -1.0, 60),
    dialogue("longest", 0.0, 90),
    dialogue("cut", 0.0, 80, "truncated"),
    dialogue("cut earlier", 0.0, 40, "context_exhausted"),
]


def test_the_extremes_are_always_there():
    found = {t["id"]: t["picked"] for t in pick([dict(t) for t in STEP], 4, step=1)}
    assert found == {
        "right and short": ["best"], "wrong and long": ["worst"], "longest": ["longest"], "cut": ["truncated"],
    }  # fmt: skip


def test_the_rest_is_a_sample_that_repeats():
    def ids(step: int) -> list[str]:
        return [t["id"] for t in pick([dict(t) for t in STEP], 6, step)]

    assert len(ids(1)) == 6 and ids(1) == ids(1)
    assert len({tuple(ids(step)) for step in range(20)}) > 1  # not the same ones in every step


def test_one_trajectory_may_be_several_extremes():
    only = pick([dialogue("a", 0.0, 1, "truncated")], 5, step=1)
    assert [t["picked"] for t in only] == [["best", "worst", "longest", "truncated"]]


@pytest.mark.parametrize("per_step, expected", [(0, 0), (1, 1), (2, 2), (100, 7)])
def test_never_more_than_asked_for(per_step, expected):
    assert len(pick([dict(t) for t in STEP], per_step, step=3)) == expected
    assert pick([], per_step, step=3) == []


# -------------------------------------------------------------------------------------------------------- writer


def wait_for(writer: Writer) -> None:
    writer.close()
    assert not writer._thread.is_alive()


def test_what_is_written_is_read_back(tmp_path):
    hostile = trajectory(3, turns=[turn(REASONING, "\ud800 \x1b[31m </script>\n\x00 \u202e")])
    writer = Writer(tmp_path / "new" / "folder", 1.0)
    writer.put(3, [hostile, trajectory(3, "t1")])
    wait_for(writer)
    assert list(read_step(step_files(writer.folder)[3])) == [hostile, trajectory(3, "t1")]
    assert writer.metrics() == {"trajectories/written": 2, "trajectories/dropped": 0, "trajectories/rotated": 0}


def test_a_step_done_twice_replaces_its_file(tmp_path):
    for id in ("first", "second"):
        writer = Writer(tmp_path, 1.0)
        writer.put(1, [trajectory(1, id)])
        wait_for(writer)
    assert [t["id"] for t in read_step(tmp_path / "step_000001.jsonl")] == ["second"]


def test_the_folder_stays_within_its_size(tmp_path):
    writer = Writer(tmp_path, 0.05)
    for step in range(1, 31):
        writer.put(step, [trajectory(step, question="x" * 8000)])
        while not writer._queue.empty():
            pass
        sizes = []
        for path in tmp_path.iterdir():
            with contextlib.suppress(FileNotFoundError):  # the writer's thread has just removed or renamed it
                sizes.append(path.stat().st_size)
        assert sum(sizes) <= 0.05 * 2**20
    wait_for(writer)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 0.05 * 2**20
    kept = list(step_files(tmp_path))
    assert kept == list(range(31 - len(kept), 31))  # the newest, without a gap
    assert writer.written == 30 and writer.rotated == 30 - len(kept) and len(kept) == 6


def test_a_step_larger_than_the_limit_is_cut_and_counted(tmp_path, caplog):
    writer = Writer(tmp_path, 0.01)
    writer.put(1, [trajectory(1, str(i), question="x" * 4000) for i in range(5)])
    wait_for(writer)
    assert writer.written == 2 and writer.dropped == 3
    assert "3 trajectories were not written" in caplog.text and "max_mib" in caplog.text


def test_a_slow_disk_costs_trajectories_not_time(tmp_path, caplog, monkeypatch):
    go_on = threading.Event()
    original = Writer._write
    monkeypatch.setattr(Writer, "_write", lambda self, *step: go_on.wait(30) and original(self, *step))
    writer = Writer(tmp_path, 10.0)
    extra = 3
    for step in range(1, 2 + trajectories.QUEUED_STEPS + extra):
        writer.put(step, [trajectory(step)] * 2)
        while step == 1 and not writer._queue.empty():  # the thread holds the first one
            pass
    assert writer.dropped == 2 * extra and writer.written == 0
    assert caplog.text.count("were not written") == extra
    go_on.set()
    wait_for(writer)
    assert writer.written == 2 * (1 + trajectories.QUEUED_STEPS)


def test_a_disk_that_fails_does_not_end_the_thread(tmp_path, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    writer = Writer(tmp_path, 1.0)
    monkeypatch.setattr(trajectories.os, "replace", full)
    writer.put(1, [trajectory(1)])
    while not writer.dropped:
        pass
    monkeypatch.undo()
    writer.put(2, [trajectory(2)])
    wait_for(writer)
    assert list(step_files(tmp_path)) == [2] and writer.dropped == 1
    assert "No space left on device" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["step_000002.jsonl"]  # nothing half-written


def test_leftovers_of_a_killed_process_go(tmp_path):
    (tmp_path / ".step_000004.tmp").write_text("{")
    wait_for(Writer(tmp_path, 1.0))
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("{", "line 2: not valid JSON"),
        ("[]", "not a trajectory"),
        ('{"a": 1}', "not a trajectory"),
        (json.dumps({**trajectory(), "schema": 2}), "schema 2, but this version reads schema 1"),
        (json.dumps({**trajectory(), "turns": None}), "field 'turns'"),
        (json.dumps({**trajectory(), "turns": [{"role": "narrator"}]}), "a turn without a role"),
        (json.dumps(trajectory(turns=[turn(REASONING, "x", reward="1")])), "a turn's 'reward'"),
    ],
)
def test_a_file_that_is_not_ours_is_named(tmp_path, line, complaint):
    path = tmp_path / "step_000001.jsonl"
    path.write_text(json.dumps(trajectory()) + "\n" + line + "\n")
    with pytest.raises(SchemaError, match=r"step_000001\.jsonl") as error:
        list(read_step(path))
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_steps_are_in_order_whatever_their_width(tmp_path):
    for step in (1000000, 2, 30):
        write_step(tmp_path, step, [trajectory(step)])
    (tmp_path / "step_notes.jsonl").touch()
    assert list(step_files(tmp_path)) == [2, 30, 1000000]


def test_logged_on_the_module_s_logger(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="rema_verl.report.trajectories"):
        Writer(tmp_path, 1.0)._drop(5, 2, "why")
    assert "step 5: 2 trajectories were not written: why" in caplog.text
