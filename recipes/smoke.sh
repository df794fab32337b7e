#!/usr/bin/env bash
# Every recipe with SMOKE=1, two at a time: one line each, exit code 1 if any failed. `make smoke` runs this.
# A run takes 7 to 10 GiB and mostly waits for one core; about two minutes a recipe on two idle cores. Logs are in
# $RUNS/smoke_logs.
#
#   bash recipes/smoke.sh                  all (every script here that selects a +setting, and MPDF's)
#   bash recipes/smoke.sh recipes/vrp_*    some
#   JOBS=1 bash recipes/smoke.sh           one at a time
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
JOBS=${JOBS:-2}
for script in "$@"; do
  [ -f "$script" ] || { echo "rema-verl: error: $script: no such recipe" >&2; exit 2; }
done
[ "$JOBS" = 1 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
cpu_environment

[ $# -gt 0 ] || mapfile -t scripts < <(grep -l '[+]setting=' recipes/*.sh; ls recipes/mpdf_*_math.sh)
[ $# -eq 0 ] || scripts=("$@")
[ -d "${REMA_SHARED_DATA:=../shared/data}" ] && export REMA_SHARED_DATA || unset REMA_SHARED_DATA # rows for the tests
mkdir -p "$RUNS/smoke_logs"
export RUNS SMOKE=1

one() {
  local name start=$SECONDS result=ok
  name=$(basename "$1" .sh)
  local log=$RUNS/smoke_logs/$name.log
  bash "$1" > "$log" 2>&1 < /dev/null || result="FAILED ($log)"
  printf '%-40s %4d s  %s\n' "$name" $((SECONDS - start)) "$result"
  [ "$result" = ok ]
}
export -f one

if printf '%s\n' "${scripts[@]}" | xargs -P "$JOBS" -I{} bash -c 'one "$1"' _ {}; then
  echo "all ${#scripts[@]} recipes ran"
else
  echo "of ${#scripts[@]} recipes some failed: see above"
  exit 1
fi
