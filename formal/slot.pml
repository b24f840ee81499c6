/* SPDX-FileCopyrightText: The kvxfer authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * The slot word of shm: an initiator that may cancel a write at any time and then retries it to the same blocks
 * from the same memory, and an owner whose copiers (COPIERS of them) take the chunks. docs/thread_model.md has
 * the rules; formal/check.sh runs this model and the variants, each of which leaves out one rule and must fail.
 *
 * Nobody is obliged to move: a process, or one copier, that stops for ever at any point is among the runs.
 * One word stands for (slot, generation). Rings, bounds and the lease's gate (gate.pml) are left out: a record is
 * seen at once, in any order. A read is the same with the copy on the initiator's side.
 *
 * Holds: a request is accepted or cancelled, never both; only an accepted one is counted; its bytes are its own,
 * although the initiator reuses the source the moment its cancel has won; and they stay, whatever an earlier
 * attempt's copier still does.
 *
 *   -DNO_WAIT        a request starts while a copier is inside a cancelled one (fails with 2 copiers, not with 1)
 *   -DLOOK_FIRST     a copier looks at the word before it counts itself inside
 *   -DNO_CAS         the owner looks at the word and then stores ACCEPTED
 *   -DACCEPT_FIRST   the owner accepts, then copies
 *   -DCOUNT_FIRST    the arrival is counted before the word is ACCEPTED
 */
#ifndef COPIERS
#define COPIERS 2
#endif
#ifndef R
#define R 3 /* attempts */
#endif
#define N 2 /* chunks of each */
#define POISON 9

#define FREE 0
#define POSTED 1
#define ACCEPTED 2
#define CANCELLED 3

byte word[R];      /* in the control segment, written by both */
byte source[N];    /* the initiator's memory, rewritten for each attempt */
byte block[N];     /* the owner's; attempt r brings the value r + 1 */
byte handed[R];    /* chunks that copiers took */
byte inside[R];    /* copiers inside */
byte copied[R];
bool counted[R];
bool gave_up[R];   /* what the initiator believes */
byte latest;

#ifdef NO_WAIT
#define may_start(r) true
#else
#define dead(q, r) ((q) >= (r) || word[q] != CANCELLED || inside[q] == 0)
#define may_start(r) (dead(0, r) && dead(R - 2, r))
#endif

proctype initiator() {
  byte r;
  do
  :: r < R ->
    source[0] = r + 1;
    source[1] = r + 1;
    atomic { word[r] = POSTED; latest = r }
    if
    :: word[r] == ACCEPTED -> break
    :: atomic { word[r] == POSTED -> word[r] = CANCELLED; gave_up[r] = true }
    fi;
    r++
  :: else -> break
  od;
  source[0] = POISON; /* done or given up for good: the memory is somebody else's */
  source[1] = POISON
}

inline accept(r) {
#ifdef COUNT_FIRST
  counted[r] = true;
#endif
  if
#ifdef NO_CAS
  :: word[r] == POSTED -> word[r] = ACCEPTED; counted[r] = true
#else
  :: atomic { word[r] == POSTED -> word[r] = ACCEPTED }; counted[r] = true
#endif
  :: else /* cancelled: its bytes are not mentioned again */
  fi
}

/* A chunk of some attempt whose record is here. Copiers pick under the pool's mutex. */
#ifdef LOOK_FIRST
#define pick(x) atomic { word[x] == POSTED && handed[x] < N && may_start(x) -> r = x; i = handed[x]; handed[x]++ }
#else
#define pick(x) atomic { word[x] != FREE && handed[x] < N && may_start(x) -> \
    r = x; i = handed[x]; handed[x]++; inside[x]++ }
#endif

proctype copier() {
  byte r, i, v;
end:
  do
  :: if :: pick(0) :: pick(1) :: pick(R - 1) fi;
#ifdef LOOK_FIRST
    inside[r]++;
#endif
#ifdef ACCEPT_FIRST
    if :: i == 0 -> accept(r) :: else fi;
#endif
    if
#ifndef LOOK_FIRST
    :: word[r] == CANCELLED
    :: word[r] != CANCELLED ->
#else
    :: true ->
#endif
      v = source[i];
      block[i] = v;
      copied[r]++
    fi;
    inside[r]--;
#ifndef ACCEPT_FIRST
    /* whoever finds that all is copied; if both do, the word changes once */
    if :: copied[r] == N -> accept(r) :: else fi
#endif
  od
}

/* At any time: */
proctype watch() {
  byte r;
  atomic {
    for (r : 0 .. R - 1) {
      assert(!(gave_up[r] && word[r] == ACCEPTED));              /* never both */
      assert(!counted[r] || word[r] == ACCEPTED);                /* only what is accepted is counted */
      assert(word[r] != ACCEPTED || (block[0] == r + 1 && block[1] == r + 1)) /* its bytes, and they stay */
    }
  }
}

init {
  atomic {
    run initiator(); run watch(); run copier();
#if COPIERS > 1
    run copier()
#endif
  }
}
