"""A reward manager of one's own: as `rema`, and meta_thinking pays for every word beyond a budget."""

import json

from rema_verl.dialogue import META_THINKING, ROLES
from rema_verl.rewards.rema import ReMARewardManager

BUDGET, COST = 40, 0.01  # words a message, reward a word


class BriefPlans(ReMARewardManager):
    async def run_single(self, data):
        result = await super().run_single(data)
        info = result["reward_extra_info"]
        messages = data[-1].non_tensor_batch["tool_extra_fields"]["messages"][ROLES.index(META_THINKING) :: 2]
        beyond = [max(len(message.split()) - BUDGET, 0) for message in messages]
        rewards = json.loads(info["turn_rewards"])  # role -> one number per turn
        rewards[META_THINKING] = [r - COST * words for r, words in zip(rewards[META_THINKING], beyond, strict=True)]
        info["turn_rewards"] = json.dumps(rewards)
        info["words_beyond_budget"] = float(sum(beyond))  # verl averages it in validation
        return result
