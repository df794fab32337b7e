#!/usr/bin/env bash
# MPDF with the LLM as its own meta-policy: Qwen2.5-7B-Instruct writes Persist, Refine or Concede, and is trained online
# with SoftRankPO. One row per agent, a reward per round, one advantage group per question.
#
#   Paper      none: MPDF (AAAI-26, arXiv 2509.03817) trains a small network beside a frozen LLM (mpdf_qwen25_7b_math.sh);
#              3 agents, 3 rounds, tau 0.5 and the reward are its own
#   Hardware   one node with 8 GPUs of 80 GB
#   Expected   no number
#   verl       0.9.1
#   Data       python data_prep/build_math.py
#   Here       not run on GPUs; SMOKE=1 makes two real steps on CPU
source "$(dirname "${BASH_SOURCE[0]}")/mpdf_lib.sh"

DATA=$DATA_DIR/math
TRAIN_FILES=${TRAIN_FILES:-$DATA/train.parquet}
VAL_FILES=${VAL_FILES:-$DATA/val.parquet}
need "python data_prep/build_math.py --out $DATA" "$TRAIN_FILES" "$VAL_FILES"
MODEL=${MODEL:-Qwen/Qwen2.5-7B-Instruct}

mpdf_train mpdf_llm_qwen7b_math \
  data.train_files="$TRAIN_FILES" \
  data.val_files="$VAL_FILES" \
  data.train_batch_size=64 \
  data.max_prompt_length=12288 \
  data.max_response_length=1024 \
  data.seed=1 \
  actor_rollout_ref.model.path="$MODEL" \
  actor_rollout_ref.model.enable_gradient_checkpointing=true \
  actor_rollout_ref.actor.optim.lr=1e-6 \
  actor_rollout_ref.actor.ppo_mini_batch_size=32 \
  actor_rollout_ref.actor.use_dynamic_bsz=true \
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
  actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.rollout.temperature=1.0 \
  actor_rollout_ref.rollout.seed='${data.seed}' \
  actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
  actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
  trainer.n_gpus_per_node=8 \
  trainer.nnodes=1 \
  trainer.save_freq=10 \
  trainer.max_actor_ckpt_to_keep=2 \
  trainer.test_freq=10 \
  trainer.total_training_steps=200 \
  trainer.total_epochs=1000 \
  "${KNOBS[@]}" "$@"
