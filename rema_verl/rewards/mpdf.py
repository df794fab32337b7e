"""Reward manager ``mpdf``: one reward per agent and round of a deliberation (MPDF, Sec. on rewards).

The rows of one trajectory, one per agent, carry the answers of all agents before and after every round. Each distinct
answer is graded once; everything else, the team without an agent included, is computed from these grades
(:func:`rema_verl.deliberation.protocol.rewards`). No model is called.

verl copies the last row's score over a session's other rows. The rewards therefore travel in
``reward_extra_info["turn_rewards"]``, from where each row gets its own agent's.
"""

import asyncio
import json

from verl import DataProto
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
from verl.experimental.reward_loop.reward_manager.registry import register

from rema_verl.config.mpdf import MPDFConfig
from rema_verl.deliberation.protocol import rewards, vote
from rema_verl.rewards.grading import Grade, grade
from rema_verl.rewards.judge import same_answer


@register("mpdf")
class MPDFRewardManager(RewardManagerBase):
    """Scores one deliberation at a time. Answers are mathematics or choices, see :mod:`rema_verl.rewards.grading`."""

    def __init__(self, config, tokenizer, compute_score=None, reward_router_address=None, reward_model_tokenizer=None):
        super().__init__(config, tokenizer, compute_score)
        self.mpdf = MPDFConfig.of(config)
        if config.reward.custom_reward_function.path is not None:
            raise ValueError(
                "reward.custom_reward_function does not work with reward.reward_manager.name=mpdf, which grades the "
                "single answers of a deliberation itself"
            )

    async def run_single(self, data: DataProto) -> dict:
        """Score the rows of one trajectory.

        Args:
            data: the rows of one session. ``tool_extra_fields["mpdf"]["rounds"]`` is a list of rounds, each with
                ``answers`` = [(N,) before, (N,) after] and ``confidences`` (N,) after the round.

        Returns:
            ``reward_score``: mean over the agents of what each earned in all rounds. ``reward_extra_info``: ``acc``
            (1.0 if the team is right after the last round), ``turn_rewards`` (JSON: "agent_<i>" -> one number per
            round), ``no_answer`` (share of the agents without an answer at the end), ``grading_timeouts`` and
            ``grading_errors`` (distinct answers that could not be graded and so count as wrong) and ``grade_status``
            (the worst of them, else "graded", or "no_answer" where nobody ever had one).

        Raises:
            ValueError: the rows are not those of a deliberation.
        """
        row = data[-1].non_tensor_batch
        rounds = ((row.get("tool_extra_fields") or {}).get("mpdf") or {}).get("rounds")
        if not rounds:
            raise ValueError("reward.reward_manager.name=mpdf scores rows of agent loop mpdf, these have no rounds")
        truth = str(row["reward_model"]["ground_truth"])
        grades = await self._grades({a for t in rounds for answers in t["answers"] for a in answers}, truth)
        same = same_answer(row, self.mpdf.grading_timeout)
        earned, acc = await asyncio.to_thread(score, rounds, {a: g.correct for a, g in grades.items()}, same)

        statuses = [g.status for g in grades.values()]
        order = ("error", "memory", "timeout", "graded", "no_answer")
        last = rounds[-1]["answers"][1]
        return {
            "reward_score": sum(map(sum, earned)) / len(earned),
            "reward_extra_info": {
                "acc": float(acc),
                "no_answer": sum(answer is None for answer in last) / len(last),
                "grading_timeouts": float(statuses.count("timeout")),
                "grading_errors": float(statuses.count("error") + statuses.count("memory")),
                "grade_status": next((status for status in order if status in statuses), "no_answer"),
                "turn_rewards": json.dumps({f"agent_{i}": own for i, own in enumerate(earned)}),
            },
        }

    async def _grades(self, answers: set[str | None], truth: str) -> dict[str, Grade]:
        known = sorted(answer for answer in answers if answer is not None)
        timeout = self.mpdf.grading_timeout
        found = (asyncio.to_thread(grade, f"\\boxed{{{answer}}}", truth, timeout) for answer in known)
        return dict(zip(known, await asyncio.gather(*found), strict=True))


def score(rounds: list[dict], correct: dict[str, bool], same) -> tuple[list[list[float]], bool]:
    """Rewards per agent and round, and whether the team is right at the end.

    Example, two agents and one round: the second one, who was wrong, now agrees with the first::

        >>> rounds = [{"answers": [["4", "5"], ["4", "4"]], "confidences": [0.5, 0.5]}]
        >>> score(rounds, {"4": True, "5": False}, str.__eq__)
        ([[0.0], [1.0]], True)
    """
    by_round = []
    for t in rounds:
        before, after = ([answer is not None and correct[answer] for answer in answers] for answers in t["answers"])
        by_round.append(rewards(before, t["answers"][1], after, t["confidences"], same))
    winners = vote(t["answers"][1], t["confidences"], same)
    return [list(own) for own in zip(*by_round, strict=True)], bool(winners) and after[winners[0]]
