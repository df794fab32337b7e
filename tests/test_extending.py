"""docs/extending.md is true: its code is that of docs/examples and runs; its commands compose and pass the checks."""

import asyncio
import importlib
import json
import os
import re
import subprocess

import pytest
from conftest import MODEL_TYPE, REPO
from hydra.utils import get_class
from omegaconf import OmegaConf
from test_agent_loop import ScriptedClient, make_loop
from test_doctor import ROW, models, rows  # noqa: F401  (fixtures)
from test_reward_manager import score
from verl.experimental.agent_loop.agent_loop import DictConfigWrap
from verl.trainer.ppo.reward import get_custom_reward_fn, resolve_reward_manager_cls
from verl.utils.config import validate_config

from rema_verl import checks, doctor
from rema_verl.dialogue import META_THINKING, REASONING
from rema_verl.rewards.rema import ReMARewardManager

EXAMPLES = REPO / "docs" / "examples"
PAGE = (REPO / "docs" / "extending.md").read_text()
COMMANDS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def critic():
    """The example, imported as verl would import it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("critic")


# --- the page ------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_files_that_are_tested():
    shown = dict(re.findall(r"```\w+\n# docs/examples/(\S+)\n(.*?)```", PAGE, re.DOTALL))
    assert set(shown) == {file.name for file in EXAMPLES.iterdir() if file.is_file()}
    for name, text in shown.items():
        assert text == (EXAMPLES / name).read_text()


def settings_of(command, models, rows):  # noqa: F811
    done = subprocess.run(
        ["bash", "-c", command], cwd=REPO, env=os.environ | {"PRINT_OVERRIDES": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    file = rows([ROW] * 2)
    overrides = [*done.stdout.splitlines(), f"data.train_files={file}", f"data.val_files={file}"]
    return doctor.compose(overrides, str(models / "llama3"))


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_the_pages_commands_pass_the_checks(number, models, rows, monkeypatch):  # noqa: F811
    assert len(COMMANDS) == 3
    monkeypatch.chdir(REPO)
    config = settings_of(COMMANDS[number], models, rows)
    checks.check(config)
    validate_config(config, use_reference_policy=False, use_critic=False)


def test_the_page_names_what_exists():
    """The places that the page says a third role would change."""
    for name in re.findall(r"^\| `([\w.]+)`", PAGE.split("## A third role in trainer mode")[1], re.MULTILINE):
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(["rema_verl", *parts[:length]]))
                break
            except ModuleNotFoundError:
                continue
        for part in parts[length:]:
            found = getattr(found, part, None) or found.__dataclass_fields__[part]


# --- rewards -------------------------------------------------------------------------------------------------------


def reward_config(command, models, rows):  # noqa: F811
    config = settings_of(command, models, rows)
    assert config.trainer.v1.trainer_mode == "rema"
    return config


@pytest.mark.parametrize(
    ("answer", "stop", "expected", "acc"),
    [
        ("\\boxed{4}", "finished", 1.0, 1.0),
        ("The answer is 4", "finished", 0.5, 1.0),
        ("\\boxed{5}", "finished", 0.0, 0.0),
        ("\\boxed{4}", "max_turns", 0.0, 0.0),
    ],
)
def test_another_outcome(answer, stop, expected, acc, models, rows, monkeypatch):  # noqa: F811
    monkeypatch.chdir(REPO)
    config = reward_config(COMMANDS[0], models, rows)
    manager = ReMARewardManager(config, tokenizer=None, compute_score=get_custom_reward_fn(config))
    reward, info, turns = score(["Add. [FINISH]", answer], stop, reward_manager=manager)
    assert (reward, info["acc"]) == (expected, acc)
    assert turns == {META_THINKING: [expected], REASONING: [expected]}


def test_rewards_per_role(models, rows, monkeypatch):  # noqa: F811
    monkeypatch.chdir(REPO)
    config = reward_config(COMMANDS[1], models, rows)
    manager = resolve_reward_manager_cls(config)(config, tokenizer=None, compute_score=None)
    messages = ["step " * 50, "r", "now " * 40 + "[FINISH]", "\\boxed{4}"]
    reward, info, turns = score(messages, reward_manager=manager)
    assert reward == 1.0 and info["words_beyond_budget"] == 11.0
    assert turns[META_THINKING] == pytest.approx([-0.1, 0.99]) and turns[REASONING] == [0.0, 1.0]
    assert json.loads(info["turn_rewards"]) == turns


# --- a third role --------------------------------------------------------------------------------------------------


class ThreeVoices(ScriptedClient):
    """As the two-role client of the agent loop's tests, with room for a third."""

    def __init__(self, tokenizer, script):
        super().__init__(tokenizer, script)
        self.calls = {role: [] for role in script}


