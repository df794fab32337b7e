"""Single pieces of rema-verl in somebody else's recipe."""

import pytest
from common import make_tiny, read_metrics

pytestmark = pytest.mark.slow


def test_single_pieces_train_in_stock_verl_by_name_alone(start, tmp_path):
    """verl's own config, sync mode, single-turn loop and naive reward; ours are the estimator and the loss."""
    tiny = make_tiny(tmp_path / "tiny")
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
    assert command.wait(900) == 0, command.text()[-3000:]
    metrics = read_metrics(tmp_path / "metrics")
    assert max(metrics) == 2
    for step in (1, 2):
        assert metrics[step]["actor/grad_norm"] > 0 and "actor/log_ratio_clipfrac" in metrics[step]  # turn_clip's own
        assert abs(metrics[step]["critic/advantages/mean"]) < 0.5 < metrics[step]["critic/advantages/max"]
