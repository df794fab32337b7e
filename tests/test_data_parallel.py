"""Two data-parallel CPU workers make the same update as one, through verl's own FSDP engine and our loss."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from build_tiny import build_model, build_tokenizer

WORKER = """
import os, sys, torch
from functools import partial
from hydra import compose, initialize_config_module
from tensordict import TensorDict
import verl
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker
from rema_verl.trainers.losses import role_ppo_loss, take_turns

folder, turn_agg = sys.argv[1], sys.argv[2]
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
with initialize_config_module("rema_verl.config", version_base=None):
    config = compose("rema_trainer", [
        "hydra.searchpath=[pkg://verl.trainer.config]", "+device=cpu",
        f"actor_rollout_ref.model.path={folder}/model",
        "actor_rollout_ref.actor.ppo_mini_batch_size=8", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
        "actor_rollout_ref.actor.optim.lr=1e-2", "actor_rollout_ref.actor.optim.total_training_steps=10",
        f"actor_rollout_ref.actor.policy_loss.turn_agg={turn_agg}",
    ])
actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
model = omega_conf_to_dataclass(config.actor_rollout_ref.model)
actor.model_config = model
actor.engine.use_dynamic_bsz = False
actor.engine.micro_batch_size_per_gpu = 2
worker = TrainingWorker(TrainingWorkerConfig(
    model_type="language_model", model_config=model, engine_config=actor.engine,
    optimizer_config=actor.optim, checkpoint_config=actor.checkpoint,
))
worker.reset()
worker.set_loss_fn(partial(role_ppo_loss, config=actor))

rows = torch.load(f"{folder}/rows.pt", weights_only=True)
share = range(rank, len(rows), world)
def nested(name):
    return torch.nested.as_nested_tensor([rows[i][name] for i in share], layout=torch.jagged)
names = ("input_ids", "position_ids", "loss_mask", "response_mask", "prompts", "responses",
         "old_log_probs", "advantages")
data = TensorDict({n: nested(n) for n in names}, batch_size=len(share))
data["role_id"] = torch.tensor([int(rows[i]["role_id"]) for i in share])
data["row"] = torch.tensor(list(share))
tu.assign_non_tensor(data, global_batch_size=8, mini_batch_size=8, epochs=1, seed=1, temperature=1.0,
                     calculate_entropy=True, dataloader_kwargs={"shuffle": False}, global_token_num=None)
metrics = tu.get(worker.train_mini_batch(data), "metrics")
parameters, _ = worker.engine.get_per_tensor_param()
parameters = {name: tensor.detach().clone() for name, tensor in parameters}
if rank == 0:
    torch.save(parameters, f"{folder}/after_{world}_{turn_agg}.pt")
    print("METRICS", {k: v for k, v in metrics.items() if "meta_thinking" in k})
    turns = take_turns(worker)
    assert set(turns["row"].tolist()) == set(share) and len(turns) > len(share) and not len(take_turns(worker))
"""


def rows_with_two_roles(vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """Eight rows of different lengths and turn counts, four of each role."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(8):
        prompt, length = 5 + i % 3, 9 + 2 * i
        ids = torch.randint(5, vocabulary, (prompt + length,), generator=generator)
        mask = torch.ones(length, dtype=torch.int64)
        mask[3:5] = 0  # the partner's message
        if i % 2:
            mask[7:8] = 0
        rows.append(
            {
                "input_ids": ids,
                "position_ids": torch.arange(len(ids)),
                "prompts": ids[:prompt],
                "responses": ids[prompt:],
                "response_mask": mask,
                "loss_mask": mask,
                "old_log_probs": -5 + torch.rand(length, generator=generator),
                "advantages": torch.full((length,), 1.0 - 0.3 * i) * mask,
                "role_id": torch.tensor(i % 2),
            }
        )
    return rows


def update(folder, world: int, turn_agg: str) -> dict[str, torch.Tensor]:
    """Run one optimiser step with ``world`` workers; the parameters afterwards."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {
        **os.environ,
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_RANK": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", WORKER, str(folder), turn_agg]
    processes = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs[0][-3000:]
    assert "rows" in outputs[0].split("METRICS")[1]
    return torch.load(folder / f"after_{world}_{turn_agg}.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("turn_agg", ["trajectory", "turn"])
def test_two_workers_make_the_same_update_as_one(tmp_path, turn_agg):
    tokenizer = build_tokenizer(["plan solve 1+2-3*4 [FINISH]"] * 50)
    before = build_model(tokenizer, tmp_path / "model", seed=0, hidden=64, layers=1).state_dict()
    torch.save(rows_with_two_roles(len(tokenizer)), tmp_path / "rows.pt")
    one, two = update(tmp_path, 1, turn_agg), update(tmp_path, 2, turn_agg)
    assert one.keys() == two.keys() == before.keys()
    moved = max(float((one[name] - before[name]).abs().max()) for name in one)
    apart = max(float((one[name] - two[name]).abs().max()) for name in one)
    print(f"largest change of a weight {moved:.3g}, largest difference between one and two workers {apart:.3g}")
    assert moved > 1e-3
    assert apart < 5e-5  # Adam blows up the rounding of small gradients; a wrong scale would show at 1e-2
