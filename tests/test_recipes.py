"""Every recipe composes, passes our checks and verl's, and holds the paper's hyper-parameters; families run for real.

The numbers in this file are typed from ReMA (NeurIPS-25), its appendix on settings and, where said, the authors' code.
"""

import argparse
import functools
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPO, make_tokenizer
from omegaconf import OmegaConf

from rema_verl import checks
from rema_verl.dialogue import ROLES

sys.path.insert(0, str(REPO / "recipes"))
from overrides import leaves

# --- the paper's numbers -------------------------------------------------------------------------------------------

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"

# Single-turn set-up: OpenRLHF, REINFORCE++, temperature 1, top-p 1, max generation 2048, rollout batch 1000, 4 samples
# per prompt, Adam lr 5e-7, mini-batch 500, clip 0.2, KL 1e-2, 8 GPUs.
SINGLE_TURN = {
    "data.train_batch_size": 1000,
    "data.max_response_length": 2048,
    f"{ROLLOUT}.n": 4,
    f"{ROLLOUT}.temperature": 1.0,
    f"{ROLLOUT}.top_p": 1.0,
    f"{ACTOR}.optim.lr": 5e-7,
    f"{ACTOR}.clip_ratio_low": 0.2,
    f"{ACTOR}.clip_ratio_high": 0.2,
    f"{ACTOR}.policy_loss.loss_mode": "vanilla",
    f"{ACTOR}.use_kl_loss": False,
    "algorithm.use_kl_in_reward": True,
    "algorithm.kl_ctrl.kl_coef": 1e-2,
    "algorithm.kl_ctrl.type": "fixed",
    "rema.max_turns": 1,
    # appendix on rewards: correct, wrong but boxed, no box
    "rema.reward.reasoning": "graded",
    "rema.reward.correct": 1.0,
    "rema.reward.wrong": -0.5,
    "rema.reward.no_answer": -1.0,
    "rollouts per update": 500,
    "gpus": 8,
}
SINGLE_AGENT = SINGLE_TURN | {
    "algorithm.adv_estimator": "reinforce_plus_plus",
    "trainer.v1.trainer_mode": "sync",
    f"{ROLLOUT}.agent.default_agent_loop": "single_turn_agent",
    "reward.reward_manager.name": "rema",
}
JUDGE = SINGLE_AGENT | {"rema.task": "judge"}
TWO_ROLES = SINGLE_TURN | {
    "algorithm.adv_estimator": "turn_reinforce_plus_plus",
    "trainer.v1.trainer_mode": "rema",
    f"{ROLLOUT}.agent.default_agent_loop": "rema",
    "rema.reward.meta_thinking": "correctness",
    "rema.reward.leak": -1.0,
    "rema.answers_per_plan": 4,
}

# Algorithm 1: the low level first, with the high level frozen. (The planner's answers count in its own phase only.)
SEPARATE = TWO_ROLES | {
    "trainer.v1.trainer_mode": "rema_separate",
    "rema.roles.reasoning.trainable": True,
    "rema.roles.meta_thinking.trainable": False,
    "rema.answers_per_plan": 1,
}

