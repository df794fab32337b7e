"""Trainer mode `rema_separate`, piece by piece: whose turn it is, which rows train, what a checkpoint holds."""

import asyncio

import pytest
from conftest import make_tokenizer
from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import DictConfigWrap
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from rema_verl import checks
from rema_verl.agent_loops.clients import RoleClients
from rema_verl.agent_loops.rema import ReMAAgentLoop
from rema_verl.config import SwitchConfig, composing, role_config
from rema_verl.dialogue import META_THINKING, REASONING, ROLES
from rema_verl.trainers import separate
from rema_verl.trainers.separate import SECOND_RANK, ActorPair, SeparateTrainer, ServerPair, _Shifted, _stamped


@pytest.mark.parametrize(
    ("level", "freq", "expected"),
    [("step", 1, "MRMRMRMR"), ("step", 3, "MMMRRRMM"), ("epoch", 1, "MMRRMMRR"), ("epoch", 2, "MMMMRRRR")],
)
def test_turns_follow_from_the_step_alone(level, freq, expected):
    """So a resumed run is in the phase it was in, with nothing to save."""
    switch = SwitchConfig(level=level, freq=freq, start=META_THINKING)
    turns = [switch.learning(step, steps_per_epoch=2) for step in range(1, 9)]
    assert "".join(role[0].upper() for (role,) in turns) == expected


def test_both_or_the_only_one_that_can():
    assert SwitchConfig(level="none").learning(5, 2) == ROLES
    assert SwitchConfig(level="step", freq=1).learning(5, 2, trainable=(REASONING,)) == (REASONING,)


def test_a_role_has_its_own_part_of_the_configuration():
    config = OmegaConf.create(
        {
            "actor_rollout_ref": {
                "model": {"path": "base"},
                "actor": {"optim": {"lr": 1.0}},
                "rollout": {"temperature": 1.0, "top_p": 1.0},
            },
            "rema": {
                "roles": {
                    META_THINKING: {},
                    REASONING: {
                        "model_path": "own",
                        "temperature": 0.7,
                        "overrides": {"actor": {"optim": {"lr": 0.1}}},
                    },
                }
            },
        }
    )
    own, other = (role_config(config, role).actor_rollout_ref for role in (REASONING, META_THINKING))
    assert (own.model.path, own.actor.optim.lr, own.rollout.temperature) == ("own", 0.1, 0.7)
    assert other == config.actor_rollout_ref


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    """composed(*overrides) -> a whole configuration of this mode, with data and a tiny model."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from build_tiny import build_model

    folder = tmp_path_factory.mktemp("inputs")
    row = {"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2"}, "data_source": "s"}
    pq.write_table(pa.Table.from_pylist([row] * 8), folder / "rows.parquet")
    build_model(make_tokenizer("qwen2"), folder / "model", seed=0, hidden=64, layers=1)

    def make(*overrides):
        files = [f"data.{split}_files={folder}/rows.parquet" for split in ("train", "val")]
        settings = ["+device=cpu", "trainer.v1.trainer_mode=rema_separate", "rema.switch.start=reasoning"]
        sizes = ["data.train_batch_size=4", "actor_rollout_ref.actor.ppo_mini_batch_size=4"]
        sizes += ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4", "data.max_prompt_length=1024"]
        model = [f"actor_rollout_ref.model.path={folder}/model"]
        return composing.compose("rema_trainer", [*settings, *files, *sizes, *model, *overrides])

    return make


@pytest.mark.parametrize(
    "switch", ["algorithm.filter_groups.enable=true", "trainer.v1.sampler.sync_refill_failed_groups=true"]
)
def test_a_step_gets_its_questions_where_verl_draws_them_one_by_one(composed, monkeypatch, switch):
    """verl then writes data.gen_batch_size=1 into what it takes for the configuration: the first role's copy of it."""

    def set_up(self):
        self._init_tokenizer()
        self._init_dataloader()
        self.actor_rollout_wg = self.llm_server_manager = self.checkpoint_manager = None

    config = composed(switch)
    checks.check(config)
    trainer = SeparateTrainer(config)
    monkeypatch.setattr(PPOTrainerSync, "_setup", set_up)
    monkeypatch.setattr(trainer, "_load_checkpoint", lambda: None)
    monkeypatch.setattr(
        trainer,
        "_second_player",
        lambda role: separate.Player(role_config(trainer.config, role), None, None, None, None),
    )
    trainer._setup()
    trainer.global_steps = 1
    assert trainer.config is config
    assert len(trainer._next_train_batch()) == config.data.train_batch_size == 4
    for role in ROLES:  # verl asks for more while the learning role's configuration is in place
        with trainer.playing(role):
            assert len(trainer._next_train_batch(2)) == 2


