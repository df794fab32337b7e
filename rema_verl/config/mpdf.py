"""Typed configuration of MPDF deliberation: the top-level block ``mpdf`` beside verl's own blocks."""

from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rema_verl.config import ReMAConfig, is_number, keys, typed
from rema_verl.deliberation.protocol import Prompts

MAX_AGENTS = 16  # every agent reads every other one's answer in every round


@dataclass(frozen=True)
class MPDFConfig:
    """The block ``mpdf``. Sampling and token limits are verl's own keys and are not repeated here:

    - ``data.max_response_length``: longest message, in tokens;
    - ``data.max_prompt_length``: longest context an agent may be asked to continue, in tokens.
    """

    agents: int = 3
    """Agents of a team (paper: 3)."""

    rounds: int = 3
    """Rounds in which every agent acts once, after it has solved the question (paper: 3)."""

    tau: float = 0.5
    """SoftRankPO's skew (paper: 0.5); ``algorithm.softrankpo.tau`` follows it in ``mpdf_trainer``."""

    prompts: dict[str, str | None] = field(default_factory=dict)
    """Overrides of ``deliberation.protocol.Prompts``, by field name; None keeps the default."""

    grading_timeout: float = 5.0
    """Seconds one answer may take to grade before its worker is killed."""

    def __post_init__(self) -> None:
        for key, least in (("agents", 2), ("rounds", 1)):
            if isinstance(value := getattr(self, key), bool) or not isinstance(value, int):
                raise ValueError(f"mpdf.{key} must be a whole number, got {value!r}")
            if value < least:
                raise ValueError(f"mpdf.{key} must be at least {least}, got {value}")
        if self.agents > MAX_AGENTS:
            raise ValueError(f"mpdf.agents must be at most {MAX_AGENTS}, got {self.agents}")
        for key in ("tau", "grading_timeout"):
            if not is_number(value := getattr(self, key)) or not value > 0:
                raise ValueError(f"mpdf.{key} must be a positive number, got {value!r}")
        if not isinstance(self.prompts, dict):
            raise ValueError(f"mpdf.prompts must be a mapping, got {self.prompts!r}")
        known = [f.name for f in fields(Prompts)]
        for key, text in self.prompts.items():
            if key not in known:
                raise ValueError(f"mpdf.prompts.{key} is not an option; known: {', '.join(known)}")
            if text is not None and not isinstance(text, str):
                raise ValueError(f"mpdf.prompts.{key} must be text, got {text!r}")

    @property
    def texts(self) -> Prompts:
        """The prompts, overrides applied."""
        return Prompts(**{key: text for key, text in self.prompts.items() if text is not None})

    @classmethod
    def of(cls, config: DictConfig) -> "MPDFConfig":
        """Read ``config.mpdf`` of a whole verl configuration; defaults where it is absent.

        Raises:
            ValueError: for an unknown key or a value out of range, naming the key.
        """
        block: dict[str, Any] = OmegaConf.to_container(config.get("mpdf") or OmegaConf.create({}), resolve=True)
        return typed(cls, block, "mpdf")


def uses_mpdf(config: DictConfig) -> bool:
    """Whether the run uses our deliberation or its trainer mode."""
    return "mpdf" in (
        config.trainer.v1.trainer_mode,
        config.actor_rollout_ref.rollout.agent.default_agent_loop,
        config.reward.reward_manager.name,
    )


def check(config: DictConfig) -> None:
    """Check a whole verl configuration that uses MPDF, before anything is started.

    Raises:
        ValueError: for the first mistake found.
    """
    from rema_verl import checks

    check_settings(config)
    checks.check_files(config)
    checks.check_registered(config)
    if config.actor_rollout_ref.rollout.agent.default_agent_loop == "mpdf":
        check_prompts(config, MPDFConfig.of(config))


def check_settings(config: DictConfig) -> None:
    """Everything but files, verl's registries and the tokenizer."""
    from rema_verl import checks

    mpdf = MPDFConfig.of(config)
    ReMAConfig.of(config)
    checks.check_written(config)
    checks.check_whole(config)
    keys.check(config)
    if config.trainer.v1.trainer_mode == "mpdf":
        check_trainer(config, mpdf)


def check_trainer(config: DictConfig, mpdf: MPDFConfig) -> None:
    """The loop that trainer mode ``mpdf`` needs, and sizes that verl finds out about in the first step."""
    actor, rollout, mode = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, "trainer.v1.trainer_mode"
    if rollout.agent.default_agent_loop != "mpdf":
        raise ValueError(f"{mode}=mpdf needs actor_rollout_ref.rollout.agent.default_agent_loop=mpdf")
    if config.data.train_batch_size % actor.ppo_mini_batch_size:
        raise ValueError(
            f"data.train_batch_size={config.data.train_batch_size} is not a multiple of "
            f"actor_rollout_ref.actor.ppo_mini_batch_size={actor.ppo_mini_batch_size}"
        )
    sequence_parallel = actor.get("ulysses_sequence_parallel_size") or 1
    workers = config.trainer.n_gpus_per_node * config.trainer.nnodes // sequence_parallel
    rows, micro = actor.ppo_mini_batch_size * rollout.n * mpdf.agents, actor.ppo_micro_batch_size_per_gpu
    if rows % workers:
        raise ValueError(f"a mini-batch of {rows} rows cannot be shared by {workers} workers")
    if not actor.use_dynamic_bsz and micro and (rows // workers) % micro:
        raise ValueError(
            f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={micro} does not divide the {rows // workers} rows "
            f"per worker of a mini-batch (ppo_mini_batch_size x n x {mpdf.agents} agents / workers)"
        )


def check_prompts(config: DictConfig, mpdf: MPDFConfig) -> None:
    """The tokenizer can render an agent's conversation, and the token limits leave room for one."""
    from rema_verl.deliberation.protocol import messages, show_peers
    from rema_verl.deliberation.serving import load_tokenizer

    model, budget = config.actor_rollout_ref.model, config.data.max_prompt_length
    path = str(model.tokenizer_path or model.path)
    if "://" in path:
        return  # verl fetches it later
    tokenizer = load_tokenizer(path, "actor_rollout_ref.model.path=")
    opening = messages("act", mpdf.texts, question="?", solution="?", confidence="?", peers=show_peers(["?"]))
    view = [*opening, {"role": "assistant", "content": "?"}, {"role": "user", "content": "?"}]
    try:
        text = tokenizer.apply_chat_template(view, tokenize=False, add_generation_prompt=True)
    except Exception as e:
        raise ValueError(f"{path}: the chat template cannot render an agent's conversation ({e})") from None
    length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    if length > budget:
        raise ValueError(f"data.max_prompt_length={budget} is smaller than an agent's empty prompt ({length} tokens)")
    limit = config.actor_rollout_ref.rollout.max_model_len
    if limit is not None and limit < budget + config.data.max_response_length:
        raise ValueError(
            f"actor_rollout_ref.rollout.max_model_len={limit} is less than data.max_prompt_length + "
            f"data.max_response_length = {budget + config.data.max_response_length}"
        )
