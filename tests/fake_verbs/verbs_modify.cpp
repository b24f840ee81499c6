// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Entry points: the queue pair's state machine, with exactly the attributes that each step needs.
#include <algorithm>

#include "exports.hpp"
#include "nic.hpp"

namespace fake_verbs {
namespace {

// The steps of an RC queue pair (IBTA table 91; the kernel's are the same). Any state goes to RESET
// and ERR with nothing but the state.
struct Step {
  ibv_qp_state from, to;
  int needed, allowed;
};
constexpr Step kSteps[] = {
    {IBV_QPS_RESET, IBV_QPS_INIT, IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS, 0},
    {IBV_QPS_INIT, IBV_QPS_INIT, 0, IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS},
    {IBV_QPS_INIT, IBV_QPS_RTR,
     IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC |
         IBV_QP_MIN_RNR_TIMER,
     IBV_QP_ACCESS_FLAGS | IBV_QP_PKEY_INDEX},
    {IBV_QPS_RTR, IBV_QPS_RTS,
     IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC,
     IBV_QP_CUR_STATE | IBV_QP_ACCESS_FLAGS | IBV_QP_MIN_RNR_TIMER},
    {IBV_QPS_RTS, IBV_QPS_RTS, 0, IBV_QP_CUR_STATE | IBV_QP_ACCESS_FLAGS | IBV_QP_MIN_RNR_TIMER},
    {IBV_QPS_RTS, IBV_QPS_SQD, 0, IBV_QP_EN_SQD_ASYNC_NOTIFY},
    {IBV_QPS_SQD, IBV_QPS_RTS, 0, IBV_QP_CUR_STATE | IBV_QP_ACCESS_FLAGS | IBV_QP_MIN_RNR_TIMER},
    {IBV_QPS_SQD, IBV_QPS_SQD, 0,
     IBV_QP_ACCESS_FLAGS | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
         IBV_QP_MIN_RNR_TIMER},
};

bool step_is_legal(ibv_qp_state from, ibv_qp_state to, int mask) {
  const int given = mask & ~IBV_QP_STATE;
  if (to == IBV_QPS_RESET || to == IBV_QPS_ERR) return given == 0;
  for (const Step& step : kSteps)
    if (step.from == from && step.to == to)
      return (given & step.needed) == step.needed && (given & ~(step.needed | step.allowed)) == 0;
  return false;
}

bool values_are_legal(Nic& nic, Context& context, const QueuePair& qp, const ibv_qp_attr& a,
                      int mask) {
  const Plan& plan = nic.plan;
  const auto has = [&](int bit) { return (mask & bit) != 0; };
  if (has(IBV_QP_PORT) && !context.of->port(a.port_num)) return false;
  if (has(IBV_QP_PKEY_INDEX) && a.pkey_index != 0) return false;
  if (has(IBV_QP_CUR_STATE) && a.cur_qp_state != qp.state) return false;
  if (has(IBV_QP_PATH_MTU) &&
      (a.path_mtu < IBV_MTU_256 || a.path_mtu > IBV_MTU_4096 || 128 << a.path_mtu > plan.mtu))
    return false;
  if (has(IBV_QP_MAX_DEST_RD_ATOMIC) && a.max_dest_rd_atomic > plan.max_rd_atomic) return false;
  if (has(IBV_QP_MAX_QP_RD_ATOMIC) && a.max_rd_atomic > plan.max_rd_atomic) return false;
  if (has(IBV_QP_TIMEOUT) && a.timeout > 31) return false;
  if (has(IBV_QP_RETRY_CNT) && a.retry_cnt > 7) return false;
  if (has(IBV_QP_RNR_RETRY) && a.rnr_retry > 7) return false;
  if (has(IBV_QP_MIN_RNR_TIMER) && a.min_rnr_timer > 31) return false;
  if (has(IBV_QP_AV)) {
    const ibv_ah_attr& av = a.ah_attr;
    const Port* port = qp.port;
    if (av.port_num != 0 && av.port_num != port->number) return false;
    if (!av.is_global) return context.of->infiniband;  // RoCE has no other addresses
    if (av.grh.sgid_index >= port->gids.size() || port->gids[av.grh.sgid_index].empty())
      return false;
  }
  return true;
}

void apply(QueuePair& qp, const ibv_qp_attr& a, int mask) {
  ibv_qp_attr& to = qp.attr;
  const auto copy = [&](int bit, auto member) {
    if (mask & bit) to.*member = a.*member;
  };
  copy(IBV_QP_ACCESS_FLAGS, &ibv_qp_attr::qp_access_flags);
  copy(IBV_QP_PKEY_INDEX, &ibv_qp_attr::pkey_index);
  copy(IBV_QP_PORT, &ibv_qp_attr::port_num);
  copy(IBV_QP_AV, &ibv_qp_attr::ah_attr);
  copy(IBV_QP_PATH_MTU, &ibv_qp_attr::path_mtu);
  copy(IBV_QP_TIMEOUT, &ibv_qp_attr::timeout);
  copy(IBV_QP_RETRY_CNT, &ibv_qp_attr::retry_cnt);
  copy(IBV_QP_RNR_RETRY, &ibv_qp_attr::rnr_retry);
  copy(IBV_QP_MAX_QP_RD_ATOMIC, &ibv_qp_attr::max_rd_atomic);
  copy(IBV_QP_MAX_DEST_RD_ATOMIC, &ibv_qp_attr::max_dest_rd_atomic);
  copy(IBV_QP_MIN_RNR_TIMER, &ibv_qp_attr::min_rnr_timer);
  copy(IBV_QP_DEST_QPN, &ibv_qp_attr::dest_qp_num);
  copy(IBV_QP_EN_SQD_ASYNC_NOTIFY, &ibv_qp_attr::en_sqd_async_notify);
  if (mask & IBV_QP_RQ_PSN) to.rq_psn = qp.expected_psn = a.rq_psn & kPsnMask;
  if (mask & IBV_QP_SQ_PSN)
    to.sq_psn = qp.next_psn = qp.acked_psn = qp.sent_psn = a.sq_psn & kPsnMask;
}

// All work is gone without a word, what was completed and not yet polled included.
void reset(Nic& nic, QueuePair& qp) {
  nic.note_end(qp);
  nic.forget(qp);
  qp.sends.clear();
  qp.receives.clear();
  qp.receiving.reset();
  qp.answers.clear();
  qp.atomics.clear();
  qp.rewound.reset();
  qp.retired = qp.cursor = qp.posted;
  qp.receives_retired = qp.receives_posted;
  qp.cursor_piece = 0;
  qp.timer_ns = kvxfer::kNever;
  qp.paused_until_ns = 0;
  qp.nak_sent = qp.established = qp.flushing = qp.draining = false;
  qp.attr = {};
  qp.port = nullptr;
  qp.state = IBV_QPS_RESET;
}

}  // namespace
}  // namespace fake_verbs

