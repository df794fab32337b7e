#!/usr/bin/env bash
# The whole of MPDF on one CPU core: synthetic task, tiny model, cold start, collection, training, evaluation.
#
#   SEED=0 bash recipes/mpdf_quickstart.sh           one seed
#   SEEDS="0 1 2" bash recipes/mpdf_quickstart.sh    several, then a table over all of them
#   FRESH=1 bash recipes/mpdf_quickstart.sh          start over
#
# Real verl 0.9.1, Ray and vLLM. The task is SYNTHETIC (data_prep/build_tiny_mpdf.py): how good solver, critic and
# second attempt are is written into its supervised data. It shows that the machinery learns, and nothing about
# mathematics. A second run reuses what is there; a run that was killed goes on.
QUESTIONS=${QUESTIONS:-600} EVAL_QUESTIONS=${EVAL_QUESTIONS:-300}
source "$(dirname "${BASH_SOURCE[0]}")/mpdf_lib.sh"
no_arguments
cpu_environment

MPDF_DEVICE=cpu
SFT_STEPS=${SFT_STEPS:-800} # with 500 some seeds have a critic that cannot compare two digits
TEMPERATURE=1.0 MAX_TOKENS=40 CONTEXT=320 IN_FLIGHT=32
for SEED in ${SEEDS:-${SEED:-0}}; do
  name=mpdf_quickstart_seed$SEED
  [ "${FRESH:-0}" = 1 ] && rm -rf "${RUNS:?}/$name"
  mkdir -p "$RUNS/$name"
  only_one_run_in "$RUNS/$name"
  start=$(date +%s)
  echo "== seed $SEED: task, model and cold start (synthetic)"
  tiny_mpdf "$RUNS/$name/start" "$SEED" "$SFT_STEPS"
  MPDF_SEED=$SEED
  MODEL=$RUNS/$name/start/model
  TRAIN_FILES=$RUNS/$name/start/data/train.parquet
  VAL_FILES=$RUNS/$name/start/data/val.parquet
  MPDF_PROMPTS=(--prompts "$RUNS/$name/start/data/prompts.json")
  mpdf_stages "$name"
  echo "seed $SEED took $(($(date +%s) - start)) s"
done
python recipes/mpdf_results.py "$RUNS"/mpdf_quickstart_seed*/evaluation/results.json
