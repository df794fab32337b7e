# Shared by the recipes; source it from the repository's root. Defines:
#   need COMMAND FILE...   stop where one of a recipe's data files is missing, and name the command that makes it
#   train NAME ARG...      python -m verl.trainer.main_ppo with the config rema_trainer, outputs under $RUNS/NAME
#   launch CONFIG NAME ..  the same with another config, whose inputs for SMOKE=1 the function CONFIG_smoke makes
#   alternate NAME ...     the same for one role after the other, a model per role
#   sft NAME ARG...        verl's SFT trainer, the model in $RUNS/NAME/model
#   tiny_cold_start ...    the same on CPU for a tiny task: data/ of a folder in, model of that folder out
#   KNOBS                  what the environment sets of the table below, for a recipe's command line
# SMOKE=1 makes `train` and `sft` run any recipe for two real steps on CPU: other model, size, learning rate and
# device, the rest unchanged. PRINT_OVERRIDES=1 makes them print the Hydra overrides, one per line, and start nothing.

set -euo pipefail
case ${1:-} in -h | --help) # of a recipe: the comment at its head
  if [ -f "$0" ]; then
    sed -n '1{/^#!/d}; /^#/!q; s/^# \{0,1\}//p' "$0"
    exit
  fi ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
RUNS=$(realpath -m "${RUNS:-runs}")
SMOKE=${SMOKE:-0}
DATA_DIR=${DATA_DIR:-data}
GIVEN_FILES=${TRAIN_FILES:-}${VAL_FILES:-}
DATA_COMMAND=
export TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0

KNOBS=()
while read -r variable key; do
  [ -z "${!variable:-}" ] || KNOBS+=("$key=${!variable}")
done <<'TABLE'
GPUS                trainer.n_gpus_per_node
NODES               trainer.nnodes
TENSOR_PARALLEL     actor_rollout_ref.rollout.tensor_model_parallel_size
TOKENS_PER_GPU      actor_rollout_ref.actor.ppo_max_token_len_per_gpu
PROMPTS             data.train_batch_size
TRAJECTORIES        actor_rollout_ref.rollout.n
MINI_BATCH_PROMPTS  actor_rollout_ref.actor.ppo_mini_batch_size
LR                  actor_rollout_ref.actor.optim.lr
STEPS               trainer.total_training_steps
EPOCHS              trainer.total_epochs
SEED                data.seed
MAX_TURNS           rema.max_turns
TOKENS_PER_TURN     data.max_response_length
CONTEXT_TOKENS      data.max_prompt_length
TABLE

# Settings for machines without an accelerator (two cores, no network).
cpu_environment() {
  bash recipes/setup_cpu.sh
  export PATH="$PWD/.venv/bin:$PATH" VERL_PLATFORM=cpu HF_HUB_OFFLINE=1 RAY_AUTH_MODE=disabled
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} TQ_NUM_THREADS=2
  export TORCHDYNAMO_DISABLE=1 # or vLLM compiles a sampling function in C++ at every start
}

# Two runs in one folder would write over each other's checkpoints. The lock lasts as long as any process of the run.
only_one_run_in() {
  [ "${LOCKED:-}" = "$1" ] && return
  exec 9> "$1/.lock"
  flock -n 9 || { echo "rema-verl: error: $1: another run is still writing here" >&2; exit 2; }
  export LOCKED=$1
}

# With SMOKE=1 a recipe's own files may be missing (files given by hand may not): see data_prep/build_smoke.py.
need() {
  DATA_COMMAND=$1
  local file
  [ "${PRINT_OVERRIDES:-0}" = 1 ] || { [ "$SMOKE" = 1 ] && [ -z "$GIVEN_FILES" ]; } && return
  for file in "${@:2}"; do
    [ -e "$file" ] || { echo "rema-verl: error: $file: no such file; run $DATA_COMMAND first" >&2; exit 2; }
  done
}

# precheck CONFIG ARG...: what main_ppo would refuse half a minute of imports later, as far as it can be known without
# them. With SMOKE=1 the inputs are made afterwards, and are not looked at.
precheck() {
  local settings=()
  [ "$SMOKE" != 1 ] || { cpu_environment; settings=(--settings-only); }
  python -m rema_verl.checks "${settings[@]}" --config-name "$@" || exit
}

