"""The algorithms are free of verl, Ray, vLLM and transformers, and verl finds them by name all the same."""

import json
import subprocess
import sys

from rema_verl.plugin import CONTENTS, REGISTERED_BY

MODULES = ["softrankpo", "turn_clip", "advantages"]
CORE = "verl.trainer.ppo.core_algos"

ALONE = f"""
import importlib, json, pickle, sys

heavy = lambda: [name for name in ("ray", "vllm", "transformers", "verl") if name in sys.modules]
found = {{}}
for name in {MODULES}:
    importlib.import_module("rema_verl.algorithms." + name)
    found[name] = heavy()

import torch
from omegaconf import OmegaConf
from rema_verl.algorithms import turn_clip

clip = {{"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 3.0}}
config = OmegaConf.create(clip | {{"policy_loss": {{"turn_agg": "turn"}}}})
zeros, ones = torch.zeros(2, 3), torch.ones(2, 3)
loss, _ = turn_clip.compute_policy_loss_turn_clip(zeros, zeros, ones, ones, config=config)
found["loss"] = [loss.item(), *heavy()]
found["attribute"] = [hasattr(turn_clip, "no_such_name"), *heavy()]

# The class that configurations name here is verl's: asking for it loads verl, and with it the names.
made = pickle.loads(pickle.dumps(turn_clip.TurnClipLossConfig(turn_agg="sum", turn_scale=30.0)))
from verl.trainer.ppo import core_algos
from verl.workers.config import PolicyLossConfig

found["config"] = [
    isinstance(made, PolicyLossConfig),
    type(made) is turn_clip.TurnClipLossConfig,
    made == turn_clip.TurnClipLossConfig(turn_agg="sum", turn_scale=30.0),
    core_algos.get_policy_loss_fn("turn_clip") is turn_clip.compute_policy_loss_turn_clip,
]
print(json.dumps(found))
"""

UNDER_VERL = f"""
import json
import verl
import {CORE} as core

found = core.ADV_ESTIMATOR_REGISTRY | core.POLICY_LOSS_REGISTRY
print(json.dumps({{name: function.__module__ for name, function in found.items() if name in {list(CONTENTS[CORE])}}}))
"""


def last_line(code: str, folder):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_algorithms_load_and_run_without_verl(tmp_path):
    found = last_line(ALONE, tmp_path)
    assert {name: found[name] for name in MODULES} == {name: [] for name in MODULES}
    assert found["loss"] == [-1.0] and found["attribute"] == [False]
    assert found["config"] == [True, True, True, True]


def test_verl_knows_them_by_name_after_a_bare_import(tmp_path):
    assert CORE in REGISTERED_BY
    assert last_line(UNDER_VERL, tmp_path) == CONTENTS[CORE]
