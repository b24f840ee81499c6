#!/usr/bin/env bash
# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
# Makes the virtual environment, after naming whatever the machine lacks and the command that installs it.
set -euo pipefail
python=${PYTHON:-python3}
venv=${VENV:-.venv}

lacks() { printf 'kvxfer needs %s.\n  Debian, Ubuntu: apt-get install %s\n  Fedora: dnf install %s\n' "$1" "$2" "$3" >&2; exit 1; }

command -v "$python" >/dev/null || lacks "Python 3.10 or newer ('$python' was not found)" "python3 python3-venv python3-dev" "python3 python3-devel"
"$python" - <<'PY' || lacks "Python 3.10 or newer ('$python' is $("$python" -V 2>&1)); name another with PYTHON=" python3 python3
import sys
sys.exit(sys.version_info < (3, 10))
PY
"$python" -c 'import venv, ensurepip' 2>/dev/null || lacks "Python's venv module" python3-venv python3
"$python" -c 'import sysconfig, os, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
  lacks "Python's C headers" python3-dev python3-devel
cxx=${CXX:-c++}
command -v "$cxx" >/dev/null || lacks "a C++20 compiler ('$cxx' was not found)" g++ gcc-c++
printf '#include <version>\n#include <span>\n#include <atomic>\nint main() { std::atomic<int> a{1}; a.notify_one(); return std::span<int>{}.size(); }\n' |
  "$cxx" -std=c++20 -x c++ -fsyntax-only - 2>/dev/null || lacks "a compiler that knows C++20 (GCC 11 or Clang 14; '$cxx' is $("$cxx" --version | head -n 1))" g++ gcc-c++

echo "==> 1/3 Making the virtual environment $venv ($("$python" -V))"
"$python" -m venv "$venv"
# pip 25.1 brought --group; the pip inside a new environment is as old as its Python.
"$venv/bin/python" -m pip install --upgrade 'pip>=25.1'
