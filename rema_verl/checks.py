"""A user's mistakes, found before anything is started: one line that names the file, row or key, and exit code 2.

Called twice for a run that uses a name of ours; other verl runs pass untouched. First by the recipes, in a process of
its own that imports neither verl nor torch, so that most mistakes cost a second:

    python -m rema_verl.checks --config-name rema_trainer OVERRIDE...

Then in the driver (see :func:`rema_verl.compat.config_checks`), where also verl's registries and the tokenizer are at
hand.
"""

import ast
import gc
import importlib
import json
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rema_verl.config import ReMAConfig, RoleConfig, keys, mpdf, role_config
from rema_verl.dialogue import META_THINKING, ROLES, Dialogue
from rema_verl.errors import NOTE, Parser, UserError, complain, die

MODES = ("rema", "rema_separate")
ASYNC_MODES = ("colocate_async", "separate_async")  # verl's own: a weight sync interrupts messages, which then go on

ConfigError = UserError

# key -> (verl's registry; where in verl's folder its own names are registered; modules to import before it is full)
REGISTRIES = {
    "algorithm.adv_estimator": (
        "verl.trainer.ppo.core_algos",
        "ADV_ESTIMATOR_REGISTRY",
        "trainer/ppo/core_algos.py",
        "verl.trainer.ppo.core_algos",
    ),
    "actor_rollout_ref.actor.policy_loss.loss_mode": (
        "verl.trainer.ppo.core_algos",
        "POLICY_LOSS_REGISTRY",
        "trainer/ppo/core_algos.py",
        "verl.trainer.ppo.core_algos",
    ),
    "reward.reward_manager.name": (
        "verl.experimental.reward_loop.reward_manager.registry",
        "REWARD_MANAGER",
        "experimental/reward_loop/reward_manager/*.py",
        "verl.experimental.reward_loop",
    ),
    "actor_rollout_ref.rollout.agent.default_agent_loop": (
        "verl.experimental.agent_loop.agent_loop",
        "_agent_loop_registry",
        "experimental/agent_loop/*.py",
        "verl.experimental.agent_loop",
    ),
    "trainer.v1.trainer_mode": (
        "verl.trainer.ppo.v1.trainer_base",
        "TRAINER_REGISTRY",
        "trainer/ppo/v1/*.py",
        "verl.trainer.ppo.v1",
    ),
}

# whole numbers that the recipes' environment sets, or that are calculated with below -> the least one
WHOLE = {
    "data.train_batch_size": 1,
    "data.max_prompt_length": 1,
    "data.max_response_length": 0,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 1,
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 1,
    "actor_rollout_ref.rollout.n": 1,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
    "trainer.n_gpus_per_node": 1,
    "trainer.nnodes": 1,
    "trainer.total_epochs": 1,
}
WHOLE_OR_NULL = {
    "data.seed": None,
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 1,
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size": 1,
    "trainer.total_training_steps": 1,
}


def check_or_exit(config: DictConfig) -> None:
    """Run :func:`check`; print a mistake as one line and exit with code 2, and what has no effect as one line each."""
    try:
        check(config)
    except ValueError as e:
        die(e)
    for note in keys.notes(config):
        complain(note, NOTE)


def check(config: DictConfig) -> None:
    """Check a whole verl configuration.

    Raises:
        ValueError: for the first mistake found.
    """
    keys.check(config)  # of runs that use a single piece of ours, too
    if mpdf.uses_mpdf(config):
        mpdf.check(config)
    if uses_rema(config):
        check_settings(config)
        check_files(config)
        check_registered(config)
        if config.actor_rollout_ref.rollout.agent.default_agent_loop == "rema":
            for own, key in models_of(config):
                check_tokenizer(own, ReMAConfig.of(config), key)


def check_cheaply(config: DictConfig, files: bool = True) -> None:
    """What of :func:`check` needs neither verl nor transformers; also for verl's SFT trainer, which has no hook.

    Args:
        files: whether data and models are looked at.

    Raises:
        ValueError: for the first mistake found.
    """
    if "actor_rollout_ref" not in config:
        if files:
            check_supervised(config)
        return
    keys.check(config)
    checks = [mpdf.check_settings] if mpdf.uses_mpdf(config) else []
    checks += [check_settings] if uses_rema(config) else []
    for check in checks:
        check(config)
    if checks and files:
        check_files(config)


