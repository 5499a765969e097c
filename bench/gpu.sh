#!/usr/bin/env bash
# Everything that wants a GPU, in one go: build, parity, compute-sanitizer, timings, the report in
# docs/results.md. Needs nvcc, torch with CUDA, CMake and a GPU; no network.
#
#   bench/gpu.sh             all of it; goes on after a step that fails, and names those at the end
#   bench/gpu.sh --dry-run   without a GPU: every step in words, checked as far as it can be here
#
# PYTHON picks the interpreter; LESS_CUDA_ARCHS the architectures, else this GPU's own.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
build=build/gpu
program=$build/bench/cuda/less_gpu
rows=out/gpu.jsonl
dry=0
failed=()

case "${1-}" in
  "") ;;
  --dry-run) dry=1 rows=out/gpu-dry.jsonl ;;
  *)
    echo "bench/gpu.sh: usage: bench/gpu.sh [--dry-run]" >&2
    exit 2
    ;;
esac

# step NAME COMMAND...: runs it, or in a dry run prints it.
step() {
  local name=$1
  shift
  printf '\n== %s\n   %s\n' "$name" "$*"
  if ((dry)); then return; fi
  "$@" || failed+=("$name")
}

# check COMMAND...: in a dry run, what stands in for the step before it.
check() {
  if ((!dry)); then return; fi
  printf '   checked by: %s\n' "$*"
  "$@" || failed+=("dry run: $*")
}

# Whether a command is there; a dry run goes on without.
need() {
  if command -v "$1" >/dev/null; then return; fi
  if ((dry)); then
    echo "   not here: $1"
  else
    echo "bench/gpu.sh: no $1 was found" >&2
    exit 1
  fi
}

capability=9.0
for command in nvidia-smi nvcc cmake compute-sanitizer "$python"; do need "$command"; done
if ((!dry)); then
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv
  "$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
fi
architecture=${capability/./}
if [ "$architecture" = 90 ]; then architecture=90a; fi
export LESS_CUDA=on LESS_CUDA_ARCHS=${LESS_CUDA_ARCHS:-$architecture}
mkdir -p out
rm -f "$rows"

install=(-m pip install --no-build-isolation --no-deps --no-index)
step "build the package" "$python" "${install[@]}" --editable .
if ((${#failed[@]})); then
  echo "bench/gpu.sh: nothing can be tested that was not built" >&2
  exit 1
fi
check "$python" -c 'import sys; sys.path.insert(0, "tools"); import native
print("  ", native.require_cmake(), native.require_torch())'

tests=(-m pytest -q -k "cuda and not emulated" tests/ops tests/test_cache_cuda.py)
step "parity on cuda" env LESS_REQUIRE_CUDA=1 "$python" "${tests[@]}"
check "$python" "${tests[@]}" --collect-only -q -q

configure=(cmake -S . -B "$build" -Wno-dev -DCMAKE_BUILD_TYPE=Release -DLESS_PYTHON=OFF
  -DLESS_BENCH_CUDA=ON -DLESS_CUDA=on "-DLESS_CUDA_ARCHS=$LESS_CUDA_ARCHS")
compile=(cmake --build "$build" --parallel "${MAX_JOBS:-$(nproc)}" --target less_gpu)
step "configure less_gpu" "${configure[@]}"
step "build less_gpu" "${compile[@]}"
if ((dry)) && command -v nvcc >/dev/null; then
  check "${configure[@]}"
  check "${compile[@]}"
  check bash -c "$program --no-such-option; [ \$? = 2 ]"
fi

for tool in memcheck racecheck initcheck synccheck; do
  step "compute-sanitizer $tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
    "$program" --small
done

step "time the kernels" bash -c "set -o pipefail; $program | tee -a $rows"
step "100,000 replays of one graph" bash -c "set -o pipefail; $program --soak 100000 | tee -a $rows"

step "compare with full attention" "$python" -m bench.gpu compare --json "$rows"
check "$python" -m bench.gpu compare --json "$rows" --dry-run

step "report" "$python" -m bench.gpu report --json "$rows" --update docs/results.md
check "$python" -m bench.gpu report --json "$rows"

if ((${#failed[@]})); then
  printf '\nbench/gpu.sh: failed:\n' >&2
  printf '  %s\n' "${failed[@]}" >&2
  exit 1
fi
