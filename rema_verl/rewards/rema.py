"""Reward manager ``rema``: one outcome per trajectory, rewards per role and per turn.

What is rewarded, in the order of a call:

1. the outcome of reasoning's last message: correct, wrong, or no answer (:class:`Outcome`);
2. each role's reward from it (``rema.reward``), on the role's last turn;
3. optionally a bonus on every turn.

The default is ReMA's multi-turn reward: 1 if the last message is correct and the dialogue finished, else 0, for both
roles (paper, App. on rewards; the authors' ``mask_unfinished_reward``).

verl copies the last row's score over a session's other rows. The rewards therefore also travel in
``reward_extra_info["turn_rewards"]``, from where trainer mode ``rema`` restores each role's own.

Rows of any other agent loop work too: the whole response is then reasoning's one message.
"""

import asyncio
import hashlib
import inspect
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl import DataProto
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
from verl.experimental.reward_loop.reward_manager.registry import register

from rema_verl.config import ReMAConfig, RewardConfig
from rema_verl.dialogue import META_THINKING, REASONING, ROLES, StopReason
from rema_verl.rewards.grading import grade, last_boxed
from rema_verl.rewards.judge import final_answer, is_verdict, same_answer, verdict

REPEATS = 0.5  # a turn with more than this share of words in runs said before gets no bonus
RUN = 4  # words


@dataclass(frozen=True)
class Outcome:
    """What came of one answer. ``score`` is what a user's own function said; None where ours decided."""

    acc: float
    status: str
    answered: bool = True
    score: float | None = None


