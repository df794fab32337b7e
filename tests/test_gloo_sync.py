"""Checkpoint engine `gloo`: every tensor arrives as it was, in every engine, and groups may change between syncs."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from verl.checkpoint_engine import CheckpointEngineRegistry

TENSORS = {
    "matrix": torch.randn(7, 5),
    "half": torch.randn(3).to(torch.bfloat16),
    "transposed": torch.randn(4, 6).T,
    "number": torch.tensor(3.5),
    "whole": torch.arange(9),
    "empty": torch.zeros(0, 4),
}


def sync(actors: list, rollouts: list) -> list[dict[str, torch.Tensor]]:
    """One weight sync in the order of verl's CheckpointEngineManager, a thread per process; what each engine got."""

    async def send(actor) -> None:
        await actor.send_weights((name, tensor) for name, tensor in TENSORS.items())

    async def receive(rollout) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() async for name, tensor in rollout.receive_weights()}

    everyone = [*actors, *rollouts]
    with ThreadPoolExecutor(len(everyone)) as pool:
        metadata = list(pool.map(lambda engine: engine.prepare(), everyone))
        arguments = type(actors[0]).build_topology(len(actors), len(rollouts), metadata)
        calls = [
            {key: values[i] for key, values in of_group.items()}
            for group, of_group in zip((actors, rollouts), arguments, strict=True)
            for i in range(len(group))
        ]
        list(pool.map(lambda engine, call: engine.init_process_group(**call), everyone, calls))
        sent = [pool.submit(asyncio.run, send(actor)) for actor in actors]
        received = [pool.submit(asyncio.run, receive(rollout)) for rollout in rollouts]
        results = [future.result(60) for future in [*sent, *received]][len(actors) :]
        list(pool.map(lambda engine: engine.finalize(), everyone))
    return results


@pytest.mark.parametrize(("num_actors", "num_rollouts"), [(1, 1), (2, 2)])
def test_every_tensor_arrives(num_actors, num_rollouts):
    engine = CheckpointEngineRegistry.get("gloo")  # registered by the plug-in
    actors = [engine(bucket_size=1 << 20, is_master=rank == 0) for rank in range(num_actors)]
    rollouts = [engine(bucket_size=1 << 20) for _ in range(num_rollouts)]
    for engines in (rollouts, rollouts[:1]):  # the second sync with fewer engines
        for got in sync(actors, engines):
            assert list(got) == list(TENSORS)
            for name, tensor in TENSORS.items():
                assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
