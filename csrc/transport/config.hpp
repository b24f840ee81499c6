// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What a user may tune about transports; the engine hands it to each of them unchanged.
#pragma once

#include <cstdint>
#include <string>

namespace kvxfer {

struct TransportConfig {
  uint32_t num_lanes = 2;       // bulk lanes of a tcp connection
  int32_t copy_threads = -1;    // of the copy pool; -1: by the CPUs this process may use
  int64_t spin_ns = 20'000;     // before the progress thread or a waiter sleeps
  bool allow_ptrace = false;    // cma may call prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY)
  std::string tls_certificate;  // PEM files; all three or none
  std::string tls_key, tls_authority;
  int64_t deadline_ns = 30'000'000'000;  // of transfers that name none: what retries may take
  uint32_t max_pending = 65'536;         // transfers to one peer that have not come to rest
  uint64_t max_pending_spans = uint64_t{1} << 26;  // of all these, 24 bytes each
  std::string verbs_device;        // "mlx5_0", "mlx5_0:2,mlx5_1"; empty: every active port
  int32_t verbs_gid_index = -1;    // of each port; -1: by rule
  uint32_t verbs_queue_pairs = 1;  // for READs, between two ports that are joined
  bool verbs_push = false;         // writes under leases by RDMA WRITE, into windows
  // A region with more bytes to register, over all devices, is registered in the background, in
  // parts of at most so many bytes, between which it can be stopped.
  uint64_t verbs_background_nbytes = uint64_t{256} << 20;
  uint64_t verbs_part_nbytes = uint64_t{4} << 30;
  std::string faults;  // what the faulty transport injects; see faulty/plan.hpp
};

}  // namespace kvxfer
