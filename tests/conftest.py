"""Fixtures shared by all tests: real data, tiny tokenizers, and a way to run commands as a user does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "data_prep"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VERL_PLATFORM", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Templates written here in the style of three families. "llama3" and "qwen2" mark turns with added tokens; to the
# tokenizer of "chatml" the same markers are ordinary text.
TEMPLATES = {
    "llama3": (
        "{{ '<|begin_of_text|>' }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "qwen2": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
TEMPLATES["chatml"] = TEMPLATES["qwen2"].split("{% endif %}", 1)[1]
SPECIAL = {
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "chatml": ["</s>"],
}
MODEL_TYPE = {"llama3": "llama", "qwen2": "qwen2", "chatml": "gpt_neox"}


def make_tokenizer(family: str):
    """A byte-level BPE tokenizer with the family's special tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL[family], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    text = (REPO / "rema_verl" / "dialogue.py").read_text().splitlines()
    tokenizer.train_from_iterator(text * 3, trainer)
    end = SPECIAL[family][-1]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=end, chat_template=TEMPLATES[family]
    )


@pytest.fixture(scope="session", params=list(TEMPLATES))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def tokenizers() -> dict:
    return {family: make_tokenizer(family) for family in TEMPLATES}


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real rows. CI must have it; elsewhere its absence skips, with the reason."""
    path = Path(os.environ.get("REMA_SHARED_DATA") or REPO.parent / "shared" / "data")
    if not path.is_dir():
        reason = f"no real rows: {path} is not a folder (set REMA_SHARED_DATA)"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return path


class Command:
    """A command in a process group of its own, output in a file."""

    def __init__(self, arguments: list, log: Path, **environment):
        self.log = log
        environment = {**os.environ, **{k: str(v) for k, v in environment.items()}}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        self.process = subprocess.Popen(
            [str(a) for a in arguments],
            cwd=REPO,
            env=environment,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, timeout: float) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end within {timeout} s; log ends:\n{self.text()[-3000:]}") from None

    def kill(self) -> None:
        """SIGKILL to the whole group, as a machine that goes down would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def text(self) -> str:
        return self.log.read_text(errors="replace")


@pytest.fixture
def start(tmp_path):
    """start(arguments, **environment) -> Command; whatever still runs at the end is killed."""
    commands: list[Command] = []

    def run(arguments: list, **environment) -> Command:
        commands.append(Command(arguments, tmp_path / f"log{len(commands)}.txt", **environment))
        return commands[-1]

    yield run
    for command in commands:
        if command.process.poll() is None:
            command.kill()
