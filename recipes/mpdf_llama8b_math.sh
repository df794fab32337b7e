#!/usr/bin/env bash
# MPDF, all four stages, Llama-3.1-8B-Instruct on MATH: collect, supervised, SoftRankPO, evaluation on MATH500.
#
#   Paper      MPDF (AAAI-26, arXiv 2509.03817), Tables 1 and 3: 3 agents, 3 rounds, tau 0.5; the model is frozen, the
#              meta-policy is one small file (runs/NAME/softrankpo.safetensors)
#   Hardware   one node with 8 GPUs of 80 GB (GPUS=1 serves it too); the paper does not state its own
#   Expected   MATH 82.72 (supervised only 79.27; vanilla 66.91, CoT 68.18, self-consistency 73.09, debate 78.91);
#              tokens per question 4,346 against debate's 7,474. Which MATH subset the paper used is not stated.
#   verl       0.9.1
#   Data       python data_prep/build_math.py
#   Here       not run on GPUs; SMOKE=1 runs all stages on CPU with a tiny synthetic model
source "$(dirname "${BASH_SOURCE[0]}")/mpdf_lib.sh"

DATA=$DATA_DIR/math
TRAIN_FILES=${TRAIN_FILES:-$DATA/train.parquet}
VAL_FILES=${VAL_FILES:-$DATA/val.parquet}
need "python data_prep/build_math.py --out $DATA" "$TRAIN_FILES" "$VAL_FILES"
MODEL=${MODEL:-meta-llama/Llama-3.1-8B-Instruct}
GPUS=${GPUS:-8}

mpdf_stages mpdf_llama8b_math "MATH 82.72 with SoftRankPO, 79.27 supervised, 78.91 debate, 73.09 self-consistency, 66.91 vanilla (Table 1)"
