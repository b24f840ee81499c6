/* SPDX-FileCopyrightText: The kvxfer authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * The handoff by push: two handoffs between a prefill and a decode worker with one block of two cells (layers)
 * each, so that blocks are reused at once. docs/handoff.md has the rules; formal/check.sh runs this model, and
 * the variants below, each of which leaves out one rule and must fail.
 *
 * Messages are sets: one that was sent can be received at any time, again and again, or never; this is loss,
 * doubling and reordering. Every timer may end at any time. A write reads its source cell at some time of its
 * own, lands in two steps around the lease's gate, and its acknowledgement may be lost.
 *
 *   -DACCEPT_ON_COMMIT   decode accepts without looking at the arrivals
 *   -DCOUNT              arrivals are a number, and a write whose acknowledgement was lost is posted again
 *   -DEARLY_SOURCES      prefill gives its block back on abort without waiting for its writes
 *   -DEARLY_BLOCKS       decode gives its block back when it begins to revoke
 *   -DNO_GATE            a write lands without looking at the lease
 *   -DALLOCATE_AT_ONCE   each side takes its block when the request arrives: can hang, as it does without timers
 *
 *   -DNO_TIMERS          nobody gives up by itself; the protocol must end all the same
 */
#define H 2 /* handoffs */
#define L 2 /* layers */
#define NONE 7
#define POISON 6

/* prefill's states */
#define QUEUED 0
#define OFFERED 1
#define GRANTED 2
#define SENDING 3
#define COMMITTED 4
#define CLOSING 5
#define CLOSED 6
/* decode's: EXPECTED, WAITING for blocks, RESERVED, ACCEPTING, CLOSING as above, ENDED */
#define EXPECTED 0
#define WAITING 1
#define RESERVED 2
#define ACCEPTING 3
#define ENDED 6

/* messages ever sent */
bool m_offer[H], m_grant[H], m_commit[H], m_abort_d[H], m_abort_p[H];

byte p[H];              /* prefill's state */
byte p_owner = NONE;    /* whose is prefill's block */
byte p_cell[L] = POISON;
byte posted[H];         /* layers posted */

byte d[H];
byte d_owner = NONE;
byte d_cell[L] = POISON;
bool gate[H];           /* the lease is open */
byte copiers[H];

/* a write, at index handoff * L + layer */
#define FREE 0
#define POSTED 1        /* its source is not read yet */
#define FLYING 2
#define COPYING 3
#define LANDED 4
#define REFUSED 5
byte w[4];              /* where it is */
byte data[4];
bool arrived[4];
byte count[H];
#define UNKNOWN 0
#define GOOD 1
#define BAD 2
byte seen[4];           /* what prefill knows of its end */
bool reposted[4];

#define W(h, l) ((h) * L + (l))
#ifdef EARLY_SOURCES
#define quiesced(h) (true)
#else
#define quiesced(h) (w[W(h,0)] != POSTED && w[W(h,1)] != POSTED && \
    (w[W(h,0)] == FREE || seen[W(h,0)] != UNKNOWN) && (w[W(h,1)] == FREE || seen[W(h,1)] != UNKNOWN))
#endif
#ifdef COUNT
#define full(h) (count[h] >= L)
#else
#define full(h) (arrived[W(h,0)] && arrived[W(h,1)])
#endif
#ifdef EARLY_BLOCKS
#define quiet(h) (!gate[h])
#else
#define quiet(h) (!gate[h] && copiers[h] == 0)
#endif
#ifdef NO_TIMERS
#define TIMERS false
#else
#define TIMERS true
#endif

inline p_free() { p_owner = NONE; p_cell[0] = POISON; p_cell[1] = POISON }
inline d_free() { d_owner = NONE; d_cell[0] = POISON; d_cell[1] = POISON }

/* Prefill gives up: the block goes back only when no write can read it any more. */
inline p_fail(h) {
  m_abort_d[h] = true;
  if
  :: p[h] >= SENDING -> p[h] = CLOSING
  :: else ->
    p[h] = CLOSED;
    if :: p_owner == h -> p_free() :: else fi
  fi
}

inline d_fail(h) {
  m_abort_p[h] = true;
  if
  :: d[h] == RESERVED || d[h] == ACCEPTING -> gate[h] = false; d[h] = CLOSING
  :: else -> d[h] = ENDED
  fi
}

