"""What an answer says and which answers are the same: mathematics, or the verdict of a judge on two answers.

Shared by the reward managers. A row's ``reward_model.style`` says which of the two it is.
"""

import re
from collections.abc import Callable

from rema_verl.rewards.grading import grade, last_boxed

_VERDICT = re.compile(r"\[\[([AB])\]\]|\[([AB])\]")


def verdict(text: str) -> str | None:
    """The last verdict in ``text``: ``[[A]]``, or ``[A]`` as the paper's single-agent prompt has it.

    >>> verdict("Answer [[A]] is shorter, but wrong. [[B]]"), verdict("Both are good.")
    ('B', None)
    """
    found = _VERDICT.findall(text)
    return (found[-1][0] or found[-1][1]) if found else None


def is_verdict(row: dict) -> bool:
    return row["reward_model"].get("style") == "verdict"


def final_answer(text: str, row: dict) -> str | None:
    """The definite answer in ``text``, if there is one."""
    return verdict(text) if is_verdict(row) else last_boxed(text)


def same_answer(row: dict, timeout: float) -> Callable[[str, str], bool]:
    """Equality of two final answers."""
    if is_verdict(row):
        return str.__eq__
    return lambda a, b: a == b or grade(f"\\boxed{{{a}}}", b, timeout).correct
