// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What the context's function table points to: posting, polling, arming.
#include <algorithm>

#include "exports.hpp"
#include "nic.hpp"

namespace fake_verbs {
namespace {

bool takes_sends(ibv_qp_state state) {
  return state == IBV_QPS_RTS || state == IBV_QPS_SQD || state == IBV_QPS_SQE ||
         state == IBV_QPS_ERR;
}

bool has_data(ibv_wr_opcode opcode) {
  return opcode == IBV_WR_RDMA_WRITE || opcode == IBV_WR_RDMA_WRITE_WITH_IMM ||
         opcode == IBV_WR_SEND || opcode == IBV_WR_SEND_WITH_IMM || opcode == IBV_WR_SEND_WITH_INV;
}

// The same request, each time with other bytes; only the last one is signalled. Empty: as it is.
std::vector<SendRequest> tampered(fake_verbs_tamperer tamper, const QueuePair& qp,
                                  const SendRequest& request) {
  std::vector<std::byte> bytes(request.inlined);
  for (const ibv_sge& sge : request.sges) {
    const auto* from = reinterpret_cast<const std::byte*>(sge.addr);
    bytes.insert(bytes.end(), from, from + sge.length);
  }
  std::vector<std::vector<std::byte>> said;
  const auto say = [](void* to, const void* from, uint32_t nbytes) {
    const auto* begin = static_cast<const std::byte*>(from);
    static_cast<decltype(said)*>(to)->emplace_back(begin, begin + nbytes);
  };
  if (tamper(qp.qp_num, bytes.data(), static_cast<uint32_t>(bytes.size()), say, &said) == 0)
    return {};
  std::vector<SendRequest> out(said.size(), request);
  for (size_t i = 0; i < said.size(); ++i) {
    out[i].signaled &= i + 1 == said.size();
    out[i].flags |= IBV_SEND_INLINE;
    out[i].sges.clear();
    out[i].length = said[i].size();
    out[i].inlined = std::move(said[i]);
  }
  return out;
}

bool is_known(ibv_wr_opcode opcode) { return opcode <= IBV_WR_SEND_WITH_INV; }

// Fills what is known when it is posted; an errno.
int read(const QueuePair& qp, const ibv_send_wr& wr, SendRequest& out) {
  if (!is_known(wr.opcode) || wr.num_sge < 0 ||
      static_cast<uint32_t>(wr.num_sge) > qp.cap.max_send_sge)
    return EINVAL;
  out.wr_id = wr.wr_id;
  out.opcode = wr.opcode;
  out.flags = wr.send_flags;
  out.signaled = qp.signal_all || wr.send_flags & IBV_SEND_SIGNALED;
  out.imm = wr.imm_data;
  if (wr.opcode == IBV_WR_BIND_MW) {
    const ibv_mw* mw = wr.bind_mw.mw;
    const ibv_mr* mr = wr.bind_mw.bind_info.mr;
    // A window of type 1 is bound by ibv_bind_mw, which marks its requests so.
    const bool of_type_1 = wr.send_flags & kBindOfType1;
    if (!mw || (!mr && wr.bind_mw.bind_info.length > 0)) return EINVAL;
    if (of_type_1 != (mw->type == IBV_MW_TYPE_1)) return EINVAL;
    if (mw->pd != qp.pd || (mr && mr->pd != qp.pd)) return EPERM;
    out.window = mw->rkey;
    out.new_window = wr.bind_mw.rkey;
    out.bind = wr.bind_mw.bind_info;
    out.bind_region = mr ? mr->rkey : 0;
    return 0;
  }
  if (wr.opcode == IBV_WR_LOCAL_INV) return 0;
  for (int i = 0; i < wr.num_sge; ++i) out.length += wr.sg_list[i].length;
  if (out.is_atomic()) {
    out.remote_addr = wr.wr.atomic.remote_addr;
    out.rkey = wr.wr.atomic.rkey;
    out.compare_add = wr.wr.atomic.compare_add;
    out.swap = wr.wr.atomic.swap;
  } else if (wr.opcode == IBV_WR_RDMA_READ || wr.opcode == IBV_WR_RDMA_WRITE ||
             wr.opcode == IBV_WR_RDMA_WRITE_WITH_IMM) {
    out.remote_addr = wr.wr.rdma.remote_addr;
    out.rkey = wr.wr.rdma.rkey;
  }
  if (!(wr.send_flags & IBV_SEND_INLINE)) {
    out.sges.assign(wr.sg_list, wr.sg_list + wr.num_sge);
    return 0;
  }
  if (!has_data(wr.opcode) || out.length > qp.cap.max_inline_data) return EINVAL;
  for (int i = 0; i < wr.num_sge; ++i) {
    const auto* from = reinterpret_cast<const std::byte*>(wr.sg_list[i].addr);
    out.inlined.insert(out.inlined.end(), from, from + wr.sg_list[i].length);
  }
  return 0;
}

}  // namespace

int post_send(ibv_qp* base, ibv_send_wr* wr, ibv_send_wr** bad_wr) {
  auto& qp = *static_cast<QueuePair*>(base);
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  Device& device = *context_of(qp.context).of;
  ++nic.statistics.doorbells;
  int err = nic.refuse("post_send", device);
  for (; wr; wr = wr->next) {
    SendRequest request;
    if (!err && !takes_sends(qp.state)) err = EINVAL;
    if (!err) err = read(qp, *wr, request);
    // A slot comes back only when a completion behind it is polled.
    if (!err && qp.posted - qp.retired >= qp.cap.max_send_wr) err = ENOMEM;
    if (!err && nic.hit(nic.plan.post)) err = ENOMEM;
    if (err) {
      *bad_wr = wr;
      break;
    }
    if (wr->send_flags & IBV_SEND_INLINE) ++nic.statistics.inlined;
    std::vector<SendRequest> requests;
    if (nic.tamper && request.opcode == IBV_WR_SEND && request.length > 0)
      requests = tampered(nic.tamper, qp, request);
    if (requests.empty()) requests.push_back(std::move(request));
    for (SendRequest& each : requests) {
      each.number = qp.posted++;
      qp.sends.push_back(std::move(each));
      nic.count_request(qp);
    }
  }
  if (err && qp.state == IBV_QPS_ERR) qp.hindered = true;
  // Those before the bad one are on their way.
  if (qp.state == IBV_QPS_ERR) qp.flushing = true;
  nic.wake(qp);
  return fail_int(err);
}

int post_recv(ibv_qp* base, ibv_recv_wr* wr, ibv_recv_wr** bad_wr) {
  auto& qp = *static_cast<QueuePair*>(base);
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  int err = nic.refuse("post_recv", *context_of(qp.context).of);
  for (; wr; wr = wr->next) {
    if (!err && qp.state == IBV_QPS_RESET) err = EINVAL;
    if (!err && (wr->num_sge < 0 || static_cast<uint32_t>(wr->num_sge) > qp.cap.max_recv_sge))
      err = EINVAL;
    if (!err && qp.receives_posted - qp.receives_retired >= qp.cap.max_recv_wr) err = ENOMEM;
    if (!err && nic.hit(nic.plan.post)) err = ENOMEM;
    if (err) {
      *bad_wr = wr;
      break;
    }
    ReceiveRequest& request = qp.receives.emplace_back();
    request.wr_id = wr->wr_id;
    request.sges.assign(wr->sg_list, wr->sg_list + wr->num_sge);
    for (const ibv_sge& sge : request.sges) request.length += sge.length;
    ++qp.receives_posted;
    ++nic.statistics.receives;
  }
  if (qp.state == IBV_QPS_ERR) {
    qp.flushing = true;
    nic.wake(qp);
  }
  return fail_int(err);
}

int poll_cq(ibv_cq* base, int num_entries, ibv_wc* wc) {
  auto& cq = *static_cast<CompletionQueue*>(base);
  Nic& nic = Nic::get();
  if (nic.by_hand) {
    const auto lock = nic.lock();
    while (nic.round()) {
    }
    return nic.poll(cq, num_entries, wc);
  }
  // The common case of a poller that spins: nothing is there, and it takes no lock to see that.
  if (cq.visible.load(std::memory_order_acquire) == 0 &&
      !cq.broken.load(std::memory_order_acquire) &&
      !nic.every_poll_counts.load(std::memory_order_relaxed))
    return 0;
  const auto lock = nic.lock();
  return nic.poll(cq, num_entries, wc);
}

int req_notify_cq(ibv_cq* base, int solicited_only) {
  auto& cq = *static_cast<CompletionQueue*>(base);
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  if (const int err = nic.refuse("req_notify_cq", *context_of(cq.context).of)) return fail_int(err);
  // Asking for all includes asking for some. Only what comes from now on rings.
  if (!solicited_only)
    cq.armed = CompletionQueue::Armed::kNext;
  else if (cq.armed == CompletionQueue::Armed::kNo)
    cq.armed = CompletionQueue::Armed::kSolicited;
  return 0;
}

}  // namespace fake_verbs