# The model that the cold start NAME left.
cold_start() {
  local model=$RUNS/$1/model
  [ "${PRINT_OVERRIDES:-0}" = 1 ] || [ "$SMOKE" = 1 ] || [ -e "$model" ] \
    || { echo "rema-verl: error: $model: no such model; make it as the head of $0 says, or set MODEL" >&2; exit 2; }
  echo "$model"
}

# smoke_overrides CONFIG FOLDER YAML... -- OVERRIDE...: make the inputs in FOLDER, unless they are there, and set
# `extra`, which comes last on the command line, so that it outranks what the recipe sets there.
smoke_overrides() {
  local config=$1 inputs=$2 files=()
  shift 2
  while [ "$1" != -- ]; do files+=("$1"); shift; done
  shift
  mkdir -p "$inputs"
  printf '%s\n' "$@" > "$inputs/recipe.txt"
  python data_prep/build_smoke.py --config "$config" --overrides "$inputs/recipe.txt" --data "$DATA_COMMAND" \
    --settings "${files[@]}" --out "$inputs"
  mapfile -t extra < "$inputs/overrides.txt"
}

launch() {
  local config=$1 name=$2
  shift 2
  [ "$SMOKE" != 1 ] || name=smoke_$name
  local run=$RUNS/$name extra=()
  [ "$config" != rema_trainer ] || set -- rema.trajectories.folder="$run/trajectories" "$@"
  set -- hydra.run.dir="$run/hydra" \
    trainer.project_name=rema-verl trainer.experiment_name="$name" \
    trainer.default_local_dir="$run/checkpoints" \
    trainer.rollout_data_dir="$run/rollouts" trainer.validation_data_dir="$run/validation" \
    "$@"
  if [ "${PRINT_OVERRIDES:-0}" = 1 ]; then
    printf '%s\n' "$@"
    exit
  fi
  precheck "$config" "$@"
  mkdir -p "$run/metrics"
  only_one_run_in "$run"
  [ "$SMOKE" != 1 ] || "${config}_smoke" "$run/inputs" "$@"
  # one metrics file per launch: verl would overwrite it when a run resumes
  export VERL_FILE_LOGGER_PATH=$run/metrics/$(date +%Y%m%d-%H%M%S).jsonl
  python -m verl.trainer.main_ppo --config-name "$config" "$@" "${extra[@]}"
}

train() { launch rema_trainer "$@"; }

rema_trainer_smoke() {
  smoke_overrides rema_trainer "$1" rema_verl/config/device/cpu.yaml rema_verl/config/size/smoke.yaml -- "${@:2}"
}

# alternate NAME ITERATIONS MIN MAX FILTER... -- ARG...: ReMA's Algorithm 1. In each iteration first reasoning learns, then
# meta_thinking, in a run of its own that starts from both models as they are, on those questions of TRAIN_FILES that
# they solve with a rate from MIN to MAX. What is done is not done again. With SMOKE=1 one iteration, unfiltered.
alternate() {
  local name=$1 iterations=$2 min=$3 max=$4 filter=() i role other prefix=
  shift 4
  while [ "$1" != -- ]; do filter+=("$1"); shift; done
  shift
  [ "$SMOKE" != 1 ] || { iterations=1 prefix=smoke_; }
  [ "$SMOKE" = 1 ] || [ "${PRINT_OVERRIDES:-0}" = 1 ] \
    || precheck rema_trainer "$@" data.train_files="$TRAIN_FILES" actor_rollout_ref.model.path="$MODEL" \
      rema.roles.meta_thinking.trainable=false # before the questions are filtered, which takes hours
  local -A model=()
  for ((i = 1; i <= iterations; i++)); do
    for role in reasoning meta_thinking; do
      [ $role = reasoning ] && other=meta_thinking || other=reasoning
      local phase=${name}_${i}_$role questions=$TRAIN_FILES arguments=()
      local run=$RUNS/$prefix$phase
      if [ ! -e "$run/model" ]; then
        if [ "$SMOKE" != 1 ] && [ "${PRINT_OVERRIDES:-0}" != 1 ]; then
          python data_prep/filter_difficulty.py --data "$TRAIN_FILES" --out "$run/questions" --role $role \
            --run "${model[meta_thinking]:-$MODEL}" --reasoning-model "${model[reasoning]:-$MODEL}" \
            --min "$min" --max "$max" --allow-missing --gpus "${GPUS:-8}" "${filter[@]}"
          questions=$run/questions/filtered.parquet
        fi
        [ $role = meta_thinking ] || arguments+=(rema.answers_per_plan=1) # they reward the plan
        [ -z "${model[$role]:-}" ] || arguments+=("rema.roles.$role.model_path=${model[$role]}")
        [ -z "${model[$other]:-}" ] || arguments+=("rema.roles.$other.model_path=${model[$other]}")
        train "$phase" "$@" data.train_files="$questions" actor_rollout_ref.model.path="$MODEL" \
          "rema.roles.$other.trainable=false" "${arguments[@]}"
        local step; step=$(cat "$run/checkpoints/latest_checkpointed_iteration.txt")
        ln -sfn "checkpoints/global_step_$step/actor/$role/huggingface" "$run/model"
      fi
      model[$role]=$run/model
    done
  done
}

