#!/usr/bin/env bash
# ReMA, single-turn, a model per role, both from Llama-3-8B-Instruct on MATH: Algorithm 1 of the paper.
#
#   Paper      ReMA (NeurIPS-25), Table 1a; App. C: KL 1e-2, questions with success rates from 0.2 to 0.8,
#              4 episodes, 3 update iterations
#   Hardware   one node with 8 GPUs of 80 GB (the paper: 8 A100)
#   Expected   MATH500 33.80, average of the 7 sets 26.73 (untrained: 30.80 and 20.05); greedy pass@1
#   verl       0.9.1
#   Data       python data_prep/build_math.py --levels 1-5 --out data/math_7k
#   Here       not run on GPUs; SMOKE=1 makes two real steps on CPU for each role, on unfiltered questions
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

DATA=$DATA_DIR/math_7k
TRAIN_FILES=${TRAIN_FILES:-$DATA/train.parquet}
VAL_FILES=${VAL_FILES:-$DATA/val.parquet}
need "python data_prep/build_math.py --levels 1-5 --out $DATA" "$TRAIN_FILES" "$VAL_FILES"
MODEL=${MODEL:-meta-llama/Meta-Llama-3-8B-Instruct}

alternate rema_separate_llama3_8b_math 3 0.2 0.8 -- +setting=separate_math \
  data.val_files="$VAL_FILES" \
  trainer.total_epochs=4 \
  "${KNOBS[@]}" "$@"
