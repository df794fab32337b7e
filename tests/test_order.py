"""Mini-batches are a fair draw, whatever order results arrive in: real TransferQueue, balancing and iteration."""

import json
import subprocess
import sys

import pytest
from conftest import REPO

from rema_verl.trainers.order import fair_order

SCRIPT = """
import json, os, random, sys
import ray, torch, verl
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import TensorDict
from types import SimpleNamespace
from verl.utils.tensordict_utils import make_iterator
from rema_verl.trainers.rema import ReMATrainer

QUESTIONS, SAMPLES, UPDATES = 16, 8, 4
ROLES = ("meta_thinking", "reasoning")
os.environ['RAY_prestart_worker_first_driver'] = '0'
ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}))

def rows(seed):
    rng, rows = random.Random(seed), []
    for q in range(QUESTIONS):
        for s in range(SAMPLES):
            turns = rng.choice([1, 1, 2, 2, 3, 4, 6, 10, 20, 30])
            for r, role in enumerate(ROLES):
                if (q, s) != (3, 5):  # one dialogue did not arrive, so that verl pads
                    rows.append({"key": f"q{q:02d}_{s}_{r}", "turns": turns, "role": role, "question": q})
    return rows

def mini_batches(partition, rows, arrival, seed, workers=4):
    for row in sorted(rows, key=arrival):  # as dialogues end: a row at a time
        extra = {"role": row["role"], "turn_spans": [(0, 1)], "stop_reason": "finished"}
        length = 20 * row["turns"]
        fields = TensorDict({
            "responses": torch.nested.as_nested_tensor([torch.full((length,), row["turns"])], layout=torch.jagged),
            "response_mask": torch.nested.as_nested_tensor([torch.ones(length, dtype=torch.long)], layout=torch.jagged),
        }, batch_size=1)
        for name, value in (("extra_fields", extra), ("name", row["key"])):
            verl.utils.tensordict_utils.assign_non_tensor_stack(fields, name, [value])
        tag = {"seq_len": length + 8, "prompt_len": 8, "response_len": length, "is_prompt": False}
        tq.kv_batch_put(keys=[row["key"]], partition_id=partition, fields=fields, tags=[tag])
    found = tq.kv_list(partition)[partition]
    batch = tq.KVBatchMeta(partition_id=partition, keys=list(found), tags=list(found.values()))
    arrived = [row["turns"] for row in sorted(rows, key=arrival)]
    assert [int(found[key]["response_len"] / 20) for key in batch.keys] == arrived  # the fault's ground: TransferQueue

    trainer = ReMATrainer.__new__(ReMATrainer)
    trainer.config = OmegaConf.create({
        "actor_rollout_ref": {"rollout": {"n": SAMPLES}, "actor": {"ppo_mini_batch_size": QUESTIONS // UPDATES}},
        "data": {"train_batch_size": QUESTIONS, "seed": 1}, "trainer": {"critic_warmup": 0},
    })
    trainer.rema = SimpleNamespace(seed=seed)
    trainer.replay_buffer = SimpleNamespace(failure_keys={"train": []})
    trainer.tokenizer = SimpleNamespace(eos_token_id=0)
    trainer.global_steps, trainer.use_critic = 7, False
    trainer.actor_rollout_wg = SimpleNamespace(_dispatch_info={"actor": list(range(workers))})
    metrics = {}
    batch = trainer._balance_batch(batch, metrics)
    share = len(batch) // workers
    updates = [[] for _ in range(UPDATES)]
    spread = []
    for worker in range(workers):
        part = list(range(worker * share, (worker + 1) * share))
        data = TensorDict({"at": torch.tensor(part)}, batch_size=share)
        kwargs = {"shuffle": False}  # actor.shuffle, as every recipe has it
        batches = make_iterator(data, share // UPDATES, 1, seed=42 + worker, dataloader_kwargs=kwargs)
        for update, mini in zip(updates, batches, strict=True):
            update += mini["at"].tolist()
        spread.append(sum(batch.tags[i]["seq_len"] for i in part))
    assert metrics["global_seqlen/balanced_max"] == max(spread)
    assert max(spread) < 1.1 * min(spread)  # every worker has about the same work
    padding = [[bool(batch.tags[i].get("is_padding")) for i in update] for update in updates]
    return [[None if pad else batch.keys[i] for i, pad in zip(update, pads)] for update, pads in zip(updates, padding)]

data = rows(0)
orders = {
    "by length": lambda row: (row["turns"], row["key"]),
    "long first": lambda row: (-row["turns"], row["key"]),
    "by length, another seed": lambda row: (row["turns"], row["key"]),
    "one worker": lambda row: (row["turns"], row["key"]),
}
result = {}
for number, (name, arrival) in enumerate(orders.items()):
    seed, workers = 4 if "another" in name else 3, 1 if "one" in name else 4
    result[name] = mini_batches(f"train{number}", data, arrival, seed, workers)
print("RESULT" + json.dumps({"rows": data, "batches": result}))
sys.stdout.flush()
ray.shutdown()
os._exit(0)  # TransferQueue's client has threads of its own
"""


@pytest.fixture(scope="module")
def drawn() -> dict:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], cwd=REPO, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.split("RESULT", 1)[1].splitlines()[0])


def test_every_update_draws_fairly_over_lengths_roles_and_questions(drawn):
    rows = {row["key"]: row for row in drawn["rows"]}
    mean = sum(row["turns"] for row in rows.values()) / len(rows)
    for updates in drawn["batches"].values():
        assert len(updates) == 4 and {len(update) for update in updates} == {64}
        real = [[rows[key] for key in update if key is not None] for update in updates]
        assert sorted(row["key"] for update in real for row in update) == sorted(rows)  # each row once
        assert max(64 - len(update) for update in real) < 2  # verl's two padding rows are not heaped on one update
        for update in real:
            # arrival order gives means of 1.2 to 19 turns; the mean of 64 of these rows has a deviation of 1
            assert abs(sum(row["turns"] for row in update) / len(update) - mean) < 3
            assert 0.3 < sum(row["role"] == "reasoning" for row in update) / len(update) < 0.7
            assert len({row["question"] for row in update}) >= 13


def test_the_draw_does_not_depend_on_who_came_first_but_on_the_seed(drawn):
    batches = drawn["batches"]
    assert batches["by length"] == batches["long first"] != batches["by length, another seed"]


def test_every_update_trains_the_same_rows_whatever_the_number_of_workers(drawn):
    def sets(name):
        return [sorted(key or "padding" for key in update) for update in drawn["batches"][name]]

    assert sets("by length") == sets("one worker") != sets("by length, another seed")


def test_every_mini_batch_is_shared_equally_and_in_balance():
    lengths = [10 * (1 + i % 7) for i in range(48)]
    order = fair_order(lengths, 12, 3, "x")
    assert sorted(order) == list(range(48)) and fair_order(lengths, 12, 3, "x") == order != fair_order(
        lengths, 12, 3, "y"
    )
    for update in range(4):  # four rows of each of three workers, who wait for each other after it
        work = [sum(lengths[i] for i in order[16 * w + 4 * update : 16 * w + 4 * update + 4]) for w in range(3)]
        assert max(work) < 1.2 * min(work)  # as the rows come it is up to 1.6 times
    for rows, mini_batch, workers in ((7, 7, 2), (12, 8, 2)):
        with pytest.raises(ValueError, match=f"{rows} rows cannot be cut into mini-batches of {mini_batch} for"):
            fair_order([1] * rows, mini_batch, workers, "x")
