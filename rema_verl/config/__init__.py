"""Typed configuration of rema-verl: the top-level block ``rema`` beside verl's own blocks."""

from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rema_verl.dialogue import ROLES, Prompts


@dataclass(frozen=True)
class ReMAConfig:
    """The block ``rema``. Token limits are verl's own keys and are not repeated here:

    - ``data.max_response_length``: longest message, in tokens (the paper's tokens per turn);
    - ``data.max_prompt_length``: longest context a role may be asked to continue, in tokens.
    """

    roles: dict[str, dict] = field(default_factory=lambda: {role: {} for role in ROLES})
    """The two roles. Both are played by ``actor_rollout_ref.model``; there are no options per role yet."""

    max_turns: int = 30
    """Turns (one message of each role) per dialogue; 1 is the paper's single-turn setting."""

    finish_flag: str = "[FINISH]"
    """What meta_thinking writes to have reasoning give the final answer."""

    prompts: dict[str, str | None] = field(default_factory=dict)
    """Overrides of ``dialogue.Prompts``, by field name; None keeps the default."""

    mask_unfinished: bool = True
    """Reward 0 unless the dialogue finished; False rewards any correct last answer of reasoning."""

    grading_timeout: float = 5.0
    """Seconds one answer may take to grade before its worker is killed."""

    poll_interval: float = 0.1
    """Seconds between two looks into the replay buffer (verl: 2.0)."""

    watchdog_interval: float = 5.0
    """Seconds between two checks that every worker and engine is alive; 0 switches the watchdog off."""

    def __post_init__(self) -> None:
        for key in ("roles", "prompts"):
            if not isinstance(getattr(self, key), dict):
                raise ValueError(f"rema.{key} must be a mapping, got {getattr(self, key)!r}")
        if not isinstance(self.max_turns, int):
            raise ValueError(f"rema.max_turns must be a whole number, got {self.max_turns!r}")
        for key in ("grading_timeout", "poll_interval", "watchdog_interval"):
            if not isinstance(getattr(self, key), int | float):
                raise ValueError(f"rema.{key} must be a number of seconds, got {getattr(self, key)!r}")
        if set(self.roles) != set(ROLES):
            raise ValueError(f"rema.roles must be exactly {' and '.join(ROLES)}, got {', '.join(self.roles) or 'none'}")
        for role, options in self.roles.items():
            if options:
                raise ValueError(f"rema.roles.{role}.{next(iter(options))} is not an option")
        if unknown := set(self.prompts) - {f.name for f in fields(Prompts)}:
            raise ValueError(f"rema.prompts.{unknown.pop()} is not an option")
        if self.max_turns < 1:
            raise ValueError(f"rema.max_turns must be at least 1, got {self.max_turns}")
        if len(self.finish_flag.strip()) < 2:
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
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(block) - known):
            raise ValueError(f"rema.{unknown[0]} is not an option; known: {', '.join(sorted(known))}")
        return cls(**block)
