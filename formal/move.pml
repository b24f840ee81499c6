/* SPDX-FileCopyrightText: The kvxfer authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * Messages between two sides move from rail to rail (csrc/transport/verbs: channel.cpp, channel_pairs.cpp,
 * control_pairs.cpp). FAILURES of RAILS rails fail, at any time: what is on its way there is lost, and so may be the
 * acknowledgement of what has landed. A side finds out when something that it sent is not acknowledged, or by an event
 * that may come. It ends its queue pair, takes what had come, destroys it, and says RESUME over any other that is left.
 * One that was left is not made again here.
 *
 * Holds: fragments are taken in order, none twice; no message comes where none may; and nobody waits for ever: all are
 * taken in the end, unless a side has no queue pair left, for which more than one rail must have failed.
 *
 *   -DSAY_FIRST   what was taken is counted, and then the old queue pair is ended
 *   -DSAME_TURN   both sides count turns alike
 *   -DNOT_BEHIND  who drops one that stood by does not look for RESUME in it
 *   -DLAST_WINS   a RESUME of a lower turn is followed as well
 */
#ifndef RAILS
#define RAILS 3
#endif
#ifndef FAILURES
#define FAILURES 1
#endif
#ifndef N
#define N 2                        /* fragments that each side has for the other */
#endif
#define NO_RAIL RAILS
#define IN(side, rail) c[(side) * RAILS + (rail)]
#define AT(side, rail) (side) * RAILS + (rail)

mtype = { FRAGMENT, RESUME };
typedef Side {
  byte current = 0;                /* the last rail that carried messages */
  byte turn = 0, seen = 0;
  bool resumed = true;             /* the peer carries on there as well */
  byte sent = 0, taken = 0, acknowledged = 0;
};
Side s[2];
chan c[2 * RAILS] = [6] of { mtype, byte, byte }; /* FRAGMENT number, 0; RESUME turn, taken */
bool gone[2 * RAILS];              /* this side has destroyed its queue pair */
bool unanswered[2 * RAILS];        /* something that this side sent there will not be acknowledged */
bool used[2 * RAILS];              /* it has sent something there */
bool event[2 * RAILS];
bool broken[RAILS];
byte failures;
bool ended;                        /* a side had no queue pair left, and the session told the other */

inline put(me, rail, what, a, b) {
  used[AT(me, rail)] = true;
  if
  :: broken[rail] || gone[AT(1 - me, rail)] -> unanswered[AT(me, rail)] = true
  :: else -> IN(1 - me, rail)!what, a, b
  fi
}

/* What came over the current one and is not RESUME. */
inline take(me, number) {
  assert(number == s[me].taken);
  s[me].taken++
}

/* ERR, what had come is taken, destroyed. The rest is lost, and so may be acknowledgements. */
inline drop(me, rail) {
  if
  :: !gone[AT(me, rail)] ->
     do
     :: nempty(IN(me, rail)) ->
        IN(me, rail)?what, a, b;
        if
        :: what == FRAGMENT && rail == s[me].current && s[me].resumed -> take(me, a)
        :: what == RESUME && a > s[me].seen -> s[me].seen = a
        :: else
        fi;
        if :: unanswered[AT(1 - me, rail)] = true :: true fi
     :: nempty(IN(me, rail)) -> unanswered[AT(1 - me, rail)] = true; break
     :: empty(IN(me, rail)) -> break
     od;
     do :: nempty(IN(me, rail)) -> IN(me, rail)?what, a, b :: else -> break od;
     gone[AT(me, rail)] = true;
     if :: rail == s[me].current -> s[me].resumed = false :: else fi
  :: else
  fi
}

inline carry_on(me, rail, number) {
  s[me].current = rail;
  s[me].turn = number;
#ifndef SAY_FIRST
  said = s[me].taken;
#endif
  put(me, rail, RESUME, number, said)
}

inline move(me) {
#ifdef SAY_FIRST
  said = s[me].taken;
#endif
  drop(me, s[me].current);
  if :: s[me].turn > s[me].seen -> next = s[me].turn + 1 :: else -> next = s[me].seen + 1 fi;
#ifndef SAME_TURN
  if :: next % 2 == me -> next++ :: else fi; /* odd ones are those of side 0 */
#endif
  if
  :: !gone[AT(me, 0)] -> carry_on(me, 0, next)
  :: !gone[AT(me, 1)] -> carry_on(me, 1, next)
#if RAILS > 2
  :: !gone[AT(me, 2)] -> carry_on(me, 2, next)
#endif
  :: else -> assert(FAILURES > 1); ended = true
  fi
}

