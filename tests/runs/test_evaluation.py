"""recipes/eval_math.sh for real, killed in the middle."""

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import REPO, Command

sys.path.insert(0, str(REPO / "recipes"))
import rollouts

pytestmark = pytest.mark.slow


def test_real_run_survives_a_kill(tmp_path):
    """Real verl, Ray and vLLM with a random model, killed in the middle and started again with the same command."""
    small = ["--sft", "100", "--val", "40", "--train", "8", "--hidden", "64", "--layers", "1"]
    subprocess.run([sys.executable, "data_prep/build_tiny.py", "--out", tmp_path, *small], cwd=REPO, check=True)
    samples, batch, out = 4, 8, tmp_path / "out"
    command = ["bash", "recipes/eval_math.sh", tmp_path / "model"]
    command += ["rema.prompts.meta_thinking=plan", "rema.prompts.reasoning=solve"]
    command += [f"data.val_batch_size={batch}", "actor_rollout_ref.rollout.max_num_batched_tokens=2048"]
    settings = {
        "DEVICE": "cpu", "SUITE": tmp_path / "val.parquet", "OUT": out, "RUNS": tmp_path,
        "N": samples, "TEMPERATURE": 1.0, "MAX_TURNS": 2, "TOKENS_PER_TURN": 16, "CONTEXT_TOKENS": 160,
    }  # fmt: skip
    total = 40 * samples

    def counts(folder: Path = out / "journal") -> Counter:
        return Counter({name: len(found) for name, found in rollouts.read_journal(folder).items()})

    first = Command(command, tmp_path / "first.log", **settings)
    deadline = time.monotonic() + 900
    while counts().total() < total // 4:
        assert first.process.poll() is None and time.monotonic() < deadline, first.text()[-3000:]
        time.sleep(0.02)
    first.kill()
    before = counts()
    assert before.total() < total, "it was done before it could be killed"

    second = Command(command, tmp_path / "second.log", **settings)
    assert second.wait(1800) == 0, second.text()[-3000:]
    after, new = counts(), counts(out / "journal" / "002")
    twice = sum(max(0, count - samples) for count in after.values())
    print(f"{before.total()} of {total} at the kill, {new.total()} after it, {twice} of them twice")
    assert len(after) == 40 and min(after.values()) >= samples
    assert twice <= batch * samples  # what was in flight at the kill
    result = json.loads((out / "results.json").read_text())
    ((name, measured),) = result["benchmarks"].items()
    assert (name, measured["questions"], measured["samples"]) == ("tiny_arithmetic_synthetic", 40, total)
    assert sum(measured["stop_reasons"].values()) == total and measured["missing"] == {"too_long": 0, "failed": 0}
    assert list(measured["figures"]) == ["avg@4", "pass@4"] and "95 %" in (out / "results.md").read_text()

    third = Command(command, tmp_path / "third.log", **settings)
    assert third.wait(300) == 0 and "trajectories to generate" not in third.text()
    fourth = Command(command, tmp_path / "fourth.log", **{**settings, "TEMPERATURE": 0.5})
    assert fourth.wait(300) == 2 and "holds results with temperature=1.0, not 0.5" in fourth.text()
