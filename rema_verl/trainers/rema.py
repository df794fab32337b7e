"""Trainer mode ``rema``: one model plays both roles, and both roles' rows train it together.

verl's synchronous trainer does the work. What is added, in the order of a step:

1. ``_balance_batch``         count trajectories that did not arrive; keep the rows of the roles that learn, in a fair
                               order
2. ``_compute_old_log_prob``  entropy per role
3. ``_compute_advantage``     give each row its own role's reward back, and group by (prompt, role)
4. ``_update_actor``          count mini-batches in rows, and report what was clipped, per role and per turn
5. ``_compute_metrics``       health signals, and trajectories for the disk (rema_verl/report)
6. ``_save_checkpoint``       leave a resumable state also when the disk is full
"""

import contextlib
import json
import logging
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from omegaconf import open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.debug import marked_timer
from verl.utils.seqlen_balancing import log_seqlen_unbalance
from verl.utils.tensordict_utils import assign_non_tensor_stack

from rema_verl.agent_loops.idle import idle_share
from rema_verl.agent_loops.prefill import minimum_prefill
from rema_verl.agent_loops.rema import question_of
from rema_verl.algorithms.advantages import role_index
from rema_verl.config import ReMAConfig
from rema_verl.dialogue import INVALID, JSON_ACTIONS, ROLES, StopReason
from rema_verl.errors import PREFIX
from rema_verl.report.recorder import Recorder, note_turns, note_update
from rema_verl.trainers.losses import role_ppo_loss, take_turns
from rema_verl.trainers.order import fair_order
from rema_verl.trainers.watchdog import Watchdog, root_cause

logger = logging.getLogger(__name__)
TRACKER = "latest_checkpointed_iteration.txt"  # verl's pointer to the checkpoint to resume from
PAD = -1  # for verl's padding rows


