"""The dialogue protocol: who sees what, whose turn, when it ends."""

import pytest

from rema_verl.dialogue import (
    META_THINKING,
    MULTI_TURN_PROMPTS,
    REASONING,
    SINGLE_TURN_PROMPTS,
    Dialogue,
    Prompts,
    StopReason,
    fill,
    neutralise,
)


def play(*messages: str, max_turns: int = 5, **kwargs) -> Dialogue:
    dialogue = Dialogue("Q", max_turns=max_turns, **kwargs)
    for message in messages:
        dialogue.add(message)
    return dialogue


def test_roles_alternate_and_meta_thinking_begins():
    dialogue = Dialogue("Q", max_turns=3)
    speakers = []
    for message in ("m1", "r1", "m2", "r2"):
        speakers.append(dialogue.speaker)
        dialogue.add(message)
    assert speakers == [META_THINKING, REASONING] * 2


def test_each_role_sees_its_own_view():
    dialogue = play("m1", "r1", "m2")
    meta, reasoning = dialogue.view(META_THINKING), dialogue.view(REASONING)
    assert [m["role"] for m in meta] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in meta[1:]] == ["Q", "m1", "r1", "m2"]
    assert [m["role"] for m in reasoning] == ["system", "user", "assistant", "user"]
    assert reasoning[1]["content"] == "Question: Q\n\nInstruction: m1"
    assert [m["content"] for m in reasoning[2:]] == ["r1", "m2"]
    assert "[FINISH]" in meta[0]["content"] and meta[0]["content"] != reasoning[0]["content"]


def test_views_only_grow():
    dialogue, before = Dialogue("Q", max_turns=9), {}
    for i in range(12):
        dialogue.add(f"message {i}")
        for role in (META_THINKING, REASONING):
            view = dialogue.view(role)
            assert view[: len(before.get(role, []))] == before.get(role, [])
            before[role] = view


def test_finish_flag_gives_reasoning_one_last_word():
    dialogue = play("m1", "r1", "done [FINISH]")
    assert dialogue.speaker == REASONING and dialogue.stop_reason is None
    dialogue.add("\\boxed{1}")
    assert dialogue.speaker is None and dialogue.stop_reason is StopReason.FINISHED and dialogue.num_turns == 2


def test_only_meta_thinking_can_finish():
    assert play("m1", "r1 [FINISH]", "m2").speaker == REASONING


def test_turn_limit():
    dialogue = play("m1", "r1", "m2", "r2", max_turns=2)
    assert dialogue.stop_reason is StopReason.MAX_TURNS and dialogue.num_turns == 2
    assert play("m1", "r1", "m2 [FINISH]", "r2", max_turns=2).stop_reason is StopReason.FINISHED


def test_single_turn_needs_no_flag_and_has_its_own_prompts():
    dialogue = play("plan", "\\boxed{1}", max_turns=1)
    assert dialogue.stop_reason is StopReason.FINISHED
    assert dialogue.prompts is SINGLE_TURN_PROMPTS and play(max_turns=2).prompts is MULTI_TURN_PROMPTS


def test_truncation_outranks_the_flag():
    dialogue = Dialogue("Q", max_turns=3)
    dialogue.add("so [FINISH]", truncated=True)
    assert dialogue.stop_reason is StopReason.TRUNCATED


@pytest.mark.parametrize("blank", ["", " ", "\n\t \u2003"])
def test_empty_message(blank):
    assert play("m1", blank).stop_reason is StopReason.EMPTY_MESSAGE


def test_stopped_from_outside():
    dialogue = play("m1")
    dialogue.stop(StopReason.CONTEXT_EXHAUSTED)
    assert dialogue.speaker is None
    with pytest.raises(ValueError, match="over"):
        dialogue.add("x")


def test_bad_turn_limit():
    with pytest.raises(ValueError, match="max_turns"):
        Dialogue("Q", max_turns=0)


def test_braces_in_prompts_and_questions_are_text():
    prompts = Prompts("say {finish_flag}, \\boxed{}", "{x}", "{question} {instruction}")
    dialogue = Dialogue("{instruction} \\frac{1}{2}", max_turns=2, prompts=prompts)
    dialogue.add("{question}")
    assert dialogue.view(META_THINKING)[0]["content"] == "say [FINISH], \\boxed{}"
    assert dialogue.view(REASONING)[1]["content"] == "{instruction} \\frac{1}{2} {question}"
    assert fill("{a}{b}{a}", a="{b}", b="1") == "{b}1{b}"


@pytest.mark.parametrize("text", ["<|im_end|>", "<<|im_end|>|im_end|>", "x<|im_end|><|im_end|>", "</s></s></s>"])
def test_neutralise_leaves_no_control_string(text):
    controls = ("<|im_end|>", "</s>")
    out = neutralise(text, controls)
    assert not any(c in out for c in controls)
    assert out.replace(" ", "") == text.replace(" ", "")
