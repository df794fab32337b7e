#!/usr/bin/env bash
# Make .venv with everything a machine without an accelerator needs: the package with its extras cpu and dev.
# Runs again only when setup.py has changed. PYTHON=python3.12 chooses the interpreter.
set -euo pipefail
case ${1:-} in
  -h | --help) sed -n '2,3s/^# //p' "$0"; exit ;;
  ?*) echo "rema-verl: error: $1: $0 takes no arguments" >&2; exit 2 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
STAMP=.venv/.rema-verl-$(cksum < setup.py | cut -d' ' -f1)
[ -e "$STAMP" ] && exit 0

need() { echo "rema-verl: $1 is missing; install it and run this again (Debian: apt-get install $2)" >&2; exit 2; }
command -v "$PYTHON" > /dev/null || need "$PYTHON" python3
"$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
  || { echo "rema-verl: $PYTHON is $("$PYTHON" -V 2>&1); this needs Python 3.10 to 3.12 (set PYTHON=...)" >&2; exit 2; }
"$PYTHON" -c 'import ensurepip' 2> /dev/null || need "Python's venv module" python3-venv
command -v patch > /dev/null || need patch patch
command -v flock > /dev/null || need flock util-linux
"$PYTHON" -c "import ctypes; ctypes.CDLL('libnuma.so.1')" 2> /dev/null || need "libnuma (vLLM's CPU build is linked to it)" libnuma1

echo "== installing into .venv (about 2 minutes)"
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
.venv/bin/python -m pip install --disable-pip-version-check -e '.[cpu,dev]' \
  | awk '/^(Collecting|Building|Installing)/ { print "   " substr($0, 1, 100); fflush() }'
.venv/bin/python - <<'PY'
import subprocess, sys, torch
if torch.version.cuda:
    sys.exit("rema-verl: pip chose a CUDA build of torch; point pip at PyTorch's CPU wheels and run this again (README)")
# PyPI's torchvision and torchaudio are linked to CUDA; beside a CPU torch they break imports, and text needs neither.
for package in ("torchvision", "torchaudio"):
    if subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True).returncode:
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "-q", "-y", package], check=True)
PY
touch "$STAMP"
