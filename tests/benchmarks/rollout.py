"""Two-role rollout on real vLLM: independent dialogues, lock-step, no prefix cache, and the least prefill possible.

    python tests/benchmarks/rollout.py [--json FILE] [--trajectories 64] [--repeats 3] [--workloads real,skewed]

Three ways to roll out the same dialogues, on one engine in one process run, taking turns:

- ours: the agent loop ``rema``; every dialogue goes on by itself, contexts grow token by token, prefix cache on;
- lock-step: all dialogues wait for each other at every half-turn, and every context is rendered anew from text with the
  chat template;
- no cache: ours, with requests that do not read the prefix cache.

The model is tiny and random, so messages are forced to a length (``ignore_eos``, ``max_tokens``). Its vocabulary is
made of words that text gives back exactly, so that rendering anew finds the same tokens again: with a real tokenizer
it would now and then not, and lock-step would prefill more than here.

Workloads: ``real`` has the turn lengths of dialogues drawn from the 804 real ones (``--data``), in tokens of a
byte-level BPE of 8,000 tokens trained on them; in ``skewed`` 7 of 8 dialogues have 3 turns and 1 has 18, with messages
as long as ones drawn from the real dialogues. ``--scale`` shortens every message. Last, ours on the real workload with
two engines behind verl's load balancer, which keeps each role of a dialogue at the engine it was first sent to.

Nothing here is a test: the table says where a target is missed, and the script exits with 0.
"""

import argparse
import asyncio
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VERL_PLATFORM", "cpu")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, DictConfigWrap
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder
from verl.workers.rollout.replica import TokenOutput
from verl.workers.rollout.router import GlobalRequestLoadBalancer

from rema_verl.agent_loops.idle import covered
from rema_verl.agent_loops.prefill import common_prefix, minimum_prefill
from rema_verl.agent_loops.rema import ReMAAgentLoop, prompts_for
from rema_verl.config import ReMAConfig
from rema_verl.dialogue import META_THINKING, REASONING, ROLES, Dialogue

logging.getLogger(create_continuous_token_builder.__module__).setLevel(logging.ERROR)  # one warning a dialogue
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "data_prep"))
from build_tiny import CHAT_TEMPLATE, build_model  # noqa: E402

SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
WORDS = 1024
CONTENDERS = ("ours", "lock-step", "no cache")
SMALLEST_MESSAGE = 2  # a word and the end token


@dataclass
class Plan:
    """One dialogue: its question, and how many tokens each message takes, its end token included."""

    question: str
    lengths: dict[str, list[int]]


# ------------------------------------------------------------------------------------------------------- workloads


