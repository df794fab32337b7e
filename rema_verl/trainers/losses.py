"""verl's PPO loss, plus the clip fraction of each role.

A policy loss does not see roles. The trainer adds the field ``role_id`` to every row, and this wrapper, which runs in
verl's actor workers, asks the configured policy loss once more per role, without gradients, for its clip fraction.
"""

import torch
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding

from rema_verl.dialogue import ROLES


def role_ppo_loss(config, model_output, data, dp_group=None):
    """Same loss as verl's ``ppo_loss``; two more metrics per role: ``actor/<role>/rows`` and ``actor/<role>/clipped``.

    ``clipped / rows`` is the clip fraction weighted by rows; both are sums over the micro-batches of a mini-batch, so
    that micro-batches without a row of a role do not count.
    """
    loss, metrics = ppo_loss(config, model_output, data, dp_group)
    with torch.no_grad():
        log_prob = no_padding_2_padding(model_output["log_probs"], data).detach()
        fields = ["old_log_probs", "advantages", "response_mask"]
        rows = data.select(*fields).to_padded_tensor()
        mask = rows["response_mask"].to(bool)
        policy_loss = get_policy_loss_fn(config.policy_loss.get("loss_mode", "vanilla"))
        for i, role in enumerate(ROLES):
            mine = (data["role_id"] == i) & mask.any(dim=-1)
            count, clipped = int(mine.sum()), 0.0
            if count:
                _, of_role = policy_loss(
                    old_log_prob=rows["old_log_probs"][mine],
                    log_prob=log_prob[mine],
                    advantages=rows["advantages"][mine],
                    response_mask=mask[mine],
                    loss_agg_mode=config.loss_agg_mode,
                    config=config,
                )
                clipped = count * float(of_role.get("actor/pg_clipfrac", 0.0))
            metrics[f"actor/{role}/rows"] = Metric(AggregationType.SUM, float(count))
            metrics[f"actor/{role}/clipped"] = Metric(AggregationType.SUM, clipped)
    return loss, metrics
