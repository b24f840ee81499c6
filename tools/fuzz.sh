#!/usr/bin/env bash
# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
# Fuzzes one target, or all: fuzz.sh TARGET|all [20s|200000]: so many seconds, or so many runs. Default: 60s.
# What is found anew stays in build/fuzz/corpus; `fuzz.sh merge TARGET` puts the smallest inputs that cover it into
# tests/fuzz/corpus. A finding ends the run and leaves its input in build/fuzz.
set -euo pipefail
cd "$(dirname "$0")/.."
targets=(wire token handshake shm tcp verbs)
CXX=${FUZZ_CXX:-$(command -v clang++ clang++-{19,18,17,16,15,14} | head -1 || true)}
[ -n "$CXX" ] || { echo "Fuzzing needs clang with libFuzzer. Debian, Ubuntu: apt-get install clang-14 libclang-rt-14-dev" >&2; exit 1; }
command -v cmake >/dev/null || PATH="$PWD/${VENV:-.venv}/bin:$PATH"

build() {
  mkdir -p build/fuzz
  cmake -S . -B build/fuzz -DCMAKE_CXX_COMPILER="$CXX" -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="-O1 -gline-tables-only" -DKVXFER_FUZZ=ON -DKVXFER_TEST_HOOKS=ON \
    -DKVXFER_SANITIZE=address,undefined -DKVXFER_PYTHON=OFF -DKVXFER_CUDA=OFF >build/fuzz.log || { cat build/fuzz.log; exit 1; }
  cmake --build build/fuzz --parallel "${JOBS:-2}" --target "$@"
}

run() { # run TARGET LIMIT
  local limit=-runs=$2
  [[ $2 == *s ]] && limit=-max_total_time=${2%s}
  mkdir -p "build/fuzz/corpus/$1"
  echo "==> $1, $2"
  # One slow input is a finding too; so is one large allocation for what a stranger sent.
  # A script reaches much of the code each time: what is rare of it is not worth the counting.
  local entropic=1
  [[ $1 == handshake || $1 == shm || $1 == tcp || $1 == verbs ]] && entropic=0
  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 "build/fuzz/tests/fuzz/fuzz_$1" "$limit" -max_len=4096 -timeout=20 -entropic=$entropic \
    -malloc_limit_mb=64 -rss_limit_mb=2048 -print_final_stats=1 -artifact_prefix=build/fuzz/ \
    "build/fuzz/corpus/$1" "tests/fuzz/corpus/$1" 2>"build/fuzz/$1.log" || { tail -60 "build/fuzz/$1.log"; exit 1; }
  grep -E 'stat::(number_of_executed_units|average_exec_per_sec)|DONE' "build/fuzz/$1.log"
}

case ${1:?"which target: ${targets[*]}, all, or merge TARGET"} in
  merge)
    build "fuzz_$2"
    "build/fuzz/tests/fuzz/fuzz_$2" -merge=1 -max_len=4096 "tests/fuzz/corpus/$2" "build/fuzz/corpus/$2"
    ;;
  seeds)
    build fuzz_seeds
    build/fuzz/tests/fuzz/fuzz_seeds tests/fuzz/corpus
    ;;
  all)
    build "${targets[@]/#/fuzz_}"
    for target in "${targets[@]}"; do run "$target" "${2:-60s}"; done
    ;;
  *)
    build "fuzz_$1"
    run "$1" "${2:-60s}"
    ;;
esac
