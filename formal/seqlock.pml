/* SPDX-FileCopyrightText: The kvxfer authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * A read out of a peer's mapped memory under a lease: the reader copies two cells and then loads the lease word, which
 * the owner exports; revoking is one store, and the owner reuses the memory without asking anybody. formal/check.sh
 * runs this model and the variants, each of which must fail.
 *
 * Memory may be weak: between two fences the owner's stores become visible, and the reader's loads happen, in any
 * order. The word holds a generation, so that a new lease in the same word is not taken for the old one; wrapping it
 * is left out. The reader may stop for ever, or for as long as it likes, at any point.
 *
 * Holds: what the reader accepts is what the cells held under its lease.
 *
 *   -DNO_READER_FENCE  the word may be loaded before the cells
 *   -DWORD_FIRST       the reader looks at the word and then copies
 *   -DNO_OWNER_FENCE   the reuse may be seen before the revocation
 *   -DREUSE_FIRST      the owner reuses the memory and then revokes
 *   -DNO_GENERATION    a word says only "open"
 */
#define OLD 1 /* what the cells hold under lease 1 */
#define NEW 2

byte word = 1; /* the generation whose lease is open; 0: none */
byte cell[2] = OLD;

/* The owner's stores on their way: to be seen in any order, and all at a fence. */
bool word_due[3], cell_due[2];
#define fence() (!word_due[0] && !word_due[1] && !word_due[2] && !cell_due[0] && !cell_due[1])

proctype visible() {
end:
  do
  :: atomic { word_due[0] -> word = 0; word_due[0] = false }
  :: atomic { word_due[2] -> word = 2; word_due[2] = false }
  :: atomic { cell_due[0] -> cell[0] = NEW; cell_due[0] = false }
  :: atomic { cell_due[1] -> cell[1] = NEW; cell_due[1] = false }
  od
}

proctype owner() {
#ifdef REUSE_FIRST
  cell_due[0] = true;
  cell_due[1] = true;
  fence();
#endif
  word_due[0] = true; /* revoke */
#ifndef NO_OWNER_FENCE
  fence();
#endif
  cell_due[0] = true; /* reuse */
  cell_due[1] = true;
  fence();
  word_due[2] = true /* a later lease, in the same word */
}

#ifdef NO_GENERATION
#define open(w) (w != 0)
#else
#define open(w) (w == 1)
#endif

proctype reader() {
  byte got[2], w;
  bool copied[2], looked;
#ifdef WORD_FIRST
  w = word;
  looked = true;
#endif
  do
  :: !copied[0] -> got[0] = cell[0]; copied[0] = true
  :: !copied[1] -> got[1] = cell[1]; copied[1] = true
#ifdef NO_READER_FENCE
  :: !looked -> w = word; looked = true
#else
  :: copied[0] && copied[1] && !looked -> w = word; looked = true
#endif
  :: copied[0] && copied[1] && looked -> break
  od;
  assert(!open(w) || (got[0] == OLD && got[1] == OLD))
}

init { atomic { run owner(); run visible(); run reader() } }
