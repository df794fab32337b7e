"""Reward manager ``rema``: one outcome per dialogue, rewards per role and per turn.

The default is ReMA's multi-turn reward: 1 if reasoning's last message is correct and the dialogue finished, else 0,
given to the last turn of both roles (paper, App. on rewards; the authors' ``mask_unfinished_reward``).

verl copies the last row's score over a session's other rows. The rewards therefore also travel in
``reward_extra_info["turn_rewards"]``, from where trainer mode ``rema`` restores each role's own.
"""

import asyncio
import inspect
import json

from verl import DataProto
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
from verl.experimental.reward_loop.reward_manager.registry import register

from rema_verl.config import ReMAConfig
from rema_verl.dialogue import REASONING, ROLES, StopReason
from rema_verl.rewards.grading import grade


@register("rema")
class ReMARewardManager(RewardManagerBase):
    """Scores one dialogue at a time from the rows of agent loop ``rema``.

    A user's ``reward.custom_reward_function`` replaces the outcome: it is called as verl calls it
    (``data_source``, ``solution_str`` = reasoning's last message, ``ground_truth``, ``extra_info``) and returns a
    number or a dict with "score".
    """

    def __init__(self, config, tokenizer, compute_score=None, reward_router_address=None, reward_model_tokenizer=None):
        super().__init__(config, tokenizer, compute_score)
        self.rema = ReMAConfig.of(config)
        self.custom = config.reward.custom_reward_function.path is not None

    async def run_single(self, data: DataProto) -> dict:
        """Score the rows of one trajectory.

        Args:
            data: the rows of one session; ``tool_extra_fields`` holds what the agent loop put in ``extra_fields``.

        Returns:
            ``reward_score`` (reasoning's sum, what verl writes on every row) and ``reward_extra_info`` with ``acc``
            (1.0 if correct), ``finished`` (1.0 or 0.0), ``grade_status`` and ``turn_rewards`` (JSON: role -> one
            number per turn of that role).
        """
        row = data[-1].non_tensor_batch
        fields = row["tool_extra_fields"]
        if "messages" not in fields:
            raise ValueError("reward manager 'rema' needs rows of agent loop 'rema' (rollout.agent.default_agent_loop)")
        answers = fields["messages"][ROLES.index(REASONING) :: 2]
        outcome, acc, status = await self._outcome(row, answers[-1] if answers else "")
        finished = fields["stop_reason"] == StopReason.FINISHED
        reward = outcome if finished or not self.rema.mask_unfinished else 0.0

        turns = {role: len(fields["messages"][i::2]) for i, role in enumerate(ROLES)}
        turn_rewards = {role: [0.0] * (n - 1) + [reward] if n else [] for role, n in turns.items()}
        return {
            "reward_score": reward,
            "reward_extra_info": {
                "acc": acc * finished if self.rema.mask_unfinished else acc,
                "finished": float(finished),
                "grade_status": status,
                "turn_rewards": json.dumps(turn_rewards),  # text: verl averages all else it finds here
            },
        }

    async def _outcome(self, row: dict, answer: str) -> tuple[float, float, str]:
        """(outcome reward, accuracy, grading status) of reasoning's last message."""
        if not answer.strip():
            return 0.0, 0.0, "no_answer"
        truth = row["reward_model"]["ground_truth"]
        if not self.custom:
            result = await asyncio.to_thread(grade, answer, str(truth), self.rema.grading_timeout)
            return float(result.correct), float(result.correct), result.status
        call = {
            "data_source": row["data_source"],
            "solution_str": answer,
            "ground_truth": truth,
            "extra_info": dict(row.get("extra_info") or {}),
        }
        if inspect.iscoroutinefunction(self.compute_score):
            score = await self.compute_score(**call)
        else:
            score = await asyncio.to_thread(self.compute_score, **call)
        details = score if isinstance(score, dict) else {"score": score}
        return float(details["score"]), float(details.get("acc", details["score"])), "custom"
