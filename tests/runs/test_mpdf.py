"""Real verl, Ray and vLLM: all stages with a tiny model, a collection that is killed, and the LLM as meta-policy."""

import json
import math
import time

import pytest
from common import check_ratios_leave_1
from conftest import Command
from safetensors.torch import load_file

from rema_verl.deliberation import corpus
from rema_verl.deliberation.protocol import ACTIONS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """All four stages of a recipe, as SMOKE=1 runs them: the folder."""
    runs = tmp_path_factory.mktemp("runs")
    command = Command(["bash", "recipes/mpdf_llama8b_math.sh"], runs / "log.txt", RUNS=runs, SMOKE=1, SEED=3)
    assert command.wait(1800) == 0, command.text()[-3000:]
    return runs / "smoke_mpdf_llama8b_math"


def test_smoke_runs_all_stages(stages):
    for name in ("uniform", "supervised"):
        table = corpus.read(stages / f"corpus_{name}")
        assert table.num_rows == 8 * 3 * 3
        assert set(table["action_taken"].to_pylist()) <= set(range(len(ACTIONS)))
    before, after = (load_file(stages / f"{name}.safetensors") for name in ("supervised", "softrankpo"))
    assert before.keys() == after.keys() and any((before[key] != after[key]).any() for key in before)
    results = json.loads((stages / "evaluation/results.json").read_text())
    methods = results["methods"]
    policies = ("supervised", "softrankpo", "supervised, greedy", "softrankpo, greedy")
    assert list(methods) == [*policies, "majority", "vanilla", "cot", "self_consistency", "debate"]
    assert methods["debate"]["calls"] == 3 + 9 and methods["majority"]["calls"] == 6
    assert methods["vanilla"]["calls"] == methods["cot"]["calls"] == 1
    assert methods["self_consistency"]["calls"] == math.ceil(methods["softrankpo"]["calls"])
    assert all(math.isclose(sum(mix.values()), 1) for name in policies for mix in methods[name]["actions"])
    assert all(m["total_tokens"] > 0 for m in methods.values())
    assert 0 < results["timing"]["policy_seconds_per_1000_states"] and 0 < results["timing"]["llm_call_seconds"]
    assert "one LLM call" in (stages / "evaluation/results.md").read_text()


@pytest.mark.long
def test_a_killed_collection_goes_on_to_the_same_corpus(stages, tmp_path):
    model, data = stages / "inputs/model", stages / "inputs/data"

    def collect(out) -> Command:
        arguments = ["python", "-m", "rema_verl.deliberation.collect", "--model", model, "--device", "cpu"]
        arguments += ["--questions", data / "train.parquet", "--prompts", data / "prompts.json", "--limit", "96"]
        arguments += ["--max-tokens", "32", "--context", "256", "--in-flight", "8", "--seed", "5", "--out", out]
        return Command(arguments, tmp_path / f"{out.name}_{time.monotonic_ns()}.txt", OMP_NUM_THREADS=1)

    killed = collect(tmp_path / "killed")
    deadline = time.monotonic() + 900
    while not list((tmp_path / "killed").glob("part-*.parquet")):
        assert killed.process.poll() is None and time.monotonic() < deadline, killed.text()[-3000:]
        time.sleep(0.05)
    killed.kill()
    done = len(corpus.done_keys(tmp_path / "killed"))
    assert 0 < done < 96
    for name in ("killed", "whole"):
        command = collect(tmp_path / name)
        assert command.wait(900) == 0, command.text()[-3000:]
    resumed, whole = (corpus.read(tmp_path / name) for name in ("killed", "whole"))
    assert whole.num_rows == resumed.num_rows == 96 * 9  # read refuses duplicates
    assert corpus.content_hash(resumed) == corpus.content_hash(whole)


def test_the_llm_learns_to_choose_actions(tmp_path):
    command = Command(["bash", "recipes/mpdf_llm_qwen7b_math.sh"], tmp_path / "log.txt", RUNS=tmp_path, SMOKE=1)
    assert command.wait(1800) == 0, command.text()[-3000:]
    run = tmp_path / "smoke_mpdf_llm_qwen7b_math"
    lines = [json.loads(line) for file in run.glob("metrics/*.jsonl") for line in file.read_text().splitlines()]
    metrics = {line["step"]: line["data"] for line in lines if "mpdf/action/refine" in line["data"]}
    assert sorted(metrics) == [1, 2]
    for step in metrics.values():
        assert math.isclose(sum(step[f"mpdf/action/{action}"] for action in ACTIONS), 1)
        assert step["mpdf/invalid_actions"] >= 0 and step["mpdf/tokens/act"] > 0
        assert step["training/rollout_probs_diff_max"] < 1e-3
    assert any(step["actor/grad_norm"] > 0 for step in metrics.values())
    check_ratios_leave_1(metrics)
    rows = [json.loads(line) for line in (run / "rollouts/1.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 4 * 3 and {row["agent"] for row in rows} == {0, 1, 2}
    by_session: dict[str, set[float]] = {}
    for row in rows:
        by_session.setdefault(row["trajectory_id"], set()).add(row["score"])
    assert len(by_session) == 16 and any(len(scores) > 1 for scores in by_session.values())  # rewards differ by agent
