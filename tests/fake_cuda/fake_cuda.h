/* SPDX-FileCopyrightText: The kvxfer authors
 * SPDX-License-Identifier: Apache-2.0 */
/* libfake_cuda.so: what kvxfer uses of CUDA's driver API, with GPUs whose memory is a memfd. A
 * program opens it in place of libcuda.so.1 (environment variable KVXFER_LIBCUDA), or links it.
 *
 * A device address is mapped without any right, so a CPU that touches it dies by SIGSEGV; what a
 * kernel would do is done through a second mapping, by fake_cuda_poke and fake_cuda_peek. A dma-buf
 * is a descriptor of the memfd, whose file position says of which pages (fake_cuda_dmabuf.h).
 *
 * Any thread may call these. */
#ifndef KVXFER_FAKE_CUDA_H
#define KVXFER_FAKE_CUDA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What there is and what fails; words separated by spaces, the same as in KVXFER_FAKE_CUDA, which
 * is read once: devices=N (2), dmabuf=0 (none is exported), rdma=0 (no memory can be used by
 * GPUDirect RDMA), sync_memops=0 (the attribute is refused), init=CODE (what cuInit returns),
 * ordering=N (of NICs' writes; 100: the owner's kernels need no flush), and bus=TEXT (what device 0
 * gives as its PCI address). 0, or -1 for a word that is not understood. */
int fake_cuda_plan(const char* plan);

/* `nbytes` on `device`, at a device address that is returned; 0: it cannot be had. `kind`: "legacy"
 * (cuMemAlloc), "mapped" (cuMemMap, belongs to no context), "managed" or "host". Contents: zeros.
 */
uint64_t fake_cuda_alloc(int device, size_t nbytes, const char* kind);
void fake_cuda_free(uint64_t address);

/* As a kernel would. 0, or -1 where that is not memory of a GPU. */
int fake_cuda_poke(uint64_t address, const void* from, size_t nbytes);
int fake_cuda_peek(uint64_t address, void* to, size_t nbytes);

/* "dmabufs" exported since the process began, "allocations" now, "ordered" (by SYNC_MEMOPS, now),
 * "contexts" (current in this thread), "retained" (primary contexts, now); -1: unknown. */
int64_t fake_cuda_count(const char* name);

#ifdef __cplusplus
}
#endif
#endif
