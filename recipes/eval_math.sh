#!/usr/bin/env bash
# A model on the eight mathematics benchmarks: accuracy with intervals, beside the paper's numbers.
#
#   bash recipes/eval_math.sh MODEL                        the two-role team, one greedy answer per question
#   MODE=mrp bash recipes/eval_math.sh MODEL               a single agent that plans first (vrp: that answers directly)
#   N=16 TEMPERATURE=0.6 K="4 16" bash recipes/eval_math.sh MODEL                         avg@16, pass@4, pass@16
#   PAPER=qwen25_7b/rema bash recipes/eval_math.sh MODEL   with the paper's column (recipes/paper_results.json)
#   DEVICE=cpu bash recipes/eval_math.sh MODEL             on a machine without accelerator
#   SMOKE=1 bash recipes/eval_math.sh                      a handful of real questions and a tiny model, on CPU
#
#   MODEL      a Hugging Face folder or name, or a verl checkpoint (.../global_step_N; merged once if it has to be).
#              With REASONING_MODEL=... or a checkpoint of trainer mode rema_separate each role has a model of its own.
#   Data       python data_prep/build_eval_suite.py
#   verl       0.9.1
#   Paper      ReMA (NeurIPS-25), Table 1a: single-turn (MAX_TURNS=1 TOKENS_PER_TURN=2048), greedy
#   Here       not run on GPUs yet
#
# What follows MODEL goes to verl. Killed, the same command goes on. The table is in $OUT: results.md, results.json.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

TASK=${TASK:-math}
MODE=${MODE:-rema}
MODEL=${1:-}
[ $# -gt 0 ] && shift

# questions
SUITE=${SUITE:-${DATA_DIR:-data}/eval_suite/eval_suite.parquet} # one file, or several between blanks
BUILD=${BUILD:-build_eval_suite.py}
ONLY=${ONLY:-} # e.g. "math500 aime24"

# sampling
N=${N:-1}
TEMPERATURE=${TEMPERATURE:-$([ "$N" = 1 ] && echo 0 || echo 1.0)}
TOP_P=${TOP_P:-1.0}
K=${K:-}
SEED=${SEED:-0}

# dialogue; a single agent says everything in one message
MAX_TURNS=${MAX_TURNS:-30}
TOKENS_PER_TURN=${TOKENS_PER_TURN:-$([ "$MODE" = rema ] && echo 512 || echo 2048)}
CONTEXT_TOKENS=${CONTEXT_TOKENS:-4096}

# performance: these may change when a run goes on, all else may not
DEVICE=${DEVICE:-gpu}
GPUS=${GPUS:-8}
NODES=${NODES:-1}
TENSOR_PARALLEL=${TENSOR_PARALLEL:-1}

read -ra FILES <<< "$SUITE"
for file in "${FILES[@]}"; do
  [ -e "$file" ] || { echo "rema-verl: error: $file: no such file; run python data_prep/$BUILD first" >&2; exit 2; }
done
if [ "$SMOKE" = 1 ]; then
  cpu_environment
  DEVICE=cpu
  [ "$MAX_TURNS" -gt 3 ] && MAX_TURNS=3
  TOKENS_PER_TURN=64 CONTEXT_TOKENS=${SMOKE_CONTEXT:-1024}
  INPUTS=$RUNS/smoke_eval_$TASK/inputs
  mkdir -p "$INPUTS"
  printf 'rema.%s\n' "task=$TASK" "max_turns=$MAX_TURNS" > "$INPUTS/recipe.txt"
  python data_prep/build_smoke.py --overrides "$INPUTS/recipe.txt" \
    --train "${FILES[0]}" --val "${FILES[-1]}" --out "$INPUTS"
  MODEL=$INPUTS/model FILES=("$INPUTS/val.parquet")
  OUT=${OUT:-$RUNS/smoke_eval_$TASK/$MODE}
fi
case $MODEL in -*) echo "rema-verl: error: $MODEL: a model comes first; use: bash recipes/eval_$TASK.sh MODEL" >&2; exit 2 ;; esac
[ -n "$MODEL" ] || { echo "rema-verl: error: no model; use: bash recipes/eval_$TASK.sh MODEL" >&2; exit 2; }
[ "$DEVICE" = cpu ] && cpu_environment

# the folder's name tells runs apart that people compare; settings that it leaves out are compared all the same
NAME=$(echo "$MODEL" | tr '/' '\n' | grep -v -x -e '' -e checkpoints -e actor -e huggingface | tail -n 2 | paste -sd_)
OUT=${OUT:-$RUNS/eval_$TASK/${NAME}_${MODE}_n$N}

python recipes/evaluate.py "$MODEL" \
  --questions "${FILES[@]}" \
  --out "$OUT" \
  --task "$TASK" \
  --mode "$MODE" \
  ${ONLY:+--only $ONLY} \
  --samples "$N" \
  --temperature "$TEMPERATURE" \
  --top-p "$TOP_P" \
  ${K:+--k $K} \
  --seed "$SEED" \
  --max-turns "$MAX_TURNS" \
  --max-message "$TOKENS_PER_TURN" \
  --max-context "$CONTEXT_TOKENS" \
  --device "$DEVICE" \
  --gpus "$GPUS" \
  --nodes "$NODES" \
  --tensor "$TENSOR_PARALLEL" \
  ${REASONING_MODEL:+--reasoning-model "$REASONING_MODEL"} \
  ${PAPER:+--paper "$PAPER"} \
  -- "$@"
