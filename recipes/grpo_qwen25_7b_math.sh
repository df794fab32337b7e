#!/usr/bin/env bash
# Single-agent GRPO, Qwen2.5-7B on MATH levels 3-5: the control of rema_qwen25_7b_math.sh, with its start, data, batch,
# updates, learning rate and steps, no KL.
#
#   Paper      not in ReMA's; Dr. MAMR (arXiv 2511.02303) compares with it
#   Hardware   4 nodes with 8 GPUs of 80 GB, as the multi-agent run
#   Expected   no number for these settings. Dr. MAMR, 7B and other data: GRPO 55.08 against ReMA's 51.97 (7 sets).
#   verl       0.9.1
#   Data       python data_prep/build_math.py --prompt vrp --out data/math_vrp
#   Model      bash recipes/rema_sft_qwen25_7b.sh
#   Here       not run on GPUs; SMOKE=1 makes two real steps on CPU
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

DATA=$DATA_DIR/math_vrp
TRAIN_FILES=${TRAIN_FILES:-$DATA/train.parquet}
VAL_FILES=${VAL_FILES:-$DATA/val.parquet}
need "python data_prep/build_math.py --prompt vrp --out $DATA" "$TRAIN_FILES" "$VAL_FILES"
MODEL=${MODEL:-$(cold_start rema_sft_qwen25_7b)}

train grpo_qwen25_7b_math +setting=single_agent_grpo \
  data.train_files="$TRAIN_FILES" \
  data.val_files="$VAL_FILES" \
  actor_rollout_ref.model.path="$MODEL" \
  trainer.nnodes=4 \
  "${KNOBS[@]}" "$@"
