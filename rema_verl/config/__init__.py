"""Typed configuration of rema-verl: the top-level block ``rema`` beside verl's own blocks."""

import copy
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rema_verl.dialogue import ROLES, Prompts


@dataclass(frozen=True)
class RoleConfig:
    """``rema.roles.<role>``.

    In trainer mode ``rema_separate`` each role has a model of its own. Elsewhere both are played by
    ``actor_rollout_ref.model``, and only the sampling can differ, for generation alone (evaluation, the difficulty
    filter): one model's log-probabilities are computed at one temperature.
    """

    temperature: float | None = None
    """Where it differs from ``actor_rollout_ref.rollout``; a greedy validation stays greedy."""

    top_p: float | None = None
    top_k: int | None = None

    model_path: str | None = None
    """This role's model; None: ``actor_rollout_ref.model.path``."""

    trainable: bool = True
    """False: a served checkpoint without trainer and optimiser."""

    n_gpus_per_node: int | None = None
    """GPUs of this role's own, beside ``trainer.n_gpus_per_node`` for the other; None: both models share those."""

    overrides: dict[str, Any] = field(default_factory=dict)
    """Laid over ``actor_rollout_ref`` for this role, with verl's own keys: learning rate, micro-batch, LoRA, ..."""

    def __post_init__(self) -> None:
        for key in ("temperature", "top_p", "top_k"):
            if (value := getattr(self, key)) is not None and not is_number(value):
                raise ValueError(f"rema.roles.<role>.{key} must be a number, got {value!r}")
        gpus = self.n_gpus_per_node
        if gpus is not None and (isinstance(gpus, bool) or not isinstance(gpus, int) or gpus < 1):
            raise ValueError(f"rema.roles.<role>.n_gpus_per_node must be at least 1, got {gpus!r}")
        if not isinstance(self.trainable, bool):
            raise ValueError(f"rema.roles.<role>.trainable must be true or false, got {self.trainable!r}")
        if not isinstance(self.overrides, dict):
            raise ValueError(f"rema.roles.<role>.overrides must be a mapping, got {self.overrides!r}")

    def sampling(self) -> dict[str, float]:
        """The sampling parameters that are set."""
        return {k: v for k in ("temperature", "top_p", "top_k") if (v := getattr(self, k)) is not None}


SWITCH_LEVELS = ("step", "epoch", "none")


@dataclass(frozen=True)
class SwitchConfig:
    """``rema.switch``: which role learns when, in trainer mode ``rema_separate``.

    >>> switch = SwitchConfig(level="step", freq=2, start="reasoning")
    >>> [switch.learning(step, steps_per_epoch=100)[0] for step in (1, 2, 3, 4, 5)]
    ['reasoning', 'reasoning', 'meta_thinking', 'meta_thinking', 'reasoning']
    """

    level: str = "step"
    """step or epoch: the unit of ``freq``; none: both roles learn in every step."""

    freq: int = 10
    """Steps or epochs before the other role's turn (the paper's multi-turn ablation: 10 steps)."""

    start: str | None = None
    """The role that learns first; needed when both are trainable and take turns."""

    def __post_init__(self) -> None:
        if self.level not in SWITCH_LEVELS:
            raise ValueError(f"rema.switch.level must be one of {', '.join(SWITCH_LEVELS)}, got {self.level!r}")
        if isinstance(self.freq, bool) or not isinstance(self.freq, int) or self.freq < 1:
            raise ValueError(f"rema.switch.freq must be a whole number of at least 1, got {self.freq!r}")
        if self.start is not None and self.start not in ROLES:
            raise ValueError(f"rema.switch.start must be one of {', '.join(ROLES)}, got {self.start!r}")

    def phase(self, step: int, steps_per_epoch: int) -> int:
        """How many times the turn has passed before ``step`` (counted from 1)."""
        if self.level == "none":
            return 0
        return (step - 1) // (steps_per_epoch if self.level == "epoch" else 1) // self.freq

    def learning(self, step: int, steps_per_epoch: int, trainable: tuple[str, ...] = ROLES) -> tuple[str, ...]:
        """The roles that learn in ``step``. With one trainable role there is nothing to take turns with."""
        if len(trainable) == 1 or self.level == "none":
            return trainable
        return (ROLES[(ROLES.index(self.start) + self.phase(step, steps_per_epoch)) % 2],)


