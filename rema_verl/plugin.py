"""The table of contents: every name rema-verl adds to verl, and the module that implements it.

verl loads this module through the entry point group ``verl.plugins`` at the end of ``verl/__init__.py``, in every
process (driver, Ray actors, vLLM workers). It therefore imports nothing heavy: each line of ``CONTENTS`` waits until
verl itself imports the registry it belongs to, and only then imports our module, whose decorator registers the name.
The algorithms' files are free of verl, so one module beside them registers all their names (``REGISTERED_BY``).

verl swallows a plug-in's exception at DEBUG level. A run without its plug-in is a wrong run, so every failure here is
printed to stderr and ends the process with exit code 2 (``SystemExit`` passes verl's ``except Exception``).
"""

import importlib
import os
from importlib import metadata

from rema_verl.errors import die

TESTED_VERL = ("0.9.1",)
ALLOW_UNTESTED = "REMA_VERL_ALLOW_UNTESTED"

# the module whose import triggers ours (verl's registry, mostly) -> what we register there
CONTENTS: dict[str, dict[str, str]] = {
    # actor_rollout_ref.rollout.agent.default_agent_loop
    "verl.experimental.agent_loop.agent_loop": {
        "rema": "rema_verl.agent_loops.rema",
        "mpdf": "rema_verl.agent_loops.mpdf",
    },
    # actor_rollout_ref.actor.policy_loss.loss_mode and algorithm.adv_estimator; see REGISTERED_BY
    "verl.trainer.ppo.core_algos": {
        "turn_clip": "rema_verl.algorithms.turn_clip",
        "softrankpo": "rema_verl.algorithms.softrankpo",
        "role_grpo": "rema_verl.algorithms.advantages",
        "turn_reinforce_plus_plus": "rema_verl.algorithms.advantages",
    },
    # reward.reward_manager.name
    "verl.experimental.reward_loop.reward_manager.registry": {
        "rema": "rema_verl.rewards.rema",
        "mpdf": "rema_verl.rewards.mpdf",
    },
    # trainer.v1.trainer_mode
    "verl.trainer.ppo.v1.trainer_base": {
        "rema": "rema_verl.trainers.rema",
        "rema_separate": "rema_verl.trainers.separate",
        "mpdf": "rema_verl.trainers.mpdf",
    },
    # --config-name, and config groups such as +device=cpu
    "hydra.main": {
        "rema_trainer": "rema_verl.config.searchpath",
        "mpdf_trainer": "rema_verl.config.searchpath",
    },
    # VERL_PLATFORM (at once: verl picks its platform early)
    "verl.plugin.platform": {
        "cpu": "rema_verl.platforms.cpu",
    },
    # actor_rollout_ref.rollout.checkpoint_engine.backend, for trainer mode separate_async without an accelerator
    "verl.checkpoint_engine.base": {
        "gloo": "rema_verl.platforms.gloo_sync",
    },
    # actor_rollout_ref.rollout.name=vllm, on platform cpu only (vllm_cpu.register looks)
    "verl.workers.rollout.replica": {
        "vllm": "rema_verl.platforms.vllm_cpu",
    },
}

# a registry whose names are put there by one module, not by those that implement them -> that module
REGISTERED_BY: dict[str, str] = {"verl.trainer.ppo.core_algos": "rema_verl.algorithms.register"}


def _check_verl_version() -> None:
    found = metadata.version("verl")
    if found not in TESTED_VERL and os.environ.get(ALLOW_UNTESTED) != "1":
        die(
            f"verl {found} is not a tested version (works with: {', '.join(TESTED_VERL)}); "
            f"install one of those, or set {ALLOW_UNTESTED}=1 to go on at your own risk"
        )


def _import_loudly(module: str) -> None:
    try:
        importlib.import_module(module)
    except Exception as e:
        die(f"could not load {module}: {type(e).__name__}: {e}")


def _importer(module: str):
    return lambda _: _import_loudly(module)


def register() -> None:
    """Register every name in ``CONTENTS`` and apply the shims of :mod:`rema_verl.compat`."""
    import wrapt

    from rema_verl import compat

    _check_verl_version()
    for registry, names in CONTENTS.items():
        modules = [REGISTERED_BY[registry]] if registry in REGISTERED_BY else dict.fromkeys(names.values())
        for module in modules:
            wrapt.register_post_import_hook(_importer(module), registry)
    compat.apply()


try:
    register()
except Exception as e:
    die(f"plug-in failed to load: {type(e).__name__}: {e}")
