"""Is this answer right? math-verify decides, in a worker process that can be killed.

An answer is hostile text: it may keep the parser busy for ever. math-verify's own time-out needs SIGALRM and so a main
thread, which verl's reward workers do not have (verl #3407). Here a pool of worker processes grades; a worker that
overruns its time is killed and replaced, and the answer gets the status ``timeout``, which callers count.
"""

import atexit
import functools
import multiprocessing
import re
import resource
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Literal

from pebble import ProcessPool

Status = Literal["graded", "no_answer", "timeout", "error"]

WORKER_MEMORY = 4 << 30  # bytes of address space per worker
MAX_CHARS = 20_000  # the final answer is at the end of a message; nobody's box is longer than this


@dataclass(frozen=True)
class Grade:
    """``correct`` is meaningful for status "graded"; otherwise it is False and ``status`` says why."""

    correct: bool
    status: Status


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` (or `\fbox{...}`), nested braces included; None if absent, unclosed or empty.

    A few MATH solutions write `\boxed 2` without braces: the content then runs to the closing `$` or the line's end.

    >>> last_boxed(r"so $\boxed{1}$, no: $\boxed{\frac{1}{2}}$")
    '\\frac{1}{2}'
    """
    start = None
    for match in re.finditer(r"\\(?:boxed|fbox)(?![A-Za-z])\s*", text):
        start = match.end()
    if start is None:
        return None
    if text[start : start + 1] != "{":
        return re.split(r"[$\n]", text[start:], maxsplit=1)[0].strip() or None
    depth, position = 0, start
    while position < len(text):
        char = text[position]
        if char == "\\":  # skips \{ and \}, which are printed braces, not grouping
            position += 2
            continue
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[start + 1 : position].strip() or None
        position += 1
    return None


def _init_worker() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))


def _grade_here(response: str, truth: str) -> Grade:
    """Runs in a worker. Time limits are the pool's business, so math-verify's own are off."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    response = response[-MAX_CHARS:]
    boxed = last_boxed(response)  # math-verify would take any of several boxes for the answer
    answer = parse(response if boxed is None else f"\\boxed{{{boxed}}}", extraction_config=config, parsing_timeout=None)
    if not answer:
        return Grade(False, "no_answer")
    gold = parse(f"\\boxed{{{truth}}}", extraction_config=config, parsing_timeout=None)
    return Grade(bool(verify(gold, answer, timeout_seconds=None)), "graded")


@functools.cache
def _pool() -> ProcessPool:
    # spawn: the callers are Ray actors full of threads, which do not survive a fork
    pool = ProcessPool(
        max_workers=1, max_tasks=2000, initializer=_init_worker, context=multiprocessing.get_context("spawn")
    )
    atexit.register(pool.stop)
    return pool


def grade(response: str, truth: str, timeout: float = 5.0) -> Grade:
    """Grade the last answer in ``response`` against ``truth`` (LaTeX or plain). Blocks; call from a thread.

    Args:
        response: the whole message; the last ``\\boxed{}`` in it counts.
        truth: the ground truth, without a box.
        timeout: seconds before the worker is killed. Starting a worker is not counted.

    Returns:
        A :class:`Grade`; never raises for what the texts contain.
    """
    try:
        future = _schedule(response, truth, timeout)
    except RuntimeError:  # pebble gives up a whole pool when an idle worker is killed (by the OOM killer, say)
        _pool.cache_clear()
        future = _schedule(response, truth, timeout)
    try:
        return future.result()
    except FutureTimeout:
        return Grade(False, "timeout")
    except Exception:  # e.g. the worker ran out of memory, or a parser's bug
        return Grade(False, "error")


def _schedule(response: str, truth: str, timeout: float):
    return _pool().schedule(_grade_here, args=[response, truth], timeout=timeout)