@dataclass(frozen=True)
class RewardConfig:
    """``rema.reward``: what each role is paid for. The numbers are the paper's (ReMA, App. on rewards)."""

    reasoning: str = "final"
    """final: 1 if the last answer is correct, else 0; graded: ``correct``, ``wrong`` or ``no_answer``."""

    meta_thinking: str = "final"
    """final: as reasoning; correctness: mean over the plan's answers; consistency: share of the most frequent answer.
    The last two replace the reward by ``leak`` when the plan contains an answer."""

    correct: float = 1.0
    wrong: float = -0.5
    no_answer: float = -1.0
    leak: float = -1.0

    turn_bonus: float = 0.0
    """Shared out evenly over a role's turns, so that more turns bring no more; a turn that mostly repeats what the role
    said before gets none."""

    def __post_init__(self) -> None:
        for key, known in (("reasoning", REASONING_REWARDS), ("meta_thinking", META_THINKING_REWARDS)):
            if getattr(self, key) not in known:
                raise ValueError(f"rema.reward.{key} must be one of {', '.join(known)}, got {getattr(self, key)!r}")
        for key in ("correct", "wrong", "no_answer", "leak", "turn_bonus"):
            if not is_number(getattr(self, key)):
                raise ValueError(f"rema.reward.{key} must be a number, got {getattr(self, key)!r}")


@dataclass(frozen=True)
class TrajectoriesConfig:
    """``rema.trajectories``: which training dialogues are kept on disk (schema: rema_verl/report/trajectories.py)."""

    folder: str | None = None
    """Where; None: nowhere. One JSON-lines file per step."""

    per_step: int = 32
    """Trajectories of a step: the best, worst, longest and longest cut off, and a sample."""

    max_mib: float = 512.0
    """MiB that all files together may take; a step that does not fit pushes out the oldest."""

    def __post_init__(self) -> None:
        if isinstance(self.per_step, bool) or not isinstance(self.per_step, int) or self.per_step < 1:
            raise ValueError(f"rema.trajectories.per_step must be a whole number of at least 1, got {self.per_step!r}")
        if not is_number(self.max_mib) or not self.max_mib > 0:
            raise ValueError(f"rema.trajectories.max_mib must be a positive number, got {self.max_mib!r}")
        if self.folder is not None and not (isinstance(self.folder, str) and self.folder.strip()):
            raise ValueError(f"rema.trajectories.folder must be a path or null, got {self.folder!r}")


REASONING_REWARDS = ("final", "graded")
META_THINKING_REWARDS = ("final", "correctness", "consistency")
TASKS = ("math", "judge")
PLANS = ("text", "json")