def byte_tokenizer(texts: list[str]):
    """Byte-level BPE of 8,000 tokens, trained on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return fast(tokenizer)


def word_tokenizer():
    """One token a word, w0 to w1023: what is decoded is encoded to the same ids again."""
    words = [*SPECIAL, *(f"w{i}" for i in range(WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast(tokenizer)


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=CHAT_TEMPLATE,
    )


def real_dialogues(data: Path) -> list[tuple[str, dict[str, list[str]]]]:
    """(question, messages of each role) of the 804 conversations."""
    views = [
        [json.loads(line) for line in (data / f"dialogues_{role}_804.jsonl").read_text().splitlines()] for role in ROLES
    ]
    return [
        (
            (pair[0]["history"][0][0] if pair[0]["history"] else pair[0]["instruction"]),
            {
                role: [said for _, said in row["history"]] + [row["output"]]
                for role, row in zip(ROLES, pair, strict=True)
            },
        )
        for pair in zip(*views, strict=True)
    ]


def words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(WORDS)}" for _ in range(count))


def real_plans(dialogues, tokenizer, count: int, scale: float, rng: random.Random) -> list[Plan]:
    def length(text: str) -> int:
        return max(SMALLEST_MESSAGE, round(len(tokenizer.encode(text)) * scale) + 1)

    return [
        Plan(words(rng, length(question)), {role: [length(text) for text in said[role]] for role in ROLES})
        for question, said in rng.sample(dialogues, count)
    ]


def skewed_plans(pool: list[Plan], count: int, rng: random.Random) -> list[Plan]:
    """Every eighth dialogue has six times as many turns; questions and messages are as long as some in ``pool``."""
    lengths = {role: [length for plan in pool for length in plan.lengths[role]] for role in ROLES}
    return [
        Plan(rng.choice(pool).question, {role: rng.choices(lengths[role], k=18 if i % 8 == 0 else 3) for role in ROLES})
        for i in range(count)
    ]


# ---------------------------------------------------------------------------------------------------------- engine


@dataclass
class Counts:
    """What the engine reported during one run."""

    prefilled: int = 0  # tokens computed in prefills
    prompt_tokens: int = 0  # tokens of all prompts, cached ones included
    decoded: int = 0
    preempted: int = 0
    iterations: int = 0
    busy: list[tuple[float, float]] = field(default_factory=list)  # from queued to last token, engine's clock


class Engine:
    """vLLM's AsyncLLM, called as verl's server calls it, and its own statistics."""

    def __init__(self, model: Path, args):
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.metrics.loggers import StatLoggerBase

        engine, self.block_size = self, args.block_size

        class Recorder(StatLoggerBase):
            def __init__(self, vllm_config, engine_index=0): ...

            def log_engine_initialized(self): ...

            def record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx=0):
                if iteration_stats is not None:
                    tokens = iteration_stats.prompt_token_stats
                    engine.counts.prefilled += tokens.computed
                    engine.counts.prompt_tokens += tokens.total
                    engine.counts.decoded += iteration_stats.num_generation_tokens
                    engine.counts.preempted += iteration_stats.num_preempted_reqs
                    engine.counts.iterations += iteration_stats.num_generation_tokens > 0

        self.counts, self.calls = Counts(), 0
        self.llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(model),
                dtype="float32",
                enforce_eager=True,
                enable_prefix_caching=True,
                block_size=args.block_size,
                max_model_len=args.context,
                max_num_seqs=args.max_num_seqs,
                max_num_batched_tokens=8192,
                kv_cache_memory_bytes=int(args.kv_gib * 2**30),
                disable_log_stats=True,
                seed=0,
            ),
            stat_loggers=[Recorder],
        )

    async def generate(self, prompt_ids: list[int], length: int, read_cache: bool = True) -> TokenOutput:
        """``length`` sampled tokens; the last, of which no engine has keys and values yet, becomes the end token."""
        from vllm import SamplingParams, TokensPrompt

        self.calls += 1
        sampling = SamplingParams(
            max_tokens=length,
            ignore_eos=True,
            temperature=1.0,
            logprobs=0,
            allowed_token_ids=list(range(len(SPECIAL), len(SPECIAL) + WORDS)),
            skip_reading_prefix_cache=not read_cache,
        )
        stream = self.llm.generate(TokensPrompt(prompt_token_ids=prompt_ids), sampling, str(self.calls))
        async for output in stream:
            result = output
        self.counts.busy.append((result.metrics.queued_ts, result.metrics.last_token_ts))
        said = result.outputs[0]
        ids = [*said.token_ids[:-1], SPECIAL.index("<|end|>")]
        logprobs = [step[i].logprob for i, step in zip(said.token_ids, said.logprobs, strict=True)]
        fields = {"num_cached_tokens": result.num_cached_tokens, "min_global_steps": 0, "max_global_steps": 0}
        return TokenOutput(token_ids=ids, log_probs=logprobs, stop_reason="completed", extra_fields=fields)


class Replicas:
    """Engines behind verl's own load balancer, counted together."""

    def __init__(self, engines: list[Engine]):
        self.engines = engines
        self.balancer = GlobalRequestLoadBalancer({str(i): engine for i, engine in enumerate(engines)})

    async def fresh(self) -> Counts:
        """Empty the prefix caches and start counting anew."""
        counts = Counts()
        for engine in self.engines:
            assert await engine.llm.reset_prefix_cache()
            engine.counts = counts
        return counts

    async def generate(self, request_id: str, prompt_ids: list[int], length: int, read_cache: bool) -> TokenOutput:
        server, engine = self.balancer.acquire_server(request_id)
        try:
            return await engine.generate(prompt_ids, length, read_cache)
        finally:
            self.balancer.release_server(server)


class Replay:
    """One dialogue's LLM client: the engines, with every message forced to its planned length."""

    def __init__(self, replicas: Replicas, plan: Plan, read_cache: bool = True):
        self.replicas, self.read_cache = replicas, read_cache
        self.lengths = {role: iter(plan.lengths[role]) for role in ROLES}

    async def generate(self, request_id: str, *, prompt_ids: list[int], **kwargs) -> TokenOutput:
        length = next(self.lengths[request_id.rpartition("-")[2]])
        return await self.replicas.generate(request_id, prompt_ids, length, self.read_cache)


