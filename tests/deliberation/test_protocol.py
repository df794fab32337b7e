"""How replies are read, votes and rewards. Every case of a small world, against a reference written another way."""

import itertools
import random
from collections import defaultdict

import pytest

from rema_verl.deliberation import protocol
from rema_verl.deliberation.protocol import (
    ACTIONS,
    Profile,
    Prompts,
    Verdict,
    action_rewards,
    adopted_peer,
    messages,
    parse_action,
    parse_solution,
    parse_verdict,
    rewards,
    team_answer,
    vote,
)

RIGHT, WRONG1, WRONG2 = "4", "5", "6"
ANSWERS = (RIGHT, WRONG1, WRONG2, None)
CONFIDENCES = [(0.5, 0.5, 0.5), (0.25, 0.5, 1.0), (1.0, 0.25, 0.5), (0.5, 1.0, 0.25), (0.25, 0.25, 0.5)]


def same_number(a: str, b: str) -> bool:
    return float(a) == float(b)


def reference_winner(answers: dict[int, str | None], confidences) -> float | None:
    """The team's answer as a number: all orderings spelled out, by sorting candidates."""
    supporters = defaultdict(list)
    for agent, answer in answers.items():
        if answer is not None:
            supporters[float(answer)].append(agent)
    ranked = sorted(
        supporters.items(), key=lambda item: (-len(item[1]), -sum(confidences[a] for a in item[1]), min(item[1]))
    )
    return ranked[0][0] if ranked else None


def reference_rewards(before, after, confidences) -> list[float]:
    truth = float(RIGHT)
    found = []
    for i in range(len(after)):
        was, now = (answer is not None and float(answer) == truth for answer in (before[i], after[i]))
        whole = dict(enumerate(after))
        without = {j: answer for j, answer in whole.items() if j != i}
        marginal = (reference_winner(whole, confidences) == truth) - (reference_winner(without, confidences) == truth)
        found.append(float(now - was + marginal))
    return found


def ours(before, after, confidences, same=same_number) -> list[float]:
    def right(answer):
        return answer is not None and float(answer) == float(RIGHT)

    return rewards([right(a) for a in before], after, [right(a) for a in after], confidences, same)


@pytest.mark.parametrize("confidences", CONFIDENCES)
def test_rewards_in_every_case_of_three_agents_and_four_answers(confidences):
    seen = set()
    for before in itertools.product(ANSWERS, repeat=3):
        for after in itertools.product(ANSWERS, repeat=3):
            found = ours(before, after, confidences)
            assert found == reference_rewards(before, after, confidences), (before, after)
            seen.update(found)
    assert seen == {-2.0, -1.0, 0.0, 1.0, 2.0}


@pytest.mark.parametrize("n", [2, 4, 5, 8])
def test_rewards_of_other_team_sizes_and_of_answers_written_differently(n):
    draw = random.Random(n)
    answers = [RIGHT, "4.0", "04", WRONG1, "5.00", WRONG2, None]
    for _ in range(500):
        before, after = (draw.choices(answers, k=n) for _ in range(2))
        confidences = draw.choices([0.0, 0.25, 0.5, 0.75, 1.0], k=n)
        assert ours(before, after, confidences) == reference_rewards(before, after, confidences)


def test_the_team_without_an_agent_needs_nothing_but_the_answers_at_hand():
    asked = []

    def same(a, b):
        asked.append((a, b))
        return a == b

    assert ours(["5", "4", "5"], ["4", "4", "5"], [0.5, 0.5, 0.75], same) == [2.0, 1.0, 0.0]
    assert {answer for pair in asked for answer in pair} <= {"4", "5"}


def test_the_rewards_of_all_actions_are_those_of_the_rounds_in_which_they_are_taken():
    draw = random.Random(0)
    for _ in range(300):
        after = [(a, a == RIGHT, draw.choice([0.25, 0.5, 1.0])) for a in draw.choices(ANSWERS, k=3)]
        candidates = [(a, a == RIGHT, draw.choice([0.25, 0.5, 1.0])) for a in draw.choices(ANSWERS, k=3)]
        before, i = draw.choices(ANSWERS, k=3), draw.randrange(3)
        found = action_rewards(i, [a == RIGHT for a in before], after, candidates, str.__eq__)
        assert len(found) == len(ACTIONS)
        for action, candidate in enumerate(candidates):
            played = list(after)
            played[i] = candidate
            answers, _, confidences = zip(*played, strict=True)
            assert found[action] == reference_rewards(before, answers, confidences)[i]


