"""The formulas of this folder under their names in verl's registries, and ``turn_clip``'s options as a verl config.

The one module here that imports verl. :mod:`rema_verl.plugin` imports it as soon as verl has its registry.
"""

from dataclasses import dataclass

from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss
from verl.workers.config import PolicyLossConfig

from rema_verl.algorithms.advantages import compute_role_grpo_advantage, compute_turn_reinforce_plus_plus_advantage
from rema_verl.algorithms.softrankpo import compute_softrankpo_advantage
from rema_verl.algorithms.turn_clip import TurnClipOptions, compute_policy_loss_turn_clip, install_turn_counter

# algorithm.adv_estimator
register_adv_est("role_grpo")(compute_role_grpo_advantage)
register_adv_est("turn_reinforce_plus_plus")(compute_turn_reinforce_plus_plus_advantage)
register_adv_est("softrankpo")(compute_softrankpo_advantage)

# actor_rollout_ref.actor.policy_loss.loss_mode
register_policy_loss("turn_clip")(compute_policy_loss_turn_clip)


@dataclass
class TurnClipLossConfig(TurnClipOptions, PolicyLossConfig):
    """Options of ``turn_clip`` as verl's dataclass, which the actor's config asks for.

    Chosen with ``actor_rollout_ref.actor.policy_loss._target_=rema_verl.algorithms.turn_clip.TurnClipLossConfig``: the
    name that configurations know it by. With ``loss_mode=turn_clip`` alone, verl builds its plain ``PolicyLossConfig``
    and the defaults apply.

    Args:
        turn_ratio, turn_agg, turn_scale, log_ratio_cap: see :class:`rema_verl.algorithms.turn_clip.TurnClipOptions`.

    Raises:
        ValueError: an unknown value, or a scale or cap that is not positive.
    """

    loss_mode: str = "turn_clip"

    def __post_init__(self):
        super().__post_init__()
        if self.turn_agg == "turn":
            # The workers build their config before they train, so this is in time, and only where it is needed.
            install_turn_counter()
