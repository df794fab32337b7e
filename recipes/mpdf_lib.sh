# Shared by the mpdf_*.sh recipes; source it. Defines:
#   mpdf_stages NAME PAPER    stages 0 to 3 for $MODEL on $TRAIN_FILES and $VAL_FILES, everything under $RUNS/NAME
#   mpdf_train NAME ARG...    verl's main_ppo with the config mpdf_trainer: the LLM as its own meta-policy
#   tiny_mpdf FOLDER SEED N   the synthetic task, and a tiny model after N supervised steps, in FOLDER
# Killed, the same command goes on. SMOKE=1 runs all stages on CPU with a tiny synthetic model and few questions.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
GIVEN=("$@") # on the recipe's command line

no_arguments() {
  [ "${#GIVEN[@]}" = 0 ] \
    || { echo "rema-verl: error: ${GIVEN[0]}: $0 takes no arguments; its head says what to set" >&2; exit 2; }
}

# the paper's, where it states one: 3 agents, 3 rounds, tau 0.5
AGENTS=${AGENTS:-3}
ROUNDS=${ROUNDS:-3}
TAU=${TAU:-0.5}
# ours: the paper states neither sizes nor rates
TEMPERATURE=${TEMPERATURE:-0.7}
MAX_TOKENS=${MAX_TOKENS:-1024}
CONTEXT=${CONTEXT:-12288}
SAMPLES=${SAMPLES:-1} # deliberations on each training question
QUESTIONS=${QUESTIONS:-2000}
EVAL_SAMPLES=${EVAL_SAMPLES:-1}
BETA=${BETA:-0.25}
EPOCHS=${EPOCHS:-30}
MPDF_SEED=${SEED:-0}
MPDF_DEVICE=${DEVICE:-gpu}
IN_FLIGHT=${IN_FLIGHT:-64}

tiny_mpdf() { # FOLDER SEED SFT_STEPS: task, model and cold start in FOLDER; the model is FOLDER/model
  mkdir -p "$1"
  [ -e "$1/data/manifest.json" ] || python data_prep/build_tiny_mpdf.py --out "$1/data" --seed "$2"
  tiny_cold_start "$1" "$2" "$3" \
    data.train_batch_size="${SFT_ROWS:-32}" \
    data.micro_batch_size_per_gpu=16 \
    data.max_length=192 \
    data.num_workers=0 \
    model.use_remove_padding=True
}

mpdf_stages() {
  local name=$1 paper=${2:-} run prompts=()
  no_arguments
  [ "$SMOKE" != 1 ] || name=smoke_$name
  run=$RUNS/$name
  mkdir -p "$run"
  only_one_run_in "$run"
  if [ "$SMOKE" = 1 ]; then
    SFT_ROWS=16 tiny_mpdf "$run/inputs" 0 "${SFT_STEPS:-30}"
    MODEL=$run/inputs/model TRAIN_FILES=$run/inputs/data/train.parquet VAL_FILES=$run/inputs/data/val.parquet
    QUESTIONS=8 EVAL_QUESTIONS=8 MAX_TOKENS=32 CONTEXT=256 TEMPERATURE=1.0 IN_FLIGHT=8 MPDF_DEVICE=cpu
    prompts=(--prompts "$run/inputs/data/prompts.json")
  fi
  [ "${#MPDF_PROMPTS[@]}" = 0 ] || prompts=("${MPDF_PROMPTS[@]}")
  local served=(
    --model "$MODEL" --agents "$AGENTS" --rounds "$ROUNDS" --temperature "$TEMPERATURE" --max-tokens "$MAX_TOKENS"
    --context "$CONTEXT" --in-flight "$IN_FLIGHT" --seed "$MPDF_SEED" "${prompts[@]}"
    --device "$MPDF_DEVICE" --gpus "${GPUS:-1}" --nodes "${NODES:-1}" --tensor "${TENSOR_PARALLEL:-1}"
  )
  local trained=(--seed "$MPDF_SEED" --epochs "$EPOCHS" --tau "$TAU" --beta "$BETA")

  echo "== stage 0: states under the uniform policy"
  python -m rema_verl.deliberation.collect "${served[@]}" \
    --questions "$TRAIN_FILES" --limit "$QUESTIONS" --samples "$SAMPLES" --out "$run/corpus_uniform"
  echo "== stage 1: supervised, on the best-rewarded action"
  python -m rema_verl.deliberation.train --stage supervised "${trained[@]}" \
    --corpus "$run/corpus_uniform" --out "$run/supervised.safetensors"
  echo "== stage 0 again: states under the supervised policy"
  python -m rema_verl.deliberation.collect "${served[@]}" --policy "$run/supervised.safetensors" \
    --questions "$TRAIN_FILES" --limit "$QUESTIONS" --samples "$SAMPLES" --out "$run/corpus_supervised"
  echo "== stage 2: SoftRankPO, offline"
  python -m rema_verl.deliberation.train --stage softrankpo "${trained[@]}" --init "$run/supervised.safetensors" \
    --corpus "$run/corpus_supervised" --out "$run/softrankpo.safetensors"
  echo "== stage 3: evaluation"
  python -m rema_verl.deliberation.evaluate "${served[@]}" --questions "$VAL_FILES" \
    ${EVAL_QUESTIONS:+--limit "$EVAL_QUESTIONS"} --samples "$EVAL_SAMPLES" --greedy \
    --policy supervised="$run/supervised.safetensors" softrankpo="$run/softrankpo.safetensors" --out "$run/evaluation"
  [ -z "$paper" ] || echo "paper: $paper"
  echo "everything is in $run"
}

mpdf_train() { launch mpdf_trainer "$@"; }

mpdf_trainer_smoke() { # FOLDER: the tiny task, and `extra` to train on it
  local inputs=$1 kind
  SFT_ROWS=16 tiny_mpdf "$inputs" 0 "${SFT_STEPS:-30}"
  mapfile -t extra < <(python recipes/overrides.py rema_verl/config/device/cpu.yaml rema_verl/config/size/smoke.yaml)
  extra+=(
    "data.train_files=$inputs/data/train.parquet" "data.val_files=$inputs/data/val.parquet"
    "actor_rollout_ref.model.path=$(realpath "$inputs/model")"
  )
  for kind in solve critic act; do extra+=("mpdf.prompts.$kind=$kind"); done
}

MPDF_PROMPTS=()
[ "$SMOKE" != 1 ] || cpu_environment
