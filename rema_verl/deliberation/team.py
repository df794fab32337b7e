"""One team's deliberation (MPDF, Sec. 3) and the baselines it is compared with, over any ``generate``.

    round 0    every agent solves (solution and profile in one reply), then a critic call rates its solution
    round t    every agent draws an action from the policy, given all states as they were before the round:
                 persist   nothing                                        no call
                 refine    a self-correction call, then a critic call     two calls
                 concede   takes over the most confident peer's state     no call
    answer     vote over equivalent answers

Agents move at once: all calls of a round run together, and Concede adopts what the peer had before the round. Every
call and every draw has a seed made of its place in the run (:func:`place_seed`), so that nothing depends on timing or
on what else is in flight. N agents, M rounds.
"""

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

from rema_verl.deliberation.protocol import (
    ACTIONS,
    REFINE,
    AgentState,
    Prompts,
    Same,
    adopted_peer,
    messages,
    parse_solution,
    parse_verdict,
    show_peers,
    team_answer,
)


@dataclass(frozen=True)
class Reply:
    """One message of the LLM."""

    text: str
    prompt_tokens: int
    tokens: int
    truncated: bool = False


class PromptTooLong(ValueError):
    """A conversation that outgrew the model's context."""


Generate = Callable[..., Awaitable[Reply]]
# (states of all agents, rounds done / rounds, same) -> N distributions over ACTIONS
Policy = Callable[[list[AgentState], float, Same], list[list[float]]]


@dataclass(frozen=True)
class Team:
    """Who deliberates, and how."""

    agents: int = 3
    rounds: int = 3
    temperature: float = 1.0  # of every call, the critic's included
    max_tokens: int = 1024  # of one message
    seed: int = 0
    prompts: Prompts = field(default_factory=Prompts)


@dataclass(frozen=True)
class Call:
    """What one LLM call cost."""

    kind: str  # solve, critic, refine, debate, vanilla, cot
    agent: int
    round: int  # 0: before the first round
    prompt_tokens: int
    tokens: int
    taken: bool = True  # False: of a Refine that was executed for its reward only


@dataclass(frozen=True)
class Round:
    """One round; every list has one entry per agent."""

    before: list[AgentState]
    probabilities: list[list[float]]
    actions: list[str]
    refined: list[AgentState | None]  # what Refine led to, where it was executed
    peers: list[int]  # whom Concede adopts
    after: list[AgentState]

    def outcomes(self, agent: int) -> list[AgentState | None]:
        """What each of ACTIONS would leave the agent with; None for a Refine that was not executed."""
        return [self.before[agent], self.refined[agent], self.before[self.peers[agent]]]


@dataclass
class Deliberation:
    """What came of one question. ``counts``: malformed profiles and verdicts, truncated and overlong messages."""

    answer: str | None
    calls: list[Call] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)

    @property
    def tokens(self) -> int:
        """Input and output tokens of the calls that the team itself needed, as the paper counts them."""
        return sum(call.prompt_tokens + call.tokens for call in self.calls if call.taken)


def place_seed(*place) -> int:
    """A 31-bit seed for one place in a run.

    >>> place_seed(0, "question 7", 0, "refine", 2, 1) == place_seed(0, "question 7", 0, "refine", 2, 1) < 2**31
    True
    """
    return int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:4], "big") >> 1


def uniform(states: Sequence[AgentState], progress: float, same: Same) -> list[list[float]]:
    """Every action is as likely."""
    return [[1 / len(ACTIONS)] * len(ACTIONS) for _ in states]


def always(action: str) -> Policy:
    """One action, always; ``always("persist")`` is a majority vote over the first solutions."""
    return lambda states, progress, same: [[float(a == action) for a in ACTIONS] for _ in states]


def draw(probabilities: Sequence[float], seed: int) -> str:
    """An action from its distribution.

    >>> draw([0.0, 1.0, 0.0], seed=3)
    'refine'
    """
    return random.Random(seed).choices(ACTIONS, probabilities)[0]


class Session:
    """One question and its calls."""

    def __init__(self, question: str, key: str, sample: int, generate: Generate, team: Team):
        self.question, self.key, self.sample, self.generate, self.team = question, key, sample, generate, team
        self.calls: list[Call] = []
        self.counts: Counter = Counter()

    def seed(self, *place) -> int:
        return place_seed(self.team.seed, self.key, self.sample, *place)

    def messages(self, kind: str, **values: str) -> list[dict[str, str]]:
        return messages(kind, self.team.prompts, question=self.question, **values)

    async def call(self, kind: str, messages: list[dict[str, str]], agent: int, round: int, taken: bool = True) -> str:
        """One message. Raises PromptTooLong."""
        reply = await self.generate(
            messages,
            seed=self.seed(kind, round, agent),
            temperature=self.team.temperature,
            max_tokens=self.team.max_tokens,
            request_id=f"{self.team.seed}-{self.key}-{self.sample}-{agent}",  # one per agent: sticky, so cached
        )
        self.calls.append(Call(kind, agent, round, reply.prompt_tokens, reply.tokens, taken))
        self.counts["truncated"] += reply.truncated
        return reply.text

    async def solution(self, kind: str, messages, agent: int, round: int, taken: bool = True) -> AgentState:
        """A solution with its profile, rated by the critic. Raises PromptTooLong from the first call."""
        return await self.rated(await self.call(kind, messages, agent, round, taken), agent, round, taken)

    async def rated(self, text: str, agent: int, round: int, taken: bool = True) -> AgentState:
        """The state of an agent whose solution is ``text``: a critic call. A solution too long to rate is unrated."""
        solution = parse_solution(text)
        self.counts["malformed_profiles"] += solution.malformed
        try:
            rating = await self.call("critic", self.messages("critic", solution=text), agent, round, taken)
        except PromptTooLong:
            self.counts["overlong"] += 1
            rating = ""
        verdict = parse_verdict(rating)
        self.counts["malformed_verdicts"] += verdict.malformed
        return AgentState(
            answer=solution.answer,
            profile=solution.profile,
            confidence_vector=verdict.vector,
            confidence=verdict.confidence,
            text=text,
        )

    async def refined(self, state: AgentState, agent: int, round: int, taken: bool) -> AgentState:
        """What self-correction makes of a solution; the solution itself where there is no room to ask."""
        try:
            return await self.solution("refine", self.messages("refine", solution=state.text), agent, round, taken)
        except PromptTooLong:
            self.counts["overlong"] += 1
            return state

    def result(self, answer: str | None, rounds: list[Round] | None = None) -> Deliberation:
        # in the order of their places, not of their replies
        calls = sorted(self.calls, key=lambda call: (call.round, call.agent, call.kind == "critic"))
        return Deliberation(answer, calls, rounds or [], self.counts)


