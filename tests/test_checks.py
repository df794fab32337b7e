"""A user's mistakes: one line that names the file, row or key, exit code 2, before anything is started."""

import importlib
import subprocess
import sys
from importlib import metadata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPO, make_tokenizer
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from rema_verl import checks, plugin
from rema_verl.config import composing


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A good data file and a good tokenizer folder."""
    folder = tmp_path_factory.mktemp("checks")
    rows = [
        {"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2"}, "data_source": "s"}
    ]
    pq.write_table(pa.Table.from_pylist(rows * 3), folder / "good.parquet")
    make_tokenizer("llama3").save_pretrained(folder / "model")
    return folder


@pytest.fixture
def config(files):
    """config(*overrides) -> a whole verl configuration."""

    def make(*overrides):
        with initialize_config_module("rema_verl.config", version_base=None):
            return compose(
                "rema_trainer",
                [
                    "hydra.searchpath=[pkg://verl.trainer.config]",
                    "+device=cpu",
                    f"data.train_files={files}/good.parquet",
                    f"data.val_files={files}/good.parquet",
                    f"actor_rollout_ref.model.path={files}/model",
                    "data.train_batch_size=4",
                    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
                    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
                    "actor_rollout_ref.rollout.n=2",
                    *overrides,
                ],
            )

    return make


def test_a_good_configuration_passes(config):
    checks.check(config())


def test_runs_that_use_nothing_of_ours_are_left_alone(config):
    checks.check(
        config(
            "data.train_files=/nowhere.parquet",
            "trainer.v1.trainer_mode=sync",
            "actor_rollout_ref.rollout.agent.default_agent_loop=single_turn_agent",
            "reward.reward_manager.name=naive",
        )
    )


BAD = {
    "missing file": ("data.train_files=/nowhere/x.parquet", "data.train_files: /nowhere/x.parquet: no such file"),
    "missing validation file": ("data.val_files=/nowhere/x.parquet", "data.val_files: /nowhere/x.parquet"),
    "max_turns": ("rema.max_turns=0", "rema.max_turns must be at least 1, got 0"),
    "turns not a number": ("rema.max_turns=many", "rema.max_turns must be a whole number"),
    "half a turn": ("rema.max_turns=2.5", "rema.max_turns must be a whole number"),
    "no roles": ("rema.roles=null", "rema.roles must be a mapping"),
    "critic": ("algorithm.adv_estimator=gae", "has no critic"),
    "bypass": ("++algorithm.rollout_correction.bypass_mode=true", "bypass_mode=true does not work"),
    "one checkpoint": ("trainer.max_actor_ckpt_to_keep=1", "use at least 2"),
    "finish flag": ("rema.finish_flag=''", "rema.finish_flag"),
    "three roles": ("+rema.roles.critic={}", "rema.roles must be exactly meta_thinking and reasoning"),
    "one role": ("~rema.roles.reasoning", "rema.roles must be exactly meta_thinking and reasoning"),
    "option of a role": ("+rema.roles.reasoning.lr=1", "rema.roles.reasoning.lr is not an option"),
    "sampling of a role": ("rema.roles.reasoning.temperature=0.5", "reasoning.temperature=0.5 is for generation only"),
    "model of a role": (
        "rema.roles.reasoning.model_path=x",
        "reasoning.model_path=x needs trainer.v1.trainer_mode=rema_",
    ),
    "frozen role": ("rema.roles.reasoning.trainable=false", "reasoning.trainable=False needs trainer.v1.trainer_mode"),
    "level": ("rema.switch.level=day", "rema.switch.level must be one of step, epoch, none, got 'day'"),
    "freq": ("rema.switch.freq=0", "rema.switch.freq must be a whole number of at least 1, got 0"),
    "start": ("rema.switch.start=critic", "rema.switch.start must be one of meta_thinking, reasoning, got 'critic'"),
    "task": ("rema.task=code", "rema.task must be one of math, judge, got 'code'"),
    "plan": ("rema.plan=xml", "rema.plan must be one of text, json, got 'xml'"),
    "json in dialogue": ("rema.plan=json", "rema.plan=json needs rema.max_turns=1, got 30"),
    "answers in dialogue": ("rema.answers_per_plan=4", "rema.answers_per_plan=4 needs rema.max_turns=1"),
    "graded dialogue": ("rema.reward.reasoning=graded", "rema.reward.reasoning=graded needs rema.max_turns=1"),
    "reward": ("rema.reward.meta_thinking=nice", "rema.reward.meta_thinking must be one of final, correctness"),
    "reward not a number": ("rema.reward.leak=much", "rema.reward.leak must be a number, got 'much'"),
    "unknown reward option": ("+rema.reward.bonus=1", "rema.reward.bonus is not an option; known:"),
    "unknown option": ("+rema.max_turn=3", "rema.max_turn is not an option; known:"),
    "unknown prompt": ("+rema.prompts.critic=x", "rema.prompts.critic is not an option"),
    "estimator": ("algorithm.adv_estimator=role_grop", "algorithm.adv_estimator=role_grop is not a registered name"),
    "loss": ("actor_rollout_ref.actor.policy_loss.loss_mode=turnclip", "policy_loss.loss_mode=turnclip is not"),
    "reward manager": ("reward.reward_manager.name=remma", "reward.reward_manager.name=remma is not a registered name"),
    "agent loop": ("actor_rollout_ref.rollout.agent.default_agent_loop=rma", "default_agent_loop=rma is not"),
    "trainer mode": ("trainer.v1.trainer_mode=remax", "trainer.v1.trainer_mode=remax is not a registered name"),
    "grpo": ("algorithm.adv_estimator=grpo", "use role_grpo"),
    "other loop": ("actor_rollout_ref.rollout.agent.default_agent_loop=single_turn_agent", "needs"),
    "mini-batch": ("actor_rollout_ref.actor.ppo_mini_batch_size=3", "data.train_batch_size=4 is not a multiple"),
    "micro-batch": ("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=5", "ppo_micro_batch_size_per_gpu=5"),
    "no model": ("actor_rollout_ref.model.path=/nowhere/model", "actor_rollout_ref.model.path=/nowhere/model"),
    "gated model": ("actor_rollout_ref.model.path=some-lab/Gated-8B", "some-lab/Gated-8B: cannot load the tokenizer"),
    "prompt budget": ("data.max_prompt_length=20", "data.max_prompt_length=20 is smaller than meta_thinking's opening"),
    "turn budget": ("data.max_response_length=0", "data.max_response_length=0 leaves no token"),
    "model length": ("actor_rollout_ref.rollout.max_model_len=100", "max_model_len=100 is less than"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configuration(config, capsys, case):
    override, message = BAD[case]
    with pytest.raises(SystemExit) as exit_info:
        checks.check_or_exit(config(override))
    assert exit_info.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("rema-verl: error: ") and message in lines[0], lines


SEPARATE = ["trainer.v1.trainer_mode=rema_separate", "rema.switch.start=reasoning"]


def test_a_model_per_role_passes(config, files):
    checks.check(config(*SEPARATE, f"rema.roles.meta_thinking.model_path={files}/model"))
    one = "rema.roles.meta_thinking.trainable=false"
    checks.check(config(*SEPARATE, one, "+rema.roles.reasoning.overrides.actor.optim.lr=1e-3"))


BAD_SEPARATE = {
    "no start": (["rema.switch.start=null"], "rema.switch.start must name the role that learns first"),
    "start is frozen": (["rema.roles.reasoning.trainable=false"], "rema.switch.start=reasoning is not trainable"),
    "nobody learns": (
        ["rema.roles.reasoning.trainable=false", "rema.roles.meta_thinking.trainable=false"],
        "neither role is trainable",
    ),
    "no model": (["rema.roles.reasoning.model_path=/nowhere"], "rema.roles.reasoning.model_path=/nowhere: cannot load"),
    "override": (["+rema.roles.reasoning.overrides.actor.lr=1"], "rema.roles.reasoning.overrides: Key 'lr'"),
    "trainable": (["rema.roles.reasoning.trainable=maybe"], "trainable must be true or false, got 'maybe'"),
    "GPUs for both": (
        ["rema.roles.reasoning.n_gpus_per_node=1", "rema.roles.meta_thinking.n_gpus_per_node=1"],
        "leave n_gpus_per_node unset for a role that is trainable",
    ),
    "no GPUs": (["rema.roles.reasoning.n_gpus_per_node=0"], "n_gpus_per_node must be at least 1, got 0"),
    "unknown role": (["+rema.roles.planner.model_path=x"], "rema.roles must be exactly meta_thinking and reasoning"),
    "unknown level": (["rema.switch.level=week"], "rema.switch.level must be one of step, epoch, none, got 'week'"),
    "freq": (["rema.switch.freq=0"], "rema.switch.freq must be a whole number of at least 1, got 0"),
    "critic": (["algorithm.adv_estimator=gae"], "trainer.v1.trainer_mode=rema_separate has no critic"),
    "temperature": (
        ["+rema.roles.reasoning.overrides.rollout.temperature=0.5"],
        "rollout.temperature=0.5 reaches the trainer and not the sampler: set rema.roles.reasoning.temperature, which",
    ),
    "top_k": (
        ["+rema.roles.meta_thinking.overrides.rollout.top_k=5"],
        "overrides.rollout.top_k=5 reaches the trainer and not the sampler: set rema.roles.meta_thinking.top_k",
    ),
    "path": (["+rema.roles.reasoning.overrides.model.path=x"], "set rema.roles.reasoning.model_path, which reaches"),
    "samples": (
        ["+rema.roles.reasoning.overrides.rollout.n=4"],
        "overrides.rollout.n=4 is one for both roles: set actor_rollout_ref.rollout.n",
    ),
    "validation": (
        ["+rema.roles.reasoning.overrides.rollout.val_kwargs.temperature=1"],
        "is one for both roles: set actor_rollout_ref.rollout.val_kwargs.temperature",
    ),
    "KL term of a role": (
        ["+rema.roles.reasoning.overrides.actor.use_kl_loss=true"],
        "is one for both roles: set actor_rollout_ref.actor.use_kl_loss",
    ),
    "LoRA of a role, with a reference": (
        ["+rema.roles.reasoning.overrides.model.lora_rank=8", "actor_rollout_ref.actor.use_kl_loss=true"],
        "verl makes one reference for both roles (set actor_rollout_ref.model.lora_rank)",
    ),
    "what is refused for both": (
        ["+rema.roles.reasoning.overrides.actor.grad_clip=0.5"],
        "rema.roles.reasoning.overrides: actor_rollout_ref.actor.grad_clip=0.5 is not read",
    ),
}


@pytest.mark.parametrize("case", BAD_SEPARATE)
def test_bad_configuration_of_separate_models(config, capsys, case):
    overrides, message = BAD_SEPARATE[case]
    with pytest.raises(SystemExit) as exit_info:
        checks.check_or_exit(config(*SEPARATE, *overrides))
    assert exit_info.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0], lines


def test_what_one_role_may_have_of_its_own_passes(config, files):
    own = "+rema.roles.reasoning.overrides"
    checks.check(
        config(
            *SEPARATE,
            "rema.roles.reasoning.temperature=0.5",
            f"{own}.model.lora_rank=8",
            f"{own}.model.custom_chat_template='{{{{ messages[0].content }}}}{{{{ messages[1].content }}}}'",
            f"{own}.actor.ppo_mini_batch_size=2",
            f"{own}.rollout.gpu_memory_utilization=0.3",
        )
    )


COLOCATE = "trainer.v1.trainer_mode=colocate_async"
TWO_PROCESSES = ["trainer.v1.trainer_mode=separate_async", "trainer.v1.separate_async.parameter_sync_step=1"]


def test_verls_asynchronous_modes_pass(config):
    checks.check(config(COLOCATE))
    checks.check(config(*TWO_PROCESSES))


BAD_ASYNC = {
    "json": ([COLOCATE, "rema.plan=json", "rema.max_turns=1"], "rema.plan=json does not work with"),
    "seed": ([COLOCATE, "rema.seed=1"], "rema.seed=1 does not work with trainer.v1.trainer_mode=colocate_async"),
    "copy of the weights": (
        [*TWO_PROCESSES, "trainer.v1.separate_async.parameter_sync_step=4"],
        "parameter_sync_step must be 1 on CPU",
    ),
    "reward of a role": (
        [COLOCATE, "rema.reward.meta_thinking=consistency", "rema.max_turns=1"],
        "rema.reward.meta_thinking=consistency needs trainer.v1.trainer_mode=rema",
    ),
    "turn bonus": (["trainer.v1.trainer_mode=sync", "rema.reward.turn_bonus=0.1"], "rema.reward.turn_bonus=0.1 needs"),
}


@pytest.mark.parametrize("case", BAD_ASYNC)
def test_bad_configuration_of_verls_own_modes(config, case):
    overrides, message = BAD_ASYNC[case]
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        checks.check(config(*overrides))


GOOD_ROW = {"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2"}}
BAD_ROWS = {
    "no rows": ([], "the file has no rows"),
    "no question": ([GOOD_ROW, {**GOOD_ROW, "prompt": [{"role": "user", "content": " "}]}], "row 2: 'prompt' has no"),
    "only a system message": ([{**GOOD_ROW, "prompt": [{"role": "system", "content": "x"}]}], "row 1: 'prompt' has no"),
    "no truth": ([GOOD_ROW, GOOD_ROW, {**GOOD_ROW, "reward_model": {"ground_truth": ""}}], "row 3: 'reward_model'"),
    "prompt is text": ([{**GOOD_ROW, "prompt": "1+1?"}], "row 1: 'prompt' has no question"),
    "truth is not in a mapping": ([{**GOOD_ROW, "reward_model": "2"}], "row 1: 'reward_model' has no ground_truth"),
    "verdict": ([{**GOOD_ROW, "reward_model": {"ground_truth": "C", "style": "verdict"}}], "row 1: 'reward_model' has"),
    "no column": ([{"prompt": GOOD_ROW["prompt"]}], "no column 'reward_model'"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(config, tmp_path, case):
    rows, message = BAD_ROWS[case]
    schema = pa.Table.from_pylist([GOOD_ROW]).schema if not rows else None
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=r"data\.train_files: ") as error:
        checks.check(config(f"data.train_files={tmp_path}/bad.parquet"))
    assert message in str(error.value) and "bad.parquet" in str(error.value)


def test_a_truth_of_zero_is_a_truth(config, tmp_path):
    pq.write_table(pa.Table.from_pylist([{**GOOD_ROW, "reward_model": {"ground_truth": 0}}]), tmp_path / "zero.parquet")
    checks.check(config(f"data.train_files={tmp_path}/zero.parquet"))


@pytest.mark.parametrize(("text", "message"), [("", "no rows"), ("{", "row 1: not valid JSON"), ("[]", "no question")])
def test_json_lines(config, tmp_path, text, message):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        checks.check(config(f"data.train_files={tmp_path}/rows.jsonl"))


def test_model_whose_context_is_too_short(config, files, tmp_path):
    import shutil

    shutil.copytree(files / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 1024}')
    with pytest.raises(ValueError, match="max_position_embeddings=1024 is less than"):
        checks.check(config(f"actor_rollout_ref.model.path={tmp_path}/model"))


def test_template_that_refuses_a_system_prompt(config, tmp_path):
    tokenizer = make_tokenizer("llama3")
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="cannot render meta_thinking's prompt"):
        checks.check(config(f"actor_rollout_ref.model.path={tmp_path}/model"))


def test_empty_file(config, tmp_path):
    (tmp_path / "empty.parquet").touch()
    with pytest.raises(ValueError, match=r"empty.parquet: not a readable parquet file"):
        checks.check(config(f"data.val_files={tmp_path}/empty.parquet"))


@pytest.mark.parametrize("missing", ["chat_template", "eos_token"])
def test_unusable_tokenizer(config, tmp_path, missing):
    tokenizer = make_tokenizer("llama3")
    setattr(tokenizer, missing, None)
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="no chat template" if missing == "chat_template" else "no eos token"):
        checks.check(config(f"actor_rollout_ref.model.path={tmp_path}/model"))


# --- before verl ---------------------------------------------------------------------------------------------------

CONFIGURATIONS = {
    "rema_trainer": ["+setting=multi_turn", "+device=cpu", "data.train_files=[a.parquet,b.parquet]", "+x.y=1e-6"],
    "mpdf_trainer": ["mpdf.tau=0.8", "~trainer.logger", "trainer.experiment_name='a=b, ${data.seed}'"],
    "sft_trainer_engine": ["+setting=cold_start", "optim.lr=2e-3"],
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_composing_without_verl_gives_what_verl_composes(name):
    import verl  # noqa: F401  (loads the plug-in, as verl's entry point does)

    overrides = CONFIGURATIONS[name]
    with initialize_config_module("verl.trainer.config", version_base=None):
        expected = compose(name, overrides)
    assert OmegaConf.to_yaml(composing.compose(name, overrides)) == OmegaConf.to_yaml(expected)


def test_composing_without_verl_gives_what_verls_entry_point_runs(tmp_path):
    overrides = CONFIGURATIONS["rema_trainer"]
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-name", "rema_trainer", *overrides]
    shown = subprocess.run([*command, "--cfg", "job"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert OmegaConf.create(shown[shown.index("model_engine:") :]) == composing.compose("rema_trainer", overrides)


def test_names_that_verl_registers_are_found_in_its_sources(config):
    """Or a right name would be refused before verl is asked."""
    for key, (module, attribute, _, filler) in checks.REGISTRIES.items():
        importlib.import_module(filler)
        right = config()
        for name in getattr(importlib.import_module(module), attribute):
            OmegaConf.update(right, key, str(name))
            checks.check_written(right)


def test_another_plug_ins_names_are_left_to_verls_registries(config, monkeypatch):
    wrong = config("algorithm.adv_estimator=theirs")
    with pytest.raises(ValueError, match="theirs is not a registered name"):
        checks.check_written(wrong)
    theirs = metadata.EntryPoint("theirs", "their_package", "verl.plugins")
    monkeypatch.setattr(checks.metadata, "entry_points", lambda group: [theirs])
    checks.check_written(wrong)


def test_the_table_of_contents_can_be_read_without_its_import():
    assert checks.constant(REPO / "rema_verl" / "plugin.py", "CONTENTS") == plugin.CONTENTS
    assert checks.constant(REPO / "rema_verl" / "plugin.py", "TESTED_VERL") == plugin.TESTED_VERL


@pytest.mark.parametrize(("key", "value"), [("data.train_batch_size", "four"), ("trainer.nnodes", "0.5")])
def test_sizes_are_whole_numbers(config, key, value):
    with pytest.raises(ValueError, match=f"{key} must be a whole number, got"):
        checks.check(config(f"{key}={value}"))
    with pytest.raises(ValueError, match=f"{key} must be at least 1, got 0"):
        checks.check(config(f"{key}=0"))


def test_stock_entry_point_exits_2_with_one_line(tmp_path):
    command = "-m verl.trainer.main_ppo --config-name rema_trainer +device=cpu rema.max_turns=0"
    result = subprocess.run([sys.executable, *command.split()], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert [line for line in result.stderr.splitlines() if "error" in line] == [
        "rema-verl: error: rema.max_turns must be at least 1, got 0"
    ]
    assert "Traceback" not in result.stderr
