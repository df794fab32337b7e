"""Grading: right and wrong answers, and hostile ones that must not take the worker's time or the process."""

import threading
import time

import pytest

from rema_verl.rewards.grading import Grade, grade


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        ("\\boxed{7}", "7"),
        ("so the answer is $\\boxed{\\frac{1}{2}}$.", "\\frac12"),
        ("\\boxed{0.5}", "\\frac{1}{2}"),
        ("\\boxed{3} no, \\boxed{4}", "4"),
        ("\\boxed{x=5}", "5"),
        ("\\boxed{(1,2]}", "(1,2]"),
        ("\\boxed{\\text{even}}", "\\text{even}"),
    ],
)
def test_right(response, truth):
    assert grade(response, truth) == Grade(True, "graded")


@pytest.mark.parametrize(("response", "truth"), [("\\boxed{8}", "7"), ("\\boxed{4} no, \\boxed{3}", "4")])
def test_wrong(response, truth):
    assert grade(response, truth) == Grade(False, "graded")


def test_no_answer():
    assert grade("I do not know.", "7").status == "no_answer"


def test_python_is_not_evaluated(tmp_path):
    target = tmp_path / "owned"
    grade(f"\\boxed{{__import__('pathlib').Path('{target}').touch()}}", "1")
    assert not target.exists()


def test_overrunning_answer_is_killed_counted_and_the_next_one_graded():
    started = time.monotonic()
    assert grade("\\boxed{9^{9^{9^{9^{9^{9}}}}}}", "3^{3^{3^{3^{3}}}}", timeout=2.0).correct is False
    assert grade("\\boxed{7}", "7").correct
    assert time.monotonic() - started < 60


def test_a_killed_idle_worker_is_replaced():
    """pebble marks its whole pool broken then; every later answer would be an error."""
    import psutil

    assert grade("\\boxed{7}", "7").correct
    for child in psutil.Process().children(recursive=True):
        if "spawn_main" in " ".join(child.cmdline()):
            child.kill()
    time.sleep(2)
    assert grade("\\boxed{7}", "7") == Grade(True, "graded")


def test_time_limit_holds_in_a_thread():
    """math-verify's own limit needs SIGALRM and the main thread (verl #3407)."""
    results = []

    def work():
        results.append(grade("\\boxed{" + "(" * 20_000, "1", timeout=1.0))
        results.append(grade("\\boxed{1}", "1", timeout=5.0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(90)
    assert not thread.is_alive()
    assert results[0].correct is False and results[1].correct is True
