"""Every command says what is wrong in one line, with exit code 2, before anything heavy is imported or written.

What was imported is read from Python's own list (PYTHONPROFILEIMPORTTIME), which covers the commands that a recipe
starts, too.
"""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPO

HEAVY = {"torch", "ray", "vllm", "verl", "transformers"}
SHARED = ("_common.py", "rollouts.py", "lib.sh", "mpdf_lib.sh")  # imported or sourced, never run


def scripts(folder: str, ending: str) -> list[str]:
    return [str(p.relative_to(REPO)) for p in sorted((REPO / folder).glob(f"*.{ending}")) if p.name not in SHARED]


PROGRAMS = {
    "rema-verl": ["-m", "rema_verl.cli"],
    **{f"rema-verl {name}": ["-m", "rema_verl.cli", name] for name in ("doctor", "show", "report")},
    **{script: [script] for folder in ("data_prep", "recipes") for script in scripts(folder, "py")},
    **{name: ["-m", f"rema_verl.deliberation.{name}"] for name in ("collect", "train", "evaluate")},
}
RECIPES = scripts("recipes", "sh")


def run(words: list, **environment) -> tuple[int, str, list[str], set[str]]:
    """(exit code, stdout, lines on stderr, heavy packages imported) of a command and its children."""
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    done = subprocess.run(
        [str(word) for word in words],
        cwd=REPO,
        env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1", "PATH": path} | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    lines = done.stderr.splitlines()
    imported = {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}
    said = [line for line in lines if not line.startswith("import time:")]
    return done.returncode, done.stdout, said, HEAVY & imported


def refused(words: list, message: str, **environment) -> None:
    code, _, said, heavy = run(words, **environment)
    assert code == 2 and len(said) == 1 and "error: " in said[0] and message in said[0], said
    assert not heavy


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_costs_no_heavy_import(program):
    code, out, said, heavy = run([sys.executable, *PROGRAMS[program], "--help"])
    assert code == 0 and "usage: " in out and not said and not heavy


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_unknown_flag_is_one_line(program):
    refused([sys.executable, *PROGRAMS[program], "--no-such-flag"], "(see --help)")


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_of_a_recipe_is_its_head(recipe, tmp_path):
    code, out, said, _ = run(["bash", recipe, "--help"], RUNS=str(tmp_path / "runs"))
    assert code == 0 and not said and len(out.splitlines()) >= 2
    if recipe != "recipes/eval_judge.sh":  # eval_math.sh's, which it calls
        assert out.splitlines()[0] == (REPO / recipe).read_text().splitlines()[1].removeprefix("# ")
    assert not (tmp_path / "runs").exists()


# program -> (arguments, what the line names); {} is a folder
MISTAKES = [
    ("rema-verl show", "/nowhere", "/nowhere"),
    ("rema-verl report", "/nowhere", "/nowhere"),
    ("rema-verl doctor", "--data /nowhere.parquet", "--data /nowhere.parquet: no such file"),
    ("rema-verl doctor", "--recipe /nowhere.sh", "--recipe /nowhere.sh: no such file"),
    ("rema-verl doctor", "--model /nowhere/model", "--model /nowhere/model: no such folder"),
    ("data_prep/build_math.py", "--source /nowhere.jsonl --out {}/out", "/nowhere.jsonl: no such file"),
    ("data_prep/build_math.py", "--levels 3-9 --out {}/out", "--levels '3-9'"),
    ("data_prep/build_sft.py", "--tagged /nowhere.jsonl --out {}/out", "/nowhere.jsonl: no such file"),
    ("data_prep/build_judge.py", "--source /nowhere.jsonl --out {}/out", "/nowhere.jsonl: no such file"),
    ("data_prep/build_judge.py", "--train-size many --out {}/out", "'many' is not a whole number"),
    ("data_prep/build_eval_suite.py", "--train /nowhere.parquet --out {}/out", "/nowhere.parquet: no such file"),
    ("data_prep/build_smoke.py", "--overrides /nowhere.txt --out {}/out", "/nowhere.txt: no such file"),
    ("data_prep/build_smoke.py", "--overrides {}/misspelt.txt --out {}/out", "'data.train_batchsize'"),
    ("data_prep/build_smoke.py", "--train /nowhere.parquet --val /nowhere.parquet --out {}/out", "/nowhere.parquet"),
    ("data_prep/build_tiny.py", "--train 0 --out {}/out", "--train: '0' is not a whole number"),
    ("data_prep/build_tiny_mpdf.py", "--train 5000 --out {}/out", "--train 5000"),
    ("data_prep/filter_difficulty.py", "--data /nowhere.parquet --journal {} --out {}/out", "/nowhere.parquet"),
    ("data_prep/filter_difficulty.py", "--data {}/q.parquet --role reasoning --run /a/b --out {}/out", "/a/b: no such"),
    ("recipes/evaluate.py", "m --questions /nowhere.parquet --out {}/out", "/nowhere.parquet: no such file"),
    ("recipes/evaluate.py", "m --questions {}/bad.parquet --out {}/out", "bad.parquet: row 2: 'reward_model' has no"),
    ("recipes/evaluate.py", "/a/model --questions {}/q.parquet --out {}/out", "/a/model: no such model folder"),
    ("recipes/evaluate.py", "m --questions {}/q.parquet --out {}/out -- rema.max_turn=1", "rema.max_turn"),
    ("recipes/watch.py", "--title x --log {}/out/log -- no-such-command", "no-such-command"),
    ("recipes/overrides.py", "/nowhere.yaml", "/nowhere.yaml: no such file"),
    ("recipes/mpdf_results.py", "/nowhere.json", "/nowhere.json: not a readable results.json"),
    ("recipes/quickstart_result.py", "--run /nowhere --steps 1 --seconds 1", "/nowhere/metrics: no validation"),
    ("collect", "--model /a/model --questions {}/q.parquet --out {}/out", "--model /a/model: cannot load it"),
    ("collect", "--model m --questions /nowhere.parquet --out {}/out", "/nowhere.parquet: no such file"),
    ("collect", "--model m --questions {}/bad.parquet --out {}/out", "bad.parquet: row 2: 'reward_model' has no"),
    ("collect", "--model m --questions {}/q.parquet --out {}/out -- data.x=1", "verl's options: Could not override"),
    ("collect", "--model m --questions {}/q.parquet --out {}/out --policy /p.safetensors", "/p.safetensors: no such"),
    ("collect", "--model m --questions {}/q.parquet --out {}/begun --seed 1", "begun: was begun with another"),
    ("evaluate", "--model m --questions {}/q.parquet --out {}/out --policy a=/p", "/p: no such file"),
    ("evaluate", "--model m --questions {}/q.parquet --out {}/out --policy debate=uniform", "name 'debate' is taken"),
    ("train", "--stage supervised --corpus /nowhere --out {}/out/p.safetensors", "--corpus /nowhere: no such folder"),
    ("train", "--stage softrankpo --init /p --corpus {} --out {}/out/p.safetensors", "/p: no such file"),
    ("train", "--stage supervised --corpus {} --out {}/out/p.safetensors --lr 0", "lr must be a positive number"),
]
ROW = {"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2"}, "data_source": "s"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    rows = [ROW | {"extra_info": {"id": str(i)}} for i in range(2)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "q.parquet")
    rows[1] = rows[1] | {"reward_model": {"ground_truth": " "}}
    pq.write_table(pa.Table.from_pylist(rows), folder / "bad.parquet")
    (folder / "misspelt.txt").write_text("data.train_batchsize=4\n")
    (folder / "begun").mkdir()
    (folder / "begun" / "settings.json").write_text(json.dumps({"seed": 0}))
    return folder


@pytest.mark.parametrize(("program", "arguments", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(program, arguments, message, inputs):
    words = [word.replace("{}", str(inputs)) for word in arguments.split()]
    refused([sys.executable, *PROGRAMS[program], *words], message)
    assert not (inputs / "out").exists()


# recipe -> (arguments, what the line names)
RECIPE_MISTAKES = [
    ("rema_llama8b_math", "data.train_batchsize=4", "Could not override 'data.train_batchsize'"),
    ("rema_llama8b_math", "data.train_batch_size=four", "data.train_batch_size must be a whole number, got 'four'"),
    ("rema_llama8b_math", "data.train_batch_size=[4", "data.train_batch_size=[4"),
    ("rema_llama8b_math", "data.train_files=/nowhere.parquet", "data.train_files: /nowhere.parquet: no such file"),
    ("rema_llama8b_math", "data.val_files={}/bad.parquet", "bad.parquet: row 2: 'reward_model' has no ground_truth"),
    ("rema_llama8b_math", "actor_rollout_ref.model.path=/a/model", "actor_rollout_ref.model.path=/a/model: cannot"),
    ("rema_llama8b_math", "algorithm.adv_estimator=role_grop", "algorithm.adv_estimator=role_grop is not a"),
    ("rema_llama8b_math", "trainer.test_freq=${no.such}", "trainer.test_freq: Interpolation key 'no.such'"),
    ("rema_llama8b_math", "+device=gpu", "Could not find 'device/gpu' Available options in 'device': cpu"),
    ("rema_llama8b_math", "--no-such-flag", "--no-such-flag"),
    ("rema_llama8b_math", "rema.max_turns=0", "rema.max_turns must be at least 1, got 0"),
    ("rema_llama8b_math", "actor_rollout_ref.actor.grad_clip=0.5", "set actor_rollout_ref.actor.optim.clip_grad"),
    ("rema_llama8b_math", "custom_reward_function.path=/a.py", "set reward.custom_reward_function.path"),
    ("mpdf_llm_qwen7b_math", "mpdf.agents=1", "mpdf.agents must be at least 2, got 1"),
    (
        "mpdf_llm_qwen7b_math",
        "trainer.v1.trainer_mode=sync",
        "default_agent_loop=mpdf needs trainer.v1.trainer_mode=mpdf",
    ),
    ("rema_sft_qwen25_7b", "data.max_len=4", "Could not override 'data.max_len'"),
    ("rema_sft_qwen25_7b", "model.path=/a/model", "model.path=/a/model: cannot load"),
    ("rema_sft_qwen25_7b", "data.train_files=/nowhere.parquet", "data.train_files: /nowhere.parquet: no such file"),
    ("rema_separate_qwen25_7b_math", "rema.switch.freq=0", "rema.switch.freq must be a whole number of at least 1"),
    ("mpdf_llama8b_math", "mpdf.agents=1", "mpdf_llama8b_math.sh takes no arguments"),
    ("eval_math", "--no-such-flag", "--no-such-flag: a model comes first"),
    ("eval_math", "/a/model", "/a/model: no such model folder"),
    ("eval_math", "m rema.max_turn=1", "rema.max_turn"),
    ("quickstart", "data.train_batchsize=4", "Could not override 'data.train_batchsize'"),
    ("quickstart", "rema.max_turns=0", "rema.max_turns must be at least 1, got 0"),
    ("smoke", "recipes/no_such.sh", "recipes/no_such.sh: no such recipe"),
]


@pytest.mark.parametrize(("recipe", "arguments", "message"), RECIPE_MISTAKES)
def test_a_mistake_in_a_recipes_command(recipe, arguments, message, inputs, tmp_path):
    words = [word.replace("{}", str(inputs)) for word in arguments.split()]
    rows = str(inputs / "q.parquet")
    environment = {"TRAIN_FILES": rows, "VAL_FILES": rows, "SUITE": rows, "RUNS": str(tmp_path / "runs")}
    refused(["bash", f"recipes/{recipe}.sh", *words], message, **environment)
    assert not (tmp_path / "runs").exists()


def test_a_mistake_is_found_before_smoke_inputs_are_made(tmp_path):
    for recipe in ("rema_llama8b_math", "mpdf_llm_qwen7b_math", "rema_sft_qwen25_7b"):
        environment = {"SMOKE": "1", "RUNS": str(tmp_path / "runs"), "DATA_DIR": str(tmp_path)}
        refused(["bash", f"recipes/{recipe}.sh", "data.train_batchsize=4"], "'data.train_batchsize'", **environment)
        assert not (tmp_path / "runs").exists()


def test_a_right_command_passes_in_silence(inputs):
    files = [f"data.{split}_files={inputs}/q.parquet" for split in ("train", "val")]
    for name in ("rema_trainer", "mpdf_trainer", "sft_trainer_engine"):
        supervised = name == "sft_trainer_engine"
        words = files[:1] if supervised else [*files, "data.train_batch_size=256"]
        words.append("model.path=a/model" if supervised else "actor_rollout_ref.model.path=a/model")
        code, out, said, heavy = run([sys.executable, "-m", "rema_verl.checks", "--config-name", name, *words])
        assert (code, out, said, heavy) == (0, "", [], set())
