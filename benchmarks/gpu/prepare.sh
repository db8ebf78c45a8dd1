#!/usr/bin/env bash
# Fill the git-ignored .gpu/ with what run.sh needs on a machine without a network: bash benchmarks/gpu/prepare.sh
#
# wheels/   this package and the requirements that such a machine lacks, for Python $PYTHON_VERSION (default 3.12)
# rows/     rows of earlier runs, which are not measured again
# commit    hash of the measured commit
#
# $PYTHON sets the interpreter whose pip downloads the wheels, $INPUTS a folder other than .gpu.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
inputs=${INPUTS:-.gpu}
limit=60 # MiB of the inputs and the tracked files that run.sh reads
tracked=(benchmarks/gpu tests/data/golden)
missing=(catalogue pycocotools open_clip_torch ftfy wcwidth)

rm -rf "$inputs/wheels" "$inputs/rows" "$inputs/commit"
mkdir -p "$inputs/wheels" "$inputs/rows"
platforms=()
for version in 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${version}_x86_64"); done
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$inputs/wheels" .
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
  --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" --platform manylinux2014_x86_64 \
  --constraint constraints.txt --dest "$inputs/wheels" "${missing[@]}"
cp benchmarks/results/gpu/*.jsonl "$inputs/rows/" 2>/dev/null || true
commit=$(git rev-parse HEAD)
git diff --quiet HEAD || commit+=" with changes"
echo "$commit" >"$inputs/commit"

size=$({ git ls-files -z "${tracked[@]}" && find "$inputs" -type f -print0; } | xargs -0 du --apparent-size -cb | awk 'END { print int($1 / 1048576) + 1 }')
echo "$inputs: $(find "$inputs/wheels" -name '*.whl' | wc -l) wheels, $(cat "$inputs"/rows/*.jsonl 2>/dev/null | wc -l) rows; with ${tracked[*]} $size MiB"
if ((size > limit)); then
  echo "error: more than $limit MiB; use fewer wheels or rows" >&2
  exit 1
fi
