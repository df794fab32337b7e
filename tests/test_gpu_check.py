"""The GPU check, rehearsed on the CPU: it passes, it notices wrong formulas, and its baseline is verl's loss."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import REPO
from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla

from rema_verl.errors import UserError
from rema_verl.plugin import CONTENTS

sys.path.insert(0, str(REPO / "tests" / "benchmarks"))
import gpu_check

SMALL = gpu_check.Sizes(((3, 1, 1), (9, 50, 6), (6, 120, 8)), 8, (4, 64, 6), (4, 4), (1, 32, 128), (4, 64, 4), 1)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(gpu_check, "REHEARSAL", SMALL)


def wrong(rows) -> set[str]:
    return {row.check for row in rows if not row.ok}


def test_rehearsal_passes_and_writes_its_figures(tmp_path, capsys):
    assert gpu_check.main(["--device", "cpu", "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["torch"] == torch.__version__ and figures["sizes"] == "rehearsal"
    assert all(row["ok"] for row in figures["rows"])
    assert f"{len(figures['rows'])} of {len(figures['rows'])} rows" in capsys.readouterr().out


def test_every_loss_and_estimator_is_checked():
    checked = {row.check.partition(":")[0] for row in gpu_check.check_turn_clip("cpu", SMALL)}
    checked |= {row.case.partition(",")[0] for row in gpu_check.check_estimators("cpu", SMALL)}
    assert checked == set(CONTENTS["verl.trainer.ppo.core_algos"])


def with_other_clip(old_log_prob, log_prob, advantages, response_mask, config, **kwargs):
    config = gpu_check.Config(config | {"clip_ratio_low": config.clip_ratio_low + 0.01})
    return ORIGINAL(old_log_prob, log_prob, advantages, response_mask, config=config, **kwargs)


def with_other_turn(old_log_prob, log_prob, advantages, response_mask, config, **kwargs):
    """One token too many in the mask of the last row."""
    response_mask = response_mask.clone()
    response_mask[-1, int((~response_mask[-1]).nonzero()[0, 0]) if not response_mask[-1].all() else 0] = True
    fill = {name: x.nan_to_num(-1.0) for name, x in (("old_log_prob", old_log_prob), ("log_prob", log_prob))}
    return ORIGINAL(advantages=advantages, response_mask=response_mask, config=config, **fill, **kwargs)


def with_other_gradient(old_log_prob, log_prob, advantages, response_mask, config, **kwargs):
    """The right value, 1 % too much gradient."""
    log_prob = log_prob + 0.01 * (log_prob - log_prob.detach())
    return ORIGINAL(old_log_prob, log_prob, advantages, response_mask, config=config, **kwargs)


ORIGINAL = gpu_check.compute_policy_loss_turn_clip


@pytest.mark.parametrize(
    "loss, noticed",
    [
        (with_other_clip, {"turn_clip: loss, metrics", "turn_clip: gradient"}),
        (with_other_turn, {"turn_clip: loss, metrics", "turn_clip: gradient"}),
        (with_other_gradient, {"turn_clip: gradient"}),
    ],
)
def test_a_wrong_loss_is_noticed(monkeypatch, loss, noticed):
    monkeypatch.setattr(gpu_check, "compute_policy_loss_turn_clip", loss)
    rows = gpu_check.check_turn_clip("cpu", SMALL)
    assert wrong(rows) == noticed
    assert any(not row.ok and "bf16" in row.case for row in rows)


def test_a_wrong_row_is_exit_code_1(monkeypatch):
    monkeypatch.setattr(gpu_check, "compute_policy_loss_turn_clip", with_other_gradient)
    assert gpu_check.main(["--device", "cpu"]) == 1


@pytest.mark.parametrize("name", ["softrankpo", "role_grpo", "turn_reinforce_plus_plus"])
def test_a_wrong_estimator_is_noticed(monkeypatch, name):
    attribute = f"compute_{name}_advantage"
    original = getattr(gpu_check, attribute)
    monkeypatch.setattr(gpu_check, attribute, lambda *args: tuple(1.1 * x for x in original(*args)))
    cases = {row.case.partition(",")[0] for row in gpu_check.check_estimators("cpu", SMALL) if not row.ok}
    assert cases == {name}


def test_a_wrong_rank_matching_loss_is_noticed(monkeypatch):
    original = gpu_check.rank_matching_loss
    monkeypatch.setattr(gpu_check, "rank_matching_loss", lambda log_ratio, a, beta: original(log_ratio, 1.1 * a, beta))
    assert len(wrong(gpu_check.check_rank_matching("cpu", SMALL))) == 2


def test_nan_is_wrong():
    assert not gpu_check.compare("", "", [(torch.tensor([1.0, torch.nan]), torch.ones(2))], 1.0).ok
    assert not gpu_check.compare("", "", [(1.0, 1.0), (torch.nan, 1.0)], 1.0, norm=True).ok


@pytest.mark.parametrize("clip", [(0.2, 0.28, 3.0), (0.05, 0.1, 1.2)])
def test_the_baseline_is_verls_own_vanilla(clip):
    batch = gpu_check.loss_batch(9, 50, 6, seed=0, dtype=torch.float32, weighted=False)
    batch = {name: x.nan_to_num(0.0) if x.is_floating_point() else x for name, x in batch.items()}
    config = gpu_check.actor_config(None, clip, dp_size=2, batch_num_tokens=777, global_batch_size=9)
    results = []
    for loss in (gpu_check.vanilla_ppo, compute_policy_loss_vanilla):
        leaf = batch["log_prob"].clone().requires_grad_()
        value, metrics = loss(**batch | {"log_prob": leaf}, config=config)
        value.backward()
        results.append((value.detach(), metrics, leaf.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert all(results[0][1].values()), "every clip was reached"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_mistake_is_one_line():
    words = [sys.executable, str(REPO / "tests" / "benchmarks" / "gpu_check.py"), "--device", "cuda"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "sees no CUDA device" in done.stderr


@pytest.mark.parametrize("words, said", [(["--json", "/nowhere/x.json"], "/nowhere"), (["--devise"], "--devise")])
def test_mistakes_are_found_before_any_check(monkeypatch, words, said):
    monkeypatch.delattr(gpu_check, "check_turn_clip")
    with pytest.raises(UserError, match=said):
        gpu_check.main(words)


def test_it_needs_neither_verl_nor_ray():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('verl', 'ray', 'vllm', 'tensordict', 'pebble', 'math_verify')));"
        "sys.path.insert(0, 'tests/benchmarks'); import gpu_check; assert 'plain' in gpu_check.find_vanilla()[0]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)
