#!/usr/bin/env bash
# ReMA, single-turn, a model per role, both from Llama-3.1-8B-Instruct on RewardBench: Algorithm 1 of the paper.
#
#   Paper      ReMA (NeurIPS-25), Tables 1b and 2; App. C: KL 1e-2, questions with success rates from 0.2 to 0.8,
#              2 episodes, 1 update iteration
#   Hardware   one node with 8 GPUs of 80 GB (the paper: 8 A100)
#   Expected   RewardBench970 83.71 on the strict split (untrained: 69.48), 86.29 on the loose one (71.24)
#   verl       0.9.1
#   Data       python data_prep/build_judge.py --out data/judge
#              (--split loose for the loose split)
#   Here       not run on GPUs; SMOKE=1 makes two real steps on CPU for each role, on unfiltered, synthetic questions
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

DATA=$DATA_DIR/judge
TRAIN_FILES=${TRAIN_FILES:-$DATA/train.parquet}
VAL_FILES=${VAL_FILES:-$DATA/test.parquet}
need "python data_prep/build_judge.py --out $DATA" "$TRAIN_FILES" "$VAL_FILES"
MODEL=${MODEL:-meta-llama/Llama-3.1-8B-Instruct}

alternate rema_separate_llama31_8b_judge 1 0.2 0.8 --task judge --max-context 10240 -- +setting=separate_judge \
  data.val_files="$VAL_FILES" \
  trainer.total_epochs=2 \
  "${KNOBS[@]}" "$@"
