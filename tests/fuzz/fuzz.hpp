// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What the fuzz targets share: the entry point, a check that ends the process, and an input that is
// taken apart.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "common/wire.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

// Not assert(): it must also hold in a release build.
#define FUZZ_CHECK(condition)                                                             \
  do {                                                                                    \
    if (!(condition)) {                                                                   \
      std::fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                       \
    }                                                                                     \
  } while (false)

namespace kvxfer::fuzz {

inline constexpr std::byte kUntouched{0xc3};  // memory of ours that nobody was given
inline constexpr std::byte kTheirs{0x5a};     // every byte that the peer could send

// Past the end come zeros, so that every input is a whole script.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_{reinterpret_cast<const std::byte*>(data), size} {}
  template <typename T>
  T get() {
    T value{};
    const ByteView bytes = take(sizeof(T));
    if (!bytes.empty()) std::memcpy(&value, bytes.data(), bytes.size());
    return value;
  }
  uint8_t u8() { return get<uint8_t>(); }
  uint16_t u16() { return get<uint16_t>(); }
  uint32_t u32() { return get<uint32_t>(); }
  uint64_t u64() { return get<uint64_t>(); }
  ByteView take(size_t nbytes) {
    const ByteView result = data_.first(std::min(nbytes, data_.size()));
    data_ = data_.subspan(result.size());
    return result;
  }
  ByteView rest() { return take(data_.size()); }
  bool empty() const { return data_.empty(); }

 private:
  ByteView data_;
};

inline bool same(ByteView a, ByteView b) { return std::ranges::equal(a, b); }

}  // namespace kvxfer::fuzz
