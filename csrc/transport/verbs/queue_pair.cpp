// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/verbs/queue_pair.hpp"

#include <algorithm>
#include <cerrno>
#include <utility>

#include "common/clock.hpp"
#include "common/error.hpp"
#include "common/random.hpp"

namespace kvxfer::verbs {
namespace {

// Receives never run out (credits), so this is met only by a bug, and must then end. No deadline is
// looked at: 6 x 0.64 ms are less than the retries that the shortest of them gets.
constexpr uint8_t kRnrRetry = 6;      // 7 would be for ever
constexpr uint8_t kMinRnrTimer = 12;  // 0.64 ms
constexpr uint8_t kHopLimit = 64;

void modify(const Device& device, ibv_qp* qp, ibv_qp_attr& attr, int mask, const char* step,
            const std::string& with) {
  if (const int err = api().modify_qp(qp, &attr, mask))
    throw Error(Code::kTransport,
                cat("ibv_modify_qp(qp ", qp->qp_num, ", ", step, with, ") on ", device.name(),
                    " failed: ", errno_text(err)),
                err, "verbs");
}

}  // namespace

QpPtr make_qp(const Device& device, ibv_cq* cq, QpShape& shape, int access) {
  ibv_qp_init_attr init{};
  init.send_cq = init.recv_cq = cq;
  init.qp_type = IBV_QPT_RC;
  init.cap.max_send_wr = shape.max_send;
  init.cap.max_recv_wr = shape.max_recv;
  init.cap.max_send_sge = shape.max_send_sge;
  init.cap.max_recv_sge = shape.max_recv_sge;
  init.cap.max_inline_data = shape.max_inline;
  QpPtr qp(api().create_qp(device.pd(), &init));
  // No query tells how much may be inline; what a device refuses is asked for without.
  if (!qp && errno == EINVAL && std::exchange(shape.max_inline, 0) != 0) {
    init.cap.max_inline_data = 0;
    qp.reset(api().create_qp(device.pd(), &init));
  }
  if (!qp) {
    const int err = errno;
    throw Error(
        Code::kTransport,
        cat("ibv_create_qp(RC, max_send_wr ", shape.max_send, ", max_recv_wr ", shape.max_recv,
            ", max_send_sge ", shape.max_send_sge, ") on ", device.name(),
            " failed: ", errno_text(err), "; the device has room for ", device.limits().max_qp,
            " queue pairs of ", device.limits().max_qp_wr, " work requests"),
        err, "verbs");
  }
  ibv_qp_attr attr{};
  attr.qp_state = IBV_QPS_INIT;
  attr.port_num = device.port();
  attr.qp_access_flags = static_cast<unsigned>(access);
  modify(device, qp.get(), attr,
         IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS, "RESET to INIT",
         cat(", port ", int{attr.port_num}, ", access ", access));
  return qp;
}

void connect_qp(const Device& device, ibv_qp* qp, const Route& route, const QpEnd& remote,
                uint32_t own_psn, uint8_t served, uint8_t issued) {
  ibv_qp_attr attr{};
  attr.qp_state = IBV_QPS_RTR;
  attr.path_mtu = static_cast<ibv_mtu>(route.mtu);
  attr.dest_qp_num = remote.number;
  attr.rq_psn = remote.psn;
  attr.max_dest_rd_atomic = served;
  attr.min_rnr_timer = kMinRnrTimer;
  attr.ah_attr.port_num = device.port();
  attr.ah_attr.dlid = route.remote_lid;
  if (route.path.global) {
    attr.ah_attr.is_global = 1;
    std::copy_n(route.path.remote.raw.begin(), 16,
                reinterpret_cast<std::byte*>(attr.ah_attr.grh.dgid.raw));
    attr.ah_attr.grh.sgid_index = static_cast<uint8_t>(route.path.local.index);
    attr.ah_attr.grh.hop_limit = kHopLimit;
  }
  modify(device, qp, attr,
         IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
             IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER,
         "INIT to RTR",
         cat(", dest_qp_num ", remote.number, ", path_mtu ", int{route.mtu}, ", dlid ",
             route.remote_lid, ", ", route.path.reason, ", rq_psn ", remote.psn,
             ", max_dest_rd_atomic ", int{served}, ", min_rnr_timer ", int{kMinRnrTimer}));
  attr = {};
  attr.qp_state = IBV_QPS_RTS;
  attr.sq_psn = own_psn;
  attr.timeout = route.timeout;
  attr.retry_cnt = route.retry_count;
  attr.rnr_retry = kRnrRetry;
  attr.max_rd_atomic = issued;
  modify(
      device, qp, attr,
      IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
          IBV_QP_MAX_QP_RD_ATOMIC,
      "RTR to RTS",
      cat(", sq_psn ", own_psn, ", timeout ", int{route.timeout}, ", retry_cnt ",
          int{route.retry_count}, ", rnr_retry ", int{kRnrRetry}, ", max_rd_atomic ", int{issued}));
}

int stop_qp(ibv_qp* qp) noexcept {
  ibv_qp_attr attr{};
  attr.qp_state = IBV_QPS_ERR;
  return api().modify_qp(qp, &attr, IBV_QP_STATE);
}

uint32_t random_psn() {
  const auto bytes = random_bytes<3>();
  return std::to_integer<uint32_t>(bytes[0]) | std::to_integer<uint32_t>(bytes[1]) << 8 |
         std::to_integer<uint32_t>(bytes[2]) << 16;
}

uint8_t timeout_for(int64_t deadline_ns, uint8_t retry_count) noexcept {
  // 8 is a millisecond, below which a busy host is taken for a lost one; 20 is 4.3 s.
  uint8_t timeout = 20;
  while (timeout > 8 && deadline_ns != kNever &&
         (int64_t{4096} << timeout) * retry_count > deadline_ns / 2)
    --timeout;
  return timeout;
}

}  // namespace kvxfer::verbs
