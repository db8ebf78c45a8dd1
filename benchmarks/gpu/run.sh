#!/usr/bin/env bash
# Measure on a GPU: bash benchmarks/gpu/run.sh [--device cpu] [--time-budget 450] [--only PART...]
#
# 1. Where the network is: bash benchmarks/gpu/prepare.sh      fills .gpu/ (wheels, rows of earlier runs)
# 2. On the GPU, in a copy of benchmarks/gpu/, tests/data/golden/ and .gpu/: bash benchmarks/gpu/run.sh
#    (`git sparse-checkout set benchmarks/gpu tests/data/golden` leaves no other folder in a working tree)
#    It needs Python 3.12 with torch, torchvision, transformers, accelerate, peft, timm, typer and rich, and no network.
#    It ends within --time-budget seconds, and writes rows.jsonl, log.txt and device.txt into $OUT (default: out/gpu).
#    Rows in .gpu/rows that the same device made are not measured again. A part that fails is a row with its reason.
# 3. Where the repository is: python benchmarks/gpu/collect.py FOLDER      commits nothing; adds the rows to
#    benchmarks/results/gpu/ and writes the tables of docs/benchmarks.md and README.md
#
# With --device cpu everything runs at tiny sizes. $PYTHON names another interpreter.
set -euo pipefail
started=$(date +%s)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python3}
inputs=.gpu
arguments=("$@")
for ((i = 0; i < ${#arguments[@]}; i++)); do
  if [[ ${arguments[i]} == --inputs ]]; then inputs=${arguments[i + 1]}; fi
done
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if compgen -G "$inputs/wheels/*.whl" >/dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --target "$site" "$inputs"/wheels/*.whl
  export PYTHONPATH=$site PYTHONSAFEPATH=1 # not the checkout, also in processes that are started from here
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
"$python" benchmarks/gpu/run.py --start-time "$started" "$@"