# Multi-turn set-up: GRPO, 128 prompts x 16 trajectories, 4 mini-batches, lr 1e-6, no KL, log-ratio clipped at 3.0, 500
# steps, max prompt 4096, validation every 10 steps, 32 GPUs; authors' code: clip 0.2, dual clip 3, entropy 0, mean over
# a trajectory's turns, reward 0 unless finished. Reported: 30 turns of 512 tokens.
MULTI_TURN = {
    "data.train_batch_size": 128,
    "data.max_prompt_length": 4096,
    "data.max_response_length": 512,
    f"{ROLLOUT}.n": 16,
    f"{ROLLOUT}.temperature": 1.0,
    f"{ACTOR}.optim.lr": 1e-6,
    f"{ACTOR}.clip_ratio_low": 0.2,
    f"{ACTOR}.clip_ratio_high": 0.2,
    f"{ACTOR}.clip_ratio_c": 3.0,
    f"{ACTOR}.entropy_coeff": 0,
    f"{ACTOR}.use_kl_loss": False,
    f"{ACTOR}.policy_loss.loss_mode": "turn_clip",
    f"{ACTOR}.policy_loss.turn_ratio": "geometric",
    f"{ACTOR}.policy_loss.turn_agg": "trajectory",
    f"{ACTOR}.policy_loss.log_ratio_cap": 3.0,
    "algorithm.adv_estimator": "role_grpo",
    "algorithm.use_kl_in_reward": False,
    "rema.max_turns": 30,
    "rema.mask_unfinished": True,
    "rema.reward.reasoning": "final",
    "rema.reward.meta_thinking": "final",
    "trainer.v1.trainer_mode": "rema",
    f"{ROLLOUT}.agent.default_agent_loop": "rema",
    "trainer.total_training_steps": 500,
    "trainer.test_freq": 10,
    "updates per step": 4,
    "gpus": 32,
}
# Ablation on 133 questions: 300 steps, 8 GPUs.
MINI = MULTI_TURN | {"data.max_response_length": 256, "trainer.total_training_steps": 300, "gpus": 8}
# Its control in every recipe family: one agent, the same data, batch, learning rate, steps and reward.
GRPO = MULTI_TURN | {
    "data.max_prompt_length": 1024,
    "data.max_response_length": 3584,
    f"{ACTOR}.policy_loss.loss_mode": "vanilla",
    "algorithm.adv_estimator": "grpo",
    "rema.max_turns": 1,
    "trainer.v1.trainer_mode": "sync",
    f"{ROLLOUT}.agent.default_agent_loop": "single_turn_agent",
}
# Cold start: 3 epochs, lr 1e-5 cosine, batch 8, cutoff 4096.
COLD_START = {
    "trainer.total_epochs": 3,
    "optim.lr": 1e-5,
    "optim.lr_scheduler_type": "cosine",
    "data.train_batch_size": 8,
    "data.max_length": 4096,
}

LLAMA3, LLAMA31 = "meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"
QWEN, QWEN_BASE, QWEN_MATH = "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-Math-7B"
COLD = "rema_sft_qwen25_7b/model"
CONTEXT = {LLAMA3: 8192, LLAMA31: 131072, QWEN: 32768, QWEN_BASE: 131072, QWEN_MATH: 4096} | {
    "meta-llama/Llama-3.2-1B-Instruct": 131072,
    COLD: 131072,
    "sft_qwen25math_7b/model": 4096,
}
EPISODES = "trainer.total_epochs"
BINARY = {"rema.reward.reasoning": "final"}

