// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Memory of tests/fake_cuda's GPUs: mapped without any right, so a NIC reaches it by a mapping of
// its own, which it makes of a dma-buf or, as peermem would, of the address.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fake_verbs {

struct Mapped {
  void* at = nullptr;
  size_t nbytes = 0;
  size_t before = 0;  // bytes of the first page that come before what was asked for
};

// False where the range is not all of the dma-buf's, with the reason in errno.
bool map_dmabuf(int fd, uint64_t offset, size_t length, Mapped& out);
// Whether [address, address + length) is a GPU's; then `fd` is of its file, opened anew, and
// `offset` where the range begins there.
bool find_gpus(const void* address, size_t length, int& fd, uint64_t& offset);

}  // namespace fake_verbs