async def deliberate(
    question: str,
    policy: Policy,
    generate: Generate,
    team: Team,
    same: Same,
    *,
    key: str,
    sample: int = 0,
    explore: bool = False,
    greedy: bool = False,
) -> Deliberation:
    """One deliberation.

    Args:
        same: whether two answers are equivalent; may be slow, and runs in a thread.
        key: the question's name, which seeds the calls together with ``sample`` and ``team.seed``.
        explore: execute Refine for every agent in every round, also where it was not chosen, for its reward.
        greedy: take the most likely action (the first of equal ones) instead of drawing.

    Raises:
        PromptTooLong: the question leaves no room for a solution.
    """
    session = Session(question, key, sample, generate, team)
    solve = session.messages("solve")
    states = list(await asyncio.gather(*(session.solution("solve", solve, i, 0) for i in range(team.agents))))
    rounds = []
    for t in range(1, team.rounds + 1):
        probabilities = await asyncio.to_thread(policy, states, (t - 1) / team.rounds, same)
        if greedy:
            actions = [ACTIONS[max(range(len(ACTIONS)), key=p.__getitem__)] for p in probabilities]
        else:
            actions = [draw(p, session.seed("action", t, i)) for i, p in enumerate(probabilities)]
        asked = [i for i in range(team.agents) if explore or actions[i] == REFINE]
        replies = await asyncio.gather(*(session.refined(states[i], i, t, actions[i] == REFINE) for i in asked))
        refined: list[AgentState | None] = [None] * team.agents
        for i, state in zip(asked, replies, strict=True):
            refined[i] = state
        peers = [adopted_peer([s.confidence for s in states], i) for i in range(team.agents)]
        now = Round(states, probabilities, actions, refined, peers, after=[])
        outcomes = (now.outcomes(i)[ACTIONS.index(actions[i])] for i in range(team.agents))
        states = [state for state in outcomes if state is not None]  # a Refine that was chosen was executed
        rounds.append(replace(now, after=states))
    answers, confidences = [s.answer for s in states], [s.confidence for s in states]
    return session.result(await asyncio.to_thread(team_answer, answers, confidences, same), rounds)


# --- baselines: the same servers, questions, sampling and vote ------------------------------------------------------


async def single(
    kind: str, question: str, generate: Generate, team: Team, *, key: str, sample: int = 0
) -> Deliberation:
    """One agent, one call. kind: "vanilla" (the answer alone) or "cot" (step by step)."""
    session = Session(question, key, sample, generate, team)
    text = await session.call(kind, session.messages(kind), 0, 0)
    return session.result(parse_solution(text).answer)


async def self_consistency(
    question: str, calls: int, generate: Generate, team: Team, same: Same, *, key: str, sample: int = 0
) -> Deliberation:
    """A majority vote over ``calls`` independent chains of thought; ties go to the earliest."""
    session = Session(question, key, sample, generate, team)
    chat = session.messages("cot")
    texts = await asyncio.gather(*(session.call("cot", chat, i, 0) for i in range(calls)))
    answers = [parse_solution(text).answer for text in texts]
    return session.result(await asyncio.to_thread(team_answer, answers, [0.0] * calls, same))


async def debate(
    question: str, generate: Generate, team: Team, same: Same, *, key: str, sample: int = 0
) -> Deliberation:
    """Fixed debate: in every round every agent reads all solutions and answers again; then a majority vote.

    An agent for whose debate the context has no room keeps its solution.
    """
    session = Session(question, key, sample, generate, team)
    solve = session.messages("solve")
    texts = list(await asyncio.gather(*(session.call("solve", solve, i, 0) for i in range(team.agents))))

    async def answer_again(agent: int, t: int) -> str:
        peers = [text for j, text in enumerate(texts) if j != agent]
        chat = session.messages("debate", solution=texts[agent], peers=show_peers(peers))
        try:
            return await session.call("debate", chat, agent, t)
        except PromptTooLong:
            session.counts["overlong"] += 1
            return texts[agent]

    for t in range(1, team.rounds + 1):
        texts = list(await asyncio.gather(*(answer_again(i, t) for i in range(team.agents))))
    answers = [parse_solution(text).answer for text in texts]
    return session.result(await asyncio.to_thread(team_answer, answers, [0.0] * team.agents, same))