def check_settings(config: DictConfig) -> None:
    """Everything but files, verl's registries and tokenizers."""
    rema = ReMAConfig.of(config)
    check_written(config)
    check_combinations(config)
    check_roles(config, rema)
    check_stock_modes(config, rema)
    check_batches(config)


def check_files(config: DictConfig) -> None:
    """Data and models that are named by a path are there, and every row has what a run needs of it."""
    files = [(f"data.{key}", path) for key in ("train_files", "val_files") for path in files_of(config, key)]
    separate = config.trainer.v1.trainer_mode == "rema_separate"
    for role, own in ReMAConfig.of(config).roles.items() if separate else [("", RoleConfig())]:
        model = OmegaConf.merge(config.actor_rollout_ref.model, own.overrides.get("model") or {})
        model.path = own.model_path or model.path
        check_folder(model, f"rema.roles.{role}.model_path" if own.model_path else "actor_rollout_ref.model.path")
    for key, path in files:
        check_rows(path, key, config.data.prompt_key)


def check_supervised(config: DictConfig) -> None:
    """The files of a supervised run."""
    for key in ("train_files", "val_files"):
        if key == "train_files" or config.data.get(key):
            files_of(config, key)
    check_folder(config.model, "model.path")


def models_of(config: DictConfig) -> list[tuple[DictConfig, str]]:
    """(configuration, key of the path) of each model: one, or one per role."""
    if config.trainer.v1.trainer_mode != "rema_separate":
        return [(config, "actor_rollout_ref.model.path")]
    own_path = {role: ReMAConfig.of(config).roles[role].model_path for role in ROLES}
    return [
        (
            role_config(config, role),
            "actor_rollout_ref.model.path" if own_path[role] is None else f"rema.roles.{role}.model_path",
        )
        for role in ROLES
    ]


def check_folder(model: DictConfig, path_key: str) -> None:
    """A model, and a tokenizer of its own, is there where it is named by a path."""
    tokenizer_key = "model.tokenizer_path" if path_key == "model.path" else "actor_rollout_ref.model.tokenizer_path"
    for key, path in ((tokenizer_key, model.get("tokenizer_path")), (path_key, model.path)):
        if path and is_missing(str(path)):
            raise ConfigError(f"{key}={path}: cannot load the tokenizer (no such folder)")


def is_missing(model: str) -> bool:
    """Whether this is the path of a folder, as no name on the Hub is, and the folder is not there.

    >>> is_missing("/nowhere/model"), is_missing("runs/a/model"), is_missing("owner/name"), is_missing("s3://a/b/c")
    (True, True, False, False)
    """
    path = os.path.expanduser(model)
    named = path.startswith(("/", ".", "~")) or (path.count("/") > 1 and "://" not in path)
    return named and not os.path.isdir(path)


def uses_rema(config: DictConfig) -> bool:
    """Whether the run uses our dialogue, reward or trainer mode."""
    return config.trainer.v1.trainer_mode in MODES or "rema" in (
        config.actor_rollout_ref.rollout.agent.default_agent_loop,
        config.reward.reward_manager.name,
    )


def named(config: DictConfig) -> dict[str, str]:
    """key -> the name that must be in the key's registry; what is loaded from a file of the user's is not."""
    names = {key: str(OmegaConf.select(config, key)) for key in REGISTRIES}
    if config.reward.reward_manager.source != "register":
        del names["reward.reward_manager.name"]
    if config.actor_rollout_ref.rollout.agent.agent_loop_config_path:
        del names["actor_rollout_ref.rollout.agent.default_agent_loop"]
    return names


def check_registered(config: DictConfig) -> None:
    """Every name that a registry must resolve. Imports verl."""
    for key, name in named(config).items():
        module, attribute, _, filler = REGISTRIES[key]
        importlib.import_module(filler)
        known = {str(name) for name in getattr(importlib.import_module(module), attribute)}
        if name not in known:
            raise ConfigError(f"{key}={name} is not a registered name; known: {', '.join(sorted(known))}")


