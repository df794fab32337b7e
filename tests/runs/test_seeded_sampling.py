"""A seeded request draws the same tokens whether vLLM prefills its prompt at once or in chunks: a real CPU engine."""

import json
import os
import subprocess
import sys

import pytest
from build_tiny import build_model, build_tokenizer
from conftest import REPO

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams, TokensPrompt

model, budget = sys.argv[1], int(sys.argv[2])
llm = LLM(
    model=model, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8, max_num_batched_tokens=budget,
    enable_prefix_caching=False, kv_cache_memory_bytes=2**26, disable_log_stats=True,
    worker_extension_cls="rema_verl.platforms.vllm_cpu_worker.CPUWorkerExtension",
)
prompts = [TokensPrompt(prompt_token_ids=[5 + (7 * i + j) % 200 for j in range(150)]) for i in range(6)]
sampling = [SamplingParams(seed=i, max_tokens=12, ignore_eos=True) for i in range(6)]
said = llm.generate(prompts, sampling, use_tqdm=False)
print("SAID" + json.dumps([output.outputs[0].token_ids for output in said]))
"""


def test_chunks_of_a_prompt_change_nothing_about_what_a_seed_draws(tmp_path):
    tokenizer = build_tokenizer(["plan solve 1+2-3*4 [FINISH]"] * 50)
    build_model(tokenizer, tmp_path, seed=0, hidden=64, layers=1)
    environment = os.environ | {
        "PYTHONPATH": str(REPO),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    said = []
    for budget in (64, 1024):  # tokens a step: prompts of 150 in three pieces, all six at once
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(budget)]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr[-3000:]
        said.append(json.loads(ended.stdout.split("SAID", 1)[1].splitlines()[0]))
    assert said[0] == said[1] and len({tuple(tokens) for tokens in said[0]}) == 6
