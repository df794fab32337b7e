#!/usr/bin/env bash
# ReMA, multi-turn, shared weights, Qwen2.5-7B on 133 questions with token-level ratios: the control of the turn-level
# ratio. Compare with rema_qwen25_7b_mini133_t256.sh, the same but for the ratio: weights of turns and tokens are its.
#
#   Paper      ReMA (NeurIPS-25), ablations on 133 questions, camera-ready
#   Hardware   one node with 8 GPUs of 80 GB (the paper: 8 A800, about 30 h; 3 seeds: SEED=1, 2, 3)
#   Expected   slower per sample than the turn-level ratio, both near 100 % in the end; curves only.
#   verl       0.9.1
#   Data       python data_prep/build_math.py --mini --out data/math_mini
#   Model      bash recipes/rema_sft_qwen25_7b.sh
#   Here       not run on GPUs; SMOKE=1 makes two real steps on CPU
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

DATA=$DATA_DIR/math_mini
TRAIN_FILES=${TRAIN_FILES:-$DATA/train.parquet}
VAL_FILES=${VAL_FILES:-$DATA/val.parquet}
need "python data_prep/build_math.py --mini --out $DATA" "$TRAIN_FILES" "$VAL_FILES"
MODEL=${MODEL:-$(cold_start rema_sft_qwen25_7b)}

train rema_qwen25_7b_mini133_token_ratio +setting=multi_turn_mini133 \
  data.train_files="$TRAIN_FILES" \
  data.val_files="$VAL_FILES" \
  actor_rollout_ref.model.path="$MODEL" \
  actor_rollout_ref.actor.policy_loss.turn_ratio=token \
  "${KNOBS[@]}" "$@"