@dataclass(frozen=True)
class ReMAConfig:
    """The block ``rema``. Token limits are verl's own keys and are not repeated here:

    - ``data.max_response_length``: longest message, in tokens (the paper's tokens per turn);
    - ``data.max_prompt_length``: longest context a role may be asked to continue, in tokens.
    """

    roles: dict[str, RoleConfig] = field(default_factory=lambda: {role: RoleConfig() for role in ROLES})
    """Options of each role (:class:`RoleConfig`)."""

    switch: SwitchConfig = field(default_factory=SwitchConfig)
    """Which role learns when, with a model per role (:class:`SwitchConfig`)."""

    max_turns: int = 30
    """Turns (one message of each role) per dialogue; 1 is the paper's single-turn setting."""

    finish_flag: str = "[FINISH]"
    """What meta_thinking writes to have reasoning give the final answer."""

    task: str = "math"
    """math, or judge (which of two answers is better; single-turn): chooses the default prompts."""

    plan: str = "text"
    """text, or json: meta_thinking's message is one of the actions DECOMPOSE, REWRITE, EMPTY (single-turn), to which
    vLLM's structured outputs hold it."""

    answers_per_plan: int = 1
    """Answers sampled for each plan to reward the plan with (single-turn); the first one is trained."""

    prompts: dict[str, str | None] = field(default_factory=dict)
    """Overrides of ``dialogue.Prompts``, by field name; None keeps the default."""

    reward: RewardConfig = field(default_factory=RewardConfig)
    """What each role is paid for."""

    mask_unfinished: bool = True
    """Reward "final" is 0 unless the dialogue finished; False rewards any correct last answer of reasoning."""

    grading_timeout: float = 5.0
    """Seconds one answer may take to grade before its worker is killed."""

    seed: int | None = None
    """Seeds every call of a training step by its place in the run (step, question, trajectory, role, turn), and trains
    rows in that order, so that a run repeats itself, also after a resume. vLLM then draws row by row, which costs time
    on large batches. None: seeded by ``rollout.seed`` only, so what is drawn depends on how calls are batched."""

    journal: str | None = None
    """Folder to which every scored trajectory is appended at once, as JSON lines; None: no journal."""

    trajectories: TrajectoriesConfig = field(default_factory=TrajectoriesConfig)
    """Training dialogues kept on disk (:class:`TrajectoriesConfig`)."""

    poll_interval: float = 0.1
    """Seconds between two looks into the replay buffer (verl: 2.0)."""

    watchdog_interval: float = 5.0
    """Seconds between two checks that every worker and engine is alive; 0 switches the watchdog off."""

    def __post_init__(self) -> None:
        for key in ("max_turns", "answers_per_plan"):
            if isinstance(value := getattr(self, key), bool) or not isinstance(value, int):
                raise ValueError(f"rema.{key} must be a whole number, got {value!r}")
            if value < 1:
                raise ValueError(f"rema.{key} must be at least 1, got {value}")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise ValueError(f"rema.seed must be a whole number, got {self.seed!r}")
        for key in ("grading_timeout", "poll_interval", "watchdog_interval"):
            if not is_number(value := getattr(self, key)):
                raise ValueError(f"rema.{key} must be a number of seconds, got {value!r}")
        for key, known in (("task", TASKS), ("plan", PLANS)):
            if getattr(self, key) not in known:
                raise ValueError(f"rema.{key} must be one of {', '.join(known)}, got {getattr(self, key)!r}")
        if set(self.roles) != set(ROLES):
            raise ValueError(f"rema.roles must be exactly {' and '.join(ROLES)}, got {', '.join(self.roles) or 'none'}")
        if unknown := set(self.prompts) - {f.name for f in fields(Prompts)}:
            raise ValueError(f"rema.prompts.{unknown.pop()} is not an option")
        if self.max_turns > 1:
            for key, only in (("task", "math"), ("plan", "text"), ("answers_per_plan", 1)):
                if getattr(self, key) != only:
                    raise ValueError(f"rema.{key}={getattr(self, key)} needs rema.max_turns=1, got {self.max_turns}")
            for role in ROLES:
                if getattr(self.reward, role) != "final":
                    raise ValueError(
                        f"rema.reward.{role}={getattr(self.reward, role)} needs rema.max_turns=1, got {self.max_turns}"
                    )
        if self.task == "judge" and self.plan == "json":
            raise ValueError("rema.plan=json is for rema.task=math")
        if not isinstance(self.finish_flag, str) or len(self.finish_flag.strip()) < 2:
            raise ValueError(f"rema.finish_flag must have at least two visible characters, got {self.finish_flag!r}")
        if self.grading_timeout <= 0:
            raise ValueError(f"rema.grading_timeout must be positive, got {self.grading_timeout}")
        if self.poll_interval <= 0:
            raise ValueError(f"rema.poll_interval must be positive, got {self.poll_interval}")
        if self.watchdog_interval < 0:
            raise ValueError(f"rema.watchdog_interval must not be negative, got {self.watchdog_interval}")

    @classmethod
    def of(cls, config: DictConfig) -> "ReMAConfig":
        """Read ``config.rema`` of a whole verl configuration; defaults where it is absent.

        Raises:
            ValueError: for an unknown key or a value out of range, naming the key.
        """
        block: dict[str, Any] = OmegaConf.to_container(config.get("rema") or OmegaConf.create({}), resolve=True)
        for key in ("roles", "prompts", "reward", "switch", "trajectories"):
            if not isinstance(block.get(key, {}), dict):
                raise ValueError(f"rema.{key} must be a mapping, got {block[key]!r}")
        if "reward" in block:
            block["reward"] = typed(RewardConfig, block["reward"], "rema.reward")
        if "trajectories" in block:
            block["trajectories"] = typed(TrajectoriesConfig, block["trajectories"], "rema.trajectories")
        if "switch" in block:
            block["switch"] = typed(SwitchConfig, block["switch"], "rema.switch")
        if "roles" in block:
            block["roles"] = {
                role: typed(RoleConfig, options or {}, f"rema.roles.{role}") for role, options in block["roles"].items()
            }
        return typed(cls, block, "rema")


def role_config(config: DictConfig, role: str) -> DictConfig:
    """A copy of the whole configuration in which ``actor_rollout_ref`` is this role's.

    Raises:
        ValueError: an override that verl does not know, naming the key.
    """
    options = ReMAConfig.of(config).roles[role]
    config = copy.deepcopy(config)
    own = config.actor_rollout_ref
    OmegaConf.set_struct(own, True)
    try:
        own.merge_with(options.overrides)
    except OmegaConfBaseException as e:
        raise ValueError(f"rema.roles.{role}.overrides: {str(e).splitlines()[0]}") from None
    if options.model_path is not None:
        own.model.path = options.model_path
    for key, value in options.sampling().items():
        own.rollout[key] = value
    return config


def typed(cls: type, block: dict[str, Any], where: str):
    """``cls(**block)``; an unknown key is named.

    >>> typed(RoleConfig, {"temperature": 0.5}, "rema.roles.reasoning").sampling()
    {'temperature': 0.5}
    """
    if not isinstance(block, dict):
        raise ValueError(f"{where} must be a mapping, got {block!r}")
    known = sorted(f.name for f in fields(cls))
    if unknown := sorted(set(block) - set(known)):
        raise ValueError(f"{where}.{unknown[0]} is not an option; known: {', '.join(known)}")
    return cls(**block)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