@register("rema")
class ReMARewardManager(RewardManagerBase):
    """Scores one trajectory at a time, best from the rows of agent loop ``rema``.

    The row's ``reward_model.style`` says how: "verdict" compares ``[[A]]`` / ``[[B]]``, anything else grades
    mathematics. A user's ``reward.custom_reward_function`` replaces both: it is called as verl calls it
    (``data_source``, ``solution_str`` = reasoning's last message, ``ground_truth``, ``extra_info``) and returns a
    number or a dict with "score" and, if it likes, "acc".
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
            ``reward_score`` (reasoning's, what verl writes on every row) and ``reward_extra_info`` with ``acc``
            (1.0 if correct), ``finished`` (1.0 or 0.0), ``grade_status``, ``leak`` (1.0 if the plan holds an answer;
            only where that is punished) and ``turn_rewards`` (JSON: role -> one number per turn of that role).
        """
        row = data[-1].non_tensor_batch
        fields = row.get("tool_extra_fields") or {}
        if "messages" not in fields:
            return await self._single_agent(data, row)
        messages = {role: fields["messages"][i::2] for i, role in enumerate(ROLES)}
        finished = fields["stop_reason"] == StopReason.FINISHED
        answer = messages[REASONING][-1] if messages[REASONING] else ""
        outcome = await self._outcome(row, answer)
        reward = reasoning_reward(self.rema.reward, outcome, finished or not self.rema.mask_unfinished)
        rewards = {META_THINKING: reward, REASONING: reward}

        info: dict[str, Any] = {}
        if self.rema.reward.meta_thinking != "final":
            leak = any(has_answer(message, row) for message in messages[META_THINKING])
            rewards[META_THINKING] = self.rema.reward.leak if leak else await self._plan_reward(row, fields, outcome)
            info["leak"] = float(leak)
        turn_rewards = {}
        for role, said in messages.items():
            turn_rewards[role] = turn_bonuses(said, self.rema.reward.turn_bonus)
            if said:
                turn_rewards[role][-1] += rewards[role]

        acc = outcome.acc * finished if self.rema.mask_unfinished else outcome.acc
        info |= {
            "acc": acc,
            "finished": float(finished),
            "grade_status": outcome.status,
            "turn_rewards": json.dumps(turn_rewards),  # text: verl averages all else it finds here
        }
        self._write(row, fields, acc, outcome, reward)
        return {"reward_score": reward, "reward_extra_info": info}

    async def _single_agent(self, data: DataProto, row: dict) -> dict:
        """The same for a row of another agent loop: one message, no dialogue to finish."""
        item = data[-1].batch
        length = item["responses"].shape[-1]
        ids = item["responses"][: int(item["attention_mask"][-length:].sum())]
        answer = await asyncio.to_thread(self.tokenizer.decode, ids, skip_special_tokens=True)
        outcome = await self._outcome(row, answer)
        reward = reasoning_reward(self.rema.reward, outcome, True)
        self._write(row, {"messages": [answer]}, outcome.acc, outcome, reward)
        return {
            "reward_score": reward,
            "reward_extra_info": {"acc": outcome.acc, "grade_status": outcome.status},
        }

    async def _outcome(self, row: dict, answer: str) -> Outcome:
        if not answer.strip():
            return Outcome(0.0, "no_answer", answered=False, score=0.0 if self.custom else None)
        truth = row["reward_model"]["ground_truth"]
        if not self.custom:
            return await asyncio.to_thread(judge_answer, answer, truth, row, self.rema.grading_timeout)
        call = {
            "data_source": row["data_source"],
            "solution_str": answer,
            "ground_truth": truth,
            "extra_info": dict(row.get("extra_info") or {}),
        }
        if inspect.iscoroutinefunction(self.compute_score):
            result = await self.compute_score(**call)
        else:
            result = await asyncio.to_thread(self.compute_score, **call)
        details: dict[str, Any] = result if isinstance(result, dict) else {"score": result}
        return Outcome(float(details.get("acc", details["score"])), "custom", score=float(details["score"]))

    async def _plan_reward(self, row: dict, fields: dict, first: Outcome) -> float:
        """What a plan without an answer in it earns from the answers that followed it."""
        answers = fields["messages"][1:2] + fields.get("other_answers", [])
        if self.rema.reward.meta_thinking == "consistency":
            same = same_answer(row, self.rema.grading_timeout)
            return await asyncio.to_thread(consistency, [final_answer(a, row) for a in answers], same)
        others = await asyncio.gather(*(self._outcome(row, answer) for answer in answers[1:]))
        outcomes = [first, *others] if answers else []
        return sum(o.acc for o in outcomes) / max(len(outcomes), 1)

    def _write(self, row: dict, fields: dict, acc: float, outcome: Outcome, reward: float) -> None:
        """Append the trajectory to the journal: one line, complete or absent, also if the run is killed."""
        if self.rema.journal is None:
            return
        entry = {
            "id": row_id(row),
            "data_source": str(row.get("data_source")),
            "acc": acc,
            "reward": reward,
            "grade_status": outcome.status,
            "ground_truth": str(row["reward_model"]["ground_truth"]),
            **{key: fields[key] for key in ("stop_reason", "dialogue_turns", "messages") if key in fields},
        }
        folder = Path(self.rema.journal)
        folder.mkdir(parents=True, exist_ok=True)
        line = (json.dumps(entry) + "\n").encode()
        # one file per process, one write per line: nothing interleaves
        file = os.open(folder / f"{socket.gethostname()}-{os.getpid()}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(file, line)
        finally:
            os.close(file)


def reasoning_reward(config: RewardConfig, outcome: Outcome, finished: bool) -> float:
    """The outcome's reward. Unfinished: 0 for "final", as no answer for "graded".

    >>> config, wrong = RewardConfig(reasoning="graded"), Outcome(0.0, "graded")
    >>> reasoning_reward(config, wrong, True), reasoning_reward(config, wrong, False)
    (-0.5, -1.0)
    """
    if outcome.score is not None:
        return outcome.score if finished else 0.0
    if config.reasoning == "final":
        return outcome.acc * finished
    if not (outcome.answered and finished):
        return config.no_answer
    return config.correct if outcome.acc else config.wrong


def turn_bonuses(messages: list[str], bonus: float) -> list[float]:
    """One number per message: an even share of ``bonus``, nothing for a repetition.

    >>> turn_bonuses(["add one to both sides now", "add one to both sides now", "then divide by two"], 0.3)
    [0.1, 0.0, 0.1]
    """
    shares: list[float] = []
    heard: set[tuple[str, ...]] = set()
    for message in messages:
        words = message.split()
        runs = {tuple(words[i : i + RUN]) for i in range(max(len(words) - RUN + 1, 1))} if words else set()
        repeated = len(runs & heard) / len(runs) if runs else 1.0
        shares.append(0.0 if repeated > REPEATS else round(bonus / len(messages), 12))
        heard |= runs
    return shares


def judge_answer(answer: str, truth: object, row: dict, timeout: float) -> Outcome:
    """Ours: a verdict or mathematics, by the row's ``reward_model.style``."""
    if is_verdict(row):
        found = verdict(answer)
        status = "no_answer" if found is None else "graded"
        return Outcome(float(found == str(truth)), status, answered=found is not None)
    result = grade(answer, str(truth), timeout)
    # the paper's "no answer" is a missing box; an answer without one may still be read and be correct
    return Outcome(float(result.correct), result.status, answered=result.correct or last_boxed(answer) is not None)


def has_answer(plan: str, row: dict) -> bool:
    """Whether a plan gives an answer in the form that answers have."""
    return final_answer(plan, row) is not None


def consistency(answers: list[str | None], same: Callable[[str, str], bool]) -> float:
    """Share of the most frequent answer; 0 where most responses have no definite one (ReMA, App. on rewards).

    >>> consistency(["4", "4.0", "5", None], lambda a, b: float(a) == float(b))
    0.5
    """
    definite = [a for a in answers if a is not None]
    if not answers or len(definite) * 2 < len(answers):
        return 0.0
    groups: list[list[str]] = []
    for answer in definite:
        group = next((g for g in groups if same(g[0], answer)), None)
        if group is None:
            groups.append(group := [])
        group.append(answer)
    return max(len(g) for g in groups) / len(answers)


def row_id(row: dict) -> str:
    """A name for the row that stays the same between runs: its ``extra_info.id``, or a hash of source and question."""
    given = (row.get("extra_info") or {}).get("id")
    if given is not None:
        return str(given)
    questions = [str(m["content"]) for m in row["raw_prompt"] if m["role"] == "user"]
    return hashlib.sha256(f"{row.get('data_source')}\n{questions[-1]}".encode()).hexdigest()[:16]
