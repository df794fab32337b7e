"""Every name resolves in verl's own registries, the import stays light, and failure is loud."""

import json
import os
import subprocess
import sys

import pytest

NAMES = [
    ("verl.experimental.agent_loop.agent_loop", "m._agent_loop_registry['rema']['_target_']"),
    ("verl.trainer.ppo.core_algos", "m.get_policy_loss_fn('turn_clip').__name__"),
    ("verl.trainer.ppo.core_algos", "m.get_adv_estimator_fn('softrankpo').__name__"),
    ("verl.trainer.ppo.core_algos", "m.get_adv_estimator_fn('role_grpo').__name__"),
    ("verl.trainer.ppo.core_algos", "m.get_adv_estimator_fn('turn_reinforce_plus_plus').__name__"),
    ("verl.experimental.reward_loop.reward_manager.registry", "m.get_reward_manager_cls('rema').__name__"),
    ("verl.trainer.ppo.v1.trainer_base", "m.get_trainer_cls('rema').__name__"),
    ("verl.checkpoint_engine.base", "m.CheckpointEngineRegistry.get('gloo').__name__"),
    ("verl.experimental.agent_loop.agent_loop", "m._agent_loop_registry['mpdf']['_target_']"),
    ("verl.experimental.reward_loop.reward_manager.registry", "m.get_reward_manager_cls('mpdf').__name__"),
    ("verl.trainer.ppo.v1.trainer_base", "m.get_trainer_cls('mpdf').__name__"),
    ("verl.trainer.ppo.v1.trainer_base", "m.get_trainer_cls('rema_separate').__name__"),
    ("verl.plugin.platform", "m.get_platform().device_name"),
    ("verl.workers.rollout.replica", "m.RolloutReplicaRegistry._registry['vllm'].__module__"),
]
OURS = {
    "m._agent_loop_registry['rema']['_target_']": "rema_verl.agent_loops.rema.",
    "m._agent_loop_registry['mpdf']['_target_']": "rema_verl.agent_loops.mpdf.MPDFAgentLoop",
    "m.get_reward_manager_cls('mpdf').__name__": "MPDFRewardManager",
    "m.get_trainer_cls('mpdf').__name__": "MPDFTrainer",
    "m.get_trainer_cls('rema').__name__": "ReMATrainer",
    "m.get_trainer_cls('rema_separate').__name__": "SeparateTrainer",
    "m.get_platform().device_name": "cpu",
    "m.RolloutReplicaRegistry._registry['vllm'].__module__": "rema_verl.platforms.vllm_cpu",
}


def python(code: str, cwd, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=os.environ | environment, check=False
    )


FORKS = """
import importlib, json, os, sys
import verl
bare = [m for m in sys.modules if m.startswith("rema_verl")]
print("BARE", json.dumps(bare), flush=True)
for module, lookups in json.loads(sys.argv[1]).items():
    if os.fork() == 0:  # each registry from a process that has imported verl and nothing else
        m = importlib.import_module(module)
        found = {lookup: str(eval(lookup)) for lookup in lookups}
        print("FOUND", json.dumps(found), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> tuple[set[str], dict[str, str]]:
    """After a bare ``import verl``: our modules, and what each name resolves to once its registry is imported."""
    lookups: dict[str, list[str]] = {}
    for module, lookup in NAMES:
        lookups.setdefault(module, []).append(lookup)
    command = [sys.executable, "-c", FORKS, json.dumps(lookups)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path_factory.mktemp("bare"))
    assert result.returncode == 0, result.stderr
    lines = [line.partition(" ") for line in result.stdout.splitlines()]
    found: dict[str, str] = {}
    for kind, _, text in lines:
        if kind == "FOUND":
            found |= json.loads(text)
    return set(json.loads(next(text for kind, _, text in lines if kind == "BARE"))), found


@pytest.mark.parametrize(("module", "lookup"), NAMES)
def test_names_resolve_after_a_bare_import(bare, module, lookup):
    assert bare[1][lookup].startswith(OURS.get(lookup, "")) and bare[1][lookup] not in ("", "None")


def test_bare_import_loads_nothing_heavy_of_ours(bare):
    """vLLM's workers import verl too: agent loop, trainer and rewards must wait until verl asks for them."""
    light = {"", ".plugin", ".compat", ".errors", ".platforms", ".platforms.cpu"}
    assert bare[0] == {f"rema_verl{name}" for name in light}


def test_cpu_is_chosen_by_itself_and_overridable(tmp_path):
    code = "import verl; from verl.plugin.platform import get_platform; print(get_platform().device_name)"
    environment = {k: v for k, v in os.environ.items() if k != "VERL_PLATFORM"}
    run = {"capture_output": True, "text": True, "cwd": tmp_path, "check": False}
    chosen = subprocess.run([sys.executable, "-c", code], env=environment, **run)
    assert chosen.stdout.split()[-1] == "cpu", chosen.stderr
    forced = subprocess.run([sys.executable, "-c", code], env={**environment, "VERL_PLATFORM": "nvidia"}, **run)
    assert forced.returncode == 0 and forced.stdout.split()[-1] == "cuda", forced.stderr


def fake_distribution(folder, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_untested_verl_is_refused_in_one_line(tmp_path):
    fake_distribution(tmp_path, "verl", "0.10.0")
    result = python("import verl; print('went on')", tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 2 and "went on" not in result.stdout
    lines = [line for line in result.stderr.splitlines() if line.startswith("rema-verl: error:")]
    assert len(lines) == 1
    assert "0.10.0" in lines[0] and "0.9.1" in lines[0] and "REMA_VERL_ALLOW_UNTESTED=1" in lines[0]


def test_untested_verl_can_be_allowed(tmp_path):
    fake_distribution(tmp_path, "verl", "0.10.0")
    code = "import verl; print('went on')"
    result = python(code, tmp_path, PYTHONPATH=str(tmp_path), REMA_VERL_ALLOW_UNTESTED="1")
    assert result.returncode == 0 and "went on" in result.stdout, result.stderr


@pytest.mark.parametrize("broken", ["wrapt", "pebble"])
def test_broken_plug_in_is_impossible_to_miss(tmp_path, broken):
    """verl logs a plug-in's exception at DEBUG and goes on; ours ends the process."""
    if broken == "wrapt":  # at import of the plug-in
        (tmp_path / "wrapt.py").write_text("raise ImportError('broken on purpose')")
        code = "import verl; print('went on')"
    else:  # later, when verl imports the registry
        (tmp_path / "pebble.py").write_text("raise ImportError('broken on purpose')")
        code = "import verl; import verl.experimental.reward_loop.reward_manager; print('went on')"
    result = python(code, tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 2 and "went on" not in result.stdout
    assert "rema-verl: error:" in result.stderr and "broken on purpose" in result.stderr


def test_cpu_is_not_taken_by_a_torch_built_for_an_accelerator(monkeypatch):
    """An actor without a visible GPU on a GPU machine must not end up on CPU."""
    import torch

    from rema_verl.platforms import cpu

    assert cpu.PlatformCPU().is_platform_available()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert not cpu.PlatformCPU().is_platform_available()


def test_cpu_is_taken_beside_an_nvidia_smi_that_torch_cannot_use(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    code = "import verl; from verl.plugin.platform import get_platform; print(get_platform().device_name)"
    environment = {k: v for k, v in os.environ.items() if k != "VERL_PLATFORM"}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    run = {"capture_output": True, "text": True, "cwd": tmp_path, "env": environment}
    assert subprocess.run([sys.executable, "-c", code], **run).stdout.split()[-1] == "cpu"
