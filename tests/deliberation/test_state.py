"""The features: layout, values, bounds."""

import math
import random

import pytest

from rema_verl.deliberation import state
from rema_verl.deliberation.protocol import AgentState, Profile, Verdict
from rema_verl.deliberation.state import LAYOUT, SCHEMA, features, number_feature, team_features


def same_number(a, b):
    return float(a) == float(b)


def named(row):
    return dict(zip(LAYOUT, row, strict=True))


def test_every_feature():
    profile = Profile(steps=9, operators=("algebraic", "other"), confidence=0.8, malformed=False)
    me = AgentState("4", profile, (0.0, 0.0, 0.0, 1.0, 0.0), 0.75, "text")
    team = [me, AgentState("4.0"), AgentState("5"), AgentState(None)]
    found = named(features(me, team, same_number, progress=1 / 3))
    expected = dict.fromkeys(LAYOUT, 0.0) | {
        "answer/given": 1.0,
        "answer/is_number": 1.0,
        "answer/number": math.log(5) / 10,
        "answer/share": 0.5,
        "answer/is_teams": 1.0,
        "profile/steps": math.log(10) / math.log(1000),
        "profile/algebraic": 1.0,
        "profile/other": 1.0,
        "profile/confidence": 0.8,
        "critic/probably_correct": 1.0,
        "critic/confidence": 0.75,
        "progress": 1 / 3,
    }
    assert found == pytest.approx(expected)
    rows = team_features(team, same_number, 1 / 3)
    assert rows[0] == list(found.values())
    assert named(rows[1])["answer/is_teams"] == 1.0 and named(rows[2])["answer/is_teams"] == 0.0
    silent = named(rows[3])
    assert silent["answer/given"] == silent["answer/share"] == silent["answer/is_teams"] == 0.0


def test_neutral_features_of_malformed_replies():
    found = named(features(a := AgentState("4"), [a, AgentState("5")], same_number))
    assert found["profile/malformed"] == 1.0 and found["profile/confidence"] == 0.5 and found["profile/steps"] == 0.0
    assert found["critic/confidence"] == 0.5 and found["critic/unsure"] == pytest.approx(0.2)


def test_choices_are_one_hot():
    for answer, choice in (("B", "B"), ("(C)", "C")):
        found = named(features(a := AgentState(answer), [a, AgentState("A")], str.__eq__))
        assert [k for k, v in found.items() if k.startswith("answer/choice") and v] == [f"answer/choice_{choice}"]
        assert found["answer/is_number"] == 0.0


@pytest.mark.parametrize(
    ("answer", "value"),
    [("0", 0.0), ("-4", -math.log(5) / 10), (r"\frac{1}{2}", math.log(1.5) / 10), ("1,000,000", math.log(1e6 + 1) / 10)]
    + [("50%", math.log(51) / 10), ("9" * 900, 2.0), ("-" + "9" * 900, -2.0), ("1/" + "9" * 400, 0.0)],
)
def test_numbers(answer, value):
    assert number_feature(answer) == pytest.approx(value, abs=1e-9)


def test_hostile_answers_stay_within_bounds():
    draw = random.Random(0)
    answers = ["9" * 5_000, "1/0", "x" * 100_000, "nan", "inf", "1e999", "\\frac{1}{0}", "}{", "", "\x00", "-0"]
    for _ in range(200):
        answers.append("".join(draw.choices("0123456789./\\{}-+%,e x", k=draw.randrange(1, 40))))
    for start in range(0, len(answers), 8):
        for row in team_features([AgentState(a) for a in answers[start : start + 8]], str.__eq__):
            assert len(row) == len(LAYOUT) and all(math.isfinite(x) and -2 <= x <= 2 for x in row)


def test_equality_is_asked_at_most_once_for_each_pair():
    asked = []
    team = [AgentState(a) for a in ("1", "2", "3", "4", "2")]
    team_features(team, lambda a, b: asked.append(frozenset((a, b))) or False)
    assert len(asked) == len(set(asked)) == 6


def test_the_schema_follows_the_layout():
    import hashlib
    import json

    assert len(set(LAYOUT)) == len(LAYOUT)
    assert len(Verdict().vector) == sum(name.startswith("critic/") for name in LAYOUT) - 1
    digest = hashlib.sha256(json.dumps([LAYOUT, state.ACTIONS]).encode()).hexdigest()
    assert SCHEMA.endswith(digest[:12])
