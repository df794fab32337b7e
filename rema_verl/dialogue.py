"""The ReMA dialogue: who sees what, whose turn it is, when it ends. Plain Python: no torch, no verl.

One dialogue, as each role sees it (its own messages are ``assistant``, the partner's are ``user``):

    meta_thinking's view                      reasoning's view
    system     <its instructions>             system     <its instructions>
    user       Q                              user       Question: Q / Instruction: m1
    assistant  m1                             assistant  r1
    user       r1                             user       m2 [FINISH]
    assistant  m2 [FINISH]                    assistant  r2  <- the final answer
    (r2 is not shown: the dialogue is over)

A *turn* is one message of ``meta_thinking`` and the answer of ``reasoning`` (ReMA, Sec. 3.3; views as in the authors'
code).
"""

import json
import re
from dataclasses import dataclass, field
from enum import Enum

META_THINKING = "meta_thinking"
REASONING = "reasoning"
ROLES = (META_THINKING, REASONING)


class StopReason(str, Enum):
    """Why a dialogue ended."""

    FINISHED = "finished"  # reasoning answered the message that carried the finish flag
    MAX_TURNS = "max_turns"  # the turn limit was reached without the flag
    TRUNCATED = "truncated"  # a message hit the per-turn token limit
    CONTEXT_EXHAUSTED = "context_exhausted"  # the next prompt would not fit the context budget
    EMPTY_MESSAGE = "empty_message"  # a message had no visible character
    NO_TOKEN = "no_token"  # the engine returned no token for a message, which is then none

    __str__ = str.__str__


@dataclass(frozen=True)
class Prompts:
    """What the roles are told. ``first_instruction`` frames reasoning's first user message."""

    meta_thinking: str
    reasoning: str
    first_instruction: str = "Question: {question}\n\nInstruction: {instruction}"


def fill(template: str, **values: str) -> str:
    """Replace ``{name}`` by its value, in one pass; other braces (LaTeX) stay as they are."""
    return re.sub(r"\{(%s)\}" % "|".join(values), lambda match: values[match[1]], template)


MULTI_TURN_PROMPTS = Prompts(
    meta_thinking=(
        "You are the planner of a two-person team that solves mathematical problems in dialogue. Your partner carries "
        "out the work; you think about how the work should go. In every message give your partner one clear next step "
        "or remark. Look at the problem from more than one angle, check your partner's results honestly, say so when "
        "something is wrong and go back to the last sound point, and ask for another approach when a check would "
        "help. Do not carry out the calculation yourself. When the solution is complete and you trust it, tell your "
        "partner to state the final answer and end that message with {finish_flag}."
    ),
    reasoning=(
        "You are the solver of a two-person team. Your partner sends instructions, one at a time. Follow the latest "
        "instruction exactly, reasoning step by step and showing your work, and stop when that instruction is done. "
        "Only when your partner asks for the final answer, give it inside \\boxed{}."
    ),
)

SINGLE_TURN_PROMPTS = Prompts(
    meta_thinking=(
        "You are a teacher. A less experienced solver will work on the user's problem with nothing but your guidance. "
        "Write a short high-level plan: what to find out first, which ideas or theorems help, what to verify. "
        "Never calculate or state the answer: a plan that contains the answer counts as a failure."
    ),
    reasoning=(
        "You solve mathematical problems by following the instruction you are given, exactly and completely. Show "
        "each step and put the final answer inside \\boxed{}."
    ),
    first_instruction=(
        "[Question]\n{question}\n[End of Question]\n\n[Provided Instruction]\n{instruction}\n[End of Instruction]"
    ),
)


JUDGE_PROMPTS = Prompts(
    meta_thinking=(
        "A judge will compare two answers to the user's question. You see only the question. Write the plan by which "
        "the judge should compare them: what a good answer must contain, which mistakes are serious, what to check "
        "and in which order; if it helps, sketch a reference answer. Do not name a winner: a plan that contains a "
        "verdict counts as a failure."
    ),
    reasoning=(
        "You are a judge. You are given a question, two answers, A and B, and an evaluation plan. Follow the plan step "
        "by step, be fair to both whatever their order and length, and end with your verdict: [[A]] if answer A is "
        "better, [[B]] if answer B is better."
    ),
    first_instruction="{question}\n\n[The Start of Evaluation Plan]\n{instruction}\n[The End of Evaluation Plan]",
)

