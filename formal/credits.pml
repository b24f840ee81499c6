/* SPDX-FileCopyrightText: The kvxfer authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * Credits for notifications: the sender takes one of WINDOW before it posts; it comes back when the application at the
 * other end has drained the message, told in batches, or when it is known that the message was never shown.
 * formal/check.sh runs this model and the variants, each of which must fail.
 *
 * Both kinds of transport: a cancel that knows its answer at once (shm), and one that does not (tcp: the verdict
 * comes later). A message is on its way, then accepted or, if cancelled, refused. The application drains when it likes.
 *
 * Holds: never more than WINDOW undrained at the receiver; no credit is lost or doubled, so that a sender with
 * something to say can always say it in the end.
 *
 *   -DKEEP_ON_CANCEL    a message cancelled in time does not give its credit back
 *   -DBACK_AT_CANCEL    a cancel without an answer gives it back at once
 *   -DFORGET_REFUSED    the later verdict "refused" gives nothing back
 *   -DWHOLE_WINDOW      drained messages are told only WINDOW at a time, and the rest is not posted without them
 */
#define WINDOW 4
#define M 7 /* messages to send */
#ifdef WHOLE_WINDOW
#define BATCH (WINDOW + 1)
#else
#define BATCH 2
#endif

byte credits = WINDOW;
byte posted, undrained, drained, told;
byte flying, dying, refused; /* messages on their way; cancelled, the answer open; refused, the answer on its way */
byte ended;

active proctype engines() {
end:
  do
  :: atomic { posted < M && credits > 0 -> credits--; posted++; flying++ }
  /* at the receiver */
  :: atomic { flying > 0 -> flying--; undrained++; ended++; assert(undrained <= WINDOW) }
  :: atomic { undrained > 0 -> undrained--; drained++;
      if :: drained >= BATCH -> told = told + drained; drained = 0 :: else fi }
  :: atomic { told > 0 -> credits = credits + told; told = 0; assert(credits <= WINDOW) }
  /* cancelled with an answer */
  :: atomic { flying > 0 -> flying--; ended++;
#ifndef KEEP_ON_CANCEL
      credits++;
#endif
      assert(credits <= WINDOW) }
  /* cancelled without one: it was accepted before, or it is refused */
  :: atomic { flying > 0 -> flying--; dying++;
#ifdef BACK_AT_CANCEL
      credits++
#endif
    }
  :: atomic { dying > 0 -> dying--; ended++; undrained++; assert(undrained <= WINDOW) }
  :: atomic { dying > 0 -> dying--; ended++; refused++ }
  :: atomic { refused > 0 -> refused--;
#if !defined(FORGET_REFUSED) && !defined(BACK_AT_CANCEL)
      credits++;
#endif
      assert(credits <= WINDOW) }
  od
}

init { timeout -> assert(ended == M) }
