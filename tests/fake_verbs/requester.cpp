// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "requester.hpp"

#include <algorithm>
#include <cstring>

namespace fake_verbs {
namespace {

constexpr int32_t kWindow = 128;  // packets without an answer
constexpr uint32_t kAckEvery = 32;
constexpr uint64_t kMaxMessage = 1u << 31;
constexpr int kForever = 7;  // of rnr_retry

// IBTA's table of the 32 codes, in units of 10 us; code 0 is the longest.
constexpr int kRnrTimer[32] = {65536, 1,    2,    3,     4,     6,     8,     12,
                               16,    24,   32,   48,    64,    96,    128,   192,
                               256,   384,  512,  768,   1024,  1536,  2048,  3072,
                               4096,  6144, 8192, 12288, 16384, 24576, 32768, 49152};

SendRequest& at(QueuePair& qp, uint64_t number) {
  return qp.sends[number - (qp.posted - qp.sends.size())];
}

bool is_open(const QueuePair& qp) { return qp.state == IBV_QPS_RTS || qp.state == IBV_QPS_SQD; }

int reads_ahead(const QueuePair& qp, uint64_t number) {
  int n = 0;
  for (const SendRequest& r : qp.sends) {
    if (r.number >= number) break;
    n += r.is_read() && !r.done;
  }
  return n;
}

// Completes what has ended, in order, up to the first that has not.
void finish(Nic& nic, QueuePair& qp) {
  while (!qp.sends.empty() && qp.sends.front().done) {
    const SendRequest r = std::move(qp.sends.front());
    qp.sends.pop_front();
    if (qp.cursor <= r.number) {
      qp.cursor = r.number + 1;
      qp.cursor_piece = 0;
    }
    const bool failed = r.status != IBV_WC_SUCCESS;
    if (failed || r.signaled) {
      Cqe cqe{.qp = &qp, .send = true, .retires = r.number + 1};
      cqe.wc.wr_id = r.wr_id;
      cqe.wc.status = r.status;
      static constexpr ibv_wc_opcode kOpcodes[] = {
          IBV_WC_RDMA_WRITE, IBV_WC_RDMA_WRITE, IBV_WC_SEND,      IBV_WC_SEND,    IBV_WC_RDMA_READ,
          IBV_WC_COMP_SWAP,  IBV_WC_FETCH_ADD,  IBV_WC_LOCAL_INV, IBV_WC_BIND_MW, IBV_WC_SEND};
      cqe.wc.opcode = kOpcodes[r.opcode];
      cqe.wc.byte_len = r.is_read() ? static_cast<uint32_t>(r.length) : 0;
      nic.complete(*static_cast<CompletionQueue*>(qp.send_cq), std::move(cqe));
    }
    if (failed) return nic.break_qp(qp, {});
  }
}

void fail(Nic& nic, QueuePair& qp, SendRequest& r, ibv_wc_status status) {
  r.status = status;
  r.done = true;
  finish(nic, qp);
}

// The oldest request that has no answer ends with this.
void fail_oldest(Nic& nic, QueuePair& qp, ibv_wc_status status) {
  for (SendRequest& r : qp.sends)
    if (!r.done) return fail(nic, qp, r, status);
}

void set_timer(Nic& nic, QueuePair& qp) {
  const bool in_flight = qp.psn_at_cursor() != qp.acked_psn;
  qp.timer_ns = in_flight && qp.attr.timeout != 0
                    ? kvxfer::now_ns() + (int64_t{4096} << qp.attr.timeout)
                    : kvxfer::kNever;
  nic.arm(qp.timer_ns);
}

void rewind(QueuePair& qp, uint32_t psn) {
  for (const SendRequest& r : qp.sends) {
    if (r.is_local() || !r.has_psn) continue;
    const int32_t piece = psn_diff(psn, r.first_psn);
    if (piece < 0 || piece >= static_cast<int32_t>(r.num_psns)) continue;
    qp.cursor = r.number;
    qp.cursor_piece = static_cast<uint32_t>(piece);
    return;
  }
}

void done(SendRequest& r) {
  r.done = true;
  if (r.doomed) r.status = *r.doomed;  // the plan: it has landed, and is told to have failed
}

// Everything up to and with `psn` has been acknowledged. False: so was a read whose data is
// missing.
bool acknowledge(Nic& nic, QueuePair& qp, uint32_t psn) {
  bool complete = true;
  uint32_t acked = qp.acked_psn;
  for (SendRequest& r : qp.sends) {
    if (r.is_local()) continue;
    if (!r.has_psn || psn_diff(psn, r.first_psn) < 0) break;
    if (r.done) continue;
    if (r.is_read()) {
      acked = psn_add(r.first_psn, r.answered);
      complete = psn_diff(psn, acked) < 0;
      break;
    }
    const uint32_t last = psn_add(r.first_psn, r.num_psns - 1);
    if (psn_diff(psn, last) < 0) {
      acked = psn_add(psn, 1);
      break;
    }
    done(r);
    acked = psn_add(last, 1);
  }
  if (psn_diff(acked, qp.acked_psn) > 0) {
    qp.acked_psn = acked;
    qp.retries_left = qp.attr.retry_cnt;
    qp.rnr_left = qp.attr.rnr_retry;
    qp.rewound.reset();
    set_timer(nic, qp);
  }
  if (!complete && qp.rewound != acked) {
    qp.rewound = acked;
    rewind(qp, acked);
    nic.wake(qp);
  }
  return complete;
}

ibv_wc_status check(QueuePair& qp, const SendRequest& r) {
  if (r.length > kMaxMessage) return IBV_WC_LOC_LEN_ERR;
  if (r.is_atomic() && r.length != 8) return IBV_WC_LOC_LEN_ERR;
  if (r.is_read() && qp.attr.max_rd_atomic == 0) return IBV_WC_LOC_QP_OP_ERR;
  if (!(r.flags & IBV_SEND_INLINE))
    for (const ibv_sge& sge : r.sges)
      if (sge.length > 0 && !keys_of(qp).local(qp.pd, sge.lkey, sge.addr, sge.length, r.is_read()))
        return IBV_WC_LOC_PROT_ERR;
  return IBV_WC_SUCCESS;
}

void execute_locally(Nic& nic, QueuePair& qp, SendRequest& r) {
  if (r.opcode == IBV_WR_BIND_MW) {
    ++nic.statistics.binds;
    if (nic.hit(nic.plan.bind) ||
        !keys_of(qp).bind(qp, r.window, r.new_window, r.bind, r.bind_region))
      r.status = IBV_WC_MW_BIND_ERR;
  } else if (nic.hit(nic.plan.invalidate) || !keys_of(qp).invalidate(qp, r.imm)) {
    r.status = IBV_WC_LOC_QP_OP_ERR;
  }
  if (r.status == IBV_WC_SUCCESS) return done(r);
  r.done = true;
}

// Whether the request may go out now; a new one gets its numbers.
bool start(Nic& nic, QueuePair& qp, SendRequest& r) {
  if (r.has_psn) {
    // Soft-RoCE's fence waits for every READ without an answer, that which is sent again included.
    const bool again = psn_diff(r.first_psn, qp.sent_psn) < 0;
    return !(nic.plan.soft_roce && again && r.is_read() && (r.flags & IBV_SEND_FENCE) != 0);
  }
  if (qp.state == IBV_QPS_SQD) return false;
  const int ahead = reads_ahead(qp, r.number);
  if (r.flags & IBV_SEND_FENCE && ahead > 0) return false;
  if (r.is_read() && ahead > 0 && ahead >= qp.attr.max_rd_atomic) return false;
  if (const std::optional<ibv_wc_status> status = nic.doom(qp, r.is_read())) {
    // Half of them fail before anything left, half after all of it has landed.
    if (nic.hit(0.5)) return fail(nic, qp, r, *status), false;
    r.doomed = status;
  }
  if (const ibv_wc_status status = check(qp, r); status != IBV_WC_SUCCESS)
    return fail(nic, qp, r, status), false;
  r.has_psn = true;
  r.first_psn = qp.next_psn;
  if (!r.is_local()) {
    const uint64_t pieces = (r.length + qp.mtu() - 1) / qp.mtu();
    r.num_psns = r.is_atomic() ? 1 : std::max<uint32_t>(1, static_cast<uint32_t>(pieces));
  }
  qp.next_psn = psn_add(qp.next_psn, r.num_psns);
  return true;
}

// Copies [offset, offset + n) of what the request's list names; false: a key is no longer good.
bool gather(QueuePair& qp, const SendRequest& r, uint64_t offset, size_t n,
            std::vector<std::byte>& out) {
  out.reserve(n);
  if (r.flags & IBV_SEND_INLINE) {
    const auto from = r.inlined.begin() + static_cast<ptrdiff_t>(offset);
    out.assign(from, from + static_cast<ptrdiff_t>(n));
    return true;
  }
  for (const ibv_sge& sge : r.sges) {
    if (offset >= sge.length) {
      offset -= sge.length;
      continue;
    }
    const size_t take = std::min<size_t>(n - out.size(), sge.length - offset);
    if (take == 0) break;
    const std::byte* from = keys_of(qp).local(qp.pd, sge.lkey, sge.addr + offset, take, false);
    if (!from) return false;
    out.insert(out.end(), from, from + take);
    offset = 0;
  }
  return true;
}

bool scatter(Nic& nic, QueuePair& qp, const SendRequest& r, uint64_t offset,
             const std::vector<std::byte>& in) {
  size_t at = 0;
  for (const ibv_sge& sge : r.sges) {
    if (offset >= sge.length) {
      offset -= sge.length;
      continue;
    }
    const size_t take = std::min<size_t>(in.size() - at, sge.length - offset);
    if (take == 0) break;
    std::byte* to = keys_of(qp).local(qp.pd, sge.lkey, sge.addr + offset, take, true);
    if (!to) return false;
    std::memcpy(to, in.data() + at, take);
    nic.statistics.bytes_placed += take;
    at += take;
    offset = 0;
  }
  return true;
}

void send_piece(Nic& nic, QueuePair& qp, SendRequest& r) {
  // Soft-RoCE finds no route from an interface that is down, and blames the queue pair.
  if (nic.plan.soft_roce && qp.port && !qp.port->up) return fail(nic, qp, r, IBV_WC_LOC_QP_OP_ERR);
  const uint32_t piece = qp.cursor_piece;
  const uint64_t offset = uint64_t{piece} * qp.mtu();
  Packet packet;
  Head& head = packet.head;
  head.psn = psn_add(r.first_psn, piece);
  head.remote_addr = r.remote_addr + offset;
  head.rkey = r.rkey;
  head.length = static_cast<uint32_t>(r.length);
  uint32_t advance = 1;
  if (r.is_read()) {
    // After a loss a read goes on where the answers ended.
    head.kind = r.is_atomic() ? Kind::kAtomicRequest : Kind::kReadRequest;
    head.flags = kFirst | kLast | kAckRequest;
    if (r.opcode == IBV_WR_ATOMIC_FETCH_AND_ADD) head.flags |= kFetchAdd;
    head.length = static_cast<uint32_t>(r.length - offset);
    head.compare_add = r.compare_add;
    head.swap = r.swap;
    head.reads_ahead = static_cast<uint32_t>(reads_ahead(qp, r.number));
    advance = r.num_psns - piece;
  } else {
    const bool last = piece + 1 == r.num_psns;
    const size_t n = std::min<uint64_t>(qp.mtu(), r.length - offset);
    if (!gather(qp, r, offset, n, packet.payload)) return fail(nic, qp, r, IBV_WC_LOC_PROT_ERR);
    const bool write = r.opcode == IBV_WR_RDMA_WRITE || r.opcode == IBV_WR_RDMA_WRITE_WITH_IMM;
    const bool imm = r.opcode == IBV_WR_RDMA_WRITE_WITH_IMM || r.opcode == IBV_WR_SEND_WITH_IMM;
    head.kind = write ? Kind::kWrite : Kind::kSend;
    if (piece == 0) head.flags |= kFirst;
    if (last) {
      head.flags |= kLast | kAckRequest;
      if (imm) head.flags |= kImm;
      if (r.opcode == IBV_WR_SEND_WITH_INV) head.flags |= kInvalidate;
      if (r.flags & IBV_SEND_SOLICITED) head.flags |= kSolicited;
      head.imm = r.imm;
    } else if ((piece + 1) % kAckEvery == 0) {
      head.flags |= kAckRequest;
    }
  }
  if (psn_diff(head.psn, qp.sent_psn) < 0) ++nic.statistics.retransmissions;
  const uint32_t end = psn_add(head.psn, advance);
  if (psn_diff(end, qp.sent_psn) > 0) qp.sent_psn = end;
  nic.send(qp, std::move(packet));
  qp.cursor_piece += advance;
  if (qp.cursor_piece >= r.num_psns) {
    ++qp.cursor;
    qp.cursor_piece = 0;
  }
  if (qp.timer_ns == kvxfer::kNever) set_timer(nic, qp);
}

void on_data(Nic& nic, QueuePair& qp, const Packet& packet) {
  const Head& head = packet.head;
  const bool whole = acknowledge(nic, qp, psn_add(head.psn, kPsnMask));
  finish(nic, qp);
  if (!whole || !is_open(qp)) return;
  for (SendRequest& r : qp.sends) {
    if (r.is_local() || !r.has_psn || !r.is_read() || r.done) continue;
    const int32_t piece = psn_diff(head.psn, r.first_psn);
    if (piece != static_cast<int32_t>(r.answered)) return;  // an old copy, or one after a hole
    if ((head.kind == Kind::kAtomicResponse) != r.is_atomic())
      return fail(nic, qp, r, IBV_WC_BAD_RESP_ERR);
    const uint64_t offset = uint64_t{r.answered} * qp.mtu();
    std::vector<std::byte> old;
    if (r.is_atomic()) {
      old.resize(8);
      std::memcpy(old.data(), &head.compare_add, 8);
    } else if (packet.payload.size() != std::min<uint64_t>(qp.mtu(), r.length - offset)) {
      return fail(nic, qp, r, IBV_WC_BAD_RESP_ERR);
    }
    if (!scatter(nic, qp, r, offset, r.is_atomic() ? old : packet.payload))
      return fail(nic, qp, r, IBV_WC_LOC_PROT_ERR);
    if (++r.answered == r.num_psns) done(r);
    qp.acked_psn = psn_add(head.psn, 1);
    qp.retries_left = qp.attr.retry_cnt;
    qp.rnr_left = qp.attr.rnr_retry;
    qp.rewound.reset();
    // A retransmission may be under way behind what has arrived meanwhile.
    if (psn_diff(qp.psn_at_cursor(), qp.acked_psn) < 0) {
      if (r.done) {
        qp.cursor = r.number + 1;
        qp.cursor_piece = 0;
      } else {
        rewind(qp, qp.acked_psn);
      }
    }
    set_timer(nic, qp);
    return finish(nic, qp);
  }
}

}  // namespace

bool send_some(Nic& nic, QueuePair& qp, int budget) {
  while (is_open(qp)) {
    if (qp.paused_until_ns > kvxfer::now_ns()) {
      nic.arm(qp.paused_until_ns);
      return false;
    }
    if (qp.cursor == qp.posted) break;
    if (budget-- <= 0) return true;
    SendRequest& r = at(qp, qp.cursor);
    if (r.done) {
      if (r.status != IBV_WC_SUCCESS) break;  // waits for those before it, and ends the queue
      ++qp.cursor;
      qp.cursor_piece = 0;
      continue;
    }
    if (!start(nic, qp, r)) break;
    if (r.is_local()) {
      execute_locally(nic, qp, r);
      if (r.status == IBV_WC_SUCCESS) ++qp.cursor;
      finish(nic, qp);
    } else if (psn_diff(qp.psn_at_cursor(), qp.acked_psn) < kWindow) {
      send_piece(nic, qp, r);
    } else {
      break;
    }
  }
  if (qp.state == IBV_QPS_SQD && qp.draining && qp.psn_at_cursor() == qp.acked_psn) {
    qp.draining = false;
    ibv_async_event event{};
    event.element.qp = &qp;
    event.event_type = IBV_EVENT_SQ_DRAINED;
    if (qp.attr.en_sqd_async_notify) nic.tell(context_of(qp.context), event);
  }
  return false;
}

void on_answer(Nic& nic, QueuePair& qp, const Packet& packet) {
  const Head& head = packet.head;
  if (!is_open(qp)) return;
  // An answer to something that was never sent or is long answered: a copy that was late.
  if (psn_diff(head.psn, qp.acked_psn) < 0 || psn_diff(head.psn, qp.sent_psn) >= 0) return;
  if (head.kind != Kind::kAck) {
    on_data(nic, qp, packet);
  } else if (head.syndrome == Syndrome::kOk) {
    acknowledge(nic, qp, head.psn);
    finish(nic, qp);
  } else {
    const bool whole = acknowledge(nic, qp, psn_add(head.psn, kPsnMask));
    finish(nic, qp);
    if (!whole || !is_open(qp)) return;
    switch (head.syndrome) {
      case Syndrome::kSequence:
        if (qp.retries_left-- <= 0) return fail_oldest(nic, qp, IBV_WC_RETRY_EXC_ERR);
        rewind(qp, head.psn);
        break;
      case Syndrome::kRnr:
        ++nic.statistics.rnr_naks;
        if (qp.attr.rnr_retry != kForever && qp.rnr_left-- <= 0)
          return fail_oldest(nic, qp, IBV_WC_RNR_RETRY_EXC_ERR);
        rewind(qp, head.psn);
        qp.paused_until_ns = kvxfer::now_ns() + kRnrTimer[head.rnr_timer & 31] * int64_t{10'000};
        qp.timer_ns = kvxfer::kNever;
        break;
      case Syndrome::kInvalidRequest:
        return fail_oldest(nic, qp, IBV_WC_REM_INV_REQ_ERR);
      case Syndrome::kAccess:
        return fail_oldest(nic, qp, IBV_WC_REM_ACCESS_ERR);
      default:
        return fail_oldest(nic, qp, IBV_WC_REM_OP_ERR);
    }
  }
  nic.wake(qp);
}

void on_timer(Nic& nic, QueuePair& qp) {
  if (!is_open(qp)) return;
  ++nic.statistics.timeouts;
  qp.timer_ns = kvxfer::kNever;
  if (qp.retries_left-- <= 0) return fail_oldest(nic, qp, IBV_WC_RETRY_EXC_ERR);
  qp.rewound.reset();
  rewind(qp, qp.acked_psn);
  nic.wake(qp);
}

}  // namespace fake_verbs
