"""How fast the algorithms are, side by side with verl's own and with the naive form, in one process.

    python tests/benchmarks/algorithms.py [--json FILE] [--rows 64 --tokens 16384 --turns 30 --repeats 15 --threads 1]

Prints a table per device (CPU, and CUDA when present): median time of a call, and the most memory it holds at once on
top of its inputs. Nothing here is a test: the table says "over" where a target of issue 3 is missed, and exits with 0.
"""

import argparse
import json
import statistics
import time
import uuid
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.autograd.profiler import profile
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
from verl.workers.config import ActorConfig

from rema_verl.algorithms.turn_clip import TurnClipLossConfig
from rema_verl.algorithms.turns import find_turns


def loss_inputs(rows: int, tokens: int, turns: int, device: str) -> dict[str, torch.Tensor]:
    """Dialogue rows: `turns` turns a row, of random lengths, with the partner's words between them masked."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(rows, tokens, dtype=torch.bool)
    for row in mask:
        cuts = (torch.randperm(tokens - 2, generator=generator)[: 2 * turns] + 1).sort().values.view(turns, 2)
        for start, end in cuts.tolist():
            row[start:end] = True
    old = -torch.rand(rows, tokens, generator=generator)
    new = old + 0.1 * torch.randn(rows, tokens, generator=generator)
    advantages = torch.randn(rows, 1, generator=generator).expand(rows, tokens) * mask
    return {
        "old_log_prob": old.to(device),
        "log_prob": new.to(device).requires_grad_(),
        "advantages": advantages.to(device),
        "response_mask": mask.to(device),
    }


def naive_turn_clip(old_log_prob, log_prob, advantages, response_mask, config):
    """The same loss with a (rows, tokens, turns) indicator, as one writes it first."""
    turns = find_turns(response_mask)
    first = (turns.per_row.cumsum(0) - turns.per_row)[:, None]
    place = torch.where(response_mask, turns.of_token - first, -1)
    member = (place[:, :, None] == torch.arange(int(turns.per_row.max()), device=place.device)).to(log_prob.dtype)
    length = member.sum(1)
    exists = length > 0
    length = length.clamp(min=1)
    ratio = (((log_prob - old_log_prob)[:, :, None] * member).sum(1) / length).clamp(max=3.0).exp()
    on_tokens = (ratio[:, None, :] * member).sum(2)
    loss = torch.maximum(
        -advantages * on_tokens,
        -advantages * on_tokens.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high),
    )
    loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * config.clip_ratio_c), loss)
    turn_loss = (loss[:, :, None] * member).sum(1) / length
    row_loss = (turn_loss * exists).sum(1) / exists.sum(1).clamp(min=1)
    return row_loss.sum() / config.global_batch_info["global_batch_size"], {}


def loss_cases(args, device: str) -> tuple[dict[str, Callable[[], None]], list[tuple[str, str, float]]]:
    inputs = loss_inputs(args.rows, args.tokens, args.turns, device)
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=TurnClipLossConfig())
    config.global_batch_info.update(
        dp_size=1, batch_num_tokens=int(inputs["response_mask"].sum()), global_batch_size=args.rows
    )
    functions = {
        "turn_clip": get_policy_loss_fn("turn_clip"),
        "verl vanilla": get_policy_loss_fn("vanilla"),
        "rows x tokens x turns": naive_turn_clip,
    }
    torch.testing.assert_close(
        functions["turn_clip"](config=config, **inputs)[0], naive_turn_clip(config=config, **inputs)[0]
    )

    def forward_and_backward(function):
        def run():
            inputs["log_prob"].grad = None
            function(config=config, **inputs)[0].backward()

        return run

    def read():
        with torch.no_grad():
            for tensor in inputs.values():
                tensor.sum()

    cases = {name: forward_and_backward(function) for name, function in functions.items()}
    targets = [("turn_clip", "verl vanilla", 1.3), ("turn_clip", "rows x tokens x turns", 0.1)]
    return cases | {"bare read of the inputs": read}, targets


def naive_softrank(token_level_rewards, response_mask, index, tau=0.5, eps=1e-6):
    """A loop over the groups, ranks by comparing every pair."""
    scores = token_level_rewards.sum(dim=1)
    advantages = torch.zeros_like(scores)
    for group in set(index):
        members = torch.tensor([i for i, g in enumerate(index) if g == group], device=scores.device)
        r = scores[members].double()
        rank = (r[None] < r[:, None]).sum(1) + ((r[None] == r[:, None]).sum(1) - 1) / 2
        quantile = torch.special.ndtri(((rank + 0.5) / len(r)) ** tau)
        value = (quantile - quantile.mean()) / (quantile.std(unbiased=False) + eps)
        advantages[members] = value.to(scores.dtype)
    return advantages[:, None] * response_mask


def estimator_cases(args, device: str, tokens: int) -> tuple[dict[str, Callable], list[tuple[str, str, float]]]:
    groups, members = 512, 16
    generator = torch.Generator().manual_seed(0)
    uids = [str(uuid.UUID(int=i * 2**64 + 12345)) for i in range(groups)]
    index = np.array([uids[i] for i in torch.arange(groups).repeat(members).tolist()], dtype=object)
    rewards = torch.zeros(groups * members, tokens)
    rewards[:, -1] = torch.randint(0, 5, (groups * members,), generator=generator).float()
    inputs = {"token_level_rewards": rewards.to(device), "response_mask": torch.ones_like(rewards).to(device)}

    def estimate(name):
        return lambda: get_adv_estimator_fn(name)(index=index, **inputs)

    def read():
        for tensor in inputs.values():
            tensor.sum()

    cases = {
        "softrankpo": estimate("softrankpo"),
        "verl grpo_vectorized": estimate("grpo_vectorized"),
        "loop over groups": lambda: naive_softrank(index=index, **inputs),
        "bare read of the inputs": read,
    }
    return cases, [("softrankpo", "verl grpo_vectorized", 1.5)]


def peak_memory(run: Callable[[], None], device: str) -> int:
    """Bytes held at once, at most, on top of what was held before."""
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The process's own size says little (malloc keeps what it once had); the profiler sees every allocation.
    with profile(use_cpu=True, profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return int(np.cumsum([0, *(e.nbytes() for e in events)]).max())


def measure(cases: dict[str, Callable[[], None]], device: str, repeats: int) -> dict[str, dict[str, float]]:
    """All cases take turns, so that a busy moment of the machine hits each of them."""

    def timed(run):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    times = {name: [] for name in cases}
    for run in cases.values():
        timed(run)
    for repeat in range(repeats):
        for name, run in cases.items():
            # The naive forms take seconds: a few rounds of them say enough.
            if repeat < 3 or name not in ("rows x tokens x turns", "loop over groups"):
                times[name].append(timed(run))
    return {
        name: {"milliseconds": statistics.median(times[name]) * 1e3, "peak_bytes": peak_memory(run, device)}
        for name, run in cases.items()
    }


def show(title: str, results: dict, targets: list[tuple[str, str, float]], console: Console) -> list[dict]:
    ours = next(iter(results))
    table = Table("", "ms", "time / ours", "peak MiB", "memory / ours", title=title, title_justify="left")
    for name, r in results.items():
        table.add_row(
            name,
            f"{r['milliseconds']:.2f}",
            f"{r['milliseconds'] / results[ours]['milliseconds']:.2f}",
            f"{r['peak_bytes'] / 2**20:.1f}",
            f"{r['peak_bytes'] / max(results[ours]['peak_bytes'], 1):.2f}",
        )
    console.print(table)
    verdicts = []
    for name, other, most in targets:
        # softrankpo's memory is a few vectors of B numbers; its target is about time alone.
        for quantity in ("milliseconds", "peak_bytes") if name == "turn_clip" else ("milliseconds",):
            ratio = results[name][quantity] / results[other][quantity]
            verdicts.append({"of": name, "to": other, "quantity": quantity, "ratio": ratio, "at_most": most})
            console.print(
                f"  {name} / {other}, {quantity}: {ratio:.3f} (target: at most {most})"
                f"{'' if ratio <= most else ' OVER'}"
            )
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch; 1: neighbours disturb it least")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console()
    report = {"torch": torch.__version__, "threads": args.threads, "arguments": vars(args), "runs": []}
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, torch threads: {args.threads}"
        runs = {
            f"turn_clip, {args.rows} x {args.tokens} tokens, {args.turns} turns a row, forward and backward": (
                lambda device=device: loss_cases(args, device)
            ),
            "softrankpo, 512 groups of 16, 1 token a row": lambda device=device: estimator_cases(args, device, 1),
            "softrankpo, 512 groups of 16, 1024 tokens a row": lambda device=device: estimator_cases(
                args, device, 1024
            ),
        }
        for title, make in runs.items():
            cases, targets = make()
            results = measure(cases, device, args.repeats)
            verdicts = show(f"{title} ({name})", results, targets, console)
            report["runs"].append({"title": title, "device": name, "results": results, "targets": verdicts})
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    main()
