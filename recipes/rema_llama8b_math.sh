#!/usr/bin/env bash
# ReMA, multi-turn, shared weights, on MATH levels 3-5: the paper's turn30_token512 setting with Llama-3.1-8B-Instruct.
#
#   Hardware   one node with 8 GPUs of 80 GB
#   Data       python data_prep/build_math.py
#   verl       0.9.1
#   Paper      ReMA (NeurIPS-25), Sec. 4.3 and App. C: Qwen2.5-7B, 500 steps on 32 GPUs in at most 40 h, training
#              accuracy from about 55 % to 70 %. This recipe carries those settings over to another model.
#   Here       not run on GPUs yet; SMOKE=1 bash recipes/rema_llama8b_math.sh makes two real steps on CPU.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# data and model
MODEL=${MODEL:-meta-llama/Llama-3.1-8B-Instruct}
TRAIN_FILES=${TRAIN_FILES:-data/math/train.parquet}
VAL_FILES=${VAL_FILES:-data/math/val.parquet}

# dialogue
MAX_TURNS=${MAX_TURNS:-30}
TOKENS_PER_TURN=${TOKENS_PER_TURN:-512}
CONTEXT_TOKENS=${CONTEXT_TOKENS:-4096}

# algorithm: 128 prompts x 16 trajectories, 4 updates a step, GRPO per role, no KL, turn-level ratio
PROMPTS=${PROMPTS:-128}
TRAJECTORIES=${TRAJECTORIES:-16}
MINI_BATCH_PROMPTS=${MINI_BATCH_PROMPTS:-32}
LR=${LR:-1e-6}
STEPS=${STEPS:-500}

# performance
GPUS=${GPUS:-8}
NODES=${NODES:-1}
TENSOR_PARALLEL=${TENSOR_PARALLEL:-1}
TOKENS_PER_GPU=${TOKENS_PER_GPU:-18432}

for file in "$TRAIN_FILES" "$VAL_FILES"; do
  [ -e "$file" ] || { echo "rema-verl: error: $file: no such file; run python data_prep/build_math.py first" >&2; exit 2; }
done

train rema_llama8b_math \
  data.train_files="$TRAIN_FILES" \
  data.val_files="$VAL_FILES" \
  data.train_batch_size="$PROMPTS" \
  data.max_prompt_length="$CONTEXT_TOKENS" \
  data.max_response_length="$TOKENS_PER_TURN" \
  data.seed=1 \
  rema.max_turns="$MAX_TURNS" \
  rema.mask_unfinished=true \
  algorithm.adv_estimator=role_grpo \
  actor_rollout_ref.model.path="$MODEL" \
  actor_rollout_ref.model.enable_gradient_checkpointing=true \
  actor_rollout_ref.actor.optim.lr="$LR" \
  actor_rollout_ref.actor.ppo_mini_batch_size="$MINI_BATCH_PROMPTS" \
  actor_rollout_ref.actor.use_dynamic_bsz=true \
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu="$TOKENS_PER_GPU" \
  actor_rollout_ref.actor.policy_loss.turn_ratio=geometric \
  actor_rollout_ref.actor.policy_loss.turn_agg=trajectory \
  actor_rollout_ref.actor.policy_loss.log_ratio_cap=3.0 \
  actor_rollout_ref.actor.use_kl_loss=false \
  actor_rollout_ref.actor.entropy_coeff=0 \
  actor_rollout_ref.rollout.n="$TRAJECTORIES" \
  actor_rollout_ref.rollout.temperature=1.0 \
  actor_rollout_ref.rollout.tensor_model_parallel_size="$TENSOR_PARALLEL" \
  actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
  trainer.n_gpus_per_node="$GPUS" \
  trainer.nnodes="$NODES" \
  trainer.total_training_steps="$STEPS" \
  trainer.total_epochs=1000 \
  trainer.save_freq=10 \
  trainer.max_actor_ckpt_to_keep=2 \
  trainer.test_freq=10 \
  "$@"
