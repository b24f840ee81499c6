/* SPDX-FileCopyrightText: The kvxfer authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * The gate in front of leased memory (csrc/transport/region.hpp, class Gate, statement by statement): three copiers
 * and a revoker, who reuses the memory as soon as he sees it quiet. formal/check.sh runs this model and the
 * variants, each of which leaves out one rule and must fail.
 *
 * Left out: that a request passes two gates (region and lease; each alone has these properties), and the wake-up
 * of a waiter behind `quiet` (sleep.pml has the kind of argument). All operations on the two words are seq_cst
 * read-modify-writes or stores, so interleaving is all that can happen; the one store that a processor could delay
 * past a load, `closed`, is the variant COUNT_THEN_CLOSE, which is what a relaxed store would amount to.
 *
 * Holds: no byte is stored after quiet was seen; quiet comes once, and does come.
 *
 *   -DLOOK_THEN_COUNT   a copier looks at the gate before it counts itself
 *   -DCOUNT_THEN_CLOSE  the revoker reads the count before his store of `closed` is seen
 *   -DSILENT_REFUSAL    a copier that finds the gate closed leaves without looking whether it was the last
 *   -DNO_EXCHANGE       quiet is looked at and then stored: the hook may run twice
 */
byte copiers;
bool closed, quiet, reused;
byte hooks;

inline settle() {
  if
  :: closed ->
    if
    :: copiers == 0 ->
#ifdef NO_EXCHANGE
      if :: !quiet -> quiet = true; hooks++ :: else fi
#else
      if :: atomic { !quiet -> quiet = true }; hooks++ :: else fi
#endif
    :: else
    fi
  :: else
  fi
}

inline leave() {
  atomic { copiers--; last = copiers == 0 };
  if :: last -> settle() :: else fi
}

proctype copier() {
  bool last;
#ifdef LOOK_THEN_COUNT
  if
  :: !closed ->
    copiers++;
#else
  copiers++;
  if
  :: !closed ->
#endif
    assert(!reused); /* a byte is stored */
    assert(!reused); /* and the next one */
    leave()
  :: else ->
#if !defined(LOOK_THEN_COUNT) && !defined(SILENT_REFUSAL)
    leave()
#elif defined(SILENT_REFUSAL)
    copiers--
#endif
  fi
}

proctype revoker() {
  byte seen;
#ifdef COUNT_THEN_CLOSE
  seen = copiers;
  closed = true;
  if
  :: seen == 0 -> atomic { if :: !quiet -> quiet = true; hooks++ :: else fi }
  :: else -> settle()
  fi;
#else
  closed = true;
  settle();
#endif
  quiet;
  reused = true
}

init {
  atomic { run copier(); run copier(); run copier(); run revoker() }
  timeout -> assert(quiet && hooks == 1)
}
