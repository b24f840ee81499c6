// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The only way bytes from outside become numbers: a bounds-checked little-endian reader, and its
// writer.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace kvxfer {

static_assert(std::endian::native == std::endian::little,
              "the wire is little-endian and read by memcpy; a big-endian port must swap here");

using Bytes = std::vector<std::byte>;
using ByteView = std::span<const std::byte>;

// Reads past the end return zeros and clear ok(): a parser may read a whole record and check once,
// as long as it checks before it uses, allocates or loops over anything that it read.
class Reader {
 public:
  explicit Reader(ByteView data) noexcept : data_(data) {}

  template <typename T>
    requires std::is_trivially_copyable_v<T>
  T get() noexcept {
    T value{};
    if (ByteView bytes = take(sizeof(T)); bytes.size() == sizeof(T))
      std::memcpy(&value, bytes.data(), sizeof(T));
    return value;
  }
  uint8_t u8() noexcept { return get<uint8_t>(); }
  uint16_t u16() noexcept { return get<uint16_t>(); }
  uint32_t u32() noexcept { return get<uint32_t>(); }
  uint64_t u64() noexcept { return get<uint64_t>(); }

  ByteView take(size_t nbytes) noexcept {
    if (!ok_ || nbytes > data_.size()) {
      ok_ = false;
      return {};
    }
    ByteView result = data_.first(nbytes);
    data_ = data_.subspan(nbytes);
    return result;
  }

  // A u16 length, then that many bytes; longer than `limit` is an error.
  std::string text(size_t limit) {
    const size_t nbytes = u16();
    if (nbytes > limit) ok_ = false;
    ByteView bytes = take(nbytes);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

  bool ok() const noexcept { return ok_; }
  size_t remaining() const noexcept { return data_.size(); }
  // True when all was read and nothing was missing.
  bool finished() const noexcept { return ok_ && data_.empty(); }

 private:
  ByteView data_;
  bool ok_ = true;
};

class Writer {
 public:
  explicit Writer(Bytes& out) noexcept : out_(out) {}

  template <typename T>
    requires std::is_trivially_copyable_v<T>
  void put(const T& value) {
    raw({reinterpret_cast<const std::byte*>(&value), sizeof(T)});
  }
  void u8(uint8_t v) { put(v); }
  void u16(uint16_t v) { put(v); }
  void u32(uint32_t v) { put(v); }
  void u64(uint64_t v) { put(v); }
  void raw(ByteView bytes) {
    if (bytes.empty()) return;
    const size_t at = out_.size();
    out_.resize(at + bytes.size());
    std::memcpy(out_.data() + at, bytes.data(), bytes.size());
  }
  void text(std::string_view value) {
    u16(static_cast<uint16_t>(value.size()));
    raw({reinterpret_cast<const std::byte*>(value.data()), value.size()});
  }

 private:
  Bytes& out_;
};

// No control characters: a name goes into messages and logs of others as it is. UTF-8 passes.
inline bool is_printable(std::string_view text) noexcept {
  return std::ranges::none_of(text, [](unsigned char c) { return c < 0x20 || c == 0x7f; });
}

inline ByteView as_bytes_view(std::string_view text) noexcept {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

template <size_t N>
std::string hex(const std::array<std::byte, N>& bytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string out;
  out.reserve(2 * N);
  for (std::byte b : bytes) {
    out += kDigits[std::to_integer<unsigned>(b) >> 4];
    out += kDigits[std::to_integer<unsigned>(b) & 15];
  }
  return out;
}

}  // namespace kvxfer