# recipe -> (model, what the paper says)
RECIPES = {
    "vrp_rl_llama3_8b_math": (LLAMA3, SINGLE_AGENT | {EPISODES: 12, f"{ACTOR}.optim.lr": 2e-7}),
    "vrp_rl_llama31_8b_math": (LLAMA31, SINGLE_AGENT | {EPISODES: 6}),
    "vrp_rl_qwen25_7b_math": (QWEN, SINGLE_AGENT | {EPISODES: 6}),
    "mrp_rl_llama3_8b_math": (LLAMA3, SINGLE_AGENT | {EPISODES: 10}),
    "mrp_rl_llama31_8b_math": (LLAMA31, SINGLE_AGENT | {EPISODES: 6}),
    "mrp_rl_qwen25_7b_math": (QWEN, SINGLE_AGENT | {EPISODES: 6}),
    "vrp_rl_llama31_8b_judge": (LLAMA31, JUDGE | {EPISODES: 4}),
    "vrp_rl_qwen25_7b_judge": (QWEN, JUDGE | {EPISODES: 6}),
    "mrp_rl_llama31_8b_judge": (LLAMA31, JUDGE | {EPISODES: 4}),
    "mrp_rl_qwen25_7b_judge": (QWEN, JUDGE | {EPISODES: 6}),
    "rema_sft_qwen25_7b": (QWEN_BASE, COLD_START),
    "rema_qwen25_7b_math": (COLD, MULTI_TURN),
    "rema_qwen25_7b_math_t30_256": (COLD, MULTI_TURN | {"data.max_response_length": 256}),
    "rema_qwen25_7b_math_t60_256": (COLD, MULTI_TURN | {"data.max_response_length": 256, "rema.max_turns": 60}),
    "rema_qwen25_7b_mini133_t256": (COLD, MINI),
    "rema_qwen25_7b_mini133_t1024": (
        COLD,
        MINI | {"data.max_response_length": 1024, "data.max_prompt_length": 3072},
    ),
    "rema_qwen25_7b_mini133_token_ratio": (COLD, MINI | {f"{ACTOR}.policy_loss.turn_ratio": "token"}),
    "rema_qwen25_7b_mini133_separate": (
        COLD,
        MINI
        | {
            "trainer.v1.trainer_mode": "rema_separate",
            "rema.switch.level": "step",
            "rema.switch.freq": 10,
            "rema.switch.start": "meta_thinking",
        },
    ),
    "rema_separate_llama3_8b_math": (LLAMA3, SEPARATE | {EPISODES: 4}),
    "rema_separate_llama31_8b_math": (LLAMA31, SEPARATE | {EPISODES: 4}),
    "rema_separate_qwen25_7b_math": (QWEN, SEPARATE | {EPISODES: 4}),
    "rema_separate_llama31_8b_judge": (LLAMA31, SEPARATE | {EPISODES: 2, "rema.task": "judge"}),
    "rema_separate_qwen25_7b_judge": (QWEN, SEPARATE | {EPISODES: 1, "rema.task": "judge"}),
    "rema_llama8b_math": (LLAMA31, MULTI_TURN | {"gpus": 8}),
    "grpo_qwen25_7b_math": (COLD, GRPO),
    "grpo_llama8b_math": (LLAMA31, GRPO | {"gpus": 8}),
    "rema_consistency_qwen25_7b_math": (QWEN, TWO_ROLES | {"rema.reward.meta_thinking": "consistency"}),
    "rema_json_llama32_1b_math": ("meta-llama/Llama-3.2-1B-Instruct", TWO_ROLES | {"rema.plan": "json"}),
    "rema_json_llama31_8b_math": (LLAMA31, TWO_ROLES | {"rema.plan": "json"}),
    "rl_from_base_qwen25math_7b": (QWEN_MATH, SINGLE_AGENT | BINARY),
    "rl_from_sft_qwen25math_7b": ("sft_qwen25math_7b/model", SINGLE_AGENT | BINARY),
    "rl_under_meta_thinking_qwen25math_7b": (
        QWEN_MATH,
        TWO_ROLES | BINARY | {"rema.reward.meta_thinking": "final", "rema.answers_per_plan": 1},
    ),
}
# recipe -> update iterations, and the success rates that keep a question
ALTERNATING = {
    "rema_separate_llama3_8b_math": (3, 0.2, 0.8),
    "rema_separate_llama31_8b_math": (3, 0.2, 0.8),
    "rema_separate_qwen25_7b_math": (10, 0.2, 0.8),
    "rema_separate_llama31_8b_judge": (1, 0.2, 0.8),
    "rema_separate_qwen25_7b_judge": (1, 0.1, 0.9),
}
SUPERVISED = {"rema_sft_qwen25_7b"}


# --- reading a recipe ----------------------------------------------------------------------------------------------


