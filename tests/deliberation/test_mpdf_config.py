"""The configuration of MPDF: what composes, what is refused in one line, and that every name resolves in verl."""

import copy
import functools
import os
import subprocess

import pytest
import yaml
from conftest import REPO, make_tokenizer
from hydra.utils import instantiate
from omegaconf import OmegaConf

from rema_verl.config import mpdf
from rema_verl.config.mpdf import MPDFConfig

RECIPES = ("mpdf_llama8b_math", "mpdf_llama32_3b_math", "mpdf_qwen25_7b_math", "mpdf_qwen25_3b_math")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"agents": 1}, "mpdf.agents must be at least 2, got 1"),
        ({"rounds": 0}, "mpdf.rounds must be at least 1, got 0"),
        ({"agents": 17}, "mpdf.agents must be at most 16, got 17"),
        ({"agents": True}, "mpdf.agents must be a whole number, got True"),
        ({"rounds": "3"}, "mpdf.rounds must be a whole number, got '3'"),
        ({"tau": 0}, "mpdf.tau must be a positive number, got 0"),
        ({"grading_timeout": "5"}, "mpdf.grading_timeout must be a positive number, got '5'"),
        ({"agent": 3}, "mpdf.agent is not an option; known: agents"),
        ({"prompts": {"sovle": "x"}}, "mpdf.prompts.sovle is not an option"),
        ({"prompts": {"solve": 3}}, "mpdf.prompts.solve must be text, got 3"),
        ({"prompts": "solve"}, "mpdf.prompts must be a mapping"),
    ],
)
def test_mistakes_name_the_key(block, message):
    with pytest.raises(ValueError) as e:
        MPDFConfig.of(OmegaConf.create({"mpdf": block}))
    assert str(e.value).startswith(message) and "\n" not in str(e.value)


def test_defaults_are_the_papers():
    config = MPDFConfig.of(OmegaConf.create({}))
    assert (config.agents, config.rounds, config.tau) == (3, 3, 0.5)
    prompts = MPDFConfig(prompts={"act": "x", "solve": None}).texts
    assert prompts.act == "x" and prompts.solve == mpdf.Prompts().solve


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from build_tiny import build_model

    folder = tmp_path_factory.mktemp("inputs")
    row = {
        "data_source": "s",
        "prompt": [{"role": "user", "content": "1?"}],
        "reward_model": {"style": "rule", "ground_truth": "1"},
    }
    pq.write_table(pa.Table.from_pylist([row]), folder / "q.parquet")
    tokenizer = make_tokenizer("qwen2")
    build_model(tokenizer, folder / "model", seed=0, hidden=64, layers=1)
    return folder


@functools.cache
def composed(inputs):
    import verl  # noqa: F401
    from hydra import compose, initialize_config_module

    files = [f"data.{split}_files={inputs}/q.parquet" for split in ("train", "val")]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose(
            "mpdf_trainer",
            [
                "+device=cpu",
                *files,
                f"actor_rollout_ref.model.path={inputs}/model",
                "data.train_batch_size=4",
                "actor_rollout_ref.actor.ppo_mini_batch_size=4",
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
                "actor_rollout_ref.rollout.n=2",
            ],
        )


def configured(inputs, *overrides: str):
    """The trainer's configuration with some keys set afterwards: to compose it takes seconds."""
    config = copy.deepcopy(composed(inputs))
    for override in overrides:
        key, _, value = override.partition("=")
        OmegaConf.update(config, key, yaml.safe_load(value))
    return config


