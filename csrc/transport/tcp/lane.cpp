// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/tcp/lane.hpp"

#include <algorithm>

namespace kvxfer::tcp {
namespace {
alignas(64) std::byte padding[64 * 1024];  // zeros, sent in place of bytes that must not be read
}

void Piecewise::advance(uint64_t nbytes) noexcept {
  left -= nbytes;
  while (nbytes > 0) {
    const uint64_t here = std::min<uint64_t>(nbytes, pieces[next].iov_len - offset);
    nbytes -= here;
    offset += static_cast<size_t>(here);
    if (offset == pieces[next].iov_len) offset = 0, ++next;
  }
}

size_t Piecewise::gather(iovec* out, size_t max, uint64_t max_nbytes) const noexcept {
  size_t count = 0, skip = offset;
  for (size_t i = next; i < pieces.size() && count < max && max_nbytes > 0; ++i) {
    const size_t n = static_cast<size_t>(std::min<uint64_t>(pieces[i].iov_len - skip, max_nbytes));
    out[count++] = {static_cast<std::byte*>(pieces[i].iov_base) + skip, n};
    max_nbytes -= n;
    skip = 0;
  }
  return count;
}

void Frame::reset() noexcept {
  head.clear();
  body.clear();
  body_nbytes = sent = 0;
  has_trailer = false;
  poison = Code::kOk;
  flight.reset();
  landing = {};
  answer_nbytes = 0;
  reads_body = inside = told = false;
}

void Frame::spoil(Code why) noexcept {
  if (has_trailer) poison = why;
}

void Frame::set_trailer(Code code) noexcept {
  has_trailer = true;
  write_trailer(code, trailer.data());
}

bool Frame::gather(iovec* out, size_t max, size_t& count) noexcept {
  const uint64_t body_end = head.size() + body_nbytes;
  // Once a byte of an honest trailer is out, all of the body is too: the stripe counts.
  if (poison != Code::kOk && sent <= body_end) write_trailer(poison, trailer.data());
  reads_body = false;
  size_t n = 0;
  uint64_t at = sent;
  if (at < head.size()) {
    if (n == max) return false;
    out[n++] = {head.data() + at, static_cast<size_t>(head.size() - at)};
    at = head.size();
  }
  bool whole = true;
  if (at < body_end) {
    if (poison == Code::kOk) {
      const size_t taken = body.gather(out + n, max - n, ~uint64_t{0});
      n += taken;
      reads_body = taken > 0;
      whole = taken == body.pieces.size() - body.next;
    } else {
      for (; at < body_end && n < max; ++n) {
        out[n] = {padding, static_cast<size_t>(std::min<uint64_t>(sizeof padding, body_end - at))};
        at += out[n].iov_len;
      }
      whole = at == body_end;
    }
    if (whole) at = body_end;
  }
  if (whole && has_trailer) {
    if (n < max) {
      const size_t skip = static_cast<size_t>(at - body_end);
      out[n++] = {trailer.data() + skip, kTrailerBytes - skip};
    } else {
      whole = false;
    }
  }
  count += n;
  return whole;
}

void Frame::advance(uint64_t nbytes) noexcept {
  const uint64_t before = std::clamp<uint64_t>(sent, head.size(), head.size() + body_nbytes);
  sent += nbytes;
  const uint64_t after = std::clamp<uint64_t>(sent, head.size(), head.size() + body_nbytes);
  body.advance(after - before);
}

}  // namespace kvxfer::tcp