@functools.cache
def overrides_of(recipe: str) -> tuple[str, ...]:
    """What the script would pass to verl."""
    knobs = ("MODEL", "TOKENIZER", "TRAIN_FILES", "VAL_FILES", "DATA_DIR", "SMOKE", "GPUS", "NODES", "LR", "STEPS")
    environment = {k: v for k, v in os.environ.items() if k not in knobs}
    result = subprocess.run(
        ["bash", f"recipes/{recipe}.sh"],
        cwd=REPO,
        env=environment | {"PRINT_OVERRIDES": "1", "RUNS": "/runs"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and not result.stderr, result.stderr
    return tuple(result.stdout.splitlines())


@functools.cache
def config_of(recipe: str, *more: str):
    """The whole configuration, composed strictly: an unknown key is an error."""
    name = "sft_trainer_engine" if recipe in SUPERVISED else "rema_trainer"
    return importlib.import_module("build_smoke").compose_recipe(name, [*overrides_of(recipe), *more])


def smoke_overrides(recipe: str, inputs: Path) -> list[str]:
    """What SMOKE=1 adds (recipes/lib.sh), with some other inputs."""
    build_smoke = importlib.import_module("build_smoke")
    supervised = recipe in SUPERVISED
    files = ["size/smoke_sft.yaml"] if supervised else ["device/cpu.yaml", "size/smoke.yaml"]
    lines = [
        f"++{key}={value}" for f in files for key, value in leaves(OmegaConf.load(REPO / "rema_verl" / "config" / f))
    ]
    own = build_smoke.smoke_overrides(config_of(recipe), inputs, supervised)
    return [*lines, *(f"++{line}" for line in own)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A data file and a tokenizer folder, where SMOKE=1 would have them."""
    folder = tmp_path_factory.mktemp("recipes")
    row = {"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2"}, "data_source": "s"}
    for split in ("train", "val"):
        pq.write_table(pa.Table.from_pylist([row] * 3), folder / f"{split}.parquet")
    make_tokenizer("qwen2").save_pretrained(folder / "model")
    return folder


def header(recipe: str) -> dict[str, str]:
    """The fields of the comment at the script's head, continuation lines joined."""
    fields, key = {}, None
    for line in (REPO / "recipes" / f"{recipe}.sh").read_text().split("\nsource ", 1)[0].splitlines():
        if match := re.match(r"#   (\S+) +(\S.*)", line):
            key = match[1]
            fields[key] = match[2]
        elif key and line.startswith("#    "):
            fields[key] = fields[key].removesuffix("\\").rstrip() + " " + line[1:].strip()
    return fields


# --- fast tests ----------------------------------------------------------------------------------------------------


def test_every_recipe_is_in_the_table_and_in_the_index():
    scripts = {path.stem for path in (REPO / "recipes").glob("*.sh") if "+setting=" in path.read_text()}
    assert scripts == set(RECIPES)
    index = (REPO / "recipes" / "README.md").read_text()
    assert [r for r in RECIPES if f"| `{r}.sh` |" not in index] == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_holds_the_papers_numbers(recipe):
    model, numbers = RECIPES[recipe]
    config = config_of(recipe)
    path = config.model.path if recipe in SUPERVISED else config.actor_rollout_ref.model.path
    assert path == model or path.endswith(f"/{model}")
    derived = {}
    if recipe not in SUPERVISED:
        prompts, mini_batch = config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size
        derived = {
            "rollouts per update": mini_batch * config.actor_rollout_ref.rollout.n,
            "updates per step": prompts / mini_batch,
            "gpus": config.trainer.n_gpus_per_node * config.trainer.nnodes,
        }
    wrong = {
        key: (found, number)
        for key, number in numbers.items()
        if (found := derived[key] if key in derived else OmegaConf.select(config, key, throw_on_missing=True)) != number
    }
    assert not wrong


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - SUPERVISED))
def test_recipe_passes_the_checks(recipe, inputs):
    from verl.utils.config import validate_config

    own = {key for key, _ in (line.split("=", 1) for line in overrides_of(recipe))}
    assert {"data.train_files", "data.val_files", "actor_rollout_ref.model.path"} <= own
    more = [f"data.{split}_files={inputs}/{split}.parquet" for split in ("train", "val")]
    more += [f"actor_rollout_ref.model.path={inputs}/model", "actor_rollout_ref.model.tokenizer_path=null"]
    config = config_of(recipe, *more)
    checks.check(config)
    validate_config(config, use_reference_policy=config.algorithm.use_kl_in_reward, use_critic=False)

    # what verl finds out in the first step
    actor, rows = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout.n
    rows *= actor.ppo_mini_batch_size * (len(ROLES) if config.trainer.v1.trainer_mode == "rema" else 1)
    workers = config.trainer.n_gpus_per_node * config.trainer.nnodes // actor.ulysses_sequence_parallel_size
    assert rows % workers == 0
    length = config.data.max_prompt_length + config.data.max_response_length
    assert length <= min(CONTEXT[RECIPES[recipe][0]], actor.ppo_max_token_len_per_gpu)
    assert config.trainer.total_training_steps or config.trainer.total_epochs <= 12


@pytest.mark.parametrize("recipe", RECIPES)
def test_smoke_changes_size_rate_and_device_only(recipe, inputs):
    config, smoke = config_of(recipe), config_of(recipe, *smoke_overrides(recipe, inputs))
    assert smoke.trainer.device == "cpu" and smoke.trainer.total_training_steps == 2
    if recipe in SUPERVISED:
        return
    checks.check(smoke)
    assert smoke.rema.max_turns == min(config.rema.max_turns, 3)
    sizes = {"data.train_batch_size", "data.max_prompt_length", "data.max_response_length", "rema.max_turns"}
    sizes |= {f"{ROLLOUT}.n", "trainer.total_epochs", "trainer.total_training_steps", "trainer.test_freq"}
    sizes.add("actor_rollout_ref.actor.optim.lr")  # a tiny model's, with which ratios leave 1
    kept = set(RECIPES[recipe][1]) - sizes - {"rollouts per update", "updates per step", "gpus"}
    assert {k for k in kept if OmegaConf.select(smoke, k) != OmegaConf.select(config, k)} == set()
    named = str(inputs / "model")
    assert smoke.actor_rollout_ref.rollout.engine_kwargs.vllm.get("tokenizer", named) == named


@pytest.mark.parametrize("recipe", RECIPES)
def test_header_says_what_a_user_must_know(recipe):
    fields = header(recipe)
    assert {"Paper", "Hardware", "Expected", "verl", "Data", "Here"} <= set(fields)
    assert fields["verl"] == "0.9.1" and "GPU" in fields["Hardware"]
    assert fields["Here"].startswith("not run on GPUs; SMOKE=1 makes two real steps on CPU")
    text = (REPO / "recipes" / f"{recipe}.sh").read_text()
    assert len(text.splitlines()) <= 35 and os.access(REPO / "recipes" / f"{recipe}.sh", os.X_OK)

    # the data command: options the script knows, the same as the one that is named where data are missing
    script, *arguments = shlex.split(fields["Data"].split(" (")[0].removeprefix("python "))
    parsed = importlib.import_module(Path(script).stem).parse_args(arguments)
    needed = shlex.split(re.search(r'^need "python (.*?)"', text, re.MULTILINE)[1].replace("$DATA_DIR", "data"))
    folder = re.search(r"^DATA=\$DATA_DIR/(\S+)", text, re.MULTILINE)[1]
    assert needed[0] == script and needed[-2:] == ["--out", "$DATA"] and str(parsed.out) == f"data/{folder}"
    assert needed[1:-2] == [a for a in arguments if a not in ("--out", str(parsed.out))]


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.split("_")[0] in ("vrp", "mrp")])
def test_controls_quote_the_papers_results_and_read_data_with_their_own_prompt(recipe):
    method, model, task = re.fullmatch(r"(vrp|mrp)_rl_(\w+)_(math|judge)", recipe).groups()
    assert f"--prompt {method}" in header(recipe)["Data"]
    tables = json.loads((REPO / "recipes" / "paper_results.json").read_text())["tables"]
    lines = (REPO / "recipes" / "README.md").read_text().splitlines()
    index = next(line for line in lines if f"`{recipe}.sh`" in line)
    cells = {
        "math": [("math", "math500"), ("math", "average")],
        "judge": [("judge_strict", "rewardbench"), ("judge_loose", "rewardbench")],
    }
    for table, column in cells[task]:
        results = tables[table]["results"][model]
        trained, untrained = (f"{results[name][column]:.2f}" for name in (f"{method}_rl", "vrp"))
        assert trained in index and trained in header(recipe)["Expected"]
        assert untrained in header(recipe)["Expected"]


