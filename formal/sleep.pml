/* SPDX-FileCopyrightText: The kvxfer authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * Falling asleep at a ring (csrc/transport/shm/ring.hpp): the producer waits for room, the consumer for records, each
 * on its own bell. Every processor has a store buffer, as on x86 (TSO): a store is seen by the other side some time
 * later, in order; a fence or a locked instruction waits until the buffer is empty. formal/check.sh runs this model
 * and the variants, each of which must hang.
 *
 * Left out: the records themselves; TSO publishes them before the position. A bell is an eventfd: rung any number of
 * times, heard once.
 *
 * Holds: all ITEMS come through a ring of ROOM, and nobody sleeps for ever.
 *
 *   -DNO_FENCE_PRODUCER  no fence between the store of `tail` and the look at `sleeping`
 *   -DNO_FENCE_CONSUMER  no fence between the store of `sleeping` and the look at `tail`
 *   -DNO_FENCE_ROOM      the same between `head` and `starving`
 *   -DLOOK_ONCE          the consumer does not look again after it has raised its flag
 *   -DFORGET_STARVING    the consumer gives room back without looking at `starving`
 */
#define ITEMS 4
#define ROOM 2

#define TAIL 0
#define SLEEPING 1
#define HEAD 2
#define STARVING 3
byte mem[4];
chan produced = [3] of { byte, byte }; /* the producer's store buffer */
chan consumed = [3] of { byte, byte };
bool bell_p, bell_c;
byte tail, head; /* each side's own copy */

proctype drain(chan buffer) {
  byte at, value;
end:
  do
  :: atomic { buffer ? at, value -> mem[at] = value }
  od
}

#define fence(buffer) empty(buffer)

proctype producer() {
  do
  :: tail == ITEMS -> break
  :: tail < ITEMS ->
    if
    :: tail - mem[HEAD] == ROOM ->
      produced ! STARVING, 1;
      fence(produced);
      if
      :: tail - mem[HEAD] == ROOM -> atomic { bell_p -> bell_p = false }; goto again
      :: else -> produced ! STARVING, 0 /* relaxed */
      fi
    :: else
    fi;
    tail++;
    produced ! TAIL, tail;
#ifndef NO_FENCE_PRODUCER
    fence(produced);
#endif
    if
    :: mem[SLEEPING] -> atomic { empty(produced) -> mem[SLEEPING] = 0; bell_c = true } /* exchange */
    :: else
    fi;
again:
    skip
  od
}

proctype consumer() {
  do
  :: head == ITEMS -> break
  :: head < ITEMS && mem[TAIL] != head ->
    head++;
    consumed ! HEAD, head;
#ifndef FORGET_STARVING
#ifndef NO_FENCE_ROOM
    fence(consumed);
#endif
    if
    :: mem[STARVING] -> atomic { empty(consumed) -> mem[STARVING] = 0; bell_p = true }
    :: else
    fi
#endif
  :: head < ITEMS && mem[TAIL] == head ->
    consumed ! SLEEPING, 1;
#ifndef NO_FENCE_CONSUMER
    fence(consumed);
#endif
#ifndef LOOK_ONCE
    if
    :: mem[TAIL] == head -> atomic { bell_c -> bell_c = false }
    :: else -> consumed ! SLEEPING, 0 /* relaxed */
    fi
#else
    atomic { bell_c -> bell_c = false }
#endif
  od
}

init {
  atomic { run producer(); run consumer(); run drain(produced); run drain(consumed) }
  timeout -> assert(head == ITEMS)
}
