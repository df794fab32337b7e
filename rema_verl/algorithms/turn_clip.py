"""Policy loss ``turn_clip``: PPO clipping with one importance ratio per turn (ReMA, arXiv 2503.09501, Eq. 13-14).

Shapes: B rows, L response tokens, T turns of one row, N turns of all rows together. Log-probs are natural logarithms.

One turn is one action, so it gets one ratio, one clip decision and one weight however long it is:

    geometric   r = exp(mean over the turn's tokens of the log-ratio)   camera-ready Eq. 14 and the authors' code
    arithmetic  r = mean over the turn's tokens of the token ratio      preprint Eq. 13
    token       one r a token, clipped by itself: the control, with the same weights of turns and tokens

    turn loss = mean over the turn's tokens of  -min(r A, clip(r, 1 - low, 1 + high) A),  at most -clip_c A where A < 0

How the turn losses of a global batch (all micro-batches, all data-parallel ranks) become one number:

    trajectory  mean over a row's turns, then over rows               the paper's objective, with its 1/T
    turn        mean over all turns of the global batch               every turn counts the same
    sum         a row's turns summed / turn_scale, then mean over rows   no 1/T (Dr. MAMR, arXiv 2511.02303)

"Mean over rows" divides by verl's ``global_batch_size``, as verl's own ``seq-mean-*`` modes do: rows without a valid
token, verl's padding rows among them, add nothing but are counted in it. Without global batch information (a loss
called by hand) it is the number of rows that have a turn, again as in verl.

The number of turns of the global batch, which ``turn`` needs, is not among the things verl tells a loss, and no
function of one micro-batch can know it. See :func:`count_turns_of_train_batch` for where it comes from.
"""

import functools
import math
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch

from rema_verl.algorithms.turns import Turns, check_mask, count_turns, find_turns, sum_per_turn

if TYPE_CHECKING:
    from verl.workers.config import ActorConfig

    from rema_verl.algorithms.register import TurnClipLossConfig as TurnClipLossConfig
else:

    def __getattr__(name: str) -> Any:
        """``TurnClipLossConfig`` is a class of verl's, so it lives in :mod:`.register`; configurations name it here."""
        if name == "TurnClipLossConfig":
            from rema_verl.algorithms.register import TurnClipLossConfig

            return TurnClipLossConfig
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


TURN_RATIOS = ("geometric", "arithmetic", "token")
TURN_AGGS = ("trajectory", "turn", "sum")

# verl's own bound on log-ratios (``vanilla``). It keeps exp finite whatever the options, log_ratio_cap=null included.
MAX_LOG_RATIO = 20.0

_turns_in_global_batch: ContextVar[int | None] = ContextVar("turns_in_global_batch", default=None)


