"""The four-token worked examples in the docstrings are true."""

import doctest

import pytest

from rema_verl.algorithms import advantages, softrankpo, turn_clip, turns


@pytest.mark.parametrize("module", [turns, turn_clip, softrankpo, advantages], ids=lambda m: m.__name__)
def test_worked_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
