/* SPDX-FileCopyrightText: The kvxfer authors
 * SPDX-License-Identifier: Apache-2.0 */
/* What stands for a dma-buf: a descriptor of the memory's file, whose position tells which pages it
 * is of, (first << 31) + count; 0: all of the file. So offsets count from its first page, and what
 * lies beyond its last is refused, as it is with a real one. Shared with tests/fake_verbs. */
#ifndef KVXFER_FAKE_CUDA_DMABUF_H
#define KVXFER_FAKE_CUDA_DMABUF_H

#include <stdint.h>

#define FAKE_CUDA_FILE "kvxfer:fake_cuda"

static inline int64_t fake_dmabuf_pack(int64_t first_page, int64_t num_pages) {
  return first_page * ((int64_t)1 << 31) + num_pages;
}
static inline int64_t fake_dmabuf_first(int64_t position) { return position >> 31; }
static inline int64_t fake_dmabuf_count(int64_t position) {
  return position & (((int64_t)1 << 31) - 1);
}

#endif
