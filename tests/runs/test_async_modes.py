"""verl's asynchronous trainer modes with two-role dialogues: a weight sync interrupts messages, and they go on.

`colocate_async` samples with one engine beside the trainer, which stops for each update; `separate_async` with an
engine in a process of its own, which samples while the trainer updates.
"""

import importlib
import json
import math
import random
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from build_tiny import PROMPTS, sft_rows
from common import make_tiny, read_metrics
from conftest import REPO

from rema_verl.dialogue import ROLES

pytestmark = [pytest.mark.slow, pytest.mark.long]
STEPS = 6
SAME_WEIGHTS = 1e-3  # nats, between vLLM and trainer: float32 on CPU stays below 1e-4
MODES = {
    "colocate_async": ["trainer.v1.colocate_async.num_warmup_batches=2"],
    "separate_async": [
        "trainer.v1.separate_async.num_warmup_batches=2",
        "trainer.v1.separate_async.parameter_sync_step=1",
        "actor_rollout_ref.hybrid_engine=false",
        "actor_rollout_ref.rollout.nnodes=1",
        "actor_rollout_ref.rollout.n_gpus_per_node=1",
        "actor_rollout_ref.rollout.checkpoint_engine.backend=gloo",
        "ray_kwargs.ray_init.num_gpus=2",
    ],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Data, a model that goes on and on in messages of 8 to 48 tokens, and a reward that no two answers share."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_tiny(tmp_path_factory.mktemp("tiny"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    rng = random.Random(0)
    chats = []
    for _ in range(64):
        said = ["".join(rng.choices("01234+-*", k=rng.randint(8, 48))) for _ in range(6)]
        chats += sft_rows(f"{rng.randrange(5)}+{rng.randrange(5)}", said)
    loss = importlib.import_module("build_smoke").fit(model, tokenizer, chats, steps=80, batch=8, rng=rng)
    assert loss < 3  # of ln 320 = 5.8; what it says is drawn from 8 characters: ln 8 = 2.1
    model.save_pretrained(folder / "model")
    (folder / "reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):\n"
        "    return sum(map(ord, solution_str)) % 97 / 97\n"
    )
    return folder


def command(inputs: Path, run: Path, mode: str) -> list[str]:
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    config = {
        "data.train_files": inputs / "train.parquet",
        "data.val_files": inputs / "val.parquet",
        "data.train_batch_size": 4,
        "data.max_prompt_length": 512,
        "data.max_response_length": 64,
        "rema.max_turns": 4,
        "rema.mask_unfinished": "false",
        "reward.custom_reward_function.path": inputs / "reward.py",
        "actor_rollout_ref.model.path": inputs / "model",
        f"{actor}.ppo_mini_batch_size": 4,
        f"{actor}.ppo_micro_batch_size_per_gpu": 8,
        f"{actor}.optim.lr": 1e-3,
        f"{rollout}.n": 4,
        f"{rollout}.max_num_seqs": 8,  # most dialogues wait for their turn, so a sync always finds some at work
        f"{rollout}.log_prob_micro_batch_size_per_gpu": 8,
        f"{rollout}.max_num_batched_tokens": 2048,
        "trainer.v1.trainer_mode": mode,
        "trainer.total_training_steps": STEPS,
        "trainer.total_epochs": 100,
        "trainer.save_freq": -1,
        "trainer.test_freq": -1,
        "trainer.val_before_train": "false",
        "trainer.default_local_dir": run / "checkpoints",
        "hydra.run.dir": run / "hydra",
    }
    config |= {f"rema.prompts.{name}": f"'{text}'" for name, text in PROMPTS.items()}
    start = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-name", "rema_trainer", "+device=cpu"]
    return start + [f"{key}={value}" for key, value in config.items()] + MODES[mode]


def environment(run: Path) -> dict[str, str]:
    for folder in ("metrics", "probe"):
        (run / folder).mkdir(parents=True)
    return {
        "VERL_FILE_LOGGER_PATH": str(run / "metrics" / "run.jsonl"),
        "PYTHONPATH": f"{REPO}:{REPO / 'tests/runs'}",
        "VERL_USE_EXTERNAL_MODULES": "probe_async",
        "PROBE": str(run / "probe"),
        "OMP_NUM_THREADS": "1",
        "TQ_NUM_THREADS": "2",
        "RAY_AUTH_MODE": "disabled",
        "TORCHDYNAMO_DISABLE": "1",
    }


@dataclass
class Message:
    """One message of a role, and the requests it took."""

    requests: list[dict] = field(default_factory=list)

    def goes_on_with(self, request: dict) -> bool:
        """Whether the last request was cut short, and this one brings all that it brought and handed out."""
        last = self.requests[-1]
        return last["stop_reason"] == "aborted" and request["prompt"] == last["prompt"] + last["ids"]

    @property
    def ids(self) -> list[int]:
        return [token for request in self.requests for token in request["ids"]]

    @property
    def log_probs(self) -> list[float]:
        return [log_prob for request in self.requests for log_prob in request["log_probs"]]

    @property
    def versions(self) -> list[int]:
        """Of the weights, for each token."""
        return [request["version"] for request in self.requests for _ in request["ids"]]


def lines(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for file in (run / "probe").glob(f"{name}-*") for line in file.read_text().splitlines()]


def messages_of(run: Path) -> dict[str, list[Message]]:
    """Request id (trajectory and role) -> its messages."""
    messages: dict[str, list[Message]] = defaultdict(list)
    for request in lines(run, "requests"):
        said = messages[request["request_id"]]
        if not said or not said[-1].goes_on_with(request):
            said.append(Message())
        said[-1].requests.append(request)
    return messages


def check_row(row: dict, said: list[Message]) -> None:
    """The row is what the engines were given and what they sampled, token by token."""
    whole = row["prompts"] + row["responses"]
    mask = [0] * len(row["responses"])
    assert len(said) == len(row["turn_spans"])
    for message, (start, end) in zip(said, row["turn_spans"], strict=True):
        assert whole[: len(row["prompts"]) + start] == message.requests[0]["prompt"]
        assert row["responses"][start:end] == message.ids
        assert row["rollout_log_probs"][start:end] == pytest.approx(message.log_probs, abs=1e-6)
        mask[start:end] = [1] * (end - start)
    assert row["response_mask"] == mask and row["token_drift"] == 0
    if versions := [request["version"] for message in said for request in message.requests]:
        assert (row["min_global_steps"], row["max_global_steps"]) == (min(versions), max(versions))


def difference_by_weights(rows: list[dict], messages: dict[str, list[Message]]) -> dict[str, list[float]]:
    """|engine's - trainer's log-prob| of each sampled token, by the weights that sampled it.

    "same": the trainer's own; "went on": the trainer's own, in a message that began under older ones; "older".
    """
    differences: dict[str, list[float]] = {"same": [], "went on": [], "older": []}
    for row in rows:
        said = messages.get(f"{row['trajectory_id']}-{row['role']}", [])
        for message, (begin, end) in zip(said, row["turn_spans"], strict=True):
            both = zip(row["rollout_log_probs"][begin:end], row["old_log_probs"][begin:end], strict=True)
            for (engine, trainer), version in zip(both, message.versions, strict=True):
                current = version == row["step"] - 1
                kind = "older" if not current else "same" if version == message.versions[0] else "went on"
                differences[kind].append(abs(engine - trainer))
    return differences


@pytest.mark.parametrize("mode", MODES)
def test_interrupted_messages_go_on(inputs, tmp_path, start, mode):
    process = start(command(inputs, tmp_path, mode), **environment(tmp_path))
    assert process.wait(1500) == 0, process.text()[-3000:]
    metrics, rows, messages = read_metrics(tmp_path / "metrics"), lines(tmp_path, "rows"), messages_of(tmp_path)
    assert sorted(metrics) == list(range(1, STEPS + 1))

    # rows are what was sampled, and come in pairs
    dialogues: dict[str, list[dict]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["key"]):
        dialogues[row["trajectory_id"]].append(row)
        check_row(row, messages.get(f"{row['trajectory_id']}-{row['role']}", []))
    assert len(dialogues) == STEPS * 4 * 4
    for pair in dialogues.values():
        assert [row["role"] for row in pair] == list(ROLES) and pair[0]["step"] == pair[1]["step"]
        if all(row["turn_spans"] for row in pair):  # role_grpo outside our trainer modes: one advantage for both
            assert len({max(row["advantages"], key=abs) for row in pair}) == 1

    # what went on after an interruption was sampled behind exactly the tokens that are in the row
    trained = [message for row in rows for message in messages.get(f"{row['trajectory_id']}-{row['role']}", [])]
    mixed = sum(len(set(message.versions)) > 1 for message in trained)
    differences = difference_by_weights(rows, messages)
    print(f"{mode}: {mixed} of {len(trained)} messages sampled under several weights; log-prob differences, nats:")
    for kind, values in differences.items():
        print(f"  {kind}: {len(values)} tokens, mean {sum(values) / len(values):.2g}, largest {max(values):.2g}")
    assert mixed
    assert max(differences["same"]) < SAME_WEIGHTS and max(differences["went on"]) < SAME_WEIGHTS
    assert max(differences["older"]) > SAME_WEIGHTS

    # staleness is reported as it was
    for step, of_step in metrics.items():
        mine = [row for row in rows if row["step"] == step]
        lag = [step - 1 - row["max_global_steps"] for row in mine]
        spans = [row["max_global_steps"] - row["min_global_steps"] + 1 for row in mine]
        for name, values in (("trajectory_staleness", lag), ("trajectory_spans", spans)):
            mean, largest, least = (of_step[f"training/off_policy/{name}/{part}"] for part in ("mean", "max", "min"))
            print(f"step {step}: {name} {least} to {largest}, mean {mean:.2f}")
            assert (largest, least) == (max(values), min(values))
            assert math.isclose(mean, sum(values) / len(values), rel_tol=1e-6)
        assert of_step["actor/grad_norm"] > 0
    assert max(of_step["training/off_policy/trajectory_spans/max"] for of_step in metrics.values()) > 1