# ------------------------------------------------------------------------------------------------------ contenders


def loop_config(turns: int, **prompts: str):
    return OmegaConf.create(
        {
            "actor_rollout_ref": {"rollout": {"prompt_length": 10**6, "response_length": 10**6}},
            "data": {},
            "rema": {"max_turns": turns, "prompts": prompts},
        }
    )


def make_loop(tokenizer, client, config) -> ReMAAgentLoop:
    return ReMAAgentLoop(
        trainer_config=DictConfigWrap(config),
        server_manager=client,
        tokenizer=tokenizer,
        processor=None,
        dataset_cls=None,
        data_config=DictConfigWrap(config.data),
        hf_model_type="llama",
    )


async def ours(
    replicas: Replicas, plans: list[Plan], tokenizer, prompts: dict[str, str], read_cache: bool = True
) -> list[AgentLoopOutput]:
    """Every dialogue by itself, through the agent loop; returns the rows."""

    async def play(plan: Plan):
        config = loop_config(len(plan.lengths[META_THINKING]), **prompts)
        loop = make_loop(tokenizer, Replay(replicas, plan, read_cache), config)
        return await loop.run({}, raw_prompt=[{"role": "user", "content": plan.question}])

    return [row for rows in await asyncio.gather(*map(play, plans)) for row in rows]


async def lock_step(replicas: Replicas, plans: list[Plan], tokenizer, prompts: dict[str, str]) -> None:
    """All dialogues wait for each other at every half-turn, and contexts are rendered anew from text."""
    clients = [Replay(replicas, plan) for plan in plans]
    dialogues = []
    for plan in plans:
        turns = len(plan.lengths[META_THINKING])
        config = ReMAConfig.of(loop_config(turns, **prompts))
        dialogues.append(Dialogue(plan.question, max_turns=turns, prompts=prompts_for(config)))
    while pending := [i for i, dialogue in enumerate(dialogues) if dialogue.speaker]:
        chats = [dialogues[i].view(dialogues[i].speaker) for i in pending]
        rendered = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        contexts = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        outputs = await asyncio.gather(
            *(
                clients[i].generate(f"{i}-{dialogues[i].speaker}", prompt_ids=context)
                for i, context in zip(pending, contexts, strict=True)
            )
        )
        texts = tokenizer.batch_decode([o.token_ids for o in outputs], skip_special_tokens=True)
        for i, text in zip(pending, texts, strict=True):
            dialogues[i].add(text)


# ----------------------------------------------------------------------------------------------------- measurement


def block_minimum(rows: list[AgentLoopOutput], block: int) -> int:
    """The least that an engine prefills whose cache holds whole blocks of ``block`` tokens.

    More than :func:`minimum_prefill` for two reasons: what does not fill a block is computed again, and of the token
    that ended a turn there are no keys and values.
    """
    total, last = 0, list[int]()
    for row in sorted(rows, key=lambda row: row.prompt_ids):
        size = len(row.prompt_ids)
        cached = min(common_prefix(last, row.prompt_ids), size - 1)  # the last token's logits are needed
        for start, end in row.extra_fields["turn_spans"]:
            total += size + start - cached // block * block
            cached = size + end - 1
        last = row.prompt_ids
    return total


async def run(replicas: Replicas, name: str, plans: list[Plan], tokenizer, prompts: dict[str, str]) -> dict:
    counts = await replicas.fresh()
    start, cpu = time.monotonic(), time.process_time()
    rows = None
    if name == "lock-step":
        await lock_step(replicas, plans, tokenizer, prompts)
    else:
        rows = await ours(replicas, plans, tokenizer, prompts, read_cache=name == "ours")
    seconds = time.monotonic() - start
    figures = {k: v for k, v in asdict(counts).items() if k != "busy"}
    return figures | {
        "seconds": seconds,
        "idle_seconds": seconds - covered(counts.busy),
        "client_cpu_seconds": time.process_time() - cpu,
        "minimum": rows
        and minimum_prefill((r.prompt_ids + r.response_ids, [0] * len(r.prompt_ids) + r.response_mask) for r in rows),
        "block_minimum": rows and block_minimum(rows, replicas.engines[0].block_size),
    }


