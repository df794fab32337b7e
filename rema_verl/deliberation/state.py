"""Cognitive state of an agent (MPDF: z = decision schema, reasoning profile, confidence) as a fixed row of numbers.

:data:`LAYOUT` names every number; :data:`SCHEMA` changes with it, and corpora and meta-policies carry it. All numbers
lie in [-2, 2], most in [0, 1]. No torch, no verl.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from fractions import Fraction

from rema_verl.deliberation.protocol import ACTIONS, OPERATORS, VERDICTS, AgentState, Same, vote
from rema_verl.rewards.grading import MAX_ANSWER, _number, clean

CHOICES = ("A", "B", "C", "D", "E")
_CHOICE = re.compile(r"\(?([A-E])\)?")

LAYOUT: tuple[str, ...] = (
    # z_ans, the decision schema: a scalar for a number, one-hot for a choice, and how it stands in the team
    "answer/given",  # 0 or 1
    "answer/is_number",  # 0 or 1
    "answer/number",  # sign(x) log(1 + |x|) / 10, held to [-2, 2]; 0 if it is no number
    *(f"answer/choice_{c}" for c in CHOICES),
    "answer/share",  # of the agents, itself included, that give the same answer; 0 without an answer
    "answer/is_teams",  # 1 if the team's vote would fall on it
    # z_prof, the reasoning profile
    "profile/steps",  # log(1 + steps) / log(1000)
    *(f"profile/{name}" for name in OPERATORS),  # 0 or 1 each
    "profile/confidence",  # self-assessed, [0, 1]
    "profile/malformed",  # 1: the rest of the profile is neutral
    # z_conf, the critic's verdict
    *(f"critic/{name.lower().replace(' ', '_')}" for name in VERDICTS),  # one-hot, or even shares if malformed
    "critic/confidence",  # [0, 1]
    # rounds done / rounds: 0 before the first action
    "progress",
)
SCHEMA = "mpdf-1-" + hashlib.sha256(json.dumps([LAYOUT, ACTIONS]).encode()).hexdigest()[:12]


def number_feature(answer: str) -> float | None:
    """sign(x) log(1 + |x|) / 10 of an answer that is a number, held to [-2, 2]; None for any other.

    >>> round(number_feature(r"-1\\,000"), 4), number_feature("x + 1")
    (-0.6909, None)
    """
    if len(answer) > MAX_ANSWER:
        return None
    text = clean(answer)
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?", text):
        text = text.replace(",", "")
    value: Fraction | None = _number(text.rstrip("%"))
    if value is None:
        return None
    size = abs(value)
    log = math.log1p(size) if size < 1e15 else math.log(size.numerator) - math.log(size.denominator)
    return min(log / 10, 2.0) * (-1 if value < 0 else 1)


def team_features(states: Sequence[AgentState], same: Same, progress: float = 0.0) -> list[list[float]]:
    """Every agent's features, N rows of ``len(LAYOUT)``; agent i's peers are the other rows.

    Args:
        states: of all N agents, at one moment.
        same: equality of two answers; asked at most once for each pair of agents.
        progress: rounds done / rounds.
    """
    known: dict[tuple[str, str], bool] = {}

    def equal(a: str, b: str) -> bool:
        if (a, b) not in known:
            known[a, b] = known[b, a] = a == b or same(a, b)
        return known[a, b]

    winners = vote([s.answer for s in states], [s.confidence for s in states], equal)
    rows = []
    for i, state in enumerate(states):
        answer = state.answer
        number = None if answer is None else number_feature(answer)
        choice = None if answer is None else _CHOICE.fullmatch(answer.strip())
        share = 0.0
        if answer is not None:
            share = sum(s.answer is not None and equal(answer, s.answer) for s in states) / len(states)
        rows.append(
            [
                float(answer is not None),
                float(number is not None),
                number or 0.0,
                *(float(choice is not None and choice[1] == c) for c in CHOICES),
                share,
                float(i in winners),
                math.log1p(state.profile.steps) / math.log(1000),
                *(float(name in state.profile.operators) for name in OPERATORS),
                state.profile.confidence,
                float(state.profile.malformed),
                *state.confidence_vector,
                state.confidence,
                progress,
            ]
        )
    return rows


def features(state: AgentState, all_states: Sequence[AgentState], same: Same, progress: float = 0.0) -> list[float]:
    """One agent's row of :func:`team_features`; ``state`` is one of ``all_states``.

    >>> row = features(a := AgentState("4"), [a, AgentState("5"), AgentState("4.0")], lambda x, y: float(x) == float(y))
    >>> len(row) == len(LAYOUT), round(row[LAYOUT.index("answer/share")], 2)
    (True, 0.67)
    """
    index = next(i for i, s in enumerate(all_states) if s is state)
    return team_features(all_states, same, progress)[index]
