"""verl's PPO loss, plus what the update did to each role and to each turn.

Shapes: B rows of a micro-batch, L response tokens, N turns of all rows together.

A policy loss sees neither roles nor rows. The trainer adds the fields ``role_id`` and ``row`` to every row, and this
wrapper, which runs in verl's actor workers, asks the configured policy loss once more per role, without gradients, for
its clip fraction, and notes every turn's ratio until the trainer collects them with :func:`take_turns`.
"""

import torch
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding

from rema_verl.algorithms.turns import find_turns, sum_per_turn
from rema_verl.dialogue import ROLES

_noted: list[TensorDict] = []  # of this worker, since the last take_turns


def role_ppo_loss(config, model_output, data, dp_group=None):
    """Same loss as verl's ``ppo_loss``; two more metrics per role: ``actor/<role>/rows`` and ``actor/<role>/clipped``.

    ``clipped / rows`` is the clip fraction weighted by rows; both are sums over the micro-batches of a mini-batch, so
    that micro-batches without a row of a role do not count.
    """
    loss, metrics = ppo_loss(config, model_output, data, dp_group)
    with torch.no_grad():
        log_prob = no_padding_2_padding(model_output["log_probs"], data).detach()
        fields = ["old_log_probs", "advantages", "response_mask", "loss_mask"]
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
        _noted.append(turns_of(config, log_prob, **rows, row=data["row"]))
    return loss, metrics


def turns_of(config, log_prob, old_log_probs, advantages, response_mask, row, loss_mask=None) -> TensorDict:
    """What an update sees of every turn; all tensors (B, L) but ``row`` (B,).

    verl's rejection sampling (``algorithm.rollout_correction.rollout_rs``) takes tokens out of ``response_mask`` only.
    Turns are those of ``loss_mask``, which keeps what was sampled; a turn without a token left has no note.

    A turn counts as clipped where its geometric ratio has left the range on the side that its advantage points to, or
    is at the dual clip's bound: what ``turn_clip`` clips, and the turn as a whole under a loss that clips tokens.

    Returns:
        (N,) ``row``, ``turn`` (its number among the row's turns that have a token), ``log_ratio`` (nats, mean over the
        turn's tokens that are left, the policy as it stands against the one that sampled), ``clipped``.
    """
    turns, left = find_turns(response_mask if loss_mask is None else loss_mask), response_mask.bool()
    length = sum_per_turn(left.float(), turns)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return sum_per_turn(values.float().masked_fill(~left, 0.0), turns) / length

    log_ratio, advantage = mean(log_prob.float() - old_log_probs.float()), mean(advantages)
    low, high = (
        config.clip_ratio if bound is None else bound for bound in (config.clip_ratio_low, config.clip_ratio_high)
    )
    ratio = log_ratio.exp()
    too_high = (advantage > 0) & (ratio > 1 + high)
    too_low = (advantage < 0) & (ratio < 1 - low)
    dual = (advantage < 0) & (ratio > config.get("clip_ratio_c", 3.0))
    first = (turns.per_row.cumsum(0) - turns.per_row)[turns.row]
    fields = {
        "row": row.to(turns.row.device)[turns.row],
        "turn": torch.arange(turns.num, device=turns.row.device) - first,
        "log_ratio": log_ratio,
        "clipped": too_high | too_low | dual,
    }
    return TensorDict(fields, batch_size=[turns.num])[length > 0]


def take_turns(worker) -> TensorDict:
    """This worker's notes since the last call, in the order they were made; see :func:`turns_of`.

    The trainer calls it through verl's ``execute_with_func_generator``, which joins what all workers return.
    """
    nothing = TensorDict(
        {
            "row": torch.zeros(0, dtype=torch.int64),
            "turn": torch.zeros(0, dtype=torch.int64),
            "log_ratio": torch.zeros(0),
            "clipped": torch.zeros(0, dtype=torch.bool),
        },
        batch_size=[0],
    )
    taken = torch.cat([nothing, *(turns.cpu() for turns in _noted)])
    _noted.clear()
    return taken