@register_trainer("rema")
class ReMATrainer(PPOTrainerSync):
    """Two rows per trajectory, shared weights. See the module docstring."""

    # verl compares the mode's name with "sync" to choose the on-policy replay buffer, whole-batch prompts and
    # checkpoints without in-flight prompts. This mode is synchronous whatever its name.
    trainer_mode = property(lambda self: "sync", lambda self, name: None)

    roles: tuple[str, ...] = ROLES  # a trajectory has one row of each
    learning: tuple[str, ...] = ROLES  # those whose rows train the model

    def __init__(self, config):
        self.rema = ReMAConfig.of(config)
        self.drawn = (0, 0)  # step, questions drawn in it
        self.rows: dict[str, dict] = {}  # TransferQueue key -> the row's extra_fields, for the current step
        self.recorder = Recorder(config)
        super().__init__(config)

    def _build_replay_buffer(self):
        buffer = super()._build_replay_buffer()
        buffer.poll_interval = self.rema.poll_interval
        return buffer

    def _fetch_one_gen_batch(self) -> TensorDict:
        batch = super()._fetch_one_gen_batch()
        if self.rema.seed is not None:  # names by place in the run, where verl draws them at random
            if self.drawn[0] != self.global_steps:
                self.drawn = (self.global_steps, 0)
            step, first = self.drawn
            self.drawn = (step, first + len(batch))
            uids = [f"{self.rema.seed}-{step:06d}-{i:06d}" for i in range(first, first + len(batch))]
            assign_non_tensor_stack(batch, "uid", uids)
        return batch

    # ---------------------------------------------------------------- a run

    def on_init_end(self) -> None:
        super().on_init_end()
        actor_config = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
        self.actor_rollout_wg.set_loss_fn(partial(role_ppo_loss, config=actor_config))

    def fit(self, agent_loop_manager) -> None:
        with self.recorder, Watchdog.over(self, agent_loop_manager, interval=self.rema.watchdog_interval):
            super().fit(agent_loop_manager)

    def resume_hint(self) -> str:
        """One clause that says from where the same command would go on."""
        step = _read_tracker(Path(self.config.trainer.default_local_dir))
        where = f"step {step}" if step else "the start (no checkpoint yet)"
        return f"run the same command again to go on from {where} in {self.config.trainer.default_local_dir}"

    # --------------------------------------------------------------- a step

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, **kwargs) -> KVBatchMeta:
        n = self.config.actor_rollout_ref.rollout.n
        delivered = Counter(key.rsplit("_", 2)[0] for key in batch.keys)  # prompt uid -> rows
        failed = sum(n - delivered[uid] // len(self.roles) for uid in self.replay_buffer.failure_keys["train"])
        skipped = self.config.data.train_batch_size * n - len(batch) // len(self.roles) - failed
        metrics["rollout/failed_trajectories"] = failed
        metrics["rollout/skipped_trajectories"] = skipped
        if failed or skipped:
            logger.warning(
                "step %d: %d trajectories failed, %d were skipped (question longer than data.max_prompt_length)",
                self.global_steps, failed, skipped,
            )  # fmt: skip
        batch = batch.select_keys(sorted(batch.keys))  # not as they arrived
        fields = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["extra_fields"])
        self.rows = dict(zip(batch.keys, _column(fields, "extra_fields"), strict=True))
        learning = self._rows_of(self.learning, batch)
        if not any(self.rows[key]["turn_spans"] for key in learning.keys):
            stops = Counter(str(row.get("stop_reason")) for row in self.rows.values())
            raise RuntimeError(
                f"{PREFIX} step {self.global_steps}: {' and '.join(self.learning)} did not say a word in any dialogue "
                f"(rows by stop reason: {dict(stops)}): there is nothing to learn from; {self.resume_hint()}"
            )
        return self._share_out(learning, metrics, **kwargs)

    def _share_out(self, batch: KVBatchMeta, metrics: dict, **kwargs) -> KVBatchMeta:
        """Rows for the workers, filled up as verl does it, and in mini-batches that are fair draws."""
        batch = super()._balance_batch(batch, metrics, **kwargs)
        batch.reorder(sorted(range(len(batch)), key=batch.keys.__getitem__))
        lengths = [tag["seq_len"] for tag in batch.tags]
        workers = max(self.actor_rollout_wg._dispatch_info["actor"]) + 1
        rollout, actor = self.config.actor_rollout_ref.rollout, self.config.actor_rollout_ref.actor
        with self._mini_batches_in_rows():
            mini_batch = actor.ppo_mini_batch_size * rollout.n
        if self.global_steps < self.config.trainer.critic_warmup:  # no update, and no rows filled up for it
            mini_batch = len(batch)
        seed = self.config.data.get("seed") if self.rema.seed is None else self.rema.seed
        order = fair_order(lengths, mini_batch, workers, (seed, self.global_steps))
        shares = [list(part) for part in np.array_split(order, workers)]
        metrics.update(log_seqlen_unbalance(lengths, shares, prefix="global_seqlen"))
        batch.reorder(order)
        return batch

    def _rows_of(self, roles: tuple[str, ...], batch: KVBatchMeta) -> KVBatchMeta:
        """The rows of ``batch`` that these roles spoke in."""
        return batch.select_keys([key for key in batch.keys if self.rows[key]["role"] in roles])

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._compute_old_log_prob(batch, metrics)
        fields = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["response_mask", "entropy"]
        )
        masks, entropies = fields["response_mask"].unbind(), fields["entropy"].unbind()
        for role in self.learning:
            mine = [i for i in range(len(batch)) if self._role(batch, i) == role]
            tokens = sum(int(masks[i].sum()) for i in mine)
            if tokens:
                metrics[f"{role}/entropy"] = sum(float((entropies[i] * masks[i]).sum()) for i in mine) / tokens
        return batch

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        fields = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["uid", "response_mask", "rm_scores"]
        )
        uids = _column(fields, "uid")
        scores = [score.clone() for score in fields["rm_scores"].unbind()]
        roles = [self._role(batch, i) for i in range(len(batch))]
        number = {key: i for i, key in enumerate(self.rows)}
        numbers = [PAD] * len(batch)
        for i, role in enumerate(roles):
            if role is None:
                continue
            row = self.rows[batch.keys[i]]
            if (rewards := _turn_rewards(row)) is not None:
                scores[i] = _token_rewards(scores[i], row["turn_spans"], rewards)
            uids[i] = role_index(uids[i], role)
            numbers[i] = number[batch.keys[i]]
        update = TensorDict(
            {
                "rm_scores": torch.nested.as_nested_tensor(scores, layout=torch.jagged),
                "role_id": torch.tensor([PAD if role is None else ROLES.index(role) for role in roles]),
                "row": torch.tensor(numbers),
            },
            batch_size=len(batch),
        )
        update["uid"] = np.array(uids, dtype=object)
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=update)
        metrics.update(self._dialogue_metrics())
        batch = super()._compute_advantage(batch, metrics)
        names = ["advantages", "old_log_probs", "rollout_log_probs"]
        fields = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        columns: list[Any] = [fields[name].unbind() if name in fields else [None] * len(batch) for name in names]
        for i, role in enumerate(roles):
            if role is not None:
                note_turns(self.rows[batch.keys[i]], *(column[i] for column in columns))
        return batch

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        with self._mini_batches_in_rows():
            batch = super()._update_actor(batch, metrics)
        for role in ROLES:
            rows, clipped = (metrics.pop(f"actor/{role}/{name}", 0.0) for name in ("rows", "clipped"))
            if rows:
                metrics[f"{role}/pg_clipfrac"] = clipped / rows
        note_update(list(self.rows.values()), self.actor_rollout_wg.execute_with_func_generator(take_turns))
        return batch

    def _compute_metrics(self, batch: KVBatchMeta, metrics: dict, timing_raw: dict, **where) -> None:
        def about(keys: list[str]) -> list[dict]:
            names = ["raw_prompt", "reward_model", "data_source"]
            fields = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=names)
            return [
                {"question": question_of(prompt), "truth": str(model["ground_truth"]), "data_source": str(source)}
                for prompt, model, source in zip(*(_column(fields, name) for name in names), strict=True)
            ]

        metrics.update(self._rollout_metrics(batch.partition_id))
        with marked_timer("record", timing_raw):
            metrics.update(self.recorder.step(self.global_steps, self.rows, metrics, about))
        super()._compute_metrics(batch, metrics, timing_raw, **where)

    def _get_required_batch_multiple(self, dp_size: int) -> int:
        with self._mini_batches_in_rows():
            return super()._get_required_batch_multiple(dp_size)

    @contextlib.contextmanager
    def _mini_batches_in_rows(self):
        """verl makes a mini-batch of ``ppo_mini_batch_size * n`` rows; a trajectory here has one per learning role."""
        actor = self.config.actor_rollout_ref.actor
        prompts = actor.ppo_mini_batch_size
        with open_dict(actor):
            actor.ppo_mini_batch_size = prompts * len(self.learning)
        try:
            yield
        finally:
            with open_dict(actor):
                actor.ppo_mini_batch_size = prompts

    def _role(self, batch: KVBatchMeta, i: int) -> str | None:
        """The role of row ``i``; None for verl's padding rows, which copy another row's fields."""
        return None if batch.tags[i].get("is_padding", False) else self.rows[batch.keys[i]]["role"]

    def _dialogue_metrics(self) -> dict:
        """Turns, tokens, rewards, stop reasons and grading, over the trajectories of a step."""
        metrics: dict[str, float] = {}
        for role in ROLES:
            mine = [row for row in self.rows.values() if row["role"] == role]
            if not mine:
                continue
            metrics[f"{role}/turns/mean"] = float(np.mean([len(row["turn_spans"]) for row in mine]))
            metrics[f"{role}/tokens"] = sum(end - start for row in mine for start, end in row["turn_spans"])
            rewards = [r for row in mine if (r := _turn_rewards(row)) is not None]
            if rewards:
                metrics[f"{role}/reward/mean"] = float(np.mean([sum(r) for r in rewards]))
        dialogues = [row for row in self.rows.values() if row["role"] == ROLES[0]]
        if not dialogues:
            return metrics
        stops = Counter(d["stop_reason"] for d in dialogues)
        metrics["dialogue/finish_rate"] = stops[str(StopReason.FINISHED)] / len(dialogues)
        metrics["dialogue/turns/mean"] = float(np.mean([d["dialogue_turns"] for d in dialogues]))
        metrics.update({f"dialogue/stop_reason/{reason}": stops[str(reason)] for reason in StopReason})
        actions = Counter(d["plan_action"] for d in dialogues if "plan_action" in d)
        metrics.update({f"dialogue/plan_action/{a}": actions[a] for a in (*JSON_ACTIONS, INVALID) if actions})
        if leaks := [d["reward_extra_info"]["leak"] for d in dialogues if "leak" in d["reward_extra_info"]]:
            metrics["meta_thinking/leak_rate"] = float(np.mean(leaks))
        graded = Counter(d["reward_extra_info"].get("grade_status") for d in dialogues)
        metrics["reward/acc/mean"] = float(np.mean([d["reward_extra_info"].get("acc", 0.0) for d in dialogues]))
        metrics["reward/grading_timeouts"] = graded["timeout"]
        metrics["reward/grading_errors"] = graded["error"] + graded["memory"]
        return metrics

    def _rollout_metrics(self, partition_id: str) -> dict:
        """What the engines prefilled, against the least there can be, and whether a token changed on its way."""
        spoke = [key for key, row in self.rows.items() if row["turn_spans"]]
        if not spoke:
            return {}
        fields = tq.kv_batch_get(keys=spoke, partition_id=partition_id, select_fields=["prompts", "response_mask"])
        openings = [ids.tolist() for ids in fields["prompts"].unbind()]
        heard = sum(int((mask == 0).sum()) for mask in fields["response_mask"].unbind())
        minimum = minimum_prefill((ids, [0] * len(ids)) for ids in openings) + heard
        dialogues = {
            row["trajectory_id"]: row for row in self.rows.values()
        }  # what is of a dialogue is on all its rows
        total = {key: sum(d[key] for d in dialogues.values()) for key in ("prompt_tokens", "cached_tokens")}
        metrics = {
            "rollout/cache_hit_rate": total["cached_tokens"] / max(total["prompt_tokens"], 1),
            "rollout/prefill_over_minimum": (total["prompt_tokens"] - total["cached_tokens"]) / minimum,
            "rollout/token_drift": sum(d["token_drift"] for d in dialogues.values()),
            "rollout/rows_per_trajectory": len(self.rows) / len(dialogues),
        }
        if calls := [span for d in dialogues.values() for span in d.get("engine_spans", ())]:
            metrics["rollout/engine_idle_share"] = idle_share((d["pending"] for d in dialogues.values()), calls)
        return metrics

    def _val_metrics_update(self, data_sources, sample_uids, *args, expected_acc_counts=None, **kwargs) -> dict:
        # verl scores a validation trajectory that did not arrive 0 and says nothing
        metrics = super()._val_metrics_update(
            data_sources, sample_uids, *args, expected_acc_counts=expected_acc_counts, **kwargs
        )
        if missing := sum((expected_acc_counts or {}).values()) - len(sample_uids):
            logger.warning("validation: %d trajectories failed or were skipped, and count as wrong", missing)
        return metrics | {"val-aux/missing_trajectories": missing}

    # ----------------------------------------------------------- on the disk

    def _dump_generations(self, inputs, outputs, gts, scores, reward_extra_infos_dict, dump_path) -> None:
        """verl's JSONL of rollouts, with the role and what the agent loop knows of the dialogue on each row."""
        real = [i for i, key in enumerate(reward_extra_infos_dict["uid"]) if not key.startswith("pad")]
        inputs, outputs, gts, scores = ([column[i] for i in real] for column in (inputs, outputs, gts, scores))
        reward_extra_infos_dict = {k: [v[i] for i in real] for k, v in reward_extra_infos_dict.items()}
        keys = reward_extra_infos_dict["uid"]
        extra = {**reward_extra_infos_dict, "role": [ROLES[int(k.rsplit("_", 1)[1])] for k in keys]}
        if all(key in self.rows for key in keys):
            for name in ("trajectory_id", "stop_reason", "turn_spans"):
                extra[name] = [self.rows[key][name] for key in keys]
        super()._dump_generations(inputs, outputs, gts, scores, extra, dump_path)

    def _save_checkpoint(self) -> None:
        root = Path(self.config.trainer.default_local_dir)
        previous = _read_tracker(root)
        try:
            super()._save_checkpoint()
        except Exception as e:
            if _read_tracker(root) == self.global_steps:
                raise  # the checkpoint is complete: what failed came after it (trainer.checkpoint_callback_class)
            # torch does not say "disk full" when it is. Free the half-written step, then repair verl's pointer, which
            # the failed write may have emptied.
            free = shutil.disk_usage(next(p for p in (root, *root.parents) if p.exists())).free / 2**20
            shutil.rmtree(root / f"global_step_{self.global_steps}", ignore_errors=True)
            _write_tracker(root, previous)
            raise RuntimeError(
                f"{PREFIX} could not save the checkpoint of step {self.global_steps} "
                f"({free:.1f} MiB were free on that disk): {root_cause(e)}; "
                f"{self.resume_hint()}"
            ) from None

    def _load_checkpoint(self) -> None:
        root = Path(self.config.trainer.default_local_dir)
        if self.config.trainer.resume_mode == "auto" and (root / TRACKER).exists() and _read_tracker(root) is None:
            # Killed between emptying and writing it: go on from the newest complete step (data.pt is saved last).
            steps = [int(p.parent.name.rsplit("_", 1)[1]) for p in root.glob("global_step_*/data.pt")]
            _write_tracker(root, max(steps, default=None))
        super()._load_checkpoint()


def _column(fields: TensorDict, name: str) -> list:
    """A non-tensor column as plain objects; how it comes depends on TransferQueue's backend."""
    return [getattr(value, "data", value) for value in list(fields[name])]


def _turn_rewards(row: dict) -> list[float] | None:
    """The rewards of a row's turns; None where another reward manager gave one reward to the whole trajectory."""
    rewards = row["reward_extra_info"].get("turn_rewards")
    return None if rewards is None else json.loads(rewards)[row["role"]]


def _token_rewards(like: torch.Tensor, spans: list[tuple[int, int]], rewards: list[float]) -> torch.Tensor:
    """Each turn's reward on the turn's last token; (L,) like ``like``."""
    out = torch.zeros_like(like)
    for (_, end), reward in zip(spans, rewards, strict=True):
        out[end - 1] += reward
    return out


def _read_tracker(root: Path) -> int | None:
    try:
        return int((root / TRACKER).read_text())
    except (FileNotFoundError, ValueError):
        return None


def _write_tracker(root: Path, step: int | None) -> None:
    if step is None:
        (root / TRACKER).unlink(missing_ok=True)
        return
    temporary = root / f"{TRACKER}.tmp"
    temporary.write_text(str(step))
    temporary.replace(root / TRACKER)