@dataclass
class TurnClipOptions:
    """Options of ``turn_clip``. Under verl they come as :class:`TurnClipLossConfig`, which has them and verl's own.

    Args:
        turn_ratio: "geometric", "arithmetic" or "token", see the module's head.
        turn_agg: "trajectory", "turn" or "sum", see the module's head.
        turn_scale: in turns; what "sum" divides by. A constant such as the turn limit keeps the loss near the scale
            of "trajectory".
        log_ratio_cap: natural log; upper clamp on a turn's mean log-ratio before exp (for "arithmetic": on the log of
            the mean ratio; for "token": on each token's). ``None`` turns it off. What is capped gets no gradient.

    Raises:
        ValueError: an unknown value, or a scale or cap that is not positive.
    """

    turn_ratio: str = "geometric"
    turn_agg: str = "trajectory"
    turn_scale: float = 1.0
    log_ratio_cap: float | None = 3.0

    def __post_init__(self):
        for name, allowed in (("turn_ratio", TURN_RATIOS), ("turn_agg", TURN_AGGS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"policy_loss.{name} must be one of {list(allowed)}, got {getattr(self, name)!r}")
        if not self.turn_scale > 0:
            raise ValueError(f"policy_loss.turn_scale must be a positive number of turns, got {self.turn_scale!r}")
        if self.log_ratio_cap is not None and not self.log_ratio_cap > 0:
            raise ValueError(f"policy_loss.log_ratio_cap must be positive, or null for off, got {self.log_ratio_cap!r}")


@contextmanager
def turns_in_global_batch(num_turns: int):
    """While it is open, ``turn_agg=turn`` divides by ``num_turns`` (all micro-batches, all data-parallel ranks)."""
    token = _turns_in_global_batch.set(num_turns)
    try:
        yield
    finally:
        _turns_in_global_batch.reset(token)


def count_turns_of_train_batch(train_batch):
    """Wrap ``BaseEngine.train_batch``: count the mini-batch's turns, over all data-parallel ranks, before it is split.

    verl's engines count ``batch_num_tokens`` in exactly this way and place, but hand a loss nothing else. The wrapper
    sits one level above the engines' own code, which all of them share, and costs one scalar all-reduce a mini-batch.
    """

    @functools.wraps(train_batch)
    def counting(self, data, loss_function):
        if "response_mask" not in data:  # another model's batch, say a supervised one
            return train_batch(self, data, loss_function)
        from verl.utils.device import get_device_id

        num_turns = torch.tensor(count_turns(data["response_mask"])).to(get_device_id())
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(num_turns, group=self.get_data_parallel_group())
        with turns_in_global_batch(int(num_turns)):
            return train_batch(self, data, loss_function)

    counting.counts_turns = True  # type: ignore[attr-defined]
    return counting


def install_turn_counter() -> None:
    """patches/batch_num_turns.diff: put :func:`count_turns_of_train_batch` around every verl engine's training step.

    Once per process.
    """
    from verl.workers.engine.base import BaseEngine

    if not hasattr(BaseEngine.train_batch, "counts_turns"):
        BaseEngine.train_batch = count_turns_of_train_batch(BaseEngine.train_batch)


def turn_ratios(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    turns: Turns,
    turn_ratio: str = "geometric",
    log_ratio_cap: float | None = 3.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each turn's importance ratio, capped at exp(cap), its mean log-ratio, and whether the cap held it; all (N,).

    Args:
        log_prob, old_log_prob: (B, L), nats; masked positions may hold anything.
        turns: of the response mask.
        turn_ratio, log_ratio_cap: see :class:`TurnClipOptions`.

    Example, one turn of two tokens whose ratios are 1 and 4: the geometric ratio is 2, the arithmetic 2.5::

        >>> new, old = torch.tensor([[0.25, 1.0, 0.5, 0.5]]).log(), torch.tensor([[0.25, 0.25, 0.5, 0.1]]).log()
        >>> turns = find_turns(torch.tensor([[1, 1, 0, 0]]))
        >>> [round(turn_ratios(new, old, turns, name)[0].item(), 4) for name in ("geometric", "arithmetic")]
        [2.0, 2.5]
    """
    cap = MAX_LOG_RATIO if log_ratio_cap is None else log_ratio_cap
    log_ratio = log_prob - old_log_prob
    mean_log_ratio = sum_per_turn(log_ratio, turns) / turns.length
    if turn_ratio == "geometric":
        return mean_log_ratio.clamp(max=cap).exp(), mean_log_ratio, mean_log_ratio > cap
    # Masked positions are set to 0 before exp: an inf there would turn their zero gradient into NaN.
    bounded = log_ratio.masked_fill(turns.of_token == turns.num, 0.0).clamp(max=MAX_LOG_RATIO)
    ratio = sum_per_turn(bounded.exp(), turns) / turns.length
    return ratio.clamp(max=math.exp(cap)), mean_log_ratio, ratio > math.exp(cap)


def token_ratios(
    log_prob: torch.Tensor, old_log_prob: torch.Tensor, turns: Turns, log_ratio_cap: float | None = 3.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Like :func:`turn_ratios` for ``turn_ratio=token``: (B, L) ratios, (N,) mean log-ratios, (B, L) which are capped.

    Masked tokens have ratio 1.
    """
    cap = MAX_LOG_RATIO if log_ratio_cap is None else log_ratio_cap
    log_ratio = (log_prob - old_log_prob).masked_fill(turns.of_token == turns.num, 0.0)
    mean_log_ratio = sum_per_turn(log_ratio, turns) / turns.length
    return log_ratio.clamp(min=-MAX_LOG_RATIO, max=cap).exp(), mean_log_ratio, log_ratio > cap


def turn_weight(
    turns: Turns,
    turn_agg: str,
    turn_scale: float = 1.0,
    *,
    dp_size: int = 1,
    global_batch_size: int | None = None,
    num_turns: int | None = None,
) -> torch.Tensor:
    """(N,) float64: what each turn's loss is multiplied by before everything is summed.

    Args:
        turns: of this micro-batch.
        turn_agg: "trajectory", "turn" or "sum".
        turn_scale: in turns, for "sum".
        dp_size: data-parallel ranks. Their gradients are averaged, so each rank's share is multiplied by it.
        global_batch_size: rows of the global batch; ``None``: this batch is all there is.
        num_turns: turns of the global batch, for "turn"; ``None``: this batch is all there is.

    Raises:
        ValueError: several ranks, yet no global count.

    Example, rows of two turns and of one: the second row's only turn weighs as much as the first row's two::

        >>> turns = find_turns(torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]))
        >>> turn_weight(turns, "trajectory").tolist()
        [0.25, 0.25, 0.5]
        >>> turn_weight(turns, "turn", num_turns=4).tolist(), turn_weight(turns, "sum", turn_scale=5.0).tolist()
        ([0.25, 0.25, 0.25], [0.1, 0.1, 0.1])
    """
    weight = torch.full_like(turns.length, dp_size, dtype=torch.float64)
    if turn_agg == "turn":
        if num_turns is None and dp_size > 1:
            raise ValueError("turn_agg=turn with dp_size > 1 needs the number of turns of the global batch")
        return weight / (turns.num if num_turns is None else num_turns)
    if global_batch_size is None:
        if dp_size > 1:
            raise ValueError(f"turn_agg={turn_agg} with dp_size > 1 needs global_batch_size")
        global_batch_size = int((turns.per_row > 0).sum())
    weight = weight / global_batch_size
    return weight / turns.per_row[turns.row] if turn_agg == "trajectory" else weight / turn_scale


def _options(policy_loss: Any) -> TurnClipOptions:
    if isinstance(policy_loss, TurnClipOptions):
        return policy_loss
    if policy_loss is None or is_dataclass(policy_loss):  # verl's plain PolicyLossConfig has none of them
        return TurnClipOptions()
    own = [option.name for option in fields(TurnClipOptions)]
    return TurnClipOptions(**{name: policy_loss[name] for name in own if name in policy_loss})


def _num_global_turns(global_batch_info: dict[str, Any], response_mask: torch.Tensor) -> int | None:
    """Turns of the global batch, or ``None`` if this batch is all of it."""
    counted = _turns_in_global_batch.get()
    batch_num_tokens = global_batch_info.get("batch_num_tokens")
    if counted is not None or batch_num_tokens is None:
        return counted
    if global_batch_info.get("dp_size", 1) == 1 and int(response_mask.sum()) == batch_num_tokens:
        return None
    raise ValueError(
        "turn_agg=turn needs the number of turns of the global batch, and this micro-batch is only a part of it: "
        "train through verl's BaseEngine.train_batch, where TurnClipLossConfig counts them, or call the loss inside "
        "`with turns_in_global_batch(num_turns):`"
    )


def compute_policy_loss_turn_clip(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: "ActorConfig | None" = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """verl's policy-loss signature; see the module's head for the formula.

    The result, and its gradient, summed over micro-batches and averaged over data-parallel ranks, does not depend on
    how the global batch was split. A batch without any valid token gives 0, with a (zero) gradient.

    Args:
        old_log_prob, log_prob: (B, L), nats, under the policy that sampled and the one being trained. bf16 and fp16
            are computed in float32.
        advantages: (B, L). They need not be constant inside a turn: the mean is taken after the clipping.
        response_mask: (B, L), 1 for sampled tokens; its runs of 1s are the turns.
        loss_agg_mode: not used here. verl also aggregates the entropy and KL terms with it, so turns are aggregated by
            ``policy_loss.turn_agg`` instead.
        config: the actor's. Read: ``clip_ratio_low/high`` (``clip_ratio`` where they are null), ``clip_ratio_c``,
            ``policy_loss``, ``global_batch_info``.
        rollout_is_weights: (B, L), non-negative; multiplies the loss token by token.

    Returns:
        The loss, a scalar, and metrics in which every turn of the micro-batch counts once (verl then averages
        micro-batches): ``actor/pg_clipfrac``, ``actor/pg_clipfrac_lower`` (dual clip), ``actor/ppo_kl`` (mean of the
        turns' mean -log-ratios), ``actor/log_ratio_clipfrac`` (turns at the cap), ``actor/turn_ratio_{mean,min,max}``.

    Raises:
        ValueError: mismatched shapes, ``clip_ratio_c`` not above 1, or no way to know the global batch's turns.

    Example: the ratios 1 and 4 of a two-token turn make the turn's ratio 2, which is clipped to 1.2 where A > 0; the
    one-token turn has ratio 1 and A = -1; their mean is (-1.2 + 1) / 2::

        >>> from verl.workers.config import ActorConfig
        >>> config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
        >>> old, new = torch.tensor([[0.25, 0.25, 0.9, 0.5]]).log(), torch.tensor([[0.25, 1.0, 0.1, 0.5]]).log()
        >>> advantages, mask = torch.tensor([[1.0, 1.0, 0.0, -1.0]]), torch.tensor([[1, 1, 0, 1]])
        >>> loss, metrics = compute_policy_loss_turn_clip(old, new, advantages, mask, config=config)
        >>> round(loss.item(), 6), metrics["actor/pg_clipfrac"]
        (-0.1, 0.5)
    """
    if config is None:
        raise ValueError("turn_clip needs the actor's config, got None")
    for name, tensor in (
        ("old_log_prob", old_log_prob),
        ("log_prob", log_prob),
        ("advantages", advantages),
        ("rollout_is_weights", rollout_is_weights),
    ):
        if tensor is not None and tensor.shape != response_mask.shape:
            raise ValueError(
                f"{name} must have the response mask's shape {tuple(response_mask.shape)}, got {tuple(tensor.shape)}"
            )
    clip_low = config.clip_ratio_low if config.clip_ratio_low is not None else config.clip_ratio
    clip_high = config.clip_ratio_high if config.clip_ratio_high is not None else config.clip_ratio
    clip_c = config.get("clip_ratio_c", 3.0)
    if not clip_c > 1.0:
        raise ValueError(f"actor.clip_ratio_c, the dual clip's bound on the ratio, must be above 1, got {clip_c}")
    options = _options(config.get("policy_loss"))
    batch_info = config.get("global_batch_info", None) or {}

    dtype = torch.promote_types(log_prob.dtype, torch.float32)
    turns = find_turns(response_mask)
    log_probs = log_prob.to(dtype), old_log_prob.to(dtype)
    by_token = options.turn_ratio == "token"
    if by_token:
        ratio, mean_log_ratio, capped = token_ratios(*log_probs, turns, options.log_ratio_cap)
    else:
        ratio, mean_log_ratio, capped = turn_ratios(*log_probs, turns, options.turn_ratio, options.log_ratio_cap)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return sum_per_turn(values.to(dtype), turns) / turns.length

    # A ratio is positive, so where A > 0 the clipped objective is A min(r, 1 + high), where A < 0 it is
    # A max(r, 1 - low). With one ratio a turn, the mean over tokens needs only the mean of A's positive and negative
    # parts.
    with torch.no_grad():
        weighted = advantages.to(dtype)
        if rollout_is_weights is not None:
            weighted = weighted * rollout_is_weights
        gain, pain = weighted.clamp(min=0.0), weighted.clamp(max=0.0)
        if not by_token:
            gain, pain = mean(gain), mean(pain)
    loss = -gain * ratio.clamp(max=1 + clip_high) - pain * ratio.clamp(min=1 - clip_low).clamp(max=clip_c)
    turn_loss = mean(loss) if by_token else loss

    weight = turn_weight(
        turns,
        options.turn_agg,
        options.turn_scale,
        dp_size=batch_info.get("dp_size", 1),
        global_batch_size=batch_info.get("global_batch_size"),
        num_turns=_num_global_turns(batch_info, check_mask(response_mask)) if options.turn_agg == "turn" else None,
    )
    total = (turn_loss * weight.to(dtype)).sum()
    metrics = {
        "actor/pg_clipfrac": ((gain > 0) & (ratio > 1 + clip_high)) | ((pain < 0) & (ratio < 1 - clip_low)),
        "actor/pg_clipfrac_lower": (pain < 0) & (ratio > clip_c),
        "actor/ppo_kl": -mean_log_ratio,
        "actor/log_ratio_clipfrac": capped,
        "actor/turn_ratio_mean": ratio,
    }
    if by_token:  # a turn counts by the share of its tokens
        metrics = {name: mean(values) if values.dim() == 2 else values for name, values in metrics.items()}
        ratio = ratio.flatten()[turns.tokens]
    return total, _reduce(metrics, ratio)


@torch.no_grad()
def _reduce(per_turn: dict[str, torch.Tensor], ratio: torch.Tensor) -> dict[str, float]:
    """The mean of each (N,) metric and the extreme ratios, in one transfer to the host."""
    names = [*per_turn, "actor/turn_ratio_min", "actor/turn_ratio_max"]
    if not ratio.numel():  # a micro-batch of padding rows: nothing was clipped, no ratio moved
        return {name: float("turn_ratio" in name) for name in names}
    means = torch.stack([values.to(ratio.dtype) for values in per_turn.values()]).mean(dim=1)
    return dict(zip(names, torch.cat([means, torch.stack(ratio.aminmax())]).tolist(), strict=True))
