"""Checkpoint engine ``gloo``: weights from the trainer to engines in processes of their own, without an accelerator.

verl's trainer mode ``separate_async`` sends weights through a checkpoint engine, and those of verl 0.9.1 need CUDA, an
NPU or RDMA. Here rank 0 of the trainer and one worker per engine process meet in a gloo group that lasts for one sync:
engines may come and go in between. Weights travel as they are, one tensor at a time.
"""

import json
from collections.abc import AsyncGenerator, Generator
from datetime import timedelta
from typing import Any

import ray
import torch
from torch.distributed import BroadcastOptions, ProcessGroupGloo, TCPStore
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

TIMEOUT = timedelta(minutes=10)  # an engine that died is noticed at once; this is for one that hangs


@CheckpointEngineRegistry.register("gloo")
class GlooCheckpointEngine(CheckpointEngine):
    """``actor_rollout_ref.rollout.checkpoint_engine.backend=gloo``; see the module docstring."""

    def __init__(self, bucket_size: int, is_master: bool = False):
        self.is_master = is_master
        self.store: TCPStore | None = None
        self.group: Any = None  # a ProcessGroupGloo; torch's stub of it lacks broadcast

    def prepare(self) -> tuple[str, int] | None:
        """Where the group meets: the master's address and port; None from the others."""
        if not self.is_master:
            return None
        host = ray.util.get_node_ip_address().strip("[]")
        self.store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        return host, self.store.port

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Rank 0 is the trainer's rank 0, the engines follow; the trainer's other ranks stay outside (-1)."""

        def arguments(ranks: list[int]) -> dict[str, list[Any]]:
            return {
                "rank": ranks,
                "world_size": [1 + rollout_world_size] * len(ranks),
                "address": [metadata[0]] * len(ranks),
            }

        return (
            arguments([0] + [-1] * (actor_wg_world_size - 1)),
            arguments(list(range(1, 1 + rollout_world_size))),
        )

    def init_process_group(self, rank: int, world_size: int, address: tuple[str, int]) -> None:
        if rank < 0:
            return
        if self.store is None:
            self.store = TCPStore(*address, is_master=False, timeout=TIMEOUT)
        self.group = ProcessGroupGloo(self.store, rank, world_size, TIMEOUT)

    def finalize(self) -> None:
        self.group = self.store = None

    @torch.no_grad()
    async def send_weights(
        self, weights: Generator[tuple[str, torch.Tensor], None, None], global_steps: int | None = None
    ) -> None:
        """Send every tensor, then an empty head. Ranks outside the group take part in gathering each tensor."""
        for name, weight in weights:
            if self.group is None:
                continue
            dtype = str(weight.dtype).removeprefix("torch.")
            head = json.dumps({"name": name, "shape": list(weight.shape), "dtype": dtype}).encode()
            self._broadcast(torch.tensor([len(head)]))
            self._broadcast(torch.frombuffer(bytearray(head), dtype=torch.uint8))
            self._broadcast(weight.detach().cpu().contiguous())
        if self.group is not None:
            self._broadcast(torch.tensor([0]))

    @torch.no_grad()
    async def receive_weights(self, global_steps: int | None = None) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        """Yields (name, tensor) in the order they were sent."""
        while length := int(self._broadcast(torch.zeros(1, dtype=torch.int64))):
            head = json.loads(bytes(self._broadcast(torch.zeros(length, dtype=torch.uint8)).tolist()))
            yield head["name"], self._broadcast(torch.empty(head["shape"], dtype=getattr(torch, head["dtype"])))

    def _broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's bytes into everyone's ``tensor`` (contiguous), as bytes: gloo does not know every dtype."""
        assert self.group is not None, "init_process_group comes first"
        if tensor.numel():
            options = BroadcastOptions()
            options.rootRank = 0
            self.group.broadcast([tensor.reshape(-1).view(torch.uint8)], options).wait()
        return tensor
