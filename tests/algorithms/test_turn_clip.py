"""turn_clip against a float64 reference written token by token, and through verl's own ppo_loss and engine."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from verl.trainer.ppo.core_algos import compute_policy_loss_gspo, get_policy_loss_fn
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.engine.base import BaseEngine
from verl.workers.engine.utils import prepare_micro_batches
from verl.workers.utils.losses import ppo_loss

from rema_verl.algorithms.turn_clip import (
    TurnClipLossConfig,
    compute_policy_loss_turn_clip,
    count_turns_of_train_batch,
    turns_in_global_batch,
)
from rema_verl.algorithms.turns import count_turns

RATIOS, AGGS = ("geometric", "arithmetic", "token"), ("trajectory", "turn", "sum")


def actor_config(policy_loss=None, **options) -> ActorConfig:
    options = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "ppo_micro_batch_size_per_gpu": 1} | options
    return ActorConfig(strategy="fsdp", rollout_n=1, policy_loss=policy_loss or TurnClipLossConfig(), **options)


def make_batch(rows=8, tokens=40, seed=0, spread=0.6, dtype=torch.float64):
    """Log-probs that differ enough for every branch: clipped high and low, dual-clipped, capped, untouched."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, tokens, generator=g) < torch.tensor([0.5, 0.9]).repeat(rows)[:rows, None]
    mask[0] = False  # no valid token
    mask[1] = True  # one turn
    mask[2, 0] = mask[2, -1] = True  # starts and ends with 1
    mask[3] = False
    mask[3, 7] = True  # a one-token turn and nothing else
    old = -2 * torch.rand(rows, tokens, generator=g, dtype=torch.float64)
    # A shift per stretch of tokens moves whole turns, so that turn means leave the clip range too.
    shift = torch.randn(rows, tokens // 4, generator=g, dtype=torch.float64).repeat_interleave(4, dim=1)
    new = old + spread * (shift + 0.5 * torch.randn(rows, tokens, generator=g, dtype=torch.float64))
    advantages = torch.randn(rows, 1, generator=g, dtype=torch.float64).expand(rows, tokens)
    advantages = advantages + 0.5 * torch.randn(rows, tokens, generator=g, dtype=torch.float64)
    weights = torch.rand(rows, tokens, generator=g, dtype=torch.float64) + 0.2
    batch = {"old_log_prob": old, "log_prob": new, "advantages": advantages, "rollout_is_weights": weights}
    return {name: value.to(dtype) for name, value in batch.items()} | {"response_mask": mask}


def rows_of(batch, rows):
    return {name: value[rows] for name, value in batch.items()}


def reference_turns(mask):
    return [
        [
            [token for token, _ in run]
            for valid, run in itertools.groupby(enumerate(row), key=lambda pair: bool(pair[1]))
            if valid
        ]
        for row in mask.tolist()
    ]


def reference_loss(batch, ratio_form, agg, scale=1.0, cap=3.0, low=0.2, high=0.28, clip_c=3.0, weighted=True):
    """The paper's formula, one token at a time, every quantity a float64 scalar."""
    rows, all_turns = [], []
    for row, turns in enumerate(reference_turns(batch["response_mask"])):
        turn_losses = []
        for turn in turns:
            logs = [batch["log_prob"][row, j].double() - batch["old_log_prob"][row, j].double() for j in turn]
            if ratio_form == "geometric":
                mean = sum(logs) / len(logs)
                ratio = torch.exp(mean if cap is None else mean.clamp(max=cap))
            elif ratio_form == "arithmetic":
                ratio = sum(torch.exp(x) for x in logs) / len(logs)
                ratio = ratio if cap is None else ratio.clamp(max=math.exp(cap))
            loss = 0.0
            for j, log_ratio in zip(turn, logs, strict=True):
                if ratio_form == "token":
                    ratio = torch.exp(log_ratio if cap is None else log_ratio.clamp(max=cap))
                a = batch["advantages"][row, j].double()
                token = -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
                if a < 0:
                    token = torch.minimum(token, -clip_c * a)
                loss = loss + token * (batch["rollout_is_weights"][row, j].double() if weighted else 1.0)
            turn_losses.append(loss / len(turn))
        all_turns += turn_losses
        if turn_losses:
            rows.append(sum(turn_losses) / (len(turn_losses) if agg == "trajectory" else scale))
    return sum(all_turns) / len(all_turns) if agg == "turn" else sum(rows) / len(rows)


def value_and_grad(function, batch):
    batch = batch | {"log_prob": batch["log_prob"].clone().requires_grad_()}
    loss = function(batch)
    loss.backward()
    return loss.detach().double(), batch["log_prob"].grad.double()


def ours(batch, config, **kwargs):
    return compute_policy_loss_turn_clip(config=config, **batch, **kwargs)[0]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("agg", AGGS)
@pytest.mark.parametrize("cap", [3.0, 0.1, None])
@pytest.mark.parametrize("weighted", [True, False])
def test_value_and_gradient_equal_the_reference(ratio, agg, cap, weighted):
    batch = make_batch(seed=AGGS.index(agg), spread=1.2)
    config = actor_config(TurnClipLossConfig(turn_ratio=ratio, turn_agg=agg, turn_scale=7.0, log_ratio_cap=cap))
    expected = value_and_grad(lambda b: reference_loss(b, ratio, agg, 7.0, cap, weighted=weighted), batch)
    if not weighted:
        del batch["rollout_is_weights"]
    got = value_and_grad(lambda b: ours(b, config), batch)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert got[1].abs().sum() > 0


def test_other_clip_ranges_and_float32():
    batch = make_batch(spread=1.0)
    for low, high, clip_c in [(0.2, 0.2, 3.0), (3e-4, 4e-4, 10.0), (0.5, 1.0, 1.5)]:
        config = actor_config(clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=clip_c)
        expected = value_and_grad(
            lambda b, low=low, high=high, c=clip_c: reference_loss(
                b, "geometric", "trajectory", low=low, high=high, clip_c=c
            ),
            batch,
        )
        got = value_and_grad(partial(ours, config=config), batch)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
        single = {n: v.float() if v.is_floating_point() else v for n, v in batch.items()}
        got = value_and_grad(partial(ours, config=config), single)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_clip_ratio_stands_in_for_null():
    batch = make_batch()
    null = actor_config(clip_ratio=0.1, clip_ratio_low=None, clip_ratio_high=None)
    same = actor_config(clip_ratio=0.9, clip_ratio_low=0.1, clip_ratio_high=0.1)
    assert ours(batch, null) == ours(batch, same)


def test_one_turn_per_row_is_gspo():
    batch = make_batch(rows=6, spread=0.3)
    batch["advantages"] = batch["advantages"][:, :1].expand(6, 40).contiguous()
    mask = torch.zeros(6, 40, dtype=torch.bool)
    for row, (start, end) in enumerate([(0, 40), (0, 1), (5, 30), (39, 40), (0, 7), (20, 40)]):
        mask[row, start:end] = True
    batch["response_mask"] = mask
    batch["rollout_is_weights"] = batch["rollout_is_weights"][:, :1].expand(6, 40).contiguous()
    # GSPO has no dual clip: put ours out of reach.
    config = actor_config(TurnClipLossConfig(log_ratio_cap=10.0), clip_ratio_c=1e9)

    def gspo(b):
        return compute_policy_loss_gspo(config=config, loss_agg_mode="seq-mean-token-mean", **b)[0]

    # verl divides by tokens + 1e-8, hence not to the last digit.
    torch.testing.assert_close(value_and_grad(partial(ours, config=config), batch), value_and_grad(gspo, batch))


def test_token_ratios_of_one_turn_per_row_are_verls_vanilla():
    """The control differs from the turn ratio in nothing but the ratio, and from verl's loss in nothing but weights."""
    batch = make_batch(rows=6, spread=1.5)
    mask = torch.zeros(6, 40, dtype=torch.bool)
    for row, (start, end) in enumerate([(0, 40), (0, 1), (5, 30), (39, 40), (0, 7), (20, 40)]):
        mask[row, start:end] = True
    batch["response_mask"] = mask
    config = actor_config(TurnClipLossConfig(turn_ratio="token", log_ratio_cap=None))

    def vanilla(b):
        return get_policy_loss_fn("vanilla")(config=config, loss_agg_mode="seq-mean-token-mean", **b)[0]

    expected = value_and_grad(vanilla, batch)
    torch.testing.assert_close(value_and_grad(partial(ours, config=config), batch), expected)
    assert expected[1].abs().sum() > 0
    got, theirs = (
        f(config=config, loss_agg_mode="token-mean", **batch)[1]
        for f in (compute_policy_loss_turn_clip, get_policy_loss_fn("vanilla"))
    )
    assert got["actor/pg_clipfrac"] > 0 and theirs["actor/pg_clipfrac"] > 0


def test_constant_inside_a_turn_so_long_turns_weigh_no_more():
    """Two turns of one row, 39 tokens and 1: with the old policy each has half of the gradient."""
    mask = torch.ones(1, 41)
    mask[0, 39] = 0
    log_prob = torch.zeros(1, 41, requires_grad=True)
    loss = compute_policy_loss_turn_clip(torch.zeros(1, 41), log_prob, torch.ones(1, 41), mask, config=actor_config())[
        0
    ]
    loss.backward()
    torch.testing.assert_close(log_prob.grad[0, :39].sum(), log_prob.grad[0, 40])


def tool_agent_rows():
    """Rows in the form verl's ToolAgentLoop and its padding give them.

    Assistant tokens 1 and tool or template tokens 0, always beginning with an assistant message; cut at the response
    length wherever that falls, so that a row may end inside a tool's answer or inside an assistant's turn.
    """
    rows, length = [[5, 8, 3], [12], [2, 30, 1], [4, 3, 4, 3, 20], [1, 1, 1]], 24
    mask = torch.zeros(len(rows), length)
    for row, runs in enumerate(rows):
        flat = [valid for run, valid in zip(runs, itertools.cycle([1, 0]), strict=False) for _ in range(run)][:length]
        mask[row, : len(flat)] = torch.tensor(flat)
    return mask


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_rows_of_the_tool_agent(mask_dtype):
    batch = make_batch(rows=5, tokens=24)
    batch["response_mask"] = tool_agent_rows().to(mask_dtype)
    assert count_turns(batch["response_mask"]) == 2 + 1 + 1 + 3 + 2
    got = value_and_grad(partial(ours, config=actor_config()), batch)
    expected = value_and_grad(lambda b: reference_loss(b, "geometric", "trajectory"), batch)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- splitting the global batch


SPLITS = {
    "rows": [[r] for r in range(8)],
    "pairs": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "shuffled": [[7, 0, 3], [4], [2, 6, 1, 5]],
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("agg", AGGS)
def test_does_not_depend_on_micro_batches(agg, split):
    batch = make_batch()
    config = actor_config(TurnClipLossConfig(turn_agg=agg, turn_scale=5.0))
    config.global_batch_info.update(
        dp_size=1, batch_num_tokens=int(batch["response_mask"].sum()), global_batch_size=8, loss_scale_factor=None
    )
    with turns_in_global_batch(count_turns(batch["response_mask"])):
        whole = value_and_grad(partial(ours, config=config), batch)

        def in_parts(b):
            return sum(ours(rows_of(b, rows), config) for rows in SPLITS[split])

        torch.testing.assert_close(value_and_grad(in_parts, batch), whole, rtol=1e-10, atol=1e-12)
    # verl's mean over rows counts those without a valid token: one of the eight here.
    expected = value_and_grad(lambda b: reference_loss(b, "geometric", agg, 5.0), batch)
    factor = 1.0 if agg == "turn" else 7 / 8
    torch.testing.assert_close(whole, tuple(factor * x for x in expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("agg", AGGS)
def test_does_not_depend_on_data_parallel_ranks(agg):
    """Ranks average their gradients, so the mean of what they compute must be what one rank computes."""
    batch = make_batch()
    config = actor_config(TurnClipLossConfig(turn_agg=agg))
    info = {"batch_num_tokens": int(batch["response_mask"].sum()), "global_batch_size": 8, "loss_scale_factor": None}
    with turns_in_global_batch(count_turns(batch["response_mask"])):
        config.global_batch_info.update(info, dp_size=1)
        whole = value_and_grad(partial(ours, config=config), batch)
        config.global_batch_info.update(info, dp_size=2)
        ranks = [[[0, 5], [1]], [[2, 7], [3, 4, 6]]]

        def averaged(b):
            return sum(ours(rows_of(b, rows), config) for rank in ranks for rows in rank) / len(ranks)

        torch.testing.assert_close(value_and_grad(averaged, batch), whole, rtol=1e-10, atol=1e-12)


def test_mean_over_turns_refuses_to_guess():
    batch = make_batch()
    config = actor_config(TurnClipLossConfig(turn_agg="turn"))
    num_tokens = int(batch["response_mask"].sum())
    config.global_batch_info.update(dp_size=1, batch_num_tokens=num_tokens, global_batch_size=8)
    ours(batch, config)  # the micro-batch is the global batch: its turns are all there are
    with pytest.raises(ValueError, match="only a part of it"):
        ours(rows_of(batch, [1, 2]), config)
    config.global_batch_info.update(dp_size=2)
    with pytest.raises(ValueError, match="only a part of it"):
        ours(batch, config)


@pytest.mark.parametrize("agg", AGGS)
def test_several_ranks_need_global_counts(agg):
    config = actor_config(TurnClipLossConfig(turn_agg=agg))
    config.global_batch_info.update(dp_size=2)
    with pytest.raises(ValueError, match="dp_size > 1 needs"):
        ours(make_batch(), config)


def jagged(values, lengths):
    return torch.nested.nested_tensor([row[:n] for row, n in zip(values, lengths, strict=True)], layout=torch.jagged)


def verl_batch(batch, lengths):
    """A mini-batch as a verl worker holds it: jagged rows, a one-token prompt before each response."""
    rows = len(lengths)
    fields = {
        "prompts": jagged(torch.zeros(rows, 1, dtype=torch.int64), [1] * rows),
        "responses": jagged(torch.zeros(rows, 40, dtype=torch.int64), lengths),
        "row": torch.arange(rows),
        "response_mask": jagged(batch["response_mask"].long(), lengths),
        "loss_mask": jagged(batch["response_mask"].long(), lengths),
        "old_log_probs": jagged(batch["old_log_prob"], lengths),
        "advantages": jagged(batch["advantages"], lengths),
    }
    return tu.get_tensordict(fields)


class OneTableEngine(BaseEngine):
    """The least that is an engine: its "model" is a (rows, tokens) table of log-probs."""

    def __init__(self, log_prob, global_batch_size, micro_batch_size):
        self.table = log_prob.clone().requires_grad_()
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size

    def get_data_parallel_group(self):
        return None

    def get_data_parallel_size(self):
        return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1

    def optimizer_zero_grad(self):
        self.table.grad = None

    def optimizer_step(self):
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.table.grad)
            self.table.grad /= self.get_data_parallel_size()
        return 0.0

    def is_mp_src_rank_with_outputs(self):
        return False

    def forward_backward_batch(self, data, loss_function, forward_only=False):
        # As verl's FSDPEngine.forward_backward_batch.
        num_tokens = data["loss_mask"].sum()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(num_tokens)
        tu.assign_non_tensor(data, batch_num_tokens=num_tokens.item(), dp_size=self.get_data_parallel_size())
        tu.assign_non_tensor(data, global_batch_size=self.global_batch_size, use_dynamic_bsz=False)
        tu.assign_non_tensor(data, micro_batch_size_per_gpu=self.micro_batch_size)
        losses = []
        for micro_batch in prepare_micro_batches(data)[0]:
            lengths = micro_batch["responses"].offsets().diff().tolist()
            # The model's output stands one token to the left of the token it is about, prompt included.
            output = [
                torch.cat([self.table[r, :n], self.table.new_zeros(1)])
                for r, n in zip(micro_batch["row"], lengths, strict=True)
            ]
            output = {"log_probs": torch.nested.as_nested_tensor(output, layout=torch.jagged)}
            loss, metrics = loss_function(model_output=output, data=micro_batch)
            loss.backward()
            losses.append(metrics["actor/pg_loss"].aggregate())
        return sum(losses)


def train(batch, lengths, config, micro_batch_size):
    engine = OneTableEngine(batch["log_prob"], len(lengths), micro_batch_size)
    engine.train_batch(verl_batch(batch, lengths), partial(ppo_loss, config=config))
    return engine.table.grad


LENGTHS = [40, 40, 40, 40, 33, 21, 40, 5]


@pytest.mark.parametrize("agg", AGGS)
def test_through_verls_ppo_loss_and_engine(agg):
    """By name alone: verl's registry finds the loss, verl's engine base class gets its turn count from the config."""
    batch = make_batch()
    config = actor_config(TurnClipLossConfig(turn_agg=agg))
    assert get_policy_loss_fn(config.policy_loss.loss_mode) is compute_policy_loss_turn_clip
    assert hasattr(BaseEngine.train_batch, "counts_turns") or agg != "turn"
    whole = train(batch, LENGTHS, config, micro_batch_size=8)
    for micro_batch_size in (1, 2, 4):
        torch.testing.assert_close(train(batch, LENGTHS, config, micro_batch_size), whole, rtol=1e-10, atol=1e-12)
    for row, length in enumerate(LENGTHS):
        batch["response_mask"][row, length:] = False
    expected = value_and_grad(lambda b: reference_loss(b, "geometric", agg, weighted=False), batch)[1]
    torch.testing.assert_close(whole, expected * (1.0 if agg == "turn" else 7 / 8), rtol=1e-10, atol=1e-12)


def _train_on_rank(rank, store, batch, config, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    share = slice(0, 4) if rank == 0 else slice(4, 8)
    engine = OneTableEngine(batch["log_prob"][share], len(LENGTHS), micro_batch_size=2)
    engine.train_batch(verl_batch(rows_of(batch, share), LENGTHS[share]), partial(ppo_loss, config=config))
    results.put((rank, engine.table.grad.tolist()))
    torch.distributed.destroy_process_group()


def test_turns_are_counted_over_real_ranks(tmp_path):
    """Two processes, gloo. Their tables hold different rows, so the averaged gradient mixes them: compare the mix."""
    batch = make_batch()
    config = actor_config(TurnClipLossConfig(turn_agg="turn"))
    whole = train(batch, LENGTHS, config, micro_batch_size=8)
    context = torch.multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [
        context.Process(target=_train_on_rank, args=(rank, tmp_path / "store", batch, config, results))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    grads = dict(results.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(timeout=60)
    for rank in range(2):
        got = torch.tensor(grads[rank], dtype=torch.float64)
        torch.testing.assert_close(got, whole[:4] + whole[4:], rtol=1e-10, atol=1e-12)


def test_the_counter_wraps_once_and_lets_other_batches_pass():
    TurnClipLossConfig(turn_agg="turn")
    once = BaseEngine.train_batch
    TurnClipLossConfig(turn_agg="turn")
    assert BaseEngine.train_batch is once
    seen = count_turns_of_train_batch(lambda self, data, loss_function: (data, loss_function))
    assert seen(None, {"loss_mask": 1}, "sft") == ({"loss_mask": 1}, "sft")


# ---------------------------------------------------------------- edges


def test_a_batch_of_padding_rows_gives_zero_with_a_gradient():
    batch = rows_of(make_batch(), [0, 0])
    for agg, info in itertools.product(AGGS, [{}, {"dp_size": 2, "batch_num_tokens": 9, "global_batch_size": 4}]):
        config = actor_config(TurnClipLossConfig(turn_agg=agg))
        config.global_batch_info.update(info)
        with turns_in_global_batch(3 if info else None):
            loss, grad = value_and_grad(partial(ours, config=config), batch)
        assert loss == 0
        assert grad.abs().sum() == 0


def test_metrics_of_padding_rows_are_numbers():
    metrics = compute_policy_loss_turn_clip(config=actor_config(), **rows_of(make_batch(), [0]))[1]
    full = compute_policy_loss_turn_clip(config=actor_config(), **make_batch())[1]
    assert metrics.keys() == full.keys()
    assert metrics["actor/turn_ratio_mean"] == 1
    assert metrics["actor/pg_clipfrac"] == 0


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("cap", [3.0, None])
def test_half_precision_does_not_overflow(ratio, cap):
    for dtype, far in ((torch.bfloat16, 1e4), (torch.float16, 6e4)):
        old = torch.tensor([[-far, -1.0, 0.0, -far, -0.5, -2.0]], dtype=dtype)
        new = torch.tensor([[-0.5, -1.5, 0.0, -0.5, -far, -1.0]], dtype=dtype)
        mask = torch.tensor([[1, 1, 0, 1, 0, 1]])
        for sign in (1.0, -1.0):
            config = actor_config(TurnClipLossConfig(turn_ratio=ratio, log_ratio_cap=cap), clip_ratio_c=1e9)
            batch = {"old_log_prob": old, "log_prob": new, "response_mask": mask}
            loss, grad = value_and_grad(
                partial(ours, config=config), batch | {"advantages": torch.full_like(old, sign)}
            )
            assert loss.isfinite()
            assert grad.isfinite().all()
            assert (grad[mask == 0] == 0).all()


def test_bf16_log_probs_are_summed_in_float32():
    """4096 tokens of log-ratio 2**-8: in bf16 their sum would stop growing at 1."""
    old = torch.full((1, 4096), -0.5, dtype=torch.bfloat16)
    new = torch.full((1, 4096), -0.5 + 2**-8, dtype=torch.bfloat16)
    metrics = compute_policy_loss_turn_clip(old, new, torch.ones(1, 4096), torch.ones(1, 4096), config=actor_config())[
        1
    ]
    assert metrics["actor/ppo_kl"] == pytest.approx(-(2**-8))


@pytest.mark.parametrize("ratio", RATIOS)
def test_masked_positions_may_hold_anything(ratio):
    batch = make_batch()
    config = actor_config(TurnClipLossConfig(turn_ratio=ratio))
    clean = value_and_grad(partial(ours, config=config), batch)
    for poison in (float("nan"), float("inf"), -float("inf")):
        dirty = {
            n: v.masked_fill(~batch["response_mask"], poison) if v.is_floating_point() else v for n, v in batch.items()
        }
        torch.testing.assert_close(value_and_grad(partial(ours, config=config), dirty), clean)


def test_metrics_count_turns_not_tokens():
    """Turns of 6, 1, 1 and 1 tokens with ratios 2, e^4 (capped), 0.5 and 1; advantages +, -, -, +."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 1, 0, 1, 0, 1]])
    log_ratio = torch.tensor([[math.log(2.0)] * 6 + [9.0, 4.0, 9.0, math.log(0.5), 9.0, 0.0]])
    advantages = torch.tensor([[1.0] * 6 + [0.0, -1.0, 0.0, -1.0, 0.0, 1.0]])
    zeros = torch.zeros_like(log_ratio)
    metrics = compute_policy_loss_turn_clip(zeros, log_ratio, advantages, mask, config=actor_config())[1]
    capped = math.exp(3.0)
    assert metrics == pytest.approx(
        {
            "actor/pg_clipfrac": 2 / 4,  # 2 > 1.28 with A > 0, and 0.5 < 0.8 with A < 0
            "actor/pg_clipfrac_lower": 1 / 4,  # e^3 > 3 with A < 0
            "actor/ppo_kl": -(math.log(2.0) + 4.0 + math.log(0.5)) / 4,
            "actor/log_ratio_clipfrac": 1 / 4,
            "actor/turn_ratio_mean": (2 + capped + 0.5 + 1) / 4,
            "actor/turn_ratio_min": 0.5,
            "actor/turn_ratio_max": capped,
        },
        rel=1e-6,
    )


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor any operation makes, backward included."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("ratio", RATIOS)
def test_nothing_of_rows_by_tokens_by_turns_is_made(ratio):
    batch = make_batch(rows=4, tokens=64)
    batch["response_mask"] = (torch.arange(64) % 2 == 0).expand(4, 64)  # 32 turns per row
    with LargestTensor() as seen:
        value_and_grad(partial(ours, config=actor_config(TurnClipLossConfig(turn_ratio=ratio))), batch)
    assert seen.numel <= 3 * 4 * 64


# ---------------------------------------------------------------- configuration and bad input


def test_loss_mode_alone_uses_the_defaults():
    batch = make_batch()
    plain = actor_config(PolicyLossConfig(loss_mode="turn_clip"))
    assert ours(batch, plain) == ours(batch, actor_config(TurnClipLossConfig()))


def test_verls_configuration_builds_it():
    import verl
    from hydra import compose, initialize_config_dir
    from verl.utils.config import omega_conf_to_dataclass

    policy_loss = "actor_rollout_ref.actor.policy_loss"
    with initialize_config_dir(f"{verl.__path__[0]}/trainer/config", version_base=None):
        config = compose(
            "ppo_trainer",
            [
                f"{policy_loss}._target_=rema_verl.algorithms.turn_clip.TurnClipLossConfig",
                f"{policy_loss}.loss_mode=turn_clip",
                f"+{policy_loss}.turn_agg=sum",
                f"+{policy_loss}.turn_scale=30",
                f"+{policy_loss}.log_ratio_cap=null",
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
            ],
        )
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert isinstance(actor.policy_loss, TurnClipLossConfig)
    assert (actor.policy_loss.turn_agg, actor.policy_loss.turn_scale) == ("sum", 30)
    assert actor.policy_loss.log_ratio_cap is None
    batch = make_batch()
    assert ours(batch, actor) == ours(
        batch, actor_config(TurnClipLossConfig(turn_agg="sum", turn_scale=30, log_ratio_cap=None), clip_ratio_high=0.2)
    )
    # verl's loss signature also allows an OmegaConf config
    assert ours(batch, config.actor_rollout_ref.actor) == ours(batch, actor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"turn_ratio": "harmonic"}, "turn_ratio must be one of .*geometric.*arithmetic.*harmonic"),
        ({"turn_agg": "token"}, "turn_agg must be one of .*trajectory.*turn.*sum.*token"),
        ({"turn_scale": 0}, "turn_scale must be a positive"),
        ({"log_ratio_cap": -1.0}, "log_ratio_cap must be positive"),
    ],
)
def test_unknown_option_values(options, message):
    with pytest.raises(ValueError, match=message):
        TurnClipLossConfig(**options)


def test_bad_inputs():
    batch = make_batch()
    for name in ("old_log_prob", "log_prob", "advantages", "rollout_is_weights"):
        with pytest.raises(ValueError, match=rf"{name} must have the response mask's shape \(8, 40\), got \(8, 39\)"):
            ours(batch | {name: batch[name][:, :-1]}, actor_config())
    with pytest.raises(ValueError, match="clip_ratio_c"):
        ours(batch, actor_config(clip_ratio_c=1.0))
    with pytest.raises(ValueError, match="config"):
        ours(batch, None)
