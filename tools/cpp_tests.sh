#!/usr/bin/env bash
# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
# Builds and runs the C++ tests: cpp_tests.sh [plain] [shim] [asan] [tsan]. Warnings are errors here. `shim` is the part of
# plain that runs the CUDA kernels' sources on the CPU, and faults seeded in them; asan runs the sound sources too, tsan
# does not, since they have one thread; SHIM=OFF leaves them out. SHORT=1 leaves out of tsan what repeats with two rails
# what others do with one, which takes minutes there. Sanitizers compile eight files as one, in half the time; UNITY=OFF
# compiles each alone, so that a changed file is all that is compiled again.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! printf '#include <doctest/doctest.h>\n' | "${CXX:-c++}" -x c++ -fsyntax-only - 2>/dev/null; then
  echo "The C++ tests need doctest. Debian, Ubuntu: apt-get install doctest-dev; Fedora: dnf install doctest-devel" >&2
  exit 1
fi
command -v cmake >/dev/null || PATH="$PWD/${VENV:-.venv}/bin:$PATH"
command -v cmake >/dev/null || { echo "The C++ tests need cmake. Debian, Ubuntu: apt-get install cmake" >&2; exit 1; }
for kind in "$@"; do
  unity=OFF debug=-g
  case $kind in
    plain | shim) sanitize="" ;;
    asan) sanitize=address,undefined unity=ON debug=-g1 ;;  # lines of a trace are all that is wanted
    tsan) sanitize=thread unity=ON debug=-g1 ;;
    *) echo "unknown kind '$kind': plain, shim, asan or tsan" >&2; exit 2 ;;
  esac
  echo "==> C++ tests: $kind"
  cmake -S . -B "build/cpp-$kind" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O2 $debug -DNDEBUG" -DKVXFER_SANITIZE="$sanitize" \
    -DCMAKE_UNITY_BUILD="${UNITY:-$unity}" \
    -DKVXFER_CUDA_SHIM="${SHIM:-ON}" -DKVXFER_TESTS=ON -DKVXFER_PYTHON=OFF -DKVXFER_CUDA=OFF -DKVXFER_WERROR=ON >"build-$kind.log" || { cat "build-$kind.log"; exit 1; }
  target=all tests=.
  [ "$kind" = shim ] && target=cuda_shim_all tests=tests/cpp/cuda_shim
  cmake --build "build/cpp-$kind" --parallel "${JOBS:-2}" --target "$target"
  leave_out=()
  [ "$kind" = tsan ] && [ -n "${SHORT:-}" ] && leave_out=(-E '_two_rails$')
  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1 \
    ctest --test-dir "build/cpp-$kind/$tests" "${leave_out[@]}" --output-on-failure --timeout 300
done
