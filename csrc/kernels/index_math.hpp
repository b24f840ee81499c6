// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Where a token's row lies in a paged cache. Host and device share this header; everything is
// int64, because a cache passes 2^31 elements long before it is large.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define KVXFER_HOST_DEVICE __host__ __device__
#else
#define KVXFER_HOST_DEVICE
#endif

namespace kvxfer::kernels {

// n / divisor for 0 <= n < 2^31 without a division: the multiplier is found once, on the host.
// Source: Granlund and Montgomery, "Division by Invariant Integers using Multiplication" (1994).
struct Divisor {
  uint32_t multiplier = 1, shift = 0;

  Divisor() = default;
  explicit Divisor(int32_t divisor) {  // >= 1
    const auto d = static_cast<uint32_t>(divisor);
    while ((uint64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d) / d + 1);
  }
  KVXFER_HOST_DEVICE int32_t quotient(int32_t n) const {
    const uint64_t product = uint64_t{static_cast<uint32_t>(n)} * multiplier;
    const auto high = static_cast<uint32_t>(product >> 32);
    return static_cast<int32_t>((high + static_cast<uint32_t>(n)) >> shift);
  }
};

struct SlotPosition {
  int64_t block, offset;
};

// slot = block * block_size + offset; the caller has dealt with slot < 0 (skip).
KVXFER_HOST_DEVICE inline SlotPosition split_slot(int64_t slot, int64_t block_size) {
  const int64_t block = slot / block_size;
  return {block, slot - block * block_size};
}

// Strides of one cache, in elements or in bytes as the user of the struct says.
struct RowStrides {
  int64_t block, token, head;
};

KVXFER_HOST_DEVICE inline int64_t row_offset(const RowStrides& strides, int64_t block,
                                             int64_t offset, int64_t head) {
  return block * strides.block + offset * strides.token + head * strides.head;
}

KVXFER_HOST_DEVICE inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// The first key that a query at `position` may see; window_left < 0: no window.
KVXFER_HOST_DEVICE inline int64_t window_begin(int64_t position, int64_t window_left) {
  return window_left < 0 || position < window_left ? 0 : position - window_left;
}

// How a segment of `tokens` x `heads` rows collapses into longer runs when both sides are dense.
struct RunShape {
  int64_t run;                   // bytes that are adjacent on both sides
  int64_t outer, inner;          // loops that are left
  int64_t src_outer, dst_outer;  // their strides in bytes
  int64_t src_inner, dst_inner;
};

KVXFER_HOST_DEVICE inline RunShape collapse_rows(int64_t row, int64_t tokens, int64_t heads,
                                                 const RowStrides& src, const RowStrides& dst) {
  RunShape shape{row, tokens, heads, src.token, dst.token, src.head, dst.head};
  const bool tokens_first = (tokens == 1 || (src.token == row && dst.token == row));
  if (tokens_first) {  // head-major on both sides: a head's tokens are adjacent
    shape = {row * tokens, heads, 1, src.head, dst.head, 0, 0};
    if (heads == 1 || (src.head == shape.run && dst.head == shape.run)) {
      shape.run *= heads;
      shape.outer = 1;
    }
    return shape;
  }
  if (heads == 1 || (src.head == row && dst.head == row)) {  // token-major: a token's heads are
    shape = {row * heads, tokens, 1, src.token, dst.token, 0, 0};
    if (src.token == shape.run && dst.token == shape.run) {
      shape.run *= tokens;
      shape.outer = 1;
    }
  }
  return shape;
}

// body(dst, src) for each run.
template <class Body>
void for_runs(const RunShape& shape, char* dst, const char* src, const Body& body) {
  for (int64_t i = 0; i < shape.outer; ++i) {
    for (int64_t j = 0; j < shape.inner; ++j) {
      body(dst + i * shape.dst_outer + j * shape.dst_inner,
           src + i * shape.src_outer + j * shape.src_inner);
    }
  }
}

// Walks a grid of (token, head, vector) in steps of `stride` flat positions. The divisions are done
// once, at the start: a chain of them per vector would make a copy loop bound by integer
// arithmetic.
struct RowWalk {
  int32_t heads, vectors;
  int32_t token, head, vector;
  int32_t token_step, head_step, vector_step;

  KVXFER_HOST_DEVICE RowWalk(int32_t heads_, int32_t vectors_, int64_t start, int64_t stride)
      : heads(heads_), vectors(vectors_) {
    const int64_t per_token = int64_t{heads_} * vectors_;
    token = static_cast<int32_t>(start / per_token);
    head = static_cast<int32_t>(start % per_token / vectors_);
    vector = static_cast<int32_t>(start % vectors_);
    token_step = static_cast<int32_t>(stride / per_token);
    head_step = static_cast<int32_t>(stride % per_token / vectors_);
    vector_step = static_cast<int32_t>(stride % vectors_);
  }

  KVXFER_HOST_DEVICE void advance() {
    token += token_step;
    head += head_step;
    vector += vector_step;
    if (vector >= vectors) vector -= vectors, ++head;
    if (head >= heads) head -= heads, ++token;
  }

  KVXFER_HOST_DEVICE int64_t offset(const RowStrides& strides, int64_t vector_bytes) const {
    return token * strides.token + head * strides.head + vector * vector_bytes;
  }
};

// The widest access, 16 bytes or a smaller power of two, to which every given number is aligned.
KVXFER_HOST_DEVICE inline int64_t widen_access(int64_t width, int64_t value) {
  while (width > 1 && value % width != 0) width /= 2;
  return width;
}

}  // namespace kvxfer::kernels
