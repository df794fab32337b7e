"""verl's agent-loop worker with loop `rema`: its memory follows the tokens of dialogues in flight, and nothing stays.

The worker is verl's own class; engine and TransferQueue are fakes, and no process is started.
"""

import asyncio
import gc
import sys
import tracemalloc
from itertools import pairwise
from statistics import median

import pytest
from conftest import MODEL_TYPE
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.trainer.ppo.v1 import agent_loop_tq
from verl.utils.tensordict_utils import assign_non_tensor_data, assign_non_tensor_stack
from verl.workers.rollout.replica import TokenOutput

TURNS = 2
DIALOGUES = 100
VerlWorker = agent_loop_tq.AgentLoopWorkerTQ.__ray_metadata__.modified_class  # the class inside the Ray actor


class Engine:
    """Answers with ``length`` tokens; holds the last call of each dialogue back while ``gate`` is closed."""

    def __init__(self, tokenizer):
        self.word, self.end = tokenizer.encode("a", add_special_tokens=False)[0], tokenizer.eos_token_id
        self.length, self.gate = 8, asyncio.Event()
        self.gate.set()
        self.contexts: list[int] = []  # tokens of each call since the last look
        self.waiting = 0

    async def generate(self, request_id, *, prompt_ids, **kwargs) -> TokenOutput:
        self.contexts.append(len(prompt_ids))
        await asyncio.sleep(0)
        if request_id.endswith("reasoning") and len(prompt_ids) > 2 * self.length and not self.gate.is_set():
            self.waiting += 1
            await self.gate.wait()
        fields = {"num_cached_tokens": 0, "min_global_steps": 0, "max_global_steps": 0}
        ids = [self.word] * (self.length - 1) + [self.end]
        return TokenOutput(token_ids=ids, log_probs=[-0.5] * len(ids), stop_reason="completed", extra_fields=fields)


class Queue:
    """TransferQueue that only counts."""

    failures = 0

    async def async_kv_put(self, key, partition_id, tag):
        self.failures += tag["status"] == "failure"


class Worker(VerlWorker):
    """verl's worker without Ray; rows are counted instead of sent."""

    def __init__(self, tokenizer):
        rollout = {"prompt_length": 10**6, "response_length": 10**6, "n": 1, "calculate_log_probs": True}
        rollout |= {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "agent": {"default_agent_loop": "rema"}}
        self.config = OmegaConf.create(
            {"actor_rollout_ref": {"rollout": rollout}, "data": {}, "rema": {"max_turns": TURNS}}
        )
        self.llm_client, self.tokenizer, self.hf_model_type = Engine(tokenizer), tokenizer, MODEL_TYPE["qwen2"]
        self.processor, self.dataset_cls, self.tools = None, None, []
        self.background_tasks: set[asyncio.Task] = set()
        self.rows = 0

    async def _agent_loop_postprocess(self, output, validate, **kwargs) -> None:
        self.rows += len(output)

    async def begin(self, count: int) -> None:
        batch = TensorDict({}, batch_size=count)
        questions = [[{"role": "user", "content": f"Question {i}?"}] for i in range(count)]
        assign_non_tensor_stack(batch, "uid", [f"u{i}" for i in range(count)])
        assign_non_tensor_stack(batch, "index", list(range(count)))
        assign_non_tensor_stack(batch, "raw_prompt", questions)
        assign_non_tensor_data(batch, "global_steps", 1)
        await self.generate_sequences(batch)

    async def end(self) -> None:
        await asyncio.gather(*self.background_tasks)
        await asyncio.sleep(0)


@pytest.fixture
def worker(tokenizers, monkeypatch) -> Worker:
    monkeypatch.setattr(agent_loop_tq, "tq", Queue())
    return Worker(tokenizers["qwen2"])  # of the others verl warns, and pytest keeps the warnings


def test_nothing_stays_of_a_thousand_dialogues(worker):
    async def soak() -> list[int]:
        """Memory blocks that each hundred dialogues leave behind."""
        blocks = []
        for _ in range(12):
            await worker.begin(DIALOGUES)
            await worker.end()
            worker.llm_client.contexts.clear()
            gc.collect()
            blocks.append(sys.getallocatedblocks())
        return [after - before for before, after in pairwise(blocks[1:])]  # the first fills caches

    grown = asyncio.run(soak())
    assert worker.rows == 12 * 2 * DIALOGUES and agent_loop_tq.tq.failures == 0 and not worker.background_tasks
    # A leak grows every time; what other threads and lazy caches allocate comes now and then, hence the median.
    assert median(grown) < DIALOGUES / 4, grown


def test_memory_follows_the_tokens_in_flight(worker):
    engine, count = worker.llm_client, 20

    async def in_flight(length: int) -> tuple[int, int]:
        """(tokens, bytes) while every dialogue waits for its last message."""
        gc.collect()
        engine.length, engine.waiting = length, 0
        engine.gate.clear()
        before = tracemalloc.get_traced_memory()[0]
        await worker.begin(count)
        while engine.waiting < count:
            await asyncio.sleep(0.01)
        tokens = sum(engine.contexts[-2 * count :])  # the last two calls of each: both roles' contexts
        gc.collect()
        held = tracemalloc.get_traced_memory()[0] - before
        engine.gate.set()
        await worker.end()
        engine.contexts.clear()
        return tokens, held

    async def measure():
        await in_flight(500)
        return [await in_flight(length) for length in (500, 2000, 4000)]

    tracemalloc.start()
    try:
        (t0, m0), (t1, m1), (t2, m2) = asyncio.run(measure())
    finally:
        tracemalloc.stop()
    first, second = (m1 - m0) / (t1 - t0), (m2 - m1) / (t2 - t1)
    assert second == pytest.approx(first, rel=0.25)  # linear
    assert second < 200  # bytes a token
