// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "responder.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

#include "common/racy_copy.hpp"

namespace fake_verbs {
namespace {

void answer(Nic& nic, QueuePair& qp, Syndrome syndrome, uint32_t psn) {
  if (syndrome == Syndrome::kOk && !qp.answers.empty()) {
    Head& last = qp.answers.back().packet.head;  // one acknowledgement stands for all before it
    if (last.kind == Kind::kAck && last.syndrome == Syndrome::kOk) {
      if (psn_diff(psn, last.psn) > 0) last.psn = psn;
      return;
    }
  }
  Answer& out = qp.answers.emplace_back();
  out.packet.head.kind = Kind::kAck;
  out.packet.head.syndrome = syndrome;
  out.packet.head.psn = psn;
  out.packet.head.rnr_timer = qp.attr.min_rnr_timer;
  nic.wake(qp);
}

// A request that ends the connection: what was asked before is answered first, then this is
// refused, and the queue pair is in ERR.
void refuse(Nic& nic, QueuePair& qp, uint32_t psn, Syndrome syndrome) {
  answer_some(nic, qp, std::numeric_limits<int>::max());
  if (qp.state == IBV_QPS_ERR) return;
  Packet nak;
  nak.head.kind = Kind::kAck;
  nak.head.syndrome = syndrome;
  nak.head.psn = psn;
  nic.send(qp, std::move(nak));
  nic.break_qp(qp, syndrome == Syndrome::kAccess ? IBV_EVENT_QP_ACCESS_ERR : IBV_EVENT_QP_REQ_ERR);
}

// The receive that is being filled fails by its own user's fault.
void fail_receive(Nic& nic, QueuePair& qp, uint32_t psn, ibv_wc_status status) {
  Cqe cqe{.qp = &qp, .solicited = true};
  cqe.wc.wr_id = qp.receiving->wr_id;
  cqe.wc.status = status;
  qp.receiving.reset();
  nic.complete(*static_cast<CompletionQueue*>(qp.recv_cq), std::move(cqe));
  refuse(nic, qp, psn,
         status == IBV_WC_LOC_LEN_ERR ? Syndrome::kInvalidRequest : Syndrome::kOperational);
}

bool take_receive(Nic& nic, QueuePair& qp, uint32_t psn) {
  if (qp.receives.empty()) {
    qp.nak_sent = true;  // those behind it find a gap, of which this is the explanation
    answer(nic, qp, Syndrome::kRnr, psn);
    return false;
  }
  qp.receiving = std::move(qp.receives.front());
  qp.receives.pop_front();
  return true;
}

void complete_receive(Nic& nic, QueuePair& qp, const Head& head, uint64_t nbytes) {
  Cqe cqe{.qp = &qp, .solicited = (head.flags & kSolicited) != 0};
  ibv_wc& wc = cqe.wc;
  wc.wr_id = qp.receiving->wr_id;
  wc.status = IBV_WC_SUCCESS;
  wc.opcode = head.kind == Kind::kWrite ? IBV_WC_RECV_RDMA_WITH_IMM : IBV_WC_RECV;
  wc.byte_len = static_cast<uint32_t>(nbytes);
  wc.src_qp = head.src_qpn;
  if (head.flags & kImm) wc.wc_flags |= IBV_WC_WITH_IMM, wc.imm_data = head.imm;
  if (head.flags & kInvalidate) wc.wc_flags |= IBV_WC_WITH_INV, wc.invalidated_rkey = head.imm;
  qp.receiving.reset();
  nic.complete(*static_cast<CompletionQueue*>(qp.recv_cq), std::move(cqe));
}

// Where the payload of a SEND goes; false: the queue pair broke.
bool place_send(Nic& nic, QueuePair& qp, const Packet& packet) {
  const std::vector<std::byte>& in = packet.payload;
  if (qp.received + in.size() > qp.receiving->length)
    return fail_receive(nic, qp, packet.head.psn, IBV_WC_LOC_LEN_ERR), false;
  uint64_t offset = qp.received;
  size_t at = 0;
  for (const ibv_sge& sge : qp.receiving->sges) {
    if (offset >= sge.length) {
      offset -= sge.length;
      continue;
    }
    const size_t take = std::min<size_t>(in.size() - at, sge.length - offset);
    if (take == 0) break;
    std::byte* to = keys_of(qp).local(qp.pd, sge.lkey, sge.addr + offset, take, true);
    if (!to) return fail_receive(nic, qp, packet.head.psn, IBV_WC_LOC_PROT_ERR), false;
    std::memcpy(to, in.data() + at, take);
    nic.statistics.bytes_placed += take;
    at += take;
    offset = 0;
  }
  return true;
}

void on_send(Nic& nic, QueuePair& qp, const Packet& packet) {
  const Head& head = packet.head;
  if (head.flags & kFirst) {
    if (!take_receive(nic, qp, head.psn)) return;
    qp.received = 0;
  }
  if (!qp.receiving) return refuse(nic, qp, head.psn, Syndrome::kInvalidRequest);
  if (!place_send(nic, qp, packet)) return;
  qp.received += packet.payload.size();
  if (head.flags & kLast) {
    if (head.flags & kInvalidate && !keys_of(qp).invalidate(qp, head.imm))
      return fail_receive(nic, qp, head.psn, IBV_WC_LOC_QP_OP_ERR);
    complete_receive(nic, qp, head, qp.received);
  }
  qp.expected_psn = psn_add(head.psn, 1);
  if (head.flags & kAckRequest) answer(nic, qp, Syndrome::kOk, head.psn);
}

void on_write(Nic& nic, QueuePair& qp, const Packet& packet) {
  const Head& head = packet.head;
  if (!(qp.attr.qp_access_flags & IBV_ACCESS_REMOTE_WRITE))
    return refuse(nic, qp, head.psn, Syndrome::kInvalidRequest);
  // The whole range when it begins, so that nothing of a write that is too long lands; and again
  // for each piece, since a window may have been taken away meanwhile.
  const bool first = head.flags & kFirst;
  if (head.length > 0 && first &&
      !keys_of(qp).remote(qp, head.rkey, head.remote_addr, head.length, IBV_ACCESS_REMOTE_WRITE))
    return refuse(nic, qp, head.psn, Syndrome::kAccess);
  std::byte* to = nullptr;
  if (!packet.payload.empty()) {
    to = keys_of(qp).remote(qp, head.rkey, head.remote_addr, packet.payload.size(),
                            IBV_ACCESS_REMOTE_WRITE);
    if (!to) return refuse(nic, qp, head.psn, Syndrome::kAccess);
  }
  if (head.flags & kImm && !take_receive(nic, qp, head.psn)) return;
  if (to) {
    std::memcpy(to, packet.payload.data(), packet.payload.size());
    nic.statistics.bytes_placed += packet.payload.size();
  }
  if (head.flags & kImm) complete_receive(nic, qp, head, head.length);
  qp.expected_psn = psn_add(head.psn, 1);
  if (head.flags & kAckRequest) answer(nic, qp, Syndrome::kOk, head.psn);
}

void on_read(Nic& nic, QueuePair& qp, const Packet& packet, bool again) {
  const Head& head = packet.head;
  if (!(qp.attr.qp_access_flags & IBV_ACCESS_REMOTE_READ) ||
      head.reads_ahead >= qp.attr.max_dest_rd_atomic)
    return refuse(nic, qp, head.psn, Syndrome::kInvalidRequest);
  if (head.length > 0 &&
      !keys_of(qp).remote(qp, head.rkey, head.remote_addr, head.length, IBV_ACCESS_REMOTE_READ))
    return refuse(nic, qp, head.psn, Syndrome::kAccess);
  // What is left of an answer to the same request would only be said twice.
  if (again)
    std::erase_if(qp.answers, [&](const Answer& a) {
      return a.packet.head.kind == Kind::kReadResponse &&
             psn_diff(a.packet.head.psn, head.psn) <= 0 &&
             psn_diff(psn_add(a.packet.head.psn, a.num_packets), head.psn) > 0;
    });
  Answer& out = qp.answers.emplace_back();
  out.packet.head.kind = Kind::kReadResponse;
  out.packet.head.psn = head.psn;
  out.packet.head.remote_addr = head.remote_addr;
  out.packet.head.rkey = head.rkey;
  out.packet.head.length = head.length;
  out.num_packets = std::max(1u, (head.length + qp.mtu() - 1) / qp.mtu());
  if (!again) qp.expected_psn = psn_add(head.psn, out.num_packets);
  nic.wake(qp);
}

void on_atomic(Nic& nic, QueuePair& qp, const Packet& packet) {
  const Head& head = packet.head;
  if (!(qp.attr.qp_access_flags & IBV_ACCESS_REMOTE_ATOMIC) || head.remote_addr % 8 != 0 ||
      head.reads_ahead >= qp.attr.max_dest_rd_atomic)
    return refuse(nic, qp, head.psn, Syndrome::kInvalidRequest);
  std::byte* to = keys_of(qp).remote(qp, head.rkey, head.remote_addr, 8, IBV_ACCESS_REMOTE_ATOMIC);
  if (!to) return refuse(nic, qp, head.psn, Syndrome::kAccess);
  uint64_t old = 0;
  std::memcpy(&old, to, 8);
  const uint64_t next = head.flags & kFetchAdd    ? old + head.compare_add
                        : old == head.compare_add ? head.swap
                                                  : old;
  std::memcpy(to, &next, 8);
  qp.atomics.emplace_back(head.psn, old);
  if (qp.atomics.size() > qp.attr.max_dest_rd_atomic) qp.atomics.pop_front();
  qp.expected_psn = psn_add(head.psn, 1);
}

void answer_atomic(Nic& nic, QueuePair& qp, uint32_t psn) {
  for (const auto& [at, old] : qp.atomics) {
    if (at != psn) continue;
    Answer& out = qp.answers.emplace_back();
    out.packet.head.kind = Kind::kAtomicResponse;
    out.packet.head.psn = psn;
    out.packet.head.compare_add = old;
    nic.wake(qp);
    return;
  }
}

}  // namespace

void on_request(Nic& nic, QueuePair& qp, const Packet& packet) {
  const Head& head = packet.head;
  if (!qp.established) {
    qp.established = true;
    if (qp.state == IBV_QPS_RTR) {
      ibv_async_event event{};
      event.element.qp = &qp;
      event.event_type = IBV_EVENT_COMM_EST;
      nic.tell(context_of(qp.context), event);
    }
  }
  const int32_t ahead = psn_diff(head.psn, qp.expected_psn);
  if (ahead > 0) {
    if (!qp.nak_sent) answer(nic, qp, Syndrome::kSequence, qp.expected_psn);
    qp.nak_sent = true;
    return;
  }
  if (ahead < 0) {  // seen before: reads are read again, all else is only answered
    if (head.kind == Kind::kReadRequest)
      on_read(nic, qp, packet, true);
    else if (head.kind == Kind::kAtomicRequest)
      answer_atomic(nic, qp, head.psn);
    else
      answer(nic, qp, Syndrome::kOk, psn_add(qp.expected_psn, kPsnMask));
    return;
  }
  qp.nak_sent = false;
  switch (head.kind) {
    case Kind::kSend:
      return on_send(nic, qp, packet);
    case Kind::kWrite:
      return on_write(nic, qp, packet);
    case Kind::kReadRequest:
      return on_read(nic, qp, packet, false);
    case Kind::kAtomicRequest:
      on_atomic(nic, qp, packet);
      return answer_atomic(nic, qp, head.psn);
    default:
      return;
  }
}

bool answer_some(Nic& nic, QueuePair& qp, int budget) {
  while (!qp.answers.empty()) {
    if (budget-- <= 0) return true;
    Answer& next = qp.answers.front();
    const Head& head = next.packet.head;
    if (head.kind != Kind::kReadResponse) {
      Packet packet = std::move(next.packet);
      qp.answers.pop_front();
      nic.send(qp, std::move(packet));
      continue;
    }
    const uint64_t offset = uint64_t{next.sent} * qp.mtu();
    const size_t n = std::min<uint64_t>(qp.mtu(), head.length - offset);
    Packet packet = next.packet;
    packet.head.psn = psn_add(head.psn, next.sent);
    if (n > 0) {
      const std::byte* from =
          keys_of(qp).remote(qp, head.rkey, head.remote_addr + offset, n, IBV_ACCESS_REMOTE_READ);
      if (!from) {  // taken away while it was being read
        qp.answers.clear();
        return refuse(nic, qp, packet.head.psn, Syndrome::kAccess), false;
      }
      packet.payload.resize(n);
      kvxfer::racy_copy(packet.payload.data(), from, n);
    }
    if (++next.sent == next.num_packets) qp.answers.pop_front();
    nic.send(qp, std::move(packet));
  }
  return false;
}

}  // namespace fake_verbs
