"""Trainer mode ``rema_separate``: one model per role. While one learns, the other is frozen, or both learn.

Everything of a role (its part of the configuration, its workers, its engines, their weight sync) is a :class:`Player`.
verl's trainer knows one model: :meth:`SeparateTrainer.playing` puts one player in its place, and verl's own methods,
with those of mode ``rema``, then work on that player's rows.

    step:  both engines generate dialogues ─> the learning role's rows ─> its log-probs, advantages, update
           ─> its weights into its engines; the other role is not called at all
"""

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import Any

import ray
import transfer_queue as tq
from omegaconf import DictConfig, open_dict
from transfer_queue import KVBatchMeta
from verl.checkpoint_engine import CheckpointEngineManager
from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.ray.base import (
    RayClassWithInitArgs,
    RayWorkerGroup,
    create_colocated_worker_cls,
    split_resource_pool,
)
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.ray_utils import auto_await
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.rollout.llm_server import LLMServerManager

from rema_verl.agent_loops.clients import RoleClients
from rema_verl.config import role_config
from rema_verl.dialogue import ROLES
from rema_verl.trainers.rema import ReMATrainer

logger = logging.getLogger(__name__)
SECOND_POOL = "second_model"
SECOND_RANK = 1000  # replicas of the second model count from here: verl names its servers by replica rank


@dataclass
class Player:
    """One role's model: in training and served, or served only (``workers`` is None)."""

    config: DictConfig
    workers: RayWorkerGroup | None
    servers: LLMServerManager
    weights: CheckpointEngineManager
    tokenizer: Any


