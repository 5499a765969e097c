#!/usr/bin/env bash
# Everything that wants a GPU: build, parity, timings, the report in docs/results.md, and
# compute-sanitizer, which is last because nobody knows how long it takes. Needs a GPU, torch with
# CUDA, nvcc, a C++ compiler, CMake and setuptools; the tests want pytest (and its plugins xdist and
# timeout, by which they survive a kernel that does not), the sanitizer compute-sanitizer. No
# network, and nothing is installed: the package is built in place.
#
#   bench/gpu.sh             all of it; goes on after a step that fails, and names those at the end
#   bench/gpu.sh PART...     in pieces: of build, test, time, compare, report and sanitize those that
#                            are named. Each leaves its rows in out/gpu/, from which report is made
#   bench/gpu.sh --dry-run   without a GPU: every step in words, checked as far as it can be here
#   bench/gpu.sh --dry-run --build   and builds what it would, where nvcc is; that takes minutes
#
# Nothing that runs on the GPU may hang the rest: it is ended after a time. The decode step is timed
# first, before parity and the rest, so that a lease of ten minutes leaves its figures behind.
# PYTHON picks the interpreter; LESS_CUDA_ARCHS the architectures, else this machine's GPUs' own;
# LESS_CUDA_HEAD_DIMS the head dims, else 64 and 128.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
build=build/gpu
program=$build/bench/cuda/less_gpu
rows=out/gpu
dry=0 building=0
failed=()
all=(build test time compare report sanitize)
parts=()
ops=(chunk_attention prompt_scores compact feature_map fold quantize)

usage() {
  echo "bench/gpu.sh: usage: bench/gpu.sh [--dry-run [--build]] [${all[*]}]" >&2
  exit 2
}

for argument in "$@"; do
  case " --dry-run --build ${all[*]} " in
    *" $argument "*) ;;
    *) usage ;;
  esac
  case $argument in
    --dry-run) dry=1 rows=out/gpu-dry ;;
    --build) building=1 ;;
    *) parts+=("$argument") ;;
  esac
