"""One GPU: are losses and estimators right on it, what do they cost, and does a model learn through them?

    make gpu-check [ARGS="--json FILE"]      # plain python3 with torch, transformers, numpy and rich; no verl
    PYTHONPATH=. python3 tests/benchmarks/gpu_check.py [--device auto|cpu|cuda] [--rehearse] [--json FILE]

Correctness: float32 and bfloat16 inputs on the device against float64 on the CPU, written turn by turn and sharing no
code with what is checked. Both get the same, already rounded inputs, so an error is one of the computation. Cost: the
median of alternating repeats, and the most memory held at once on top of the inputs. Exit code 1: a figure is outside
its tolerance. Times and memory over a target are only marked OVER. Without CUDA all of it is rehearsed at small sizes.

Tolerances. turn_clip computes in float32: sums of up to 16,384 terms give sqrt(n) 2^-24 = 8e-6, times 10 where terms
cancel. Rounding once to bfloat16 adds 2^-8 = 4e-3. softrankpo and role_grpo compute in float64 and round once.
turn_reinforce_plus_plus adds returns up in the rewards' dtype: 30 roundings at most, relative to the largest advantage.
Log-softmax in bfloat16 is off by 2^-8 of its up to 8 nats; a model in bfloat16 rounds every activation.

Shapes: B rows, L response tokens, T turns of one row, K candidates of one state.
"""

import copy
import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from rema_verl.algorithms.advantages import compute_role_grpo_advantage, compute_turn_reinforce_plus_plus_advantage
from rema_verl.algorithms.softrankpo import compute_softrankpo_advantage, rank_matching_loss, softrank_advantage
from rema_verl.algorithms.turn_clip import TURN_AGGS, TurnClipOptions, compute_policy_loss_turn_clip
from rema_verl.algorithms.turns import find_turns, sum_per_turn
from rema_verl.errors import Parser, UserError, die

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RATIOS = ("geometric", "arithmetic")  # "token" is compared with verl's vanilla, in tests/algorithms/test_turn_clip.py
# Clip range (low, high) with dual clip, and log-ratio cap: the usual ones, tight ones, and no cap.
CLIPS = [((0.2, 0.28, 3.0), 3.0), ((0.1, 0.4, 1.5), 0.6), ((0.2, 0.2, 3.0), None)]
NUM_PROMPT = 8  # tokens before the response


@dataclass(frozen=True)
class Sizes:
    """``shapes``, ``loss`` and ``batch`` are rows, tokens, turns; ``model`` is layers, hidden size, vocabulary."""

    shapes: tuple = ((3, 1, 1), (9, 50, 6), (24, 1024, 12), (6, 16384, 30))  # for correctness
    states: int = 512
    loss: tuple = (64, 16384, 30)  # for time and memory
    groups: tuple = (512, 16)  # groups, members
    model: tuple = (4, 256, 32000)
    batch: tuple = (8, 1024, 6)
    repeats: int = 21


REHEARSAL = Sizes(((3, 1, 1), (9, 50, 6), (6, 300, 8)), 64, (8, 512, 6), (16, 8), (2, 64, 512), (4, 128, 4), 3)


@dataclass
class Row:
    """One line of the table. ``absolute`` and ``relative`` are the largest errors; ``limit`` is for ``relative``."""

    check: str
    case: str
    absolute: float | None = None
    relative: float | None = None
    limit: float | None = None
    milliseconds: float | None = None
    peak_bytes: int | None = None
    ok: bool = True
    note: str = ""


def compare(check: str, case: str, pairs: Iterable, limit: float, *, floor: float = 1e-3, norm: bool = False) -> Row:
    """A row for pairs of (got, float64 reference).

    An element's error is relative to the element plus ``floor`` times the largest one: positive and negative parts may
    cancel, and what is left then says nothing about rounding. ``norm``: norm of the error over norm of the reference.
    """
    errors = []
    for pair in pairs:
        got, expected = (torch.as_tensor(x, dtype=torch.float64).detach().cpu() for x in pair)
        error, size = (got - expected).abs(), expected.abs()
        relative = error.norm() / size.norm() if norm else error / (size + floor * size.max())
        errors.append(torch.stack([error.max(), relative.where(error != 0, 0.0).max()]))
    absolute, relative = torch.stack(errors).amax(dim=0).tolist()  # amax keeps a NaN, which is within no limit
    return Row(check, case, absolute, relative, limit, ok=relative <= limit)


