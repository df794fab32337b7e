r"""MPDF deliberation (arXiv 2509.03817): actions, prompts, how replies are read, votes and rewards. No torch, no verl.

One trajectory of N agents, who all are the same model:

    round 0     every agent solves the question and profiles its own reasoning in one reply   (:func:`parse_solution`)
                a critic call on each solution gives the agent's confidence                   (:func:`parse_verdict`)
    round t     every agent takes one action, all at once:
                  persist   keeps its solution, no call
                  refine    a self-correction call, and a critic call on the result
                  concede   adopts the solution of the most confident peer                    (:func:`adopted_peer`)
    after each  the team's answer is the majority's                                           (:func:`team_answer`)
                r_i = own answer's change + what agent i changes in the team's                (:func:`rewards`)

Equality of answers is the caller's ``same(a, b)``: ``rema_verl.rewards.judge.same_answer`` for mathematics.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rema_verl.dialogue import fill
from rema_verl.rewards.grading import MAX_MESSAGE, final_answer

PERSIST, REFINE, CONCEDE = ACTIONS = ("persist", "refine", "concede")  # indices 0, 1, 2 everywhere
OPERATORS = ("arithmetic", "algebraic", "geometric", "counting", "other")
VERDICTS = ("Incorrect", "Probably incorrect", "Unsure", "Probably correct", "Correct")  # confidence 0, .25, ..., 1

Same = Callable[[str, str], bool]

_FORMAT = (
    "Put the final answer inside \\boxed{}. End with one more line that describes your solution, exactly in this "
    "form:\nPROFILE: steps=<number of steps>; ops=<one or more of " + ",".join(OPERATORS) + ">; "
    "confidence=<0 to 100, how sure you are>"
)


@dataclass(frozen=True)
class Prompts:
    """System messages, by the kind of call. What the user message holds is in :data:`USER`."""

    solve: str = "You solve problems step by step, showing your work. " + _FORMAT
    critic: str = (
        "You check a proposed solution to a problem. Go through it step by step, look for mistakes, and do not trust "
        "a result that you have not verified. Your last line is your verdict on the final answer, exactly in this "
        "form:\nVERDICT: <" + " | ".join(VERDICTS) + ">"
    )
    refine: str = (
        "You are given a problem and your own earlier solution, which may contain a mistake. Check each step, correct "
        "or improve the solution, and write it out in full. " + _FORMAT
    )
    vanilla: str = "Answer the problem and put the final answer inside \\boxed{}."
    cot: str = "Solve the problem step by step, showing your work, and put the final answer inside \\boxed{}."
    debate: str = (
        "You are one of several agents that work on the same problem. You are given your own earlier solution and "
        "those of the others. Use what is right in them as additional information, and write your updated solution "
        "step by step, with the final answer inside \\boxed{}."
    )
    act: str = (
        "You are one of several agents that work on the same problem. You are given your own solution and those of "
        "the others, each with its author's confidence. Begin your reply with exactly one action:\n"
        "<action>persist</action> if your solution is right: then write nothing more.\n"
        "<action>concede</action> if the solution of the most confident other agent is better: then write nothing "
        "more, it becomes yours.\n"
        "<action>refine</action> if your solution can be corrected: then write the corrected solution in full. "
        + _FORMAT
    )


USER: dict[str, str] = {
    "solve": "{question}",
    "critic": "Problem:\n{question}\n\nProposed solution:\n{solution}",
    "refine": "Problem:\n{question}\n\nYour earlier solution:\n{solution}",
    "vanilla": "{question}",
    "cot": "{question}",
    "debate": "Problem:\n{question}\n\nYour earlier solution:\n{solution}\n\n{peers}",
    "act": "Problem:\n{question}\n\nYour solution (confidence {confidence}):\n{solution}\n\n{peers}",
}


def messages(kind: str, prompts: Prompts | None = None, **values: str) -> list[dict[str, str]]:
    """The chat of one call. ``values`` fill :data:`USER`; the caller has neutralised control strings in them.

    >>> messages("critic", question="1 + 1?", solution="2")[1]["content"]
    'Problem:\\n1 + 1?\\n\\nProposed solution:\\n2'
    """
    return [
        {"role": "system", "content": getattr(prompts or Prompts(), kind)},
        {"role": "user", "content": fill(USER[kind], **values)},
    ]


def show_peers(solutions: Sequence[str], confidences: Sequence[float] | None = None) -> str:
    """The ``{peers}`` of a user message: the others' solutions, numbered, each with its confidence if given.

    >>> show_peers(["2", "3"], [1.0, 0.25])
    'Agent 1 (confidence 100%):\\n2\\n\\nAgent 2 (confidence 25%):\\n3'
    """
    notes = [""] * len(solutions) if confidences is None else [f" (confidence {show(c)})" for c in confidences]
    return "\n\n".join(f"Agent {i}{note}:\n{s}" for i, (s, note) in enumerate(zip(solutions, notes, strict=True), 1))


def show(confidence: float) -> str:
    """A confidence in [0, 1] as prompts show it.

    >>> show(0.75)
    '75%'
    """
    return f"{round(100 * confidence)}%"


# --- reading replies ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """What a reply says of its own reasoning (paper: z_prof). The defaults stand for a malformed one: neutral."""

    steps: int = 0
    operators: tuple[str, ...] = ()  # in the order of OPERATORS
    confidence: float = 0.5
    malformed: bool = True


@dataclass(frozen=True)
class Solution:
    """A reply to ``solve`` or ``refine``. ``answer`` is None where nothing in it looks like one."""

    answer: str | None
    profile: Profile

    @property
    def malformed(self) -> bool:
        """Whether the profile was missing or unreadable."""
        return self.profile.malformed


@dataclass(frozen=True)
class Verdict:
    """A critic's reply (paper: z_conf). The defaults are what a malformed one counts as."""

    vector: tuple[float, ...] = (1 / len(VERDICTS),) * len(VERDICTS)  # over VERDICTS
    confidence: float = 0.5
    malformed: bool = True