def check_written(config: DictConfig) -> None:
    """A name that is neither ours nor written anywhere in verl's sources is in no registry.

    Whatever else may register names, or a verl that was not read for this, is left to :func:`check_registered`.
    """
    from rema_verl.config.composing import verl_folder

    here = Path(__file__).with_name("plugin.py")  # its import would be torch's
    for key, name in named(config).items():
        module, _, sources, _ = REGISTRIES[key]
        ours = constant(here, "CONTENTS")[module]
        if name in ours or any(f'"{name}"' in file.read_text("utf-8") for file in verl_folder().glob(sources)):
            continue
        others = [e for e in metadata.entry_points(group="verl.plugins") if e.module != "rema_verl.plugin"]
        if not others and metadata.version("verl") in constant(here, "TESTED_VERL"):
            raise ConfigError(f"{key}={name} is not a registered name; known: {', '.join(sorted(ours))}, and verl's")


def constant(file: Path, name: str) -> Any:
    """What a module assigns to ``name``, without importing it."""
    for node in ast.parse(file.read_text("utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return ast.literal_eval(node.value)  # type: ignore[attr-defined]
    raise LookupError(name)


def check_combinations(config: DictConfig) -> None:
    """Combinations that would train something else in silence; most stand in ``config/keys.yaml``."""
    mode = config.trainer.v1.trainer_mode
    if mode in MODES and config.actor_rollout_ref.rollout.agent.default_agent_loop != "rema":
        raise ConfigError(
            f"trainer.v1.trainer_mode={mode} needs actor_rollout_ref.rollout.agent.default_agent_loop=rema"
        )
    keys.check(config)


def check_roles(config: DictConfig, rema: ReMAConfig) -> None:
    """Whether each role's options mean something in this trainer mode."""
    if config.trainer.v1.trainer_mode == "rema_separate":
        trainable = [role for role in ROLES if rema.roles[role].trainable]
        if not trainable:
            raise ConfigError("rema.roles: neither role is trainable")
        if len(trainable) == 2 and rema.switch.level != "none" and rema.switch.start is None:
            raise ConfigError(
                "rema.switch.start must name the role that learns first (meta_thinking or reasoning), as both are "
                "trainable and take turns"
            )
        if rema.switch.start is not None and rema.switch.start not in trainable:
            raise ConfigError(f"rema.switch.start={rema.switch.start} is not trainable")
        if all(rema.roles[role].n_gpus_per_node for role in trainable):
            raise ConfigError(
                "rema.roles: leave n_gpus_per_node unset for a role that is trainable; it gets trainer.n_gpus_per_node"
            )
        for role in ROLES:
            keys.check_overrides(config, role, rema.roles[role].overrides)
            own = role_config(config, role)  # names an override that verl does not know
            try:
                keys.check(own)
            except ValueError as e:
                raise ConfigError(f"rema.roles.{role}.overrides: {e}") from None
        return
    for role, options in rema.roles.items():
        for key, default in (("model_path", None), ("trainable", True), ("n_gpus_per_node", None), ("overrides", {})):
            if (value := getattr(options, key)) != default:
                raise ConfigError(f"rema.roles.{role}.{key}={value} needs trainer.v1.trainer_mode=rema_separate")
        if (own := options.sampling()) and not config.trainer.get("val_only"):
            key = next(iter(own))
            raise ConfigError(
                f"rema.roles.{role}.{key}={own[key]} is for generation only (trainer.val_only=true): the trainer "
                f"computes log-probabilities at actor_rollout_ref.rollout.temperature for both roles"
            )


def check_stock_modes(config: DictConfig, rema: ReMAConfig) -> None:
    """What verl's own trainer modes would train wrongly from the rows of a dialogue."""
    mode, rollout = config.trainer.v1.trainer_mode, config.actor_rollout_ref.rollout
    if mode in MODES or rollout.agent.default_agent_loop != "rema":
        return
    if config.reward.reward_manager.name == "rema":
        for key, only in (("meta_thinking", "final"), ("turn_bonus", 0.0)):
            if (value := getattr(rema.reward, key)) != only:
                raise ConfigError(
                    f"rema.reward.{key}={value} needs trainer.v1.trainer_mode=rema or rema_separate: verl's own modes "
                    f"give reasoning's reward to both roles"
                )
    if mode not in ASYNC_MODES:
        return
    if rema.plan == "json":
        raise ConfigError(
            f"rema.plan=json does not work with trainer.v1.trainer_mode={mode}: a plan that a weight sync interrupts "
            f"goes on as a new request, which vLLM would hold to the beginning of the JSON again"
        )
    if rema.seed is not None:
        raise ConfigError(
            f"rema.seed={rema.seed} does not work with trainer.v1.trainer_mode={mode}: such a run cannot repeat "
            f"itself, and a message would draw the same random numbers again after an interruption"
        )
    on_cpu = config.trainer.get("device") == "cpu"
    if mode == "separate_async" and on_cpu and config.trainer.v1.separate_async.parameter_sync_step != 1:
        raise ConfigError(
            "trainer.v1.separate_async.parameter_sync_step must be 1 on CPU: verl's copy of the weights that sampled "
            "(fsdp2_sharded_save_to_cpu) is there the weights themselves, and changes with them"
        )


def check_batches(config: DictConfig) -> None:
    """Sizes that verl finds out about in the middle of the first step."""
    check_whole(config)
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    if config.data.train_batch_size % actor.ppo_mini_batch_size:
        raise ConfigError(
            f"data.train_batch_size={config.data.train_batch_size} is not a multiple of "
            f"actor_rollout_ref.actor.ppo_mini_batch_size={actor.ppo_mini_batch_size}"
        )
    if config.trainer.v1.trainer_mode not in MODES:
        return  # verl counts the rows of its own modes itself
    roles = len(ROLES) if config.trainer.v1.trainer_mode == "rema" else 1
    workers = (
        config.trainer.n_gpus_per_node * config.trainer.nnodes // (actor.get("ulysses_sequence_parallel_size") or 1)
    )
    rows = actor.ppo_mini_batch_size * rollout.n * roles
    micro = actor.ppo_micro_batch_size_per_gpu
    if rows % workers:
        raise ConfigError(f"a mini-batch of {rows} rows cannot be shared by {workers} workers")
    if not actor.use_dynamic_bsz and micro and (rows // workers) % micro:
        raise ConfigError(
            f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={micro} does not divide the {rows // workers} rows "
            f"per worker of a mini-batch (ppo_mini_batch_size x n x {roles} roles / workers)"
        )


def check_whole(config: DictConfig) -> None:
    """Whole numbers are whole numbers."""
    for key, least in (WHOLE | WHOLE_OR_NULL).items():
        value = OmegaConf.select(config, key)
        if value is None and key in WHOLE_OR_NULL:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{key} must be a whole number, got {value!r}")
        if least is not None and value < least:
            raise ConfigError(f"{key} must be at least {least}, got {value}")


def files_of(config: DictConfig, key: str) -> list[str]:
    """The local files behind ``data.<key>``; remote ones are verl's business."""
    value = config.data[key]
    paths = [os.path.expanduser(str(path)) for path in (value if OmegaConf.is_list(value) else [value])]
    if not paths:
        raise ConfigError(f"data.{key} is empty")
    local = [path for path in paths if "://" not in path]
    for path in local:
        if not os.path.isfile(path):
            raise ConfigError(f"data.{key}: {path}: no such file")
    return local


def check_rows(path: str, key: str, prompt_key: str) -> None:
    """Every row has a question and a ground truth."""
    if path.endswith((".json", ".jsonl")):
        check_json_lines(path, key, prompt_key)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns, num_rows = set(file.schema_arrow.names), file.metadata.num_rows
            if num_rows == 0:
                raise ConfigError(f"{key}: {path}: the file has no rows")
            for column in (prompt_key, "reward_model"):
                if column not in columns:
                    raise ConfigError(f"{key}: {path}: no column '{column}'")
            batches = file.iter_batches(batch_size=4096, columns=[prompt_key, "reward_model"])
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                check_row(row, f"{key}: {path}: row {number}", prompt_key)
    except (OSError, pa.ArrowException) as e:
        raise ConfigError(f"{key}: {path}: not a readable parquet file ({str(e).splitlines()[0][:120]})") from None


def check_json_lines(path: str, key: str, prompt_key: str) -> None:
    """The same for the other format verl reads."""
    number = 0
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                raise ConfigError(f"{key}: {path}: row {number}: not valid JSON") from None
            check_row(row if isinstance(row, dict) else {}, f"{key}: {path}: row {number}", prompt_key)
    if number == 0:
        raise ConfigError(f"{key}: {path}: the file has no rows")


def check_row(row: dict, where: str, prompt_key: str) -> None:
    """One row has a question (a user message) and a ground truth."""
    prompt, reward_model = row.get(prompt_key), row.get("reward_model")
    reward_model = reward_model if isinstance(reward_model, dict) else {}
    messages = [m for m in prompt if isinstance(m, dict)] if isinstance(prompt, list) else []
    if not any(m.get("role") == "user" and str(m.get("content") or "").strip() for m in messages):
        raise ConfigError(f"{where}: '{prompt_key}' has no question (user message)")
    truth = reward_model.get("ground_truth")
    if truth is None or not str(truth).strip():
        raise ConfigError(f"{where}: 'reward_model' has no ground_truth")
    if reward_model.get("style") == "verdict" and truth not in ("A", "B"):
        raise ConfigError(f"{where}: 'reward_model' has the verdict {truth!r}; expected A or B")


def check_tokenizer(config: DictConfig, rema: ReMAConfig, path_key: str) -> None:
    """The tokenizer can render both roles' prompts, and the token limits leave room for a turn."""
    from transformers import AutoConfig, AutoTokenizer

    from rema_verl.agent_loops.rema import prompts_for

    model = config.actor_rollout_ref.model
    path = os.path.expanduser(model.tokenizer_path or model.path)
    if "://" in path:
        return  # verl fetches it later
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except Exception as e:
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise ConfigError(
            f"{path_key}={path}: cannot load the tokenizer (a local folder that is not there, a "
            f"gated model without access, or no network): {reason[:160]}"
        ) from None
    if not (model.custom_chat_template or tokenizer.chat_template):
        raise ConfigError(f"{path_key}={path}: the tokenizer has no chat template")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{path_key}={path}: the tokenizer has no eos token")
    if model.custom_chat_template:
        tokenizer.chat_template = model.custom_chat_template

    budget, turn = config.data.max_prompt_length, config.data.max_response_length
    if turn < 1:
        raise ConfigError(f"data.max_response_length={turn} leaves no token for a message")
    dialogue = Dialogue(
        "?", max_turns=rema.max_turns, finish_flag=rema.finish_flag, prompts=prompts_for(rema), plan=rema.plan
    )
    opening = {META_THINKING: dialogue.view(META_THINKING)}
    dialogue.add("?")
    opening |= {role: dialogue.view(role) for role in ROLES if role not in opening}
    for role, view in opening.items():
        try:
            text = tokenizer.apply_chat_template(view, tokenize=False, add_generation_prompt=True)
        except Exception as e:
            raise ConfigError(f"{path_key}={path}: the chat template cannot render {role}'s prompt ({e})") from None
        length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if length > budget:
            raise ConfigError(
                f"data.max_prompt_length={budget} is smaller than {role}'s opening prompt for an empty question "
                f"({length} tokens)"
            )
    key, limit = "actor_rollout_ref.rollout.max_model_len", config.actor_rollout_ref.rollout.max_model_len
    if limit is None:
        try:
            model_config = AutoConfig.from_pretrained(os.path.expanduser(model.path))
        except Exception:
            return  # a tokenizer alone is no model; verl says so when it loads it
        key, limit = "the model's max_position_embeddings", getattr(model_config, "max_position_embeddings", None)
    if limit is not None and limit < budget + turn:
        raise ConfigError(
            f"{key}={limit} is less than data.max_prompt_length + data.max_response_length = {budget + turn}: "
            f"a turn at the end of the budget would not fit"
        )


# --- before verl ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Compose and check a run's configuration as its command line has it; a mistake is one line and exit code 2."""
    gc.disable()  # a second's work that leaves nothing behind
    try:
        if args := command_line(sys.argv[1:] if argv is None else argv):
            from rema_verl.config.composing import compose

            config = compose(args.config_name, args.overrides)
            OmegaConf.to_container(config, resolve=True)  # as verl will
            check_cheaply(config, files=not args.settings_only)
    except OmegaConfBaseException as e:
        from rema_verl.config.composing import one_line

        die(one_line(e))
    except ValueError as e:
        die(e)


def command_line(argv: Sequence[str]):
    """The options of a run; None where Hydra is asked for something else, or to look in another folder.

    Raises:
        UserError: an option that Hydra does not know.
    """
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.error = Parser.error.__get__(parser)  # type: ignore[method-assign]
    parser.add_argument("--settings-only", action="store_true", help="do not look at data and models")
    args = parser.parse_args(argv)
    ours = ("config_name", "overrides", "run", "settings_only")
    return None if any(value for key, value in vars(args).items() if key not in ours) else args


if __name__ == "__main__":
    main()