@register_trainer("rema_separate")
class SeparateTrainer(ReMATrainer):
    """One model per role; see the module docstring."""

    config: DictConfig  # of verl's trainer
    actor_rollout_wg: Any
    llm_server_manager: Any

    def __init__(self, config: DictConfig):
        self.players: dict[str, Player] = {}
        self.idle: KVBatchMeta | None = None  # this step's rows that the first learner does not train on
        super().__init__(config)
        self.trainable = tuple(role for role in ROLES if self.rema.roles[role].trainable)
        roles = [self.rema.switch.start, *self.trainable]
        self.first = next(r for r in roles if r in self.trainable and self.rema.roles[r].n_gpus_per_node is None)
        if all(self.rema.roles[role].model_path for role in ROLES):
            # nobody plays it; verl's parts that know one model (data set, reward workers, agent loops) look at it
            with open_dict(config):
                config.actor_rollout_ref.model.path = self.rema.roles[self.first].model_path

    # ---------------------------------------------------------------- set-up

    def _setup(self) -> None:
        second = next(role for role in ROLES if role != self.first)
        whole, self.config = self.config, role_config(self.config, self.first)
        try:
            super()._setup()  # all that there is once, and the first model
        finally:
            config, self.config = self.config, whole
        with open_dict(whole):  # verl settles some keys during its set-up, data.gen_batch_size among them
            for group in whole:
                if group != "actor_rollout_ref":
                    whole[group] = config[group]
        self.players[self.first] = Player(
            config, self.actor_rollout_wg, self.llm_server_manager, self.checkpoint_manager, self.tokenizer
        )
        self.players[second] = self._second_player(second)
        self.players = {role: self.players[role] for role in ROLES}
        self.actor_rollout_wg = ActorPair({role: self.players[role].workers for role in self.trainable})
        self.llm_server_manager = ServerPair({role: player.servers for role, player in self.players.items()})
        self._load_checkpoint()

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        second = next(role for role in ROLES if role != self.first)
        if gpus := self.rema.roles[second].n_gpus_per_node:
            self.resource_pool_manager.resource_pool_spec[SECOND_POOL] = [gpus] * self.config.trainer.nnodes

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        self._set_schedule(self.config, self.first)

    def _set_schedule(self, config: DictConfig, role: str) -> None:
        """A role's learning-rate schedule is as long as the steps in which it learns."""
        steps = sum(role in self._learning(step) for step in range(1, self.total_training_steps + 1))
        with open_dict(config):
            config.actor_rollout_ref.actor.optim.total_training_steps = max(steps, 1)

    def _second_player(self, role: str) -> Player:
        """The other model, on the same accelerators or on its own: workers (if it learns) and engines."""
        config = role_config(self.config, role)
        self._set_schedule(config, role)
        actor_role = next(r for r in (Role.ActorRolloutRef, Role.ActorRollout) if r in self.role_worker_mapping)
        pools = self.resource_pool_manager
        pool = pools.resource_pool_dict.get(SECOND_POOL) or pools.get_resource_pool(actor_role)
        if role in self.trainable:
            worker = RayClassWithInitArgs(
                cls=ray.remote(SecondWorker),
                config=config.actor_rollout_ref,
                distillation_config=config.get("distillation"),
                role=str(actor_role),
            )
            classes = {str(actor_role): worker}
            group = RayWorkerGroup(
                resource_pool=pool,
                ray_cls_with_init=create_colocated_worker_cls(class_dict=classes),
                device_name=config.trainer.device,
            )
            workers = group.spawn(prefix_set=classes.keys())[str(actor_role)]
            workers.init_model()
            servers = LLMServerManager.create(
                config=config,
                worker_group=_Shifted(workers, config.actor_rollout_ref.rollout),
                rollout_resource_pool=pool,
                start_rank=SECOND_RANK,
            )
        else:
            workers = None
            with open_dict(config):  # nobody brings it weights (verl's default is to wait for them with random ones)
                config.actor_rollout_ref.rollout.load_format = "auto"
                config.actor_rollout_ref.rollout.nnodes = config.trainer.nnodes
            servers = ServedModel.create(config=config, rollout_resource_pool=pool, start_rank=SECOND_RANK)
        engine_config = omega_conf_to_dataclass(config.actor_rollout_ref.rollout.checkpoint_engine)
        engine_config.backend = "naive"
        weights = CheckpointEngineManager(config=engine_config, actor_wg=workers, replicas=servers.get_replicas())
        weights.sleep_replicas()
        tokenizer = omega_conf_to_dataclass(config.actor_rollout_ref.model).tokenizer
        return Player(config, workers, servers, weights, tokenizer)

    def on_init_end(self) -> None:
        for role in self.trainable:
            with self.playing(role):
                super().on_init_end()
        self._wake_served()

    # ----------------------------------------------------------- whose turn

    def _learning(self, step: int) -> tuple[str, ...]:
        return self.rema.switch.learning(step, self.steps_per_epoch, self.trainable)

    @contextlib.contextmanager
    def playing(self, role: str):
        """In here verl's trainer has this player's configuration, workers, engines and tokenizer."""
        player = self.players[role]
        swapped = {
            "config": player.config,
            "actor_rollout_wg": player.workers,
            "ref_policy_wg": player.workers,
            "llm_server_manager": player.servers,
            "checkpoint_manager": player.weights,
            "tokenizer": player.tokenizer,
            "learning": (role,),
        }
        before = {name: getattr(self, name, None) for name in swapped}
        self.__dict__.update(swapped)
        try:
            yield player
        finally:
            self.__dict__.update(before)

    # --------------------------------------------------------------- a step

    def on_step_begin(self) -> None:
        if self.idle is not None:  # verl clears the rows it trained on
            tq.kv_clear(keys=self.idle.keys, partition_id=self.idle.partition_id)
            self.idle = None
        super().on_step_begin()

    def _step_once(self, metrics: dict, timing_raw: dict, sample_batch_size: int) -> KVBatchMeta:
        first, *others = self._learning(self.global_steps)
        with self.playing(first):
            own: dict = {}
            batch = super()._step_once(own, timing_raw, sample_batch_size)
            metrics.update(_stamped(own, first))
        for role in others:  # switch.level=none
            with self.playing(role):
                own = {}
                rows = self._share_out(self.idle, metrics=own)
                rows = self._compute_old_log_prob(rows, metrics=own)
                if self.use_reference_policy:
                    rows = self._compute_ref_log_prob(rows, metrics=own)
                rows = self._compute_advantage(rows, metrics=own)
                self.idle = self._update_actor(rows, metrics=own)
                metrics.update(_stamped(own, role))
        metrics["switch/phase"] = self.rema.switch.phase(self.global_steps, self.steps_per_epoch)
        metrics.update({f"switch/{role}": float(role in (first, *others)) for role in ROLES})
        return batch

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, **kwargs) -> KVBatchMeta:
        learning = super()._balance_batch(batch, metrics, **kwargs)
        self.idle = batch.select_keys([key for key in self.rows if self.rows[key]["role"] not in self.learning])
        return learning

    def on_sample_end(self) -> None:
        for role in ROLES:
            with self.playing(role):
                super().on_sample_end()

    def on_step_end(self) -> None:
        """The weights of what has learnt go into its engines. Engines that slept have lost theirs and get them back."""
        learning = self._learning(self.global_steps)
        for role in self.trainable:
            if role in learning or self.players[role].config.actor_rollout_ref.rollout.free_cache_engine:
                with self.playing(role):
                    super().on_step_end()
        self._wake_served()

    def _wake_served(self) -> None:
        for role in ROLES:
            if role not in self.trainable and self.players[role].config.actor_rollout_ref.rollout.free_cache_engine:
                self.players[role].weights.wake_up_replicas()

    def _log_rollout_data(self, batch: KVBatchMeta, timing_raw: dict, rollout_data_dir: str) -> None:
        """Both roles' rows of a dialogue stand side by side in the file, whoever learns."""
        assert self.idle is not None
        both = KVBatchMeta(
            partition_id=batch.partition_id, keys=batch.keys + self.idle.keys, tags=batch.tags + self.idle.tags
        )
        super()._log_rollout_data(both, timing_raw, rollout_data_dir)

    # ----------------------------------------------------------- on the disk

    def _load_checkpoint(self) -> None:
        if len(self.players) < len(ROLES):  # verl asks for it at the end of its own set-up
            self.global_steps = 0
            return
        super()._load_checkpoint()


