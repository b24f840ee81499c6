/* SPDX-FileCopyrightText: The kvxfer authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * A pushed write of two chains over two rails, of which each may fail once (csrc/transport/verbs: push_pairs.cpp,
 * incoming_push.cpp, outgoing_push.cpp). Acknowledgements may be lost after a chain has landed; what is on its way may
 * stay there for as long as it likes. A writer whose queue pair has failed asks the owner, who stops its end of the
 * queue pair and then says which chains he has; the others are posted again, on whatever rail.
 *
 * Holds: when the owner accepts, every chain has landed; after that nothing lands.
 *
 *   -DNO_FENCE     he answers, and the old queue pair goes on
 *   -DNO_QUESTION  he stops it, and everything in doubt is posted again
 *   -DCOUNT        he counts what has landed, so he cannot say what he has, and everything in doubt is posted again
 */
byte landed, marked, count, acknowledged;
bool accepted;
byte sink[2];                            /* the epoch that the owner's end of a rail takes */
byte posted[2];                          /* chains that were posted on the rail, since it last failed */
chan net0 = [4] of { byte, byte };       /* chain (a bit), epoch */
chan net1 = [4] of { byte, byte };

inline land(chain) {
#ifndef COUNT
  assert(!accepted); /* nothing lands late */
#endif
  landed = landed | chain;
  marked = marked | chain;
  count++;
#ifdef COUNT
  if :: count == 2 -> accepted = true; assert(landed == 3) :: else fi
#else
  if :: marked == 3 -> accepted = true; assert(landed == 3) :: else fi
#endif
}

proctype network(byte rail; chan net) {
  byte c, e;
end:
  do
  :: atomic {
       net?c, e;
       if
       :: e == sink[rail] ->
         land(c);
         if
         :: acknowledged = acknowledged | c
         :: true /* the acknowledgement is lost */
         fi
       :: else
       fi
     }
  od
}

inline post(c) {
  atomic {
    if
    :: net0!c, sink[0]; posted[0] = posted[0] | c
    :: net1!c, sink[1]; posted[1] = posted[1] | c
    fi
  }
}

proctype writer() {
  byte doubt, have, rail;
  post(1);
  post(2);
  for (rail : 0 .. 1) {
    if
    :: atomic { doubt = posted[rail] & ~acknowledged; posted[rail] = 0 };
#ifdef NO_FENCE
      have = marked;
#else
      atomic { sink[rail]++; have = marked };
#endif
#if defined(NO_QUESTION) || defined(COUNT)
      have = 0;
#endif
      if :: (doubt & ~have & 1) -> post(1) :: else fi;
      if :: (doubt & ~have & 2) -> post(2) :: else fi
    :: true
    fi
  }
}

init { atomic { run network(0, net0); run network(1, net1); run writer() } }