# ---------------------------------------------------------------- inputs and float64 references


def make_mask(rows: int, tokens: int, turns: int, generator: torch.Generator, odd_rows: bool = True) -> torch.Tensor:
    """(B, L) bool, random turns; with ``odd_rows`` the first four rows: none, one turn, one-token turns, one token."""
    mask = torch.zeros(rows, tokens, dtype=torch.bool)
    turns = min(turns, (tokens + 1) // 2)
    for number, row in enumerate(mask):
        if not odd_rows or number > 3:
            cuts = torch.randperm(tokens + 1, generator=generator)[: 2 * turns].sort().values
            for start, end in cuts.view(turns, 2).tolist():
                row[start:end] = True
        elif number == 1:
            row[:] = True
        elif number == 2:
            row[torch.randperm((tokens + 1) // 2, generator=generator)[:turns] * 2] = True
        elif number == 3:
            row[-1] = True
    return mask


def turns_of(mask: torch.Tensor) -> list[list[slice]]:
    """Per row, the runs of True."""
    rows = []
    for row in mask.tolist():
        runs = [list(run) for valid, run in itertools.groupby(range(len(row)), key=row.__getitem__) if valid]
        rows.append([slice(run[0], run[-1] + 1) for run in runs])
    return rows


def loss_batch(rows: int, tokens: int, turns: int, seed: int, dtype: torch.dtype, weighted: bool) -> dict:
    """Log-probs (nats) whose turns leave the clip range on both sides; masked positions hold NaN. All (B, L)."""
    g = torch.Generator().manual_seed(seed)
    mask = make_mask(rows, tokens, turns, g)
    old = -2 * torch.rand(rows, tokens, generator=g)
    new = old + 0.3 * torch.randn(rows, tokens, generator=g)
    for row, runs in enumerate(turns_of(mask)):
        for run in runs:
            new[row, run] += 0.9 * torch.randn((), generator=g)
    advantages = torch.randn(rows, 1, generator=g) + 0.5 * torch.randn(rows, tokens, generator=g)
    batch = {"old_log_prob": old.masked_fill(~mask, math.nan), "log_prob": new.masked_fill(~mask, math.nan)}
    batch["advantages"] = advantages
    if weighted:
        batch["rollout_is_weights"] = torch.rand(rows, tokens, generator=g) + 0.2
    return {name: value.to(dtype) for name, value in batch.items()} | {"response_mask": mask}


class Config(dict):
    """As much of verl's actor config as a loss reads."""

    __getattr__ = dict.get


def actor_config(options=None, clip=(0.2, 0.28, 3.0), **global_batch_info) -> Config:
    names = ("clip_ratio_low", "clip_ratio_high", "clip_ratio_c")
    config = Config(zip(names, clip, strict=True), clip_ratio=clip[0], global_batch_info=global_batch_info)
    return Config(config, policy_loss=options or TurnClipOptions())


def reference_turn_clip(batch: dict, config: Config) -> tuple[torch.Tensor, dict[str, float], float]:
    """The formula of ``turn_clip`` in float64, one turn at a time: the loss, the metrics, and the margin.

    The margin is how close, relatively, a ratio comes to a bound where the gradient jumps: nearer than float32 can
    tell, both sides of the jump are right.
    """
    new, old, advantages = (batch[name].double() for name in ("log_prob", "old_log_prob", "advantages"))
    weights = batch.get("rollout_is_weights", torch.ones_like(new)).double()
    options, low, high, c = config.policy_loss, config.clip_ratio_low, config.clip_ratio_high, config.clip_ratio_c
    most = math.exp(20.0 if options.log_ratio_cap is None else options.log_ratio_cap)
    losses, rows, metrics, margin = [], [], [], math.inf
    for row, runs in enumerate(turns_of(batch["response_mask"])):
        in_row = []
        for run in runs:
            log_ratio, a = new[row, run] - old[row, run], advantages[row, run]
            raw = log_ratio.mean().exp() if options.turn_ratio == "geometric" else log_ratio.exp().mean()
            margin = min(margin, *(abs(raw.item() / bound - 1) for bound in (1 - low, 1 + high, c, most)))
            r = raw.clamp(max=most)
            objective = torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a)
            objective = torch.where(a < 0, torch.maximum(objective, c * a), objective)
            in_row.append((-objective * weights[row, run]).mean())
            up, down, r = bool((a > 0).any()), bool((a < 0).any()), r.item()
            clipped = (up and r > 1 + high) or (down and r < 1 - low)
            metrics.append([clipped, down and r > c, -log_ratio.mean().item(), raw.item() > most, r])
        losses += in_row
        if in_row:
            rows.append(sum(in_row) / (len(in_row) if options.turn_agg == "trajectory" else options.turn_scale))
    num_rows = config.global_batch_info.get("global_batch_size", len(rows))
    loss = sum(losses) / len(losses) if options.turn_agg == "turn" else sum(rows) / num_rows
    columns = [*zip(*metrics, strict=True)]
    values = [*map(statistics.fmean, columns), min(columns[-1]), max(columns[-1])]
    names = "pg_clipfrac pg_clipfrac_lower ppo_kl log_ratio_clipfrac turn_ratio_mean turn_ratio_min turn_ratio_max"
    return loss, {f"actor/{name}": value for name, value in zip(names.split(), values, strict=True)}, margin


def softrank(rewards: list[float], tau: float) -> list[float]:
    """One group: ranks by counting, the normal quantile from the standard library."""
    ranks = [sum(r < x for r in rewards) + (rewards.count(x) - 1) / 2 for x in rewards]
    quantiles = [statistics.NormalDist().inv_cdf(((rank + 0.5) / len(rewards)) ** tau) for rank in ranks]
    mean, std = statistics.fmean(quantiles), statistics.pstdev(quantiles)
    return [(q - mean) / (std + 1e-6) for q in quantiles]


def grpo(scores: list[float], norm_by_std: bool) -> list[float]:
    """One group; a group of one keeps its score."""
    mean, std = (statistics.fmean(scores), statistics.stdev(scores)) if len(scores) > 1 else (0.0, 1.0)
    return [(score - mean) / (std + 1e-6 if norm_by_std else 1.0) for score in scores]


def reference_outcome(formula: Callable, option, rewards, mask, index) -> torch.Tensor:
    """(B, L): a group's ``formula(scores, option)`` on every token of its rows; rows without a token take no part."""
    advantages = torch.zeros(mask.shape, dtype=torch.float64)
    used = mask.any(dim=1).tolist()
    for group in set(index):
        rows = [row for row, name in enumerate(index) if name == group and used[row]]
        values = formula(rewards[rows].double().sum(dim=1).tolist(), option) if rows else []
        for row, value in zip(rows, values, strict=True):
            advantages[row, mask[row]] = value
    return advantages


def reference_turn_reinforce(gamma: float, rewards, mask, index) -> torch.Tensor:
    """(B, L): a turn's reward reaches to the next turn, returns go backwards, roles are whitened over their tokens."""
    returns = torch.zeros(mask.shape, dtype=torch.float64)
    for row, runs in enumerate(turns_of(mask)):
        bounds = [0, *(run.start for run in runs[1:]), mask.shape[1]]
        following = 0.0
        for turn in reversed(range(len(runs))):
            following = rewards[row, bounds[turn] : bounds[turn + 1]].double().sum() + gamma * following
            returns[row, runs[turn]] = following
    advantages = torch.zeros_like(returns)
    roles = [name.partition("@")[2] for name in index]
    for role in set(roles):
        chosen = mask & torch.tensor([r == role for r in roles])[:, None]
        values = returns[chosen].tolist()
        if values:
            variance = statistics.variance(values) if len(values) > 1 else 0.0
            advantages[chosen] = (returns[chosen] - statistics.fmean(values)) / math.sqrt(variance + 1e-8)
    return advantages


# ---------------------------------------------------------------- correctness


def check_turn_clip(device: str, sizes: Sizes) -> list[Row]:
    table, reached = [], []
    for dtype, ratio, agg in itertools.product(DTYPES, RATIOS, TURN_AGGS):
        values, gradients = [], []
        for number, (shape, weighted) in enumerate(itertools.product(sizes.shapes, (False, True))):
            clip, cap = CLIPS[number % len(CLIPS)]
            options = TurnClipOptions(ratio, agg, turn_scale=7.0, log_ratio_cap=cap)
            # every other batch is told how many rows it has, those without a turn among them
            config = actor_config(options, clip, **({"dp_size": 1, "global_batch_size": shape[0]} if weighted else {}))
            for seed in itertools.count(number):
                batch = loss_batch(*shape, seed, DTYPES[dtype], weighted)
                exact = batch["log_prob"].double().requires_grad_()
                expected, metrics, margin = reference_turn_clip(batch | {"log_prob": exact}, config)
                if margin > 1e-4:
                    break
            expected.backward()
            moved = {name: value.to(device) for name, value in batch.items()}
            leaf = moved["log_prob"].requires_grad_()
            loss, got = compute_policy_loss_turn_clip(config=config, **moved)
            loss.backward()
            values += [(loss, expected), (list(got.values()), [metrics[name] for name in got])]
            gradients.append((leaf.grad, exact.grad))
            reached.append([v > 0 for name, v in metrics.items() if "clipfrac" in name])
        case, rounding = f"{ratio}, {agg}, {dtype}", 2**-8 if dtype == "bf16" else 0.0
        table.append(compare("turn_clip: loss, metrics", case, values, 1e-4))
        table.append(compare("turn_clip: gradient", case, gradients, 1e-4 + rounding))
    assert all(map(any, zip(*reached, strict=True))), "batches that never reach a clip show little"
    return table


def check_estimators(device: str, sizes: Sizes) -> list[Row]:
    """Outcomes are quarters, so that their sums are exact in bfloat16 and a tie is a tie in every dtype."""
    whiten = compute_turn_reinforce_plus_plus_advantage
    cases: list[tuple] = []  # name, estimator, config, reference of (rewards, mask, index)
    for tau in (0.5, 2.0):
        reference = partial(reference_outcome, softrank, tau)
        cases.append((f"softrankpo, tau {tau}", compute_softrankpo_advantage, {"softrankpo": {"tau": tau}}, reference))
    for norm in (True, False):
        reference, config = partial(reference_outcome, grpo, norm), {"norm_adv_by_std_in_grpo": norm}
        cases.append((f"role_grpo, std {norm}", compute_role_grpo_advantage, config, reference))
    for gamma in (1.0, 0.9):
        reference, options = partial(reference_turn_reinforce, gamma), {"gamma_turn": gamma}
        config = {"turn_reinforce_plus_plus": options}
        cases.append((f"turn_reinforce_plus_plus, gamma {gamma}", whiten, config, reference))
    table = []
    for (name, estimator, config, reference), dtype in itertools.product(cases, DTYPES):
        pairs = []
        for seed, (rows, tokens, turns) in enumerate((4 * rows, *rest) for rows, *rest in sizes.shapes):
            g = torch.Generator().manual_seed(seed)
            mask = make_mask(rows, tokens, turns, g)
            rewards = torch.zeros(rows, tokens)
            rewards[:, -1] = torch.randint(-4, 5, (rows,), generator=g) / 4  # masked in some rows, as verl may have it
            for row, runs in enumerate(turns_of(mask)):
                for run in runs:
                    rewards[row, run.stop - 1] = torch.randint(-4, 5, (), generator=g) / 4
            # three prompts with both roles and without a role, and a group of one
            index = [f"p{row % 3}{('@meta_thinking', '@reasoning', '')[row // 3 % 3]}" for row in range(rows - 1)]
            index.append("alone@reasoning")
            rewards = rewards.to(DTYPES[dtype])
            got = estimator(rewards.to(device), mask.to(device), index, config)[0]
            pairs.append((got, reference(rewards, mask, index)))
        limit = (1e-6 if dtype == "fp32" else 2**-8 + 1e-6) * (10 if estimator is whiten else 1)
        table.append(compare("estimator", f"{name}, {dtype}", pairs, limit, floor=1.0 if estimator is whiten else 1e-3))
    return table


def check_rank_matching(device: str, sizes: Sizes) -> list[Row]:
    """MPDF's Eq. 4 from (states, K) logits, as ``deliberation.objectives.softrankpo_loss`` composes it."""
    table = []
    for dtype in DTYPES:
        values, gradients = [], []
        for seed, (num_candidates, beta) in enumerate(itertools.product((2, 3, 16), (0.1, 1.0))):
            g = torch.Generator().manual_seed(seed)
            shape = (sizes.states, num_candidates)
            logits, frozen = (torch.randn(shape, generator=g).to(DTYPES[dtype]) for _ in range(2))
            rewards = torch.randint(-2, 3, shape, generator=g).double()
            states = [state for state in range(sizes.states) for _ in range(num_candidates)]
            advantages = softrank_advantage(rewards.to(device).flatten(), states).view(shape).float()
            leaf = logits.to(device, copy=True).requires_grad_()
            log_ratio = leaf.log_softmax(dim=1) - frozen.to(device).log_softmax(dim=1)
            loss = rank_matching_loss(log_ratio, advantages, beta)
            loss.backward()

            exact = logits.double().requires_grad_()
            targets = torch.tensor([softrank(row, 0.5) for row in rewards.tolist()], dtype=torch.float64)
            gap = beta * (exact.log_softmax(dim=1) - frozen.double().log_softmax(dim=1)) - targets
            # the variance as half the mean square of all pairwise differences
            expected = (gap[:, :, None] - gap[:, None, :]).square().mean() / 2
            expected.backward()
            values.append((loss, expected))
            gradients.append((leaf.grad, exact.grad))
        loss_limit, gradient_limit = (1e-5, 1e-5) if dtype == "fp32" else (1e-2, 3e-2)
        table.append(compare("rank_matching_loss: loss", dtype, values, loss_limit))
        table.append(compare("rank_matching_loss: gradient (norm)", dtype, gradients, gradient_limit, norm=True))
    return table


# ---------------------------------------------------------------- a model


def make_model(layers: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.05,
        attn_implementation="sdpa",
    )
    return cast(LlamaForCausalLM(config), dtype).to(device)


def cast(model, dtype: torch.dtype):
    """Not ``model.to(dtype)``: the rotary frequencies stay float32, as after loading a checkpoint."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def log_probs(model, ids: torch.Tensor) -> torch.Tensor:
    """(B, prompt + L) ids -> (B, L) nats of the response's tokens; the softmax is float32 where logits are bfloat16."""
    logits = model(input_ids=ids, use_cache=False).logits[:, NUM_PROMPT - 1 : -1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(dim=-1).gather(-1, ids[:, NUM_PROMPT:, None])[..., 0]


def make_dialogues(rows: int, tokens: int, turns: int, vocabulary: int) -> tuple[torch.Tensor, ...]:
    """Random ids (B, prompt + L), a mask (B, L) and one advantage a row (B, L)."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (rows, NUM_PROMPT + tokens), generator=g)
    advantages = torch.randn(rows, 1, generator=g).expand(rows, tokens).contiguous()
    return ids, make_mask(rows, tokens, turns, g), advantages


def check_model_gradient(device: str, dtype: str) -> list[Row]:
    """All parameters' gradients through Llama, log-softmax and ``turn_clip``, against float64 on the CPU."""
    ids, mask, advantages = make_dialogues(6, 64, 5, 512)
    model = make_model(2, 64, 512, DTYPES[dtype], device)
    exact = cast(copy.deepcopy(model).cpu(), torch.float64)
    new = log_probs(exact, ids)
    # Whole turns are moved to well inside, above and below the clip range, so that bfloat16 decides alike.
    old, moves = new.detach().clone(), itertools.cycle((-0.05, 0.05, -0.5, 0.5, 1.6))
    for row, runs in enumerate(turns_of(mask)):
        for run in runs:
            old[row, run] -= next(moves)
    batch = {"old_log_prob": old, "advantages": advantages, "response_mask": mask}
    expected = reference_turn_clip(batch | {"log_prob": new}, actor_config())[0]
    expected.backward()
    batch = {name: value.to(device) for name, value in batch.items()}
    batch |= {"old_log_prob": old.float().to(device), "log_prob": log_probs(model, ids.to(device))}
    loss = compute_policy_loss_turn_clip(config=actor_config(), **batch)[0]
    loss.backward()
    gradients = [torch.cat([p.grad.flatten().cpu().double() for p in m.parameters()]) for m in (model, exact)]
    loss_limit, gradient_limit = (1e-4, 1e-4) if dtype == "fp32" else (2e-2, 5e-2)
    return [
        compare("Llama: loss", dtype, [(loss, expected)], loss_limit),
        compare("Llama: gradient (norm)", dtype, [gradients], gradient_limit, norm=True),
    ]


def check_update(device: str, sizes: Sizes, dtype: str) -> list[Row]:
    """One AdamW step from a fresh model, twice with one seed, then a few more for the time."""
    ids, mask, advantages = (x.to(device) for x in make_dialogues(*sizes.batch, sizes.model[-1]))
    falls, finite, note = [], True, ""
    for _ in range(2):
        model = make_model(*sizes.model, DTYPES[dtype], device)
        # a smaller step would be lost in the rounding of a bfloat16 parameter
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4 if dtype == "fp32" else 1e-3)
        with torch.no_grad():
            old = log_probs(model, ids)

        def objective(model=model, old=old):
            loss, _ = compute_policy_loss_turn_clip(old, log_probs(model, ids), advantages, mask, config=actor_config())
            return loss

        def update(optimizer=optimizer, objective=objective):
            optimizer.zero_grad()
            loss = objective()
            loss.backward()
            optimizer.step()
            return loss.item()

        before = update()
        finite &= all(bool(p.isfinite().all() and p.grad.isfinite().all()) for p in model.parameters())
        with torch.no_grad():
            after = objective().item()
        falls.append(before - after)
        note = f"loss {before:.5f} -> {after:.5f}"
    took = measure({"update": update}, device, min(sizes.repeats, 7), on_top=False)["update"]
    speed = f"{ids.numel() / took['milliseconds'] * 1e3:,.0f} tokens/s; all memory counts"
    twice = compare("Llama: AdamW step", f"{dtype}, twice with one seed", [falls], 1e-3 if dtype == "fp32" else 1e-2)
    twice.note = "how much the loss falls; a GPU's atomic adds come in any order"
    return [
        Row("Llama: AdamW step", f"{dtype}, the loss falls, all finite", ok=finite and min(falls) > 0, note=note),
        twice,
        Row("Llama: update", f"{dtype}, {sizes.batch[0]} x {ids.shape[1]} tokens", note=speed, **took),
    ]


# ---------------------------------------------------------------- time and memory


def vanilla_ppo(old_log_prob, log_prob, advantages, response_mask, config):
    """verl 0.9.1's ``loss_mode=vanilla``, aggregated by ``token-mean``, with its metrics, operation by operation."""

    def masked_sum(values):
        return (torch.where(response_mask.bool(), values, 0.0) * response_mask).sum()

    def masked_mean(values):
        return masked_sum(values) / (response_mask.sum() + 1e-8)

    negative_approx_kl = torch.clamp(log_prob - old_log_prob, min=-20.0, max=20.0)
    ratio = torch.exp(negative_approx_kl)
    ppo_kl = masked_mean(-negative_approx_kl)
    losses1 = -advantages * ratio
    losses2 = -advantages * torch.clamp(ratio, 1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    clipped1 = torch.maximum(losses1, losses2)
    clipfrac = masked_mean(torch.gt(losses2, losses1).float())
    losses3 = -advantages * config.clip_ratio_c
    clipped2 = torch.min(losses3, clipped1)
    clipfrac_lower = masked_mean(torch.gt(clipped1, losses3) * (advantages < 0).float())
    losses = torch.where(advantages < 0, clipped2, clipped1)
    info = config.global_batch_info
    metrics = {"pg_clipfrac": clipfrac, "ppo_kl": ppo_kl, "pg_clipfrac_lower": clipfrac_lower}
    metrics = {f"actor/{name}": value.detach().item() for name, value in metrics.items()}
    return masked_sum(losses) / info["batch_num_tokens"] * info["dp_size"], metrics


def find_vanilla() -> tuple[str, Callable]:
    """verl's own where it is installed; tests/test_gpu_check.py holds the other to it."""
    try:
        from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
    except ImportError:
        return "vanilla in plain torch", vanilla_ppo
    return "verl's vanilla", compute_policy_loss_vanilla


def naive_turn_clip(old_log_prob, log_prob, advantages, response_mask, config):
    """``turn_clip`` (geometric, trajectory) with a (B, L, T) indicator, as one writes it first."""
    turns = find_turns(response_mask)
    first = (turns.per_row.cumsum(0) - turns.per_row)[:, None]
    place = torch.where(response_mask, turns.of_token - first, -1)
    member = (place[:, :, None] == torch.arange(int(turns.per_row.max()), device=place.device)).to(log_prob.dtype)
    length = member.sum(1)
    exists = length > 0
    length = length.clamp(min=1)
    ratio = (((log_prob - old_log_prob)[:, :, None] * member).sum(1) / length).clamp(max=3.0).exp()
    on_tokens = (ratio[:, None, :] * member).sum(2)
    clipped = on_tokens.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    loss = torch.maximum(-advantages * on_tokens, -advantages * clipped)
    loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * config.clip_ratio_c), loss)
    turn_loss = (loss[:, :, None] * member).sum(1) / length
    row_loss = (turn_loss * exists).sum(1) / exists.sum(1).clamp(min=1)
    return row_loss.sum() / config.global_batch_info["global_batch_size"], {}


def measure(cases: dict[str, Callable], device: str, repeats: int, on_top: bool = True) -> dict[str, dict]:
    """Median milliseconds of alternating runs, so that a busy moment hits all cases, and peak bytes (CUDA alone).

    A run ends with a synchronisation: what a training step waits for, launches and transfers to the host included.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def timed(run):
        wait()
        start = time.perf_counter()
        run()
        wait()
        return (time.perf_counter() - start) * 1e3

    times = [[timed(run) for run in cases.values()] for _ in range(2 + repeats)][2:]  # the first two warm up
    medians = map(statistics.median, zip(*times, strict=True))
    result: dict[str, dict] = {name: {"milliseconds": ms} for name, ms in zip(cases, medians, strict=True)}
    for name, run in cases.items() if device == "cuda" else ():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if on_top else 0
        timed(run)
        result[name]["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return result


def measure_losses(device: str, sizes: Sizes) -> list[Row]:
    rows, tokens, turns = sizes.loss
    g = torch.Generator().manual_seed(0)
    mask = make_mask(rows, tokens, turns, g, odd_rows=False)
    old = -torch.rand(rows, tokens, generator=g)
    new = old + 0.1 * torch.randn(rows, tokens, generator=g)
    inputs = {"old_log_prob": old, "log_prob": new, "advantages": torch.randn(rows, 1, generator=g) * mask}
    inputs = {name: value.to(device) for name, value in (inputs | {"response_mask": mask}).items()}
    leaf = inputs["log_prob"].requires_grad_()
    config = actor_config(dp_size=1, batch_num_tokens=int(mask.sum()), global_batch_size=rows)
    vanilla, compute_vanilla = find_vanilla()

    def sums(log_prob, response_mask, **_):
        """The pass over the tokens that ``turn_clip`` makes several times."""
        return sum_per_turn(log_prob, find_turns(response_mask)).sum(), {}

    naive, part = "rows x tokens x turns", "find_turns, one sum_per_turn"
    functions = {
        "turn_clip": compute_policy_loss_turn_clip,
        vanilla: compute_vanilla,
        naive: naive_turn_clip,
        part: sums,
    }

    def forward_and_backward(function):
        loss = function(config=config, **inputs)[0]
        loss.backward()
        gradient, leaf.grad = leaf.grad, None
        return loss, gradient

    size = f"{rows} x {tokens} tokens, {turns} turns"
    pairs = zip(*map(forward_and_backward, (compute_policy_loss_turn_clip, naive_turn_clip)), strict=True)
    table = [compare(f"turn_clip = {naive}", f"{size}, fp32", pairs, 1e-3)]
    cases = {name: partial(forward_and_backward, function) for name, function in functions.items()}
    results = measure(cases, device, sizes.repeats)
    for name, result in results.items():
        row = Row("forward and backward", name, note=size, **result)
        for other, target in ((vanilla, 1.3), (naive, 0.1)) if name == "turn_clip" else ():
            ratios = {quantity: value / results[other][quantity] for quantity, value in result.items()}
            said = ", ".join(f"{ratio:.2f}x {quantity}" for quantity, ratio in ratios.items())
            over = "OVER" if max(ratios.values()) > target else "at most"
            row.note += f"\n{said} of {other}; {over} {target}"
        table.append(row)
    return table


def measure_estimators(device: str, sizes: Sizes) -> list[Row]:
    groups, members = sizes.groups
    table = []
    for tokens in (1, 1024):
        g = torch.Generator().manual_seed(0)
        rewards = torch.zeros(groups * members, tokens)
        rewards[:, -1] = torch.randint(0, 5, (groups * members,), generator=g).float()
        roles = ("meta_thinking", "reasoning")
        index = [f"{group:032x}@{roles[group % 2]}" for group in range(groups) for _ in range(members)]
        inputs = (rewards.to(device), torch.ones_like(rewards).to(device), index)
        cases: dict[str, Callable] = {
            "softrankpo": partial(compute_softrankpo_advantage, *inputs),
            "role_grpo": partial(compute_role_grpo_advantage, *inputs),
            "turn_reinforce_plus_plus": partial(compute_turn_reinforce_plus_plus_advantage, *inputs),
        }
        note = f"{groups} groups x {members}, {tokens} token{'s' if tokens > 1 else ''} a row"
        table += [Row("estimator", name, note=note, **r) for name, r in measure(cases, device, sizes.repeats).items()]
    return table


# ---------------------------------------------------------------- the table


def show(title: str, rows: list[Row]) -> None:
    table = Table("check", "case", "max abs", "max rel", "at most", "ms", "peak MiB", "", "", title=title)
    for row in rows:
        errors = ("" if x is None else f"{x:.1e}" for x in (row.absolute, row.relative, row.limit))
        took = "" if row.milliseconds is None else f"{row.milliseconds:.2f}"
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"
        table.add_row(row.check, row.case, *errors, took, peak, "ok" if row.ok else "WRONG", row.note)
    console = Console()
    if not console.is_terminal:  # a log file has no width of its own
        console.width = 190
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--rehearse", action="store_true", help="small sizes; always so on the CPU")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures there")
    args = parser.parse_args(argv)
    has_cuda = torch.cuda.is_available()
    if args.device == "cuda" and not has_cuda:
        raise UserError(f"--device cuda: torch {torch.__version__} sees no CUDA device")
    if args.json and not args.json.absolute().parent.is_dir():
        raise UserError(f"--json {args.json}: its folder does not exist")
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"the model's checks need transformers: {error}") from error
    device = "cuda" if has_cuda and args.device != "cpu" else "cpu"
    sizes = REHEARSAL if args.rehearse or device == "cpu" else Sizes()

    rows = check_turn_clip(device, sizes) + check_estimators(device, sizes) + check_rank_matching(device, sizes)
    for dtype in DTYPES:
        rows += check_model_gradient(device, dtype) + check_update(device, sizes, dtype)
    rows += measure_losses(device, sizes) + measure_estimators(device, sizes)

    about = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {platform.machine()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sizes": "rehearsal" if sizes == REHEARSAL else "full",
    }
    show("; ".join(f"{name} {value}" for name, value in about.items()), rows)
    wrong = [row for row in rows if not row.ok]
    print(f"{len(rows) - len(wrong)} of {len(rows)} rows are as they should be")
    if args.json:
        args.json.write_text(json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=2), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UserError as error:
        die(error)