class ActorPair:
    """The trainable models as one for verl's checkpoints: ``global_step_N/actor/<role>``, complete or not at all."""

    def __init__(self, groups: dict[str, RayWorkerGroup]):
        self.groups = groups

    @property
    def workers(self) -> list:
        return [worker for group in self.groups.values() for worker in group.workers]

    def save_checkpoint(self, local_path, remote_path=None, global_step=0, max_ckpt_to_keep=None) -> None:
        for role, group in self.groups.items():
            remote = remote_path and f"{remote_path}/{role}"
            group.save_checkpoint(f"{local_path}/{role}", remote, global_step, max_ckpt_to_keep=max_ckpt_to_keep)

    def load_checkpoint(self, local_path, del_local_after_load=False) -> None:
        for role, group in self.groups.items():
            group.load_checkpoint(local_path=f"{local_path}/{role}", del_local_after_load=del_local_after_load)


class ServerPair:
    """Both roles' engines as one for verl."""

    def __init__(self, managers: dict[str, LLMServerManager]):
        self.managers = managers

    def get_client(self) -> RoleClients:
        return RoleClients({role: manager.get_client() for role, manager in self.managers.items()})

    def get_replicas(self) -> list:
        return [replica for manager in self.managers.values() for replica in manager.get_replicas()]


class SecondWorker(ActorRolloutRefWorker):
    """verl's worker, whose engines are counted from ``SECOND_RANK``."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self):
        super().init_model()
        rank = self.rollout.replica_rank
        self.rollout.replica_rank += SECOND_RANK
        self.rollout.zmq_handle = self.rollout.zmq_handle.replace(
            f"-replica-{rank}-", f"-replica-{self.rollout.replica_rank}-"
        )


class _Shifted:
    """A worker group as seen by replicas that count from ``SECOND_RANK``: they slice the workers by their rank."""

    def __init__(self, group: RayWorkerGroup, rollout: DictConfig):
        per_replica = (
            rollout.tensor_model_parallel_size * rollout.data_parallel_size * rollout.pipeline_model_parallel_size
        )
        self.world_size = group.world_size
        self.workers = [None] * (SECOND_RANK * per_replica) + list(group.workers)


class ServedModel(LLMServerManager):
    """Engines without a trainer, in the trainer's resource pool; verl has this for reward models only."""

    @auto_await
    async def _initialize_llm_servers(self, start_rank: int | None = None):
        rollout = self.rollout_config
        per_replica = (
            rollout.tensor_model_parallel_size * rollout.data_parallel_size * rollout.pipeline_model_parallel_size
        )
        pools = split_resource_pool(self.rollout_resource_pool, split_size=per_replica)
        self.rollout_replicas = [
            self.rollout_replica_class(
                replica_rank=self.start_rank + i,
                config=rollout,
                model_config=self.model_config,
                gpus_per_node=rollout.n_gpus_per_node,
            )
            for i in range(len(pools))
        ]
        await asyncio.gather(*(r.init_colocated(pool) for r, pool in zip(self.rollout_replicas, pools, strict=True)))
        self.server_handles = [replica._server_handle for replica in self.rollout_replicas]
        self.server_addresses = [replica._server_address for replica in self.rollout_replicas]


def _stamped(metrics: dict, role: str) -> dict:
    """``actor/...`` becomes ``<role>/actor/...``."""
    return {f"{role}/{key}" if key.startswith("actor/") else key: value for key, value in metrics.items()}
