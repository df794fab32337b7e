"""Trainer mode `rema`, piece by piece: rewards per role, mini-batches in rows, verl's checkpoint pointer."""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from rema_verl.trainers import rema
from rema_verl.trainers.rema import ReMATrainer, _read_tracker, _token_rewards, _write_tracker
from rema_verl.trainers.watchdog import root_cause


def bare_trainer(**config) -> ReMATrainer:
    """A trainer without workers, for methods that need only its configuration."""
    trainer = ReMATrainer.__new__(ReMATrainer)
    trainer.config = OmegaConf.create(config)
    return trainer


def test_turn_rewards_stand_on_the_last_token_of_their_turn():
    rewards = _token_rewards(torch.ones(8), [(0, 3), (5, 7)], [0.5, 1.0])
    assert rewards.tolist() == [0, 0, 0.5, 0, 0, 0, 1.0, 0]


def test_a_reward_for_a_turn_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        _token_rewards(torch.zeros(4), [(0, 2)], [1.0, 1.0])


@pytest.mark.parametrize("mini_batch", [32, 64, 128])
def test_mini_batches_are_counted_in_rows(monkeypatch, mini_batch):
    """128 prompts x 16 trajectories x 2 rows, and a configuration that says k updates makes k (trap T10)."""
    trainer = bare_trainer(
        actor_rollout_ref={"actor": {"ppo_mini_batch_size": mini_batch}, "rollout": {"n": 16}},
        trainer={"critic_warmup": 0},
    )
    trainer.global_steps, trainer.use_critic = 1, False
    rows_per_step = 128 * 16 * 2
    rows_per_update = trainer._get_required_batch_multiple(dp_size=8)
    assert rows_per_step // rows_per_update == 128 // mini_batch
    assert trainer.config.actor_rollout_ref.actor.ppo_mini_batch_size == mini_batch  # put back


def test_mode_is_synchronous_whatever_its_name():
    trainer = bare_trainer()
    trainer.trainer_mode = "rema"
    assert trainer.trainer_mode == "sync"


def test_tracker_is_repaired_after_a_kill_while_it_was_written(tmp_path, monkeypatch):
    for step in (3, 7):
        (tmp_path / f"global_step_{step}").mkdir()
        (tmp_path / f"global_step_{step}" / "data.pt").touch()
    (tmp_path / "global_step_9").mkdir()  # incomplete: no data.pt
    (tmp_path / rema.TRACKER).write_text("")
    trainer = bare_trainer(trainer={"default_local_dir": str(tmp_path), "resume_mode": "auto"})
    monkeypatch.setattr(rema.PPOTrainerSync, "_load_checkpoint", lambda self: None)
    trainer._load_checkpoint()
    assert _read_tracker(tmp_path) == 7


def test_failed_save_keeps_the_previous_checkpoint_and_says_why(tmp_path, monkeypatch):
    _write_tracker(tmp_path, 4)

    def fail(self):
        (tmp_path / "global_step_5" / "actor").mkdir(parents=True)
        (tmp_path / rema.TRACKER).write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rema.PPOTrainerSync, "_save_checkpoint", fail)
    trainer = bare_trainer(trainer={"default_local_dir": str(tmp_path)})
    trainer.global_steps = 5
    with pytest.raises(RuntimeError, match=r"MiB were free.*No space left on device.*go on from step 4"):
        trainer._save_checkpoint()
    assert _read_tracker(tmp_path) == 4 and not (tmp_path / "global_step_5").exists()


def test_what_fails_after_a_complete_save_does_not_cost_the_checkpoint(tmp_path, monkeypatch):
    """verl calls trainer.checkpoint_callback_class when its pointer is written; what that raises is no failed save."""

    def save_then_call_back(self):
        (tmp_path / "global_step_5").mkdir()
        (tmp_path / "global_step_5" / "data.pt").touch()
        _write_tracker(tmp_path, 5)
        raise OSError("the bucket is not there")

    monkeypatch.setattr(rema.PPOTrainerSync, "_save_checkpoint", save_then_call_back)
    trainer = bare_trainer(trainer={"default_local_dir": str(tmp_path)})
    trainer.global_steps = 5
    with pytest.raises(OSError, match="the bucket is not there"):
        trainer._save_checkpoint()
    assert _read_tracker(tmp_path) == 5 and (tmp_path / "global_step_5" / "data.pt").exists()


def test_no_tracker_is_no_checkpoint(tmp_path):
    assert _read_tracker(tmp_path) is None
    _write_tracker(tmp_path, None)
    assert "no checkpoint yet" in bare_trainer(trainer={"default_local_dir": str(tmp_path)}).resume_hint()


def test_root_cause_is_one_line():
    try:
        try:
            raise OSError(28, "No space left on device")
        except OSError as e:
            raise RuntimeError("long\ntraceback") from e
    except RuntimeError as e:
        assert root_cause(e) == "OSError: [Errno 28] No space left on device"


