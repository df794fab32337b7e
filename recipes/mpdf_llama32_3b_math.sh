#!/usr/bin/env bash
# MPDF, all four stages, Llama-3.2-3B-Instruct on MATH: collect, supervised, SoftRankPO, evaluation on MATH500.
#
#   Paper      MPDF (AAAI-26, arXiv 2509.03817), Table 2 (GSM8K only): 3 agents, 3 rounds, tau 0.5; the model is frozen, the
#              meta-policy is one small file (runs/NAME/softrankpo.safetensors)
#   Hardware   one node with 8 GPUs of 80 GB (GPUS=1 serves it too); the paper does not state its own
#   Expected   no number on MATH; GSM8K 80.52 (vanilla 38.64, debate 76.19)
#   verl       0.9.1
#   Data       python data_prep/build_math.py
#   Here       not run on GPUs; SMOKE=1 runs all stages on CPU with a tiny synthetic model
source "$(dirname "${BASH_SOURCE[0]}")/mpdf_lib.sh"

DATA=$DATA_DIR/math
TRAIN_FILES=${TRAIN_FILES:-$DATA/train.parquet}
VAL_FILES=${VAL_FILES:-$DATA/val.parquet}
need "python data_prep/build_math.py --out $DATA" "$TRAIN_FILES" "$VAL_FILES"
MODEL=${MODEL:-meta-llama/Llama-3.2-3B-Instruct}
GPUS=${GPUS:-8}

mpdf_stages mpdf_llama32_3b_math "no number on MATH; GSM8K 80.52 (Table 2)"
