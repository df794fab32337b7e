"""Training of a meta-policy: the command as a user calls it, its manifest, determinism, refusals."""

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simulator
import torch
from safetensors.torch import save_file

from rema_verl.deliberation import corpus
from rema_verl.deliberation.policy import HEADER, MetaPolicy
from rema_verl.deliberation.state import SCHEMA
from rema_verl.deliberation.train import STAGES, Options, main, train

QUICK = ["--epochs", "3", "--hidden", "16", "--held-out", "0.2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus")
    corpus.append_shard(path, simulator.collect(simulator.World(), 150, seed=0))
    return path


@pytest.fixture(scope="module")
def supervised(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("policy") / "sft.safetensors"
    main(["--corpus", str(folder), "--out", str(path), "--stage", "supervised", *QUICK])
    return path


def test_both_stages(folder, supervised, tmp_path, capsys):
    out = tmp_path / "new" / "policy.safetensors"
    main(
        ["--corpus", str(folder), "--out", str(out), "--stage", "softrankpo", "--init", str(supervised), *QUICK]
        + ["--seed", "5", "--lr", "0.01", "--entropy", "0.01"]
    )
    assert sorted(p.name for p in out.parent.iterdir()) == ["policy.json", "policy.safetensors"]
    manifest = json.loads(out.with_suffix(".json").read_text())
    assert manifest["stage"] == "softrankpo" and manifest["seed"] == 5 and manifest["lr"] == 0.01
    assert manifest["schema"] == SCHEMA and manifest["hidden"] == 16 and len(manifest["losses"]) == 3
    assert manifest["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert manifest["init"]["sha256"] == hashlib.sha256(supervised.read_bytes()).hexdigest()
    assert manifest["corpus"]["states"] == 450 and manifest["corpus"]["trajectories"] == 150
    assert manifest["corpus"]["sha256"] == corpus.content_hash(corpus.read(folder))
    assert 0 < manifest["corpus"]["held_out_states"] < 200
    before, after = manifest["before"]["train"], manifest["after"]["train"]
    assert after["expected_reward"] > before["expected_reward"]
    printed = capsys.readouterr().out
    for name in ("accuracy", "greedy_reward", "expected_reward", "persist_reward", "action/refine"):
        assert f"{name:16} {before[name]:8.4f} -> {after[name]:8.4f}" in printed
    assert "held_out:" in printed
    assert MetaPolicy.load(out).hidden == 16


def test_the_same_seed_gives_the_same_weights(folder, supervised, tmp_path):
    for stage in ("softrankpo", "ppo"):
        written = []
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
            out = tmp_path / f"{stage}-{name}.safetensors"
            options = ["--corpus", str(folder), "--out", str(out), "--init", str(supervised), "--seed", seed, *QUICK]
            main([*options, "--stage", stage])
            written.append(out.read_bytes())
        assert written[0] == written[1] != written[2]


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_learns_what_always_pays(stage):
    """Refine pays 1 in every state, the others 0 or less."""
    g = torch.Generator().manual_seed(0)
    own, peers = torch.rand(64, simulator.SHAPE, generator=g), torch.rand(64, 2, simulator.SHAPE, generator=g)
    rewards = torch.tensor([[0.0, 1.0, -1.0]], dtype=torch.float64).expand(64, -1)
    states = corpus.States(own, peers, torch.ones(64, 2, dtype=torch.bool), rewards)
    policy, told = MetaPolicy(hidden=16), []
    losses = train(policy, states, Options(stage=stage, epochs=40, batch_size=32, lr=0.01, beta=0.05), told.append)
    assert told == losses and len(losses) == 40
    assert policy(own, peers).softmax(1)[:, 1].min() > 0.8


def test_softrankpo_is_blind_to_the_scale_of_rewards(folder):
    """Rewards times 0.1, 10 and 1000: the same weights. PPO's are others, so this can fail."""
    states = corpus.tensors(corpus.read(folder))

    def trained(scale, stage):
        scaled = corpus.States(states.own, states.peers, states.mask, states.rewards * scale)
        policy = MetaPolicy(hidden=16, seed=3)
        for one in ("supervised", stage):
            train(policy, scaled, Options(stage=one, epochs=3, seed=3, batch_size=64))
        return torch.cat([p.detach().flatten() for p in policy.parameters()])

    once = trained(1, "softrankpo")
    for scale in (0.1, 10, 1000):
        torch.testing.assert_close(trained(scale, "softrankpo"), once, rtol=0, atol=1e-7)
    assert (trained(1000, "ppo") - trained(1, "ppo")).abs().max() > 1e-3


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("rema-verl: error: ") and error.count("\n") == 1
    return error


def test_a_users_mistakes_are_one_line(folder, supervised, tmp_path, capsys):
    out = tmp_path / "out" / "p.safetensors"
    good = ["--out", out, "--stage", "softrankpo", "--init", supervised]
    empty, other, few, alien = (tmp_path / name for name in ("empty", "other", "few", "alien.safetensors"))
    for path in (empty, other, few):
        path.mkdir()
    table = pa.Table.from_pylist(simulator.collect(simulator.World(), 1, seed=0), schema=corpus.FIELDS)
    metadata = {key.decode(): value.decode() for key, value in corpus.FIELDS.metadata.items()}
    pq.write_table(table.replace_schema_metadata(metadata | {"rema_verl.schema": "mpdf-0-x"}), other / "part-0.parquet")
    metadata["rema_verl.actions"] = '["persist", "refine", "concede", "leave"]'
    pq.write_table(table.replace_schema_metadata(metadata), few / "part-0.parquet")
    save_file({"a": torch.zeros(1)}, alien, {HEADER: json.dumps({"schema": "mpdf-0-x"})})

    assert "an empty corpus" in refused(capsys, "--corpus", empty, *good)
    assert "no such folder" in refused(capsys, "--corpus", tmp_path / "absent", *good)
    assert "states of schema 'mpdf-0-x'" in refused(capsys, "--corpus", other, *good)
    assert '"leave"]' in refused(capsys, "--corpus", few, *good)
    assert "states of schema 'mpdf-0-x'" in refused(capsys, "--corpus", folder, *good[:-1], alien)
    assert "pass it as --init" in refused(capsys, "--corpus", folder, *good[:-2])
    assert "no such file" in refused(capsys, "--corpus", folder, *good[:-1], tmp_path / "absent")
    assert "invalid choice" in refused(capsys, "--corpus", folder, "--out", out, "--stage", "dpo")
    assert "ends in .safetensors" in refused(capsys, "--corpus", folder, "--out", tmp_path, "--stage", "supervised")
    for option, value, message in [
        ("--epochs", "0", "epochs must be at least 1"),
        ("--lr", "nan", "lr must be a positive number"),
        ("--tau", "0", "tau must be a positive number"),
        ("--beta", "-1", "beta must be a positive number"),
        ("--clip", "1", "clip must lie between 0 and 1"),
        ("--entropy", "-0.1", "entropy must not be negative"),
        ("--held-out", "1", "--held-out must lie in [0, 1)"),
        ("--seed", "x", "invalid int value"),
    ]:
        assert message in refused(capsys, "--corpus", folder, *good, option, value)
    heads = refused(capsys, "--corpus", folder, "--out", out, "--stage", "supervised", "--heads", "5")
    assert "multiple of heads" in heads
    assert not out.parent.exists()
