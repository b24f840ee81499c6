// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What travels between two NICs: the fields of the base, RDMA, atomic and acknowledge headers that
// the model needs. Both ends run on one machine, so it is the struct itself that travels.
#pragma once

#include <infiniband/verbs.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fake_verbs {

// Packet sequence numbers have 24 bits; which of two is the later one is told by the shorter way.
inline constexpr uint32_t kPsnMask = 0xffffff;
inline uint32_t psn_add(uint32_t psn, uint32_t n) noexcept { return (psn + n) & kPsnMask; }
inline int32_t psn_diff(uint32_t a, uint32_t b) noexcept {
  return static_cast<int32_t>((a - b) << 8) >> 8;
}

enum class Kind : uint8_t {
  kSend,
  kWrite,
  kReadRequest,
  kAtomicRequest,
  kReadResponse,  // from here on: to the requester
  kAtomicResponse,
  kAck,
};
inline bool is_response(Kind kind) noexcept { return kind >= Kind::kReadResponse; }

enum Flag : uint8_t {
  kFirst = 1,
  kLast = 2,
  kImm = 4,
  kInvalidate = 8,
  kSolicited = 16,
  kAckRequest = 32,
  kFetchAdd = 64,  // of an atomic request; else compare and swap
};

// Of an acknowledgement; all but kOk are negative and name the packet that is refused.
enum class Syndrome : uint8_t { kOk, kRnr, kSequence, kInvalidRequest, kAccess, kOperational };

struct Head {
  uint32_t magic;
  Kind kind;
  uint8_t flags;
  Syndrome syndrome;
  uint8_t rnr_timer;
  uint32_t dest_qpn, src_qpn, psn;
  uint8_t gid_type, rail;  // of the sender
  uint16_t dlid;
  ibv_gid sgid, dgid;
  uint64_t remote_addr;        // of this packet's piece
  uint64_t compare_add, swap;  // of an atomic; its response carries the old value in compare_add
  uint32_t rkey;
  uint32_t length;       // of the whole message
  uint32_t reads_ahead;  // read and atomic requests of the sender that have no answer yet
  uint32_t imm;          // or the key to invalidate
  uint32_t num_bytes;    // of the payload
  uint32_t unused;
};

struct Packet {
  Head head{};
  std::vector<std::byte> payload;
};

}  // namespace fake_verbs