@dataclass(frozen=True)
class AgentState:
    """What is known of one agent before it acts; ``text`` is its whole solution."""

    answer: str | None
    profile: Profile = field(default_factory=Profile)
    confidence_vector: tuple[float, ...] = Verdict.vector
    confidence: float = Verdict.confidence
    text: str = ""


_PROFILE = re.compile(r"^[ \t>*_`]*PROFILE[*_` \t]*:(.*)$", re.IGNORECASE | re.MULTILINE)
_STEPS = re.compile(r"[0-9]{1,3}")
_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,3})?)[ \t]*%?")
_VERDICT = re.compile(
    r"VERDICT[*_` \t]*:\W*(%s)\W*$" % "|".join(sorted(VERDICTS, key=len, reverse=True)), re.IGNORECASE | re.MULTILINE
)
_ACTION = re.compile(r"<action>([^<>]{0,40})</action>", re.IGNORECASE)


def parse_solution(text: str) -> Solution:
    r"""The final answer (as :mod:`rema_verl.rewards.grading` reads it) and the last ``PROFILE:`` line.

    >>> parse_solution("So \\boxed{4}.\nPROFILE: steps=2; ops=algebraic, magic; confidence=80").profile
    Profile(steps=2, operators=('algebraic', 'other'), confidence=0.8, malformed=False)
    >>> parse_solution("So \\boxed{4}.\nPROFILE: steps=many; ops=algebraic; confidence=80").malformed
    True
    """
    text = text[-MAX_MESSAGE:]
    profiles = _PROFILE.findall(text)
    return Solution(final_answer(_PROFILE.sub("", text)), _profile(profiles[-1]) if profiles else Profile())


def _profile(line: str) -> Profile:
    pairs = (item.split("=") for item in line.split(";") if item.count("=") == 1)
    values = {name.strip(" \t*_`").lower(): value.strip(" \t*_`.").lower() for name, value in pairs}
    steps = _STEPS.fullmatch(values.get("steps", ""))
    percent = _PERCENT.fullmatch(values.get("confidence", ""))
    names = {name for name in re.split(r"[,\s|/]+", values.get("ops", "")) if name}
    if not (steps and percent and names) or float(percent[1]) > 100:
        return Profile()
    names = {name if name in OPERATORS else "other" for name in names}
    operators = tuple(name for name in OPERATORS if name in names)
    return Profile(int(steps[0]), operators, float(percent[1]) / 100, malformed=False)


def parse_verdict(text: str) -> Verdict:
    """The last ``VERDICT:`` line; a reply that is nothing but a verdict counts too.

    >>> parse_verdict("Step 2 is wrong.\\nVERDICT: Probably incorrect.").confidence, parse_verdict("Fine.").malformed
    (0.25, True)
    """
    text = text[-MAX_MESSAGE:].rstrip()
    found = _VERDICT.findall(text)
    name = (found[-1] if found else text.strip(" \t\n.*_`")).capitalize()
    if name not in VERDICTS:
        return Verdict()
    level = VERDICTS.index(name)
    vector = tuple(float(i == level) for i in range(len(VERDICTS)))
    return Verdict(vector, level / (len(VERDICTS) - 1), malformed=False)


def parse_action(text: str) -> str | None:
    """The first action tag's action; None if there is none or it names no action.

    >>> parse_action("<action> Refine </action> So 5."), parse_action("<action>win</action>"), parse_action("refine")
    ('refine', None, None)
    """
    found = _ACTION.search(text)
    name = found[1].strip().lower() if found else None
    return name if name in ACTIONS else None


