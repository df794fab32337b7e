#!/usr/bin/env bash
# The whole of ReMA on two CPU cores: synthetic task, tiny model, supervised cold start, RL, evaluation.
#
#   bash recipes/quickstart.sh            first run: 4 minutes after the installs; two to three times that on a slow CPU
#   SEED=1 bash recipes/quickstart.sh     another seed, in its own folder
#   FRESH=1 bash recipes/quickstart.sh    start over
#   NAME=mine bash recipes/quickstart.sh algorithm.adv_estimator=softrankpo
#                                         the same cold start, RL with any of verl's options, in a folder of its own
#
# Real verl 0.9.1, Ray and vLLM. A second run reuses what is there; a run that was killed goes on from its last
# checkpoint. The task is SYNTHETIC: it shows that the machinery learns, and says nothing about mathematics.
START=$(date +%s)
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cpu_environment

SEED=${SEED:-0}
SFT_STEPS=${SFT_STEPS:-400}
STEPS=${STEPS:-10}
START_FROM=$RUNS/quickstart_seed$SEED # task, model and cold start
NAME=${NAME:-quickstart_seed$SEED}
RUN=$RUNS/$NAME # RL
DATA=$START_FROM/data
ARGUMENTS=(
  +device=cpu
  data.train_files="$DATA/train.parquet"
  data.val_files="$DATA/val.parquet"
  data.train_batch_size=16
  data.max_prompt_length=128
  data.max_response_length=16
  data.seed="$SEED"
  rema.max_turns=4
  rema.seed="$SEED"
  rema.prompts.meta_thinking=plan
  rema.prompts.reasoning=solve
  rema.prompts.first_instruction="'{question}|{instruction}'"
  actor_rollout_ref.model.path="$START_FROM/model"
  actor_rollout_ref.actor.ppo_mini_batch_size=4
  actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=64
  actor_rollout_ref.actor.optim.lr=2e-4
  actor_rollout_ref.actor.optim.lr_scheduler_type=cosine
  actor_rollout_ref.actor.optim.weight_decay=0.0
  actor_rollout_ref.rollout.n=8
  actor_rollout_ref.rollout.seed="$SEED"
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=64
  actor_rollout_ref.rollout.max_num_batched_tokens=2048
  trainer.total_training_steps="$STEPS"
  trainer.total_epochs=1000
  trainer.save_freq=5
  trainer.test_freq=5
  "$@"
)
precheck rema_trainer --settings-only "${ARGUMENTS[@]}" # before the cold start, which takes a minute

[ "${FRESH:-0}" = 1 ] && rm -rf "$RUN"
mkdir -p "$START_FROM" "$RUN"
only_one_run_in "$START_FROM"

echo "== 1/4 task and model (synthetic)"
[ -e "$DATA/manifest.json" ] || python data_prep/build_tiny.py --out "$DATA" --seed "$SEED"

echo "== 2/4 supervised cold start (verl's SFT trainer)"
tiny_cold_start "$START_FROM" "$SEED" "$SFT_STEPS" \
  data.train_batch_size=64 \
  data.micro_batch_size_per_gpu=64 \
  data.max_length=128 \
  data.num_workers=1 \
  model.use_remove_padding=False

echo "== 3/4 ReMA (verl's main_ppo, real vLLM)"
only_one_run_in "$RUN"
if [ ! -e "$RUN/done_$STEPS" ]; then
  export -f train launch precheck only_one_run_in
  export RUNS SMOKE=0
  python recipes/watch.py --title "RL" --log "$RUN/train.log" --metrics "$RUN/metrics" --steps "$STEPS" -- \
    bash -c 'set -euo pipefail; train "$@"' train "$NAME" "${ARGUMENTS[@]}"
  touch "$RUN/done_$STEPS"
fi

echo "== 4/4 result"
python recipes/quickstart_result.py --run "$RUN" --steps "$STEPS" --seconds "$(($(date +%s) - START))"
