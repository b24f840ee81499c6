// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// RC queue pairs and their way to RTS. Every error names the verb, the attributes and errno.
#pragma once

#include <cstdint>
#include <string>

#include "transport/verbs/device.hpp"

namespace kvxfer::verbs {

// The far end of a queue pair.
struct QpEnd {
  uint32_t number = 0, psn = 0;  // 24 bits each
};

// How the two ports reach each other, agreed once a connection.
struct Route {
  Path path;
  uint16_t remote_lid = 0;
  uint8_t mtu = IBV_MTU_1024;
  uint8_t timeout = 14;     // 4.096 us x 2^timeout before a packet is sent again
  uint8_t retry_count = 6;  // so often
};

struct QpShape {
  uint32_t max_send = 1, max_recv = 1, max_send_sge = 1, max_recv_sge = 1, max_inline = 0;
};

// All throw Error. A queue pair is created in RESET and leaves it for INIT at once, where receives
// may be posted.
QpPtr make_qp(const Device& device, ibv_cq* cq, QpShape& shape, int access);
// INIT -> RTR -> RTS. `served`, `issued`: RDMA READs in flight, as their responder and requester.
void connect_qp(const Device& device, ibv_qp* qp, const Route& route, const QpEnd& remote,
                uint32_t own_psn, uint8_t served, uint8_t issued);
// From any state; 0 or errno. Afterwards no packet is answered, and what was posted comes back.
int stop_qp(ibv_qp* qp) noexcept;
uint32_t random_psn();

// Retries so that a peer that does not answer is given up within half of the deadline:
// 4.096 us x 2^timeout x retry_count <= deadline / 2, as far as the encoding allows.
uint8_t timeout_for(int64_t deadline_ns, uint8_t retry_count) noexcept;

}  // namespace kvxfer::verbs