# --- votes and rewards ----------------------------------------------------------------------------------------------


def vote(answers: Sequence[str | None], confidences: Sequence[float], same: Same) -> list[int]:
    """The agents whose answer is the team's, ascending; empty if nobody has one.

    Answers are grouped by ``same`` with a group's first member. The largest group wins; of equally large ones that with
    the larger sum of confidences; then that of the lowest index.

    >>> vote(["5", "4", None, "4.0", "5"], [0.5, 0.5, 1.0, 0.75, 0.5], lambda a, b: float(a) == float(b))
    [1, 3]
    """
    groups: list[list[int]] = []
    firsts: list[str] = []  # the groups' answers, as their first members wrote them
    for i, answer in enumerate(answers):
        if answer is None:
            continue
        group = next((g for g, first in zip(groups, firsts, strict=True) if same(first, answer)), None)
        if group is None:
            groups.append(group := [])
            firsts.append(answer)
        group.append(i)
    # max keeps the first of equals, and groups stand in the order of their first members
    return max(groups, key=lambda g: (len(g), math.fsum(confidences[i] for i in g)), default=[])


def team_answer(answers: Sequence[str | None], confidences: Sequence[float], same: Same) -> str | None:
    """The answer that wins :func:`vote`, as its first member wrote it.

    >>> team_answer(["5", "4", None], [0.5, 0.75, 1.0], str.__eq__), team_answer([None, None], [1.0, 1.0], str.__eq__)
    ('4', None)
    """
    winners = vote(answers, confidences, same)
    return answers[winners[0]] if winners else None


def adopted_peer(confidences: Sequence[float], i: int) -> int:
    """Whose solution agent ``i`` adopts when it concedes: the most confident peer's, the lowest index of equals.

    >>> adopted_peer([0.5, 1.0, 1.0], 0), adopted_peer([0.5, 1.0, 1.0], 1)
    (1, 2)
    """
    return max((j for j in range(len(confidences)) if j != i), key=lambda j: confidences[j])


def rewards(
    before_correct: Sequence[bool],
    after_answers: Sequence[str | None],
    after_correct: Sequence[bool],
    confidences: Sequence[float],
    same: Same,
) -> list[float]:
    """Every agent's reward of one round, in {-2, ..., 2} (paper, Sec. on rewards; both terms have weight 1):

        r_i = (own answer correct after - before) + (team correct - team correct without agent i)

    The teams vote with the answers and confidences after the round. Nothing is called or graded: all is computed from
    the N answers at hand. A team without an answer is not correct.

    Args:
        before_correct, after_correct: (N,) whether the answer is right.
        after_answers: (N,), None for no answer.
        confidences: (N,), after the round; they break ties.
        same: equality of two answers.

    Example: agent 0 mends its answer and so turns the vote; agent 2 is wrong but changes nothing::

        >>> rewards([False, True, False], ["4", "4", "5"], [True, True, False], [0.5, 0.5, 0.75], str.__eq__)
        [2.0, 1.0, 0.0]
    """

    def team_correct(members: list[int]) -> bool:
        winners = vote([after_answers[j] for j in members], [confidences[j] for j in members], same)
        return bool(winners) and bool(after_correct[members[winners[0]]])

    everyone = list(range(len(after_answers)))
    team = team_correct(everyone)
    return [
        float(bool(after_correct[i]) - bool(before_correct[i]) + team - team_correct(everyone[:i] + everyone[i + 1 :]))
        for i in everyone
    ]


def action_rewards(
    i: int,
    before_correct: Sequence[bool],
    after: Sequence[tuple[str | None, bool, float]],
    candidates: Sequence[tuple[str | None, bool, float]],
    same: Same,
) -> list[float]:
    """Agent ``i``'s reward for each of ACTIONS, the other agents' actions as they were taken (K rewards of a state).

    Args:
        after: per agent (answer, whether it is right, confidence) after the round; entry ``i`` is not read.
        candidates: the same of agent ``i`` after each of ACTIONS.

    >>> others = [("4", True, 0.5), ("5", False, 0.75)]
    >>> candidates = [("5", False, 1.0), ("4", True, 0.5), ("5", False, 0.75)]
    >>> action_rewards(0, [False, True, False], [None, *others], candidates, str.__eq__)
    [0.0, 2.0, 0.0]
    """
    found = []
    for candidate in candidates:
        votes = [candidate if j == i else tuple(v) for j, v in enumerate([*after[:i], candidate, *after[i + 1 :]])]
        answers, correct, confidences = zip(*votes, strict=True)
        found.append(rewards(before_correct, answers, correct, confidences, same)[i])
    return found
