#!/usr/bin/env bash
# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
# `make gpu-check`: the kernels on this machine's NVIDIA GPU, offline, with its own python, torch, triton and nvcc.
# Builds, compares every GPU kernel with float64, runs compute-sanitizer where present, measures, and writes
# bench/results/gpu-NAME.json. No virtual environment, no cmake, no download: such machines often have neither.
#   --dry-run   say what would be done here, and what is missing; needs no GPU
#   --no-bench  leave the measurements out
# FlashInfer is measured beside ours where python can import it. COMPILE_LIMIT_S=150; CHECK_LIMIT_S=150: of each check; BENCH_BUDGET_S=120: no row is begun later.
# Exit codes: 0 all good, 1 something failed, 2 wrong argument, 3 no GPU here, 4 a tool is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
dry=no bench=yes

usage() { sed -n '4,10s/^# //p' "$0"; }
die() { echo "gpu-check: $2" >&2; exit "$1"; }
for argument in "$@"; do
  case $argument in
    --dry-run) dry=yes ;;
    --no-bench) bench=no ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; die 2 "unknown argument '$argument'" ;;
  esac
done

nvcc=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null || true)
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
versions=$("$PYTHON" -c 'import sys, numpy, torch; print(sys.version.split()[0], torch.__version__)' 2>/dev/null || true)
gpu=$(nvidia-smi --query-gpu=name,compute_cap --format=csv,noheader 2>/dev/null | head -1 || true)

echo "gpu:               ${gpu:-none (nvidia-smi finds no NVIDIA GPU)}"
echo "nvcc:              ${nvcc:-not found on PATH or in /usr/local/cuda/bin}"
echo "compute-sanitizer: ${sanitizer:-not found; that step is left out}"
echo "python, torch:     ${versions:-$PYTHON cannot import numpy and torch}"

capability=${gpu##*, }
case $capability in
  9.0) arch=90a ;;
  *) arch=${capability/./} ;;
esac
modules=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))' 2>/dev/null || true)
target=python/kvxfer/_kernels_cuda$modules

if [ $dry = yes ]; then
  echo "would compile $(ls csrc/kernels/cuda/*.cu | wc -l) files for ${gpu:+sm_$arch}${gpu:-the architecture of a GPU} into $target,"
  echo "run tools/gpu_check/checks.py${sanitizer:+, again under $sanitizer --quick,}"
  [ $bench = yes ] && echo "run tools/gpu_check/bench.py, and write bench/results/gpu-NAME.json"
  exit 0
fi
[ -n "$gpu" ] || die 3 "this machine has no NVIDIA GPU that nvidia-smi can see; nothing was run"
[ -n "$nvcc" ] || die 4 "nvcc is needed to build the kernels: put it on PATH"
[ -n "$versions" ] || die 4 "$PYTHON needs numpy and torch; PYTHON=... names another one"

# The headers of pybind11 come with torch; version 3 is what the bindings are written for.
pybind=$("$PYTHON" -c 'import os, torch; print(os.path.join(os.path.dirname(torch.__file__), "include"))')
python_include=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -f "$pybind/pybind11/pybind11.h" ] || die 4 "no pybind11 in $pybind"
objects=build/gpu-check
rm -rf $objects  # never link what an older source left
mkdir -p $objects
started=$SECONDS
echo "==> 1/4 Compiling for sm_$arch"
bindings=()
for source in csrc/bindings/kernels_cuda.cpp csrc/bindings/errors.cpp; do
  "${CXX:-c++}" -std=c++20 -O2 -fPIC -fvisibility=hidden -Icsrc -isystem "$pybind" -isystem "$python_include" \
    -isystem "$(dirname "$nvcc")/../include" -c $source -o $objects/"$(basename $source)".o &
  bindings+=($!)
done
ls -S csrc/kernels/cuda/*.cu | timeout "${COMPILE_LIMIT_S:-150}" xargs -P "$(nproc)" -I{} sh -c \
  '"$0" -std=c++17 -O3 -gencode=arch=compute_$1,code=sm_$1 -Icsrc -Xcompiler=-fPIC -Xptxas=-warn-spills --Werror=all-warnings -lineinfo -c {} -o "$2/$(basename {}).o"' \
  "$nvcc" "$arch" $objects || die 1 "the kernels do not compile, or not within ${COMPILE_LIMIT_S:-150} s"
for job in "${bindings[@]}"; do wait "$job"; done
"$nvcc" -shared -cudart static -o "$target" $objects/*.o
echo "    $((SECONDS - started)) s"

# Checks are bound by the host and by Triton's compiler, so they run side by side; each has its time limit.
results=build/gpu-check/checks
mkdir -p $results
declare -A running
start() {  # NAME SECONDS COMMAND...
  local name=$1 limit=$2
  shift 2
  timeout "$limit" "$@" >"$results/$name.log" 2>&1 &
  running[$name]=$!
}
finish() {  # prints each log; fails if one failed
  local name failed=""
  for name in "${!running[@]}"; do
    wait "${running[$name]}" && continue
    failed+=" $name"
    tail -20 "$results/$name.log"
  done
  grep -hE "^  (cuda|triton) " "$results"/*.log || true
  [ -z "$failed" ] || die 1 "failed, or out of time:$failed"
}
checks="tools/gpu_check/checks.py" limit=${CHECK_LIMIT_S:-150}
echo "==> 2/4 Every kernel against float64"
start cuda $limit "$PYTHON" $checks --backend cuda --json $results/cuda.json
for check in decode prefill mla; do
  start triton_$check $limit "$PYTHON" $checks --backend triton --only $check --json $results/triton_$check.json
done
start triton_rest $limit "$PYTHON" $checks --backend triton --not decode --not prefill --not mla --json $results/triton_rest.json
if [ -n "$sanitizer" ]; then
  echo "==> 3/4 Beside it compute-sanitizer: memcheck racecheck synccheck initcheck"
  for tool in memcheck racecheck synccheck initcheck; do
    start $tool $limit "$sanitizer" --tool $tool --error-exitcode 1 --target-processes all \
      "$PYTHON" $checks --quick --backend cuda
  done
else
  echo "==> 3/4 compute-sanitizer is not on this machine: left out"
fi
finish
echo "    $((SECONDS - started)) s"
if [ $bench = yes ]; then
  echo "==> 4/4 Measurements"
  timeout 180 "$PYTHON" tools/gpu_check/bench.py --checks $results --budget-s "${BENCH_BUDGET_S:-120}" ||
    die 1 "the measurements failed (or took more than 180 s)"
fi
echo "gpu-check: all good in $((SECONDS - started)) s"
