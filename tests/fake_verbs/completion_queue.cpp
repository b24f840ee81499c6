// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "completion_queue.hpp"

#include <algorithm>

#include "nic.hpp"

namespace fake_verbs {

void Nic::complete(CompletionQueue& cq, Cqe cqe) {
  if (cq.overrun) return;
  if (cq.entries.size() >= static_cast<size_t>(cq.cqe)) {
    // What does not fit is lost, and the queue is of no more use to anybody; but Soft-RoCE goes on
    // as if nothing were.
    Context& context = context_of(cq.context);
    ibv_async_event event{};
    event.element.cq = &cq;
    event.event_type = IBV_EVENT_CQ_ERR;
    tell(context, event);
    if (plan.soft_roce) return;
    cq.overrun = true;
    cq.broken.store(true, std::memory_order_release);
    for (const auto& [key, qp] : context.qps) {
      if (qp->send_cq != &cq && qp->recv_cq != &cq) continue;
      qp->hindered = true;  // nobody can poll what it still had
      break_qp(*qp, IBV_EVENT_QP_FATAL);
    }
    return;
  }
  ibv_wc& wc = cqe.wc;
  wc.qp_num = cqe.qp->qp_num;
  if (wc.status != IBV_WC_SUCCESS) {
    // Of a failed request only wr_id, status, vendor_err and qp_num mean anything.
    wc.opcode = IBV_WC_DRIVER3;
    wc.byte_len = wc.imm_data = 0xdeadbeef;
    wc.vendor_err = 0xfa;
    wc.wc_flags = ~0u;
    cqe.solicited = true;
  }
  if (hit(plan.hold_cqe.probability)) {
    cqe.visible_ns = kvxfer::now_ns() + within(plan.hold_cqe.up_to_ns);
    arm(cqe.visible_ns);
  }
  ++statistics.completions;
  cq.entries.push_back(std::move(cqe));
  show(cq);
}

// Makes visible what is due, in order, and rings.
void Nic::show(CompletionQueue& cq) {
  const int64_t now = kvxfer::now_ns();
  uint32_t n = cq.visible.load(std::memory_order_relaxed);
  bool ring = false;
  for (; n < cq.entries.size() && cq.entries[n].visible_ns <= now; ++n)
    ring |= cq.armed == CompletionQueue::Armed::kNext ||
            (cq.armed == CompletionQueue::Armed::kSolicited && cq.entries[n].solicited);
  cq.visible.store(n, std::memory_order_release);
  if (!ring || !cq.channel) return;
  cq.armed = CompletionQueue::Armed::kNo;
  cq.channel_of()->events.push({&cq});
}

int64_t Nic::show_completions(int64_t now) {
  int64_t next = kvxfer::kNever;
  for (const auto& [key, context] : contexts)
    for (const auto& [unused, cq] : context->cqs) {
      show(*cq);
      const uint32_t n = cq->visible.load(std::memory_order_relaxed);
      if (n < cq->entries.size()) next = std::min(next, std::max(now, cq->entries[n].visible_ns));
    }
  return next;
}

int Nic::poll(CompletionQueue& cq, int most, ibv_wc* out) {
  Device& device = *context_of(cq.context).of;
  if (plan.remove != 0 && ++polls == plan.remove) remove_device(device);
  if (device.removed) return -EIO;
  int n = static_cast<int>(cq.visible.load(std::memory_order_relaxed));
  if (n == 0 && cq.overrun) return -EIO;
  n = std::min(n, most);
  if (n > 1 && hit(plan.short_poll)) n = static_cast<int>(within(n - 2)) + 1;
  for (int i = 0; i < n; ++i) {
    Cqe& cqe = cq.entries.front();
    out[i] = cqe.wc;
    if (cqe.send)
      cqe.qp->retired = std::max(cqe.qp->retired, cqe.retires);
    else
      ++cqe.qp->receives_retired;
    cq.entries.pop_front();
  }
  cq.visible.fetch_sub(static_cast<uint32_t>(n), std::memory_order_release);
  return n;
}

void Nic::flush(QueuePair& qp) {
  qp.flushing = false;
  const auto end = [&](ibv_cq* cq, uint64_t wr_id, bool send, uint64_t retires) {
    Cqe cqe{.qp = &qp, .send = send, .retires = retires};
    cqe.wc.wr_id = wr_id;
    cqe.wc.status = IBV_WC_WR_FLUSH_ERR;
    complete(*static_cast<CompletionQueue*>(cq), std::move(cqe));
  };
  // Each is completed, signalled or not: nobody could tell otherwise what has ended.
  for (; !qp.sends.empty(); qp.sends.pop_front())
    end(qp.send_cq, qp.sends.front().wr_id, true, qp.sends.front().number + 1);
  qp.cursor = qp.posted;
  qp.cursor_piece = 0;
  if (qp.receiving) end(qp.recv_cq, qp.receiving->wr_id, false, 0);
  qp.receiving.reset();
  for (; !qp.receives.empty(); qp.receives.pop_front())
    end(qp.recv_cq, qp.receives.front().wr_id, false, 0);
}

void Nic::forget(QueuePair& qp) {
  for (ibv_cq* base : {qp.send_cq, qp.recv_cq}) {
    auto& cq = *static_cast<CompletionQueue*>(base);
    const uint32_t visible = cq.visible.load(std::memory_order_relaxed);
    uint32_t gone = 0;
    for (uint32_t i = 0; i < visible; ++i) gone += cq.entries[i].qp == &qp;
    std::erase_if(cq.entries, [&](const Cqe& cqe) { return cqe.qp == &qp; });
    cq.visible.fetch_sub(gone, std::memory_order_release);
  }
}

void Nic::forget(CompletionQueue& cq) {
  if (cq.channel)
    cq.channel_of()->events.remove_if([&](const CompEvent& event) { return event.cq == &cq; });
}

}  // namespace fake_verbs
