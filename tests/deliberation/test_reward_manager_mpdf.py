"""Reward manager `mpdf`: from the rows of a deliberation to rewards per agent and round."""

import asyncio
import itertools
import json

import numpy as np
import pytest
from omegaconf import OmegaConf
from verl import DataProto
from verl.experimental.reward_loop.reward_manager.registry import get_reward_manager_cls

from rema_verl.rewards import grading, mpdf
from rema_verl.rewards.mpdf import MPDFRewardManager


def manager(path=None, **options) -> MPDFRewardManager:
    config = OmegaConf.create({"mpdf": options, "reward": {"custom_reward_function": {"path": path}}})
    return MPDFRewardManager(config, tokenizer=None)


def score(rounds, truth="4", extra_fields=None, agents=3):
    def column(values):
        array = np.empty(agents, dtype=object)
        array[:] = values
        return array

    fields = [
        {"mpdf": {"n_agents": agents, "agent": i, "rounds": rounds}} if extra_fields is None else extra_fields
        for i in range(agents)
    ]
    data = DataProto(
        non_tensor_batch={
            "tool_extra_fields": column(fields),
            "reward_model": column([{"ground_truth": truth, "style": "rule"}] * agents),
            "data_source": column(["s"] * agents),
        }
    )
    result = asyncio.run(manager().run_single(data))
    info = result["reward_extra_info"]
    return result["reward_score"], info, json.loads(info["turn_rewards"])


def a_round(before, after, confidences=(0.5, 0.5, 0.5)):
    return {"actions": ["refine"] * len(before), "answers": [before, after], "confidences": list(confidences)}


def test_it_is_registered():
    assert get_reward_manager_cls("mpdf") is MPDFRewardManager


def test_two_rounds():
    rounds = [a_round(["5", None, "4"], ["5", "4.0", "4"]), a_round(["5", "4.0", "4"], ["4", "4.0", None])]
    reward, info, turns = score(rounds)
    # round 1: agent 1 mends its answer; without it, or without agent 2, the team would say 5
    # round 2: agent 0 mends, agent 2 loses its answer; each of them, alone, changes nothing in the team's
    assert turns == {"agent_0": [0.0, 1.0], "agent_1": [2.0, 0.0], "agent_2": [1.0, -1.0]}
    assert reward == pytest.approx((1 + 2 + 0) / 3)
    assert info["acc"] == 1.0 and info["no_answer"] == pytest.approx(1 / 3) and info["grade_status"] == "graded"
    assert all(isinstance(value, float | str) for value in info.values())


def test_every_answer_is_graded_once_and_equal_ones_vote_together(monkeypatch):
    graded = []

    def counting(response, truth, timeout):
        graded.append((response, truth))
        return grading.grade(response, truth, timeout)

    monkeypatch.setattr(mpdf, "grade", counting)
    rounds = [a_round(["0.5", "7", "7"], ["0.5", "\\frac{1}{2}", "7"], (0.25, 0.25, 1.0))] * 3
    _, info, turns = score(rounds, truth="1/2")
    assert sorted(graded) == [("\\boxed{0.5}", "1/2"), ("\\boxed{7}", "1/2"), ("\\boxed{\\frac{1}{2}}", "1/2")]
    assert info["acc"] == 1.0 and turns["agent_1"] == [2.0] * 3


def test_nobody_has_an_answer():
    reward, info, turns = score([a_round([None] * 3, [None] * 3)])
    assert reward == 0.0 and info["acc"] == 0.0 and info["no_answer"] == 1.0 and info["grade_status"] == "no_answer"
    assert turns == {f"agent_{i}": [0.0] for i in range(3)}


@pytest.mark.parametrize("status", ["timeout", "memory", "error"])
def test_what_cannot_be_graded_is_wrong_and_counted(monkeypatch, status):
    def failing(response, truth, timeout):
        return grading.Grade(False, status) if "5" in response else grading.grade(response, truth, timeout)

    monkeypatch.setattr(mpdf, "grade", failing)
    _, info, turns = score([a_round(["4", "4", "5"], ["4", "4", "5"])])
    assert info["grade_status"] == status and info["acc"] == 1.0 and turns["agent_2"] == [0.0]
    assert info["grading_timeouts"] == float(status == "timeout")
    assert info["grading_errors"] == float(status != "timeout")


@pytest.mark.parametrize("agents", [2, 5])
def test_other_team_sizes(agents):
    before, after = ["5"] * agents, ["4"] * agents
    reward, info, turns = score([a_round(before, after, [0.5] * agents)], agents=agents)
    assert turns == {f"agent_{i}": [1.0] for i in range(agents)} and reward == 1.0 and info["acc"] == 1.0


def test_all_cases_of_one_round_of_two_agents():
    """Against the definition, spelled out: own change, and the team's with and without the agent."""
    answers = ["4", "5", "6", None]

    def team(votes):  # (answer, confidence) of the agents that are there
        votes = [v for v in votes if v[0] is not None]
        if len(votes) == 2 and votes[0][0] != votes[1][0]:
            return (votes[1] if votes[1][1] > votes[0][1] else votes[0])[0] == "4"
        return bool(votes) and votes[0][0] == "4"

    rounds = [
        a_round(list(before), list(after), confidences)
        for before in itertools.product(answers, repeat=2)
        for after in itertools.product(answers, repeat=2)
        for confidences in ((0.5, 0.5), (0.25, 0.75), (0.75, 0.25))
    ]
    _, _, turns = score(rounds, agents=2)
    for t, played in enumerate(rounds):
        (b0, b1), (a0, a1) = played["answers"]
        v0, v1 = zip((a0, a1), played["confidences"], strict=True)
        assert turns["agent_0"][t] == (a0 == "4") - (b0 == "4") + team([v0, v1]) - team([v1])
        assert turns["agent_1"][t] == (a1 == "4") - (b1 == "4") + team([v0, v1]) - team([v0])


def test_rows_of_another_loop_and_a_function_of_ones_own_are_refused():
    for fields in ({}, {"messages": ["m", "r"]}, {"mpdf": {"rounds": []}}):
        with pytest.raises(ValueError, match="scores rows of agent loop mpdf"):
            score([], extra_fields=fields)
    with pytest.raises(ValueError, match="custom_reward_function does not work"):
        manager(path="x.py")
    with pytest.raises(ValueError, match=r"mpdf\.agents must be at least 2"):
        manager(agents=1)
