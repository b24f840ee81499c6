// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Two connected queue pairs on the software NICs, with memory on both sides, for tests of the NICs
// themselves.
#pragma once

#include <doctest/doctest.h>
#include <infiniband/verbs.h>
#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/clock.hpp"
#include "eventually.hpp"
#include "fake_verbs.h"

namespace fake_verbs_test {

// Until `done` or five seconds have passed, which on any machine means never.
inline bool eventually(const std::function<bool()>& done) { return eventually_within(5, done); }

// For a while nothing happens that should not.
inline void pause_ms(int ms) { ::poll(nullptr, 0, ms); }

struct Setup {
  std::string plan;
  int cqe = 256;
  uint32_t max_send_wr = 64, max_recv_wr = 64, max_sge = 4, max_inline = 64;
  unsigned access = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC;
  // 8 times 268 ms, so that a busy machine does not look like a lost peer; 10 us.
  uint8_t timeout = 16, retry_cnt = 7, rnr_retry = 7, min_rnr_timer = 1;
  uint8_t max_rd_atomic = 4, max_dest_rd_atomic = 4;
  int sq_sig_all = 0;
  bool channel = false;
  int sgid_index = 3;  // IPv4, RoCE v2
  int device = 0;
  size_t nbytes = 1 << 16;
};

// One side. Destroys everything that is left, and fails the test when that cannot be done.
struct End {
  explicit End(const Setup& setup);
  ~End();
  End(const End&) = delete;
  End& operator=(const End&) = delete;

  ibv_qp* make_qp(const Setup& setup);
  int to_init(ibv_qp* qp) const;
  int to_rtr(ibv_qp* qp, uint32_t peer_qpn, const ibv_gid& peer_gid) const;
  int to_rts(ibv_qp* qp) const;
  int to(ibv_qp* qp, ibv_qp_state state) const;
  ibv_qp_state state(ibv_qp* qp) const;

  // All return the verb's errno.
  int post(ibv_send_wr& wr, ibv_qp* on = nullptr) const;
  int receive(uint64_t wr_id, ibv_sge sge, ibv_qp* on = nullptr) const;
  ibv_sge sge(size_t offset, size_t n) const;
  ibv_send_wr write(const End& to, size_t n, uint64_t wr_id = 1) const;
  // The next completion of either kind, which has to come.
  ibv_wc await() const;
  bool poll(ibv_wc& wc) const { return ibv_poll_cq(cq, 1, &wc) == 1; }
  void fill(uint8_t seed);
  // The next asynchronous event; has to come, and is acknowledged.
  ibv_event_type await_event() const;

  Setup setup;
  ibv_context* context = nullptr;
  ibv_pd* pd = nullptr;
  ibv_comp_channel* channel = nullptr;
  ibv_cq* cq = nullptr;
  ibv_qp* qp = nullptr;
  ibv_mr* mr = nullptr;
  ibv_gid gid{};
  std::vector<std::byte> memory;
  mutable std::vector<ibv_sge> lists[8];
  mutable int next_list = 0;
};

void connect(End& a, ibv_qp* qa, End& b, ibv_qp* qb);

struct Pair {
  explicit Pair(const Setup& setup = {}) : Pair(setup, setup) {}
  Pair(const Setup& left, const Setup& right);
  End a, b;
};

}  // namespace fake_verbs_test
