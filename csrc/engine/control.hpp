// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What one engine tells another over the control lane, and what a lease token holds.
#pragma once

#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "transport/transport.hpp"

namespace kvxfer {

inline constexpr size_t kMaxNameBytes = 255;

struct RegionAdded {
  RegionRef ref;
  uint64_t nbytes = 0;
  bool writable = true;
  std::string name;
  int device = kHostMemory;
};
struct RegionRemoved {
  uint64_t id = 0;
};
struct Credit {  // so many of your notifications were drained here
  uint32_t count = 0;
};
struct Attach {  // what a transport asks, and answers, while a session is being set up
  std::string transport;
  bool is_answer = false;
  Bytes data;
};
using Control = std::variant<RegionAdded, RegionRemoved, Credit, Attach>;

Bytes encode(const Control& message);
std::optional<Control> decode_control(ByteView payload);

struct Offer {
  std::string transport;
  Bytes data;
};
Bytes encode_offers(const std::vector<Offer>& offers);
std::optional<std::vector<Offer>> decode_offers(ByteView payload);

struct Token {
  Incarnation owner{};
  LeaseRef lease;
};
Bytes encode_token(const Token& token);
std::optional<Token> decode_token(ByteView bytes);

}  // namespace kvxfer
