#!/bin/sh
# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
#
# Checks the handoff's model exhaustively: the protocol must pass, and each variant without one of its rules
# must fail. Takes seconds. Needs spin and a C compiler (Debian: apt-get install spin gcc).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
command -v spin >/dev/null || { echo "spin is missing: apt-get install spin"; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

check() { # check NAME WANTED [-DVARIANT]; WANTED: none, or what pan says of the first error
  name=$1 wanted=$2
  shift 2
  spin -a "$@" "$here/handoff.pml" >spin.log 2>&1 || { cat spin.log; exit 1; }
  "${CC:-cc}" -w -O2 -DSAFETY -DMEMLIM=2048 -o pan pan.c
  ./pan -m200000 >pan.log 2>&1 || { cat pan.log; exit 1; }
  states=$(sed -n 's/^ *\([0-9]*\) states, stored.*/\1/p' pan.log)
  grep -q 'max search depth too small\|reached -DMEMLIM' pan.log && { cat pan.log; exit 1; }
  if [ "$wanted" = none ]; then
    grep -q 'errors: 0' pan.log || { cat pan.log; exit 1; }
    echo "$name: no error in $states states"
  else
    grep -qF "$wanted" pan.log || { echo "$name: must fail with '$wanted', but:"; cat pan.log; exit 1; }
    echo "$name: fails, as it must ($wanted)"
  fi
}

wrong_byte='assertion violated ((d_cell[0]==h)&&(d_cell[1]==h))'
late_byte='assertion violated (d_owner==(i/2))'
hang='assertion violated ((p_owner==7)&&(d_owner==7))'
check 'handoff by push' none
check 'the same without timers' none -DNO_TIMERS
check 'accept on commit alone' "$wrong_byte" -DACCEPT_ON_COMMIT
check 'a count of arrivals, and re-posted writes' "$wrong_byte" -DCOUNT
check 'sources given back before their writes are quiesced' "$wrong_byte" -DEARLY_SOURCES
check 'blocks given back before the lease is quiet' "$late_byte" -DEARLY_BLOCKS
check 'writes that do not look at the lease' "$late_byte" -DNO_GATE
check 'each side allocates when the request arrives' "$hang" -DNO_TIMERS -DALLOCATE_AT_ONCE
