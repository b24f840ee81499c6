// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A reliable connected queue pair: its queues, what the requester knows of the peer's answers, and
// what the responder knows of the peer's requests.
#pragma once

#include <infiniband/verbs.h>

#include <cstdint>
#include <deque>
#include <optional>
#include <vector>

#include "common/clock.hpp"
#include "completion_queue.hpp"
#include "keys.hpp"
#include "packet.hpp"

namespace fake_verbs {

struct Port;

struct SendRequest {
  uint64_t wr_id = 0;
  ibv_wr_opcode opcode = IBV_WR_SEND;
  unsigned flags = 0;
  bool signaled = false;
  std::vector<ibv_sge> sges;
  std::vector<std::byte> inlined;
  uint64_t length = 0;
  uint32_t imm = 0;  // or the key to invalidate
  uint64_t remote_addr = 0, compare_add = 0, swap = 0;
  uint32_t rkey = 0;
  uint32_t window = 0, new_window = 0;  // keys of a window before and after the bind
  ibv_mw_bind_info bind{};
  uint32_t bind_region = 0;  // its rkey

  uint64_t number = 0;  // of all that were ever posted to this queue
  bool has_psn = false, done = false;
  uint32_t first_psn = 0, num_psns = 0;
  uint32_t answered = 0;  // response packets of a read or atomic that are in
  ibv_wc_status status = IBV_WC_SUCCESS;
  // The plan says that it fails after all, with this, when it is answered.
  std::optional<ibv_wc_status> doomed;

  bool is_local() const { return opcode == IBV_WR_BIND_MW || opcode == IBV_WR_LOCAL_INV; }
  bool is_atomic() const {
    return opcode == IBV_WR_ATOMIC_CMP_AND_SWP || opcode == IBV_WR_ATOMIC_FETCH_AND_ADD;
  }
  bool is_read() const { return opcode == IBV_WR_RDMA_READ || is_atomic(); }
};

struct ReceiveRequest {
  uint64_t wr_id = 0;
  std::vector<ibv_sge> sges;
  uint64_t length = 0;
};

// What the responder has still to send, in this order.
struct Answer {
  Packet packet;             // an acknowledgement or an atomic's old value
  uint32_t num_packets = 1;  // of a read: that many packets, made when they are sent
  uint32_t sent = 0;
};

struct QueuePair : ibv_qp {
  ibv_qp_cap cap{};
  bool signal_all = false;
  ibv_qp_attr attr{};  // as set by ibv_modify_qp
  Port* port = nullptr;

  // Requester.
  std::deque<SendRequest> sends;
  uint64_t posted = 0, retired = 0;  // their difference is what the queue's depth bounds
  uint64_t cursor = 0;               // number of the request that is sent next ...
  uint32_t cursor_piece = 0;         // ... and the PSN within it
  uint32_t next_psn = 0;             // of the next new request
  uint32_t acked_psn = 0;            // the oldest without an answer
  uint32_t sent_psn = 0;             // one past the newest that was ever sent
  std::optional<uint32_t> rewound;   // once for each answer that is missing
  int64_t timer_ns = kvxfer::kNever;
  int64_t paused_until_ns = 0;  // receiver not ready
  int retries_left = 0, rnr_left = 0;
  bool draining = false;  // SQD: its event is still to come

  // Responder.
  std::deque<ReceiveRequest> receives;
  uint64_t receives_posted = 0, receives_retired = 0;
  uint32_t expected_psn = 0;
  bool nak_sent = false;  // once for each gap
  std::optional<ReceiveRequest> receiving;
  uint64_t received = 0;  // of the message that is coming in
  std::deque<Answer> answers;
  std::deque<std::pair<uint32_t, uint64_t>> atomics;  // PSN and old value, for repetitions
  bool established = false;

  bool flushing = false;  // in ERR: what is queued is still to be completed
  int64_t in_error_since_ns = 0;
  bool hindered = false;  // its user could not end it in order: a call for that was refused
  bool ready = false;     // in the NIC's list of those with something to do
  uint32_t async_events_given = 0;

  uint32_t mtu() const { return 128u << attr.path_mtu; }
  uint32_t psn_at_cursor() const;
};

inline uint32_t QueuePair::psn_at_cursor() const {
  const uint64_t first = posted - sends.size();
  for (uint64_t n = cursor; n < posted; ++n) {
    const SendRequest& request = sends[n - first];
    if (request.is_local()) continue;
    return request.has_psn ? psn_add(request.first_psn, n == cursor ? cursor_piece : 0) : next_psn;
  }
  return next_psn;
}

}  // namespace fake_verbs
