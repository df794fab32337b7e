#!/usr/bin/env bash
# A model as a judge between two answers: RewardBench's 970 held-out comparisons and JudgeBench's 620.
#
#   bash recipes/eval_judge.sh MODEL             the two-role judge: a plan from the question alone, then a verdict
#   MODE=vrp bash recipes/eval_judge.sh MODEL    a single judge that compares (mrp: that plans first)
#   PAPER=qwen25_7b/rema ...                     Table 1b (strict split); PAPER=judge_loose/qwen25_7b/rema: Table 2
#
#   Data       python data_prep/build_judge.py (--split loose for Table 2)
#   Here       not run on GPUs yet; SMOKE=1 bash recipes/eval_judge.sh runs a handful of rows on CPU
#
# Everything else is as in recipes/eval_math.sh, which this calls.
case ${1:-} in -h | --help) source "$(dirname "${BASH_SOURCE[0]}")/lib.sh" ;; esac # prints this
export TASK=judge
export SUITE=${SUITE:-${DATA_DIR:-data}/judge/test.parquet ${DATA_DIR:-data}/judge/judgebench.parquet} BUILD=build_judge.py
export MAX_TURNS=1 TOKENS_PER_TURN=${TOKENS_PER_TURN:-2048} CONTEXT_TOKENS=${CONTEXT_TOKENS:-8192} SMOKE_CONTEXT=1536
exec bash "$(dirname "${BASH_SOURCE[0]}")/eval_math.sh" "$@"