done
if ((building && !dry)); then usage; fi
if ((${#parts[@]} == 0)); then parts=("${all[@]}"); fi

# wanted PART: whether this call does it.
wanted() { [[ " ${parts[*]} " == *" $1 "* ]]; }

# step NAME COMMAND...: runs it, or in a dry run prints it.
step() {
  local name=$1
  shift
  printf '\n== %s\n   %s\n' "$name" "$*"
  if ((dry)); then return; fi
  local begin=$SECONDS
  "$@" || failed+=("$name")
  printf '   %s: %d s\n' "$name" $((SECONDS - begin))
}

# limited SECONDS NAME COMMAND...: a step that is ended after so many.
limited() {
  local limit=$1 name=$2
  shift 2
  step "$name" timeout --kill-after=10 "$limit" "$@"
}

# measure SECONDS NAME ROWS COMMAND...: whose output is rows, kept in a file of their own.
measure() {
  local limit=$1 name=$2 file=$rows/$3.jsonl
  shift 3
  limited "$limit" "$name" bash -c "set -o pipefail; $* | tee $file"
}

# check COMMAND...: in a dry run, what stands in for the step before it.
check() {
  if ((!dry)); then return; fi
  printf '   checked by: %s\n' "$*"
  "$@" || failed+=("dry run: $*")
}

# skip NAME REASON: a step that cannot run has failed; a dry run only says so.
skip() {
  printf '\n== %s\n   not here: %s\n' "$1" "$2"
  if ((!dry)); then failed+=("$1: $2"); fi
}

finish() {
  if ((${#failed[@]} == 0)); then exit 0; fi
  printf '\nbench/gpu.sh: failed:\n' >&2
  printf '  %s\n' "${failed[@]}" >&2
  exit 1
}

# Prints what this Python finds of the build's needs, a line each; nothing where one is missing.
tool() { "$python" -c "import sys; sys.path.insert(0, 'tools'); $1" || true; }

command -v "$python" >/dev/null || { echo "bench/gpu.sh: no $python was found" >&2; exit 1; }
cmake=$(tool 'import native; print(native.require_cmake())')
torch=$(tool 'import native; print(native.require_torch())')
setuptools=$(tool 'import setuptools; print(setuptools.__version__)')
ninja=$(tool 'import native; print(native.find_ninja() or "")')
nvcc=$(tool 'import cuda_toolkit; print(cuda_toolkit.require().nvcc)')
mapfile -t toolkit < <("$python" tools/cuda_toolkit.py cmake 2>/dev/null)
printf '%s\n' "python      $("$python" --version)" "setuptools  $setuptools" "cmake       $cmake" \
  "torch       $torch" "nvcc        $nvcc"
if [ -z "$cmake" ] || [ -z "$torch" ] || [ -z "$setuptools" ] || { [ -z "$nvcc" ] && ((building || !dry)); }; then
  echo "bench/gpu.sh: nothing can be built without all of these" >&2
  exit 1
fi

if ((!dry)); then
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv || true
  "$python" -c 'import torch
print("torch", torch.__version__, "CUDA", torch.version.cuda, torch.cuda.get_device_name())' ||
    { echo "bench/gpu.sh: torch sees no GPU" >&2; exit 1; }
fi
archs=${LESS_CUDA_ARCHS:-$("$python" tools/cuda_toolkit.py archs)}
if ((dry)); then archs=${archs:-90a}; fi
export LESS_CUDA=on LESS_CUDA_ARCHS=${archs:-all}
# The shapes of gpu.cpp have these head dims; tests of others are skipped.
export LESS_CUDA_HEAD_DIMS=${LESS_CUDA_HEAD_DIMS:-64 128}
echo "for         $LESS_CUDA_ARCHS"
mkdir -p "$rows"
if ((${#parts[@]} == ${#all[@]})); then rm -f "$rows"/*.jsonl; fi

if wanted build; then
  step "build the package" "$python" setup.py -q build_ext --inplace
  if ((${#failed[@]})); then
    echo "bench/gpu.sh: nothing can be tested that was not built" >&2
    finish
  fi
  if ((building)); then
    check "$python" setup.py -q build_ext --inplace
    check "$python" -c 'import torch; from less import _cuda; print(_cuda.build_facts())'
  fi
  configure=("$cmake" --fresh -S . -B "$build" -DCMAKE_BUILD_TYPE=Release -DLESS_PYTHON=OFF
    -DLESS_BENCH_CUDA=ON -DLESS_CUDA=on "-DLESS_CUDA_ARCHS=$LESS_CUDA_ARCHS"
    "-DLESS_CUDA_HEAD_DIMS=$LESS_CUDA_HEAD_DIMS" "${toolkit[@]}")
  if [ -n "$ninja" ]; then configure+=(-G Ninja "-DCMAKE_MAKE_PROGRAM=$ninja"); fi
  compile=("$cmake" --build "$build" --parallel "${MAX_JOBS:-$(nproc)}" --target less_gpu)
  step "configure less_gpu" "${configure[@]}"
  step "build less_gpu" "${compile[@]}"
  if ((building)); then
    check "${configure[@]}"
    check "${compile[@]}"
    check "$program" --help
  fi
fi

# What matters most comes first: a lease may end at any time.
if wanted time; then
  measure 120 "time decode_step" decode_step "$program" --op decode_step
fi

if wanted test; then
  tests=(-m pytest -q -k "cuda and not emulated" tests/ops tests/test_cache_cuda.py)
  if "$python" -c 'import pytest' 2>/dev/null; then
    # Of several processes, one that a kernel took down or hangs in is replaced, and the rest goes on.
    plugins=()
    if "$python" -c 'import xdist' 2>/dev/null; then plugins+=(-n 4); fi
    if "$python" -c 'import pytest_timeout' 2>/dev/null; then
      plugins+=(--timeout 60 --timeout-method thread)
    fi
    limited 300 "parity on cuda" env LESS_REQUIRE_CUDA=1 OMP_NUM_THREADS=2 \
      "$python" "${tests[@]}" "${plugins[@]}"
    check "$python" "${tests[@]}" --collect-only -q -q
  else
    skip "parity on cuda" "pytest"
  fi
fi

if wanted time; then
  # A process each: an op that fails takes no other with it.
  for op in "${ops[@]}"; do
    measure 120 "time $op" "$op" "$program" --op "$op"
  done
  measure 60 "time dependent launches" dependent "$program" --dependent
  measure 60 "100,000 replays of one graph" soak "$program" --soak 100000
fi

if wanted compare; then
  rm -f "$rows/compare.jsonl"
  limited 300 "compare with full attention" "$python" -m bench.gpu compare \
    --json "$rows/compare.jsonl"
  check "$python" -m bench.gpu compare --json "$rows/compare.jsonl" --dry-run
fi

if wanted report; then
  # Of all rows that there are, of earlier calls too.
  if cat "$rows"/*.jsonl >"$rows.jsonl" 2>/dev/null; then
    step "report" "$python" -m bench.gpu report --json "$rows.jsonl" --update docs/results.md
    check "$python" -m bench.gpu report --json "$rows.jsonl"
    limited 300 "model against measurement" "$python" -m bench.proof.timing --against "$rows.jsonl"
    check "$python" -m bench.proof.timing --help
  else
    skip "report" "rows in $rows"
  fi
fi

if wanted sanitize; then
  # A toolkit has it beside nvcc, or in a folder of its own.
  sanitizer=
  for folder in "" "${nvcc%/nvcc}/" "${nvcc%/bin/nvcc}/compute-sanitizer/" /usr/local/cuda/bin/; do
    sanitizer=$(command -v "${folder}compute-sanitizer" || true)
    if [ -n "$sanitizer" ]; then break; fi
  done
  if ((dry)) || [ -n "$sanitizer" ]; then
    for tool in memcheck racecheck initcheck synccheck; do
      limited 120 "compute-sanitizer $tool" "${sanitizer:-compute-sanitizer}" --tool "$tool" \
        --error-exitcode 1 "$program" --small
    done
  else
    skip "compute-sanitizer" "compute-sanitizer on PATH or in the toolkit"
  fi
fi

finish
