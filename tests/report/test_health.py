"""Health signals: each one sees what it is for, and not its opposite."""

import json
import math

import pytest
from synthetic import trajectory, turn

from rema_verl.dialogue import META_THINKING, REASONING
from rema_verl.report import health
from rema_verl.report.health import Start


def dialogue(*texts: str, **more) -> dict:
    """Messages in turn, meta_thinking first."""
    return trajectory(turns=[turn((META_THINKING, REASONING)[i % 2], text) for i, text in enumerate(texts)], **more)


def tokens(*counts: int) -> dict:
    """A dialogue with so many tokens per message."""
    return trajectory(turns=[turn((META_THINKING, REASONING)[i % 2], "words", tokens=n) for i, n in enumerate(counts)])


# ---------------------------------------------------------------------------------------------------------- echo


def test_echo_within_a_message():
    within, between = health.echo(["add the two numbers now " * 10])
    assert within > 0.85 and between == 0


def test_echo_between_messages():
    plan = "first add the two numbers and then divide the sum by three"
    assert health.echo([plan, plan]) == (0.0, 0.5)
    assert health.echo([plan, "a wholly different answer that shares no run of words with it"]) == (0.0, 0.0)


def test_echo_does_not_care_about_case_and_spaces():
    assert health.echo(["Add  the TWO numbers", "add the two\nnumbers"]) == (0.0, 0.5)


def test_echo_knows_text_without_spaces():
    assert health.echo(["先把两个数字加起来", "先把两个数字加起来"])[1] == 0.5


@pytest.mark.parametrize("messages", [[], [""], ["a b c", "a b c"]])
def test_too_short_to_echo(messages):
    assert health.echo(messages) == (0.0, 0.0)


# --------------------------------------------------------------------------------------------------------- leaks


@pytest.mark.parametrize(
    "messages, leak",
    [
        ((r"The answer is \boxed{5}.", "ok"), True),
        (("Say 137 at the end.", "137"), True),
        (("Compare them. [[A]]", "[[A]]"), True),
        (("Add them.", "137", "137 is right. [FINISH]", r"\boxed{137}"), False),  # reasoning said it first
        (("Add them.", "1370", "So 137. [FINISH]", r"\boxed{137}"), True),  # 1370 is not 137
        (("Use 13 and 7, or 1.137.", "137"), False),
        (("Think about it.", r"\boxed{137}"), False),
    ],
)
def test_leaks(messages, leak):
    assert health.leaks(dialogue(*messages, question="What is 130 + 7?", truth="137")) is leak


def test_the_question_may_be_quoted():
    assert not health.leaks(dialogue("Start from 42.", "42", question="Is 42 even?", truth="42"))


def test_a_short_truth_is_everywhere_and_no_leak():
    assert not health.leaks(dialogue("Step 5 first.", "5", question="2 + 3?", truth="5"))


def test_truth_and_answers_are_not_patterns():
    assert not health.leaks(dialogue("Use (a+b)*.", "x", question="?", truth="(((["))
    assert health.leaks(dialogue("It is x^2+(1).", "x", question="?", truth="x^2+(1)"))


# ----------------------------------------------------------------------------------------------- against the start


def test_start_is_the_mean_of_the_first_steps_only():
    start = Start()
    for step in range(1, 20):
        start.add(step, {"turns": float(step)})
    assert start.mean("turns") == sum(range(1, health.START_STEPS + 1)) / health.START_STEPS


def test_start_survives_a_restart_and_a_step_done_twice(tmp_path):
    path = tmp_path / "checkpoints" / "start.json"
    start = Start.at(path)
    start.add(1, {"turns": 2.0})
    start.add(2, {"turns": 4.0})
    again = Start.at(path)
    again.add(2, {"turns": 6.0})
    assert again.mean("turns") == 4.0
    assert Start.at(path).mean("turns") == 4.0


def test_step_1_begins_a_new_run(tmp_path):
    path = tmp_path / "start.json"
    Start(path, {1: {"turns": 9.0}, 2: {"turns": 9.0}}).add(2, {"turns": 9.0})
    fresh = Start.at(path)
    fresh.add(1, {"turns": 2.0})
    assert fresh.mean("turns") == 2.0


