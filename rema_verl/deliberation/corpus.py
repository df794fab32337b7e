"""The corpus of stage 0: every visited state with the rewards of all three actions, as parquet shards in a folder.

A shard holds whole trajectories and appears whole or not at all, so a killed collection leaves nothing to repair: what
is in the folder is done (:func:`done_keys`), the rest is collected. Each shard carries the schema of its states.
"""

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from rema_verl.deliberation.protocol import ACTIONS
from rema_verl.deliberation.state import LAYOUT, SCHEMA

FIELDS = pa.schema(
    [
        ("trajectory", pa.string()),  # names one deliberation for ever, e.g. question and seed
        ("question_id", pa.string()),
        ("seed", pa.int64()),
        ("round", pa.int32()),  # from 0
        ("agent", pa.int32()),
        ("n_agents", pa.int32()),
        ("own", pa.list_(pa.float32())),  # (D,), see state.LAYOUT
        ("peers", pa.list_(pa.list_(pa.float32()))),  # (N - 1, D)
        ("action_taken", pa.int32()),  # index into ACTIONS
        ("rewards", pa.list_(pa.float64())),  # (K,), of each of ACTIONS; the others' actions as they were taken
        ("correct_before", pa.bool_()),
        ("tokens", pa.list_(pa.int64())),  # (K,), sampled tokens each action costs this agent
        ("prompt_tokens", pa.list_(pa.int64())),  # (K,)
    ],
    metadata={"rema_verl.schema": SCHEMA, "rema_verl.actions": json.dumps(ACTIONS)},
)
VISIT = ("trajectory", "round", "agent")  # names a state; no two rows are equal in it


@dataclass(frozen=True)
class States:
    """A corpus as tensors: B states, P peers (padded), K actions."""

    own: torch.Tensor  # (B, D) float32
    peers: torch.Tensor  # (B, P, D) float32
    mask: torch.Tensor  # (B, P) bool, True where there is a peer
    rewards: torch.Tensor  # (B, K) float64

    def __len__(self) -> int:
        return len(self.own)

    def take(self, index: torch.Tensor) -> "States":
        """The states at these places (or where a bool mask is True)."""
        return States(self.own[index], self.peers[index], self.mask[index], self.rewards[index])


def append_shard(folder: str | Path, rows: list[dict]) -> Path:
    """Write the rows of some whole trajectories as one shard; it is on the disk when this returns.

    The same trajectories always make the shard of the same name, so writing them twice leaves one.

    Raises:
        ValueError: no rows, a row that does not fit :data:`FIELDS`, a state twice.
    """
    if not rows:
        raise ValueError(f"{folder}: a shard without rows")
    folder = Path(folder)
    try:
        table = pa.Table.from_pylist([{name: row[name] for name in FIELDS.names} for row in rows], schema=FIELDS)
    except (KeyError, pa.ArrowException, TypeError) as e:
        raise ValueError(f"{folder}: a row does not fit the corpus ({type(e).__name__}: {_first_line(e)})") from None
    name = hashlib.sha256(json.dumps(sorted(set(table["trajectory"].to_pylist()))).encode()).hexdigest()[:24]
    path = folder / f"part-{name}.parquet"
    _check(table, str(path))
    _check_unique(table, str(path))
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{path.name}.tmp"
    pq.write_table(table, temporary)
    _sync(temporary)  # or the rename could outlive the content in a power cut
    os.replace(temporary, path)
    _sync(folder)
    return path


def done_keys(folder: str | Path) -> set[str]:
    """The trajectories that are in the folder; empty if it does not exist. For the one who goes on collecting:
    half-written files of a killed predecessor are removed.

    Raises:
        ValueError: see :func:`read`; an empty folder is none here.
    """
    for left in Path(folder).glob(".part-*.tmp"):
        left.unlink()
    return {key for path in _shards(folder) for key in _open(path).read(["trajectory"])["trajectory"].to_pylist()}


def read(folder: str | Path) -> pa.Table:
    """All states, in the order of trajectory, round and agent: however they were sharded, the table is the same.

    Raises:
        ValueError: one line that names the file: no states, another schema or number of actions, damaged, duplicates.
    """
    paths = _shards(folder)
    if not paths:
        raise ValueError(f"{folder}: an empty corpus (no part-*.parquet in it): collect states first")
    tables = []
    for path in paths:
        file = _open(path)
        try:
            table = file.read().select(FIELDS.names).cast(FIELDS)
        except (pa.ArrowException, KeyError, OSError, ValueError) as e:
            raise ValueError(f"{path}: not a readable shard of a corpus ({_first_line(e)})") from None
        _check(table, str(path))
        tables.append(table)
    table = pa.concat_tables(tables).combine_chunks()
    if not table.num_rows:
        raise ValueError(f"{folder}: an empty corpus (its shards have no rows): collect states first")
    _check_unique(table, str(folder))
    return table.sort_by([(name, "ascending") for name in VISIT])


