// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A peer's words as they may stand in our messages and logs: short, and nothing in them that a
// terminal would obey.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace kvxfer {

inline constexpr size_t kMaxPeerText = 256;

inline std::string peer_text(std::string_view text) {
  std::string out(text.substr(0, kMaxPeerText));
  for (char& c : out)
    if (static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) > 0x7e) c = '?';
  return out;
}

}  // namespace kvxfer
