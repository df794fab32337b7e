"""A run's folder in the format of a real one, with invented content."""

import json
import math
import random
from pathlib import Path

from rema_verl.dialogue import ROLES
from rema_verl.report.trajectories import SCHEMA

WORDS = "so we add the two numbers then check that result against what was asked and write it down once more".split()


def turn(role: str, text: str, **more) -> dict:
    """One turn as on disk."""
    fields = {"reward": 0.0, "advantage": 0.5, "log_ratio": 1e-4, "update_log_ratio": None, "clipped": None}
    return {"role": role, "text": text, "tokens": len(text.split()), **fields, **more}


def trajectory(step: int = 1, id: str = "t0", turns: list[dict] | None = None, **more) -> dict:
    """One trajectory as on disk."""
    turns = turns if turns is not None else [turn(ROLES[0], "Add them. [FINISH]"), turn(ROLES[1], r"It is \boxed{2}")]
    fields = {
        "uid": "p0", "picked": ["sampled"], "data_source": "toy", "question": "1 + 1?", "truth": "2",
        "stop_reason": "finished", "acc": 1.0, "grade_status": "graded", "prompt_tokens": 100, "cached_tokens": 60,
        "flags": [],
    }  # fmt: skip
    return {"schema": SCHEMA, "step": step, "id": id, **fields, "turns": turns, **more}


def write_step(folder: Path, step: int, trajectories: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(t) + "\n" for t in trajectories)
    (folder / f"step_{step:06d}.jsonl").write_text(lines)


def metrics(step: int, steps: int, rng: random.Random, pace: float = 1.0) -> dict[str, float]:
    """One training step's metrics, under verl's and our names."""
    done, noise = pace * step / steps, rng.gauss(0, 0.02)
    row = {
        "reward/acc/mean": 0.3 + 0.5 * done + noise,
        "dialogue/finish_rate": 0.6 + 0.35 * done + noise / 4,
        "dialogue/turns/mean": 2 + done,
        "dialogue/stop_reason/finished": round(60 + 35 * done),
        "dialogue/stop_reason/max_turns": round(25 * (1 - done)),
        "dialogue/stop_reason/truncated": round(10 * (1 - done)),
        "dialogue/stop_reason/context_exhausted": round(5 * (1 - done)),
        "dialogue/stop_reason/empty_message": 0,
        "actor/turn_ratio_mean": 1 + noise / 10,
        "actor/turn_ratio_min": 0.8 + noise,
        "actor/turn_ratio_max": 1.2 + noise,
        "actor/pg_clipfrac": 0.02 + abs(noise),
        "actor/pg_clipfrac_lower": 0.0,
        "actor/log_ratio_clipfrac": 0.0,
        "actor/grad_norm": 0.5 + abs(noise) * 5,
        "training/rollout_probs_diff_max": 1e-6 * math.exp(noise * 20),
        "rollout/cache_hit_rate": 0.5 + 0.2 * done,
        "rollout/prefill_over_minimum": 1.3 - 0.2 * done,
        "rollout/engine_idle_share": 0.04 - 0.02 * done,
        "rollout/failed_trajectories": 0,
        "perf/throughput": 900 + 2000 * noise,
        "timing_s/step": 9.0,
        "timing_s/gen": 5.0 + noise * 9,
        "timing_s/old_log_prob": 1.2,
        "timing_s/update_actor": 1.5,
        "timing_s/update_weights": 0.3,
        "timing_s/record": 0.02,
        "health/lazy_share": 0.05 + 0.7 * done**3,
        "health/reasoning_tokens_vs_start": 1 - 0.4 * done,
        "health/turns_vs_start": 1 + done / 2,
        "health/echo/within": 0.02 + abs(noise),
        "health/echo/between": 0.2 + noise,
        "health/leak_share": 0.1 + noise,
        "health/zero_advantage_groups": 0.2 + 0.65 * done,
        "health/log_ratio/rollout_max": 1e-3,
        "health/grading_timeout_share": 0.0,
        "health/warnings": float(done > 0.9),
    }
    for sign, role in zip((1, -1), ROLES, strict=True):
        row[f"{role}/reward/mean"] = row["reward/acc/mean"] + sign * 0.03
        row[f"{role}/turns/mean"] = 2 + done + sign * 0.02
        row[f"{role}/tokens"] = 4000 + sign * 800 * done
        row[f"{role}/entropy"] = 0.9 * math.exp(-2 * done) + sign * 0.05
        row[f"{role}/pg_clipfrac"] = 0.02 + sign * 0.005 + abs(noise)
        row[f"health/entropy_vs_start/{role}"] = math.exp(-2 * done)
    for number in (1, 2):
        mix = [0.5 + 0.2 * done, 0.3, 0.2 - 0.2 * done]
        row |= {
            f"mpdf/round_{number}/action/{a}": v for a, v in zip(("persist", "refine", "concede"), mix, strict=True)
        }
    return row


def message(rng: random.Random, words: int) -> str:
    return " ".join([*rng.choices(WORDS, k=words), str(rng.randrange(10**6))])


def write_run(
    folder: Path, steps: int = 12, per_step: int = 6, words: int = 30, seed: int = 0, config: dict | None = None
) -> Path:
    """A run of ``steps`` steps with ``per_step`` trajectories each, in ``folder``."""
    rng, pace = random.Random(seed), 1 - 0.3 * (seed % 2)
    (folder / "metrics").mkdir(parents=True)
    with (folder / "metrics" / "20260101-000000.jsonl").open("w") as file:
        for step in range(steps + 1):
            data = metrics(step, steps, rng, pace) if step else {}
            if step % max(steps // 6, 1) == 0:
                data["val-core/toy/acc/mean@1"] = 0.3 + 0.5 * step / steps + rng.gauss(0, 0.02)
            file.write(json.dumps({"step": step, "data": data}) + "\n")
    hydra = folder / "hydra" / ".hydra"
    hydra.mkdir(parents=True)
    settings = {"rema": {"max_turns": 4}, "actor_rollout_ref": {"actor": {"optim": {"lr": 1e-6}}}} | (config or {})
    (hydra / "config.yaml").write_text(json.dumps(settings))
    (hydra / "overrides.yaml").write_text(json.dumps(["+device=cpu", "rema.max_turns=4"]))
    for step in range(1, steps + 1):
        found = []
        for i in range(per_step):
            right = rng.random() < 0.3 + 0.5 * step / steps
            turns = [
                turn(ROLES[n % 2], message(rng, words), advantage=rng.gauss(0, 1), reward=float(right and n >= 2))
                for n in range(4)
            ]
            stop = "finished" if right else rng.choice(["finished", "truncated", "max_turns"])
            flags = [*([] if right else ["wrong"]), *(["truncated"] if stop == "truncated" else [])]
            flags += [f for f in ("lazy", "echo", "leak") if rng.random() < 0.1]
            picked = [["best"], ["worst"], ["longest"]][i] if i < 3 else ["sampled"]
            found.append(
                trajectory(
                    step,
                    f"{step:04x}{i:04x}",
                    turns,
                    question=message(rng, 12),
                    acc=float(right),
                    stop_reason=stop,
                    flags=flags,
                    picked=picked,
                )
            )
        write_step(folder / "trajectories", step, found)
    return folder
