"""The meta-policy network and its file."""

import itertools
import json
import time

import pytest
import torch
from safetensors.torch import save_file

from rema_verl.deliberation.policy import HEADER, MetaPolicy, collate
from rema_verl.deliberation.protocol import ACTIONS
from rema_verl.deliberation.state import LAYOUT, SCHEMA

D = len(LAYOUT)


def states(batch=4, peers=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(batch, D, generator=g), torch.rand(batch, peers, D, generator=g)


def test_the_order_of_peers_does_not_matter():
    policy = MetaPolicy(seed=1)
    own, peers = states(peers=4)
    logits = policy(own, peers)
    assert logits.std(dim=0).min() > 1e-3  # it does look at the states
    for order in itertools.permutations(range(4)):
        torch.testing.assert_close(policy(own, peers[:, list(order)]), logits, rtol=0, atol=1e-5)
    # ... but peers do
    assert (policy(own, peers[:, [0, 0, 2, 3]]) - logits).abs().max() > 1e-4


@pytest.mark.parametrize("n", range(2, 9))
def test_any_number_of_agents(n):
    policy = MetaPolicy(seed=1).eval()
    own, peers = states(peers=n - 1)
    logits = policy(own, peers)
    assert logits.shape == (4, len(ACTIONS)) and logits.isfinite().all()
    # padding is not seen
    padded = torch.cat([peers, torch.full((4, 3, D), 7.0)], dim=1)
    mask = torch.arange(n + 2)[None].expand(4, -1) < n - 1
    torch.testing.assert_close(policy(own, padded, mask), logits, rtol=0, atol=1e-5)


def test_teams_of_different_sizes_in_one_batch():
    policy = MetaPolicy(seed=1).eval()
    g = torch.Generator().manual_seed(0)
    teams = [torch.rand(n, D, generator=g).tolist() for n in range(2, 9)]
    agents = [n % len(team) for n, team in enumerate(teams)]
    together = policy(*collate(teams, agents))
    for team, agent, logits in zip(teams, agents, together, strict=True):
        own, peers, mask = collate([team], [agent])
        assert mask.all() and peers.shape == (1, len(team) - 1, D) and own[0].tolist() == pytest.approx(team[agent])
        torch.testing.assert_close(policy(own, peers)[0], logits, rtol=0, atol=1e-5)


def test_seeds():
    own, peers = states(batch=200)
    one, again, other = MetaPolicy(seed=1), MetaPolicy(seed=1), MetaPolicy(seed=2)
    assert torch.equal(one(own, peers), again(own, peers)) and not torch.equal(one(own, peers), other(own, peers))

    def drawn(seed):
        return one.act(own, peers, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    assert set(drawn(0).tolist()) == {0, 1, 2}
    assert torch.equal(one.act(own, peers, greedy=True), one(own, peers).argmax(dim=1))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    MetaPolicy(seed=9)
    assert torch.equal(torch.rand(1), expected)  # the global generator is left alone


def test_draws_follow_the_probabilities():
    policy = MetaPolicy(seed=1)
    own, peers = (x[:1].expand(20_000, *x.shape[1:]) for x in states())
    drawn = policy.act(own, peers, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=3) / len(drawn)
    torch.testing.assert_close(shares, policy(own[:1], peers[:1]).softmax(dim=1)[0].detach(), rtol=0, atol=0.02)


def test_file(tmp_path):
    policy = MetaPolicy(hidden=32, heads=2, seed=1)
    own, peers = states()
    path = tmp_path / "new" / "policy.safetensors"
    policy.save(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name] and path.stat().st_size < 100_000
    assert torch.equal(MetaPolicy.load(path)(own, peers), policy(own, peers))
    written = path.read_bytes()
    MetaPolicy(hidden=32, heads=2, seed=1).save(path)  # over it, and byte for byte the same
    assert path.read_bytes() == written


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"schema": "mpdf-0-abc", "hidden": 64, "heads": 4}, "schema 'mpdf-0-abc', this version has 'mpdf-1-"),
        ({"schema": SCHEMA}, "damaged meta-policy"),
        ({"schema": SCHEMA, "hidden": 64, "heads": 4}, "damaged meta-policy"),
        ({"schema": SCHEMA, "hidden": 64, "heads": 3}, "damaged meta-policy"),
        ({"schema": SCHEMA, "hidden": [], "heads": 3}, "damaged meta-policy"),
        ([], "not a meta-policy"),
        (None, "not a meta-policy"),
    ],
)
def test_another_schema_is_refused_in_one_line(tmp_path, header, message):
    path = tmp_path / "policy.safetensors"
    save_file({"a": torch.zeros(1)}, path, {} if header is None else {HEADER: json.dumps(header)})
    with pytest.raises(ValueError, match=message) as error:
        MetaPolicy.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        MetaPolicy.load(tmp_path / "absent")
    (tmp_path / "text").write_text("{}")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        MetaPolicy.load(tmp_path / "text")
    whole = tmp_path / "whole.safetensors"
    MetaPolicy().save(whole)
    (tmp_path / "cut").write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        MetaPolicy.load(tmp_path / "cut")


def test_bad_shapes():
    policy = MetaPolicy()
    own, peers = states()
    for bad in [(own[:, 1:], peers[..., 1:]), (own[:2], peers), (own, peers[:, 0]), (own[0], peers)]:
        with pytest.raises(ValueError, match="expected own"):
            policy(*bad)
    with pytest.raises(ValueError, match="expected peer_mask"):
        policy(own, peers, torch.ones(4, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least one peer"):
        policy(own, peers[:, :0])
    with pytest.raises(ValueError, match="at least one peer"):
        policy(own, peers, torch.tensor([[True] * 3] * 3 + [[False] * 3]))
    with pytest.raises(ValueError, match="multiple of heads"):
        MetaPolicy(hidden=10, heads=4)


def test_a_thousand_states_at_once():
    policy = MetaPolicy().eval()
    own, peers = states(batch=1000, peers=7)
    start = time.perf_counter()
    assert policy.act(own, peers, greedy=True).shape == (1000,)
    print(f"1,000 states of 8 agents: {1000 * (time.perf_counter() - start):.1f} ms")