proctype prefill(byte h) {
end:
  do
#ifdef ALLOCATE_AT_ONCE
  :: atomic { p[h] == QUEUED && p_owner == NONE -> p_owner = h; p[h] = OFFERED; m_offer[h] = true }
  :: atomic { p[h] == OFFERED && m_grant[h] -> p_cell[0] = h; p_cell[1] = h; p[h] = SENDING }
#else
  :: atomic { p[h] == QUEUED -> p[h] = OFFERED; m_offer[h] = true }
  :: atomic { p[h] == OFFERED && m_grant[h] -> p[h] = GRANTED }
  :: atomic { p[h] == GRANTED && p_owner == NONE ->
      p_owner = h; p_cell[0] = h; p_cell[1] = h; p[h] = SENDING }
#endif
  /* a layer is done: post its write; after the last one commit, without waiting for them */
  :: atomic { p[h] == SENDING ->
      w[W(h, posted[h])] = POSTED; posted[h]++;
      if :: posted[h] == L -> p[h] = COMMITTED; m_commit[h] = true :: else fi }
  :: atomic { p[h] == COMMITTED && quiesced(h) && seen[W(h,0)] == GOOD && seen[W(h,1)] == GOOD ->
      p[h] = CLOSED; p_free() }
#ifndef COUNT
  /* a failed write ends the attempt */
  :: atomic { (p[h] == SENDING || p[h] == COMMITTED) && (seen[W(h,0)] == BAD || seen[W(h,1)] == BAD) ->
      p_fail(h) }
#endif
  :: atomic { p[h] == CLOSING && quiesced(h) -> p[h] = CLOSED; p_free() }
  /* aborted by the peer, by the client, by a timer */
  :: atomic { p[h] < CLOSING && (m_abort_p[h] || TIMERS) -> p_fail(h) }
  od
}

proctype decode(byte h) {
end:
  do
#ifdef ALLOCATE_AT_ONCE
  :: atomic { d[h] == EXPECTED -> d[h] = WAITING }
#else
  :: atomic { d[h] == EXPECTED && m_offer[h] -> d[h] = WAITING }
#endif
  :: atomic { d[h] == WAITING && d_owner == NONE ->
      d_owner = h; gate[h] = true; m_grant[h] = true; d[h] = RESERVED }
#ifdef ACCEPT_ON_COMMIT
  :: atomic { d[h] == RESERVED && m_commit[h] -> gate[h] = false; d[h] = ACCEPTING }
#else
  :: atomic { d[h] == RESERVED && m_commit[h] && full(h) -> gate[h] = false; d[h] = ACCEPTING }
#endif
  :: atomic { d[h] == ACCEPTING && quiet(h) ->
      assert(d_cell[0] == h && d_cell[1] == h); /* never a wrong byte */
      d[h] = ENDED; d_free() }
  :: atomic { d[h] == CLOSING && quiet(h) -> d[h] = ENDED; d_free() }
  /* aborted by the peer (too late once all is there), by the client, by a timer */
  :: atomic { d[h] < ACCEPTING && (m_abort_d[h] || TIMERS) -> d_fail(h) }
  :: atomic { d[h] == ACCEPTING && TIMERS -> d_fail(h) }
  od
}

/* What happens to one write on the engines' own threads. */
proctype write(byte i) {
end:
  do
  :: atomic { w[i] == POSTED -> data[i] = p_cell[i % L]; w[i] = FLYING }
#ifdef NO_GATE
  :: atomic { w[i] == FLYING -> w[i] = COPYING; copiers[i / L]++ }
#else
  :: atomic { w[i] == FLYING && gate[i / L] -> w[i] = COPYING; copiers[i / L]++ }
  :: atomic { w[i] == FLYING && !gate[i / L] -> w[i] = REFUSED }
#endif
  :: atomic { w[i] == COPYING ->
      assert(d_owner == i / L); /* nothing lands in a block that was given back */
      d_cell[i % L] = data[i]; copiers[i / L]--;
      if
      :: gate[i / L] -> w[i] = LANDED; arrived[i] = true; count[i / L]++
      :: else -> w[i] = REFUSED
      fi }
  /* acknowledgements, and their loss: a deadline or a cancel ends the transfer at any time */
  :: atomic { w[i] == LANDED && seen[i] == UNKNOWN -> seen[i] = GOOD }
  :: atomic { w[i] == REFUSED && seen[i] == UNKNOWN -> seen[i] = BAD }
  :: atomic { w[i] != FREE && seen[i] == UNKNOWN && TIMERS -> seen[i] = BAD }
#ifdef COUNT
  :: atomic { w[i] == LANDED && seen[i] == BAD && !reposted[i] && p[i / L] == COMMITTED ->
      w[i] = POSTED; seen[i] = UNKNOWN; reposted[i] = true }
#endif
  od
}

/* Prefill dies: its handoffs and blocks are gone, nothing reads its memory, what flies may still land. */
proctype death() {
  byte i;
  if
  :: true
  :: TIMERS -> atomic {
    for (i : 0 .. H * L - 1) {
      if :: w[i] == POSTED -> w[i] = REFUSED :: else fi
    }
    for (i : 0 .. H - 1) { p[i] = CLOSED }
    p_free() }
  fi
}

init {
  atomic {
    run prefill(0); run prefill(1);
    run decode(0); run decode(1);
    run write(0); run write(1); run write(2); run write(3);
    run death()
  }
  /* When nothing can happen any more, every block is back. */
  timeout -> assert(p_owner == NONE && d_owner == NONE)
}