inline on_failure(me, rail) {
  was_current = (rail == s[me].current);
#ifdef SAY_FIRST
  said = s[me].taken;
#endif
  drop(me, rail);
  if
#ifdef NOT_BEHIND
  :: was_current -> move(me)
#else
  :: was_current || s[me].seen > s[me].turn -> move(me)
#endif
  :: else
  fi
}

inline send_from(me, first) {
  i = first;
  do
  :: i < s[me].sent -> put(me, s[me].current, FRAGMENT, i, 0); i++
  :: else -> break
  od
}

inline on_resume(me, rail, number, peer_taken) {
  if :: number > s[me].seen -> s[me].seen = number :: else fi;
  if
#ifdef LAST_WINS
  :: number != s[me].turn ->
#else
  :: number > s[me].turn ->
#endif
     assert(rail != s[me].current || !s[me].resumed); /* messages that move to where they are */
     old = s[me].current;
#ifdef SAY_FIRST
     said = s[me].taken;
#endif
     if :: old != rail -> drop(me, old) :: else fi;
     carry_on(me, rail, number)
  :: else
  fi;
  if
  :: number == s[me].turn ->
     assert(rail == s[me].current && !s[me].resumed);
     assert(peer_taken >= s[me].acknowledged && peer_taken <= s[me].sent);
     s[me].acknowledged = peer_taken;
     s[me].resumed = true;
     send_from(me, peer_taken)
  :: else
  fi
}

inline hear(me, rail) {
  IN(me, rail)?what, a, b;
  if
  :: what == RESUME -> turn = a; theirs = b; on_resume(me, rail, turn, theirs)
  :: what == FRAGMENT ->
     assert(rail == s[me].current && s[me].resumed);
     take(me, a)
  fi
}

/* What these held does not tell states apart. */
inline forget() {
  what = 0; a = 0; b = 0; i = 0; next = 0; old = 0; said = 0; turn = 0; theirs = 0; was_current = false
}

proctype side(byte me) {
  mtype what;
  byte a, b, i, next, old, said, turn, theirs;
  bool was_current;
end:
  do
  :: ended -> break
  :: atomic { !ended && s[me].sent < N ->
       s[me].sent++;
       if
       :: s[me].resumed -> put(me, s[me].current, FRAGMENT, s[me].sent - 1, 0)
       :: else
       fi
     }
  :: atomic { !ended && !gone[AT(me, 0)] && nempty(IN(me, 0)) -> hear(me, 0); forget() }
  :: atomic { !ended && !gone[AT(me, 1)] && nempty(IN(me, 1)) -> hear(me, 1); forget() }
  :: atomic { !ended && !gone[AT(me, 0)] && (unanswered[AT(me, 0)] || event[AT(me, 0)]) -> on_failure(me, 0); forget() }
  :: atomic { !ended && !gone[AT(me, 1)] && (unanswered[AT(me, 1)] || event[AT(me, 1)]) -> on_failure(me, 1); forget() }
#if RAILS > 2
  :: atomic { !ended && !gone[AT(me, 2)] && nempty(IN(me, 2)) -> hear(me, 2); forget() }
  :: atomic { !ended && !gone[AT(me, 2)] && (unanswered[AT(me, 2)] || event[AT(me, 2)]) -> on_failure(me, 2); forget() }
#endif
  od
}

/* Some of what is on its way has landed, and nobody has looked at it yet; the rest is lost. */
inline lose(to, rail) {
  left = len(IN(to, rail));
  do
  :: left > 0 -> IN(to, rail)?what, a, b; IN(to, rail)!what, a, b; left--
  :: left > 0 -> unanswered[AT(1 - to, rail)] = true; break
  :: left == 0 -> break
  od;
  do :: left > 0 -> IN(to, rail)?what, a, b; left-- :: else -> break od;
  if :: used[AT(1 - to, rail)] -> unanswered[AT(1 - to, rail)] = true :: true fi;
  if :: event[AT(to, rail)] = true :: true fi
}

/* The network, or the queue pair of one side alone. */
inline fail(rail) {
  failures++;
  if
  :: broken[rail] = true; lose(0, rail); lose(1, rail)
  :: event[AT(0, rail)] = true
  :: event[AT(1, rail)] = true
  fi
}

proctype network() {
  mtype what;
  byte a, b, left;
end:
  do
  :: atomic { failures < FAILURES && !broken[0] -> fail(0); what = 0; a = 0; b = 0 }
  :: atomic { failures < FAILURES && !broken[1] -> fail(1); what = 0; a = 0; b = 0 }
#if RAILS > 2
  :: atomic { failures < FAILURES && !broken[2] -> fail(2); what = 0; a = 0; b = 0 }
#endif
  :: failures == FAILURES -> break
  od
}

/* Nothing is left to do for anybody. */
active proctype judge() {
  timeout -> assert(ended || (s[0].taken == N && s[1].taken == N))
}

init { atomic { run side(0); run side(1); run network() } }