@pytest.mark.parametrize("recipe", ALTERNATING)
def test_roles_learn_one_after_the_other(recipe, tmp_path):
    """What `alternate` starts, with stand-ins for Python and the models that each run would leave."""
    iterations, low, high = ALTERNATING[recipe]
    stand_in = tmp_path / "bin" / "python"
    stand_in.parent.mkdir()
    stand_in.write_text(
        """#!/bin/bash
echo "$@" >> "$CALLS"
for argument in "$@"; do
  case $argument in trainer.default_local_dir=*) mkdir -p "${argument#*=}"
    echo 7 > "${argument#*=}/latest_checkpointed_iteration.txt"
    for role in reasoning meta_thinking; do mkdir -p "${argument#*=}/global_step_7/actor/$role/huggingface"; done;; esac
done
"""
    )
    stand_in.chmod(0o755)
    files = {"TRAIN_FILES": __file__, "VAL_FILES": __file__, "MODEL": "base", "RUNS": str(tmp_path / "runs")}
    environment = {"PATH": f"{stand_in.parent}:/usr/bin:/bin", "CALLS": str(tmp_path / "calls"), **files}
    for _ in range(2):  # the second time everything is there
        subprocess.run(["bash", f"recipes/{recipe}.sh"], cwd=REPO, env=environment, check=True, capture_output=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    checks_first = [call for call in calls if call.startswith("-m rema_verl.checks --config-name rema_trainer ")]
    assert calls[0] in checks_first  # before questions are filtered, and before each run
    assert len(checks_first) == 2 + 2 * iterations
    calls = [call for call in calls if call not in checks_first]
    assert len(calls) == 2 * 2 * iterations

    models = dict.fromkeys(ROLES, "base")
    for i in range(2 * iterations):
        role, other = ROLES[::-1] if i % 2 == 0 else ROLES
        run = f"{tmp_path}/runs/{recipe}_{i // 2 + 1}_{role}"
        kept, trained = calls[2 * i].split(), calls[2 * i + 1].split()
        assert kept[0] == "data_prep/filter_difficulty.py"
        options = dict(zip(kept[1::2], kept[2::2], strict=False))
        assert (options["--role"], float(options["--min"]), float(options["--max"])) == (role, low, high)
        assert (options["--run"], options["--reasoning-model"]) == tuple(models[r] for r in ROLES)
        assert f"data.train_files={options['--out']}/filtered.parquet" in trained
        assert f"trainer.default_local_dir={run}/checkpoints" in trained
        assert f"rema.roles.{other}.trainable=false" in trained and f"rema.roles.{role}.trainable=false" not in trained
        assert ("rema.answers_per_plan=1" in trained) == (role == "reasoning")
        for r in ROLES:
            assert (f"rema.roles.{r}.model_path={models[r]}" in trained) == (models[r] != "base")
        models[role] = f"{run}/model"


def test_knobs_outrank_the_recipe_and_the_command_line_outranks_both():
    def run(*arguments: str, **environment: str) -> list[str]:
        return subprocess.run(
            ["bash", "recipes/vrp_rl_llama3_8b_math.sh", *arguments],
            cwd=REPO,
            env={"PATH": os.environ["PATH"], "PRINT_OVERRIDES": "1", **environment},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()

    rates = [line for line in run("actor_rollout_ref.actor.optim.lr=3", LR="2", GPUS="4") if ".lr=" in line]
    assert [rate.split("=")[1] for rate in rates] == ["2e-7", "2", "3"]
    assert "trainer.n_gpus_per_node=4" in run(GPUS="4") and "data.val_files=x.parquet" in run(VAL_FILES="x.parquet")


@pytest.mark.parametrize(
    ("recipe", "environment", "message"),
    [
        ("vrp_rl_qwen25_7b_judge", {}, "run python data_prep/build_judge.py --prompt vrp --out data/judge_vrp first"),
        ("rema_sft_qwen25_7b", {"SMOKE": "1", "TRAIN_FILES": "/nowhere.parquet"}, "/nowhere.parquet: no such file"),
        ("rema_qwen25_7b_math", {"TRAIN_FILES": __file__, "VAL_FILES": __file__}, "/model: no such model; make it as"),
    ],
)
def test_what_is_missing_is_one_line(recipe, environment, message, tmp_path):
    result = subprocess.run(
        ["bash", f"recipes/{recipe}.sh"],
        cwd=REPO,
        env={"PATH": "/usr/bin:/bin", "RUNS": str(tmp_path), "DATA_DIR": "data", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and message in result.stderr


def build_inputs(recipe: str, out: Path, monkeypatch, shared: Path | None = None) -> dict:
    """What data_prep/build_smoke.py makes for a recipe without data of its own; the manifest."""
    monkeypatch.setenv("REMA_SHARED_DATA", str(shared or ""))
    (out / "recipe.txt").write_text("\n".join(line for line in overrides_of(recipe) if not line.startswith("hydra.")))
    command = shlex.join(["python", *shlex.split(header(recipe)["Data"].split(" (")[0].removeprefix("python "))])
    config = "sft_trainer_engine" if recipe in SUPERVISED else "rema_trainer"
    arguments = ["--config", config, "--overrides", str(out / "recipe.txt"), "--data", command, "--out", str(out)]
    monkeypatch.chdir(out)  # where there is no data/
    importlib.import_module("build_smoke").main([*arguments, "--steps", "1"])
    return json.loads((out / "manifest.json").read_text())


@pytest.mark.parametrize(
    "recipe", ["mrp_rl_qwen25_7b_math", "vrp_rl_qwen25_7b_judge", "rema_qwen25_7b_mini133_t256", "rema_sft_qwen25_7b"]
)
def test_smoke_without_data_makes_synthetic_rows_with_the_recipes_own_command(recipe, tmp_path, monkeypatch):
    manifest = build_inputs(recipe, tmp_path, monkeypatch)
    assert manifest["kind_of_rows"] == "SYNTHETIC"
    rows = pq.read_table(tmp_path / "train.parquet").to_pylist()
    assert len(rows) == 8
    if recipe in SUPERVISED:
        assert {row["role"] for row in rows} == set(ROLES)
    else:
        assert (rows[0]["prompt"][0]["role"] == "system") == ("_rl_" in recipe)
        assert rows[0]["reward_model"]["style"] == ("verdict" if "judge" in recipe else "rule")
        assert all(row["data_source"].startswith("synthetic_") for row in rows)


def test_smoke_inputs_are_made_again_where_something_changed_only(tmp_path, monkeypatch):
    """Made once; then only looked at, without torch and verl, also from another folder."""
    recipe, cache = "rema_qwen25_7b_mini133_t256", tmp_path / "cache"
    monkeypatch.setenv("REMA_SMOKE_CACHE", str(cache))
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    made = build_inputs(recipe, first, monkeypatch)

    def again(folder: Path, *more: str) -> tuple[str, set[str]]:
        lines = [line for line in overrides_of(recipe) if not line.startswith("hydra.")]
        (folder / "recipe.txt").write_text("\n".join([*lines, f"trainer.default_local_dir={folder}", *more]))
        command = shlex.join(["python", *shlex.split(header(recipe)["Data"].split(" (")[0].removeprefix("python "))])
        arguments = ["--overrides", folder / "recipe.txt", "--data", command, "--out", folder, "--steps", "1"]
        done = subprocess.run(
            [sys.executable, "-X", "importtime", REPO / "data_prep/build_smoke.py", *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout, {line.split("|")[-1].strip() for line in done.stderr.splitlines()}

    before = (first / "model/model.safetensors").stat().st_mtime_ns
    for folder in (first, second):
        said, imported = again(folder)
        assert said.endswith(" already\n") and not imported & {"torch", "verl", "transformers", "hydra"}
        assert json.loads((folder / "manifest.json").read_text()) == made
        assert f"++actor_rollout_ref.model.path={folder}/model\n" in (folder / "overrides.txt").read_text()
    assert (first / "model/model.safetensors").stat().st_mtime_ns == before

    weights = (first / "model/model.safetensors").read_bytes()
    (second / "model/model.safetensors").write_bytes(b"half of it")
    shutil.rmtree(cache)
    assert again(second)[0].startswith("MATH in verl's format")  # damaged: made again, the same
    assert (second / "model/model.safetensors").read_bytes() == weights
    assert again(second, "rema.finish_flag='[END]'")[0].startswith("MATH in verl's format")


def test_fingerprint_of_smoke_inputs_follows_contents(tmp_path):
    build_smoke = importlib.import_module("build_smoke")
    file, other = tmp_path / "train.parquet", tmp_path / "elsewhere" / "train.parquet"
    other.parent.mkdir()
    args = {"data": "", "train": None, "val": None, "settings": [], "config": "rema_trainer"}
    args |= {"rows": 8, "steps": 1, "seed": 0}

    def key(*overrides: str, **changed) -> str:
        return build_smoke.fingerprint(argparse.Namespace(**args | changed), list(overrides))

    files = [f"data.train_files={file}", f"data.train_files=[{other}]"]
    file.write_text("a"), other.write_text("a")
    assert key(files[0]) == key(files[1]) == key(files[0], "trainer.nnodes=2") != key()
    other.write_text("b")
    assert len({key(files[0]), key(files[1]), key(files[0], "rema.plan=json"), key(files[0], seed=1)}) == 4
    commands = [f"python data_prep/build_math.py {option}--out {out}" for option in ("", "--mini ") for out in "xy"]
    assert len({key(data=command) for command in commands}) == 2


def test_recipe_without_data_says_so(tmp_path):
    result = subprocess.run(
        ["bash", "recipes/rema_llama8b_math.sh"],
        cwd=REPO,
        env={"PATH": "/usr/bin:/bin", "TRAIN_FILES": str(tmp_path / "none.parquet")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "build_math.py" in result.stderr
