#!/bin/sh
# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
#
# Checks the models exhaustively: each rule must hold, and each variant that leaves a rule out must fail, or the model
# would prove nothing. Two minutes. Needs spin and a C compiler (Debian: apt-get install spin gcc).
# `check.sh slot gate` checks these models alone.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
command -v spin >/dev/null || { echo "spin is missing: apt-get install spin"; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
only=" $* " model= total=0

check() { # check NAME WANTED [-DVARIANT]; WANTED: none, or what pan says of the first error
  name=$1 wanted=$2
  shift 2
  case $only in "  " | *" $model "*) ;; *) return 0 ;; esac
  spin -a "$@" "$here/$model.pml" >spin.log 2>&1 || { cat spin.log; exit 1; }
  "${CC:-cc}" -w -O1 -DSAFETY -DMEMLIM=2048 -o pan pan.c
  ./pan -m200000 >pan.log 2>&1 || { cat pan.log; exit 1; }
  states=$(sed -n 's/^ *\([0-9]*\) states, stored.*/\1/p' pan.log)
  total=$((total + states))
  grep -q 'max search depth too small\|reached -DMEMLIM' pan.log && { cat pan.log; exit 1; }
  if [ "$wanted" = none ]; then
    grep -q 'errors: 0' pan.log || { cat pan.log; exit 1; }
    echo "$model: $name: no error in $states states"
  else
    grep -qF "$wanted" pan.log || { echo "$model: $name: must fail with '$wanted', but:"; cat pan.log; exit 1; }
    echo "$model: $name: fails, as it must ($wanted)"
  fi
}

model=handoff
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

model=slot
wrong_byte='assertion violated ((word[r]!=2)||((block[0]==(r+1))&&(block[1]==(r+1))))'
check 'cancel, stop and retry, two copiers' none
check 'the same, one copier' none -DCOPIERS=1
check 'one copier needs no wait' none -DCOPIERS=1 -DNO_WAIT
check 'two start a retry while one is inside its cancelled predecessor' "$wrong_byte" -DNO_WAIT -DR=2
check 'a copier looks at the word, then counts itself' "$wrong_byte" -DLOOK_FIRST -DR=2
check 'the owner looks at the word, then stores ACCEPTED' 'assertion violated  !((gave_up[r]&&(word[r]==2)))' -DNO_CAS -DR=2
check 'accepted before it is copied' "$wrong_byte" -DACCEPT_FIRST -DR=2
check 'counted before the CAS' 'assertion violated ( !(counted[r])||(word[r]==2))' -DCOUNT_FIRST -DR=2

model=gate
check 'quiet, and then no byte' none
check 'a copier looks at the gate, then counts itself' 'assertion violated  !(reused)' -DLOOK_THEN_COUNT
check 'a revoker reads the count, then closes' 'assertion violated  !(reused)' -DCOUNT_THEN_CLOSE
check 'a refused copier leaves in silence' 'assertion violated (quiet&&(hooks==1))' -DSILENT_REFUSAL
check 'quiet is looked at and then stored' 'assertion violated (quiet&&(hooks==1))' -DNO_EXCHANGE

model=sleep
hang='assertion violated (head==4)'
check 'flags and fences' none
check 'no fence after the tail' "$hang" -DNO_FENCE_PRODUCER
check 'no fence after the sleeping flag' "$hang" -DNO_FENCE_CONSUMER
check 'no fence after the head' "$hang" -DNO_FENCE_ROOM
check 'no second look' "$hang" -DLOOK_ONCE
check 'room is made, and nobody looks who waits for it' "$hang" -DFORGET_STARVING

model=lend
hang='assertion violated (head==2)'
check 'callers that poll, rest or simply stop' none
check 'rest() is enough, without a watch that knows the time' none -DRESTS
check 'no time, and callers that simply stop' "$hang" -DNO_TIME
check 'a caller looks at epoll before it was lent' "$hang" -DLOOK_BEFORE_LENT
check 'a caller reads the eventfd' "$hang" -DHEAR_TOLD -DRESTS
check 'rest() writes, then withdraws' "$hang" -DWRITE_FIRST -DRESTS
check 'asleep after the watch, without a look' "$hang" -DSLEEP_AFTER_WATCH

model=aborts
wrong_byte='assertion violated ((cell[0]==(a+1))&&(cell[1]==(a+1)))'
check 'cancel and retry over two lanes' none
check 'no hold' "$wrong_byte" -DNO_HOLD
check 'no hold, but one receiving thread' none -DNO_HOLD -DONE_THREAD -DA=2
check 'no hold, one thread, an ABORT counts on its own lane' "$wrong_byte" -DNO_HOLD -DONE_THREAD -DOWN_LANE_ONLY
check 'padding that looks like bytes' "$wrong_byte" -DNO_TRAILER
check 'ABORT on one lane' 'assertion violated (((cut[i]==0)||accepted[i])||refused[i])' -DONE_ABORT

model=seqlock
stale='||((got[0]==1)&&(got[1]==1)))'
check 'a mapped read and its lease word' none
check 'no fence between copying and the look' "$stale" -DNO_READER_FENCE
check 'look, then copy' "$stale" -DWORD_FIRST
check 'no fence between revoking and reuse' "$stale" -DNO_OWNER_FENCE
check 'reuse, then revoke' "$stale" -DREUSE_FIRST
check 'a word without generation' "$stale" -DNO_GENERATION

model=credits
hang='assertion violated (ended==7)'
check 'a window of notifications' none
check 'a cancelled one keeps its credit' "$hang" -DKEEP_ON_CANCEL
check 'an open cancel gives it back' 'assertion violated (credits<=4)' -DBACK_AT_CANCEL
check 'a late refusal is forgotten' "$hang" -DFORGET_REFUSED
check 'drained ones told later than the window' "$hang" -DWHOLE_WINDOW

model=window
late='assertion violated (holder==l)'
check 'one window, many leases, a deaf writer' none
check 'bound again before the writer has drained' "$late" -DBIND_UNDRAINED
check 'drained is said before it is so' "$late" -DDRAINED_EARLY
check 'a window whose writer does not answer stays bound' "$late" -DNO_INVALIDATION
check 'the memory is taken back, then the window invalidated' "$late" -DQUIET_FIRST

model=repost
late='assertion violated  !(accepted)'
check 'chains that are posted again' none
check 'the old queue pair is not stopped' "$late" -DNO_FENCE
check 'everything in doubt is posted again' "$late" -DNO_QUESTION
check 'chains are counted' 'assertion violated (landed==3)' -DCOUNT

model=move
twice='assertion violated (a==s[me].taken)'
hang='assertion violated (ended||((s[0].taken==2)&&(s[1].taken==2)))'
check 'messages move, three rails, one failure' none
check 'the same, two failures' none -DFAILURES=2 -DN=1
check 'what was taken is said before the old queue pair is gone' "$twice" -DSAY_FIRST -DRAILS=2
check 'both sides count turns alike' 'assertion violated ((2==s[me].current)&& !(s[me].resumed))' -DSAME_TURN
check 'nobody looks for RESUME in one that stood by' "$hang" -DNOT_BEHIND -DRAILS=2 -DFAILURES=2
check 'a RESUME of a lower turn is followed' '|| !(s[me].resumed))' -DLAST_WINS -DRAILS=2

echo "$total states in all"
