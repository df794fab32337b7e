"""Reward manager `rema`: outcome, finish flag, per-turn rewards, custom outcome functions."""

import asyncio
import json

import numpy as np
import pytest
from omegaconf import OmegaConf
from verl import DataProto

from rema_verl.rewards.rema import ReMARewardManager


def manager(compute_score=None, path=None, **rema) -> ReMARewardManager:
    config = OmegaConf.create({"rema": rema, "reward": {"custom_reward_function": {"path": path}}})
    return ReMARewardManager(config, tokenizer=None, compute_score=compute_score)


def score(messages, stop_reason="finished", truth="4", reward_manager=None):
    def column(value):
        array = np.empty(2, dtype=object)
        array[:] = [value, value]
        return array

    data = DataProto(
        non_tensor_batch={
            "tool_extra_fields": column({"messages": messages, "stop_reason": stop_reason}),
            "reward_model": column({"ground_truth": truth}),
            "data_source": column("s"),
            "extra_info": column({"index": 3}),
        }
    )
    result = asyncio.run((reward_manager or manager()).run_single(data))
    info = result["reward_extra_info"]
    return result["reward_score"], info, json.loads(info["turn_rewards"])


def test_correct_and_finished():
    reward, info, turns = score(["m", "r", "m [FINISH]", "\\boxed{4}"])
    assert reward == 1.0 and info["acc"] == 1.0 and info["finished"] == 1.0 and info["grade_status"] == "graded"
    assert turns == {"meta_thinking": [0.0, 1.0], "reasoning": [0.0, 1.0]}


def test_wrong():
    reward, info, turns = score(["m [FINISH]", "\\boxed{5}"])
    assert reward == 0.0 and info["acc"] == 0.0 and turns == {"meta_thinking": [0.0], "reasoning": [0.0]}


def test_unfinished_is_masked_unless_asked_otherwise():
    messages = ["m", "\\boxed{4}"]
    assert score(messages, "max_turns")[0] == 0.0
    reward, info, _ = score(messages, "max_turns", reward_manager=manager(mask_unfinished=False))
    assert reward == 1.0 and info["acc"] == 1.0 and info["finished"] == 0.0


def test_reasoning_that_never_spoke():
    reward, info, turns = score(["m"], "truncated")
    assert reward == 0.0 and info["grade_status"] == "no_answer" and turns == {"meta_thinking": [0.0], "reasoning": []}


def test_only_reasonings_last_message_counts():
    assert score(["m", "\\boxed{4}", "\\boxed{4} [FINISH]", "none"])[0] == 0.0


@pytest.mark.parametrize("as_dict", [False, True])
def test_custom_outcome(as_dict):
    def compute_score(data_source, solution_str, ground_truth, extra_info):
        value = len(solution_str) / 10 + (data_source == "s") + extra_info["index"]
        return {"score": value, "acc": 0.5} if as_dict else value

    reward, info, _ = score(["m [FINISH]", "ab"], reward_manager=manager(compute_score, path="x.py"))
    assert reward == pytest.approx(4.2) and info["acc"] == pytest.approx(0.5 if as_dict else 4.2)


def test_rows_of_another_loop_are_refused():
    column = np.empty(1, dtype=object)
    column[:] = [{"turn_scores": []}]
    with pytest.raises(ValueError, match="agent loop 'rema'"):
        asyncio.run(manager().run_single(DataProto(non_tensor_batch={"tool_extra_fields": column})))
