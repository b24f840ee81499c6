// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The messages of the verbs transport, rewritten on their way out: an honest engine then breaks the
// protocol.
#pragma once

#include <doctest/doctest.h>

#include <atomic>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <utility>
#include <vector>

#include "fake_verbs.h"
#include "transport/verbs/records.hpp"

namespace kvxfer::tamper {

using verbs::Type;

// A message of one fragment, as it stands on the wire (docs/wire_format.md).
struct Message {
  struct Head {
    uint32_t type = 0, nbytes = 0, received = 0, number = 0;
  } head;
  Bytes body;

  bool is(Type type) const { return head.type == static_cast<uint32_t>(type); }
  Ticket ticket() const {  // with which all those begin that are rewritten here
    Ticket out;
    REQUIRE(body.size() >= sizeof out);
    std::memcpy(&out, body.data(), sizeof out);
    return out;
  }
};

inline Message made(Type type, std::initializer_list<ByteView> parts) {
  Message out;
  out.head.type = static_cast<uint32_t>(type);
  for (const ByteView& part : parts) out.body.insert(out.body.end(), part.begin(), part.end());
  out.head.nbytes = static_cast<uint32_t>(out.body.size());
  return out;
}
// What is said in the place of a message, when it is of this type. Fragments are numbered anew, so
// that nothing is wrong but what they mean.
class Tamper {
 public:
  using Rewrite = std::function<std::vector<Message>(const Message&)>;
  Tamper(Type type, Rewrite rewrite) {
    type_ = type;
    rewrite_ = std::move(rewrite);
    num_ = 0;
    qp_num_ = shift_ = 0;
    fake_verbs_tamper(on_message);
  }
  ~Tamper() { fake_verbs_tamper(nullptr); }
  static int num() { return num_.load(); }  // so many were rewritten

 private:
  static int on_message(uint32_t qp_num, const void* bytes, uint32_t nbytes, fake_verbs_say say,
                        void* to) {
    Message message;
    if (nbytes < sizeof message.head) return 0;
    std::memcpy(&message.head, bytes, sizeof message.head);
    const auto* rest = static_cast<const std::byte*>(bytes) + sizeof message.head;
    message.body.assign(rest, rest + (nbytes - sizeof message.head));
    std::vector<Message> instead{message};
    if (message.is(type_)) {
      instead = rewrite_(message);
      qp_num_ = qp_num;
      ++num_;
    }
    if (qp_num != qp_num_) return 0;
    for (Message& each : instead) {
      each.head.received = message.head.received;
      each.head.number = message.head.number + shift_++;
      Bytes out(sizeof each.head);
      std::memcpy(out.data(), &each.head, sizeof each.head);
      out.insert(out.end(), each.body.begin(), each.body.end());
      say(to, out.data(), static_cast<uint32_t>(out.size()));
    }
    --shift_;
    return 1;
  }
  // Used within a post, one at a time.
  static inline Type type_;
  static inline Rewrite rewrite_;
  static inline std::atomic<int> num_;
  static inline uint32_t qp_num_, shift_;
};

}  // namespace kvxfer::tamper
