// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// From offset arrays, or ids of blocks, to checked and coalesced spans.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/overlap.hpp"
#include "engine/span_pool.hpp"
#include "transport/transport.hpp"

namespace kvxfer {

struct SpanArguments {
  Column local, remote, nbytes;
  std::span<const int64_t> bases;  // pairs (local, remote); the span list is repeated at each
  bool has_bases = false;
};

struct Bounds {
  std::string_view local_name, remote_name;
  uint64_t local_nbytes = 0, remote_nbytes = 0;
  bool destination_is_remote = true;
};

struct Expanded {
  std::vector<Span> spans;
  uint64_t nbytes = 0;
  uint64_t num_given = 0;  // before neighbours became one
};

// Fills an Expanded. A local variable of the loop over the spans: what it counts stays in
// registers.
class SpanBuilder {
 public:
  SpanBuilder(Expanded& out, size_t most) : out_(out) {
    out.spans = SpanPool::shared().take(most);
    out.spans.resize(most);
    begin_ = at_ = out.spans.data();
  }
  // Neighbours on both sides become one; what is longer than a descriptor can
  // say is cut.
  void add(uint64_t local, uint64_t remote, uint64_t size, uint32_t index) {
    nbytes_ += size;
    if (local == next_local_ && remote == next_remote_ && at_[-1].nbytes + size <= kMaxSpanBytes) {
      at_[-1].nbytes += static_cast<uint32_t>(size);
    } else {
      if (size > kMaxSpanBytes) make_room((size - 1) / kMaxSpanBytes);
      uint64_t done = 0;
      for (; size - done > kMaxSpanBytes; done += kMaxSpanBytes)
        *at_++ = {local + done, remote + done, kMaxSpanBytes, index};
      *at_++ = {local + done, remote + done, static_cast<uint32_t>(size - done), index};
    }
    next_local_ = local + size;
    next_remote_ = remote + size;
  }
  void finish() {
    out_.spans.resize(static_cast<size_t>(at_ - begin_));
    out_.nbytes = nbytes_;
  }

 private:
  void make_room(uint64_t more) {
    const auto used = at_ - begin_;
    out_.spans.resize(out_.spans.size() + more);
    begin_ = out_.spans.data();
    at_ = begin_ + used;
  }

  Expanded& out_;
  Span *begin_, *at_;
  uint64_t nbytes_ = 0;
  uint64_t next_local_ = ~uint64_t{0}, next_remote_ = 0;  // no offset is that large
};

// A quarter of int64: a sum of two such offsets and a length cannot overflow.
inline constexpr int64_t kMaxOffset = int64_t{1} << 61;
inline constexpr uint64_t kMaxSpans = uint64_t{1} << 26;  // in one transfer

// Throws kInvalidArgument naming the index, the expected and the given value, before anything is
// sent: lengths that disagree, negative, empty or out-of-range spans, overlapping destinations.
Expanded expand(const SpanArguments& arguments, const Bounds& bounds);

// A pool of blocks in a region: block b of layer l begins at base + b *
// block_stride + l * layer_stride and has nbytes bytes.
struct BlockView {
  int64_t base = 0, block_stride = 0, nbytes = 0;
  int64_t num_layers = 1, layer_stride = 0;
};
struct BlockIds {  // int32 or int64
  const void* data = nullptr;
  size_t size = 0;
  bool wide = true;
  int64_t operator[](size_t i) const noexcept {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};
struct BlockArguments {
  BlockView local, remote;
  BlockIds local_blocks, remote_blocks;
};
// Throws as above for ids and views; Span::index is the position in the id
// arrays.
Expanded expand(const BlockArguments& arguments, const Bounds& bounds);

std::vector<Extent> merged(std::vector<Extent> extents);
// Sorted and merged, for a lease; throws likewise.
std::vector<Extent> merge_extents(const Column& offsets, const Column& nbytes,
                                  const std::string& name, uint64_t region_nbytes);

}  // namespace kvxfer