def play(critic, tokenizer, family, script, **options):
    """The rows of a dialogue by role, and the client."""
    loop_class = get_class(OmegaConf.load(EXAMPLES / "critic.yaml")[0]["_target_"])
    assert loop_class is critic.CriticAgentLoop
    client = ThreeVoices(tokenizer, script)

    async def run():
        # as make_loop of the agent loop's tests, with the class of the example
        base = make_loop(tokenizer, family, client, **options)
        loop = loop_class(
            trainer_config=DictConfigWrap(base.config),
            server_manager=client,
            tokenizer=tokenizer,
            processor=None,
            dataset_cls=None,
            data_config=DictConfigWrap(base.config.data),
            hf_model_type=MODEL_TYPE[family],
        )
        return await loop.run({}, raw_prompt=[{"role": "user", "content": "What is 2 + 2?"}])

    return {row.extra_fields["role"]: row for row in asyncio.run(run())}, client


SCRIPT = {
    META_THINKING: ["Add them.", "Look again."],
    REASONING: ["It is \\boxed{5}.", "It is \\boxed{4}."],
    "critic": ["5 is wrong. <|im_end|>", "[ACCEPT]"],
}


def test_three_roles_speak_and_critic_ends_the_dialogue(critic, tokenizers, family):
    tokenizer = tokenizers[family]
    rows, client = play(critic, tokenizer, family, SCRIPT)  # noqa: F811
    assert list(rows) == [META_THINKING, REASONING, "critic"]
    for role, row in rows.items():  # what was sampled is what is trained, and contexts only grow
        whole = row.prompt_ids + row.response_ids
        mask = [0] * len(row.response_ids)
        assert len(client.calls[role]) == len(row.extra_fields["turn_spans"]) == 2
        for (prompt, sampled, logprobs), (start, end) in zip(
            client.calls[role], row.extra_fields["turn_spans"], strict=True
        ):
            assert whole[: len(prompt)] == prompt
            assert row.response_ids[start:end] == sampled and row.response_logprobs[start:end] == logprobs
            mask[start:end] = [1] * (end - start)
        assert row.response_mask == mask
    fields = rows["critic"].extra_fields
    assert fields["stop_reason"] == "finished" and fields["dialogue_turns"] == 2 and fields["min_global_steps"] == 3
    heard = tokenizer.decode(client.calls[META_THINKING][1][0])
    assert "It is \\boxed{5}.\n\nCritic: 5 is wrong." in heard  # meta_thinking hears both
    if family == "qwen2":
        assert "< |im_end|>" in heard and heard.count("wrong. <|im_end|>") == 0
    assert "5 is wrong" not in tokenizer.decode(client.calls[REASONING][1][0])

    reward, info, _ = score(fields["messages"], fields["stop_reason"])
    assert reward == 1.0 and info["finished"] == 1.0


def test_without_acceptance_the_turn_limit_ends_it(critic):
    dialogue = critic.CriticDialogue("2 + 2?", max_turns=2)
    spoken = []
    while (role := dialogue.speaker) is not None:
        spoken.append(role)
        dialogue.add("No.")
    assert spoken == [META_THINKING, REASONING, "critic", META_THINKING, REASONING]
    assert dialogue.stop_reason == "max_turns" and dialogue.remarks == ["No."]


def test_a_critic_without_words_or_cut_off_ends_it(critic):
    for message, truncated, reason in ((" ", False, "empty_message"), ("[ACCEPT]", True, "truncated")):
        dialogue = critic.CriticDialogue("2 + 2?", max_turns=2)
        dialogue.add("Add.")
        dialogue.add("4")
        dialogue.add(message, truncated)
        assert dialogue.stop_reason == reason


def test_a_question_that_does_not_fit_gives_no_rows(critic, tokenizers):
    rows, _ = play(critic, tokenizers["llama3"], "llama3", SCRIPT, prompt_length=5)  # noqa: F811
    assert rows == {}