async def null_engine(dialogues, tokenizer, concurrent: int) -> dict:
    """Our Python time alone: real texts and prompts, messages that are there at once."""
    played = [dialogues[i % len(dialogues)] for i in range(concurrent)]
    scripts = [
        {role: [tokenizer.encode(text) + [tokenizer.eos_token_id] for text in said[role]] for role in ROLES}
        for _, said in played
    ]
    configs = {turns: loop_config(turns) for turns in {len(said[META_THINKING]) for _, said in played}}

    class Null:
        def __init__(self, script):
            self.script = {role: iter(messages) for role, messages in script.items()}
            self.calls = 0

        async def generate(self, request_id, *, prompt_ids, **kwargs) -> TokenOutput:
            self.calls += 1
            ids = next(self.script[request_id.rpartition("-")[2]])
            await asyncio.sleep(0)
            fields = {"num_cached_tokens": 0, "min_global_steps": 0, "max_global_steps": 0}
            return TokenOutput(token_ids=ids, log_probs=[0.0] * len(ids), stop_reason="completed", extra_fields=fields)

    async def play(question: str, said: dict[str, list[str]], client: Null) -> int:
        loop = make_loop(tokenizer, client, configs[len(said[META_THINKING])])
        rows = await loop.run({}, raw_prompt=[{"role": "user", "content": question}])
        return rows[0].extra_fields["dialogue_turns"]

    clients = [Null(script) for script in scripts]
    start, cpu = time.perf_counter(), time.process_time()
    turns = sum(await asyncio.gather(*(play(*p, client) for p, client in zip(played, clients, strict=True))))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"turns": turns, "calls": sum(c.calls for c in clients), "seconds": seconds, "cpu_seconds": cpu}


def show(title: str, figures: dict[str, dict], console: Console) -> None:
    ours_ = figures["ours"]
    table = Table(title=title, title_justify="left")
    for column in (
        "", "seconds", "/ ours", "prefilled", "/ minimum", "cache hits", "decoded", "engine steps", "tokens a step",
        "engine idle",
    ):  # fmt: skip
        table.add_column(column, justify="left" if not column else "right")
    for name, f in figures.items():
        table.add_row(
            name,
            f"{f['seconds']:.1f} ({f['seconds_low']:.1f} to {f['seconds_high']:.1f})",
            f"{f['seconds'] / ours_['seconds']:.2f}",
            f"{f['prefilled']:,}",
            f"{f['prefilled'] / ours_['minimum']:.2f}",
            f"{f['cache_hit_rate']:.1%}",
            f"{f['decoded']:,}",
            f"{f['iterations']:,}",
            f"{f['decoded'] / f['iterations']:.1f}",
            f"{f['idle_share']:.1%}",
        )
    console.print(table)
    console.print(
        f"  minimum prefill {ours_['minimum']:,} tokens, exact to the token; {ours_['block_minimum']:,} for an engine "
        f"that caches whole blocks, {ours_['block_minimum'] / ours_['minimum']:.3f} of it"
    )


def verdict(console: Console, what: str, value: float, target: float, at_least: bool = False) -> dict:
    met = value >= target if at_least else value <= target
    console.print(
        f"  {what}: {value:.3f} (target: {'at least' if at_least else 'at most'} {target}){'' if met else ' MISSED'}"
    )
    return {"what": what, "value": value, "target": target, "at_least": at_least, "met": met}


def summary(runs: list[dict]) -> dict:
    """Medians over the repeats."""
    figures = {key: statistics.median(r[key] for r in runs) for key in runs[0] if runs[0][key] is not None}
    seconds = [r["seconds"] for r in runs]
    return figures | {
        "seconds_low": min(seconds),
        "seconds_high": max(seconds),
        "cache_hit_rate": 1 - figures["prefilled"] / figures["prompt_tokens"],
        "idle_share": statistics.median(r["idle_seconds"] / r["seconds"] for r in runs),
    }