def content_hash(table: pa.Table) -> str:
    """SHA-256 of what training reads of :func:`read`'s table."""
    states = tensors(table)
    digest = hashlib.sha256(SCHEMA.encode())
    for name in VISIT:
        digest.update(json.dumps(table[name].to_pylist()).encode())
    for tensor in (states.own, states.peers, states.mask, states.rewards):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def tensors(table: pa.Table) -> States:
    """:func:`read`'s table as tensors."""
    rows, width = table.num_rows, len(LAYOUT)
    num_peers = torch.from_numpy(table["n_agents"].to_numpy().astype(np.int64)) - 1
    mask = torch.arange(int(num_peers.max()))[None] < num_peers[:, None]
    peers = torch.zeros(*mask.shape, width)
    peers[mask] = torch.from_numpy(_flat(table["peers"]).to_numpy().copy()).view(-1, width)
    own = torch.from_numpy(_flat(table["own"]).to_numpy().copy()).view(rows, width)
    rewards = torch.from_numpy(_flat(table["rewards"]).to_numpy().copy()).view(rows, len(ACTIONS))
    return States(own, peers, mask, rewards)


def held_out(table: pa.Table, share: float) -> torch.Tensor:
    """(B,) bool: about this share of the questions (all states of one go together), chosen by a hash of their ids."""
    chosen = {
        question: int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") < share * 2**64
        for question in table["question_id"].unique().to_pylist()
    }
    return torch.tensor([chosen[question] for question in table["question_id"].to_pylist()])


def _shards(folder: str | Path) -> list[Path]:
    return sorted(Path(folder).glob("part-*.parquet"))


def _open(path: Path) -> pq.ParquetFile:
    """The shard, if it is one of this version's."""
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as e:
        raise ValueError(f"{path}: not a readable parquet file ({_first_line(e)})") from None
    metadata = {
        k.decode(errors="replace"): v.decode(errors="replace") for k, v in (file.metadata.metadata or {}).items()
    }
    if "rema_verl.schema" not in metadata:
        raise ValueError(f"{path}: not a shard of a corpus (no schema in the file)")
    if (actions := metadata.get("rema_verl.actions")) != json.dumps(ACTIONS):
        raise ValueError(
            f"{path}: a corpus with the actions {str(actions)[:80]}, this version has {json.dumps(ACTIONS)}"
        )
    if (schema := metadata["rema_verl.schema"]) != SCHEMA:
        raise ValueError(
            f"{path}: a corpus with states of schema {schema[:60]!r}, this version has {SCHEMA!r}: collect it again"
        )
    return file


def _check(table: pa.Table, where: str) -> None:
    """Shapes and values of a table of FIELDS."""
    if table.num_rows == 0:
        return

    def refuse(wrong: pa.ChunkedArray | pa.Array, what: str) -> None:
        if pc.any(wrong).as_py():
            raise ValueError(f"{where}: row {pc.index(wrong, True).as_py() + 1}: {what}")

    for name in FIELDS.names:
        if table[name].null_count:
            raise ValueError(f"{where}: column {name} has empty cells")
    refuse(pc.less(table["n_agents"], 2), "n_agents is below 2")
    refuse(pc.not_equal(pc.list_value_length(table["own"]), len(LAYOUT)), f"own is not {len(LAYOUT)} numbers")
    peers = table["peers"]
    refuse(pc.not_equal(pc.add(pc.list_value_length(peers), 1), table["n_agents"]), "peers are not n_agents - 1")
    if pc.any(pc.not_equal(pc.list_value_length(pc.list_flatten(peers)), len(LAYOUT))).as_py():
        raise ValueError(f"{where}: a peer is not {len(LAYOUT)} numbers")
    for name in ("rewards", "tokens", "prompt_tokens"):
        refuse(
            pc.not_equal(pc.list_value_length(table[name]), len(ACTIONS)),
            f"{name} are not {len(ACTIONS)} numbers, one for each of {', '.join(ACTIONS)}",
        )
    for name in ("own", "peers", "rewards"):
        values = _flat(table[name])
        if values.null_count or not pc.all(pc.is_finite(values)).as_py():
            raise ValueError(f"{where}: {name} holds a value that is not a finite number")


def _check_unique(table: pa.Table, where: str) -> None:
    visits = Counter(zip(*(table[name].to_pylist() for name in VISIT), strict=True))
    (trajectory, number, agent), times = visits.most_common(1)[0]
    if times > 1:
        raise ValueError(
            f"{where}: trajectory {trajectory[:80]!r}, round {number}, agent {agent} is there {times} times"
        )


def _flat(column: pa.ChunkedArray) -> pa.Array:
    """All numbers of a column of lists (of lists)."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    while pa.types.is_list(array.type):
        array = array.flatten()
    return array


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