using namespace fake_verbs;

FAKE_VERBS_EXPORT int ibv_modify_qp(ibv_qp* base, ibv_qp_attr* attr, int mask) {
  auto& qp = *static_cast<QueuePair*>(base);
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  Context& context = context_of(qp.context);
  if (const int err = nic.refuse("modify_qp", *context.of)) {
    qp.hindered |= (mask & IBV_QP_STATE) != 0 && attr->qp_state == IBV_QPS_ERR;
    return fail_int(err);
  }
  const ibv_qp_state from = qp.state;
  const ibv_qp_state to = mask & IBV_QP_STATE ? attr->qp_state : from;
  if (!step_is_legal(from, to, mask) || !values_are_legal(nic, context, qp, *attr, mask))
    return fail_int(EINVAL);
  if (to == IBV_QPS_RESET) return reset(nic, qp), 0;
  if (to == IBV_QPS_ERR) {
    // From here on nothing of the peer's lands; what was queued is completed a little later.
    if (from == IBV_QPS_RESET)
      qp.state = IBV_QPS_ERR, qp.in_error_since_ns = kvxfer::now_ns();
    else
      nic.break_qp(qp, {});
    return 0;
  }
  apply(qp, *attr, mask);
  qp.state = to;
  if (mask & IBV_QP_PORT) qp.port = context.of->port(attr->port_num);
  if (to == IBV_QPS_RTS && from == IBV_QPS_RTR) {
    qp.retries_left = qp.attr.retry_cnt;
    qp.rnr_left = qp.attr.rnr_retry;
  }
  if (to == IBV_QPS_SQD && from == IBV_QPS_RTS) qp.draining = true;
  nic.wake(qp);
  return 0;
}

FAKE_VERBS_EXPORT int ibv_query_qp(ibv_qp* base, ibv_qp_attr* attr, int, ibv_qp_init_attr* init) {
  auto& qp = *static_cast<QueuePair*>(base);
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  if (const int err = nic.refuse("query_qp", *context_of(qp.context).of)) return fail_int(err);
  *attr = qp.attr;
  attr->qp_state = attr->cur_qp_state = qp.state;
  attr->cap = qp.cap;
  attr->sq_draining = qp.draining;
  *init = {};
  init->qp_context = qp.qp_context;
  init->send_cq = qp.send_cq;
  init->recv_cq = qp.recv_cq;
  init->cap = qp.cap;
  init->qp_type = qp.qp_type;
  init->sq_sig_all = qp.signal_all;
  return 0;
}
