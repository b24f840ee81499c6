/* SPDX-FileCopyrightText: The kvxfer authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * Who polls is lent the progress thread's work (csrc/transport/reactor.cpp: poll, ask, rest, keep_watch). A peer puts
 * ITEMS into a ring and rings the bell of a consumer that sleeps. The progress thread sleeps in epoll on that bell and
 * on its own eventfd (`told`). A caller polls as often as it likes, then stops: it calls rest() first, or simply does
 * not come back. formal/check.sh runs this model and the variants, each of which must hang.
 *
 * Left out: store buffers (sleep.pml has those of the ring's flag; all else is written under the progress token, or
 * before a system call on `told`).
 *
 * Holds: the peer never has an item in the ring for ever.
 *
 *   -DRESTS               the caller calls rest() at the end, and the watch knows no time: rest() is enough
 *   -DNO_TIME             the caller simply stops, and the watch knows no time
 *   -DLOOK_BEFORE_LENT    a caller looks at epoll, and hears `told` and the bell there, before the work is lent
 *   -DHEAR_TOLD -DRESTS   a caller that was lent the work reads the eventfd, in the place of who keeps watch
 *   -DWRITE_FIRST -DRESTS rest() writes the eventfd, then withdraws what was asked
 *   -DSLEEP_AFTER_WATCH   the progress thread goes back to epoll without a look at what is attended to
 */
#define ITEMS 2
#define POLLS 4

byte tail, head;
bool sleeping = true; /* the ring is armed: its producer rings */
bool bell, told;
bool token;
bool asked, lent, attended;
byte polls;

#define take_token atomic { !token -> token = true }
#define give_token token = false
#define hear_bell d_step { bell = false; attended = true; sleeping = false }

proctype peer() {
  do
  :: tail == ITEMS -> break
  :: tail < ITEMS ->
    tail++;
    atomic {
      if
      :: sleeping -> sleeping = false; bell = true
      :: else
      fi
    }
  od
}

proctype progress() {
  byte seen;
  bool sleepy = true;
end:
  do
  :: told || bell || !sleepy ->
    sleepy = true;
    take_token;
    told = false;
    if
    :: bell -> hear_bell
    :: else
    fi;
    lent = asked;
    if
    :: lent ->
      give_token;
watch:
      seen = polls;
#if defined(NO_TIME) || defined(RESTS)
end_watch:
      told;
#else
      if
      :: told
      :: polls == seen /* a while has passed */
      :: polls != seen -> goto watch
      fi;
#endif
      take_token;
      d_step { asked = false; lent = false };
      give_token;
#ifndef SLEEP_AFTER_WATCH
      sleepy = false
#endif
    :: else ->
      if
      :: attended ->
        d_step { head = tail };
        sleeping = true;
        if
        :: tail == head -> attended = false
        :: else -> sleeping = false; sleepy = false
        fi
      :: else
      fi;
      give_token
    fi
  od
}

proctype caller() {
  byte n;
  do
  :: n == POLLS -> break
  :: n < POLLS -> break
  :: n < POLLS ->
    n++;
    take_token; /* or it would not have polled */
    if
    :: attended -> d_step { head = tail }
    :: else
    fi;
#ifdef LOOK_BEFORE_LENT
    if
    :: asked -> told = false; if :: bell -> hear_bell :: else fi
    :: else
    fi;
#endif
    if
    :: lent ->
      polls = polls + 1;
#ifdef HEAR_TOLD
      told = false;
#endif
      if
      :: bell -> hear_bell
      :: else
      fi
    :: !lent && !asked -> asked = true; told = true
    :: !lent && asked
    :: !lent /* not patient enough to ask */
    fi;
    give_token
  od;
#ifdef RESTS
#ifdef WRITE_FIRST
  if
  :: asked -> told = true; asked = false
  :: else
  fi
#else
  if
  :: asked -> asked = false; told = true
  :: else
  fi
#endif
#endif
}

init {
  atomic { run peer(); run progress(); run caller(); run caller() }
  timeout -> assert(head == ITEMS)
}
