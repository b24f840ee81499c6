/* SPDX-FileCopyrightText: The kvxfer authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * Cancel and retry over two tcp lanes: a write is cut into two stripes, each for one cell and on any lane; it may be
 * cancelled at any time, also in the middle of a stripe, whose body is then padding; ABORT goes down each lane; the
 * retry writes the same cells. docs/wire_format.md has the rules; formal/check.sh runs this model and the variants.
 *
 * A lane is a FIFO. The receiver of a lane looks whether bytes are wanted and then stores them, in two steps, as if
 * each lane had a thread of its own: more than today's one progress thread does (see ONE_THREAD). A lane, or the
 * whole sender, may stop for ever at any point. Left out: gates (gate.pml), reads, messages.
 *
 * Holds: what is accepted is whole and of one attempt; no byte of an earlier attempt, nor its padding, lands after a
 * later one was accepted; everything begun gets its verdict, accepted or refused.
 *
 *   -DNO_HOLD               a stripe does not wait for the ABORTs that other lanes have yet to bring
 *   -DNO_HOLD -DONE_THREAD  passes: when looking and storing is one step, the first ABORT, seen on any lane, sinks
 *                           the rest of its attempt on all of them
 *   -DNO_HOLD -DONE_THREAD -DOWN_LANE_ONLY   ... but not if it sinks it on its own lane alone
 *   -DNO_TRAILER            the trailer does not tell padding from bytes
 *   -DONE_ABORT             ABORT goes down lane 0 alone: the retry waits for ever
 */
#ifndef A
#define A 3 /* attempts */
#endif
#define PADDING 9

#define STRIPE 1
#define BODY 2
#define TRAILER 3
#define ABORT 4
chan lane[2] = [4] of { byte, byte, byte, byte }; /* kind, attempt, cell, cancel count or value or honest */

byte attempt;         /* the sender's present one */
byte cut[A];          /* stripes begun */
byte cancels;         /* attempts cancelled so far: those before `attempt` */
byte aborts_sent[2];

byte cell[2];         /* the owner's memory */
byte aborts_seen[2];  /* by lane */
byte aborts_of[A];
byte landed[A];
bool accepted[A], refused[A];

proctype send(byte l) {
  byte a, c;
end:
  do
  :: atomic { aborts_sent[l] < cancels && nfull(lane[l]) -> aborts_sent[l]++; a = aborts_sent[l];
#ifdef ONE_ABORT
      if :: l == 0 -> lane[l] ! ABORT, a - 1, 0, a :: else fi
#else
      lane[l] ! ABORT, a - 1, 0, a
#endif
    }
  :: atomic { aborts_sent[l] == cancels && cut[attempt] < 2 && nfull(lane[l]) ->
      a = attempt; c = cut[a]; cut[a]++;
      lane[l] ! STRIPE, a, c, cancels };
    /* the body leaves later; if the attempt was cancelled meanwhile, as padding */
    atomic { nfull(lane[l]) -> lane[l] ! BODY, a, c, (a == attempt -> a + 1 : PADDING) };
#ifdef NO_TRAILER
    lane[l] ! TRAILER, a, c, 1
#else
    atomic { nfull(lane[l]) -> lane[l] ! TRAILER, a, c, a == attempt } /* honest, and if so the body was */
#endif
  od
}

/* Its user gives up and tries again. What was not begun needs no ABORT, so that one is left out. */
proctype cancel() {
end:
  do
  :: atomic { attempt < A - 1 && cut[attempt] > 0 -> attempt++; cancels++ }
  od
}

#ifdef OWN_LANE_ONLY
#define wanted(a) (!refused[a] && aborts_seen[l] <= a)
#else
#define wanted(a) (!refused[a] && aborts_of[a] == 0)
#endif

inline store(a, c, v) {
  assert((a >= 1 || !accepted[1]) && (a >= A - 1 || !accepted[A - 1]));
  cell[c] = v
}

proctype receive(byte l) {
  byte kind, a, c, v;
end:
  do
  :: lane[l] ? kind, a, c, v ->
    if
    :: kind == ABORT -> atomic {
        aborts_seen[l] = v;
        aborts_of[a]++;
        if :: aborts_of[a] == 2 && !accepted[a] -> refused[a] = true :: else fi }
    :: kind == STRIPE ->
#ifndef NO_HOLD
      aborts_seen[0] >= v && aborts_seen[1] >= v
#else
      aborts_seen[l] >= v
#endif
#ifdef ONE_THREAD
    :: atomic { kind == BODY -> if :: wanted(a) -> store(a, c, v) :: else fi }
#else
    :: kind == BODY -> if :: wanted(a) -> store(a, c, v) :: else fi
#endif
    :: kind == TRAILER -> atomic {
        if
        :: wanted(a) && v -> landed[a]++;
          if
          :: landed[a] == 2 -> accepted[a] = true; assert(cell[0] == a + 1 && cell[1] == a + 1)
          :: else
          fi
        :: wanted(a) && !v -> refused[a] = true
        :: else
        fi }
    fi
  od
}

init {
  byte i;
  atomic { run send(0); run send(1); run receive(0); run receive(1); run cancel() }
  timeout -> atomic {
    for (i : 0 .. A - 1) { assert(cut[i] == 0 || accepted[i] || refused[i]) } }
}