def test_padding_rows_have_no_role():
    trainer = bare_trainer()
    trainer.rows = {"a": {"role": "reasoning"}}
    batch = SimpleNamespace(keys=["a", "a"], tags=[{}, {"is_padding": True}])
    assert [trainer._role(batch, i) for i in range(2)] == ["reasoning", None]


def rollout_metrics(monkeypatch, rows: dict[str, tuple[dict, list[int], list[int]]]) -> dict:
    """Of rows given as (extra_fields, prompt, response mask)."""

    def get(keys, partition_id, select_fields):
        columns = {"prompts": [rows[key][1] for key in keys], "response_mask": [rows[key][2] for key in keys]}
        return {
            name: torch.nested.as_nested_tensor([torch.tensor(v) for v in columns[name]], layout=torch.jagged)
            for name in select_fields
        }

    monkeypatch.setattr(rema.tq, "kv_batch_get", get)
    trainer = bare_trainer()
    trainer.rows = {key: row for key, (row, _, _) in rows.items()}
    return trainer._rollout_metrics("train")


def test_prefill_is_compared_with_what_nobody_generated(monkeypatch):
    def row(session, spans, **counts):
        return {"trajectory_id": session, "turn_spans": spans, "token_drift": 0, **counts}

    one, two = {"prompt_tokens": 20, "cached_tokens": 6}, {"prompt_tokens": 12, "cached_tokens": 10}
    found = rollout_metrics(
        monkeypatch,
        {
            "q_0_0": (row("a", [(0, 2), (5, 6)], **one), [1, 2, 3], [1, 1, 0, 0, 0, 1]),
            "q_0_1": (row("a", [(0, 1)], **one), [1, 9, 9, 9], [1]),
            "q_1_0": (row("b", [(0, 1)], **two), [1, 2, 3], [1]),  # the same opening
            "q_1_1": (row("b", [], **two), [1, 9, 8], [0]),  # never spoke: nothing of it was prefilled
        },
    )
    # 1 2 3 and 9 9 9 once, and the three tokens that meta_thinking heard
    assert found["rollout/prefill_over_minimum"] == pytest.approx((14 + 2) / (6 + 3))
    assert found["rollout/cache_hit_rate"] == pytest.approx(16 / 32)
    assert found["rollout/rows_per_trajectory"] == 2 and found["rollout/token_drift"] == 0
    assert "rollout/engine_idle_share" not in found  # another loop, or an engine that says nothing


def test_idle_share_over_two_replicas(monkeypatch):
    def row(session, pending, engine_spans):
        counts = {"prompt_tokens": 3, "cached_tokens": 0, "token_drift": 0}
        return {
            "trajectory_id": session, "turn_spans": [(0, 1)], "pending": pending, "engine_spans": engine_spans, **counts
        }  # fmt: skip

    one = row("a", (10.0, 14.0), [(0, 10.0, 12.0), (0, 13.0, 14.0)])
    two = row("b", (10.0, 12.0), [(1, 10.0, 11.0), (1, 11.5, 12.0)])
    rows = {f"q_{i}_{j}": (row, [1, 2, 3], [1]) for i, row in enumerate((one, two)) for j in range(2)}
    # of 4 seconds replica 0 has none for 1, replica 1 for 2.5
    assert rollout_metrics(monkeypatch, rows)["rollout/engine_idle_share"] == pytest.approx((1 + 2.5) / 8)


def test_rollout_metrics_without_rows():
    trainer = bare_trainer()
    trainer.rows = {}
    assert trainer._rollout_metrics("train") == {}


def test_a_step_in_which_nobody_speaks_says_so(monkeypatch, tmp_path):
    """One model per role, and every dialogue was cut off before the role that learns had its turn."""
    rows = {
        "q_0_0": {"role": "meta_thinking", "turn_spans": [(0, 4)], "stop_reason": "truncated"},
        "q_0_1": {"role": "reasoning", "turn_spans": [], "stop_reason": "truncated"},
    }
    monkeypatch.setattr(rema.tq, "kv_batch_get", lambda **_: {"extra_fields": list(rows.values())})
    trainer = bare_trainer(
        actor_rollout_ref={"rollout": {"n": 1}},
        data={"train_batch_size": 1},
        trainer={"default_local_dir": str(tmp_path)},
    )
    trainer.rema = SimpleNamespace(seed=None)
    trainer.replay_buffer = SimpleNamespace(failure_keys={"train": []})
    trainer.global_steps, trainer.learning = 3, ("reasoning",)
    with pytest.raises(RuntimeError, match=r"step 3: reasoning did not say a word .*'truncated': 2.*the start"):
        trainer._balance_batch(Keys(list(rows)), {})


class Keys:
    """As much of verl's KVBatchMeta as is needed."""

    partition_id = "train"

    def __init__(self, keys: list[str]):
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys)

    def select_keys(self, keys: list[str]) -> "Keys":
        return Keys(keys)