def test_a_chat_template_of_a_role_reaches_its_sampler(composed):
    own = "+rema.roles.reasoning.overrides.model.custom_chat_template"
    config = composed(f"{own}='{{{{ messages[-1].content }}}}'")
    tokenizer = make_tokenizer("qwen2")
    loop = ReMAAgentLoop(
        trainer_config=DictConfigWrap(config),
        server_manager=None,
        tokenizer=tokenizer,
        processor=None,
        dataset_cls=None,
        data_config=DictConfigWrap(config.data),
        hf_model_type="qwen2",
    )
    assert loop.seats[META_THINKING].tokenizer is tokenizer
    assert loop.seats[REASONING].tokenizer.chat_template == "{{ messages[-1].content }}"


def test_a_request_goes_to_its_roles_engine():
    class Client:
        def __init__(self, role):
            self.role = role

        async def generate(self, request_id, **kwargs):
            return self.role, request_id, kwargs

    clients = RoleClients({role: Client(role) for role in ROLES})
    for role in ROLES:
        answer = asyncio.run(clients.generate(f"3f-{role}", prompt_ids=[1]))
        assert answer == (role, f"3f-{role}", {"prompt_ids": [1]})


class Group:
    def __init__(self, name):
        self.workers, self.world_size, self.calls = [f"{name}{i}" for i in range(4)], 4, []

    def save_checkpoint(self, *args, **kwargs):
        self.calls.append((args, kwargs))

    load_checkpoint = save_checkpoint


def test_a_checkpoint_holds_both_models():
    groups = {role: Group(role) for role in ROLES}
    pair = ActorPair(groups)
    pair.save_checkpoint("c/global_step_3/actor", None, 3, max_ckpt_to_keep=2)
    pair.load_checkpoint(local_path="c/global_step_3/actor", del_local_after_load=False)
    for role, group in groups.items():
        (saved, kept), (_, loaded) = group.calls
        assert saved == (f"c/global_step_3/actor/{role}", None, 3) and kept == {"max_ckpt_to_keep": 2}
        assert loaded["local_path"] == f"c/global_step_3/actor/{role}"
    assert len(pair.workers) == 8


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_engines_of_the_second_model_find_their_workers(tensor_parallel):
    rollout = OmegaConf.create(
        {"tensor_model_parallel_size": tensor_parallel, "data_parallel_size": 1, "pipeline_model_parallel_size": 1}
    )
    group = Group("w")
    shifted = _Shifted(group, rollout)
    found = []
    for replica in range(shifted.world_size // tensor_parallel):  # as verl's replicas slice, by their rank
        rank = SECOND_RANK + replica
        found += shifted.workers[tensor_parallel * rank : tensor_parallel * (rank + 1)]
    assert found == group.workers


def test_metrics_carry_the_role():
    assert _stamped({"actor/lr": 1, "dialogue/turns/mean": 2}, REASONING) == {
        "reasoning/actor/lr": 1,
        "dialogue/turns/mean": 2,
    }


def test_all_engines_are_watched():
    class Manager:
        def __init__(self, replicas):
            self.replicas = replicas

        def get_replicas(self):
            return self.replicas

    assert ServerPair({"a": Manager([1, 2]), "b": Manager([3])}).get_replicas() == [1, 2, 3]
