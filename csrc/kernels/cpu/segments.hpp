// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Two block lists, cut where a block of either ends: what a block copy walks, on whatever device.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cpu/params.hpp"

namespace kvxfer::kernels::cpu {

struct BlockList {   // of one sequence, indexed from the token at `origin` on
  const char* name;  // in messages
  const int64_t* ids;
  int64_t count, block_size, num_blocks, origin;
};

// Tokens [first, end) in order, each in one segment; those whose destination is -1 are left out.
// Every id is read once, so that what was checked is what is returned. `apart`: source and
// destination are one cache, and a block may not be both.
// Fails with kInvalidArgument, naming the list, for an id that is no block, a destination that
// comes twice, a block that is both, and lists that do not hold the tokens.
std::vector<Segment> cut_segments(const BlockList& src, const BlockList& dst, int64_t first,
                                  int64_t end, bool apart);

}  // namespace kvxfer::kernels::cpu
