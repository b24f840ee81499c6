/* SPDX-FileCopyrightText: The kvxfer authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * A memory window that is bound for one lease after another, while the peer may be deaf (csrc/transport/verbs:
 * windows.cpp, sink.cpp, outgoing_push.cpp). The key of a bind has few values: KEYS here, 256 in life.
 *
 * The owner closes a lease, asks the writer to drain, waits for that or not at all, invalidates the window, and takes
 * the memory back. He binds it again when the writer has drained, or after its queue pair was replaced. The writer posts
 * until it has heard that it must not; what is posted is delivered at any time, in order. A write under a key that is
 * dead breaks the queue pair.
 *
 * Holds: a write lands only while the memory is that of its own lease.
 *
 *   -DBIND_UNDRAINED   bound again although the writer has not drained
 *   -DDRAINED_EARLY    the writer says so when it hears, and not when its writes are through
 *   -DNO_INVALIDATION  a window whose writer does not answer is left as it is
 *   -DQUIET_FIRST      the memory is taken back, then the window is invalidated
 */
#define LEASES 3
#define KEYS 2
#ifdef DRAINED_EARLY
#define THROUGH(l) true
#else
#define THROUGH(l) (in_flight[l] == 0)
#endif

byte bound;         /* the lease that the window is bound for; 0: none */
byte key;           /* of the last bind */
byte epoch;         /* of the queue pair */
bool broken;        /* it has met a dead key */
byte holder;        /* the lease whose memory it is; 0: the owner's own */
byte asked;         /* leases up to this one were asked for */
byte drained;       /* and the writer has drained up to this one */
byte told, told_key, told_epoch;  /* what the writer may write through */
byte in_flight[LEASES + 1];
chan net = [2] of { byte, byte, byte }; /* lease, key, epoch */

proctype network() {
  byte l, k, e;
end:
  do
  :: atomic {
       net?l, k, e;
       in_flight[l]--;
       if
       :: e != epoch || broken
       :: else ->
         if
         :: bound != 0 && k == key -> assert(holder == l)
         :: else -> broken = true
         fi
       fi
     }
  od
}

proctype writer() {
  byte heard;
end:
  do
  :: atomic { told > heard && nfull(net) -> in_flight[told]++; net!told, told_key, told_epoch }
  :: asked > heard -> heard = asked
  :: atomic { heard > drained && THROUGH(heard) -> drained = heard }
  od
}

inline replace() { atomic { epoch++; broken = false; bound = 0 } }

proctype owner() {
  byte l = 1;
  do
  :: l > LEASES -> break
  :: else ->
    if :: broken -> replace() :: else fi;
    atomic { key = (key + 1) % KEYS; bound = l; holder = l; told = l; told_key = key; told_epoch = epoch };
    asked = l;
    if
    :: drained == l
    :: true /* long enough */
    fi;
#ifdef QUIET_FIRST
    holder = 0;
    bound = 0;
#elif defined(NO_INVALIDATION)
    if :: drained == l -> bound = 0 :: else fi;
    holder = 0;
#else
    bound = 0;
    holder = 0;
#endif
#ifndef BIND_UNDRAINED
    if
    :: drained == l
    :: replace()
    fi;
#endif
    l++
  od
}

init { atomic { run network(); run writer(); run owner() } }