@pytest.mark.parametrize("content", ["", "[]", '{"1": 3}', '{"x": {}}', "\x00"])
def test_a_broken_start_file_is_as_none(tmp_path, content):
    (tmp_path / "start.json").write_text(content)
    assert Start.at(tmp_path / "start.json").steps == {}


def test_values_that_are_no_numbers_do_not_enter_the_start():
    start = Start()
    start.add(1, {"turns": math.nan, "reasoning_tokens": 4.0})
    assert start.mean("turns") is None and start.ratio("turns", 1.0) is None
    json.dumps(start.steps, allow_nan=False)


def test_lazy_is_a_quarter_of_the_start():
    start = Start()
    start.add(1, {"reasoning_tokens": 100.0})
    assert health.is_lazy(tokens(50, 24), start) and not health.is_lazy(tokens(50, 26), start)
    assert health.is_lazy(tokens(50), start)  # reasoning never spoke
    assert not health.is_lazy(tokens(50, 1), Start())  # nothing to compare with yet


# ------------------------------------------------------------------------------------------------------ one step


def test_zero_advantage_groups_needs_every_row_of_a_group():
    rows = [("p-reasoning", [0.0]), ("p-reasoning", [0.0, 0.2]), ("p-meta_thinking", [0.0]), ("q-reasoning", [1e-12])]
    assert health.zero_advantage_groups(rows) == 2 / 3
    assert health.zero_advantage_groups([]) is None


def test_update_log_ratio_looks_at_every_model_and_both_ends():
    found = {"meta_thinking/actor/turn_ratio_max": 1.1, "reasoning/actor/turn_ratio_min": 0.25, "actor/grad_norm": 9.0}
    assert health.update_log_ratio(found) == pytest.approx(math.log(4))
    assert health.update_log_ratio({}) is None
    for exploded in (math.nan, math.inf, 0.0):
        assert health.update_log_ratio({"actor/turn_ratio_max": exploded}) == health.EXPLODED


def test_signals_of_a_step():
    start = Start()
    start.add(1, {"reasoning_tokens": 100.0, "turns": 2.0, "entropy/reasoning": 0.5})
    step = [tokens(50, 10), tokens(50, 30, 50, 20)]
    found = health.health_metrics(
        step,
        [dialogue("say it is 99 to them", "it is 99", truth="99", question="?")],
        start,
        {"reasoning/entropy": 0.05, "reward/grading_timeouts": 1},
        advantages=[("a", [0.0]), ("b", [1.0])],
        log_ratios=[-2.0, 1.0],
    )
    assert found["health/lazy_share"] == 0.5
    assert found["health/reasoning_tokens_vs_start"] == 0.3
    assert found["health/turns_vs_start"] == 0.75
    assert found["health/reasoning_token_share"] == pytest.approx(60 / 210)
    assert found["health/entropy_vs_start/reasoning"] == 0.1
    assert "health/entropy_vs_start/meta_thinking" not in found
    assert found["health/leak_share"] == 1.0
    assert found["health/zero_advantage_groups"] == 0.5
    assert found["health/log_ratio/rollout_max"] == 2.0
    assert found["health/grading_timeout_share"] == 0.5
    assert set(health.warnings(found)) == {
        "health/reasoning_tokens_vs_start",
        "health/entropy_vs_start/reasoning",
        "health/leak_share",
        "health/log_ratio/rollout_max",
        "health/grading_timeout_share",
    }


def test_a_log_ratio_that_is_no_number_is_an_explosion():
    found = health.health_metrics([], [], Start(), {}, log_ratios=[0.1, math.nan])
    assert found["health/log_ratio/rollout_max"] == health.EXPLODED
    assert "health/log_ratio/rollout_max" in health.warnings(found)


def test_a_step_without_dialogues_has_no_signals():
    assert health.health_metrics([], [], Start(), {}) == {}


@pytest.mark.parametrize("name", health.LIMITS)
def test_every_limit_warns_on_its_own_side_only(name):
    limit = health.LIMITS[name]
    high, low = limit.value + 0.1, limit.value - 0.01
    assert bool(health.warnings({name: high})) is limit.above
    assert bool(health.warnings({name: low})) is not limit.above
    assert not health.warnings({name: limit.value})
