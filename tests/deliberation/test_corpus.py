"""The corpus on the disk: whole shards or none, no state twice, refusals in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rema_verl.deliberation import corpus
from rema_verl.deliberation.protocol import ACTIONS
from rema_verl.deliberation.state import LAYOUT, SCHEMA

D = len(LAYOUT)


def rows(trajectory, agents=3, rounds=2, question=None, **changes):
    return [
        {
            "trajectory": trajectory,
            "question_id": question or trajectory.split("/")[0],
            "seed": 0,
            "round": t,
            "agent": i,
            "n_agents": agents,
            "own": [i + t / 10] * D,
            "peers": [[j + t / 10] * D for j in range(agents) if j != i],
            "action_taken": 1,
            "rewards": [0.0, float(i), -1.0],
            "correct_before": i == 0,
            "tokens": [0, 10, 0],
            "prompt_tokens": [0, 20, 0],
            **changes,
        }
        for t in range(rounds)
        for i in range(agents)
    ]


def test_what_is_written_is_read(tmp_path):
    assert corpus.done_keys(tmp_path / "new") == set()
    corpus.append_shard(tmp_path / "new", rows("b/0") + rows("c/0", agents=5))
    corpus.append_shard(tmp_path / "new", rows("a/0"))
    assert corpus.done_keys(tmp_path / "new") == {"a/0", "b/0", "c/0"}
    table = corpus.read(tmp_path / "new")
    assert table.to_pylist() == [
        {**row, "own": pytest.approx(row["own"]), "peers": [pytest.approx(p) for p in row["peers"]]}
        for row in rows("a/0") + rows("b/0") + rows("c/0", agents=5)
    ]
    states = corpus.tensors(table)
    assert states.own.shape == (22, D) and states.peers.shape == (22, 4, D) and states.rewards.shape == (22, 3)
    assert states.mask.sum(1).tolist() == [2] * 12 + [4] * 10 and states.rewards.dtype == torch.float64
    assert (states.peers[~states.mask] == 0).all()
    for i, row in enumerate(table.to_pylist()):
        assert states.own[i].tolist() == row["own"] and states.rewards[i].tolist() == row["rewards"]
        assert states.peers[i][states.mask[i]].tolist() == row["peers"]
    some = states.take(torch.tensor([3, 1]))
    assert len(some) == 2 and torch.equal(some.own, states.own[[3, 1]])


def test_how_it_was_sharded_makes_no_difference(tmp_path):
    names = ["a/0", "b/0", "c/0"]
    corpus.append_shard(tmp_path / "one", [row for name in names for row in rows(name)])
    for name in reversed(names):
        corpus.append_shard(tmp_path / "three", rows(name))
    one, three = corpus.read(tmp_path / "one"), corpus.read(tmp_path / "three")
    assert one.equals(three) and corpus.content_hash(one) == corpus.content_hash(three)
    corpus.append_shard(tmp_path / "three", rows("d/0"))
    assert corpus.content_hash(corpus.read(tmp_path / "three")) != corpus.content_hash(one)


def test_writing_trajectories_twice_leaves_one(tmp_path):
    for _ in range(2):
        corpus.append_shard(tmp_path, rows("a/0") + rows("b/0"))
    assert corpus.read(tmp_path).num_rows == 12
    corpus.append_shard(tmp_path, rows("b/0"))  # in another company it is a mistake, and said
    with pytest.raises(ValueError, match="trajectory 'b/0', round 0, agent 0 is there 2 times"):
        corpus.read(tmp_path)


def test_questions_are_held_out_whole(tmp_path):
    for i in range(200):
        corpus.append_shard(tmp_path, rows(f"q{i // 2}/{i % 2}", rounds=1))
    table = corpus.read(tmp_path)
    held_out = corpus.held_out(table, 0.2)
    by_question = {}
    for question, chosen in zip(table["question_id"].to_pylist(), held_out.tolist(), strict=True):
        assert by_question.setdefault(question, chosen) == chosen
    assert 5 <= sum(by_question.values()) <= 40
    assert torch.equal(held_out, corpus.held_out(table, 0.2)) and not corpus.held_out(table, 0.0).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"own": [0.0] * (D - 1)}, f"row 1: own is not {D} numbers"),
        ({"peers": [[0.0] * D]}, "row 1: peers are not n_agents - 1"),
        ({"peers": [[0.0] * D, [0.0]]}, f"a peer is not {D} numbers"),
        ({"rewards": [0.0, 1.0]}, "rewards are not 3 numbers, one for each of persist, refine, concede"),
        ({"rewards": [0.0, float("nan"), 1.0]}, "rewards holds a value that is not a finite number"),
        ({"own": [float("inf")] * D}, "own holds a value that is not a finite number"),
        ({"rewards": [0.0, None, 1.0]}, "rewards holds a value that is not"),
        ({"rewards": None}, "column rewards has empty cells"),
        ({"n_agents": 1, "peers": []}, "n_agents is below 2"),
        ({"seed": "x"}, "does not fit the corpus"),
        ({"round": 0, "agent": 0}, "is there 6 times"),
    ],
)
def test_rows_that_do_not_fit_are_not_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as error:
        corpus.append_shard(tmp_path / "c", rows("a/0", **change))
    assert "\n" not in str(error.value) and not (tmp_path / "c").exists()
    with pytest.raises(ValueError, match="without rows"):
        corpus.append_shard(tmp_path / "c", [])


def shard_with(path: Path, metadata: dict[str, str]) -> None:
    table = pa.Table.from_pylist(rows("a/0"), schema=corpus.FIELDS)
    pq.write_table(table.replace_schema_metadata(metadata), path / "part-x.parquet")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"rema_verl.schema": "mpdf-0-abc", "rema_verl.actions": json.dumps(ACTIONS)}, "states of schema 'mpdf-0-abc'"),
        (
            {"rema_verl.schema": SCHEMA, "rema_verl.actions": '["persist", "refine"]'},
            r'actions \["persist", "refine"\]',
        ),
        ({"a": "b"}, "not a shard of a corpus"),
    ],
)
def test_another_layout_is_refused_in_one_line(tmp_path, metadata, message):
    shard_with(tmp_path, metadata)
    for use in (corpus.read, corpus.done_keys):
        with pytest.raises(ValueError, match=message) as error:
            use(tmp_path)
        assert "part-x.parquet" in str(error.value) and "\n" not in str(error.value)


def test_empty_and_damaged_corpora_are_refused(tmp_path):
    with pytest.raises(ValueError, match="an empty corpus"):
        corpus.read(tmp_path)
    pq.write_table(corpus.FIELDS.empty_table(), tmp_path / "part-0.parquet")
    with pytest.raises(ValueError, match="an empty corpus"):
        corpus.read(tmp_path)
    path = corpus.append_shard(tmp_path, rows("a/0"))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="not a readable parquet file"):
        corpus.read(tmp_path)
    table = pa.Table.from_pylist(rows("a/0"), schema=corpus.FIELDS).drop_columns(["rewards"])
    pq.write_table(table, path)
    with pytest.raises(ValueError, match="not a readable shard"):
        corpus.read(tmp_path)


COLLECTOR = """
import sys, pathlib
sys.path.insert(0, {tests!r})
from test_corpus import rows
from rema_verl.deliberation import corpus
folder = pathlib.Path(sys.argv[1])
wanted = [f"q{{i}}/0" for i in range({number})]
todo = [name for name in wanted if name not in corpus.done_keys(folder)]
size = int(sys.argv[2])
for start in range(0, len(todo), size):
    corpus.append_shard(folder, [row for name in todo[start:start + size] for row in rows(name)])
    print(start, flush=True)
"""


def test_a_killed_collection_goes_on_without_a_state_twice(tmp_path):
    """SIGKILL at any moment, then the same command with other batches: every trajectory once."""
    folder, number = tmp_path / "corpus", 400
    code = COLLECTOR.format(tests=str(Path(__file__).parent), number=number)
    killed = 0
    for size, shards in ((4, 5), (7, 9)):
        process = subprocess.Popen([sys.executable, "-c", code, folder, str(size)], stdout=subprocess.PIPE)
        for _ in range(shards):
            process.stdout.readline()
        time.sleep(0.001 * shards)  # somewhere inside the next one
        os.kill(process.pid, signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
        assert 0 < len(corpus.read(folder)["trajectory"].unique()) < number
    assert killed == 2
    (folder / ".part-0.parquet.tmp").write_bytes(b"half")  # whatever a kill may leave
    subprocess.run([sys.executable, "-c", code, folder, "50"], check=True, stdout=subprocess.DEVNULL)
    table = corpus.read(folder)
    assert sorted(set(table["trajectory"].to_pylist())) == sorted(f"q{i}/0" for i in range(number))
    assert table.num_rows == number * 6 and not list(folder.glob(".*"))
