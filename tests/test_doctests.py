"""The worked examples in the docstrings are true."""

import doctest
import importlib

import pytest

MODULES = [
    "rema_verl.algorithms.advantages",
    "rema_verl.algorithms.softrankpo",
    "rema_verl.algorithms.turn_clip",
    "rema_verl.algorithms.turns",
    "rema_verl.config",
    "rema_verl.agent_loops.prefill",
    "rema_verl.agent_loops.rema",
    "rema_verl.deliberation.objectives",
    "rema_verl.deliberation.protocol",
    "rema_verl.deliberation.state",
    "rema_verl.dialogue",
    "rema_verl.rewards.grading",
    "rema_verl.rewards.judge",
    "rema_verl.rewards.mpdf",
    "rema_verl.rewards.rema",
    "rema_verl.trainers.mpdf",
]


@pytest.mark.parametrize("module", MODULES)
def test_worked_examples(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0