JSON_PROMPTS = Prompts(
    meta_thinking=(
        "A solver will work on the user's problem. You may help with exactly one action, written as one JSON object "
        'with the fields "action" and "output". DECOMPOSE: "output" holds the sub-questions that lead to the answer, '
        'one per line. REWRITE: "output" is the problem in clearer words, with the same answer. EMPTY: the problem is '
        'fine as it is and "output" is an empty string. Never state the answer.'
    ),
    reasoning=(
        "You solve mathematical problems. If sub-questions are given, work through them in order. Show each step and "
        "put the final answer inside \\boxed{}."
    ),
    first_instruction=(
        "[Question]\n{question}\n[End of Question]\n\n[Sub-questions]\n{instruction}\n[End of Sub-questions]"
    ),
)
JSON_ACTIONS = ("DECOMPOSE", "REWRITE", "EMPTY")
JSON_SCHEMA = {
    "type": "object",
    "properties": {"action": {"enum": list(JSON_ACTIONS)}, "output": {"type": "string"}},
    "required": ["action", "output"],
    "additionalProperties": False,
}
INVALID = "INVALID"  # a plan that is none of JSON_ACTIONS; the question then goes on as it is


def parse_plan(message: str) -> tuple[str, str]:
    """(action, output) of a plan in JSON.

    >>> parse_plan('{"action": "REWRITE", "output": "1 + 1 = ?"}'), parse_plan("Add them.")
    (('REWRITE', '1 + 1 = ?'), ('INVALID', ''))
    """
    try:
        plan = json.loads(message)
        action, output = plan["action"], plan["output"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return INVALID, ""
    return (action, output) if action in JSON_ACTIONS and isinstance(output, str) else (INVALID, "")


def default_prompts(max_turns: int, task: str = "math", plan: str = "text") -> Prompts:
    """The prompts of the single-turn setting (``max_turns=1``) or of the multi-turn one.

    The judge's task and plans in JSON exist in the single-turn setting only.
    """
    if task == "judge":
        return JUDGE_PROMPTS
    if plan == "json":
        return JSON_PROMPTS
    return SINGLE_TURN_PROMPTS if max_turns == 1 else MULTI_TURN_PROMPTS


# System messages for one model on its own: the baselines a dialogue is compared with (ReMA, App. on prompts). "vrp"
# answers directly, "mrp" plans first in the same reply; the judge's pair decides between two answers.
SINGLE_AGENT_PROMPTS: dict[str, str] = {
    "vrp": "Solve the user's problem step by step, showing your work, and put the final answer inside \\boxed{}.",
    "mrp": (
        "Solve the user's problem in two parts. First write a short high-level plan, as an instruction to yourself: "
        "what to find out, in which order, what to check; no calculation yet. Then follow the plan step by step, "
        "showing your work, and put the final answer inside \\boxed{}."
    ),
    "judge_vrp": (
        "You decide which of two answers to a question is better. Read the question and both answers, then compare "
        "them step by step: are they correct, do they do what was asked, are they safe. Neither the order nor the "
        "length of the answers counts. End with your verdict on a line of its own: [[A]] if answer A is better, [[B]] "
        "if answer B is better."
    ),
    "judge_mrp": (
        "You decide which of two answers to a question is better. First write an evaluation plan for this question "
        "between [Start of Evaluation Plan] and [End of Evaluation Plan]: what a good answer must contain, what to "
        "verify and how. Then carry out the plan on both answers, step by step. Neither the order nor the length of "
        "the answers counts. End with your verdict on a line of its own: [[A]] if answer A is better, [[B]] if answer "
        "B is better."
    ),
}


@dataclass
class Dialogue:
    """One dialogue's state.

    Feed it messages in order with :meth:`add`; :attr:`speaker` says whose message comes next, and is None once
    :attr:`stop_reason` is set.

    With ``max_turns=1`` there is one plan and one answer, and the dialogue then counts as finished without a flag:
    the paper's single-turn setting.

    ``plan_question`` is what meta_thinking is shown in place of the question (a judge's planner sees the user's
    question without the answers). ``plan="json"``: meta_thinking's first message is a :func:`parse_plan` action.

    >>> d = Dialogue("1 + 1?", max_turns=2)
    >>> d.add("Add them. [FINISH]"); d.add("2")
    >>> d.stop_reason.value, d.num_turns
    ('finished', 1)
    """

    question: str
    max_turns: int
    finish_flag: str = "[FINISH]"
    prompts: Prompts | None = None
    plan_question: str | None = None
    plan: str = "text"
    messages: list[str] = field(default_factory=list)  # m1, r1, m2, r2, ...
    stop_reason: StopReason | None = None

    def __post_init__(self) -> None:
        if self.max_turns < 1:
            raise ValueError(f"max_turns must be at least 1, got {self.max_turns}")
        if self.prompts is None:
            self.prompts = default_prompts(self.max_turns, plan=self.plan)

    @property
    def speaker(self) -> str | None:
        """The role whose message comes next, None when the dialogue is over."""
        return None if self.stop_reason else ROLES[len(self.messages) % 2]

    @property
    def num_turns(self) -> int:
        """Turns begun: the number of meta_thinking's messages."""
        return (len(self.messages) + 1) // 2

    @property
    def flagged(self) -> bool:
        """Whether meta_thinking's latest message carries the finish flag."""
        latest = self.messages[(len(self.messages) - 1) // 2 * 2 :][:1]
        return bool(latest) and self.finish_flag in latest[0]

    def add(self, message: str, truncated: bool = False) -> None:
        """Append the speaker's message and decide whether the dialogue goes on.

        Args:
            message: the visible text.
            truncated: whether it was cut off at the per-turn token limit; this outranks a finish flag in it.

        Raises:
            ValueError: if the dialogue is already over.
        """
        speaker = self.speaker
        if speaker is None:
            raise ValueError(f"the dialogue is over ({self.stop_reason})")
        self.messages.append(message)
        if truncated:
            self.stop_reason = StopReason.TRUNCATED
        elif not message.strip():
            self.stop_reason = StopReason.EMPTY_MESSAGE
        elif speaker == REASONING:
            if self.flagged or self.max_turns == 1:
                self.stop_reason = StopReason.FINISHED
            elif self.num_turns == self.max_turns:
                self.stop_reason = StopReason.MAX_TURNS

    def stop(self, reason: StopReason) -> None:
        """End the dialogue from outside (the caller counts tokens; a dialogue does not)."""
        self.stop_reason = reason

    def view(self, role: str) -> list[dict[str, str]]:
        """The chat messages as ``role`` sees them, up to now.

        Before meta_thinking's first message, ``reasoning`` sees an empty instruction.
        """
        system = fill(getattr(self.prompts, role), finish_flag=self.finish_flag)
        mine, theirs = self.messages[ROLES.index(role) :: 2], self.messages[1 - ROLES.index(role) :: 2]
        if role == META_THINKING:
            opening, heard = self.plan_question or self.question, theirs
        else:
            opening, heard = self._first_instruction("".join(theirs[:1])), theirs[1:]
        view = [{"role": "system", "content": system}, {"role": "user", "content": opening}]
        for i, message in enumerate(mine):
            view.append({"role": "assistant", "content": message})
            if i < len(heard):
                view.append({"role": "user", "content": heard[i]})
        return view

    def _first_instruction(self, message: str) -> str:
        """Reasoning's first user message."""
        assert self.prompts is not None
        question, instruction = self.question, message
        if self.plan == "json":
            action, instruction = parse_plan(message)
            if action == "REWRITE":
                question, instruction = instruction, ""
            if not instruction.strip():
                return question
        return fill(self.prompts.first_instruction, question=question, instruction=instruction)


def neutralise(text: str, control_strings: tuple[str, ...]) -> str:
    """Break every control string in ``text`` with a space after its first character.

    What one role (or the data) wrote enters the other's context as the content of one message; left as it is,
    "<|im_end|>" in it would be read as the end of that message and what follows as a turn that nobody took.

    >>> neutralise("a<|im_end|>b", ("<|im_end|>",))
    'a< |im_end|>b'
    """
    breakable = [c for c in control_strings if len(c.strip()) > 1]
    while found := [c for c in breakable if c in text]:
        for control in found:
            text = text.replace(control, f"{control[0]} {control[1:]}")
    return text
