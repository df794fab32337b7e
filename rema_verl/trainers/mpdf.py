"""Trainer mode ``mpdf``: one row per agent of a team, all of one model, and one advantage group per prompt.

verl gives the rows of a session one reward, the last row's, and counts mini-batches as if a session had one row. Mode
``rema`` mends both for two roles; here the rows are a team's agents, who are exchangeable: what differs is that nothing
is grouped or reported by role.
"""

from collections import Counter

import numpy as np
import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from rema_verl.config.mpdf import MPDFConfig
from rema_verl.deliberation.protocol import ACTIONS
from rema_verl.trainers.rema import ReMATrainer, _token_rewards, _turn_rewards


@register_trainer("mpdf")
class MPDFTrainer(ReMATrainer):
    """N rows per deliberation, shared weights. See the module docstring."""

    def __init__(self, config):
        self.mpdf = MPDFConfig.of(config)
        self.roles = self.learning = tuple(f"agent_{i}" for i in range(self.mpdf.agents))
        super().__init__(config)

    def on_init_end(self) -> None:
        PPOTrainerSync.on_init_end(self)  # verl's own loss: no metrics by role

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        return PPOTrainerSync._compute_old_log_prob(self, batch, metrics)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        fields = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["rm_scores"])
        scores = [score.clone() for score in fields["rm_scores"].unbind()]
        for i, role in enumerate(self._role(batch, i) for i in range(len(batch))):
            if role is not None and (rewards := rewards_of_turns(self.rows[batch.keys[i]])) is not None:
                scores[i] = _token_rewards(scores[i], self.rows[batch.keys[i]]["turn_spans"], rewards)
        update = TensorDict(
            {"rm_scores": torch.nested.as_nested_tensor(scores, layout=torch.jagged)}, batch_size=len(batch)
        )
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=update)
        metrics.update(team_metrics(self.rows.values()))
        return PPOTrainerSync._compute_advantage(self, batch, metrics)

    def _compute_metrics(self, *args, **kwargs) -> None:
        PPOTrainerSync._compute_metrics(self, *args, **kwargs)  # mode rema's are about dialogues

    def _dump_generations(self, inputs, outputs, gts, scores, reward_extra_infos_dict, dump_path) -> None:
        """verl's JSONL of rollouts, with the agent and what it did on each row."""
        real = [i for i, key in enumerate(reward_extra_infos_dict["uid"]) if not key.startswith("pad")]
        inputs, outputs, gts, scores = ([column[i] for i in real] for column in (inputs, outputs, gts, scores))
        extra = {k: [v[i] for i in real] for k, v in reward_extra_infos_dict.items()}
        keys = extra["uid"]
        extra["agent"] = [int(key.rsplit("_", 1)[1]) for key in keys]
        if all(key in self.rows for key in keys):
            for name in ("trajectory_id", "turn_spans", "mpdf"):
                extra[name] = [self.rows[key][name] for key in keys]
        PPOTrainerSync._dump_generations(self, inputs, outputs, gts, scores, extra, dump_path)


def rewards_of_turns(row: dict) -> list[float] | None:
    """One reward per turn of an agent's row; None where another reward manager gave one to the whole row.

    An agent whose context is full in a round has no turn in it, and may have one again in a later round, when what its
    peers say is shorter: a round's reward belongs to that round's turn, and without a turn nothing it wrote earned it.

    >>> row = {"role": "agent_0", "turn_rounds": [0, 2]}
    >>> rewards_of_turns(row | {"reward_extra_info": {"turn_rewards": '{"agent_0": [0.5, -1.0, 1.0]}'}})
    [0.5, 1.0]
    """
    rewards = _turn_rewards(row)
    return None if rewards is None else [rewards[t] for t in row["turn_rounds"]]


def team_metrics(rows) -> dict[str, float]:
    """Actions, rewards and what went wrong, over the rows of a step.

    >>> team = {"agent": 0, "rounds": [{"actions": ["refine"]}], "tokens": {"act": 3}}
    >>> scored = {"turn_rewards": '{"agent_0": [1.0]}', "acc": 1.0}
    >>> names = ["malformed_profiles", "malformed_verdicts", "overlong", "no_token", "cached_tokens"]
    >>> counts = dict.fromkeys(names, 0)
    >>> row = {"mpdf": team, "reward_extra_info": scored, "turn_spans": [(0, 3)], "invalid_actions": 1}
    >>> row["role"] = "agent_0"
    >>> row |= counts | {"prompt_tokens": 10}
    >>> metrics = team_metrics([row])
    >>> metrics["mpdf/action/refine"], metrics["mpdf/reward/mean"], metrics["mpdf/invalid_actions"]
    (1.0, 1.0, 1)
    """
    rows = list(rows)
    firsts = [row for row in rows if row["mpdf"]["agent"] == 0]  # what concerns the whole team is on every row
    if not firsts:
        return {}
    metrics: dict[str, float] = {}
    for t in range(len(firsts[0]["mpdf"]["rounds"])):
        mix = Counter(action for row in firsts for action in row["mpdf"]["rounds"][t]["actions"])
        metrics |= {f"mpdf/round_{t + 1}/action/{action}": mix[action] / mix.total() for action in ACTIONS}
    mix = Counter(action for row in firsts for now in row["mpdf"]["rounds"] for action in now["actions"])
    metrics |= {f"mpdf/action/{action}": mix[action] / mix.total() for action in ACTIONS}
    metrics["mpdf/invalid_actions"] = sum(row["invalid_actions"] for row in rows)
    metrics["mpdf/turns/mean"] = float(np.mean([len(row["turn_spans"]) for row in rows]))
    for kind in rows[0]["mpdf"]["tokens"]:
        metrics[f"mpdf/tokens/{kind}"] = sum(row["mpdf"]["tokens"][kind] for row in rows)
    if rewards := [sum(r) for row in rows if (r := _turn_rewards(row)) is not None]:
        metrics["mpdf/reward/mean"] = float(np.mean(rewards))
    for name in ("malformed_profiles", "malformed_verdicts", "overlong", "no_token"):
        metrics[f"mpdf/{name}"] = sum(row[name] for row in firsts)
    metrics["reward/acc/mean"] = float(np.mean([row["reward_extra_info"].get("acc", 0.0) for row in firsts]))
    prompt_tokens = sum(row["prompt_tokens"] for row in firsts)
    metrics["rollout/cache_hit_rate"] = sum(row["cached_tokens"] for row in firsts) / max(prompt_tokens, 1)
    return metrics