sft() {
  local name=$1; shift
  [ "$SMOKE" != 1 ] || name=smoke_$name
  local run=$RUNS/$name workers=${GPUS:-8} extra=()
  set -- hydra.run.dir="$run/hydra" \
    trainer.project_name=rema-verl trainer.experiment_name="$name" \
    trainer.default_local_dir="$run/checkpoints" \
    trainer.n_gpus_per_node="$workers" \
    "$@"
  if [ "${PRINT_OVERRIDES:-0}" = 1 ]; then
    printf '%s\n' "$@"
    exit
  fi
  precheck sft_trainer_engine "$@"
  mkdir -p "$run/metrics"
  only_one_run_in "$run"
  if [ "$SMOKE" = 1 ]; then
    workers=1
    smoke_overrides sft_trainer_engine "$run/inputs" rema_verl/config/size/smoke_sft.yaml -- "$@"
  fi
  export VERL_FILE_LOGGER_PATH=$run/metrics/$(date +%Y%m%d-%H%M%S).jsonl
  torchrun --standalone --nproc_per_node="$workers" -m verl.trainer.sft_trainer "$@" "${extra[@]}"
  ln -sfn "checkpoints/global_step_$(cat "$run/checkpoints/latest_checkpointed_iteration.txt")/huggingface" "$run/model"
}

# tiny_cold_start FOLDER SEED STEPS ARG...: verl's SFT trainer on CPU, from FOLDER/data/model on FOLDER/data/sft.parquet.
# The result is linked as FOLDER/model. What is there already is not made again.
tiny_cold_start() {
  local folder=$1 seed=$2 steps=$3
  shift 3
  local tuned=$folder/cold_start/global_step_$steps/huggingface
  if [ ! -e "$tuned/model.safetensors" ]; then
    python recipes/watch.py --title "cold start" --log "$folder/cold_start.log" --steps "$steps" -- \
      torchrun --standalone --nproc_per_node=1 -m verl.trainer.sft_trainer \
      hydra.run.dir="$folder/hydra_sft" \
      data.train_files="$folder/data/sft.parquet" \
      data.use_dynamic_bsz=False \
      model.path="$folder/data/model" \
      model.enable_gradient_checkpointing=False \
      +model.override_config.attn_implementation=sdpa \
      engine.strategy=fsdp2 \
      engine.model_dtype=fp32 \
      engine.dtype=float32 \
      +engine.mixed_precision.param_dtype=fp32 \
      engine.use_torch_compile=False \
      optim.lr=2e-3 \
      optim.betas='[0.9,0.95]' \
      optim.weight_decay=0.0 \
      optim.lr_scheduler_type=cosine \
      optim.lr_warmup_steps=20 \
      checkpoint.save_contents='[hf_model]' \
      trainer.device=cpu \
      trainer.seed="$seed" \
      trainer.default_local_dir="$folder/cold_start" \
      trainer.logger='[console]' \
      trainer.total_training_steps="$steps" \
      trainer.total_epochs=100 \
      trainer.save_freq="$steps" \
      trainer.resume_mode=disable \
      "$@"
  fi
  ln -sfn "$(realpath --relative-to="$folder" "$tuned")" "$folder/model"
}