def test_votes():
    assert team_answer(["5", "4", "4.0"], [1.0, 0.0, 0.0], same_number) == "4"  # a majority, however unsure
    assert team_answer(["5", "4"], [0.25, 0.5], same_number) == "4"  # a tie: the surer one
    assert team_answer(["5", "4"], [0.5, 0.5], same_number) == "5"  # a tie in both: the first
    assert team_answer([None, None, "4"], [1.0, 1.0, 0.0], same_number) == "4"  # no answer is no vote
    assert team_answer([None, None], [1.0, 1.0], same_number) is None
    assert vote(["4", "5", "5.0", "4.0"], [0.1, 0.2, 0.3, 0.4], same_number) == [0, 3]  # .5 each, however added
    assert [adopted_peer([0.5, 0.5, 0.25], i) for i in range(3)] == [1, 0, 0]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("PROFILE: steps=4; ops=algebraic,arithmetic; confidence=80", (4, ("arithmetic", "algebraic"), 0.8)),
        ("**profile**: confidence = 7.5 % ; ops = Geometric | magic; steps = 0.", (0, ("geometric", "other"), 0.075)),
        ("> PROFILE: steps=999; ops=counting; confidence=100; mood=good", (999, ("counting",), 1.0)),
        ("PROFILE: steps=4; ops=algebraic; confidence=101", None),
        ("PROFILE: steps=-4; ops=algebraic; confidence=80", None),
        ("PROFILE: steps=4; ops=; confidence=80", None),
        ("PROFILE: steps=4; confidence=80", None),
        ("PROFILE: steps=nan; ops=algebraic; confidence=nan", None),
        ("PROFILE: steps=1e9; ops=algebraic; confidence=80", None),
        ("PROFILE:", None),
        ("steps=4; ops=algebraic; confidence=80", None),
        ("", None),
    ],
)
def test_profiles(line, expected):
    solution = parse_solution(f"So it is \\boxed{{7}}.\n{line}")
    assert solution.answer == "7"
    if expected is None:
        assert solution.malformed and solution.profile == Profile()
    else:
        assert solution.profile == Profile(*expected, malformed=False) and not solution.malformed


def test_the_profile_is_no_answer_and_the_last_one_counts():
    assert parse_solution("Why?\nPROFILE: steps=4; ops=algebraic; confidence=80").answer is None
    two = "PROFILE: steps=1; ops=other; confidence=10\n\\boxed{3}\nPROFILE: steps=2; ops=other; confidence=20"
    assert parse_solution(two).profile.steps == 2 and parse_solution(two).answer == "3"
    assert parse_solution("").answer is None


@pytest.mark.parametrize(
    ("text", "confidence"),
    [
        ("Step 2 is off.\nVERDICT: Incorrect", 0.0),
        ("VERDICT: probably incorrect.", 0.25),
        ("**Verdict:** Unsure", 0.5),
        ("VERDICT: Correct\nNo, wait.\nVERDICT: <Probably correct>", 0.75),
        ("Correct.", 1.0),
        ("VERDICT: Correct | Incorrect", None),
        ("The solution is correct.", None),
        ("VERDICT: 5", None),
        ("", None),
    ],
)
def test_verdicts(text, confidence):
    verdict = parse_verdict(text)
    assert verdict.malformed == (confidence is None)
    if confidence is None:
        assert verdict == Verdict() and verdict.confidence == 0.5 and sum(verdict.vector) == pytest.approx(1)
    else:
        assert verdict.confidence == confidence and verdict.vector.index(1.0) == 4 * confidence


@pytest.mark.parametrize(
    ("text", "action"),
    [(f"<action>{name}</action>", name) for name in ACTIONS]
    + [("Well. <ACTION> Concede </ACTION>", "concede"), ("<action>refine</action><action>persist</action>", "refine")]
    + [("<action>win</action>", None), ("<action></action>", None), ("<action>refine", None), ("refine", None)]
    + [("<action>win</action><action>refine</action>", None), ("", None)],
)
def test_actions(text, action):
    assert parse_action(text) == action


def test_hostile_replies_are_read_in_no_time():
    for text in ("PROFILE:" * 30_000, "PROFILE: " + ";=" * 50_000, "<action>" * 50_000, "VERDICT:" + "*" * 100_000):
        assert parse_solution(text).malformed and parse_verdict(text).malformed and parse_action(text) is None
    assert parse_verdict("VERDICT: \n" * 20_000).malformed


def test_prompts_name_the_forms_that_are_parsed():
    prompts = Prompts()
    for name in ("solve", "refine", "act"):
        form = next(line for line in getattr(prompts, name).splitlines() if line.startswith("PROFILE:"))
        filled = form.replace("<number of steps>", "3").replace("<0 to 100, how sure you are>", "60")
        start, end = filled.index("ops=<") + 4, filled.index(">")
        assert not parse_solution(filled[:start] + "counting" + filled[end + 1 :]).malformed
    for action in ACTIONS:
        assert f"<action>{action}</action>" in prompts.act
    for verdict in protocol.VERDICTS:
        assert verdict in prompts.critic and not parse_verdict(f"VERDICT: {verdict}").malformed
    for kind, template in protocol.USER.items():
        values = {name: f"[{name}]" for name in ("question", "solution", "peers", "confidence")}
        system, user = messages(kind, prompts, **values)
        assert system["content"] == getattr(prompts, kind)
        assert all((f"[{name}]" in user["content"]) == (f"{{{name}}}" in template) for name in values)
    # what is filled in is not filled again
    assert "{solution}" in messages("critic", question="{solution}", solution="x")[1]["content"]