def test_the_trainers_configuration_composes_and_passes(inputs):
    config = configured(inputs)
    mpdf.check(config)
    assert config.algorithm.softrankpo.tau == 0.5
    assert instantiate(config.actor_rollout_ref.actor.policy_loss).loss_mode == "turn_clip"
    assert configured(inputs, "mpdf.tau=0.8").algorithm.softrankpo.tau == 0.8
    assert set(config.mpdf) == {"agents", "rounds", "tau", "prompts", "grading_timeout"} == set(vars(MPDFConfig()))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mpdf.agents=1", "mpdf.agents must be at least 2"),
        ("mpdf.rounds=0", "mpdf.rounds must be at least 1"),
        ("data.train_files=nowhere.parquet", "data.train_files: nowhere.parquet: no such file"),
        ("actor_rollout_ref.model.path=nowhere/model", "actor_rollout_ref.model.path=nowhere/model: cannot load it"),
        (
            "algorithm.adv_estimator=grpo",
            "algorithm.adv_estimator=grpo does not work with trainer.v1.trainer_mode=mpdf",
        ),
        ("algorithm.adv_estimator=softrank", "algorithm.adv_estimator=softrank is not a registered name"),
        ("actor_rollout_ref.rollout.agent.default_agent_loop=rema", "default_agent_loop=mpdf"),
        ("data.train_batch_size=6", "is not a multiple of"),
        ("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=5", "does not divide the 24 rows"),
        ("data.max_prompt_length=20", "data.max_prompt_length=20 is smaller than an agent's empty prompt"),
        ("actor_rollout_ref.rollout.max_model_len=100", "max_model_len=100 is less than"),
        ("trainer.max_actor_ckpt_to_keep=1", "use at least 2"),
        ("actor_rollout_ref.rollout.val_kwargs.do_sample=false", "greedy agents get one prompt"),
        ("actor_rollout_ref.rollout.val_kwargs.temperature=0", "greedy agents get one prompt"),
        ("trainer.v1.trainer_mode=sync", "sync would train every agent's row on the reward of the last one's"),
        ("trainer.v1.trainer_mode=colocate_async", "default_agent_loop=mpdf needs trainer.v1.trainer_mode=mpdf"),
        ("trainer.v1.trainer_mode=separate_async", "default_agent_loop=mpdf needs trainer.v1.trainer_mode=mpdf"),
        ("algorithm.rollout_correction.rollout_rs=token_k1", "cuts turns into pieces: reject whole rows"),
        ("trainer.critic_warmup=5", "would skip the first updates to train a critic, and there is none"),
    ],
)
def test_mistakes_are_found_before_anything_starts(inputs, override, message):
    with pytest.raises(ValueError) as e:
        mpdf.check(configured(inputs, override))
    assert message in str(e.value) and "\n" not in str(e.value)


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_run_the_four_stages_with_the_papers_settings(recipe, tmp_path):
    """With ``python`` replaced by a recorder."""
    shim = tmp_path / "bin" / "python"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n')
    shim.chmod(0o755)
    files = {key: str(tmp_path / f"{key}.parquet") for key in ("TRAIN_FILES", "VAL_FILES")}
    for file in files.values():
        open(file, "w").close()
    environment = {**os.environ, **files, "RUNS": str(tmp_path / "runs"), "PATH": f"{shim.parent}:{os.environ['PATH']}"}
    result = subprocess.run(["bash", f"recipes/{recipe}.sh"], cwd=REPO, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    stages = [call.split()[1].rpartition(".")[2] for call in calls]
    assert stages == ["collect", "train", "collect", "train", "evaluate"]
    served = [call for call, stage in zip(calls, stages, strict=True) if stage != "train"]
    head = (REPO / "recipes" / f"{recipe}.sh").read_text()
    model = head.split("MODEL=${MODEL:-")[1].split("}")[0]
    assert all(f"--model {model} --agents 3 --rounds 3 " in call for call in served)
    assert "--policy" not in calls[0] and "--policy" in calls[2]
    assert "--stage supervised" in calls[1] and "--stage softrankpo" in calls[3] and "--tau 0.5" in calls[3]
    assert "--init" in calls[3] and "corpus_supervised" in calls[3]
    assert files["VAL_FILES"] in calls[4] and files["TRAIN_FILES"] in calls[0]
    for word in ("Paper", "Hardware", "Expected", "verl       0.9.1", "Data"):
        assert f"#   {word}" in head


def test_the_llm_recipe_composes(inputs):
    result = subprocess.run(
        ["bash", "recipes/mpdf_llm_qwen7b_math.sh"],
        cwd=REPO,
        env={**os.environ, "PRINT_OVERRIDES": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    overrides = [line for line in result.stdout.splitlines() if not line.startswith("hydra.")]
    assert "actor_rollout_ref.model.path=Qwen/Qwen2.5-7B-Instruct" in overrides
    here = [f"actor_rollout_ref.model.path={inputs}/model"]
    here += [f"data.{split}_files={inputs}/q.parquet" for split in ("train", "val")]
    config = configured(inputs, *overrides, *here)
    mpdf.check(config)
    assert config.algorithm.adv_estimator == "softrankpo" and config.trainer.v1.trainer_mode == "mpdf"
    assert (config.mpdf.agents, config.mpdf.rounds, config.mpdf.tau) == (3, 3, 0.5)


def test_a_missing_data_file_is_one_line(tmp_path):
    result = subprocess.run(
        ["bash", "recipes/mpdf_qwen25_3b_math.sh"],
        cwd=REPO,
        env={"PATH": os.environ["PATH"], "RUNS": str(tmp_path), "DATA_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (
        result.returncode == 2
        and result.stderr.count("\n") == 1
        and "run python data_prep/build_math.py" in result.stderr
    )