async def measure(args, console: Console) -> dict:
    rng = random.Random(args.seed)
    dialogues = real_dialogues(args.data)
    bytes_ = byte_tokenizer([t for q, said in dialogues for t in (q, *said[META_THINKING], *said[REASONING])])
    pool = real_plans(dialogues, bytes_, len(dialogues), args.scale, rng)
    workloads = {"real": pool[: args.trajectories], "skewed": skewed_plans(pool, args.trajectories, rng)}
    report: dict = {"arguments": {k: str(v) for k, v in vars(args).items()}, "workloads": {}, "targets": []}

    await null_engine(dialogues, bytes_, 16)
    null = [await null_engine(dialogues, bytes_, args.concurrent) for _ in range(args.repeats)]
    report["null_engine"] = null
    ms = statistics.median(n["cpu_seconds"] / n["turns"] for n in null) * 1e3
    console.print(
        f"our own Python time, {args.concurrent} dialogues at once, an engine that answers at once: {null[0]['turns']} "
        f"turns, {null[0]['calls']} calls, {statistics.median(n['cpu_seconds'] for n in null):.2f} s of CPU time"
    )
    report["targets"].append(verdict(console, "our Python time, ms a turn", ms, 2.0))
    if not args.workloads:
        return report

    prompts = {role: words(rng, round(120 * args.scale)) for role in ROLES}
    prompts["first_instruction"] = "{question} w0 {instruction}"
    tokenizer = word_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        build_model(tokenizer, Path(folder), seed=0, hidden=args.hidden, layers=args.layers)
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": args.context}))
        one = Replicas([Engine(Path(folder), args)])
        warm_up = [Plan(plan.question, {role: [8, 8] for role in ROLES}) for plan in pool[:8]]
        await run(one, "ours", warm_up, tokenizer, prompts)
        for workload in args.workloads:
            plans, runs = workloads[workload], defaultdict(list)
            for repeat in range(args.repeats):
                for name in CONTENDERS if repeat % 2 == 0 else CONTENDERS[::-1]:
                    runs[name].append(await run(one, name, plans, tokenizer, prompts))
                    print(f"{workload}, repeat {repeat}, {name}: {runs[name][-1]['seconds']:.1f} s", file=sys.stderr)
            figures = {name: summary(runs[name]) for name in CONTENDERS}
            turns = sum(len(plan.lengths[META_THINKING]) for plan in plans)
            show(
                f"{workload}: {len(plans)} dialogues, {turns} turns, {args.repeats} repeats",
                figures,
                console,
            )
            f = figures["ours"]
            report["workloads"][workload] = {"runs": runs, "medians": figures, "turns": turns}
            report["targets"] += [
                verdict(console, f"{workload}: prefilled / minimum", f["prefilled"] / f["minimum"], 1.10),
                verdict(
                    console, f"{workload}: lock-step / ours, seconds", figures["lock-step"]["seconds"] / f["seconds"],
                    1.6 if workload == "real" else 2.0, at_least=True,
                ),
                verdict(console, f"{workload}: engine idle while dialogues are pending", f["idle_share"], 0.05),
            ]  # fmt: skip
            if workload == "real" and args.share:
                many = pool[: args.concurrent]
                alone = await run(one, "ours", many, tokenizer, prompts)
                share = ms / 1e3 * sum(len(plan.lengths[META_THINKING]) for plan in many) / alone["seconds"]
                report["at_concurrent"] = alone
                console.print(f"  {args.concurrent} dialogues at once: {alone['seconds']:.1f} s")
                report["targets"].append(verdict(console, "our Python time / rollout time", share, 0.05))
        if "real" in args.workloads and args.second_replica:
            two = Replicas([*one.engines, Engine(Path(folder), args)])
            await run(two, "ours", warm_up, tokenizer, prompts)
            runs = [await run(two, "ours", workloads["real"], tokenizer, prompts) for _ in range(args.repeats)]
            f = report["two_replicas"] = summary(runs) | {"runs": runs}
            what = f"real, two replicas ({f['prefilled']:,.0f} tokens): prefilled / minimum"
            report["targets"].append(verdict(console, what, f["prefilled"] / f["minimum"], 1.15))
            one = two
        for engine in one.engines:
            engine.llm.shutdown()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("REMA_SHARED_DATA") or ROOT.parent / "shared/data")
    )
    parser.add_argument("--workloads", type=lambda s: [w for w in s.split(",") if w], default=["real", "skewed"])
    parser.add_argument("--trajectories", type=int, default=64)
    parser.add_argument("--concurrent", type=int, default=256, help="dialogues at once for our own Python time")
    parser.add_argument(
        "--share", action=argparse.BooleanOptionalAction, default=True, help="also run --concurrent dialogues"
    )
    parser.add_argument(
        "--second-replica", action=argparse.BooleanOptionalAction, default=True, help="also run on two engines"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the length of every message and prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--block-size", type=int, default=16, help="tokens; vLLM's default on GPUs (128 on CPU)")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--kv-gib", type=float, default=1.0)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    console = Console(width=150)
    report = asyncio.run(measure(args, console))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
